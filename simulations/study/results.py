"""A folder for each run: what was run, on what, and what came of it.

    manifest.json     scenario, seed, digest, versions, the command that runs it again
    figures.json      figure -> number
    series.parquet    one row for each interval
    <table>.parquet   one row for each event of a kind: requests, joins, epochs, faults, outages
    violations.json   broken promises; empty is good

A folder is written beside its place and moved there whole, so one that exists is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from meshnode.errors import ConfigError
from meshnode_simulations.record import Result, Table, Violation
from meshnode_simulations.scenario import Scenario

FORMAT = 1
"""Of the folder; readers refuse others."""
_PACKAGES = ("meshnode", "numpy", "pyarrow", "msgspec", "aioquic", "libp2p")


def config_hash(scenario: Scenario) -> str:
    """Equal for scenarios that say the same, whatever their files look like."""
    return hashlib.sha256(msgspec.json.encode(scenario, order="sorted")).hexdigest()[:16]


def place(out: Path, scenario: Scenario, seed: int) -> Path:
    """Where the result of a run belongs: out/name-config/seed-0007."""
    return out / f"{scenario.name or 'scenario'}-{config_hash(scenario)[:8]}" / f"seed-{seed:04d}"


def write(result: Result, out: Path) -> Path:
    """Write a result under `out`; returns its folder. One that was there is replaced."""
    folder = place(out, result.scenario, result.seed)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text(_json(manifest(result)))
    (partial / "figures.json").write_text(_json(_finite(result.figures)))
    violations = [asdict(violation) for violation in result.violations]
    (partial / "violations.json").write_text(_json(violations))
    pq.write_table(pa.table(dict(result.series)), partial / "series.parquet")
    for name, table in result.tables.items():
        pq.write_table(pa.table(dict(table.columns)), partial / f"{name}.parquet")
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
        "digest": result.digest,
        "virtual_s": result.virtual_s,
        "cpu_s": result.cpu_s,
        "events": result.events,
        "replay": result.replay,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": _versions(),
    }


def read(folder: Path) -> Result:
    """A result as it was written. Raises `ConfigError` if it is none."""
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
            digest=told["digest"],
            virtual_s=told["virtual_s"],
            cpu_s=told["cpu_s"],
            events=told["events"],
            series=series,
            tables=tables,
            figures={n: math.nan if v is None else v for n, v in figures.items()},
            violations=tuple(Violation(**each) for each in broken),
        )
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise ConfigError(f"{folder}: no result of a simulation ({error})") from error


def folders(path: Path) -> list[Path]:
    """The results at `path`: itself, or all below it, in order."""
    if (path / "manifest.json").is_file():
        return [path]
    return sorted(found.parent for found in path.rglob("manifest.json"))


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
