"""The models this node has: from `--model` and `--standby` to engines that answer.

Decides when a model is loaded and how it is unloaded: a pinned one (`--model`) at once, a standby
(`--standby`) when it, or a part of its layers, is assigned here. Does not know who assigns. A model
that cannot be found stops the start (the operator is looking); one that turns out to be damaged or
too large is shown as failed, and the node goes on with the others. One that is too large here, but
can be cut, waits for the mesh instead.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import trio

from meshnode.config import Config
from meshnode.console.snapshot import ModelSnapshot, PartSnapshot, SpeculationSnapshot
from meshnode.engine import Engine, EngineStats, ModelCard
from meshnode.engine.card import load_card
from meshnode.engine.memory import MemoryNeed, available_bytes, context_for, memory_need
from meshnode.engine.process import EngineOptions, EngineProcess, read_draft_header, read_eyes
from meshnode.errors import ConfigError, ModelLoadError, StageError
from meshnode.messages import APPROXIMATE_MARK, SESSIONS_MAX, Approximate, Offer, is_model_name
from meshnode.models.catalog import ModelSource, resolve
from meshnode.models.digest import digest
from meshnode.models.gguf import GgufHeader, read_header
from meshnode.models.quantize import requantized
from meshnode.models.receipt import read_receipt
from meshnode.models.stages import Cuts, cut, cut_points
from meshnode.pipeline.parts import HeadPart, Keep, StagePart, part_of
from meshnode.pipeline.selftest import SelfTests
from meshnode.protocol.dispatch import session_hash
from meshnode.weights import REMOTE_PREFIX, File, RemoteFile

logger = logging.getLogger(__name__)

PREPARED = 0.4
"""The part of the progress bar for hashing (and requantising); the engine's load is the rest."""
UNLOAD_DRAIN_S = 300.0
"""What is in flight may take so long to end: the default context's 8192 tokens at 30 a second.
Whoever is still reading then holds memory that the mesh has given to others."""
LOAD_RETRY_AFTER_S = 120.0
"""Memory may have come free or the file been mended; each try may cost three loads."""

FETCH_RETRY_AFTER_S = 10.0
"""Layers that nobody gives now: who has them may be starting, and the mesh waits for us."""
REMEMBER_AFTER_S = 30.0
"""What a model says is asked for when the first requests have been served."""
ACTIVATION_BYTES = 4
"""Of one number of an activation: they travel as float32, so that nothing of them is lost."""

