"""The smallest schedule of faults that still breaks a promise: delta debugging.

`ddmin` (Zeller and Hildebrandt, 2002) leaves out ever smaller parts of the schedule as long as
the same promise breaks. Every draw of a fault is a function of the fault itself, so leaving out
one changes nothing about the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from meshnode_simulations.record import Violation
from meshnode_simulations.scenario import Fault, Scenario
from meshnode_simulations.simulation import Simulation

T = TypeVar("T")
RUNS_MAX = 500
"""By then a schedule of 100 faults is as small as it gets, or near it."""


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What is left of a schedule, and what it breaks. `is_minimal`: nothing more can be left out,
    one by one; otherwise the runs were used up."""

    schedule: tuple[Fault, ...]
    violation: Violation
    runs: int
    is_minimal: bool


def shrink(
    scenario: Scenario,
    seed: int,
    schedule: tuple[Fault, ...],
    promise: str,
    on_run: Callable[[int, int], None] = lambda runs, faults: None,
) -> Shrunk | None:
    """The smallest part of `schedule` that breaks `promise`; None if the whole does not.

    `on_run` is told how many runs there have been, and how many faults are left.
    """
    broken: dict[tuple[Fault, ...], Violation] = {}
    runs = 0
    left = len(schedule)

    def breaks(part: Sequence[Fault]) -> bool:
        nonlocal runs, left
        runs += 1
        simulation = Simulation(scenario, seed=seed, check=True, schedule=tuple(part))
        found = simulation.run(until_broken=promise).violations
        violation = next((each for each in found if each.promise == promise), None)
        if violation is not None:
            broken[tuple(part)] = violation
            left = min(left, len(part))
        on_run(runs, left)
        return violation is not None

    if not breaks(schedule):
        return None
    smallest, is_minimal = ddmin(schedule, breaks, lambda: runs < RUNS_MAX)
    return Shrunk(tuple(smallest), broken[tuple(smallest)], runs, is_minimal)


def ddmin(
    items: Sequence[T], fails: Callable[[Sequence[T]], bool], may_go_on: Callable[[], bool]
) -> tuple[Sequence[T], bool]:
    """The smallest part found of `items`, which fails as a whole, that still fails; and whether
    it fails no more without any single one of its items."""
    if items and may_go_on() and fails(()):
        return (), True
    parts = 2
    while len(items) >= 2:
        size = -(-len(items) // parts)
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        smaller = None
        for place, chunk in enumerate(chunks):
            rest = [item for other, each in enumerate(chunks) if other != place for item in each]
            for candidate, again in ((list(chunk), 2), (rest, max(parts - 1, 2))):
                if not may_go_on():
                    return items, False
                if len(candidate) < len(items) and fails(tuple(candidate)):
                    smaller, parts = tuple(candidate), again
                    break
            if smaller is not None:
                break
        if smaller is not None:
            items = smaller
        elif parts >= len(items):
            return items, True
        else:
            parts = min(2 * parts, len(items))
    return items, True
