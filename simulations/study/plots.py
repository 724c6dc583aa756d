"""Figures for a paper: series over time, figures over a parameter, distributions.

The line is the median over seeds, the band reaches from 5 to 95 %. One look for all of them: the
palette of Okabe and Ito, which people of every colour vision can tell apart, and a dash and a
marker of its own for each line, for those who print in black and white. Files are a function of
what is shown: there is no date in them.

Works without a display. The figures are matplotlib's; nothing here touches its global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meshnode_simulations.record import Result
from meshnode_simulations.study.summary import HIGH, LOW, Variant, figure_of

Groups = Mapping[str, Sequence[Result]]
"""Label -> runs that differ by seed alone: one line and its band."""

SIZE_IN = (5.2, 3.2)
"""Width and height in inches: a column of most proceedings, with room for the labels."""
DPI = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES_MAX = len(COLOURS)
"""More lines in one plot than this cannot be told apart."""
POINTS_MAX = 400
"""Of one line: more than there are pixels across only makes the file larger."""
LOG_FROM = 10.0
"""An axis is logarithmic when its largest value is this many times its smallest."""
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.family": "DejaVu Sans",  # comes with matplotlib: equal files on every machine
    "font.size": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "svg.hashsalt": "meshnode",  # ids of SVG elements are random without
}
MOMENTS = ("time_s", "asked_s", "from_s", "to_s")
"""Columns of tables that say when, and not how long: no distributions."""
_UNITS = (
    ("_per_node_s", "per node and second"),
    ("_per_node_min", "per node and minute"),
    ("_per_min", "per minute"),
    ("_per_s", "per second"),
    ("_share", "share"),
    ("_tokens", "tokens"),
    ("_bytes", "bytes"),
    ("_gib", "GiB"),
    ("_mib", "MiB"),
    ("_ms", "ms"),
    ("_min", "min"),
    ("_s", "s"),
)


def plot(results: Result | Sequence[Result] | Groups, name: str) -> Any:
    """A matplotlib `Figure` of a series such as `messages_per_node_s`, or, for `table.column` such
    as `requests.ttft_s`, of its distribution.

    `results` is one run, several seeds of it, or lines by label. Raises `KeyError` with what there
    is if no run has it.
    """
    if isinstance(results, Result):
        results = (results,)
    groups = results if isinstance(results, Mapping) else {"": results}
    runs = [run for group in groups.values() for run in group]
    table, found, column = name.rpartition(".")
    if found and any(table in run.tables for run in runs):
        return distribution(groups, table, column)
    if not any(name in run.series for run in runs):
        there = {key: None for run in runs for key in run.series}
        raise KeyError(f"no series {name!r}: {', '.join(there)}; or TABLE.COLUMN")
    return over_time(groups, name)


def over_time(groups: Groups, name: str) -> Any:
    """A series, by virtual time."""

    def draw(axes: Any) -> None:
        for place, (label, runs) in enumerate(groups.items()):
            times, rows = _aligned(runs, name)
            if times.size:
                bands = np.nanquantile(rows, (LOW, 0.5, HIGH), axis=0)
                _line(axes, place, label, times, bands)
        axes.set_xlabel("virtual time (s)")
        axes.set_ylabel(named(name))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))

    return _figure(draw, legend=len(groups) > 1)


def over_parameter(variants: Sequence[Variant], key: str, figure: str) -> Any:
    """A figure, by a value of the scenario; what else differs makes a line each."""
    lines: dict[str, list[Variant]] = {}
    for variant in variants:
        rest = ", ".join(
            f"{name.rpartition('.')[2]}={value}"
            for name, value in variant.values.items()
            if name != key
        )
        lines.setdefault(rest, []).append(variant)
    values = list({str(v.values[key]): v.values[key] for v in variants}.values())
    is_number = all(map(_is_number, values))

    def draw(axes: Any) -> None:
        for place, (label, line) in enumerate(lines.items()):
            spreads = [figure_of(variant.runs, figure) for variant in line]
            bands = np.array([(each.low, each.median, each.high) for each in spreads]).T
            if is_number:
                at = np.array([float(variant.values[key]) for variant in line])
                _line(axes, place, label, at, bands, marker=MARKERS[place % LINES_MAX])
            else:
                shift = 0.15 * (place - (len(lines) - 1) / 2)
                at = np.array([values.index(v.values[key]) + shift for v in line])
                low, middle, high = bands
                axes.errorbar(
                    at,
                    middle,
                    yerr=(middle - low, high - middle),
                    fmt=MARKERS[place % LINES_MAX],
                    color=COLOURS[place % LINES_MAX],
                    label=label,
                    capsize=3,
                )
        if is_number:
            if _is_wide([float(value) for value in values]):
                axes.set_xscale("log")
        else:
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_xlabel(named(key.rpartition(".")[2]))
        axes.set_ylabel(named(figure))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))

    return _figure(draw, legend=len(lines) > 1)


def distribution(groups: Groups, table: str, column: str) -> Any:
    """Which share of a table's rows is at most so large. Rows without a value, such as requests
    that were never answered, count: the line then ends below 1."""

    def draw(axes: Any) -> None:
        shares = np.linspace(0.0, 1.0, POINTS_MAX)
        everything: list[float] = []
        for place, (label, runs) in enumerate(groups.items()):
            by_run = [_column(run, table, column) for run in runs]
            by_run = [values for values in by_run if values.size]
            if not by_run:
                continue
            pooled = _inverse(np.concatenate(by_run), shares)
            quantiles = np.array([_inverse(values, shares) for values in by_run])
            low, high = np.quantile(quantiles, (LOW, HIGH), axis=0, method="nearest")
            known = np.isfinite(pooled)
            everything += pooled[known].tolist()
            colour = COLOURS[place % LINES_MAX]
            axes.plot(pooled[known], shares[known], color=colour, label=label,
                      linestyle=DASHES[place % LINES_MAX])  # fmt: skip
            if len(by_run) > 1 and known.any():
                both = np.isfinite(low)
                right = np.minimum(high[both], pooled[known].max())
                axes.fill_betweenx(shares[both], low[both], right, color=colour, alpha=0.2,
                                   linewidth=0)  # fmt: skip
        if everything and _is_wide([np.quantile(everything, q) for q in (0.02, 0.98)]):
            axes.set_xscale("log")
        axes.set_ylim(0.0, 1.02)
        axes.set_xlabel(f"{named(column)}")
        axes.set_ylabel(f"share of {table}")

    return _figure(draw, legend=len(groups) > 1)


def distributions(runs: Iterable[Result]) -> list[tuple[str, str]]:
    """Tables and columns of durations, of which `distribution` can be drawn."""
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        for name, table in run.tables.items():
            for column, values in table.columns.items():
                durations = column.endswith("_s") and column not in MOMENTS
                if durations and any(value for value in values):
                    found[name, column] = None
    return list(found)


def moving_series(runs: Iterable[Result]) -> list[str]:
    """The series that are not the same number all the time."""
    found: dict[str, None] = {}
    for run in runs:
        for name, values in run.series.items():
            if name != "time_s" and len(set(values)) > 1:
                found[name] = None
    return list(found)


def named(name: str) -> str:
    """`ttft_p95_s` -> "ttft p95 (s)": the unit is the end of the name."""
    for end, unit in _UNITS:
        if name.endswith(end) and name != end:
            return f"{name.removesuffix(end).replace('_', ' ')} ({unit})"
    return name.replace("_", " ")


def rendered(figure: Any, kind: Literal["png", "svg"]) -> bytes:
    """A figure as the bytes of a file; equal for equal figures."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write PATH.png and PATH.svg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        path.with_name(f"{path.name}.{kind}").write_bytes(rendered(figure, kind))


