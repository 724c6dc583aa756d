"""The streams of a ring: what a stage does with those that reach it, and how a head forms one.

Decides when a ring opens and when it is over. A ring has one fate: whatever ends one of its
streams, a frame that must not be, a process that died, a decision that names other owners, ends
both streams of each stage in turn, and the head forms another as soon as the register has one.
Does not know what the frames say, beyond whose they are and that a stage can compute them.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import trio

from meshnode.config import KvType
from meshnode.engine.stages import steps
from meshnode.engine.stages.steps import PIPELINE_BYTES, Codec, Shape
from meshnode.errors import EngineError, PeerUnreachableError, RemoteProtocolError
from meshnode.identity import PeerId
from meshnode.messages import (
    MESSAGE_BYTES_MAX,
    Item,
    NotOpened,
    Opened,
    Opening,
    decode,
    encode,
    reason_of,
)
from meshnode.pipeline.opening import complete, next_opening, opening_of, refusal
from meshnode.protocol.agreement import Assigned
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame

__all__ = ["STAGE_PROTOCOL", "Head", "Rings", "Stage"]

logger = logging.getLogger(__name__)

STAGE_PROTOCOL = "/meshnode/stage/1"
OPEN_S = 10.0
"""A ring of many stages opens one stream after the other; a dial alone may take 5 s."""
LOOK_S = 0.1
"""How often the head compares its ring with the register: a decision is rare, and a look cheap."""
RETRY_S = 0.25
"""The other owners learn of a decision within a heartbeat or two; then doubled, up to the bound."""
RETRY_MAX_S = 4.0
HEALTHY_S = 10.0
"""A ring that lasted so long did not fail for the reason that the one before it did."""
CLOSE_S = 1.0
"""What closing a stream may take if its peer does not answer any more."""


class Stage(Protocol):
    """A first or middle part that is loaded: `parts.StagePart`."""

    @property
    def shape(self) -> Shape: ...

    @property
    def kv_type(self) -> KvType: ...

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Held by the one ring that it is in; a later ring ends the one that holds it."""
        ...

    async def begin(self, opening: Opening) -> None: ...

    async def submit(self, frame: bytes) -> None: ...

    async def receive(self) -> bytes: ...


class Head(Protocol):
    """A last part that is loaded: `parts.HeadPart`."""

    @property
    def model(self) -> str: ...

    @property
    def layers(self) -> tuple[int, int]: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def kv_type(self) -> KvType: ...

    async def wait_loaded(self) -> None: ...

    def opened(self, opening: Opening) -> None: ...

    def closed(self, reason: str) -> None: ...

    async def next_step(self) -> bytes: ...

    async def feed(self, frame: bytes) -> None: ...


