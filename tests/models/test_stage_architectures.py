"""Every architecture that may be cut computes in stages what it computes whole, bit by bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from ring import Computer, Ring
from tiny_architectures import SETTINGS, WORDS, write_tiny

from meshnode.models.stages import Cuts, cut, cut_points
from meshnode.models.stages.architectures import RULES

PROMPT_TOKENS = 40  # more than the tiny models' windows


def computed(computer: Computer | Ring) -> np.ndarray:
    """Logits for a prompt, then for its next token together with another sequence's first."""
    tokens = np.random.default_rng(6).integers(0, WORDS, PROMPT_TOKENS).tolist()
    prompt = computer.compute(tokens, list(range(PROMPT_TOKENS)), [0] * PROMPT_TOKENS)
    return np.concatenate([prompt, computer.compute([5, 7], [PROMPT_TOKENS, 0], [0, 1])])


def ways(cuts: Cuts, stages: int) -> list[tuple[int, ...]]:
    """All allowed ways to cut into so many stages."""
    inner = itertools.combinations(range(1, cuts.layers), stages - 1)
    edges = [(0, *way, cuts.layers) for way in inner]
    return [way for way in edges if all(itertools.starmap(cuts.allows, itertools.pairwise(way)))]


def whole(source: Path) -> np.ndarray:
    computer = Computer(str(source))
    logits = computed(computer)
    computer.close()
    return logits


def in_stages(source: Path, edges: tuple[int, ...]) -> np.ndarray:
    ring = Ring([cut(source, first, end) for first, end in itertools.pairwise(edges)], source)
    logits = computed(ring)
    ring.close()
    return logits


def test_every_architecture_of_the_table_is_here() -> None:
    assert {name.split("/")[0] for name in SETTINGS} == set(RULES)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_and_three_stages_compute_what_the_whole_does(name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", name)
    expected = whole(source)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.1
    cuts = cut_points(source)
    for stages in (2, 3):
        possible = ways(cuts, stages)
        edges = possible[len(possible) // 2]
        assert np.array_equal(in_stages(source, edges), expected), edges
