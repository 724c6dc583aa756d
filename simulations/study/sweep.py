"""Many runs at once: seeds and parameters, over all cores of this machine or over a Dask cluster.

Runs know nothing of each other, so they are spread one by one; what is done is written at once,
and an interrupted sweep keeps it. A run that was done before, with the same configuration and
seed, is not done again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from meshnode.errors import ConfigError
from meshnode_simulations.record import Result
from meshnode_simulations.scenario import Scenario, changed
from meshnode_simulations.simulation import Simulation
from meshnode_simulations.study import results

RUNS_MAX = 100_000
"""Of one sweep: whoever asks for more has forgotten how products grow."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep."""

    scenario: Scenario
    seed: int
    check: bool = False


def plan(
    scenario: Scenario,
    seeds: Sequence[int],
    over: Mapping[str, Sequence[Any]] | None = None,
    *,
    check: bool = False,
) -> list[Job]:
    """Every seed for every combination of the values of `over`, by dotted name.

    Raises `ConfigError` for a value that the scenario does not take, or too many runs.
    """
    over = over or {}
    if len(seeds) * _product(len(values) for values in over.values()) > RUNS_MAX:
        raise ConfigError(f"these are more than {RUNS_MAX} runs")
    variants = [
        changed(scenario, dict(zip(over, values, strict=True))) if over else scenario
        for values in itertools.product(*over.values())
    ]
    return [Job(variant, seed, check) for variant in variants for seed in seeds]


def run_job(job: Job) -> Result:
    """In whatever process."""
    return Simulation(job.scenario, seed=job.seed, check=job.check).run()


class Pool(Protocol):
    """Where runs go: `submit` gives a future with the result."""

    def submit(self, job: Job) -> Future[Result]: ...

    def finished(self, futures: Sequence[Future[Result]]) -> Iterator[Future[Result]]: ...


@contextmanager
def pool_on(where: str, workers: int | None = None) -> Iterator[Pool]:
    """`processes`, or the address of a Dask scheduler, `dask://host:8786`.

    Raises `ConfigError` for anything else, or if the cluster does not answer.
    """
    if where == "processes":
        with ProcessPoolExecutor(
            workers or os.cpu_count() or 1,
            mp_context=get_context("spawn"),  # a fork would inherit threads of pyarrow
        ) as executor:
            try:
                yield _Processes(executor)
            finally:
                executor.shutdown(wait=False, cancel_futures=True)
    elif where.startswith("dask://"):
        with _dask(where.removeprefix("dask://")) as pool:
            yield pool
    else:
        raise ConfigError(f"runs can go to processes or dask://HOST:PORT, not to {where!r}")


@dataclass(frozen=True, slots=True)
class _Processes:
    executor: ProcessPoolExecutor

    def submit(self, job: Job) -> Future[Result]:
        return self.executor.submit(run_job, job)

    def finished(self, futures: Sequence[Future[Result]]) -> Iterator[Future[Result]]:
        return as_completed(futures)


@contextmanager
def _dask(address: str) -> Iterator[Pool]:
    try:
        from distributed import Client
        from distributed import as_completed as completed
    except ImportError as error:
        raise ConfigError("for Dask, install it: pip install 'meshnode[sim-cluster]'") from error
    try:
        client = Client(f"tcp://{address}", timeout="10s")
    except OSError as error:
        raise ConfigError(f"no Dask scheduler answers at {address}: {error}") from error

    class Cluster:
        def submit(self, job: Job) -> Future[Result]:
            # Pure: a run that the cluster has done already need not be done again.
            future: Future[Result] = client.submit(run_job, job, pure=True)
            return future

        def finished(self, futures: Sequence[Future[Result]]) -> Iterator[Future[Result]]:
            return iter(completed(futures))

    try:
        yield Cluster()
    finally:
        client.close()


def sweep(
    jobs: Sequence[Job],
    out: Path,
    pool: Pool,
    on_done: Callable[[Path, Result | None], None] = lambda folder, result: None,
) -> list[Path]:
    """Run what is not under `out` yet; returns the folders of all jobs.

    `on_done` is called for each run, without a result if it was there before.
    """
    folders: list[Path] = []
    futures: list[Future[Result]] = []
    for job in jobs:
        folder = results.place(out, job.scenario, job.seed)
        if (folder / "manifest.json").is_file():
            folders.append(folder)
            on_done(folder, None)
        else:
            futures.append(pool.submit(job))
    try:
        for future in pool.finished(futures):
            result = future.result()
            folder = results.write(result, out)
            folders.append(folder)
            on_done(folder, result)
    finally:
        for future in futures:
            future.cancel()
    return sorted(folders)


def _product(sizes: Iterator[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
