"""A folder for each run: what was run, on what, and what came of it.

    manifest.json     scenario, seed, digest, versions, the command that runs it again
    figures.json      figure -> number
    series.parquet    one row for each interval
    <table>.parquet   one row for each event of a kind: requests, joins, epochs, faults, outages
    violations.json   broken promises; empty is good

A folder is written beside its place and moved there whole, so one that exists is complete.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

import meshnode.protocol
import meshnode_simulations
from meshnode.errors import ConfigError
from meshnode_simulations.record import Result, Table, Violation
from meshnode_simulations.scenario import Origin, Scenario

SWEEP = "sweep.json"
"""Where a sweep's runs are, in the folder of its report."""
FORMAT = 1
"""Of the folder; readers refuse others."""
_PACKAGES = ("meshnode", "numpy", "pyarrow", "msgspec", "cryptography")
_BESIDE = ("study", "tiers", "cli.py", "__main__.py")
"""Parts of this package that look at runs, and decide nothing in them."""


def config_hash(scenario: Scenario) -> str:
    """Equal for scenarios of one name that say the same, whatever their files look like."""
    bare = msgspec.structs.replace(scenario, origin=Origin())
    return hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()[:16]


@functools.cache
def code_hash() -> str:
    """Of the code that decides what happens in a run: whoever edits a model or a policy gets
    other results, and those that were there before are not taken for them."""
    ours = Path(meshnode_simulations.__path__[0])
    cores = Path(meshnode.protocol.__path__[0])
    sources = [*cores.rglob("*.py"), *cores.parent.glob("*.py")]
    for found in ours.rglob("*.py"):
        if found.relative_to(ours).parts[0] not in _BESIDE:
            sources.append(found)
    total = hashlib.sha256()
    for path in sorted(sources):
        root = ours if path.is_relative_to(ours) else cores.parent
        total.update(f"{root.name}/{path.relative_to(root)}".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def place(out: Path, scenario: Scenario, seed: int) -> Path:
    """Where the result of a run belongs: out/name-config/seed-0007."""
    return out / f"{scenario.name or 'scenario'}-{config_hash(scenario)[:8]}" / f"seed-{seed:04d}"


def write(result: Result, out: Path) -> Path:
    """Write a result under `out`; returns its folder. One that was there is replaced."""
    import pyarrow.parquet as pq

    folder = place(out, result.scenario, result.seed)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text(_json(manifest(result)))
    (partial / "figures.json").write_text(_json(_finite(result.figures)))
    violations = [asdict(violation) for violation in result.violations]
    (partial / "violations.json").write_text(_json(violations))
    for name in ("series", *result.tables):
        pq.write_table(result.frame(name), partial / f"{name}.parquet")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def manifest(result: Result) -> dict[str, Any]:
    """What somebody needs to run it again and get the same."""
    return {
        "format": FORMAT,
        "scenario": msgspec.to_builtins(result.scenario),
        "config": config_hash(result.scenario),
        "seed": result.seed,
        "checked": result.checked,
        "digest": result.digest,
        "virtual_s": result.virtual_s,
        "cpu_s": result.cpu_s,
        "events": result.events,
        "replay": result.replay,
        "made": result.made or made_here(),
    }


def made_here() -> dict[str, Any]:
    """What a run that is made here and now is made with."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": _versions(),
        "code": code_hash(),
    }


def is_there(out: Path, scenario: Scenario, seed: int, *, checked: bool) -> bool:
    """Whether such a run is under `out` already, made by this very code."""
    try:
        told = json.loads((place(out, scenario, seed) / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    same = told.get("format") == FORMAT and told["made"]["code"] == code_hash()
    return same and (told["checked"] or not checked)


def read(folder: Path) -> Result:
    """A result as it was written. Raises `ConfigError` if it is none."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        told = json.loads((folder / "manifest.json").read_text())
        if told["format"] != FORMAT:
            raise ConfigError(f"{folder}: written in format {told['format']}, this reads {FORMAT}")
        figures = json.loads((folder / "figures.json").read_text())
        broken = json.loads((folder / "violations.json").read_text())
        series = pq.read_table(folder / "series.parquet").to_pydict()
        tables = {
            path.stem: Table(pq.read_table(path).to_pydict())
            for path in sorted(folder.glob("*.parquet"))
            if path.stem != "series"
        }
        return Result(
            scenario=msgspec.convert(told["scenario"], Scenario),
            seed=told["seed"],
            checked=told["checked"],
            digest=told["digest"],
            virtual_s=told["virtual_s"],
            cpu_s=told["cpu_s"],
            events=told["events"],
            series=series,
            tables=tables,
            figures={n: math.nan if v is None else v for n, v in figures.items()},
            violations=tuple(Violation(**each) for each in broken),
            made=told["made"],
        )
    except (OSError, KeyError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{folder}: no result of a simulation ({error})") from error


def write_sweep(runs: Sequence[Result], out: Path) -> Path:
    """A folder under `out` that stands for these runs, wherever theirs are; returns it."""
    configs = sorted({config_hash(run.scenario) for run in runs})
    name = hashlib.sha256("".join(configs).encode()).hexdigest()[:8]
    folder = out / f"{runs[0].scenario.name or 'scenario'}-sweep-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    places = [place(Path(".."), run.scenario, run.seed).as_posix() for run in runs]
    (folder / SWEEP).write_text(_json({"format": FORMAT, "runs": sorted(places)}))
    return folder


def folders(path: Path) -> list[Path]:
    """The results at `path`: itself, those of the sweep that it is, or all below it, in order.

    Raises `ConfigError` if there are none, or of more than one scenario.
    """
    if (path / SWEEP).is_file():
        try:
            told = json.loads((path / SWEEP).read_text())
            found = [path / each for each in told["runs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path / SWEEP} cannot be read ({error})") from error
    else:
        every = sorted(each.parent for each in path.rglob("manifest.json"))
        found = [each for each in every if not each.name.startswith(".")]  # half written
    if not found:
        raise ConfigError(f"{path}: no results of simulations there")
    names = sorted({each.parent.name.rpartition("-")[0] for each in found})
    if len(names) > 1:
        raise ConfigError(f"{path} has results of {', '.join(names)}: give the folder of one")
    return found


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: what could not be measured is null."""
    return {n: value if math.isfinite(value) else None for n, value in sorted(figures.items())}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
