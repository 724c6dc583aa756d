"""A stage as the node uses it: a real part of a real model in a real child process."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from meshnode.engine import ModelCard
from meshnode.engine.card import load_card
from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.engine.stage_process import StageOptions, StageProcess
from meshnode.engine.steps import Shape, decode, encode
from meshnode.models.catalog import resolve

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

from tests.engine.conftest import ignore_progress
from tests.engine.ring import EPOCH, PIPELINE, Batch
from tests.engine.serving import HANG_S

OPTIONS = StageOptions(0, 3, context_tokens=512, slots=4, threads=1)
AFTER = Shape(width=576, slots=4, context_tokens=512, vocabulary=0)
TOKENS = [504, 3575, 10161, 281, 260, 6850]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    data_dir = tmp_path_factory.mktemp("data")
    return trio.run(load_card, resolve("default", data_dir), data_dir, ignore_progress)


@asynccontextmanager
async def started(card: ModelCard, options: StageOptions) -> AsyncIterator[StageProcess]:
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            stage = StageProcess(card, options)
            await nursery.start(stage.run)
            await stage.wait_ready()
            yield stage
            nursery.cancel_scope.cancel()


@pytest.fixture
async def stage(card: ModelCard) -> AsyncIterator[StageProcess]:
    async with started(card, OPTIONS) as stage:
        yield stage


def frame(number: int, position: int, tokens: list[int], slot: int = 0) -> bytes:
    return encode(Batch().add(slot, position, tokens).step(number))


async def test_steps_go_through_in_order(stage: StageProcess) -> None:
    await stage.begin(PIPELINE, EPOCH, "f32")
    await stage.submit(frame(0, 0, TOKENS))
    await stage.submit(frame(1, len(TOKENS), [339]))
    first = decode(await stage.receive(), AFTER)
    second = decode(await stage.receive(), AFTER)
    assert (first.number, first.count, second.number, second.count) == (0, len(TOKENS), 1, 1)
    stats = stage.stats()
    assert (stats.state, stats.progress, stats.steps, stats.rows) == ("ready", 1.0, 2, 7)
    assert stats.bytes_out > stats.bytes_in > 0
    assert stats.memory_bytes > 20e6
    assert stats.shape == Shape(576, 4, 512, 49152)
