"""What several runs say together: variants, medians and spreads, expected against found.

A *variant* is a scenario with one set of values; its runs differ by seed. What tells variants
apart is worked out from their scenarios, so that a folder of results needs no index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from meshnode_simulations.record import Result, quantile
from meshnode_simulations.scenario import Scenario
from meshnode_simulations.study import results

LOW, HIGH = 0.05, 0.95
"""The band over seeds that tables and plots show beside the median."""


@dataclass(frozen=True, slots=True)
class Variant:
    """Runs of one configuration, by seed. `values` are those that others do not share, by dotted
    name; `label` says them, and is empty for an only variant."""

    label: str
    values: dict[str, Any]
    runs: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a figure over seeds; NaN if no run has it."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.median):
            return "–"
        if self.low == self.high:
            return f"{self.median:.4g}"
        return f"{self.median:.4g} ({self.low:.4g} .. {self.high:.4g})"


@dataclass(frozen=True, slots=True)
class Expectation:
    """A figure that the scenario says something of, and in how many runs it came true."""

    figure: str
    lowest: float
    highest: float
    found: Spread
    met: int
    runs: int

    @property
    def is_met(self) -> bool:
        """In every run."""
        return self.met == self.runs

    @property
    def bounds(self) -> str:
        return f"{self.lowest:g} .. {self.highest:g}"

    @property
    def verdict(self) -> str:
        return "met" if self.is_met else f"unmet: met in {self.met} of {self.runs} runs"


def spread(values: Iterable[float]) -> Spread:
    """Of those that are numbers."""
    known = [value for value in values if math.isfinite(value)]
    return Spread(*(quantile(known, share) for share in (LOW, 0.5, HIGH)))


def figure_of(runs: Sequence[Result], name: str) -> Spread:
    return spread(run.figures.get(name, math.nan) for run in runs)


def figure_names(runs: Iterable[Result]) -> list[str]:
    """Of all figures that any run has, or should have."""
    return sorted({name for run in runs for name in (*run.figures, *run.scenario.scenario.expect)})


def expectations(runs: Sequence[Result]) -> list[Expectation]:
    """Of the runs of one variant."""
    expected = runs[0].scenario.scenario.expect if runs else {}
    return [
        Expectation(name, *bounds, figure_of(runs, name),
                    sum(name not in run.unmet() for run in runs), len(runs))
        for name, bounds in expected.items()
    ]  # fmt: skip


def varied(scenarios: Sequence[Scenario]) -> tuple[str, ...]:
    """The dotted names of the values that are not equal in all of them."""
    flat = [_flat(scenario) for scenario in scenarios]
    keys = {key: None for each in flat for key in each}
    return tuple(key for key in keys if any(each.get(key) != flat[0].get(key) for each in flat))


def variants(runs: Iterable[Result]) -> list[Variant]:
    """Runs by configuration, in order of their values; the runs of each by seed."""
    groups: dict[str, list[Result]] = {}
    for run in runs:
        groups.setdefault(results.config_hash(run.scenario), []).append(run)
    scenarios = [group[0].scenario for group in groups.values()]
    keys = varied(scenarios)
    found = []
    for scenario, group in zip(scenarios, groups.values(), strict=True):
        flat = _flat(scenario)
        values = {key: flat.get(key) for key in keys}
        ordered = tuple(sorted(group, key=lambda run: run.seed))
        found.append(Variant(_label(values), values, ordered))
    return sorted(found, key=lambda variant: [_order(each) for each in variant.values.values()])


def write_table(runs: Sequence[Result], path: Path) -> None:
    """One row for each run: what was changed, seed, digest, cost, violations, every figure."""
    import pyarrow
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for variant in variants(runs):
        for run in variant.runs:
            rows.append(
                {
                    "scenario": run.scenario.name,
                    "config": results.config_hash(run.scenario),
                    **variant.values,
                    "seed": run.seed,
                    "digest": run.digest,
                    "virtual_s": run.virtual_s,
                    "cpu_s": run.cpu_s,
                    "events": run.events,
                    "violations": len(run.violations),
                    **{name: run.figures.get(name, math.nan) for name in figure_names(runs)},
                }
            )
    columns = {name: _alike([row[name] for row in rows]) for name in rows[0]}
    pq.write_table(pyarrow.table(columns), path)


def _alike(column: list[Any]) -> list[Any]:
    """Arrow wants one type in a column: numbers, or else words."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in column)
    if numbers or (len({type(value) for value in column}) == 1 and not isinstance(column[0], list)):
        return column
    return [None if value is None else str(value) for value in column]


def _flat(scenario: Scenario) -> dict[str, Any]:
    """Dotted name -> value, of everything but where it is from."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                walk(f"{prefix}.{key}" if prefix else key, each)
        elif isinstance(value, list | tuple) and any(isinstance(each, dict) for each in value):
            for place, each in enumerate(value):
                walk(f"{prefix}.{place}", each)
        else:
            found[prefix] = value

    told = msgspec.to_builtins(scenario)
    del told["origin"], told["name"]
    walk("", told)
    return found


def _label(values: dict[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, before words."""
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, str(value))
