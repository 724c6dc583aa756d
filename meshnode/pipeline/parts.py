"""A part of a model on this node: from the mesh's decision to a process that computes its layers.

A part that is not the last is a `StagePart`: it takes steps from one ring at a time. The last one
is a `HeadPart`: its engine answers requests while it is in a ring. Decides when a part is loaded
and how it is watched; who loads what is decided elsewhere, and the streams are `ring.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal

import trio

from meshnode.engine import ModelCard
from meshnode.engine.process import EngineOptions, EngineProcess, Part
from meshnode.engine.stages.process import StageOptions, StageProcess
from meshnode.engine.stages.steps import STEP_SLOTS_MAX, Shape
from meshnode.errors import ModelLoadError
from meshnode.messages import Opening
from meshnode.pipeline.selftest import SelfTests, Verdict

__all__ = ["HeadPart", "StagePart", "part_of"]

logger = logging.getLogger(__name__)

LOAD_RETRY_AFTER_S = 120.0
"""Memory may have come free; each try may cost three loads."""

State = Literal["loading", "ready", "failed"]
Keep = Callable[["HeadPart"], Awaitable[None]]


def _state(state: Literal["loading", "ready", "failed", "stopped"]) -> State:
    return "failed" if state == "stopped" else state


class StagePart:
    """Layers `first` to `end - 1`, which are not the last. Implements `ring.Stage`."""

    def __init__(
        self, card: ModelCard, first: int, end: int, context_tokens: int, options: EngineOptions
    ) -> None:
        self.card = card
        self.layers = (first, end)
        self.kv_type = options.kv_type
        self.process = StageProcess(
            card,
            StageOptions(
                first=first,
                end=end,
                context_tokens=context_tokens,
                # Whatever its head has: they share one cache. llama.cpp wants a token for each.
                slots=min(STEP_SLOTS_MAX, context_tokens),
                kv_type=options.kv_type,
                threads=options.threads,
            ),
        )
        self._ring: trio.CancelScope | None = None
        self._lock = trio.Lock()

    @property
    def state(self) -> State:
        return _state(self.process.stats().state)

    @property
    def error(self) -> str | None:
        return self.process.stats().error

    @property
    def shape(self) -> Shape:
        """Of a part that is ready."""
        shape = self.process.stats().shape
        assert shape is not None
        return shape

    @property
    def memory_bytes(self) -> int:
        return self.process.stats().memory_bytes

    @property
    def steps(self) -> int:
        """That it has computed since it was loaded first."""
        return self.process.stats().steps

    async def run(self) -> None:
        """Load it and keep it loaded, until cancelled."""
        while True:
            await self.process.run()
            logger.error("layers %d-%d of %s: %s", *self.layers, self.card.name, self.error)
            await trio.sleep(LOAD_RETRY_AFTER_S)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Held by one ring at a time: a later one ends the earlier, which may be a stream that
        nobody has noticed the end of."""
        if self._ring is not None:
            self._ring.cancel()
        async with self._lock:
            with trio.CancelScope() as self._ring:
                yield

    async def begin(self, opening: Opening) -> None:
        await self.process.begin(opening.pipeline, opening.epoch, opening.codec)

    async def submit(self, frame: bytes) -> None:
        await self.process.submit(frame)

    async def receive(self) -> bytes:
        return await self.process.receive()


class HeadPart:
    """The last layers, from `first` on, and the engine that answers. Implements `ring.Head`."""

    def __init__(
        self,
        card: ModelCard,
        first: int,
        end: int,
        options: EngineOptions,
        keep: Keep,
        tests: SelfTests,
    ) -> None:
        """`keep` forms a ring for it, again and again (`Rings.keep`); each is put to `tests`."""
        self.card = card
        self.layers = (first, end)
        self.kv_type = options.kv_type
        self.engine = EngineProcess(card, replace(options, part=Part(first, end)))
        self.ring: Opening | None = None
        """The one it is in."""
        self.verdict: Verdict = ""
        """Of the self-test of that ring."""
        self.steps = 0
        """That have gone round since it was loaded first."""
        self._keep = keep
        self._tests = tests
        self._opened = trio.Event()

    @property
    def model(self) -> str:
        return self.card.digest

    @property
    def state(self) -> State:
        """Of its layers; it answers only in a ring."""
        return _state(self.engine.stats().state)

    @property
    def error(self) -> str | None:
        return self.engine.stats().error

    @property
    def shape(self) -> Shape:
        return self.engine.shape

    @property
    def memory_bytes(self) -> int:
        return self.engine.stats().memory_bytes

    async def run(self) -> None:
        """Load it, keep it loaded and in a ring, until cancelled."""
        while True:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep, self)
                nursery.start_soon(self._test_each_ring)
                await self.engine.run()
                nursery.cancel_scope.cancel()
            logger.error("the head of %s: %s", self.card.name, self.error)
            await trio.sleep(LOAD_RETRY_AFTER_S)

    async def _test_each_ring(self) -> None:
        while True:
            await self._opened.wait()
            self._opened = trio.Event()
            verdict = await self._tests.run(self.engine, self.kv_type, whole=False)
            self.verdict = verdict if self.ring is not None else ""
            log = logger.error if verdict == "differs" else logger.info
            log("model %s: the self-test of its stages: %s", self.card.name, verdict)

    async def wait_loaded(self) -> None:
        try:
            await self.engine.wait_ready()
        except ModelLoadError:
            await trio.sleep_forever()  # `run` knows as well, and tries again

    def opened(self, opening: Opening) -> None:
        self.engine.start_pipeline(opening.pipeline, opening.epoch, len(opening.owners))
        self.ring = opening
        self._opened.set()

    def closed(self, reason: str) -> None:
        if self.ring is not None:
            self.engine.stop_pipeline(reason)
        self.ring, self.verdict = None, ""

    async def next_step(self) -> bytes:
        step = await self.engine.next_step()
        self.steps += 1
        return step

    async def feed(self, frame: bytes) -> None:
        await self.engine.feed(frame)


def part_of(
    card: ModelCard,
    first: int,
    end: int,
    layers: int,
    context_tokens: int,
    options: EngineOptions,
    keep: Keep,
    tests: SelfTests,
) -> StagePart | HeadPart:
    """The last part of a model with so many layers is its head."""
    if end == layers:
        return HeadPart(card, first, end, options, keep, tests)
    return StagePart(card, first, end, context_tokens, options)
