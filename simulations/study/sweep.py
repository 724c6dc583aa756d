"""Many runs at once: seeds and parameters, over all cores of this machine or over a Dask cluster.

Runs know nothing of each other, so they are spread one by one; what is done is written at once,
and an interrupted sweep keeps it. A run that was done before, with the same configuration, seed
and code, is not done again.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from meshnode.errors import ConfigError, MeshnodeError
from meshnode_simulations.record import Result
from meshnode_simulations.scenario import Scenario, changed
from meshnode_simulations.simulation import Simulation
from meshnode_simulations.study import results

RUNS_MAX = 100_000
"""Of one sweep: whoever asks for more has forgotten how products grow."""
CONNECT_S = 10.0
"""A Dask scheduler that does not answer by then is not there."""


class RunFailedError(MeshnodeError):
    """A run could not be done, or did not come out as it must."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep. `code` is that of whoever wants it done (`results.code_hash`)."""

    scenario: Scenario
    seed: int
    check: bool = False
    code: str = ""

    def __str__(self) -> str:
        return f"seed {self.seed} of {self.scenario.name or 'the scenario'}"


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
    if len(seeds) * math.prod(map(len, over.values())) > RUNS_MAX:
        raise ConfigError(f"these are more than {RUNS_MAX} runs")
    variants = [
        changed(scenario, dict(zip(over, values, strict=True))) if over else scenario
        for values in itertools.product(*over.values())
    ]
    code = results.code_hash()
    return [Job(variant, seed, check, code) for variant in variants for seed in seeds]


def run_job(job: Job) -> Result:
    """In whatever process, on whatever machine. Raises `RunFailedError` if the code there is not
    the one of whoever asked: the results of a sweep must be of one kind."""
    if job.code and job.code != results.code_hash():
        raise RunFailedError(
            f"{job}: this worker has another version of the simulator, {results.code_hash()} "
            f"and not {job.code}; install the same on every machine of the cluster"
        )
    return Simulation(job.scenario, seed=job.seed, check=job.check).run()


class Pool(Protocol):
    """Where runs go: `submit` gives a future with the result."""

    def submit(self, job: Job) -> Future[Result]: ...

    def finished(self, futures: Iterable[Future[Result]]) -> Iterator[Future[Result]]: ...

    def result(self, future: Future[Result]) -> Result:
        """Of one that has finished. Raises `RunFailedError` if its worker is gone."""


@contextmanager
def pool_on(where: str, workers: int | None = None) -> Iterator[Pool]:
    """`processes`, or the address of a Dask scheduler, `dask://host:8786`.

    Raises `ConfigError` for anything else, or if the cluster does not answer.
    """
    if where == "processes":
        with _processes(workers or os.cpu_count() or 1) as pool:
            yield pool
    elif where.startswith("dask://"):
        with _dask(where.removeprefix("dask://")) as pool:
            yield pool
    else:
        raise ConfigError(f"runs can go to processes or dask://HOST:PORT, not to {where!r}")


@contextmanager
def _processes(workers: int) -> Iterator[Pool]:
    """Workers of this machine. Whoever leaves with an exception, such as Ctrl-C, does not wait
    for runs that nobody wants any more."""
    others = set(active_children())
    executor = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),  # a fork would inherit threads of pyarrow
        initializer=_end_with_parent,
    )

    class Processes:
        def submit(self, job: Job) -> Future[Result]:
            # A terminal sends Ctrl-C to all of us. Workers inherit that it is held back: this
            # process decides what happens to them.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return executor.submit(run_job, job)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)

        def finished(self, futures: Iterable[Future[Result]]) -> Iterator[Future[Result]]:
            return as_completed(futures)

        def result(self, future: Future[Result]) -> Result:
            try:
                return future.result()
            except BrokenProcessPool as error:
                raise RunFailedError(
                    "a worker process died in the middle of its run, perhaps for want of memory: "
                    "try fewer at once (--jobs); what was done is kept"
                ) from error

    try:
        yield Processes()
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for worker in set(active_children()) - others:
            worker.terminate()
        raise
    finally:
        executor.shutdown()


def _end_with_parent() -> None:
    """In a worker: whoever wanted its runs may be killed, and can then not tell it."""

    def watch(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    parent = parent_process()
    if parent is not None:
        Thread(target=watch, args=(parent,), daemon=True).start()


@contextmanager
def _dask(address: str) -> Iterator[Pool]:
    try:
        from distributed import Client, KilledWorker
        from distributed import as_completed as completed
    except ImportError as error:
        raise ConfigError("for Dask, install it: pip install 'meshnode[sim-cluster]'") from error
    try:
        client = Client(f"tcp://{address}", timeout=f"{CONNECT_S:g}s")
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Dask scheduler answers at {address}: {error}") from error

    class Cluster:
        def submit(self, job: Job) -> Future[Result]:
            # By name: a run that the cluster is doing already for somebody is not done twice.
            config = results.config_hash(job.scenario)
            key = f"run-{config}-{job.seed}-{job.check}-{job.code}"
            future: Future[Result] = client.submit(run_job, job, key=key, retries=0)
            return future

        def finished(self, futures: Iterable[Future[Result]]) -> Iterator[Future[Result]]:
            return iter(completed(futures))

        def result(self, future: Future[Result]) -> Result:
            try:
                return future.result()
            except KilledWorker as error:
                raise RunFailedError(
                    f"every Dask worker that took on a run died of it: {error}"
                ) from error
            except CancelledError as error:
                raise RunFailedError(f"the Dask cluster at {address} is gone") from error

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

    `on_done` is called for each run, without a result if it was there before. Raises
    `RunFailedError` if a worker is lost; what was done by then is kept.
    """
    places = {results.place(out, job.scenario, job.seed): job for job in jobs}
    waiting: dict[Future[Result], Job] = {}
    for folder, job in places.items():
        if results.is_there(out, job.scenario, job.seed, checked=job.check):
            on_done(folder, None)
        else:
            waiting[pool.submit(job)] = job
    try:
        for future in pool.finished(tuple(waiting)):
            job = waiting.pop(future)  # a result is large: none is kept once it is written
            try:
                result = pool.result(future)
            except Exception as error:
                error.add_note(f"in {job}")
                raise
            on_done(results.write(result, out), result)
    finally:
        for future in waiting:
            future.cancel()
    return list(places)
