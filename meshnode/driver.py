"""The Trio driver: gives the stack its inputs and the time, performs its effects.

Everything that happens to a node enters by `submit`, which runs the cores at once and performs
what they decide in order; no effect waits, so none can hold up the next. One task sleeps until
the stack's deadline. The simulator is the other driver of the same stack.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import trio

from meshnode import clock
from meshnode.errors import PeerUnreachableError, RemoteProtocolError
from meshnode.identity import PeerId
from meshnode.messages import MESSAGE_BYTES_MAX, Control, Decided, decode, encode
from meshnode.protocol import (
    Connect,
    Disconnect,
    DutiesChanged,
    Effect,
    Emit,
    Event,
    Input,
    Persist,
    Publish,
    PublishRecord,
    Send,
)
from meshnode.protocol.stack import (
    Connected,
    DialFailed,
    Disconnected,
    Learn,
    RecordFound,
    Stack,
    Stop,
)
from meshnode.transport import CheckRecord, Dht, Gossip, Host, NewerRecord, OnAdvert, Stream
from meshnode.transport.frames import receive_frame, send_frame

logger = logging.getLogger(__name__)

CONTROL_PROTOCOL = "/meshnode/control/1"
OUTBOX_MAX = 64
"""Control messages waiting for one peer; they are small and rare, more means it does not read."""
FRAMES_PER_S_MAX = 50
"""A peer that sends more control messages is read more slowly; a lively mesh sends a few a second.
"""
FRAMES_AT_ONCE_MAX = 100
"""An epoch takes a handful of messages from each voter within milliseconds: no reason to wait."""
FRAME_BYTES_USUAL = 4096
"""A longer message counts as several: 64 records take ten milliseconds to verify."""
GOODBYE_S = 1.0
"""How long a shutdown waits for the goodbyes to leave."""
LOOKUP_FIRST_S = 5.0
LOOKUP_EVERY_S = 120.0
"""DHT look-ups cost about a CPU second each (measured), and gossip usually knows already."""


@dataclass(slots=True, eq=False)
class _Outbox:
    """Control messages on their way over one connection; `flushed` when all have been read."""

    send: trio.MemorySendChannel[Control | None]
    receive: trio.MemoryReceiveChannel[Control | None]
    flushed: trio.Event
    writing: trio.CancelScope
    is_answered: bool = False
    """The peer has opened its own half; it may do so once."""


class _Pace:
    """Lets `FRAMES_AT_ONCE_MAX` usual frames pass, and then `FRAMES_PER_S_MAX`."""

    def __init__(self) -> None:
        self._free_at = -math.inf

    async def wait(self, frame_bytes: int) -> None:
        """Such a frame has passed."""
        now = trio.current_time()
        cost = max(1.0, frame_bytes / FRAME_BYTES_USUAL)
        self._free_at = max(self._free_at, now) + cost / FRAMES_PER_S_MAX
        await trio.sleep_until(self._free_at - FRAMES_AT_ONCE_MAX / FRAMES_PER_S_MAX)


class Driver:
    """Runs one `Stack` on a real network."""

    def __init__(
        self,
        stack: Stack,
        host: Host,
        gossip: Callable[[OnAdvert], Gossip],
        dht: Callable[[CheckRecord, NewerRecord], Dht],
        on_event: Callable[[Event], None],
        persist: Callable[[str, bytes], None],
        now: Callable[[], float] = clock.now,
    ) -> None:
        """`gossip` and `dht` make these for the driver's mesh, on `host`. `persist(name, data)`
        returns when the data is durable. If it raises, the driver stops: a node that cannot
        remember its votes must not cast any. `now` must pass as fast as trio's clock.
        """
        self.stack = stack
        self._persist = persist
        self._host = host
        self._on_event = on_event
        self._now = now
        self._gossip = gossip(self._on_advert)
        self._dht = dht(lambda value: stack.check_record(value, now()), stack.newest_record)
        self._outboxes: dict[PeerId, _Outbox] = {}
        self._deadline_moved = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._started = trio.Event()
        self._publishing_record = trio.CapacityLimiter(1)
        host.handle(CONTROL_PROTOCOL, self._serve_control, members_only=False)

    # --- inputs ---------------------------------------------------------------------------------

    def submit(self, sender: PeerId, message: Input) -> None:
        """Give the stack one message or command, now."""
        self._perform(self.stack.receive(sender, message, self._now()))

    def learn(self, peer: PeerId, decided: Decided) -> None:
        """Take a proof that came beside the control streams. Raises `RemoteProtocolError`."""
        self._perform(self.stack.learn(peer, decided, self._now()))

    def connected(self, peer: PeerId) -> None:
        if self._nursery is None:
            return
        send, receive = trio.open_memory_channel[Control | None](OUTBOX_MAX)
        outbox = _Outbox(send, receive, trio.Event(), trio.CancelScope())
        self._outboxes[peer] = outbox
        self._nursery.start_soon(self._write_control, peer, outbox)
        self.submit(peer, Connected())

    def disconnected(self, peer: PeerId, reason: str) -> None:
        outbox = self._outboxes.pop(peer, None)
        if outbox is not None:
            # What was meant for this connection must not be said on the next.
            outbox.writing.cancel()
        self._dht.remove_member(peer)
        self.submit(peer, Disconnected(reason))

    def _on_advert(self, envelope: bytes) -> bool:
        may_spread = self.stack.gossip(envelope, self._now())
        self._deadline_moved.set()
        return may_spread

    # --- life -----------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive until cancelled. Call `say_goodbye` before, for the members' sake."""
        async with (
            self._gossip.running(),
            self._dht.running(),
            trio.open_nursery() as nursery,
        ):
            self._nursery = nursery
            nursery.start_soon(self._look_up_peers)
            for peer in self._host.peers():
                self.connected(peer)
            self._started.set()
            task_status.started()
            try:
                await self._keep_time()
            finally:
                self._nursery = None

    async def say_goodbye(self) -> None:
        """Tell the members that we leave, and wait a moment until they have read it."""
        self.submit(self.stack.own, Stop())
        outboxes = tuple(self._outboxes.values())
        for outbox in outboxes:
            outbox.send.close()
        with trio.move_on_after(GOODBYE_S):
            for outbox in outboxes:
                await outbox.flushed.wait()

    async def _keep_time(self) -> None:
        while True:
            deadline = self.stack.deadline()
            wait_s = math.inf if deadline is None else max(deadline - self._now(), 0.0)
            with trio.move_on_after(wait_s):
                await self._deadline_moved.wait()
            self._perform(self.stack.tick(self._now()))
            # After the effects, which set it: the deadline is looked at next in any case.
            self._deadline_moved = trio.Event()

    async def _look_up_peers(self) -> None:
        """Find members that nobody we know has told us of, through the DHT."""
        await trio.sleep(LOOKUP_FIRST_S)
        while True:
            if self._dht.size():
                for peer, addrs in (await self._dht.find_providers("")).items():
                    if peer == self.stack.own or self.stack.records.get(peer) is not None:
                        continue
                    record = await self._dht.find_record(peer)
                    if record is not None:
                        self.submit(peer, RecordFound(record))
                    else:
                        self.submit(peer, Learn(addrs))
            await trio.sleep(LOOKUP_EVERY_S)

    def dht_size(self) -> int:
        return self._dht.size()

    # --- effects --------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect]) -> None:
        nursery = self._nursery
        if nursery is None:
            return
        for effect in effects:
            match effect:
                case Send(peer, message):
                    self._post(peer, message)
                case Connect(peer, addrs):
                    nursery.start_soon(self._dial, peer, addrs)
                case Disconnect(peer, reason):
                    logger.info("disconnecting %s: %s", peer, reason)
                    self._post(peer, None)
                case Publish(advert):
                    nursery.start_soon(self._gossip.publish, advert)
                case PublishRecord(record, models):
                    nursery.start_soon(self._publish_record, record, models)
                case Persist(name, data):
                    self._persist(name, data)
                case Emit(event):
                    self._on_emit(nursery, event)
        self._deadline_moved.set()

    def _on_emit(self, nursery: trio.Nursery, event: Event) -> None:
        if isinstance(event, DutiesChanged):
            self._on_event(event)
            return
        peer = event.peer
        if self.stack.is_member(peer):
            self._host.admit(peer)
            known = self.stack.records.get(peer)
            if known is not None:
                nursery.start_soon(self._dht.add_member, peer, known.record.addrs)
        self._on_event(event)

    def _post(self, peer: PeerId, message: Control | None) -> None:
        """Queue a message, or None to hang up after what is queued already."""
        outbox = self._outboxes.get(peer)
        if outbox is None or self._nursery is None:
            return
        try:
            outbox.send.send_nowait(message)
        except trio.WouldBlock:
            logger.warning("%s does not read its control messages; hanging up", peer)
            self._nursery.start_soon(self._host.disconnect, peer)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            if message is None:
                self._nursery.start_soon(self._host.disconnect, peer)

    async def _dial(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        try:
            await self._host.dial(peer, addrs)
        except PeerUnreachableError as error:
            logger.debug("%s", error)
            self.submit(peer, DialFailed(str(error)))

    async def _publish_record(self, record: bytes, models: tuple[str, ...]) -> None:
        async with self._publishing_record:
            if self._dht.size():
                await self._dht.publish_record(self.stack.own, record)
                for subject in ("", *models):
                    await self._dht.provide(subject)

    # --- control streams ------------------------------------------------------------------------

    async def _write_control(self, peer: PeerId, outbox: _Outbox) -> None:
        """Our half of the conversation with one connected peer; ends with the connection."""
        try:
            with outbox.writing, outbox.receive:
                await self._write_messages(peer, outbox.receive)
        except (PeerUnreachableError, trio.BrokenResourceError) as error:
            logger.debug("control stream to %s: %s", peer, error)
            if not self._host.is_admitted(peer):
                return  # it may be here only to join; the hello deadline decides
        finally:
            outbox.flushed.set()
        if self._outboxes.get(peer) is outbox:
            await self._host.disconnect(peer)

    async def _write_messages(
        self, peer: PeerId, messages: trio.MemoryReceiveChannel[Control | None]
    ) -> None:
        async with await self._host.open_stream(peer, CONTROL_PROTOCOL) as stream:
            async for message in messages:
                if message is None:
                    break
                await send_frame(stream, encode(message))
            with trio.move_on_after(GOODBYE_S), suppress(trio.BrokenResourceError):
                await stream.send_eof()
                await stream.receive_some()  # its end shows that everything was read

    async def _serve_control(self, stream: Stream) -> None:
        """The peer's half. A peer that sends nonsense is hung up on."""
        peer = PeerId(stream.peer_id)
        await self._started.wait()  # the host listens a moment before we know its peers
        outbox = self._outboxes.get(peer)
        try:
            if outbox is None or outbox.is_answered:
                raise RemoteProtocolError("a control stream too many")
            outbox.is_answered = True
            pace = _Pace()
            while (frame := await receive_frame(stream, MESSAGE_BYTES_MAX)) is not None:
                if self._outboxes.get(peer) is not outbox:
                    return  # said on a connection that has been replaced
                self.submit(peer, decode(frame, cast(type[Control], Control)))
                await pace.wait(len(frame))
            await stream.send_eof()
        except RemoteProtocolError as error:
            logger.warning("hanging up on %s: %s", peer, error)
            await self._host.disconnect(peer)


__all__ = ["CONTROL_PROTOCOL", "Driver"]
