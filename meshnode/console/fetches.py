"""The model files that this node is bringing from its peers, because somebody here wants them.

Decides where a file goes, and how long it is worth the trouble: a download goes on while somebody
asks how far it is, and what was brought waits for the next time. Knows no streams.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import trio

from meshnode.console.requests import FetchReport, FetchRequest
from meshnode.errors import ConfigError, FetchError, MeshnodeError, ModelLoadError
from meshnode.messages import APPROXIMATE_MARK
from meshnode.models.catalog import SUFFIX
from meshnode.models.digest import digest
from meshnode.weights import Fetch, File, Peers

KEPT_S = 10.0
"""Who wants a file asks a few times a second; after so long nobody is there any more."""
FETCHES_MAX = 4
"""At once; more would only share the line."""

Named = tuple[str, str]
"""A model's digest, and what the mesh calls it."""


@dataclass(slots=True)
class _Job:
    model: str
    name: str
    target: Path
    state: Literal["fetching", "checking", "done"] = "fetching"
    done_bytes: int = 0
    wanted_bytes: int = 0
    error: MeshnodeError | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def progress(self, done_bytes: int, wanted_bytes: int) -> None:
        self.done_bytes, self.wanted_bytes = done_bytes, wanted_bytes

    def report(self) -> FetchReport:
        path = str(self.target) if self.state == "done" else ""
        return FetchReport(
            self.model, self.name, self.state, self.done_bytes, self.wanted_bytes, path
        )


class Fetches:
    """Of one node. `run` it, then `ask`."""

    def __init__(
        self,
        data_dir: Path,
        peers: Peers,
        find: Callable[[str], Awaitable[Named]],
        here: Callable[[], Mapping[str, File]],
    ) -> None:
        """`find` is what people mean by what they write, else a `ConfigError`; `here` are the
        files that this node has, by digest."""
        self._models_dir = data_dir / "models"
        self._cache_dir = data_dir / "cache"
        self._peers = peers
        self._find = find
        self._here = here
        self._jobs: dict[str, _Job] = {}
        self._wanted, self._new = trio.open_memory_channel[_Job](FETCHES_MAX)

    async def run(self) -> None:
        """Bring what is asked for, until cancelled."""
        async with trio.open_nursery() as nursery:
            async for job in self._new:
                nursery.start_soon(self._bring, job)

    async def ask(self, request: FetchRequest) -> FetchReport:
        """Begin, or tell how far it is. Raises `ConfigError` for what cannot be asked for, and
        what ended the download: the next one who asks begins anew, where that one stopped."""
        model, name = await self._find(request.model)
        job = self._jobs.get(model)
        if job is None:
            job = self._begin(model, name)
        if job.error is not None or job.state == "done":
            del self._jobs[model]
            job.scope.cancel()
        if job.error is not None:
            raise job.error
        job.scope.deadline = trio.current_time() + KEPT_S
        return job.report()

    def _begin(self, model: str, name: str) -> _Job:
        here = self._here().get(model)
        if here is not None:
            raise ConfigError(f"this node has {name} already: {here.path}")
        if APPROXIMATE_MARK in name:
            raise ConfigError(
                f"{name} is an expert shard, and nothing without its receipt: make it here with "
                "`meshnode models shard`, or copy both files"
            )
        if len(self._jobs) >= FETCHES_MAX:
            raise ConfigError(f"{FETCHES_MAX} files are being fetched already: try again later")
        job = _Job(model, name, self._models_dir / f"{name}{SUFFIX}")
        self._jobs[model] = job
        self._wanted.send_nowait(job)
        return job

    async def _bring(self, job: _Job) -> None:
        with job.scope:
            try:
                await self._bring_to_its_place(job)
                job.state = "done"
            except (FetchError, ConfigError, ModelLoadError) as error:
                job.error = error
            await trio.sleep_forever()  # until somebody has heard of it, or nobody asks any more
        if self._jobs.get(job.model) is job:
            del self._jobs[job.model]

    async def _bring_to_its_place(self, job: _Job) -> None:
        if job.target.exists():
            job.state = "checking"
            if await digest(job.target, self._cache_dir) != job.model:
                raise ConfigError(f"{job.target} is there already, and another file: move it away")
            return
        path = self._cache_dir / "weights" / f"{job.model}{SUFFIX}"
        file = await Fetch(job.model, path, self._peers).bring(progress=job.progress)
        job.state = "checking"
        await trio.to_thread.run_sync(file.move, job.target)
        # All of it was proven; what the disk has made of it shows now, and `serve` need not look.
        if await digest(job.target, self._cache_dir) != job.model:
            job.target.unlink()
            raise FetchError(f"{job.target} is not what was written to it: look at that disk")
