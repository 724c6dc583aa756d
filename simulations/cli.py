"""`meshnode-sim`: run scenarios, sweep, replay, shrink, report."""

from __future__ import annotations

import math
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from meshnode.cli.edge import EdgeGroup, json_option
from meshnode.cli.output import print_json, print_table
from meshnode.errors import ConfigError
from meshnode_simulations.record import Result, quantile
from meshnode_simulations.scenario import Fault, Scenario, load, shipped
from meshnode_simulations.simulation import Progress, Simulation
from meshnode_simulations.study import results
from meshnode_simulations.study.shrink import shrink as shrink_schedule
from meshnode_simulations.study.sweep import plan, pool_on
from meshnode_simulations.study.sweep import sweep as run_sweep

OUT_DEFAULT = "simulation-results"
EXIT_BROKEN = 1
"""A promise was broken."""

out_option = click.option(
    "--out",
    metavar="DIR",
    default=OUT_DEFAULT,
    show_default=True,
    help="Where results are kept, a folder for each run.",
)
set_option = click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a value of the scenario, such as network.loss=0.01; repeatable.",
)
nodes_option = click.option(
    "--nodes", metavar="N", type=click.IntRange(min=1), help="Short for --set mesh.nodes=N."
)
on_option = click.option(
    "--on",
    "where",
    metavar="WHERE",
    default="processes",
    show_default=True,
    help="Where the runs go: processes of this machine, or dask://HOST:PORT.",
)
jobs_option = click.option(
    "--jobs", metavar="N", type=click.IntRange(min=1), help="Processes at once. [default: cores]"
)
check_option = click.option(
    "--check", is_flag=True, help="Check S1 to S10 after every event; about a quarter slower."
)


