"""A cut model computes what the whole one does, to the bit."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.engine.stages.steps import Codec, Keep, Share
from meshnode.errors import EngineError, RemoteProtocolError, StageError

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

from meshnode.engine.stages import model as stage_model
from meshnode.engine.stages.model import StageModel
from tests.engine.ring import CONTEXT_TOKENS, Bare, Batch, Ring, load
from tests.engine.tiny_architectures import write_tiny

LAYERS = 30
TEXT = "The sun rises in the east, and the city wakes with it: bread, trams, and pigeons."


@pytest.fixture(scope="module")
def bare(q4_0_path: Path) -> Iterator[Bare]:
    whole = Bare(q4_0_path)
    yield whole
    whole.close()


@pytest.fixture(scope="module", params=[(15,), (10, 20)], ids=["2 stages", "3 stages"])
def cut_ring(q4_0_path: Path, request: pytest.FixtureRequest) -> Iterator[Ring]:
    ring = Ring(q4_0_path, *request.param, layers=LAYERS)
    yield ring
    ring.close()


@pytest.fixture(scope="module")
def small_stage(q4_0_path: Path) -> Iterator[StageModel]:
    with load(q4_0_path, 0, 1) as stage:
        yield stage


@pytest.fixture
def stage(small_stage: StageModel) -> StageModel:
    small_stage.forget()
    return small_stage


@pytest.fixture
def whole(bare: Bare) -> Bare:
    bare.forget()
    return bare


@pytest.fixture
def ring(cut_ring: Ring) -> Ring:
    cut_ring.forget()
    return cut_ring


def both(whole: Bare, ring: Ring, batch: Batch) -> np.ndarray:
    """The logits, which must be the same bits."""
    expected = whole.compute(batch)
    assert np.array_equal(expected, ring.compute(batch))
    return expected


def go_on(whole: Bare, ring: Ring, logits: np.ndarray, slot: int, position: int, n: int) -> int:
    """Greedy: n more tokens after the last row of `logits`; the next position."""
    for place in range(position, position + n):
        batch = Batch().add(slot, place, [int(logits[-1].argmax())])
        logits = both(whole, ring, batch)
    return position + n


def test_an_answer(whole: Bare, ring: Ring) -> None:
    prompt = whole.tokens(TEXT)
    go_on(whole, ring, both(whole, ring, Batch().add(0, 0, prompt)), 0, len(prompt), 24)


def test_several_sequences_in_one_batch(whole: Bare, ring: Ring) -> None:
    prompts = [whole.tokens(TEXT[start:]) for start in (0, 14, 40)]
    batch = Batch()
    for slot, prompt in enumerate(prompts):
        batch.add(slot, 0, prompt)
    logits = both(whole, ring, batch)
    ends = np.cumsum([len(prompt) for prompt in prompts])
    tokens = [int(logits[end - 1].argmax()) for end in ends]
    positions = [len(prompt) for prompt in prompts]
    for turn in range(8):
        batch = Batch()
        # Rows come in whatever order the head likes, and slots may have several.
        for slot in np.roll([0, 1, 2], turn):
            batch.add(int(slot), positions[slot], [tokens[slot]])
            positions[slot] += 1
        logits = both(whole, ring, batch)
        for row, slot in enumerate(batch.slots):
            tokens[slot] = int(logits[row].argmax())


def test_a_prompt_that_begins_while_others_go_on(whole: Bare, ring: Ring) -> None:
    prompt = whole.tokens(TEXT)
    logits = both(whole, ring, Batch().add(2, 0, prompt))
    token = int(logits[-1].argmax())
    batch = Batch().add(0, 0, prompt[:7]).add(2, len(prompt), [token]).add(1, 0, prompt[3:9])
    logits = both(whole, ring, batch)
    both(whole, ring, Batch().add(1, 6, [5]).add(0, 7, prompt[7:]).add(2, len(prompt) + 1, [9]))


def test_a_prompt_in_chunks_and_a_second_turn(whole: Bare, ring: Ring) -> None:
    prompt = whole.tokens(TEXT * 6)
    assert len(prompt) > 128
    for start in range(0, len(prompt), 64):
        logits = both(whole, ring, Batch().add(3, start, prompt[start : start + 64]))
    end = go_on(whole, ring, logits, 3, len(prompt), 4)
    logits = both(whole, ring, Batch().add(3, end, whole.tokens("And in the evening?")))
    go_on(whole, ring, logits, 3, end + len(whole.tokens("And in the evening?")), 8)


def test_going_back(whole: Bare, ring: Ring) -> None:
    prompt = whole.tokens(TEXT)
    both(whole, ring, Batch().add(1, 0, prompt))
    both(whole, ring, Batch(changes=[Keep(1, 5)]).add(1, 5, prompt[8:]))
    both(whole, ring, Batch(changes=[Keep(1, 0)]).add(1, 0, prompt[4:]))
    # To keep more than there is, is to keep all.
    both(whole, ring, Batch(changes=[Keep(1, 500)]).add(1, len(prompt) - 4, [7]))


def test_sharing_a_beginning(whole: Bare, ring: Ring) -> None:
    prompt = whole.tokens(TEXT)
    both(whole, ring, Batch().add(0, 0, prompt))
    batch = Batch(changes=[Share(0, 1, 6), Share(1, 2, 4), Keep(0, 2)])
    both(whole, ring, batch.add(2, 4, [11, 12]).add(1, 6, [13]).add(0, 2, [14, 15]))


def test_a_step_of_changes_only(whole: Bare, ring: Ring) -> None:
    both(whole, ring, Batch().add(0, 0, [1, 2, 3]))
    (stage, *_) = ring.stages
    computed = stage.compute(Batch(changes=[Keep(0, 1)]).step(1))
    assert computed.shape == (0, 576)
    with pytest.raises(RemoteProtocolError, match="position 3 of slot 0, which holds 1"):
        stage.compute(Batch().add(0, 3, [4]).step(2))


def test_a_sequence_moves_to_other_machines(whole: Bare, ring: Ring, q4_0_path: Path) -> None:
    prompt = whole.tokens(TEXT)
    logits = both(whole, ring, Batch().add(0, 0, prompt))
    states = [stage.save(0) for stage in ring.stages]
    with closing(Ring(q4_0_path, *ring.cuts, layers=LAYERS)) as other:
        other.compute(Batch().add(0, 0, prompt[5:9]))  # somebody is there already
        for stage, state in zip(other.stages, states, strict=True):
            assert stage.restore(2, state) == len(prompt)
        other.last.restore(2, ring.last.save(0))
        position = len(prompt)
        for _ in range(12):
            token = int(logits[-1].argmax())
            logits = both(whole, ring, Batch().add(0, position, [token]))
            moved = other.compute(Batch().add(2, position, [token]))
            assert np.array_equal(logits, moved)
            position += 1


def test_what_is_no_state_is_refused(stage: StageModel) -> None:
    stage.compute(Batch().add(0, 0, [3, 1, 4, 1, 5]).step(0))
    state = stage.save(0)
    for bad in (b"", b"\0" * 100, state[:-1], state + b"\0", state[8:], state[:50]):
        with pytest.raises(EngineError, match="slot 1 is not this stage's"):
            stage.restore(1, bad)
    with pytest.raises(EngineError, match="Slot 0 is not empty"):
        stage.restore(0, state)
    for slot, why in ((3, "Slot 3 is empty"), (4, "no slot 4"), (-1, "no slot -1")):
        with pytest.raises(EngineError, match=why):
            stage.save(slot)
    assert stage.restore(1, state) == 5


def test_a_state_with_impossible_positions_leaves_nothing_behind(stage: StageModel) -> None:
    begin = Batch().add(0, 0, [3, 1, 4, 1, 5]).step(0)
    rows = stage.compute(begin)
    state = stage.save(0)
    # Its head is a magic number, flags, streams and cells; then comes the first cell's position.
    before = state[:16] + struct.pack("<i", -5) + state[20:]
    with pytest.raises(EngineError, match="slot 1 is not this stage's"):
        stage.restore(1, before)
    # Such a cell is removed with all others only, which is said when somebody counts on them.
    with pytest.raises(EngineError, match="Slot 0 is empty"):
        stage.save(0)
    assert np.array_equal(stage.compute(begin), rows)
    beyond = state[:16] + struct.pack("<i", CONTEXT_TOKENS) + state[20:]
    with pytest.raises(EngineError, match="slot 1 is not this stage's"):
        stage.restore(1, beyond)
    assert stage.save(0) == state


def test_what_does_not_go_on_is_refused(stage: StageModel) -> None:
    stage.compute(Batch().add(0, 0, [1, 2, 3]).step(0))
    bad = [
        Batch().add(0, 2, [4]),
        Batch().add(0, 4, [4]),
        Batch().add(1, 1, [4]),
        Batch().add(0, 3, [4]).add(0, 3, [4]),
        Batch(changes=[Share(0, 1, 4)]),
        Batch(changes=[Share(1, 0, 0)]),
        Batch(changes=[Share(0, 0, 2)]),
    ]
    for batch in bad:
        with pytest.raises(RemoteProtocolError):
            stage.compute(batch.step(1))
    assert stage.compute(Batch().add(0, 3, [4]).step(1)).shape == (1, 576)


def test_what_is_aborted_can_begin_again(stage: StageModel) -> None:
    step = Batch().add(0, 0, [3, 1, 4, 1, 5]).step(0)
    rows = stage.compute(step)
    stage.forget()
    stage.abort()
    with pytest.raises(EngineError, match="aborted"):
        stage.compute(step)
    stage.forget()
    assert np.array_equal(stage.compute(step), rows)


def test_a_full_cache_is_an_error_with_a_name(stage: StageModel) -> None:
    for slot in (0, 1):
        stage.compute(Batch().add(slot, 0, [7] * 512).step(slot))
    with pytest.raises(EngineError, match="KV cache of this stage is full"):
        stage.compute(Batch().add(2, 0, [7]).step(2))
    # What shares cells takes none.
    stage.forget()
    stage.compute(Batch().add(0, 0, [7] * 512).step(0))
    batch = Batch(changes=[Share(0, 1, 512)])
    assert stage.compute(batch.add(1, 512, [7] * 500).step(1)).shape == (500, 576)


@pytest.mark.parametrize("codec", ["f16", "i8"])
def test_smaller_codecs_are_close(whole: Bare, q4_0_path: Path, codec: Codec) -> None:
    with closing(Ring(q4_0_path, 15, layers=LAYERS, codec=codec)) as ring:
        batch = Batch().add(0, 0, whole.tokens(TEXT))
        expected, given = (_log_softmax(each.compute(batch)) for each in (whole, ring))
    divergence = (np.exp(expected) * (expected - given)).sum(axis=1).mean()
    assert 0 < divergence < 0.02


def test_a_stage_that_has_little_room_is_on_disk(
    stage: StageModel, q4_0_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage_files() -> list[str]:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return [line.partition("/")[2] for line in maps if line.endswith("(deleted)")]

    before = stage_files()
    monkeypatch.setattr(stage_model, "available_bytes", lambda: 0)
    step = Batch().add(0, 0, [3, 1, 4, 1, 5]).step(0)
    with load(q4_0_path, 0, 1) as on_disk:
        (name,) = set(stage_files()) - set(before)
        assert name.startswith(str(q4_0_path.parent)[1:])
        assert np.array_equal(on_disk.compute(step), stage.compute(step))
    assert stage_files() == before
    assert os.listdir(q4_0_path.parent) == [q4_0_path.name]


def test_a_recurrent_stage_goes_back_to_nothing_only(tmp_path: Path) -> None:
    begin = Batch().add(0, 0, [1, 2, 3]).step(0)
    with load(write_tiny(tmp_path / "tiny.gguf", "lfm2"), 0, 3) as stage:
        rows = stage.compute(begin)
        state = stage.save(0)
        with pytest.raises(RemoteProtocolError, match="slot 0, which holds 0"):
            stage.compute(Batch(changes=[Keep(0, 2)]).add(0, 2, [3]).step(1))
        assert np.array_equal(stage.compute(begin), rows)
        with pytest.raises(RemoteProtocolError, match="to share"):
            stage.compute(Batch(changes=[Share(0, 1, 3)]).add(1, 3, [4]).step(1))
        # Moved, it goes on as if it had stayed.
        stayed = stage.compute(Batch().add(0, 3, [4]).step(1))
        assert stage.restore(1, state) == 3
        assert np.array_equal(stage.compute(Batch().add(1, 3, [4]).step(1)), stayed)


def test_the_last_layers_and_none_are_refused(q4_0_path: Path) -> None:
    for first, end, why in ((15, 30, "are the last"), (5, 5, "has layers 0 to 29")):
        with pytest.raises(StageError, match=why):
            load(q4_0_path, first, end)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
