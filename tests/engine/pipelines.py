"""A model in several parts, in real processes of this machine, that pass their steps in a ring."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from meshnode.engine import ModelCard
from meshnode.engine.process import EngineOptions, EngineProcess, Part
from meshnode.engine.stages.process import StageOptions, StageProcess
from tests.engine.serving import HANG_S

Frames = Callable[[bytes], bytes]


def unchanged(frame: bytes) -> bytes:
    return frame


class Pipeline:
    """The last part is `head`. `steps` counts those that the head has sent, in all rings."""

    def __init__(self, head: EngineProcess, stages: list[StageProcess]) -> None:
        self.head = head
        self.stages = stages
        self.steps = 0
        self.epoch = 0

    @asynccontextmanager
    async def running(self, spoil: Frames = unchanged) -> AsyncIterator[None]:
        """In a ring for as long as this lasts; `spoil` is what happens on the way to the head."""
        self.epoch += 1
        name = os.urandom(16)
        for stage in self.stages:
            await stage.begin(name, self.epoch, "f32")
        self.head.start_pipeline(name, self.epoch, len(self.stages) + 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, self._next_step, self.stages[0].submit)
            for before, after in zip(self.stages, self.stages[1:], strict=False):
                nursery.start_soon(self._carry, before.receive, after.submit)

            async def spoiled() -> bytes:
                return spoil(await self.stages[-1].receive())

            nursery.start_soon(self._carry, spoiled, self.head.feed)
            yield
            nursery.cancel_scope.cancel()
        self.head.stop_pipeline("The ring was taken apart.")

    async def _next_step(self) -> bytes:
        step = await self.head.next_step()
        self.steps += 1
        return step

    async def _carry(
        self, take: Callable[[], Awaitable[bytes]], give: Callable[[bytes], Awaitable[None]]
    ) -> None:
        while True:
            await give(await take())


@asynccontextmanager
async def parted(
    card: ModelCard, options: EngineOptions, *cuts: int, layers: int
) -> AsyncIterator[Pipeline]:
    """Stages that end before each of `cuts`, and a head; all loaded, and in no ring yet."""
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            head = EngineProcess(card, replace(options, part=Part(cuts[-1], layers)))
            await nursery.start(head.run)
            await head.wait_ready()
            stages = [
                StageProcess(
                    card,
                    StageOptions(
                        first,
                        end,
                        head.shape.context_tokens,
                        head.shape.slots,
                        threads=options.threads,
                    ),
                )
                for first, end in zip((0, *cuts), cuts, strict=False)
            ]
            for stage in stages:
                await nursery.start(stage.run)
                await stage.wait_ready()
            yield Pipeline(head, stages)
            nursery.cancel_scope.cancel()
