"""A real engine for as long as a test needs it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from meshnode.engine import ModelCard
from meshnode.engine.process import EngineOptions, EngineProcess

# Generous: the machine may be busy, and each test takes seconds on a free one.
HANG_S = 200


@asynccontextmanager
async def started(card: ModelCard, options: EngineOptions) -> AsyncIterator[EngineProcess]:
    """Ready on entering; within `HANG_S` all must be over."""
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            engine = EngineProcess(card, options)
            await nursery.start(engine.run)
            await engine.wait_ready()
            yield engine
            nursery.cancel_scope.cancel()
