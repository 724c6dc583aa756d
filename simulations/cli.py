"""`meshnode-sim`: run scenarios, sweep, replay, shrink, report.

| how it ends                                              | exit code |
|----------------------------------------------------------|-----------|
| done                                                     | 0         |
| a promise was broken, or a run could not be done         | 1         |
| it was asked wrongly (usage, a scenario's field)         | 2         |
| Ctrl-C; runs that were done by then are kept             | 130       |
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from meshnode.cli.edge import EXIT_FAILED, EdgeGroup, json_option
from meshnode.cli.output import print_json, printable
from meshnode.errors import ConfigError
from meshnode_simulations.kernel.narrator import Narrator
from meshnode_simulations.record import Result
from meshnode_simulations.run import Run
from meshnode_simulations.scenario import Scenario, changed, load, shipped, toml_of, value_of
from meshnode_simulations.simulation import Progress, Simulation
from meshnode_simulations.study import results, screen
from meshnode_simulations.study.shrink import shrink as shrink_schedule
from meshnode_simulations.study.sweep import Job, RunFailedError, plan, pool_on
from meshnode_simulations.study.sweep import sweep as run_sweep
from meshnode_simulations.tiers.command import tiers

OUT_DEFAULT = "simulation-results"
SEEDS_MAX = 100_000
"""More in one command are a slip of the finger."""

out_option = click.option(
    "--out",
    metavar="DIR",
    default=OUT_DEFAULT,
    show_default=True,
    help="Where results are kept, a folder for each run.",
)
seeds_option = click.option(
    "--seed", "seeds", metavar="N|A..B", help="Which seeds. [default: those it names]"
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
report_option = click.option(
    "--report/--no-report", "wants_report", default=True, help="Write report.html and its plots."
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
      meshnode-sim sweep owner-death --over network.loss=0,0.01,0.05 --seed 1..10
      meshnode-sim replay chaos --seed 7 --narrate
      meshnode-sim shrink chaos --seed 7
      meshnode-sim report simulation-results/owner-death-8228938d

    \b
    Ends with 0 if all is well, with 1 if a promise was broken, 2 if it was asked wrongly,
    and 130 after Ctrl-C; what was done by then is kept, and not done again.
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
@seeds_option
@nodes_option
@set_option
@check_option
@out_option
@on_option
@jobs_option
@report_option
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
    wants_report: bool,
    as_json: bool,
) -> None:
    """Run a scenario: a shipped one by name, or a .toml file.

    Prints its figures over all seeds beside what it expects of them, and keeps everything under
    --out: series and tables as Parquet, plots, one HTML report. Ends with 1 if a promise was
    broken, and prints the line that runs it again.

    \b
    Examples:
      meshnode-sim run owner-death
      meshnode-sim run owner-death --seed 7 --set network.loss=0.01 --check
      meshnode-sim run my-idea.toml --seed 1..100 --on dask://10.0.0.1:8786
    """
    wanted = load(scenario, _changes(changes, nodes))
    numbers = _seeds(seeds, wanted)
    if len(numbers) == 1 and where == "processes":
        with screen.progress_of_run(f"{wanted.name} seed {numbers[0]}", quiet=as_json) as tell:
            result = Simulation(wanted, seed=numbers[0], check=check).run(tell)
        results.write(result, Path(out))
        found = [result]
    else:
        found = _run_all(plan(wanted, numbers, check=check), out, where, jobs, quiet=as_json)
    folder = results.place(Path(out), wanted, 0).parent
    _tell(found, folder, wants_report=wants_report, as_json=as_json)


@main.command()
@click.argument("scenario")
@click.option(
    "--over",
    metavar="KEY=A,B,C",
    multiple=True,
    required=True,
    help="A value of the scenario and what it takes on; repeatable, for all combinations.",
)
@seeds_option
@set_option
@check_option
@out_option
@on_option
@jobs_option
@report_option
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
    wants_report: bool,
    as_json: bool,
) -> None:
    """Run a scenario for every combination of some values.

    Runs that are in --out already, made by the same code, are not run again: an interrupted sweep
    goes on. The report and figures.parquet (a row for each run) are in a folder NAME-sweep-...

    \b
    Examples:
      meshnode-sim sweep cold-join --over mesh.nodes=10,100,1000 --seed 1..5
      meshnode-sim sweep owner-death --over network.loss=0,0.01 --over models.0.files=2,4
    """
    wanted = load(scenario, _changes(changes, None))
    values = {key: _values(text) for key, text in map(_pair, over)}
    planned = plan(wanted, _seeds(seeds, wanted), values, check=check)
    found = _run_all(planned, out, where, jobs, quiet=as_json)
    folder = results.write_sweep(found, Path(out))
    _tell(found, folder, wants_report=wants_report, as_json=as_json)


@main.command()
@click.argument("scenario")
@click.option("--seed", metavar="N", type=int, help="Which seed. [default: the folder's, or 1]")
@set_option
@click.option("--narrate", is_flag=True, help="Print everything that happens, a line for each.")
@json_option
def replay(
    scenario: str, seed: int | None, changes: tuple[str, ...], narrate: bool, as_json: bool
) -> None:
    """Run once more what went wrong, with every promise checked.

    SCENARIO is a name, a .toml file, or the folder of a result: that must come out the same, to
    the last message, or this ends with 1. Nothing is written.

    \b
    Examples:
      meshnode-sim replay chaos --seed 7 --set network.loss=0.02
      meshnode-sim replay simulation-results/chaos-1c2d3e4f/seed-0007 --narrate | less
    """
    if narrate and as_json:
        raise click.UsageError("--narrate and --json cannot both have stdout")
    before: Result | None = None
    if Path(scenario, "manifest.json").is_file():
        before = results.read(Path(scenario))
        wanted = changed(before.scenario, _changes(changes, None))
        seed = before.seed if seed is None else seed
        if seed != before.seed or changes:
            before = None
    else:
        wanted = load(scenario, _changes(changes, None))
        seed = 1 if seed is None else seed
    simulation = Simulation(wanted, seed=seed, check=True)
    if narrate:
        result = _narrated(simulation)
    else:
        with screen.progress_of_run(f"{wanted.name} seed {seed}", quiet=as_json) as tell:
            result = simulation.run(tell)
    if as_json:
        print_json(screen.told(result))
    else:
        screen.show_runs([result])
    if before is not None and before.digest != result.digest:
        raise RunFailedError(
            f"digest {result.digest}, but {before.digest} before: other code, or something "
            "depends on what it must not"
        )
    if result.violations:
        sys.exit(EXIT_FAILED)


@main.command()
@click.argument("scenario")
@click.option("--seed", metavar="N", type=int, required=True, help="A seed that breaks a promise.")
@click.option("--promise", metavar="S1", help="Which. [default: the first that breaks]")
@set_option
@click.option("--out", metavar="FILE", help="Write the scenario with these faults there.")
@json_option
def shrink(
    scenario: str,
    seed: int,
    promise: str | None,
    changes: tuple[str, ...],
    out: str | None,
    as_json: bool,
) -> None:
    """The fewest faults that still break a promise, as TOML to put into a scenario.

    Leaves out more and more of the faults as long as the same promise breaks (delta debugging).
    With --out the whole scenario is written, and `replay FILE --seed N` breaks it again.
    """
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
    if out is not None:
        quiet = msgspec.structs.replace(wanted.chaos, kinds=(), per_min=0.0)
        smallest = msgspec.structs.replace(wanted, faults=found.schedule, chaos=quiet)
        Path(out).write_text(toml_of(smallest))
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    violation = found.violation
    click.echo(f"# {violation.promise} at {violation.time_s:.3f} s: {printable(violation.what)}")
    if not found.is_minimal:
        click.echo(f"# not the smallest: given up after {found.runs} runs")
    for fault in found.schedule:
        click.echo(screen.fault_as_toml(fault))


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--out", metavar="FILE", help="The report. [default: report.html in DIR]")
@json_option
def report(folder: str, out: str | None, as_json: bool) -> None:
    """One HTML file of all runs below DIR: question, expected and found, plots, replay lines.

    It needs nothing else, no network and no script. In DIR it puts figures.parquet too, with a row
    for each run, and the plots as PNG and SVG. DIR may be a run's folder, a scenario's, a sweep's.
    """
    from meshnode_simulations.study import report as reports

    found = [results.read(each) for each in results.folders(Path(folder))]
    file = reports.write(Path(folder), found, None if out is None else Path(out))
    if as_json:
        print_json({"report": str(file), "runs": len(found)})
    else:
        click.echo(f"{len(found)} runs: {file}")


# --- what is done --------------------------------------------------------------------------------


def _run_all(
    planned: Sequence[Job], out: str, where: str, jobs: int | None, *, quiet: bool
) -> list[Result]:
    with screen.progress_of_runs(len(planned), quiet=quiet) as tell, pool_on(where, jobs) as pool:
        folders = run_sweep(planned, Path(out), pool, tell)
    return [results.read(folder) for folder in folders]


def _tell(found: Sequence[Result], folder: Path, *, wants_report: bool, as_json: bool) -> None:
    """Print what came out, write the report, and end with 1 if something broke."""
    configs = {results.config_hash(result.scenario) for result in found}
    if not as_json:
        (screen.show_runs if len(configs) == 1 else screen.show_sweep)(found)
    file: Path | None = None
    if wants_report:
        from meshnode_simulations.study import report as reports

        file = reports.write(folder, found)
    if as_json:
        shown = None if file is None else str(file)
        print_json({"runs": [screen.told(result) for result in found], "report": shown})
    elif file is not None:
        click.secho(f"report: {file}", dim=True, err=True)
    if any(result.violations for result in found):
        sys.exit(EXIT_FAILED)


def _narrated(simulation: Simulation) -> Result:
    told: list[Narrator] = []

    def listen(run: Run) -> None:
        told.append(Narrator(run.world))

    def tell(progress: Progress) -> None:
        lines = told[0].lines
        for line in lines:
            click.echo(printable(line))
        lines.clear()

    return simulation.run(tell, on_ready=listen)


main.add_command(tiers)


# --- arguments -----------------------------------------------------------------------------------


def _pair(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found or not key:
        raise ConfigError(f"{text!r} is not of the form KEY=VALUE")
    return key.strip(), value.strip()


def _values(text: str) -> list[Any]:
    """`1,2` and `ours,hrw`; lists and tables as TOML has them: `[[1, 2], [3]]`."""
    whole = value_of(text)
    return (
        whole if isinstance(whole, list) else [value_of(each.strip()) for each in text.split(",")]
    )


def _changes(pairs: Sequence[str], nodes: int | None) -> dict[str, Any]:
    changes = {key: value_of(text) for key, text in map(_pair, pairs)}
    if nodes is not None:
        changes["mesh.nodes"] = nodes
    return changes


def _seeds(text: str | None, scenario: Scenario) -> list[int]:
    if text is None:
        return list(range(1, scenario.scenario.seeds + 1))
    first, found, last = text.partition("..")
    try:
        low, high = int(first), int(last if found else first)
    except ValueError:
        raise ConfigError(f"seeds are 7 or 1..20, not {text!r}") from None
    if not 0 <= low <= high < low + SEEDS_MAX:
        raise ConfigError(f"seeds are 7 or 1..20, up to {SEEDS_MAX} of them, not {text!r}")
    return list(range(low, high + 1))