class _Awaited:
    """A ring that a head is forming: its last stream is to come."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.stream: Stream | None = None
        self.over = trio.Event()


class Rings:
    """All rings that this node is a part of."""

    def __init__(
        self,
        own: PeerId,
        open_stream: Callable[[PeerId, str], Awaitable[Stream]],
        assigned: Callable[[str], Assigned | None],
        stage: Callable[[str, int, int], Stage | None],
        drop: Callable[[PeerId], Awaitable[None]],
        codec: Codec = "f32",
    ) -> None:
        """`stage` finds layers (model, first, end) if they are loaded here; `drop` ends the
        connection to a peer that sends what no honest one would. `codec` is what activations
        travel in, where our models' heads are concerned."""
        self._codec = codec
        self._own = own
        self._open_stream = open_stream
        self._assigned = assigned
        self._stage = stage
        self._drop = drop
        self._awaited: dict[bytes, _Awaited] = {}

    # --- for those who open a stream to us ------------------------------------------------------

    async def serve(self, stream: Stream) -> None:
        """One stream of one ring; a handler for `STAGE_PROTOCOL`."""
        try:
            with trio.fail_after(OPEN_S):
                opening = decode(await receive_frame(stream, MESSAGE_BYTES_MAX) or b"", Opening)
            assigned = self._assigned(opening.model)
            why = refusal(opening, stream.peer_id, self._own, assigned)
            if why is not None:
                await self._refuse(stream, why)
            elif opening.place == len(opening.owners) - 1:
                await self._close_ring(stream, opening)
            else:
                await self._pass_on(stream, opening)
        except RemoteProtocolError as error:
            await self._blame(stream.peer_id, error)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            logger.debug("stage: a ring with %s ended", stream.peer_id)
        finally:
            await _end(stream)

    async def _refuse(self, stream: Stream, why: str, by: str = "") -> None:
        await send_frame(stream, encode(NotOpened(by or self._own, why)))
        await stream.send_eof()

    async def _close_ring(self, stream: Stream, opening: Opening) -> None:
        """The last hop has reached us, who have formed this ring."""
        awaited = self._awaited.get(opening.pipeline)
        if awaited is None or awaited.stream is not None:
            await self._refuse(stream, "no ring of this name is awaited")
            return
        expected = awaited.opening
        if (expected.epoch, expected.owners) != (opening.epoch, opening.owners):
            raise RemoteProtocolError("another ring under the name of ours")
        awaited.stream = stream
        await send_frame(stream, encode(Opened()))
        await awaited.over.wait()

    async def _pass_on(self, stream: Stream, opening: Opening) -> None:
        """Be a stage of the ring until it ends."""
        first, end = opening.cuts[opening.place : opening.place + 2]
        stage = self._stage(opening.model, first, end)
        if stage is None:
            await self._refuse(stream, "its layers are not loaded yet")
            return
        ours = (stage.shape.context_tokens, stage.kv_type)
        theirs = (opening.context_tokens, opening.kv_type)
        if ours != theirs:
            await self._refuse(
                stream,
                f"it keeps {ours[0]} tokens as {ours[1]}, and the head {theirs[0]} as "
                f"{theirs[1]}: give all nodes the same --context and --kv-type",
            )
            return
        async with stage.turn():
            onward: Stream | None = None
            try:
                with trio.fail_after(OPEN_S):
                    await stage.begin(opening)
                    onward = await self._open(next_opening(opening))
                    await send_frame(stream, encode(Opened()))
                ran = _Ran()
                async with _race(ran) as start:
                    start(stream, _relay, stream, stage.shape, opening, stage.submit)
                    start(stream, _send_all, stage.receive, onward)
                    start(onward, _until_closed, onward)
                logger.info("stage: layers %d-%d: the ring ended: %s", first, end, ran.reason)
                await self._blame_for(ran)
            except _NotOpenedError as error:
                await self._refuse(stream, error.reason, error.by)
            except (EngineError, PeerUnreachableError) as error:
                await self._refuse(stream, reason_of(error))
            finally:
                if onward is not None:
                    await _end(onward)

    async def _open(self, opening: Opening) -> Stream:
        """A stream to the owner at `opening.place`, and through it to all behind it.

        Raises `_NotOpenedError`, `PeerUnreachableError`, and trio's errors of a broken stream. Who
        gives no legal answer is hung up on.
        """
        peer = PeerId(opening.owners[opening.place])
        stream = await self._open_stream(peer, STAGE_PROTOCOL)
        try:
            await send_frame(stream, encode(opening))
            reply = await receive_frame(stream, MESSAGE_BYTES_MAX)
            if reply is None:
                raise _NotOpenedError(peer, "it closed the stream")
            answer: Opened | NotOpened = decode(reply, Opened | NotOpened)  # type: ignore[arg-type]
            if isinstance(answer, NotOpened):
                raise _NotOpenedError(answer.by, answer.reason)
        except RemoteProtocolError as error:
            await self._blame(peer, error)
            raise _NotOpenedError(peer, reason_of(error)) from error
        except BaseException:
            await _end(stream)
            raise
        return stream

    async def _blame_for(self, ran: _Ran) -> None:
        if ran.fault is not None:
            await self._blame(*ran.fault)

    async def _blame(self, peer: str, error: RemoteProtocolError) -> None:
        """Hang up on the one who sent that, and on nobody who only passed it on."""
        logger.warning("stage: %s sent what it must not: %s", peer, error)
        await self._drop(PeerId(peer))

    # --- for the head ---------------------------------------------------------------------------

    async def keep(self, head: Head) -> None:
        """Form a ring for `head` whenever there is one to be formed, until cancelled."""
        retry_s = RETRY_S
        while True:
            await head.wait_loaded()
            assigned, items = self._complete(head)
            if assigned is None:
                await trio.sleep(LOOK_S)
                continue
            began_at = trio.current_time()
            reason = await self._run(head, assigned, items)
            logger.warning("model %s: its pipeline ended: %s", items[0].name, reason)
            retry_s = RETRY_S if trio.current_time() > began_at + HEALTHY_S else retry_s
            if await self._is_decided_otherwise(head, items, retry_s):
                retry_s = RETRY_S
            else:
                retry_s = min(2 * retry_s, RETRY_MAX_S)

    def _complete(self, head: Head) -> tuple[Assigned | None, tuple[Item, ...]]:
        assigned = self._assigned(head.model)
        items = complete(assigned, self._own)
        if not items or (items[-1].shard.first, items[-1].shard.end) != head.layers:
            return None, ()
        return assigned, items

    async def _run(self, head: Head, assigned: Assigned, items: tuple[Item, ...]) -> str:
        """Form one ring and run it; returns why it ended."""
        pipeline = os.urandom(PIPELINE_BYTES)
        opening = opening_of(
            assigned, items, pipeline, self._codec, head.shape.context_tokens, head.kv_type
        )
        awaited = self._awaited[pipeline] = _Awaited(opening)
        stream: Stream | None = None
        ran = _Ran()
        try:
            with trio.fail_after(OPEN_S):
                stream = await self._open(opening)
            if awaited.stream is None:
                return "it was opened, but not round to us"
            head.opened(opening)
            last = awaited.stream
            async with _race(ran) as start:
                # Of what we send ourselves it is wrong if what it was made of is.
                start(last, _send_all, head.next_step, stream)
                start(stream, _until_closed, stream)
                start(last, _relay, last, head.shape, opening, head.feed)
                start(last, self._until_decided_otherwise, head, items)
            await self._blame_for(ran)
        except _NotOpenedError as error:
            ran.reason = f"{error.by}: {error.reason}"
        except (trio.TooSlowError, trio.BrokenResourceError, PeerUnreachableError) as error:
            ran.reason = f"{opening.owners[0]}: {reason_of(error) or 'no answer'}"
        finally:
            head.closed(ran.reason)
            del self._awaited[pipeline]
            awaited.over.set()
            if stream is not None:
                await _end(stream)
        return ran.reason

    async def _until_decided_otherwise(self, head: Head, items: tuple[Item, ...]) -> None:
        await self._is_decided_otherwise(head, items, math.inf)
        raise _EndedError("the mesh has decided otherwise")

    async def _is_decided_otherwise(
        self, head: Head, items: tuple[Item, ...], within_s: float
    ) -> bool:
        """Whether the register names other owners than those of `items`, or parts that are not
        loaded, before so much time is over."""
        until = trio.current_time() + within_s
        owners = [item.owner for item in items]
        while trio.current_time() < until:
            await trio.sleep(min(LOOK_S, within_s))
            if [item.owner for item in self._complete(head)[1]] != owners:
                return True
        return False


