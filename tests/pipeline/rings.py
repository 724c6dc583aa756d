"""Nodes with parts of a model, and streams between them, all in one process.

A stage here adds its first layer's number to every number of a row: small, but it says through
whose hands a row has gone, and in which order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import trio
from msgspec.structs import replace
from trio.testing import memory_stream_pair

from meshnode.config import KvType
from meshnode.engine.stages import steps
from meshnode.engine.stages.steps import Shape, Step
from meshnode.errors import EngineError, PeerUnreachableError
from meshnode.identity import KeyPair, PeerId
from meshnode.messages import Item, Opening, Shard
from meshnode.pipeline.ring import Rings, Stage
from meshnode.protocol.agreement import Assigned
from meshnode.transport import Stream

MODEL, GROUP = "ab" * 32, "cd" * 16
WIDTH, VOCABULARY, CONTEXT = 576, 100, 64
"""The width of the small model, so that its real layers can take part."""
HANG_S = 10.0
ANN, BEA, CAT, DAN, EVE = (KeyPair.from_seed(bytes([seed]) * 32).peer_id for seed in range(1, 6))


class Wire(Stream):
    """One end of a stream in memory, to `peer_id`."""

    def __init__(self, inner: trio.StapledStream, peer: str, protocol: str) -> None:  # type: ignore[type-arg]
        self._inner = inner
        self._peer, self._protocol = peer, protocol

    @property
    def peer_id(self) -> str:
        return self._peer

    @property
    def protocol(self) -> str:
        return self._protocol

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._inner.receive_some(max_bytes))

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def reset(self) -> None:
        await self._inner.aclose()


class Adder:
    """A stage: takes tokens if it has the first layer. Implements `ring.Stage`."""

    def __init__(self, first: int, context_tokens: int = CONTEXT) -> None:
        self.first = first
        self.kv_type: KvType = "f16"
        self.shape = Shape(WIDTH, 8, context_tokens, VOCABULARY if first == 0 else 0)
        self.opening: Opening | None = None
        self.is_dead = False
        self.spoil = lambda frame: frame
        """What it does to a frame that goes out."""
        self._ring: trio.CancelScope | None = None
        self._lock = trio.Lock()
        self._done = trio.open_memory_channel[bytes](4)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        if self._ring is not None:
            self._ring.cancel()
        async with self._lock:
            with trio.CancelScope() as self._ring:
                yield

    async def begin(self, opening: Opening) -> None:
        self.opening = opening
        self._done = trio.open_memory_channel[bytes](4)

    async def submit(self, frame: bytes) -> None:
        if self.is_dead:
            raise EngineError("it was killed")
        step = steps.decode(frame, self.shape)
        rows = np.frombuffer(step.rows, "<f4").reshape(-1, WIDTH)
        if step.tokens:
            rows = np.repeat(np.frombuffer(step.tokens, "<i4"), WIDTH).reshape(-1, WIDTH)
        done = (rows + np.float32(self.first)).astype("<f4")
        await self._done[0].send(steps.encode(replace(step, tokens=b"", rows=done.tobytes())))

    async def receive(self) -> bytes:
        frame = await self._done[1].receive()
        return self.spoil(frame)


@dataclass
class FirstWords:
    """A head: asks for what it is told to, and keeps the rows that come. Implements `ring.Head`."""

    layers: tuple[int, int]
    model: str = MODEL
    kv_type: KvType = "f16"
    shape: Shape = field(default_factory=lambda: Shape(WIDTH, 8, CONTEXT, 0))
    opening: Opening | None = None
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._asked = trio.open_memory_channel[bytes](16)
        self._came = trio.open_memory_channel[Step](16)
        self._number = 0
        self._changed = trio.Event()

    async def wait_loaded(self) -> None:
        await trio.lowlevel.checkpoint()

    def opened(self, opening: Opening) -> None:
        self.opening, self._number = opening, 0
        self._asked = trio.open_memory_channel[bytes](16)
        self._tell()

    def closed(self, reason: str) -> None:
        self.opening = None
        self.reasons.append(reason)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def next_step(self) -> bytes:
        return await self._asked[1].receive()

    async def feed(self, frame: bytes) -> None:
        await self._came[0].send(steps.decode(frame, self.shape))

    # What a test does:

    async def wait_open(self) -> Opening:
        with trio.fail_after(HANG_S):
            while self.opening is None:
                await self._changed.wait()
        return self.opening

    async def wait_closed(self, times: int = 1) -> str:
        with trio.fail_after(HANG_S):
            while len(self.reasons) < times:
                await self._changed.wait()
        return self.reasons[-1]

    def step(self, *tokens: int, **changes: object) -> bytes:
        assert self.opening is not None
        count = len(tokens)
        step = Step(
            pipeline=self.opening.pipeline,
            epoch=self.opening.epoch,
            number=self._number,
            changes=(),
            slots=bytes(2 * count),
            positions=np.arange(count, dtype="<i4").tobytes(),
            tokens=np.array(tokens, "<i4").tobytes(),
        )
        self._number += 1
        return steps.encode(replace(step, **changes))

    async def ask(self, frame: bytes) -> None:
        await self._asked[0].send(frame)

    async def answer(self) -> list[float]:
        """The first number of each row."""
        with trio.fail_after(HANG_S):
            step = await self._came[1].receive()
        return [float(row[0]) for row in np.frombuffer(step.rows, "<f4").reshape(-1, WIDTH)]


class World:
    """Peers by name, what each has loaded, what is decided, and who was dropped by whom."""

    def __init__(self, nursery: trio.Nursery, *cuts: tuple[str, int, int]) -> None:
        self.nursery = nursery
        self.rings: dict[str, Rings] = {}
        self.stages: dict[tuple[str, int, int], Stage] = {}
        self.assigned: dict[str, Assigned | None] = {}
        self.dropped: list[tuple[str, str]] = []
        self.streams: list[tuple[str, str, Wire, Wire]] = []
        self.gone: set[str] = set()
        self.decide(1, *cuts)
        for peer, first, end in cuts:
            if end != cuts[-1][2]:
                self.stages[peer, first, end] = Adder(first)

    def decide(self, epoch: int, *cuts: tuple[str, int, int], state: str = "serving") -> None:
        of = cuts[-1][2]
        items = tuple(
            Item(MODEL, "m", 0, Shard("layers", first, end, of), peer, (), state, 1)  # type: ignore[arg-type]
            for peer, first, end in cuts
        )
        for peer, _, _ in cuts:
            self.assigned[peer] = Assigned(GROUP, epoch, items)
            self._join(peer)

    def _join(self, peer: str) -> None:
        if peer in self.rings:
            return

        def stage(model: str, first: int, end: int) -> Stage | None:
            return self.stages.get((peer, first, end)) if model == MODEL else None

        async def drop(other: PeerId) -> None:
            self.dropped.append((peer, other))

        self.rings[peer] = Rings(
            PeerId(peer), self._opener(peer), lambda model: self.assigned.get(peer), stage, drop
        )

    def _opener(self, own: str) -> Callable[[PeerId, str], Awaitable[Stream]]:
        async def open_stream(other: PeerId, protocol: str) -> Stream:
            await trio.lowlevel.checkpoint()
            if other in self.gone or other not in self.rings:
                raise PeerUnreachableError(f"{other} does not answer")
            near, far = memory_stream_pair()
            ours, theirs = Wire(near, other, protocol), Wire(far, own, protocol)
            self.streams.append((own, other, ours, theirs))
            self.nursery.start_soon(self.rings[other].serve, theirs)
            return ours

        return open_stream

    def open_as(self, own: str, other: str) -> Awaitable[Stream]:
        """A stream by hand, as a liar would open it."""
        return self._opener(own)(PeerId(other), "by hand")

    async def die(self, peer: str) -> None:
        """All its streams break, and nobody reaches it any more."""
        self.gone.add(peer)
        for one, other, ours, theirs in self.streams:
            if peer in (one, other):
                await ours.aclose()
                await theirs.aclose()


@asynccontextmanager
async def world(*cuts: tuple[str, int, int]) -> AsyncIterator[tuple[World, FirstWords]]:
    """Peers with these parts, and the head of the last looking for a ring."""
    async with trio.open_nursery() as nursery:
        made = World(nursery, *cuts)
        peer, first, end = cuts[-1]
        head = FirstWords((first, end))
        nursery.start_soon(made.rings[peer].keep, head)
        yield made, head
        nursery.cancel_scope.cancel()
