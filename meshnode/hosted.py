"""The models this node runs: from `--model` to an engine that answers, each on its own.

A model that cannot be found stops the start (the operator is looking); one that turns out to be
damaged or too large is shown as failed, and the node goes on with the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import trio

from meshnode.config import Config
from meshnode.console.snapshot import ModelSnapshot
from meshnode.engine import EngineStats, ModelCard
from meshnode.engine.card import load_card
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.errors import ModelLoadError
from meshnode.messages import SESSIONS_MAX, Offer
from meshnode.models.catalog import ModelSource, resolve
from meshnode.models.quantize import requantized
from meshnode.protocol.dispatch import session_hash

logger = logging.getLogger(__name__)

PREPARED = 0.4
"""The part of the progress bar for hashing (and requantising); the engine's load is the rest."""


class HostedModel:
    """One model from its source to its engine."""

    def __init__(self, source: ModelSource, data_dir: Path, options: EngineOptions) -> None:
        self.name = source.name
        self.created = int(time.time())
        self._source = source
        self._data_dir = data_dir
        self._options = options
        self._progress = 0.0
        self._error: str | None = None
        self.engine: EngineProcess | None = None

    async def run(self) -> None:
        """Prepare, load and keep the engine going until cancelled."""
        try:
            card = await self._prepare()
        except ModelLoadError as error:
            self._error = str(error)
            logger.error("model %s: %s", self.name, error)
            return
        self.engine = EngineProcess(card, self._options)
        await self.engine.run()
        logger.error("model %s: %s", self.name, self.engine.stats().error)

    async def _prepare(self) -> ModelCard:
        cache = self._data_dir / "cache"
        first = 0.1 if self._source.packaged else PREPARED
        card = await load_card(self._source, cache, self._progress_between(0.0, first))
        if not self._source.packaged:
            return card
        # The packaged default is small and slow to prefill as shipped: make it Q4_0, once.
        faster = await requantized(Path(card.path), card.digest, self._data_dir)
        again = self._progress_between(PREPARED - first, PREPARED)
        return await load_card(ModelSource(self.name, faster), cache, again)

    def _progress_between(self, start: float, end: float) -> Callable[[float], None]:
        def on_progress(fraction: float) -> None:
            self._progress = start + fraction * (end - start)

        return on_progress

    def stats(self) -> EngineStats | None:
        """The engine's; None until the file is identified."""
        return None if self.engine is None else self.engine.stats()

    def is_busy(self) -> bool:
        """Whether a request is in the engine."""
        stats = self.stats()
        return stats is not None and stats.slots_busy + stats.queue_depth > 0

    def offer(self) -> Offer | None:
        """What the mesh is told; None while there is nothing to tell."""
        stats = self.stats()
        if stats is None or stats.state == "stopped":
            return None
        return Offer(
            name=stats.card.name,
            digest=stats.card.digest,
            state=stats.state,
            context_tokens=stats.context_tokens,
            slots=stats.slots,
            slots_busy=stats.slots_busy,
            queue_depth=stats.queue_depth,
            kv_tokens_free=stats.kv_tokens_free,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            decode_tokens_per_s=stats.decode_tokens_per_s,
            sessions=_session_hashes(stats.sessions),
        )

    def snapshot(self) -> ModelSnapshot:
        stats = self.stats()
        if stats is None:
            state = "loading" if self._error is None else "failed"
            return ModelSnapshot(
                self.name, "", state, self._progress, self._error, 0, 0, 0, 0, 0.0, 0.0, 0
            )
        return ModelSnapshot(
            name=stats.card.name,
            digest=stats.card.digest,
            state=stats.state,
            progress=PREPARED + stats.progress * (1.0 - PREPARED),
            error=stats.error,
            slots=stats.slots,
            slots_busy=stats.slots_busy,
            queue_depth=stats.queue_depth,
            context_tokens=stats.context_tokens,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            decode_tokens_per_s=stats.decode_tokens_per_s,
            memory_bytes=stats.memory_bytes,
        )


def find_models(config: Config) -> tuple[HostedModel, ...]:
    """All models of the configuration. Raises `ConfigError` for one that does not exist."""
    options = EngineOptions(context_tokens=config.context_tokens, slots=config.slots)
    return tuple(
        HostedModel(resolve(spec, config.data_dir), config.data_dir, options)
        for spec in config.models
    )


async def run_models(models: tuple[HostedModel, ...]) -> None:
    """Run them all until cancelled."""
    async with trio.open_nursery() as nursery:
        for model in models:
            nursery.start_soon(model.run)


def _session_hashes(sessions: tuple[bytes, ...]) -> bytes:
    """The most recent ones, as adverts carry them."""
    kept = sessions[-SESSIONS_MAX:]
    return b"".join(session_hash(session) for session in kept)
