"""Which experts are kept, by each of the rankings."""

from __future__ import annotations

import numpy as np
import pytest

from meshnode.config import Ranking
from meshnode.errors import ShardError
from meshnode.models.ranking import Scores, Seen, choose


def scores(*rows: list[float]) -> Scores:
    return {layer: np.array(row) for layer, row in enumerate(rows, start=2)}


SEEN = Seen(
    output_norm=scores([1, 2, 3, 4], [9, 1, 1, 8]),
    weight=scores([4, 3, 2, 1], [1, 5, 5, 1]),
    probability=scores([0.9, 0.1, 0.5, 0.5], [0.2, 0.1, 0.9, 0.8]),
)


@pytest.mark.parametrize(
    ("ranking", "kept"),
    [
        ("output-norm", {2: [2, 3], 3: [0, 3]}),
        ("weight", {2: [0, 1], 3: [1, 2]}),
        ("probability", {2: [0, 2], 3: [2, 3]}),
        ("global", {2: [2, 3], 3: [2, 3]}),
    ],
)
def test_the_best_of_each_layer_are_kept(ranking: Ranking, kept: dict[int, list[int]]) -> None:
    assert choose(ranking, SEEN, 2) == kept


def test_chance_is_the_same_everywhere() -> None:
    drawn = [choose("random", SEEN, 2, seed=seed) for seed in range(20)]
    assert drawn == [choose("random", SEEN, 2, seed=seed) for seed in range(20)]
    assert len({str(kept) for kept in drawn}) > 5
    assert all(row == sorted(set(row)) and len(row) == 2 for kept in drawn for row in kept.values())


@pytest.mark.parametrize("ranking", ["weight", "probability", "global"])
def test_a_router_without_probabilities_cannot_be_ranked_by_them(ranking: Ranking) -> None:
    silent = Seen(SEEN.output_norm, {}, {})
    assert choose("output-norm", silent, 1) == {2: [3], 3: [0]}
    with pytest.raises(ShardError, match=ranking):
        choose(ranking, silent, 1)
