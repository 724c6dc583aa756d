"""Real nodes without engines: a Stack, a Driver and a QUIC host on loopback, in this process.

Also strangers: hosts with a key and nothing else, which speak whatever a test makes them say.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from meshnode.credentials import MeshDescriptor, issue_certificate
from meshnode.driver import Driver
from meshnode.identity import KeyPair, PeerId
from meshnode.messages import Offer
from meshnode.protocol import Event, MemberJoined, MemberLost
from meshnode.protocol.adverts import Node
from meshnode.protocol.stack import Learn, SetAddrs, SetOffers, Stack
from meshnode.transport import Stream
from meshnode.transport.dht import Dht
from meshnode.transport.gossip import Gossip
from meshnode.transport.libp2p import HostEvents, Libp2pHost

LISTEN = ("/ip4/127.0.0.1/udp/0/quic-v1",)
HTTP_PROTOCOL = "/http/1.1"
ROOT = KeyPair.from_seed(b"r" * 32)
MESH = MeshDescriptor(name="lab", root=ROOT.public.hex(), admission="invite")


def chain_for(peer: str, root: KeyPair = ROOT, mesh: MeshDescriptor = MESH) -> tuple[bytes, ...]:
    return (issue_certificate(root, mesh, peer, ("node",), int(time.time())),)


async def echo(stream: Stream) -> None:
    """What a member finds behind `HTTP_PROTOCOL` here."""
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


@dataclass
class LiveNode:
    """One running node."""

    key: KeyPair
    stack: Stack
    host: Libp2pHost
    driver: Driver
    events: list[Event] = field(default_factory=list)

    @property
    def peer_id(self) -> PeerId:
        return self.key.peer_id

    @property
    def addrs(self) -> tuple[str, ...]:
        return self.host.addrs()

    def meet(self, other: LiveNode) -> None:
        """Learn where another node is."""
        self.driver.submit(other.peer_id, Learn(other.addrs, permanent=True))

    def members(self) -> set[PeerId]:
        return {member.peer for member in self.stack.members()}

    def joined(self, peer: PeerId) -> int:
        """How often the peer has become a member here."""
        return self.events.count(MemberJoined(peer))

    def lost(self, peer: PeerId) -> int:
        return sum(isinstance(e, MemberLost) and e.peer == peer for e in self.events)


def make_node(
    key: KeyPair | None = None,
    *,
    chain: tuple[bytes, ...] | None = None,
    first_sequence: int = 1_000_000,
) -> LiveNode:
    """A node that is not running yet."""
    key = key or KeyPair.generate()
    stack = Stack(
        key,
        MESH,
        chain_for(key.peer_id) if chain is None else chain,
        ("node",),
        Node(memory_bytes=2**33, cores=2, accelerator="cpu"),
        unix_of=lambda now: time.time(),
        rng=random.Random(),
        first_sequence=first_sequence,
    )
    events: list[Event] = []
    disk: dict[str, bytes] = {}
    host = Libp2pHost(
        key.seed,
        LISTEN,
        HostEvents(
            connected=lambda peer: driver.connected(peer),
            disconnected=lambda peer, reason: driver.disconnected(peer, reason),
        ),
    )
    driver = Driver(
        stack,
        host,
        partial(Gossip, host, MESH.mesh_id),
        partial(Dht, host, MESH.mesh_id),
        events.append,
        disk.__setitem__,
    )
    host.handle(HTTP_PROTOCOL, echo)
    return LiveNode(key, stack, host, driver, events)


@asynccontextmanager
async def running(
    node: LiveNode | None = None, *, offers: tuple[Offer, ...] = ()
) -> AsyncIterator[LiveNode]:
    """A node while it runs; at the end it vanishes without a goodbye."""
    node = node or make_node()
    async with node.host.running(), trio.open_nursery() as nursery:
        await nursery.start(node.driver.run)
        node.driver.submit(node.peer_id, SetAddrs(node.addrs))
        node.driver.submit(node.peer_id, SetOffers(offers))
        yield node
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def mesh_of(count: int) -> AsyncIterator[list[LiveNode]]:
    """So many nodes, each a member of all others; the first introduced the rest."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(running()) for _ in range(count)]
        for node in nodes[1:]:
            node.meet(nodes[0])
        await until(lambda: all(len(node.members()) == count - 1 for node in nodes))
        yield nodes


@asynccontextmanager
async def stranger(key: KeyPair | None = None) -> AsyncIterator[Libp2pHost]:
    """A host that no node of the mesh has admitted."""
    events = HostEvents(connected=lambda peer: None, disconnected=lambda peer, reason: None)
    host = Libp2pHost((key or KeyPair.generate()).seed, LISTEN, events)
    async with host.running():
        yield host


async def until(holds: Callable[[], bool], within_s: float = 20.0) -> None:
    """Wait until something is true; a hang guard, not a measurement."""
    with trio.fail_after(within_s):
        while not holds():
            await trio.sleep(0.01)
