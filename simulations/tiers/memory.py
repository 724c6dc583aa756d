"""Links in memory: what the driver needs of a transport, with the simulated network in between.

A small stand-in for `transport/libp2p.py`, with its rules: one connection to a peer, the one that
the smaller peer id made if both dialled; a dial takes a round trip here and half a one more there;
a stream reaches the other side with its first bytes; silence is noticed, not told. It leaves out
windows and whatever else is above `driver.py`: only control messages travel here. Gossip and DHT
are the simulator's models, in the place of py-libp2p's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from meshnode.errors import PeerUnreachableError
from meshnode.identity import PeerId
from meshnode.transport import Handler, OnAdvert, Stream
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Link, Machine
from meshnode_simulations.kernel.world import DIAL_TIMEOUT_S, World

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostEvents:
    """What a host tells its owner, synchronously."""

    connected: Callable[[PeerId], None]
    disconnected: Callable[[PeerId, str], None]


@dataclass(slots=True)
class Wires:
    """All hosts that are switched on, by machine index, and the world they are in."""

    world: World
    hosts: dict[int, MemoryHost] = field(default_factory=dict)

    def carry(
        self, link: Link, source: MemoryHost, size_bytes: int, arrive: Callable[[MemoryHost], None]
    ) -> None:
        """Call `arrive` with the host at the other end when so many bytes are there. Nothing
        arrives if the connection is over by then, or leads nowhere."""
        if source.is_off:
            return
        machine = source.machine
        target = link.b if machine is link.a else link.a
        at_ns = self.world.arrival_ns(link, machine, target, size_bytes)
        self.world.loop.at(at_ns, self._land, link, machine, target, arrive)

    def _land(
        self, link: Link, source: Machine, target: Machine, arrive: Callable[[MemoryHost], None]
    ) -> None:
        host = self.hosts.get(target.index)
        if host is not None and self.world.network.reaches(source.index, target.index):
            arrive(host)


class MemoryStream(Stream):
    """One end of a stream over a link."""

    def __init__(self, host: MemoryHost, link: Link, protocol: str) -> None:
        self._host = host
        self._link = link
        self._protocol = protocol
        self._far: MemoryStream | None = None
        self._received = bytearray()
        self._changed = trio.Event()
        self._has_ended = False
        self._is_broken = False
        self._is_closed = False
        self._sent_eof = False

    @property
    def peer_id(self) -> str:
        far = self._link.b if self._host.machine is self._link.a else self._link.a
        return far.peer_id

    @property
    def protocol(self) -> str:
        return self._protocol

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        self._carry(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        self._sent_eof = True
        self._carry(None)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self._received:
                count = len(self._received) if max_bytes is None else max_bytes
                data = bytes(self._received[:count])
                del self._received[:count]
                return data
            if self._has_ended:
                return b""
            self._check()
            self._changed = trio.Event()
            await self._changed.wait()

    async def reset(self) -> None:
        self._end()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self._sent_eof and self._has_ended:
            self._is_closed = True
        self._end()
        await trio.lowlevel.checkpoint()

    def cut(self) -> None:
        """The connection is over, or the other side has abandoned the stream."""
        self._is_broken = True
        self._changed.set()

    def _end(self) -> None:
        if not self._is_closed and not self._is_broken:
            self._host.wires.carry(self._link, self._host, 0, lambda host: self._reach(host).cut())
        self._is_closed = True
        self._changed.set()

    def _check(self) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError("stream was closed")
        if self._is_broken:
            raise trio.BrokenResourceError(f"stream to {self.peer_id} broke")

    def _carry(self, data: bytes | None) -> None:
        """`data`, or None for the end of it."""
        size_bytes = 0 if data is None else len(data)
        self._host.wires.carry(
            self._link, self._host, size_bytes, lambda host: self._reach(host).take(data)
        )

    def _reach(self, host: MemoryHost) -> MemoryStream:
        """The other end, which comes to be with the first bytes that arrive there."""
        if self._far is None:
            self._far = MemoryStream(host, self._link, self._protocol)
            self._far._far = self
            host.accept(self._far)
        return self._far

    def take(self, data: bytes | None) -> None:
        """Something has arrived."""
        if self._is_closed or self._is_broken:
            return
        if data is None:
            self._has_ended = True
        else:
            self._received += data
            self._host.heard(self._link, len(data))
        self._changed.set()


class MemoryHost:
    """One machine on the network, for one run of it: a `transport.Host`."""

    def __init__(self, wires: Wires, machine: Machine, events: HostEvents) -> None:
        self.wires = wires
        self.machine = machine
        self.is_off = False
        """Once it is, nothing leaves it any more, whatever its tasks do when they are ended."""
        self._events = events
        self._handlers: dict[str, Handler] = {}
        self._admitted: dict[int, Link] = {}
        self._streams: dict[Link, list[MemoryStream]] = {}
        self._nursery: trio.Nursery | None = None

    def serve_in(self, nursery: trio.Nursery) -> None:
        """From now on; handlers run in the nursery."""
        self._nursery = nursery
        self.wires.hosts[self.machine.index] = self

    def switch_off(self) -> None:
        self.is_off = True
        self.wires.hosts.pop(self.machine.index, None)

    # --- peers ----------------------------------------------------------------------------------

    def peers(self) -> tuple[PeerId, ...]:
        machines = self.wires.world.machines
        return tuple(machines[index].peer_id for index in self.machine.links)

    def admit(self, peer: PeerId) -> None:
        link = self._link_to(peer)
        if link is not None:
            self._admitted[self._index(peer)] = link

    def is_admitted(self, peer: PeerId) -> bool:
        link = self._link_to(peer)
        return link is not None and self._admitted.get(self._index(peer)) is link

    async def dial(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        """Raises `PeerUnreachableError` if nobody answers in time."""
        if self._link_to(peer) is not None:
            return
        world, machine = self.wires.world, self.machine
        other = world.by_peer.get(peer)
        world.trace.note(
            world.loop.now_ns, machine.index, -1 if other is None else other.index, "dial"
        )
        link: Link | None = None
        with trio.move_on_after(DIAL_TIMEOUT_S):
            link = await self._shake_hands(other, addrs)
        if link is not None:
            self.adopt(link)
            self.wires.carry(link, self, 0, lambda host: host.adopt(link))
        if self._link_to(peer) is None:
            raise PeerUnreachableError(f"no address of {peer} answered")

    async def _shake_hands(self, other: Machine | None, addrs: tuple[str, ...]) -> Link:
        """A round trip, if anybody is there to answer."""
        world, machine = self.wires.world, self.machine
        if other is None or other.address not in addrs:
            await trio.sleep_forever()
        assert other is not None
        await trio.sleep(world.network.delay_ns(machine.index, other.index) / NS_PER_S)
        is_there = other.index in self.wires.hosts and world.may_dial(machine, other)
        if not is_there or not world.network.joins(machine.index, other.index):
            await trio.sleep_forever()
        await trio.sleep(world.network.delay_ns(other.index, machine.index) / NS_PER_S)
        return Link(machine, other)

    async def disconnect(self, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        link = self._link_to(peer)
        if link is not None:
            self._close(link)
            self.lose(link, "closed here")

    # --- one connection per peer, as in `Libp2pHost` ---------------------------------------------

    def adopt(self, link: Link) -> None:
        """Use a new connection, or close it if the one we have is to be kept."""
        far = self._far(link)
        known = self.machine.links.get(far.index)
        if known is not None:
            if not self._is_better(link, known):
                self._close(link)
                return
            self._close(known)
            self.lose(known, "replaced by a new connection")
        self.machine.links[far.index] = link
        world = self.wires.world
        world.trace.note(world.loop.now_ns, self.machine.index, far.index, "connect")
        self._events.connected(far.peer_id)

    def _is_better(self, link: Link, known: Link) -> bool:
        if link.a is known.a:
            return True
        return (link.a is self.machine) == (self.machine.peer_id < self._far(link).peer_id)

    def _close(self, link: Link) -> None:
        """Tell the other end that a connection is over."""
        self.wires.carry(link, self, 0, lambda host: host.lose(link, "closed there"))

    def lose(self, link: Link, reason: str) -> None:
        """A connection is over here; once per connection."""
        for stream in self._streams.pop(link, ()):
            stream.cut()
        far = self._far(link)
        if self.machine.links.get(far.index) is link:
            del self.machine.links[far.index]
            self._events.disconnected(far.peer_id, reason)

    # --- streams --------------------------------------------------------------------------------

    def handle(self, protocol: str, handler: Handler, *, members_only: bool = True) -> None:
        if members_only:
            raise NotImplementedError("the driver has no streams for members only")
        self._handlers[protocol] = handler

    async def open_stream(self, peer: PeerId, protocol: str) -> MemoryStream:
        await trio.lowlevel.checkpoint()
        link = self._link_to(peer)
        if link is None:
            raise PeerUnreachableError(f"not connected to {peer}")
        stream = MemoryStream(self, link, protocol)
        self._streams.setdefault(link, []).append(stream)
        return stream

    def accept(self, stream: MemoryStream) -> None:
        """The first bytes of a stream are here."""
        link = stream._link
        if self.machine.links.get(self._far(link).index) is not link or self._nursery is None:
            stream.cut()
            return
        self._streams.setdefault(link, []).append(stream)
        self._nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: MemoryStream) -> None:
        try:
            async with stream:
                await self._handlers[stream.protocol](stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("stream of %s broke: %s", stream.peer_id, error)

    def heard(self, link: Link, size_bytes: int) -> None:
        """Count what arrives; each write of the driver is one message."""
        trace, loop = self.wires.world.trace, self.wires.world.loop
        trace.note(loop.now_ns, self._far(link).index, self.machine.index, "frame")
        trace.messages["frame"] += 1
        trace.bytes["frame"] += size_bytes

    # --- names ----------------------------------------------------------------------------------

    def _index(self, peer: PeerId) -> int:
        return self.wires.world.by_peer[peer].index

    def _link_to(self, peer: PeerId) -> Link | None:
        other = self.wires.world.by_peer.get(peer)
        return None if other is None else self.machine.links.get(other.index)

    def _far(self, link: Link) -> Machine:
        return link.b if self.machine is link.a else link.a


class MemoryGossip:
    """A `transport.Gossip` by the world's model of pubsub."""

    def __init__(self, world: World, machine: Machine, on_advert: OnAdvert) -> None:
        self.hear = on_advert
        self._publish = partial(world.pubsub.publish, machine)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def publish(self, advert: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._publish(advert)


class MemoryDht:
    """A `transport.Dht` that puts records into the world's model of a DHT, which also looks up
    by itself what a node looks for: the driver finds nothing here."""

    def __init__(self, world: World, machine: Machine) -> None:
        self._world = world
        self._machine = machine
        self._members: dict[PeerId, None] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def add_member(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        await trio.lowlevel.checkpoint()
        self._members[peer] = None

    def remove_member(self, peer: PeerId) -> None:
        self._members.pop(peer, None)

    def size(self) -> int:
        return len(self._members)

    async def publish_record(self, author: PeerId, record: bytes) -> bool:
        await trio.lowlevel.checkpoint()
        self._world.dht.publish(self._machine, record, ())
        return True

    async def find_record(self, peer: PeerId) -> bytes | None:
        await trio.lowlevel.checkpoint()
        return None

    async def provide(self, subject: str) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def find_providers(self, subject: str) -> dict[PeerId, tuple[str, ...]]:
        await trio.lowlevel.checkpoint()
        return {}