def _figure(draw: Callable[[Any], None], *, legend: bool) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if legend:
            axes.legend()
        layout = figure.get_layout_engine()
        assert layout is not None  # it was asked for above
        layout.execute(figure)  # once, and not for every file
        figure.set_layout_engine("none")
    return figure


def _line(axes: Any, place: int, label: str, at: Any, bands: Any, marker: str = "") -> None:
    low, middle, high = bands
    colour, dash = COLOURS[place % LINES_MAX], DASHES[place % LINES_MAX]
    axes.plot(at, middle, color=colour, linestyle=dash, marker=marker, markersize=4, label=label)
    if np.any(high > low):
        axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)


def _aligned(runs: Sequence[Result], name: str) -> tuple[Any, Any]:
    """Times, and a row of values for each run; NaN where a run had ended. Neighbours are averaged
    until there are at most `POINTS_MAX`."""
    having = [run for run in runs if name in run.series]
    if not having:
        return np.empty(0), np.empty((0, 0))
    times = np.array(max((run.series["time_s"] for run in having), key=len))
    rows = np.full((len(having), times.size), np.nan)
    for row, run in zip(rows, having, strict=True):
        row[: len(run.series[name])] = run.series[name]
    step = math.ceil(times.size / POINTS_MAX)
    whole = times.size // step * step
    if step > 1:
        times = times[:whole].reshape(-1, step).mean(axis=1)
        rows = rows[:, :whole].reshape(len(having), -1, step).mean(axis=2)
    seen = ~np.isnan(rows).all(axis=0)
    return times[seen], rows[:, seen]


def _column(run: Result, table: str, column: str) -> Any:
    """Its values in order; infinite for rows that have none."""
    rows = run.tables.get(table)
    values = [] if rows is None else rows.columns.get(column, [])
    return np.sort([math.inf if value is None else float(value) for value in values])


def _inverse(values: Any, shares: Any) -> Any:
    """The smallest value that so large a share of them does not exceed."""
    ordered = np.sort(values)
    return ordered[np.maximum(np.ceil(shares * ordered.size).astype(int) - 1, 0)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0.0 and max(values) >= LOG_FROM * min(values)