# --- one ring, while it runs ---------------------------------------------------------------------


class _NotOpenedError(Exception):
    def __init__(self, by: str, reason: str) -> None:
        super().__init__(reason)
        self.by = by
        self.reason = reason


class _EndedError(Exception):
    """Why a ring is over, in words."""


class _Ran:
    """Why it ended; `fault` if a peer sent what it must not: which, and what."""

    def __init__(self) -> None:
        self.reason = "the node is stopping"
        self.fault: tuple[str, RemoteProtocolError] | None = None


Start = Callable[..., None]
"""Of a task: on which stream came what it judges, the task, and its arguments."""


@asynccontextmanager
async def _race(ran: _Ran) -> AsyncIterator[Start]:
    """Tasks of which the first to end ends all; `ran` hears why."""

    async def run(source: Stream, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        try:
            await task(*arguments)
            reason = "a peer closed its stream"
        except RemoteProtocolError as error:
            ran.fault, reason = (source.peer_id, error), reason_of(error)
        except (EngineError, _EndedError) as error:
            reason = reason_of(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            reason = "a peer is gone"
        ran.reason = reason
        nursery.cancel_scope.cancel()

    def start(source: Stream, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        nursery.start_soon(run, source, task, *arguments)

    async with trio.open_nursery() as nursery:
        yield start


async def _relay(
    stream: Stream,
    shape: Shape,
    opening: Opening,
    take: Callable[[bytes], Awaitable[None]],
) -> None:
    """Take the steps of one ring from its stream, in order, until it ends."""
    number = 0
    while True:
        frame = await receive_frame(stream, steps.step_bytes_max(shape.width))
        if frame is None:
            return
        step = steps.decode(frame, shape)
        steps.check_due(step, opening.pipeline, opening.epoch, number)
        if step.codec not in (opening.codec, "f32"):  # what no half can hold travels whole
            raise RemoteProtocolError(f"a step in {step.codec}, and {opening.codec} was agreed")
        number += 1
        await take(frame)


async def _send_all(following: Callable[[], Awaitable[bytes]], stream: Stream) -> None:
    while True:
        await send_frame(stream, await following())


async def _until_closed(stream: Stream) -> None:
    """Nothing comes back on the stream that steps go out on, but its end."""
    if await stream.receive_some(1):
        raise RemoteProtocolError("an answer to a step")


async def _end(stream: Stream) -> None:
    with trio.move_on_after(CLOSE_S, shield=True):
        await stream.aclose()
