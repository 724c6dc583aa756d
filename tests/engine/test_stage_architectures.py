"""Every architecture that may be cut computes in stages what it computes whole, bit by bit."""

from __future__ import annotations

import itertools
import os
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from meshnode.engine.child_process import CHILD_ENVIRONMENT

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

from meshnode.errors import ModelLoadError, StageError
from meshnode.models.experts import write_shard
from meshnode.models.gguf import ShardMark
from meshnode.models.stages import cut, cut_points
from meshnode.models.stages.architectures import RULES
from meshnode.models.stages.lookup import Lookup
from tests.engine.ring import Bare, Batch, Ring
from tests.engine.tiny_architectures import SETTINGS, WORDS, write_tiny

PROMPT_TOKENS = 40  # more than the tiny models' windows


def computed(model: Bare | Ring) -> np.ndarray:
    """Logits for a prompt, then for its next token together with another sequence's first."""
    tokens = np.random.default_rng(6).integers(0, WORDS, PROMPT_TOKENS).tolist()
    prompt = model.compute(Batch().add(0, 0, tokens))
    return np.concatenate(
        [prompt, model.compute(Batch().add(0, PROMPT_TOKENS, [5]).add(1, 0, [7]))]
    )


def whole(source: Path) -> np.ndarray:
    with closing(Bare(source, rows_max=64)) as model:
        return computed(model)


def in_stages(source: Path, edges: tuple[int, ...]) -> np.ndarray:
    with closing(Ring(source, *edges[1:-1], layers=edges[-1])) as ring:
        return computed(ring)


def test_an_expert_shard_computes_the_same_in_stages(tmp_path: Path) -> None:
    source, shard = write_tiny(tmp_path / "tiny.gguf", "qwen3moe"), tmp_path / "shard.gguf"
    write_shard(source, shard, dict.fromkeys(range(8), (0, 2, 3, 7)), ShardMark("5e" * 32, 4, 8))
    expected = whole(shard)
    assert not np.array_equal(expected, whole(source))
    assert np.array_equal(in_stages(shard, (0, 3, 5, 8)), expected)


def some_way(source: Path, layers: int, stages: int) -> tuple[int, ...]:
    """One of all that are possible, `cut_points` leaving some out; always the same."""
    inner = list(itertools.combinations(range(1, layers), stages - 1))
    for place in np.random.default_rng(stages).permutation(len(inner)):
        edges = (0, *inner[place], layers)
        with suppress(StageError):
            for first, end in itertools.pairwise(edges):
                cut(source, first, end)
            return edges
    raise AssertionError("there is none")


def test_every_architecture_of_the_table_is_here() -> None:
    assert {name.split("/")[0] for name in SETTINGS} == set(RULES)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_and_three_stages_compute_what_the_whole_does(name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", name)
    expected = whole(source)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.1
    cuts = cut_points(source)
    assert cuts.is_exact
    for stages in (2, 3):
        edges = some_way(source, cuts.layers, stages)
        assert np.array_equal(in_stages(source, edges), expected), edges


def test_a_stage_whose_layers_all_have_windows(tmp_path: Path) -> None:
    """The factors of the others' rotations are not in its file: llama.cpp would not load it."""
    source = write_tiny(tmp_path / "tiny.gguf", "gemma4")
    assert np.array_equal(in_stages(source, (0, 2, 9)), whole(source))


def test_stages_that_are_nearly_exact_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes in is divided by √128, and multiplied again: the last bit may differ."""
    monkeypatch.setitem(SETTINGS, "gemma/wide", {"embedding_length": 128})
    source = write_tiny(tmp_path / "tiny.gguf", "gemma/wide")
    assert not cut_points(source).is_exact
    expected = whole(source)
    given = in_stages(source, (0, 3, 8))
    assert not np.array_equal(given, expected)
    assert abs(given - expected).max() < 1e-3 * expected.std()


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("deepseek", (0, 3, 8)),
        ("gemma", (0, 3, 8)),
        ("gemma2", (0, 3, 8)),
        ("gemma3", (0, 3, 8)),
        ("granite", (0, 3, 8)),
        ("grok", (0, 3, 8)),
        ("minicpm", (0, 3, 8)),
        ("olmo2/windows", (0, 3, 8)),
        ("qwen3next", (0, 6, 12)),
        ("smollm3", (0, 6, 12)),
    ],
)
def test_without_its_rules_it_is_another_model(
    name: str, edges: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", name)
    monkeypatch.setitem(RULES, name.split("/")[0], ())
    try:
        given = in_stages(source, edges)
    except (ModelLoadError, AssertionError):
        return  # it lacks tensors that such a model would have
    assert not np.array_equal(given, whole(source))


# F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, BF16, TQ1_0, TQ2_0, MXFP4
@pytest.mark.parametrize("kind", [1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30, 34, 35, 39])
def test_rows_are_looked_up_as_llama_cpp_does(kind: int, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", "llama/wide", rows_of_tokens=kind)
    lookup = Lookup(cut(source, 0, 8), source)
    batch = Batch().add(0, 0, list(range(WORDS)))
    with closing(Bare(source, rows_max=128)) as model:
        expected = model.compute(batch)
        model.forget()
        given = model.compute(batch, lookup.rows(np.arange(WORDS, dtype=np.int32)))
    assert np.array_equal(given, expected)
