"""What people see of runs in a terminal: progress while they go on, tables when they are done.

Progress goes to stderr, tables to stdout; with `--json` there is one document and no progress.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from meshnode.cli.output import print_table, printable
from meshnode_simulations.record import Result
from meshnode_simulations.scenario import Fault, as_toml
from meshnode_simulations.simulation import Progress
from meshnode_simulations.study import results
from meshnode_simulations.study.summary import expectations, figure_names, figure_of, variants

VIOLATIONS_MAX = 10
"""Of one run, shown; the others are counted."""


@contextmanager
def progress_of_run(title: str, *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Virtual time, how fast it passes, and how long it will take."""
    with _bar(quiet) as bar:
        task = bar.add_task(title, total=None, speed="")

        def tell(progress: Progress) -> None:
            rate = progress.events / max(progress.cpu_s, 1e-9) / 1000
            bar.update(
                task,
                total=progress.duration_s,
                completed=progress.virtual_s,
                speed=f"{_speed(progress.virtual_s, progress.cpu_s)}, {rate:,.0f} k events/s",
            )

        yield tell


@contextmanager
def progress_of_runs(total: int, *, quiet: bool) -> Iterator[Callable[[Path, Result | None], None]]:
    """How many runs are done, how fast virtual time passes in all of them, what broke."""
    started_s = time.monotonic()
    virtual_s, there = 0.0, 0
    with _bar(quiet) as bar:
        task = bar.add_task(f"0 of {total} runs", total=total, speed="")

        def tell(folder: Path, result: Result | None) -> None:
            nonlocal virtual_s, there
            if result is None:
                there += 1
            else:
                virtual_s += result.virtual_s
                if result.violations:
                    bar.console.print(f"broken: {printable(result.replay)}", style="red",
                                      markup=False, highlight=False)  # fmt: skip
            bar.advance(task)
            done = int(bar.tasks[0].completed)
            before = f" ({there} were there)" if there else ""
            bar.update(
                task,
                description=f"{done} of {total} runs{before}",
                speed=_speed(virtual_s, time.monotonic() - started_s) if virtual_s else "",
            )

        yield tell


def _speed(virtual_s: float, real_s: float) -> str:
    return f"{virtual_s / max(real_s, 1e-9):,.1f} x real time"


@contextmanager
def _bar(quiet: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True, quiet=quiet)) as bar:
        yield bar


def told(result: Result) -> dict[str, Any]:
    """A result as `--json` has it."""
    return {
        "scenario": result.scenario.name,
        "config": results.config_hash(result.scenario),
        "seed": result.seed,
        "checked": result.checked,
        "digest": result.digest,
        "virtual_s": result.virtual_s,
        "cpu_s": result.cpu_s,
        "events": result.events,
        "figures": {n: v if math.isfinite(v) else None for n, v in result.figures.items()},
        "unmet": sorted(result.unmet()),
        "violations": msgspec.to_builtins(result.violations),
        "replay": result.replay,
    }


def show_runs(found: Sequence[Result]) -> None:
    """Every figure of one variant's runs, beside what was expected."""
    verdicts = {each.figure: f"{each.bounds}: {each.verdict}" for each in expectations(found)}
    rows = []
    for name in figure_names(found):
        each = figure_of(found, name)
        band = "" if each.low == each.high else f"{each.low:.4g} .. {each.high:.4g}"
        middle = "–" if math.isnan(each.median) else f"{each.median:.4g}"
        rows.append((name, middle, "" if middle == "–" else band, verdicts.get(name, "")))
    print_table(("figure", ">median", ">5 % .. 95 %", "expected"), rows)
    runs = f"{len(found)} seeds" if len(found) > 1 else f"seed {found[0].seed}"
    click.secho(f"{runs}; digest of seed {found[0].seed}: {found[0].digest}", dim=True, err=True)
    show_violations(found)


def show_sweep(found: Sequence[Result]) -> None:
    """A row for each variant: the median of every figure the scenario expects something of."""
    groups = variants(found)
    names = list(found[0].scenario.scenario.expect) or figure_names(found)[:6]
    keys = list(groups[0].values)
    rows = [
        (
            *(str(variant.values[key]) for key in keys),
            str(len(variant.runs)),
            *(str(figure_of(variant.runs, name)) for name in names),
        )
        for variant in groups
    ]
    print_table((*keys, ">runs", *(f">{name}" for name in names)), rows)
    show_violations(found)


def show_violations(found: Sequence[Result]) -> None:
    """What broke, and the line that runs it again."""
    for result in found:
        for broken in result.violations[:VIOLATIONS_MAX]:
            line = f"{broken.promise} broken at {broken.time_s:.3f} s: {broken.what}"
            click.secho(printable(line), fg="red")
        if len(result.violations) > VIOLATIONS_MAX:
            click.secho(f"  and {len(result.violations) - VIOLATIONS_MAX} more", fg="red")
        if result.violations:
            click.secho(f"  again: {printable(result.replay)}", fg="red")


def fault_as_toml(fault: Fault) -> str:
    """As it stands in a scenario's file."""
    lines = ["[[faults]]"]
    for name, value in msgspec.structs.asdict(fault).items():
        if value not in ("", 0.0) or name == "at_s":
            lines.append(f"{name} = {as_toml(value)}")
    return "\n".join(lines) + "\n"
