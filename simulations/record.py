"""What a run leaves behind: counts and gauges by interval, tables of events, figures.

* a *series* has one number for each interval: what was counted in it, or a gauge at its end
* a *table* has one row for each event of a kind, such as a request or a death
* a *figure* is one number that a paper would quote: `ttft_p95_s`
"""

from __future__ import annotations

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshnode_simulations.scenario import Scenario, as_toml, value_of

if TYPE_CHECKING:
    import pyarrow

Value = float | int | str | bool | None
ROWS_MAX = 2_000_000
"""Of one table: some 200 MB. Later rows are counted, and dropped."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken: which (`S1` .. `L4`), when, and how."""

    promise: str
    time_s: float
    what: str


@dataclass(slots=True)
class Table:
    """Rows by column; every row has all columns."""

    columns: dict[str, list[Value]] = field(default_factory=dict)
    dropped: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def add(self, row: dict[str, Value]) -> None:
        if not self.columns:
            self.columns = {name: [] for name in row}
        if len(self) >= ROWS_MAX:
            self.dropped += 1
            return
        for name, column in self.columns.items():
            column.append(row[name])


@dataclass(frozen=True, slots=True)
class Result:
    """One run. `series` has a column `time_s` (each interval's end) and one for each metric.

    `checked`: every promise was checked after every event, so that no violations means something.
    """

    scenario: Scenario
    seed: int
    checked: bool
    digest: str
    virtual_s: float
    cpu_s: float
    events: int
    series: dict[str, list[float]]
    tables: dict[str, Table]
    figures: dict[str, float]
    violations: tuple[Violation, ...]
    made: dict[str, object] = field(default_factory=dict)
    """Python, platform, versions and code that made it, if it was read from a folder; empty:
    those of here and now."""

    @property
    def replay(self) -> str:
        """The command that runs it again; in Python, of a scenario that was made there."""
        origin = self.scenario.origin
        if not origin.source:
            return f"Simulation(scenario, seed={self.seed}, check=True).run()"
        words = ["meshnode-sim", "replay", origin.source, "--seed", str(self.seed)]
        for key, value in origin.changes.items():
            # A bare word reads better than a string in quotes, where it means the same.
            bare = isinstance(value, str) and value_of(value) == value
            words += ["--set", f"{key}={value if bare else as_toml(value)}"]
        return shlex.join(words)

    def frame(self, name: str = "series") -> pyarrow.Table:
        """A table as Arrow has it: `series`, or one of `tables` such as `requests`.

        `.to_pandas()` makes it a pandas one. Raises `KeyError` with the names there are.
        """
        import pyarrow

        if name == "series":
            return pyarrow.table(dict(self.series))
        if name not in self.tables:
            raise KeyError(f"no {name!r} here: {', '.join(('series', *self.tables))}")
        return pyarrow.table(dict(self.tables[name].columns))

    def unmet(self) -> dict[str, tuple[float, tuple[float, float]]]:
        """Figures outside of what the scenario expects: name -> (found, (lowest, highest))."""
        found = {
            name: (self.figures.get(name, math.nan), bounds)
            for name, bounds in self.scenario.scenario.expect.items()
        }
        return {
            name: (value, bounds)
            for name, (value, bounds) in found.items()
            if not bounds[0] <= value <= bounds[1]
        }


class Recorder:
    """Collects while a run goes on. Whoever drives it calls `close_interval` at each end."""

    def __init__(self) -> None:
        self.tables: defaultdict[str, Table] = defaultdict(Table)
        self.violations: list[Violation] = []
        self._counts: Counter[str] = Counter()
        self._gauges: dict[str, Callable[[], float]] = {}
        self._intervals: list[tuple[float, dict[str, float]]] = []

    def count(self, name: str, value: float = 1.0) -> None:
        self._counts[name] += value  # type: ignore[assignment]

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """From now on, `read` at the end of each interval."""
        self._gauges[name] = read

    def row(self, table: str, **columns: Value) -> None:
        self.tables[table].add(columns)

    def violate(self, promise: str, time_s: float, what: str) -> None:
        self.violations.append(Violation(promise, time_s, what))

    def close_interval(self, time_s: float) -> None:
        values: dict[str, float] = dict(self._counts)
        values |= {name: read() for name, read in self._gauges.items()}
        self._intervals.append((time_s, values))
        self._counts.clear()

    def series(self) -> dict[str, list[float]]:
        names = sorted({name for _, values in self._intervals for name in values})
        return {
            "time_s": [time_s for time_s, _ in self._intervals],
            **{name: [values.get(name, 0.0) for _, values in self._intervals] for name in names},
        }


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which `share` of them lie, interpolated; NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
