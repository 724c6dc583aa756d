"""`meshnode-sim tiers`: a scenario on several tiers, side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from meshnode.cli.edge import json_option
from meshnode.cli.output import print_json
from meshnode.errors import ConfigError
from meshnode_simulations.scenario import load
from meshnode_simulations.study import report
from meshnode_simulations.tiers.compare import TIERS, Comparison, compare


@click.command()
@click.argument("scenario")
@click.option("--nodes", metavar="N", type=click.IntRange(min=2), help="Another size.")
@click.option("--seed", metavar="N", type=int, default=1, show_default=True, help="The first seed.")
@click.option(
    "--seeds",
    metavar="COUNT",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many seeds t1 and t2 run; figures are medians.",
)
@click.option(
    "--tiers",
    "wanted",
    metavar="LIST",
    default=",".join(TIERS),
    show_default=True,
    help="Which, with commas.",
)
@click.option(
    "--out", metavar="DIR", default="simulation-results", show_default=True, help="Where it goes."
)
@json_option
def tiers(
    scenario: str, nodes: int | None, seed: int, seeds: int, wanted: str, out: str, as_json: bool
) -> None:
    """Compare a simulated run with more of the real thing.

    t1 is the simulator, t2 has the real driver of every node (dozens of nodes), t3 starts real
    nodes on this machine (2 to 8, in real time). Writes tiers-SCENARIO-NODES.md, .json and
    .html, a report with plots that needs no other file.
    """
    changes = {} if nodes is None else {"mesh.nodes": nodes}
    chosen = load(scenario, changes)

    def tell(what: str) -> None:
        if not as_json:
            click.secho(what, dim=True, err=True)

    found = compare(chosen, tuple(range(seed, seed + seeds)), wanted.split(","), tell)
    _write(found, Path(out))
    if as_json:
        print_json(_told(found))
    else:
        click.echo(found.markdown())


def _told(found: Comparison) -> dict[str, Any]:
    return {
        "scenario": found.scenario,
        "nodes": found.nodes,
        "seeds": list(found.seeds),
        "changes": found.changes,
        "figures": {
            tier: {name: value if math.isfinite(value) else None for name, value in each.items()}
            for tier, each in found.figures.items()
        },
        "far": found.far(),
    }


def _write(found: Comparison, folder: Path) -> None:
    name = f"tiers-{found.scenario}-{found.nodes}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(found.markdown())
        (folder / f"{name}.json").write_text(json.dumps(_told(found), indent=1) + "\n")
        title = f"{found.scenario} on tiers {', '.join(found.runs)}"
        page = report.compared(found.runs, title, found.markdown())
        (folder / f"{name}.html").write_text(page)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
