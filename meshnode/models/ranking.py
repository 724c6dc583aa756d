"""Which experts of a layer are worth keeping: rankings of what was seen of them. Pure.

Knows numbers, not models. A layer's experts are ranked by themselves: experts of different layers
have nothing but their numbers in common, so one list for all layers (`global`, as mesh-llm does it)
keeps much that a layer never uses. `output-norm`, how much an expert's answers weigh in a layer's
sum, loses least; the others are there to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from meshnode.config import Ranking
from meshnode.errors import ShardError

Scores = Mapping[int, np.ndarray[tuple[int], np.dtype[np.float64]]]
"""By layer: a number for each expert; more is better."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Sums over the tokens of a text.

    `output_norm`: of the length of an expert's weighted output, where it was chosen; `weight`: of
    the weight that it had among the chosen; `probability`: of what the router gave it, chosen or
    not. The last two are empty if the router tells no probabilities.
    """

    output_norm: Scores
    weight: Scores
    probability: Scores


def choose(ranking: Ranking, seen: Seen, count: int, *, seed: int = 0) -> dict[int, list[int]]:
    """By layer, the `count` best experts in the order of their numbers.

    `seed` is for `random`. Raises `ShardError` if the text has not shown what is asked for.
    """
    if ranking == "output-norm":
        scores = seen.output_norm
    elif ranking == "random":
        drawn = np.random.default_rng(seed)
        scores = {layer: drawn.random(len(row)) for layer, row in seen.output_norm.items()}
    else:
        scores = seen.weight if ranking == "weight" else seen.probability
        if not scores:
            raise ShardError(f"This model's router tells no probabilities to rank by {ranking}.")
    if ranking == "global":
        summed = np.sum(list(scores.values()), axis=0)
        scores = dict.fromkeys(scores, summed)
    # Stable, so that equal scores give equal shards everywhere.
    return {
        layer: sorted(np.argsort(-row, kind="stable")[:count].tolist())
        for layer, row in scores.items()
    }
