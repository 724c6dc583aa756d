"""The engine's stages of models that are peculiar in each way that concerns who computes them."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from meshnode.engine.child_process import CHILD_ENVIRONMENT

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

from ring import Computer
from tiny_architectures import WORDS, write_tiny

from meshnode.engine.activations import pack
from meshnode.engine.stage_model import StageModel
from meshnode.engine.steps import Keep, Share, Step
from meshnode.errors import RemoteProtocolError
from meshnode.models.stages import cut, cut_points, open_stage

PROMPT_TOKENS = 40


def step_of(
    positions: list[int],
    slots: list[int],
    *,
    tokens: list[int] | None = None,
    rows: np.ndarray | None = None,
    changes: tuple[Keep | Share, ...] = (),
) -> Step:
    return Step(
        b"p" * 16,
        0,
        0,
        changes,
        np.array(slots, "<u2").tobytes(),
        np.array(positions, "<i4").tobytes(),
        tokens=np.array(tokens or [], "<i4").tobytes(),
        rows=b"" if rows is None else pack(rows, "f32")[1],
    )


def load(source: Path, first: int, end: int) -> StageModel:
    return StageModel(
        str(source),
        first,
        end,
        context_tokens=256,
        slots=2,
        threads=1,
        on_progress=lambda _fraction: None,
    )


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",  # scales all that comes in, and has windows
        "gemma3",  # scales the rows of tokens
        "glm4moe",  # four positions a row
        "gpt2",  # positions in a table
        "lfm2",  # recurrent
        "qwen3moe",  # experts
        "qwen3vl",  # four positions a row
    ],
)
def test_stages_compute_what_the_whole_does(name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", name)
    tokens = np.random.default_rng(6).integers(0, WORDS, PROMPT_TOKENS).tolist()
    batches = [
        (tokens, list(range(PROMPT_TOKENS)), [0] * PROMPT_TOKENS),
        ([5, 7], [PROMPT_TOKENS, 0], [0, 1]),
    ]
    with ExitStack() as stack:
        whole = stack.enter_context(closing(Computer(str(source))))
        first = stack.enter_context(load(source, 0, 3))
        middle = stack.enter_context(load(source, 3, 6))
        last = cut(source, 6, cut_points(source).layers)
        with open_stage(last, source) as file:
            head = stack.enter_context(closing(Computer(file.path)))
        for tokens, positions, slots in batches:
            rows = first.compute(step_of(positions, slots, tokens=tokens))
            rows = middle.compute(step_of(positions, slots, rows=rows))
            logits = head.compute(rows * np.float32(last.input_scale), positions, slots)
            assert np.array_equal(logits, whole.compute(tokens, positions, slots))


def test_a_recurrent_stage_goes_back_to_nothing_only(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", "lfm2")
    with load(source, 0, 3) as stage:
        begin = step_of([0, 1, 2], [0, 0, 0], tokens=[1, 2, 3])
        rows = stage.compute(begin)
        state = stage.save(0)
        with pytest.raises(RemoteProtocolError, match="slot 0, which holds 0 tokens"):
            stage.compute(step_of([2], [0], tokens=[3], changes=(Keep(0, 2),)))
        assert np.array_equal(stage.compute(begin), rows)
        with pytest.raises(RemoteProtocolError, match="to share"):
            stage.compute(step_of([3], [1], tokens=[4], changes=(Share(0, 1, 3),)))
        # Moved, it goes on as if it had stayed.
        stayed = stage.compute(step_of([3], [0], tokens=[4]))
        assert stage.restore(1, state) == 3
        assert np.array_equal(stage.compute(step_of([3], [1], tokens=[4])), stayed)
