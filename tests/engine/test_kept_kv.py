"""Shared, pinned, saved and restored KV with a real model: less is computed, nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from meshnode.config import KvType
from meshnode.engine import ChatMessage
from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.engine.memory import memory_need
from meshnode.engine.saved import Drop, Restore, Save, Spill
from meshnode.engine.scheduler import Batch, Chunk, Copy, Limits, Trim
from meshnode.errors import ModelLoadError
from meshnode.models.gguf import read_header

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

from meshnode.engine.llama import LlamaModel
from tests.engine.stepping import Stepper
from tests.models.gguf_writer import Tensor, write_gguf

CONTEXT_TOKENS = 256  # as llama.cpp has it too: it rounds up to multiples of 256
SLOTS, SLOTS_KEPT = 4, 4


def ignore_progress(_fraction: float) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def kv_bytes(q4_0_path: Path) -> int:
    return read_header(q4_0_path).kv_bytes_per_token


@pytest.fixture(scope="module")
def model(q4_0_path: Path) -> Iterator[LlamaModel]:
    with LlamaModel(
        str(q4_0_path),
        context_tokens=CONTEXT_TOKENS,
        slots=SLOTS,
        slots_kept=SLOTS_KEPT,
        threads=1,
        on_progress=ignore_progress,
    ) as model:
        yield model


def limits(saved_tokens: int = 0, spilled_tokens: int = 0, slots: int = SLOTS) -> Limits:
    return Limits(
        slots,
        CONTEXT_TOKENS,
        CONTEXT_TOKENS,
        8,
        slots_kept=SLOTS_KEPT,
        saved_tokens=saved_tokens,
        spilled_tokens=spilled_tokens,
    )


def words(model: LlamaModel, text: str, tokens: int) -> list[int]:
    return model.prompt_tokens(text * tokens)[:tokens]


@pytest.fixture(scope="module")
def system(model: LlamaModel) -> list[int]:
    return words(model, "You are a patient teacher of geography and you answer briefly. ", 80)


# Rounding depends on what else is in a batch, so in a longer answer a token may differ.
ANSWER_TOKENS = 6
CAPITALS = ("France", "Italy", "Spain")


def question(model: LlamaModel, country: str) -> list[int]:
    return model.prompt_tokens(f"\nQ: What is the capital of {country}?\nA:")


def test_a_system_prompt_is_computed_once_while_its_first_session_runs_on(
    model: LlamaModel, kv_bytes: int, system: list[int]
) -> None:
    def answers(countries: tuple[str, ...]) -> Stepper:
        stepper = Stepper(model, limits(), kv_bytes_per_token=kv_bytes)
        for number, country in enumerate(countries):
            session = country.encode()
            stepper.submit(number, session, system + question(model, country), ANSWER_TOKENS)
            for _ in range(4):  # the first ones answer already when the next one comes
                stepper.step()
        stepper.run()
        return stepper

    together = answers(CAPITALS)
    for number, country in enumerate(CAPITALS):
        alone = answers((country,))
        assert together.answers[number] == alone.answers[0]
        tail = len(question(model, country)) + len(alone.answers[0]) - 1
        cached = together.usages[number].cached_tokens
        assert cached == 0 if number == 0 else cached >= len(system)
        assert together.computed[number] <= tail + (len(system) if number == 0 else 0)
    # The third session has made it a system prompt: it has a slot of its own now.
    *_, pinned = together.of(Copy)
    assert isinstance(pinned, Copy)
    assert pinned.tokens >= len(system)


def test_a_restored_state_gives_the_same_logits_bit_by_bit(
    model: LlamaModel, kv_bytes: int
) -> None:
    stepper = Stepper(model, limits(), kv_bytes_per_token=kv_bytes)
    prompt = tuple(words(model, "one two three four five ", 80))
    others = tuple(words(model, "red green blue yellow ", 40))

    def logits(slot: int) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
        rows = []
        for position in range(80, 88):
            chunk = Chunk(1, slot, position, (500 + position,), True)
            assert model.decode(Batch((), (chunk,)))
            rows.append(model._logits(0).copy())
        return rows

    for slot, tokens in ((0, others), (1, prompt), (2, others)):
        assert model.decode(Batch((), (Chunk(1, slot, 0, tokens, True),)))
    state = model.save(1, 80 * stepper.states.bytes_per_token)
    assert state is not None
    expected = logits(1)
    # The cells that it had are others' now, and its new ones are not in one piece.
    model.trim(Trim(1, 0))
    assert model.decode(Batch((), (Chunk(1, 3, 0, others, True),)))
    model.trim(Trim(0, 30))
    assert model.restore(4, state)
    assert all(np.array_equal(*pair) for pair in zip(logits(4), expected, strict=True))
    assert not model.restore(5, state[:-1])
    assert model.save(4, 80 * kv_bytes // 2) is None


@pytest.mark.parametrize("place", ["memory", "disk", "nowhere", "damaged disk"])
def test_a_preempted_answer_goes_on_as_if_nothing_had_been(
    model: LlamaModel, kv_bytes: int, tmp_path: Path, place: str
) -> None:
    prompts = [words(model, "The cat sat on the mat. ", 60), words(model, "1 2 3 4 5 6 7 ", 60)]
    room = {"memory": (200, 0), "nowhere": (0, 0)}.get(place, (0, 200))

    def start(numbers: tuple[int, ...]) -> Stepper:
        stepper = Stepper(model, limits(*room), spill_dir=tmp_path, kv_bytes_per_token=kv_bytes)
        for number in numbers:
            stepper.submit(number, bytes([number]) * 16, prompts[number], 80)
        return stepper

    alone = start((1,))
    alone.run()
    stepper = start((0, 1))
    while stepper.step() and stepper.scheduler.load().waiting == 0:
        pass
    done = len(stepper.answers[1])
    assert 0 < done < 80, "it was not preempted in its answer"
    assert list(tmp_path.iterdir()) == []  # what is spilled has no name
    if place == "damaged disk":
        assert damage(tmp_path) == 1
    stepper.run()
    assert stepper.answers[1] == alone.answers[1]
    assert len(stepper.of(Restore)) == (place != "nowhere")
    assert len(stepper.of(Spill)) == ("disk" in place)
    computed = len(prompts[1]) + 79
    again = 0 if place in ("memory", "disk") else len(prompts[1]) + done
    assert computed + again - 2 <= stepper.computed[1] <= computed + again
    assert stepper.scheduler.load().saved_tokens == 0
    assert damage(tmp_path) == 0, "a spilled state is still open"


def damage(directory: Path) -> int:
    """Flip a bit in every file without a name that this process has there; returns how many."""
    files = 0
    for link in Path("/proc/self/fd").iterdir():
        if link.exists() and os.readlink(link).startswith(str(directory)):
            assert link.stat().st_mode & 0o777 == 0o600
            with link.open("r+b") as file:
                file.seek(link.stat().st_size // 2)
                (byte,) = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
            files += 1
    return files


def test_idle_sessions_are_saved_until_the_limit_and_the_oldest_is_lost(
    model: LlamaModel, kv_bytes: int
) -> None:
    stepper = Stepper(model, limits(saved_tokens=150), kv_bytes_per_token=kv_bytes)
    texts = ("red ", "green ", "blue ", "white ", "black ")
    prompts = [words(model, text, 66 + number) for number, text in enumerate(texts)]
    for number, prompt in enumerate(prompts):
        stepper.submit(number, bytes([number]) * 16, prompt, 2)
        stepper.run()
    # Three fit into the cache; the others made the first two leave.
    assert len(stepper.of(Save)) == 2
    stepper.submit(9, bytes([0]) * 16, [*prompts[0], 500], 2)
    stepper.run()
    assert stepper.usages[9].cached_tokens == len(prompts[0])
    assert stepper.computed[9] == 2
    # To make room for it the third left, and what was saved of that took the second's place.
    assert stepper.of(Drop)
    assert stepper.scheduler.load().saved_tokens <= 150
    for number, cached_tokens in ((1, 0), (2, len(prompts[2]))):
        stepper.submit(10 + number, bytes([number]) * 16, [*prompts[number], 500], 2)
        stepper.run()
        assert stepper.usages[10 + number].cached_tokens == cached_tokens


def test_q8_0_takes_half_and_answers_well(q4_0_path: Path, kv_bytes: int) -> None:
    header = read_header(q4_0_path)
    per_token = memory_need(header, CONTEXT_TOKENS, kv_type="q8_0").kv_bytes_per_token
    assert per_token == kv_bytes * 34 // 64
    with LlamaModel(
        str(q4_0_path),
        context_tokens=CONTEXT_TOKENS,
        slots=1,
        kv_type="q8_0",
        threads=1,
        on_progress=ignore_progress,
    ) as model:
        stepper = Stepper(
            model, Limits(1, CONTEXT_TOKENS, CONTEXT_TOKENS, 1), kv_bytes_per_token=per_token
        )
        prompt = model.prompt_tokens((ChatMessage("user", "What is the capital of France?"),))
        stepper.submit(1, b"s", prompt, 8)
        stepper.run()
        assert "Paris" in b"".join(map(model.piece, stepper.answers[1])).decode()
        held = stepper.computed[1]
        state = model.save(0, held * stepper.states.bytes_per_token)
        assert state is not None
        assert len(state) > per_token * held


def test_a_model_that_cannot_have_q8_0_says_so(tmp_path: Path) -> None:
    # Heads of 16 values do not fill a block of 32.
    path = tmp_path / "thin.gguf"
    path.write_bytes(write_gguf(THIN, THIN_TENSORS))

    def load(kv_type: KvType) -> None:
        LlamaModel(
            str(path),
            context_tokens=64,
            slots=1,
            kv_type=kv_type,
            threads=1,
            on_progress=ignore_progress,
        ).close()

    load("f16")
    with pytest.raises(ModelLoadError, match=r"thin\.gguf.* as q8_0; use f16"):
        load("q8_0")


THIN = {
    "general.architecture": "llama",
    "llama.context_length": 256,
    "llama.block_count": 1,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 8,
    "tokenizer.ggml.model": "no_vocab",
}
THIN_TENSORS = [
    Tensor("token_embd.weight", (64, 8), 0, 64 * 8 * 4),
    *(
        Tensor(f"{name}.weight", (64,), 0, 64 * 4)
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    ),
    *(
        Tensor(f"blk.0.{name}.weight", (64, 64), 0, 64 * 64 * 4)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up")
    ),
]