Layers = tuple[int, int]
"""First and end."""
State = Literal["loading", "standby", "stage", "ready", "unloading", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Holding:
    """A model on this node's disk, verified, and what it would take to serve it here.

    `state`: "loading" and "ready" hold memory, and an engine that takes no more requests is
    "ready" until it has given it back; "failed" lasts until another try is worth it. `wanted`:
    this node's operator wants it served here. `bytes`, estimated, is `weight_bytes` +
    `kv_bytes_per_token` * `context_tokens` + `compute_bytes` (buffers, runtime, draft model).

    `activation_bytes` cross between two parts per token; 0 if it cannot be cut. Parts begin at
    multiples of `cut_every` layers, `edge_bytes` of the weights are in no layer, and `parts` are
    those that are loaded.
    """

    name: str
    digest: str
    state: Literal["file", "loading", "ready", "failed"]
    wanted: bool
    weight_bytes: int
    layers: int
    bytes: int
    kv_bytes_per_token: int
    context_tokens: int
    compute_bytes: int
    activation_bytes: int = 0
    edge_bytes: int = 0
    cut_every: int = 1
    parts: tuple[Layers, ...] = ()


@dataclass(frozen=True, slots=True)
class _Identity:
    """What is known of a file once it has been read through. `cuts`: None if it cannot be cut;
    `approximate`: it is an expert shard."""

    card: ModelCard
    header: GgufHeader
    need: MemoryNeed
    cuts: Cuts | None
    edge_bytes: int
    approximate: Approximate | None


class HostedModel:
    """One model from its source to its engine, loaded and unloaded as it is assigned.

    `engine` is there from a load's start to the unload's end, and shows why a load failed. Who
    wants to ask it takes it from `engine_for`.
    """

    def __init__(
        self,
        source: ModelSource,
        data_dir: Path,
        options: EngineOptions,
        *,
        pinned: bool = True,
        remote: RemoteFile | None = None,
    ) -> None:
        """`remote` brings the file from peers, as far as it is needed, instead of `source`."""
        self.keep_ring: Keep | None = None
        """How a part that is a head gets into a ring (`Rings.keep`); without it, parts are not
        offered to the mesh. To be set before `run`."""
        self.name = source.name
        self.remote = remote
        self.pinned = pinned
        self.created = int(time.time())
        self.engine: EngineProcess | None = None
        self._source = source
        self._data_dir = data_dir
        self._options = options
        self._identity: _Identity | None = None
        self._progress = 0.0
        self._error: str | None = None
        # A pinned model waits for nobody: a second replica of it harms nothing.
        self._assigned = pinned
        self._assigned_parts: frozenset[Layers] = frozenset()
        self._parts: dict[Layers, StagePart | HeadPart] = {}
        self._self_tests = SelfTests(self._cache_dir / "self-tests.json")
        self._assignment_changed = trio.Event()
        self._draining = trio.CancelScope()
        self._has_failed = False

    def assign(self, load: bool, parts: frozenset[Layers] = frozenset()) -> None:
        """Have the model loaded (True) or not, and these parts of it; `run` makes it so.

        Idempotent. Loading again while requests drain keeps the engine as it is; after a failure,
        only an assignment that was taken back and given anew is tried at once.
        """
        if load is self._assigned and parts == self._assigned_parts:
            return
        self._assigned_parts = parts
        if load is not self._assigned:
            self._assigned = load
            if load:
                self._has_failed = False
            self._draining.cancel()
        self._tell_assignment()

    def _tell_assignment(self) -> None:
        self._assignment_changed.set()
        self._assignment_changed = trio.Event()

    # --- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Identify the file, then load and unload it as assigned, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_parts)
            await self._run_whole()

    async def _run_whole(self) -> None:
        while True:
            try:
                if self._identity is None:
                    self._identity = await self._identify()
                    self._wait_for_others_if_too_large(self._identity)
                    self._tell_assignment()
                while True:
                    await self._wait_assigned(True)
                    await self._serve(self._identity.card)
            except ModelLoadError as error:
                self._error = str(error)
                self._has_failed = True
                logger.error("model %s: %s", self.name, error)
            with trio.move_on_after(LOAD_RETRY_AFTER_S):
                await self._wait_assigned_anew()
            self._error = self.engine = None

    async def _identify(self) -> _Identity:
        card = await self._prepare()
        header = await trio.to_thread.run_sync(read_header, card.path)
        approximate = await trio.to_thread.run_sync(_measured, card, header)
        context_tokens = context_for(card.path, header, self._options.context_tokens)
        draft = await read_draft_header(self._options)
        eyes = await read_eyes(self._options)
        need = memory_need(header, context_tokens, draft, eyes, kv_type=self._options.kv_type)
        cuts, edge_bytes = await trio.to_thread.run_sync(_cuts_of, card.path)
        return _Identity(card, header, need, cuts, edge_bytes, approximate)

    def _wait_for_others_if_too_large(self, known: _Identity) -> None:
        """A model that this machine cannot hold, but several can, is for the mesh to place."""
        if not self.pinned or known.cuts is None or self.keep_ring is None:
            return
        free_bytes = available_bytes()
        if known.need.total_bytes > free_bytes:
            logger.warning(
                "model %s does not fit into this machine alone: it needs %s, and %d MiB are "
                "available. It waits for other nodes that have the file (--standby %s), to be "
                "served together with them, each some of its layers.",
                self.name,
                known.need,
                free_bytes >> 20,
                known.card.path,
            )
            self.pinned = self._assigned = False

    async def _run_parts(self) -> None:
        """Load the parts that are assigned, and unload the others."""
        async with trio.open_nursery() as nursery:
            while True:
                changed = self._assignment_changed
                known = self._identity
                if known is not None and self.keep_ring is not None:
                    for layers in sorted(self._assigned_parts - self._parts.keys()):
                        self._parts[layers] = part_of(
                            known.card,
                            *layers,
                            known.header.layers,
                            known.need.context_tokens,
                            self._options,
                            self.keep_ring,
                            self._self_tests,
                        )
                        nursery.start_soon(self._run_part, layers, self._parts[layers])
                await changed.wait()

    async def _run_part(self, layers: Layers, part: StagePart | HeadPart) -> None:
        """One part, until it is not assigned any more and nothing is in flight in it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_loaded, part)
            while layers in self._assigned_parts:
                await self._assignment_changed.wait()
            if isinstance(part, HeadPart):
                with trio.move_on_after(UNLOAD_DRAIN_S):
                    await part.engine.wait_idle()
            nursery.cancel_scope.cancel()
        del self._parts[layers]
        logger.info("layers %d-%d of model %s: unloaded", *layers, self.name)
        self._tell_assignment()  # it may have been assigned again meanwhile

    async def _run_loaded(self, part: StagePart | HeadPart) -> None:
        while self.remote is not None:
            try:
                await self.remote.bring_layers(part.card, *part.layers)
                break
            except (ModelLoadError, StageError) as error:
                logger.error("layers %d-%d of model %s: %s", *part.layers, self.name, error)
                await trio.sleep(FETCH_RETRY_AFTER_S)
        await part.run()

    async def _prepare(self) -> ModelCard:
        if self.remote is not None:
            return await self.remote.card(self.name)
        first = 0.1 if self._source.packaged else PREPARED
        card = await load_card(self._source, self._cache_dir, self._progress_between(0.0, first))
        if not self._source.packaged:
            return card
        # The packaged default is small and slow to prefill as shipped: make it Q4_0, once.
        faster = await requantized(Path(card.path), card.digest, self._data_dir)
        again = self._progress_between(PREPARED - first, PREPARED)
        return await load_card(ModelSource(self.name, faster), self._cache_dir, again)

    def _progress_between(self, start: float, end: float) -> Callable[[float], None]:
        def on_progress(fraction: float) -> None:
            self._progress = start + fraction * (end - start)

        return on_progress

    async def _serve(self, card: ModelCard) -> None:
        """Load, keep the engine going, and unload. Raises `ModelLoadError` if it never will."""
        if self.remote is not None:
            self.remote.progress = self._progress_between(0.0, PREPARED)
            await self.remote.bring()
        if await digest(Path(card.path), self._cache_dir) != card.digest:
            raise ModelLoadError(f"{card.path} has changed since it was verified; start again.")
        engine = self.engine = EngineProcess(card, self._options)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_when_unneeded, engine, nursery.cancel_scope)
            nursery.start_soon(self._remember_what_it_says, engine)
            await engine.run()
            nursery.cancel_scope.cancel()
        stats = engine.stats()
        if stats.state == "failed":  # it stays, to be looked at until the next try
            raise ModelLoadError(stats.error or "the engine cannot be started")
        self.engine = None
        logger.info("model %s: unloaded", self.name)

    async def _remember_what_it_says(self, engine: EngineProcess) -> None:
        """For the day when its layers are spread over several nodes."""
        known, kv_type = self._identity, self._options.kv_type
        if known is None or known.cuts is None or known.header.embeds or self.keep_ring is None:
            return
        if not await self._self_tests.knows(known.card.digest, kv_type):
            with suppress(ModelLoadError):
                await engine.wait_ready()
                await trio.sleep(REMEMBER_AFTER_S)
                await engine.wait_idle()
                await self._self_tests.run(engine, kv_type, whole=True)

    async def _end_when_unneeded(self, engine: EngineProcess, serving: trio.CancelScope) -> None:
        """Cancel `serving` once the model is not assigned and nothing, or too slow a reader, is
        in flight."""
        while True:
            await self._wait_assigned(False)
            with trio.move_on_after(UNLOAD_DRAIN_S) as self._draining:
                await engine.wait_idle()
            if self._assigned:
                continue
            # Otherwise it was assigned and taken back within one turn of the loop: drain anew.
            if not engine.in_flight or trio.current_time() >= self._draining.deadline:
                serving.cancel()
                return

    async def _wait_assigned(self, assigned: bool) -> None:
        while self._assigned is not assigned:
            await self._assignment_changed.wait()

    async def _wait_assigned_anew(self) -> None:
        await self._assignment_changed.wait()
        await self._wait_assigned(True)

    @property
    def _cache_dir(self) -> Path:
        return self._data_dir / "cache"

    # --- what others see ------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """As people see it."""
        if self._error is not None:
            return "failed"
        if self.engine is None and self._parts:
            return self._state_of_parts()
        stats = self.stats()
        if stats is not None:
            return stats.state if self._assigned else "unloading"
        return "loading" if self._identity is None or self._assigned else "standby"

    def _state_of_parts(self) -> State:
        if self._head is not None:
            return "ready" if self._head.ring is not None else "loading"
        states = {part.state for part in self._parts.values()}
        return "failed" if "failed" in states else "stage" if states == {"ready"} else "loading"

    @property
    def _head(self) -> HeadPart | None:
        heads = (part for part in self._parts.values() if isinstance(part, HeadPart))
        return next(heads, None)

    def stage(self, digest: str, first: int, end: int) -> StagePart | None:
        """These layers, if this is the model and they are loaded."""
        part = self._parts.get((first, end))
        if self._identity is None or self._identity.card.digest != digest:
            return None
        return part if isinstance(part, StagePart) and part.state == "ready" else None

    def file(self) -> tuple[str, File] | None:
        """Digest and file, if all of it is here and verified."""
        if self._identity is None or (self.remote is not None and not self.remote.is_whole):
            return None
        card = self._identity.card
        return card.digest, File(card.name, Path(card.path))

    @property
    def is_whole(self) -> bool:
        """Whether all of it is loaded here and answers."""
        return self.engine is not None and self.state == "ready"

    @property
    def is_settled(self) -> bool:
        """Whether the node need not wait for it: it answers, has failed once, or may come and go
        as the mesh likes."""
        return not self.pinned or self._has_failed or self.state != "loading"

    def engine_for(self, digest: str) -> Engine | None:
        """The engine, if this is the model and it takes requests now."""
        stats = self.stats()
        if stats is None or stats.card.digest != digest or self.state != "ready":
            return None
        return self._answering

    @property
    def _answering(self) -> EngineProcess | None:
        """The engine of the whole model, or of its last layers."""
        if self.engine is None and self._head is not None:
            return self._head.engine
        return self.engine

    def holding(self) -> Holding | None:
        """What the mesh may plan with; None until the file is identified."""
        if self._identity is None:
            return None
        known = self._identity
        card, header, need, cuts = known.card, known.header, known.need, known.cuts
        if self.keep_ring is None or header.embeds:
            cuts = None
        return Holding(
            name=card.name,
            digest=card.digest,
            state=self._holding_state(),
            wanted=self.pinned,
            weight_bytes=need.weights_bytes,
            layers=header.layers,
            bytes=need.total_bytes,
            kv_bytes_per_token=need.kv_bytes_per_token,
            context_tokens=need.context_tokens,
            compute_bytes=need.total_bytes - need.weights_bytes - need.kv_bytes,
            activation_bytes=0 if cuts is None else ACTIVATION_BYTES * header.embedding_length,
            edge_bytes=known.edge_bytes,
            cut_every=1 if cuts is None else cuts.every,
            parts=tuple(
                sorted(layers for layers, part in self._parts.items() if part.state == "ready")
            ),
        )

    def _holding_state(self) -> Literal["file", "loading", "ready", "failed"]:
        if self._error is not None:
            return "failed"
        if self.engine is not None:
            match self.engine.stats():
                case EngineStats(state="loading" | "ready" | "failed" as state):
                    return state
        return "loading" if self._assigned else "file"

    def stats(self) -> EngineStats | None:
        """The engine's; None while there is none."""
        return None if self._answering is None else self._answering.stats()

    def is_busy(self) -> bool:
        """Whether a request is in the engine."""
        stats = self.stats()
        return stats is not None and stats.slots_busy + stats.queue_depth > 0

    def offer(self) -> Offer | None:
        """What the mesh is told; None while there is nothing to ask for."""
        stats = self.stats()
        if stats is None or stats.state == "stopped":
            return None
        if self.engine is not None:
            if not self._assigned:
                return None
        elif stats.state == "ready" and self.state != "ready":
            stats = replace(stats, state="loading")  # its layers are here, and its ring is not
        assert stats.state != "stopped"
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
            approximate=self._approximate,
        )

    def snapshot(self) -> ModelSnapshot:
        stats = self.stats()
        head = self._head
        ring = () if head is None or head.ring is None else head.ring.owners
        parts = tuple(
            PartSnapshot(*layers, part.state, part.error, part.memory_bytes, part.steps)
            for layers, part in sorted(self._parts.items())
        )
        if stats is None:
            known = "" if self._identity is None else self._identity.card.digest
            return ModelSnapshot(
                self.name, known, self.state, self._progress, self._error, 0, 0, 0, 0, 0.0, 0.0,
                sum(part.memory_bytes for part in parts), parts=parts,
                approximate=self._approximate,
            )  # fmt: skip
        return ModelSnapshot(
            name=stats.card.name,
            digest=stats.card.digest,
            state=self.state,
            progress=PREPARED + stats.progress * (1.0 - PREPARED),
            error=stats.error,
            slots=stats.slots,
            slots_busy=stats.slots_busy,
            queue_depth=stats.queue_depth,
            context_tokens=stats.context_tokens,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            decode_tokens_per_s=stats.decode_tokens_per_s,
            memory_bytes=stats.memory_bytes,
            saved_tokens=stats.saved_tokens,
            speculation=None
            if stats.speculation is None
            else SpeculationSnapshot(**dataclasses.asdict(stats.speculation)),
            parts=parts,
            ring=ring,
            self_test="" if head is None else head.verdict,
            approximate=self._approximate,
        )

    @property
    def _approximate(self) -> Approximate | None:
        return None if self._identity is None else self._identity.approximate


