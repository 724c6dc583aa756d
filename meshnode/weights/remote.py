"""A model whose file is on other nodes: what is needed of it comes when it is needed.

Decides what "needed" is: the header, to say what the model would take here; of layers that are
assigned, their bytes; for the whole model, all. What has come stays in the data directory's cache,
at its place in a file with holes, in which `models/` finds it as in the whole one.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from meshnode.engine import ModelCard
from meshnode.errors import ConfigError, FetchError, ModelLoadError
from meshnode.models.catalog import SUFFIX
from meshnode.models.digest import LEAF_BYTES
from meshnode.models.gguf import read_header, read_layout
from meshnode.models.stages import Stage, cut
from meshnode.weights.fetch import Fetch, Peers
from meshnode.weights.partial import Range

__all__ = ["REMOTE_PREFIX", "RemoteFile", "needed"]

logger = logging.getLogger(__name__)

REMOTE_PREFIX = "mesh:"
LOOK_S = 2.0
"""How often the mesh is asked whether it knows the model by now: somebody has to start first."""
HEADER_BYTES_MAX = 256 * LEAF_BYTES
"""The largest vocabularies take 20 MiB; whatever has a larger header is no model."""


class RemoteFile:
    """The file of the model that the mesh calls `name`."""

    def __init__(self, name: str, cache_dir: Path) -> None:
        self.name = name
        self.find: Callable[[str], Awaitable[tuple[str, str]]] | None = None
        """Digest and name of what a name means; raises `ConfigError`. To be set before use."""
        self.peers: Peers | None = None
        """Likewise."""
        self.progress: Callable[[float], None] = lambda fraction: None
        """Is told 0..1 while something is brought."""
        self.is_whole = False
        self._cache_dir = cache_dir
        self._fetch: Fetch | None = None

    async def card(self, name: str) -> ModelCard:
        """What its header says; `name` is what this node calls it. Waits until the mesh knows it.

        Raises `ModelLoadError` if nobody gives the header, or it is not that of a model.
        """
        model = await self._known()
        path = self._cache_dir / "parts" / f"{model}{SUFFIX}"
        if self._fetch is None:
            assert self.peers is not None  # or nobody would have known
            self._fetch = Fetch(model, path, self.peers)
        size_bytes = LEAF_BYTES
        while True:
            await self.bring([(0, size_bytes)])
            try:
                layout = await trio.to_thread.run_sync(read_layout, path)
                # Behind what is there are zeros; nothing of them was read if the weights begin
                # before.
                if min(tensor.offset for tensor in layout.tensors.values()) <= size_bytes:
                    break
            except ModelLoadError:
                if size_bytes >= min(HEADER_BYTES_MAX, path.stat().st_size):
                    raise
            size_bytes *= 2
        header = await trio.to_thread.run_sync(read_header, path)
        return ModelCard(
            name=name,
            digest=model,
            path=str(path),
            size_bytes=header.size_bytes,
            architecture=header.architecture,
            quantization=header.quantization,
            parameters=header.parameters,
            context_tokens_train=header.context_tokens,
        )

    async def _known(self) -> str:
        assert self.find is not None
        assert self.peers is not None
        told = ""
        while True:
            try:
                model, _ = await self.find(self.name)
                if self.peers.having(model):
                    return model
                why = f"nobody who is here has the file of {self.name}"
            except ConfigError as error:
                why = str(error)
            if why != told:
                logger.info("--standby %s%s waits: %s", REMOTE_PREFIX, self.name, why)
                told = why
            await trio.sleep(LOOK_S)

    async def bring_layers(self, card: ModelCard, first: int, end: int) -> None:
        """What a stage of these layers reads. Raises `ModelLoadError` and `StageError`."""
        await self.bring(needed(await trio.to_thread.run_sync(cut, card.path, first, end)))

    async def bring(self, ranges: list[Range] | None = None) -> None:
        """These bytes, or all, after `card`. Raises `ModelLoadError`."""
        assert self._fetch is not None
        try:
            file = await self._fetch.bring(
                ranges,
                lambda done_bytes, wanted_bytes: self.progress(done_bytes / max(wanted_bytes, 1)),
            )
        except FetchError as error:
            raise ModelLoadError(str(error)) from error
        self.is_whole = file.held_bytes == file.size_bytes


def needed(stage: Stage) -> list[Range]:
    """What a stage reads of the source: into its file, and, as the first one, rows of tokens."""
    rows = stage.lookup
    looked_up = (rows.offset, rows.offset + rows.count * rows.row_bytes)
    return [*stage.ranges, looked_up] if stage.is_first else list(stage.ranges)
