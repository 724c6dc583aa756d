"""Who is there when: intervals of presence for each machine, and the changes they come to.

Sessions last as a Weibull distribution says, whose shape below 1 means what peer-to-peer networks
show: who has stayed long stays on. A run begins in the middle of it all, with as many there, and
for as much longer, as at any other moment. Presence can also come from a trace, a flash crowd can
join, and a region can lose its power; these are overlaid before they become events.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.streams import stream

Interval = tuple[int, int]
"""From when to when, in nanoseconds; the end is not in it."""
Presence = Mapping[int, tuple[Interval, ...]]
"""When each machine, by index, is on: intervals that do not touch, in order."""


@dataclass(frozen=True, slots=True)
class Weibull:
    """P(X > x) = exp(-(x / scale)^shape)."""

    shape: float
    scale_s: float

    @classmethod
    def with_median(cls, shape: float, median_s: float) -> Weibull:
        return cls(shape, median_s / math.log(2) ** (1 / shape))

    @property
    def mean_s(self) -> float:
        return self.scale_s * math.gamma(1 + 1 / self.shape)

    def draw_s(self, rng: random.Random) -> float:
        return rng.weibullvariate(self.scale_s, self.shape)

    def rest_s(self, rng: random.Random) -> float:
        """What is left of the one that is going on at any given moment: long ones go on more
        often, in proportion to their length, and the moment is anywhere in it.
        """
        grown = math.pow(rng.gammavariate(1 + 1 / self.shape, 1.0), 1 / self.shape)
        return self.scale_s * grown * rng.random()


@dataclass(frozen=True, slots=True)
class Churn:
    """How long machines stay, and stay away."""

    up: Weibull
    down: Weibull

    @property
    def availability(self) -> float:
        """The share of the machines that is there at any given moment."""
        return self.up.mean_s / (self.up.mean_s + self.down.mean_s)


IPFS = Churn(Weibull(0.61, 3.65 * 3600), Weibull.with_median(0.61, 2 * 3600))
"""Sessions of IPFS DHT servers: half of them last 2 h, 80 % no more than 8 h (probe-lab network
measurements, RFM 2). Absences were not measured alike; they are taken to be like sessions."""
LAB = Churn(Weibull.with_median(0.6, 600.0), Weibull.with_median(0.6, 120.0))
"""A stress test: half of all sessions end within ten minutes."""


def churning(seed: int, machines: Iterable[int], churn: Churn, horizon_s: float) -> Presence:
    """Presence up to the horizon, each machine's by a stream of its own."""
    horizon_ns = int(horizon_s * NS_PER_S)
    presence: dict[int, tuple[Interval, ...]] = {}
    for machine in machines:
        rng = stream(seed, "churn", machine)
        is_on = rng.random() < churn.availability
        left_s = (churn.up if is_on else churn.down).rest_s(rng)
        intervals: list[Interval] = []
        now_ns = 0
        while now_ns < horizon_ns:
            end_ns = now_ns + max(int(left_s * NS_PER_S), 1)
            if is_on:
                intervals.append((now_ns, min(end_ns, horizon_ns)))
            now_ns, is_on = end_ns, not is_on
            left_s = (churn.up if is_on else churn.down).draw_s(rng)
        presence[machine] = tuple(intervals)
    return presence


def flash_crowd(
    seed: int,
    machines: Iterable[int],
    *,
    from_s: float,
    within_s: float,
    horizon_s: float,
    stay: Weibull | None = None,
) -> Presence:
    """All come once, at moments spread evenly over `within_s`; they stay so long, or to the end."""
    horizon_ns = int(horizon_s * NS_PER_S)
    presence: dict[int, tuple[Interval, ...]] = {}
    for machine in machines:
        rng = stream(seed, "crowd", machine)
        comes_ns = int((from_s + within_s * rng.random()) * NS_PER_S)
        goes_ns = horizon_ns
        if stay is not None:
            goes_ns = min(comes_ns + max(int(stay.draw_s(rng) * NS_PER_S), 1), horizon_ns)
        presence[machine] = ((comes_ns, goes_ns),) if comes_ns < goes_ns else ()
    return presence


def without(presence: Presence, machines: Iterable[int], from_s: float, for_s: float) -> Presence:
    """The same, but these machines, of a region say, are off together for a while."""
    from_ns, until_ns = int(from_s * NS_PER_S), int((from_s + for_s) * NS_PER_S)
    lost = dict.fromkeys(machines)
    return {
        machine: tuple(_outside(intervals, from_ns, until_ns)) if machine in lost else intervals
        for machine, intervals in presence.items()
    }


def _outside(intervals: Iterable[Interval], from_ns: int, until_ns: int) -> Iterator[Interval]:
    for start_ns, end_ns in intervals:
        if start_ns < min(end_ns, from_ns):
            yield start_ns, min(end_ns, from_ns)
        if max(start_ns, until_ns) < end_ns:
            yield max(start_ns, until_ns), end_ns


def from_trace(path: Path, names: Mapping[str, int]) -> Presence:
    """Presence as a CSV file tells it, with a header and the columns `node`, `up_s`, `down_s`.

    `names` are the indices of the machines. A `ValueError` names the line that makes no sense:
    an unknown node, a number that is none, or an interval that is empty or overlaps another.
    """
    found: dict[int, list[Interval]] = {machine: [] for machine in names.values()}
    with path.open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                machine = names[row["node"]]
                up_ns, down_ns = (int(float(row[key]) * NS_PER_S) for key in ("up_s", "down_s"))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{path}:{line}: not node,up_s,down_s of a known node") from error
            if not 0 <= up_ns < down_ns:
                raise ValueError(f"{path}:{line}: up_s must come before down_s, and not before 0")
            found[machine].append((up_ns, down_ns))
            found[machine].sort()
            for (_, end_ns), (start_ns, _) in zip(found[machine], found[machine][1:], strict=False):
                if start_ns <= end_ns:
                    raise ValueError(f"{path}:{line}: {row['node']} is up twice at once")
    return {machine: tuple(intervals) for machine, intervals in found.items()}


@dataclass(frozen=True, order=True, slots=True)
class Change:
    """A machine comes or goes."""

    time_ns: int
    machine: int
    is_on: bool


def changes(presence: Presence, horizon_s: float) -> list[Change]:
    """What happens up to the horizon, in order. What ends at the horizon just stays."""
    horizon_ns = int(horizon_s * NS_PER_S)
    found = [
        change
        for machine, intervals in presence.items()
        for start_ns, end_ns in intervals
        for change in (Change(start_ns, machine, True), Change(end_ns, machine, False))
        if change.time_ns < horizon_ns
    ]
    return sorted(found)


__all__ = [
    "IPFS",
    "LAB",
    "Change",
    "Churn",
    "Presence",
    "Weibull",
    "changes",
    "churning",
    "flash_crowd",
    "from_trace",
    "without",
]