def _measured(card: ModelCard, header: GgufHeader) -> Approximate | None:
    """What the receipt of an expert shard says of it; None for a whole model.

    Raises `ModelLoadError` for a shard without a good one, and for a name that says otherwise than
    the file what it is: nobody may get a shard who asked for the model.
    """
    says_so = APPROXIMATE_MARK in card.name
    if header.shard is None:
        if says_so:
            raise ModelLoadError(
                f"{card.path} is no shard, but {card.name} says so; give it a name without "
                f"{APPROXIMATE_MARK}: --model {card.path}=NAME"
            )
        return None
    signed = read_receipt(Path(card.path), card.digest, header.shard)
    if not says_so:
        full_name = f"{card.name}{APPROXIMATE_MARK}{header.shard.kept}of{header.shard.of}"
        raise ModelLoadError(
            f"{card.path} is an expert shard, and its name must say so: "
            f"--model {card.path}={full_name}"
        )
    approximate = signed.approximate
    logger.warning(
        "model %s is an approximation (%s), measured by %s",
        card.name,
        approximate,
        approximate.measured_by,
    )
    return approximate


def find_models(config: Config) -> tuple[HostedModel, ...]:
    """All models of the configuration: those to serve, then those on standby.

    Raises `ConfigError` for one that does not exist, and for a standby that is named twice; one
    that is in the mesh (`mesh:NAME`) need not exist yet.
    """
    draft = None if config.draft is None else resolve(config.draft, config.data_dir).path
    options = EngineOptions(
        context_tokens=config.context_tokens,
        slots=config.slots,
        kv_type=config.kv_type,
        kv_spill_bytes=config.kv_spill_bytes,
        kv_spill_dir=config.data_dir / "cache" / "kv",
        speculate=config.speculate,
        draft=draft,
    )
    pinned = [resolve(spec, config.data_dir) for spec in config.models]
    cache_dir = config.data_dir / "cache"
    remotes = [
        _remote(spec, cache_dir) for spec in config.standbys if spec.startswith(REMOTE_PREFIX)
    ]
    standbys = [
        resolve(spec, config.data_dir)
        for spec in config.standbys
        if not spec.startswith(REMOTE_PREFIX)
    ]
    paths = [source.path for source in (*pinned, *standbys)]
    for source in standbys:
        if paths.count(source.path) > 1:
            raise ConfigError(
                f"the standby {source.name} is named twice ({source.path}): "
                "give a model once, as --model to serve it here or as --standby"
            )
    sources = [
        *((source, True, None) for source in pinned),
        *((source, False, None) for source in standbys),
        *((source, False, remote) for source, remote in remotes),
    ]
    projectors = _projectors(config.projectors, [source.name for source, _, _ in sources])
    return tuple(
        HostedModel(
            source,
            config.data_dir,
            replace(options, projector=projectors.get(source.name)),
            pinned=is_pinned,
            remote=remote,
        )
        for source, is_pinned, remote in sources
    )


