"""A stage as the node uses it: a real part of a real model in a real child process."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import trio
import trio.testing

from meshnode.engine import ModelCard
from meshnode.engine.card import load_card
from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.engine.stages import process as stage_process
from meshnode.engine.stages.process import STEPS_UNDER_WAY_MAX, StageOptions, StageProcess
from meshnode.engine.stages.steps import CODECS, Shape, Share, decode, encode, step_bytes_max
from meshnode.errors import EngineError, ModelLoadError, RemoteProtocolError
from meshnode.models.catalog import resolve
from tests.engine.conftest import ignore_progress
from tests.engine.serving import HANG_S

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

from tests.engine.ring import EPOCH, PIPELINE, Batch

OPTIONS = StageOptions(0, 2, context_tokens=512, slots=4, threads=1)
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


async def test_stages_in_processes_compute_what_one_does(card: ModelCard) -> None:
    """Layers 0 to 3 as one stage and as two: activations are the same bits."""
    whole = StageOptions(0, 4, context_tokens=512, slots=4, threads=1)
    async with (
        started(card, whole) as one,
        started(card, replace(whole, end=2)) as first,
        started(card, replace(whole, first=2)) as second,
    ):
        for stage in (one, first, second):
            await stage.begin(PIPELINE, EPOCH, "f32")
        assert second.stats().shape == AFTER
        position = 0
        for number, tokens in enumerate((TOKENS, [1], [2], [3])):
            step = frame(number, position, tokens)
            await one.submit(step)
            await first.submit(step)
            await second.submit(await first.receive())
            assert await second.receive() == await one.receive()
            position += len(tokens)


async def test_a_codec_is_for_a_run(stage: StageProcess) -> None:
    sizes = []
    for codec in CODECS:
        await stage.begin(PIPELINE, EPOCH, codec)
        await stage.submit(frame(0, 0, TOKENS))
        step = decode(await stage.receive(), AFTER)
        # A first token's activations may be larger than f16 can say, later in a model than here.
        assert step.codec == codec
        sizes.append(len(step.rows) // step.count)
    assert sizes == [4 * 576, 2 * 576, 576 + 36]


async def test_only_so_many_steps_are_under_way(stage: StageProcess) -> None:
    await stage.begin(PIPELINE, EPOCH, "f32")
    submitted = 0

    async def submit() -> None:
        nonlocal submitted
        for number in range(3 * STEPS_UNDER_WAY_MAX):
            await stage.submit(frame(number, number, [7]))
            submitted += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(submit)
        while stage.stats().steps < STEPS_UNDER_WAY_MAX:
            await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert submitted == STEPS_UNDER_WAY_MAX
        for number in range(3 * STEPS_UNDER_WAY_MAX):
            assert decode(await stage.receive(), AFTER).number == number
    assert submitted == 3 * STEPS_UNDER_WAY_MAX


async def test_a_new_run_forgets_the_old_one(stage: StageProcess) -> None:
    await stage.begin(PIPELINE, EPOCH, "f32")
    for number in range(STEPS_UNDER_WAY_MAX):
        await stage.submit(frame(number, 64 * number, [7] * 64))
    waiting: list[str] = []

    async def wait(what: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(EngineError, match="Another run"):
            await what()
        waiting.append("ended")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, lambda: stage.submit(frame(4, 256, [7])))
        await trio.testing.wait_all_tasks_blocked()
        await stage.begin(PIPELINE, EPOCH + 1, "f32")
    assert waiting == ["ended"]
    # Position 0 of the same slot is free again, numbers count from 0, and no old step comes out.
    again = Batch().add(0, 0, TOKENS).step(0)
    await stage.submit(encode(msgspec.structs.replace(again, epoch=EPOCH + 1)))
    step = decode(await stage.receive(), AFTER)
    assert (step.epoch, step.number, step.count) == (EPOCH + 1, 0, len(TOKENS))


def wrong_frames() -> dict[str, bytes]:
    good = Batch().add(0, 0, TOKENS).step(0)
    change = msgspec.structs.replace
    return {
        "nothing": b"",
        "no step": b"\x93\x01\x02\x03",
        "another pipeline": encode(change(good, pipeline=b"q" * 16)),
        "another epoch": encode(change(good, epoch=EPOCH - 1)),
        "another number": encode(change(good, number=1)),
        "a gap": frame(0, 1, TOKENS),
        "beyond the context": frame(0, 512, [7]),
        "no such slot": frame(0, 0, TOKENS, slot=4),
        "no such token": frame(0, 0, [49152]),
        "rows": encode(change(good, tokens=b"", rows=bytes(4 * 576 * len(TOKENS)))),
        "no KV to share": encode(change(good, changes=(Share(1, 2, 3),))),
    }


async def test_a_wrong_step_ends_its_run_only(stage: StageProcess) -> None:
    pid = stage.pid
    for wrong in wrong_frames().values():
        await stage.begin(PIPELINE, EPOCH, "f32")
        await stage.submit(wrong)
        for what in (stage.receive, stage.receive, lambda: stage.submit(frame(0, 0, TOKENS))):
            with pytest.raises(RemoteProtocolError):
                await what()
        await stage.begin(PIPELINE, EPOCH, "f32")
        await stage.submit(frame(0, 0, TOKENS))
        assert decode(await stage.receive(), AFTER).count == len(TOKENS)
    assert stage.pid == pid


async def test_rows_that_are_no_numbers_end_the_run(card: ModelCard) -> None:
    async with started(card, replace(OPTIONS, first=3, end=4)) as stage:
        await stage.begin(PIPELINE, EPOCH, "f32")
        rows = np.zeros((1, 576), np.float32)
        rows[0, 9] = np.nan
        step = Batch().add(0, 0, [0]).step(0)
        await stage.submit(encode(msgspec.structs.replace(step, tokens=b"", rows=rows.tobytes())))
        with pytest.raises(RemoteProtocolError, match="no numbers"):
            await stage.receive()


async def test_a_step_that_is_too_long_is_not_even_passed_on(stage: StageProcess) -> None:
    await stage.begin(PIPELINE, EPOCH, "f32")
    with pytest.raises(RemoteProtocolError, match="a step of"):
        await stage.submit(bytes(step_bytes_max(576) + 1))


async def test_a_full_cache_ends_the_run_by_name(stage: StageProcess) -> None:
    await stage.begin(PIPELINE, EPOCH, "f32")
    await stage.submit(frame(0, 0, [7] * 500))
    await stage.submit(frame(1, 0, [7] * 13, slot=1))
    await stage.receive()
    with pytest.raises(EngineError, match="KV cache of this stage is full"):
        await stage.receive()


async def test_a_killed_child_is_replaced_and_its_run_lost(stage: StageProcess) -> None:
    await stage.begin(PIPELINE, EPOCH, "f32")
    await stage.submit(frame(0, 0, TOKENS))
    await stage.receive()
    ended: list[str] = []

    async def expect_end(what: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(EngineError, match="SIGKILL"):
            await what()
        ended.append("so")

    pid = stage.pid
    assert pid is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_end, stage.receive)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="SIGKILL"):
        await stage.submit(frame(1, len(TOKENS), [7]))
    with pytest.raises(EngineError):
        await stage.begin(PIPELINE, EPOCH + 1, "f32")
    assert ended == ["so"]
    await stage.wait_ready()
    assert stage.pid not in (pid, None)
    with pytest.raises(EngineError):  # the run is not taken up by itself: its KV is gone
        await stage.receive()
    await stage.begin(PIPELINE, EPOCH, "f32")
    await stage.submit(frame(0, 0, TOKENS))
    assert decode(await stage.receive(), AFTER).count == len(TOKENS)


async def test_kv_moves_between_processes(card: ModelCard, stage: StageProcess) -> None:
    source = stage
    async with started(card, OPTIONS) as target:
        for each in (source, target):
            await each.begin(PIPELINE, EPOCH, "f32")
        await source.submit(frame(0, 0, TOKENS))
        state = await source.save(0)  # after the step, though nobody has received it
        assert await target.restore(0, state) == len(TOKENS)
        await source.receive()
        await source.submit(frame(1, len(TOKENS), [7]))
        await target.submit(frame(0, len(TOKENS), [7]))
        expected = decode(await source.receive(), AFTER)
        assert decode(await target.receive(), AFTER).rows == expected.rows
        for what, why in (
            (lambda: target.restore(1, state[:-4]), "not this stage's"),
            (lambda: target.restore(0, state), "not empty"),
            (lambda: target.restore(4, state), "no slot 4"),
            (lambda: target.save(2), "is empty"),
        ):
            with pytest.raises(EngineError, match=why):
                await what()
        # None of this ends the run.
        await target.submit(frame(1, len(TOKENS) + 1, [7]))
        await target.receive()


async def test_a_child_that_dies_answers_no_question(stage: StageProcess) -> None:
    await stage.begin(PIPELINE, EPOCH, "f32")
    await stage.submit(frame(0, 0, [7] * 500))
    pid = stage.pid
    assert pid is not None

    async def save() -> None:
        with pytest.raises(EngineError, match="SIGKILL"):
            await stage.save(0)

    os.kill(pid, signal.SIGSTOP)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(save)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (replace(OPTIONS, first=28, end=30), "are the last"),
        (replace(OPTIONS, first=7, end=7), "has layers 0 to 29"),
        (replace(OPTIONS, context_tokens=1_000_000), "was trained for 8192 tokens"),
    ],
)
async def test_what_cannot_be_loaded(card: ModelCard, options: StageOptions, why: str) -> None:
    stage = StageProcess(card, options)
    with trio.fail_after(HANG_S):
        await stage.run()
    assert stage.stats().state == "failed"
    with pytest.raises(ModelLoadError, match=why):
        await stage.wait_ready()
    with pytest.raises(EngineError, match="failed"):
        await stage.begin(PIPELINE, EPOCH, "f32")
    with pytest.raises(EngineError, match="begin"):
        await stage.receive()


async def test_what_does_not_fit_into_memory(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_process, "available_bytes", lambda: 100 * 1024**2)
    stage = StageProcess(card, OPTIONS)
    with trio.fail_after(HANG_S):
        await stage.run()
    error = stage.stats().error
    assert error is not None
    assert "5 MiB weights + 29 MiB rows of tokens + 1 MiB KV cache for 512 tokens" in error
    assert "100 MiB are available" in error


async def test_stopping(card: ModelCard) -> None:
    async with started(card, OPTIONS) as stage:
        await stage.begin(PIPELINE, EPOCH, "f32")
        pid = stage.pid
        assert pid is not None
    assert stage.stats().state == "stopped"
    with pytest.raises(EngineError):
        await stage.receive()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
