"""An engine without a model that says when it made each token.

It decodes in steps, as a batching engine does: every running request gets its next token at the
same instant. A token's text is that instant on the clock all processes of a machine share
(`time.perf_counter_ns`, CLOCK_MONOTONIC), so that a client can tell how long it was under way.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from meshnode.engine import ChatMessage, Delta, EngineStats, Finish, ModelCard, Request, Usage
from meshnode.engine.process import EngineOptions
from meshnode.hosted import HostedModel
from meshnode.models.catalog import ModelSource

MODEL = "paced"
TOKENS_DEFAULT = 16
CARD = ModelCard(MODEL, "ca" * 32, "", 0, "paced", "none", 0, 4096)
SLOTS = 64
PREFILL_S = 0.01
"""About one decode step of a small model on two cores: no engine answers sooner."""


class PacedEngine:
    """The first token after a short prefill, then one per step; the last message is the step in
    milliseconds.

    A step of 0 makes tokens as fast as they are taken.
    """

    def __init__(self) -> None:
        self._running = 0
        self._step_at = math.nan
        self._step_ns = 0

    def stats(self) -> EngineStats:
        free = CARD.context_tokens_train
        return EngineStats(
            CARD, "ready", 1.0, None, free, SLOTS, self._running, 0, free, 0.0, 0.0, 1, ()
        )

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[AsyncIterator[Delta | Finish]]:
        self._running += 1
        try:
            yield self._events(request)
        finally:
            self._running -= 1

    async def _events(self, request: Request) -> AsyncIterator[Delta | Finish]:
        message = request.prompt[-1]
        assert isinstance(message, ChatMessage)
        step_s = int(message.content) / 1e3
        total = request.max_tokens or TOKENS_DEFAULT
        await trio.sleep(PREFILL_S)
        yield Delta(f"{time.perf_counter_ns()} ")
        for _ in range(total - 1):
            yield Delta(f"{await self._next_step_ns(step_s)} ")
        yield Finish("length", Usage(1, 0, total))

    async def _next_step_ns(self, step_s: float) -> int:
        """When the step was made, equal for all requests in it."""
        if not step_s:
            await trio.lowlevel.checkpoint()
            return time.perf_counter_ns()
        step_at = (math.floor(trio.current_time() / step_s) + 1) * step_s
        await trio.sleep_until(step_at)
        if self._step_at != step_at:
            self._step_at, self._step_ns = step_at, time.perf_counter_ns()
        return self._step_ns


class PacedModel(HostedModel):
    """The paced engine in a model's place: offered to the mesh, listed and reached as any."""

    def __init__(self) -> None:
        super().__init__(ModelSource(MODEL, Path()), Path(), EngineOptions())
        self.engine = PacedEngine()  # type: ignore[assignment]

    async def run(self) -> None:
        await trio.sleep_forever()