def _remote(spec: str, cache_dir: Path) -> tuple[ModelSource, RemoteFile]:
    """Of `mesh:NAME[=ALIAS]`. Raises `ConfigError`."""
    wanted, _, alias = spec.removeprefix(REMOTE_PREFIX).partition("=")
    name = alias or wanted.partition("@")[0]
    if not is_model_name(name):
        raise ConfigError(f"--standby {spec} is not {REMOTE_PREFIX}NAME[=ALIAS]")
    return ModelSource(name, cache_dir), RemoteFile(wanted, cache_dir)


def _projectors(specs: tuple[str, ...], names: Sequence[str]) -> dict[str, Path]:
    """By the names of the models that they give eyes to. Raises `ConfigError`."""
    found: dict[str, Path] = {}
    for spec in specs:
        path, name = Path(spec).expanduser(), names[0] if len(names) == 1 else ""
        if not path.is_file() and "=" in spec:
            name, _, file = spec.partition("=")
            path = Path(file).expanduser()
        if not path.is_file():
            raise ConfigError(f"--mmproj {spec}: there is no such file")
        if name not in names or name in found:
            known = ", ".join(names) or "none"
            raise ConfigError(
                f"--mmproj {spec}: say for which model, once for each: --mmproj NAME={path.name} "
                f"(models here: {known})"
            )
        found[name] = path.resolve()
    return found


def _cuts_of(path: str) -> tuple[Cuts | None, int]:
    """Where the model may be cut, and how much of its weights is in no layer: the head's, as the
    rows of tokens are read from the file. Raises `ModelLoadError`."""
    try:
        cuts = cut_points(path)
        head = cut(path, cuts.edges()[-2], cuts.layers)
    except StageError as error:
        logger.info("%s", error)
        return None, 0
    if not cuts.is_exact:
        logger.info("%s: what its stages say may differ from the whole in the last bit", path)
    return cuts, head.edge_bytes


async def run_models(models: tuple[HostedModel, ...]) -> None:
    """Run them all until cancelled."""
    async with trio.open_nursery() as nursery:
        for model in models:
            nursery.start_soon(model.run)


def _session_hashes(sessions: tuple[bytes, ...]) -> bytes:
    """The most recent ones, as adverts carry them."""
    kept = sessions[-SESSIONS_MAX:]
    return b"".join(session_hash(session) for session in kept)