@click.group(cls=EdgeGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run meshnode's own cores in virtual time: thousands of nodes, one seed, one machine.

    A scenario is a small TOML file with a question, a hypothesis and the figures it expects.
    Equal seeds give equal runs, to the last message.

    \b
    Examples:
      meshnode-sim list
      meshnode-sim run cold-join --nodes 200
      meshnode-sim run chaos --seed 1..20 --check
      meshnode-sim sweep routing --over routing.policy=ours,round-robin,hrw --seed 1..10
      meshnode-sim report simulation-results
    """


@main.command("list")
@json_option
def list_(as_json: bool) -> None:
    """The scenarios that come along, and what each asks."""
    found = [load(name) for name in shipped()]
    if as_json:
        print_json([{"name": each.name, **msgspec.to_builtins(each.scenario)} for each in found])
        return
    for each in found:
        click.secho(each.name, bold=True)
        click.echo(f"  {each.scenario.question or each.scenario.title}")


@main.command()
@click.argument("scenario")
@click.option("--seed", "seeds", metavar="N|A..B", help="Which seeds. [default: those it names]")
@nodes_option
@set_option
@check_option
@out_option
@on_option
@jobs_option
@json_option
def run(
    scenario: str,
    seeds: str | None,
    nodes: int | None,
    changes: tuple[str, ...],
    check: bool,
    out: str,
    where: str,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Run a scenario: a shipped one by name, or a .toml file.

    Prints its figures over all seeds beside what it expects of them. Ends with 1 if a promise
    was broken, and says with which seed.
    """
    wanted = load(scenario, _changes(changes, nodes))
    numbers = _seeds(seeds, wanted)
    if len(numbers) == 1 and where == "processes":
        with _bar(f"{wanted.name} seed {numbers[0]}", as_json) as tell:
            result = Simulation(wanted, seed=numbers[0], check=check).run(tell)
        results.write(result, Path(out))
        found = [result]
    else:
        found = _run_all(plan(wanted, numbers, check=check), out, where, jobs, as_json)
    _show(found, as_json)
    if any(result.violations for result in found):
        sys.exit(EXIT_BROKEN)


@main.command()
@click.argument("scenario")
@click.option(
    "--over",
    metavar="KEY=A,B,C",
    multiple=True,
    required=True,
    help="A value of the scenario and what it takes on; repeatable, for all combinations.",
)
@click.option("--seed", "seeds", metavar="N|A..B", help="Which seeds. [default: those it names]")
@set_option
@check_option
@out_option
@on_option
@jobs_option
@json_option
def sweep(
    scenario: str,
    over: tuple[str, ...],
    seeds: str | None,
    changes: tuple[str, ...],
    check: bool,
    out: str,
    where: str,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Run a scenario for every combination of some values.

    Runs that are in --out already are not run again, so an interrupted sweep goes on.
    """
    wanted = load(scenario, _changes(changes, None))
    values = {key: [_value(each) for each in text.split(",")] for key, text in map(_pair, over)}
    planned = plan(wanted, _seeds(seeds, wanted), values, check=check)
    found = _run_all(planned, out, where, jobs, as_json)
    if as_json:
        print_json([_told(result) for result in found])
    else:
        _show_sweep(found, tuple(values))
    if any(result.violations for result in found):
        sys.exit(EXIT_BROKEN)


@main.command()
@click.argument("scenario")
@click.option("--seed", metavar="N", type=int, help="Which seed. [default: that of the folder]")
@set_option
@json_option
def replay(scenario: str, seed: int | None, changes: tuple[str, ...], as_json: bool) -> None:
    """Run once more what went wrong, with every promise checked.

    SCENARIO may be the folder of a result: then it must come out the same, to the last message.
    """
    before: Result | None = None
    if Path(scenario, "manifest.json").is_file():
        before = results.read(Path(scenario))
        wanted, seed = before.scenario, before.seed if seed is None else seed
        if before.seed != seed:
            before = None
    else:
        wanted = load(scenario, _changes(changes, None))
    seed = 1 if seed is None else seed
    with _bar(f"{wanted.name} seed {seed}", as_json) as tell:
        result = Simulation(wanted, seed=seed, check=True).run(tell)
    _show([result], as_json)
    if before is not None and before.digest != result.digest:
        raise ConfigError(
            f"digest {result.digest}, but {before.digest} before: another version, or something "
            "depends on what it must not"
        )
    if result.violations:
        sys.exit(EXIT_BROKEN)


@main.command()
@click.argument("scenario")
@click.option("--seed", metavar="N", type=int, required=True, help="A seed that breaks a promise.")
@click.option("--promise", metavar="S1", help="Which. [default: the first that breaks]")
@set_option
@json_option
def shrink(
    scenario: str, seed: int, promise: str | None, changes: tuple[str, ...], as_json: bool
) -> None:
    """The fewest faults that still break a promise, as TOML to put into a scenario."""
    wanted = load(scenario, _changes(changes, None))
    whole = Simulation(wanted, seed=seed, check=True)
    if promise is None:
        broken = whole.run().violations
        if not broken:
            raise ConfigError(f"seed {seed} breaks no promise: there is nothing to shrink")
        promise = broken[0].promise
    schedule = whole.faults()

    def tell(runs: int, left: int) -> None:
        if not as_json:
            click.echo(f"\r{runs} runs: {left} of {len(schedule)} faults left ", err=True, nl=False)

    found = shrink_schedule(wanted, seed, schedule, promise, tell)
    if not as_json:
        click.echo(err=True)
    if found is None:
        raise ConfigError(f"seed {seed} does not break {promise}")
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    click.echo(f"# {found.violation.promise} at {found.violation.time_s:.3f} s: "
               f"{found.violation.what}")  # fmt: skip
    for fault in found.schedule:
        click.echo(_as_toml(fault))


# --- arguments -----------------------------------------------------------------------------------


def _pair(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found or not key:
        raise ConfigError(f"{text!r} is not of the form KEY=VALUE")
    return key.strip(), value.strip()


def _value(text: str) -> Any:
    """As TOML reads it; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _changes(pairs: Sequence[str], nodes: int | None) -> dict[str, Any]:
    changes = {key: _value(text) for key, text in map(_pair, pairs)}
    if nodes is not None:
        changes["mesh.nodes"] = nodes
    return changes


def _seeds(text: str | None, scenario: Scenario) -> list[int]:
    if text is None:
        return list(range(1, scenario.scenario.seeds + 1))
    first, found, last = text.partition("..")
    try:
        numbers = list(range(int(first), int(last if found else first) + 1))
    except ValueError:
        raise ConfigError(f"seeds are 7 or 1..20, not {text!r}") from None
    if not numbers:
        raise ConfigError(f"there is no seed in {text}")
    return numbers


# --- what people see -----------------------------------------------------------------------------


def _run_all(
    planned: Sequence[Any], out: str, where: str, jobs: int | None, as_json: bool
) -> list[Result]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True, quiet=as_json)
    with Bar(*columns, console=console) as bar, pool_on(where, jobs) as pool:
        task = bar.add_task("runs", total=len(planned))

        def tell(folder: Path, result: Result | None) -> None:
            bar.advance(task)
            if result is not None and result.violations:
                bar.console.print(f"[red]broken:[/] {result.replay}")

        folders = run_sweep(planned, Path(out), pool, tell)
    return [results.read(folder) for folder in folders]


@contextmanager
def _bar(title: str, as_json: bool) -> Iterator[Any]:
    """Progress of one run: virtual time, how fast it passes, how long it will take."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"),
               TimeRemainingColumn())  # fmt: skip
    with Bar(*columns, console=Console(stderr=True, quiet=as_json)) as bar:
        task = bar.add_task(title, total=None, speed="")

        def tell(progress: Progress) -> None:
            speed = progress.virtual_s / max(progress.cpu_s, 1e-9)
            rate = progress.events / max(progress.cpu_s, 1e-9) / 1000
            bar.update(
                task,
                total=progress.duration_s,
                completed=progress.virtual_s,
                speed=f"{speed:,.1f} x real time, {rate:,.0f} k events/s",
            )

        yield tell


def _told(result: Result) -> dict[str, Any]:
    return {
        "scenario": result.scenario.name,
        "config": results.config_hash(result.scenario),
        "seed": result.seed,
        "digest": result.digest,
        "virtual_s": result.virtual_s,
        "cpu_s": result.cpu_s,
        "events": result.events,
        "figures": {n: v if math.isfinite(v) else None for n, v in result.figures.items()},
        "violations": msgspec.to_builtins(result.violations),
        "replay": result.replay,
    }


def _show(found: Sequence[Result], as_json: bool) -> None:
    if as_json:
        print_json([_told(result) for result in found])
        return
    expected = found[0].scenario.scenario.expect
    rows = []
    for name in sorted({name for result in found for name in result.figures} | set(expected)):
        values = [result.figures.get(name, math.nan) for result in found]
        low, middle, high = _spread(values)
        bounds = expected.get(name)
        verdict = "" if bounds is None else f"{bounds[0]:g} .. {bounds[1]:g}"
        if bounds is not None:
            met = sum(bounds[0] <= value <= bounds[1] for value in values)
            verdict += ": yes" if met == len(values) else f": in {met} of {len(values)} runs"
        rows.append((name, f"{middle:.4g}", f"{low:.4g} .. {high:.4g}", verdict))
    print_table(("figure", ">median", ">5 % .. 95 %", "expected"), rows)
    runs = f"{len(found)} seeds" if len(found) > 1 else f"seed {found[0].seed}"
    click.secho(f"{runs}, digest {found[0].digest}", dim=True, err=True)
    for result in found:
        for broken in result.violations[:10]:
            click.secho(
                f"{broken.promise} broken at {broken.time_s:.3f} s: {broken.what}", fg="red"
            )
        if result.violations:
            click.secho(f"  again: {result.replay}", fg="red")


def _show_sweep(found: Sequence[Result], keys: tuple[str, ...]) -> None:
    """A row for each combination: the median of every figure the scenario expects something of."""
    groups: dict[str, list[Result]] = {}
    for result in found:
        groups.setdefault(results.config_hash(result.scenario), []).append(result)
    names = tuple(found[0].scenario.scenario.expect) or tuple(sorted(found[0].figures))[:6]
    rows = []
    for group in groups.values():
        tables = msgspec.to_builtins(group[0].scenario)
        chosen = tuple(str(_look_up(tables, key)) for key in keys)
        medians = (f"{_spread([r.figures.get(n, math.nan) for r in group])[1]:.4g}" for n in names)
        rows.append((*chosen, str(len(group)), *medians))
    print_table((*keys, ">runs", *(f">{name}" for name in names)), rows)


def _look_up(tables: Any, key: str) -> Any:
    for part in key.split("."):
        tables = tables[int(part)] if isinstance(tables, list | tuple) else tables[part]
    return tables


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    known = [value for value in values if math.isfinite(value)]
    return quantile(known, 0.05), quantile(known, 0.5), quantile(known, 0.95)


def _as_toml(fault: Fault) -> str:
    lines = ["[[faults]]"]
    for name, value in msgspec.structs.asdict(fault).items():
        shown = f'"{value}"' if isinstance(value, str) else f"{value!r}"
        if value not in ("", 0.0):
            lines.append(f"{name} = {shown}")
    return "\n".join(lines) + "\n"
