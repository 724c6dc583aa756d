"""The best there is, by searching everything: only for small meshes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

MILP_S_MAX = 10.0
"""At 8 hosts and 24 layers most are proven within a second; the others say that they are not."""


@dataclass(frozen=True)
class Instance:
    """Hosts by place: room in layers, microseconds for all layers, microseconds between two."""

    layers: int
    room: tuple[int, ...]
    us: tuple[int, ...]
    hop_us: tuple[tuple[int, ...], ...]


def latency_us(case: Instance) -> int:
    """The least time of a token over all sets of hosts and all rings through them."""
    n = len(case.room)
    hop = np.array(case.hop_us, dtype=np.int64)
    far = np.iinfo(np.int64).max // 4
    # path[set][last]: the shortest from the set's lowest member through all of it to `last`.
    path = np.full((1 << n, n), far, dtype=np.int64)
    for i in range(n):
        path[1 << i][i] = 0
    best = far
    for members in range(1, 1 << n):
        first = (members & -members).bit_length() - 1
        reach = (path[members][:, None] + hop).min(axis=0)
        for j in range(first + 1, n):
            if not members >> j & 1:
                path[members | 1 << j][j] = reach[j]
        compute = _fill_us(case, [i for i in range(n) if members >> i & 1])
        if compute is not None:
            best = min(best, compute + int(reach[first]))
    return best


def _fill_us(case: Instance, members: list[int]) -> int | None:
    left, total = case.layers, 0
    for i in sorted(members, key=lambda i: case.us[i]):
        if left == 0:
            return None
        taken = min(case.room[i], left)
        total += -(-case.us[i] * taken // case.layers)
        left -= taken
    return total if left == 0 else None


def bottleneck_us(case: Instance, members: Sequence[int]) -> int | None:
    """The least time that the slowest stage of a pipeline through `members` can take."""
    if sum(case.room[i] for i in members) < case.layers:
        return None
    times = sorted(
        -(-case.us[i] * n // case.layers) for i in members for n in range(1, case.room[i] + 1)
    )
    low, high = 0, len(times) - 1
    while low < high:
        middle = (low + high) // 2
        room = sum(min(case.room[i], times[middle] * case.layers // case.us[i]) for i in members)
        low, high = (low, middle) if room >= case.layers else (middle + 1, high)
    return times[low]


def pipelines(case: Instance) -> list[float]:
    """The greatest sum of tokens a second of exactly 1, 2, ... pipelines, while there can be."""
    n = len(case.room)
    rate = [0.0] * (1 << n)
    for members in range(1, 1 << n):
        time_us = bottleneck_us(case, [i for i in range(n) if members >> i & 1])
        rate[members] = 1e6 / time_us if time_us else 0.0
    sums = []
    best = rate
    while best[-1] > 0:
        sums.append(best[-1])
        more = [0.0] * (1 << n)
        for members in range(1, 1 << n):
            lowest = members & -members
            part = rest = members ^ lowest
            while part:  # every split in two, the lowest member in the first
                part = (part - 1) & rest
                one, other = rate[part | lowest], best[rest ^ part]
                if one > 0 and other > 0 and one + other > more[members]:
                    more[members] = one + other
        best = more
    return sums


def coverage(case: Instance) -> tuple[float, bool]:
    """The greatest least rate of any layer, spans as long as the room is; whether it is proven.

    Variables: for every host and start whether its span is there, and last the rate itself.
    """
    spans = [
        (i, start)
        for i, room in enumerate(case.room)
        for start in range(case.layers - min(room, case.layers) + 1)
    ]
    one_each = np.zeros((len(case.room), len(spans) + 1))
    covering = np.zeros((case.layers, len(spans) + 1))
    covering[:, -1] = -1
    for k, (i, start) in enumerate(spans):
        one_each[i, k] = 1
        covering[start : start + case.room[i], k] = span_rate(case, i)
    goal = np.zeros(len(spans) + 1)
    goal[-1] = -1
    kinds = np.ones(len(spans) + 1)
    kinds[-1] = 0
    upper = np.ones(len(spans) + 1)
    upper[-1] = np.inf
    found = milp(
        goal,
        integrality=kinds,
        bounds=Bounds(0, upper),
        constraints=[
            LinearConstraint(csr_array(one_each), ub=1),
            LinearConstraint(csr_array(covering), lb=0),
        ],
        options={"time_limit": MILP_S_MAX},
    )
    return (float(found.x[-1]) if found.x is not None else 0.0), found.status == 0


def span_rate(case: Instance, i: int) -> float:
    """Tokens a second of host `i` with as many layers as it has room for."""
    return 1e6 * case.layers / (case.us[i] * min(case.room[i], case.layers))
