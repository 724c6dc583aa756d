"""What others do, in their formulas.

`proportional`  every host, layers by memory (exo)
`fastest_first` the fastest hosts until the layers are spread, nearest neighbour next
`largest_first` fewest stages by memory, then layers by speed up to the room (Parallax)
`Petals`        spans where the least served layers are (Borzunov et al. 2023)
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from tests.bench.placement.exact import Instance, span_rate

BALANCE_QUALITY = 0.75
"""Petals' default: a server moves if coverage is below so much of what moving would give."""
REBALANCE_ROUNDS_MAX = 20

Stages = list[tuple[int, int]]
"""Host and layers, in pipeline order."""


def cost_us(case: Instance, stages: Stages) -> int:
    """The time of a token, the way back included."""
    compute = sum(-(-case.us[i] * count // case.layers) for i, count in stages)
    order = [i for i, _ in stages]
    return compute + sum(case.hop_us[order[k - 1]][order[k]] for k in range(len(order)))


def rate(case: Instance, stages: Stages) -> float:
    """Tokens a second, set by the slowest stage."""
    return 1e6 / max(-(-case.us[i] * count // case.layers) for i, count in stages)


def proportional(case: Instance) -> Stages:
    members = list(range(len(case.room)))
    return _near_first(case, _shared(case, members, [float(case.room[i]) for i in members]))


def fastest_first(case: Instance) -> Stages:
    counts: dict[int, int] = {}
    left = case.layers
    for i in sorted(range(len(case.room)), key=lambda i: case.us[i]):
        if left > 0 and case.room[i] > 0:
            counts[i] = min(left, case.room[i])
            left -= counts[i]
    return _near_first(case, counts)


def largest_first(case: Instance) -> list[Stages]:
    """Pipelines until the rest has no room for another: largest first, the last one just enough."""
    free = sorted(range(len(case.room)), key=lambda i: -case.room[i])
    made = []
    while sum(case.room[i] for i in free) >= case.layers:
        members: list[int] = []
        left = case.layers
        while left > 0:
            enough = [i for i in free if case.room[i] >= left]
            taken = enough[-1] if enough else free[0]
            free.remove(taken)
            members.append(taken)
            left -= case.room[taken]
        made.append(_near_first(case, _shared(case, members, [1 / case.us[i] for i in members])))
    return made


def _shared(case: Instance, members: list[int], powers: Sequence[float]) -> dict[int, int]:
    """Layers by power up to the room: the water level such that all are spread, then rounded."""
    pairs = list(zip(members, powers, strict=True))
    low, high = 0.0, case.layers / min(powers)
    for _ in range(60):
        level = (low + high) / 2
        shares = [min(case.room[i], level * power) for i, power in pairs]
        low, high = (low, level) if sum(shares) >= case.layers else (level, high)
    shares = [min(case.room[i], high * power) for i, power in pairs]
    counts = {i: int(share) for i, share in zip(members, shares, strict=True)}
    rest = sorted(zip(members, shares, strict=True), key=lambda pair: int(pair[1]) - pair[1])
    while sum(counts.values()) < case.layers:
        for i, _ in rest:
            if counts[i] < case.room[i] and sum(counts.values()) < case.layers:
                counts[i] += 1
    return {i: count for i, count in counts.items() if count > 0}


def _near_first(case: Instance, counts: dict[int, int]) -> Stages:
    """From the fastest, always to the nearest that is left."""
    left = sorted(counts, key=lambda i: case.us[i])
    order = [left.pop(0)]
    while left:
        nearest = min(left, key=lambda i: case.hop_us[order[-1]][i])
        left.remove(nearest)
        order.append(nearest)
    return [(i, counts[i]) for i in order]


# --- Petals --------------------------------------------------------------------------------------


class Petals:
    """Servers that join in a random order and then move when that helps enough."""

    def __init__(self, case: Instance, rng: random.Random) -> None:
        self._case = case
        self._rng = rng
        self._rates = [span_rate(case, i) for i in range(len(case.room))]
        self._length = [min(room, case.layers) for room in case.room]
        self._starts: dict[int, int] = {}
        order = list(range(len(case.room)))
        rng.shuffle(order)
        for i in order:
            self._starts[i] = self._best_start(i, self._covered())

    @property
    def least(self) -> float:
        """The rate of the layer that is served least."""
        return float(self._covered().min())

    def rebalance(self) -> None:
        """Every server checks in turn, until none of them wants to move."""
        for _ in range(REBALANCE_ROUNDS_MAX):
            moves = [self._check(i) for i in sorted(self._starts)]
            if not any(moves):
                return

    def _covered(self, without: int | None = None) -> np.ndarray:
        covered = np.zeros(self._case.layers)
        for i, start in self._starts.items():
            if i != without:
                covered[start : start + self._length[i]] += self._rates[i]
        return covered

    def _best_start(self, i: int, covered: np.ndarray) -> int:
        """Where the sorted rates of the span are least, compared as lists."""
        starts = range(self._case.layers - self._length[i] + 1)
        here = self._starts.get(i)
        return min(starts, key=lambda s: (sorted(covered[s : s + self._length[i]]), s != here, s))

    def _check(self, i: int) -> bool:
        """`i` moves if it and whoever would follow it improve coverage enough."""
        now = self.least
        rest = self._covered(without=i)
        if now > 0 and rest.min() <= 0:
            return False
        before = dict(self._starts)
        here = before[i]
        best = self._best_start(i, rest)
        if best == here:
            return False
        self._starts[i] = best
        for _ in range(REBALANCE_ROUNDS_MAX):
            order = sorted(self._starts)
            self._rng.shuffle(order)
            moved = False
            for other in order:
                start = self._best_start(other, self._covered(without=other))
                if start != self._starts[other]:
                    old, was = self._starts[other], self.least
                    self._starts[other] = start
                    moved = moved or self.least > was
                    if self.least < was:
                        self._starts[other] = old
            if not moved:
                break
        after = self.least
        self._starts = before
        if after <= 0 or now / after >= BALANCE_QUALITY:
            return False
        self._starts[i] = best
        return True
