"""Whether a model fits into this machine's memory: estimated before anything is loaded.

A kernel that runs out of memory kills the largest process; saying so first, with the arithmetic,
is kinder. Also decides how much of the memory a mesh may plan with; does not know what it plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from meshnode.config import KvType
from meshnode.errors import ConfigError, ModelLoadError
from meshnode.models.gguf import GgufHeader, ProjectorHeader
from meshnode.models.stages import Stage

# Python, numpy, llama.cpp's libraries and the vocabulary: 120 MB measured with a small model.
RUNTIME_BYTES = 128 * 1024**2
# Activations of one compute pass: 512 tokens of about 16 float32 vectors of the embedding's size.
COMPUTE_STEP_TOKENS = 512
COMPUTE_BYTES_PER_EMBEDDING = COMPUTE_STEP_TOKENS * 16 * 4
# A block of 32 values takes 34 bytes as q8_0 and 64 as f16.
KV_TYPE_BYTES_PER_F16 = {"f16": Fraction(1), "q8_0": Fraction(34, 64)}
# What was preempted, evicted or put aside may take this part of the cache's size outside of it, and
# no more than this: all of it, since prompts are computed faster while idle sessions are not there.
SAVED_PART = 1
SAVED_BYTES_MAX = 256 * 1024**2
LOGIT_BYTES = 4
# A stage's weights twice, and as much again for its KV and for everybody else.
STAGE_ROOM = 3
# The largest picture while it is decoded, scaled and cut: about 16 million pixels, 4 bytes, twice.
PICTURE_BYTES = 128 * 1024**2
# Beyond this a default context costs more memory than most conversations use.
CONTEXT_TOKENS_DEFAULT = 8192
# The default budget is three quarters: a desktop's own programs and the page cache need the rest.
BUDGET_QUARTERS = 3

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes by purpose."""

    weights_bytes: int
    kv_bytes_per_token: int
    compute_bytes: int
    context_tokens: int
    draft_bytes: int = 0
    vision_bytes: int = 0
    saves: bool = True

    @property
    def kv_bytes(self) -> int:
        return self.kv_bytes_per_token * self.context_tokens

    @property
    def saved_bytes(self) -> int:
        """KV outside of the cache, at most."""
        if not self.saves:
            return 0
        return min(self.kv_bytes // SAVED_PART, SAVED_BYTES_MAX)

    @property
    def total_bytes(self) -> int:
        own_bytes = self.weights_bytes + self.kv_bytes + self.saved_bytes + self.compute_bytes
        return own_bytes + self.draft_bytes + self.vision_bytes + RUNTIME_BYTES

    def __str__(self) -> str:
        draft = f"{_mib(self.draft_bytes)} draft model + " if self.draft_bytes else ""
        vision = f"{_mib(self.vision_bytes)} vision + " if self.vision_bytes else ""
        return (
            f"{_mib(self.weights_bytes)} weights + {_mib(self.kv_bytes)} KV cache for "
            f"{self.context_tokens} tokens + {_mib(self.saved_bytes)} saved KV + "
            f"{_mib(self.compute_bytes)} compute buffers + "
            f"{draft}{vision}{_mib(RUNTIME_BYTES)} runtime = {_mib(self.total_bytes)}"
        )


@dataclass(frozen=True, slots=True)
class StageNeed:
    """Bytes by purpose, of a stage that is not the last. `lookup_bytes` are the rows of tokens."""

    weights_bytes: int
    lookup_bytes: int
    kv_bytes_per_token: int
    compute_bytes: int
    context_tokens: int

    @property
    def total_bytes(self) -> int:
        kv_bytes = self.kv_bytes_per_token * self.context_tokens
        own_bytes = self.weights_bytes + self.lookup_bytes + kv_bytes + self.compute_bytes
        return own_bytes + RUNTIME_BYTES

    def __str__(self) -> str:
        lookup = f"{_mib(self.lookup_bytes)} rows of tokens + " if self.lookup_bytes else ""
        return (
            f"{_mib(self.weights_bytes)} weights + {lookup}"
            f"{_mib(self.kv_bytes_per_token * self.context_tokens)} KV cache for "
            f"{self.context_tokens} tokens + {_mib(self.compute_bytes)} compute buffers + "
            f"{_mib(RUNTIME_BYTES)} runtime = {_mib(self.total_bytes)}"
        )


def context_for(path: str, header: GgufHeader, wanted_tokens: int | None) -> int:
    """The context to load with, in tokens: as wanted, or the smaller of trained and default.

    Raises `ModelLoadError` if the model was not trained for as much as is wanted. What is wanted
    of a node's models that chat is no reason to refuse one for embeddings, which are often short.
    """
    if wanted_tokens is not None and header.embeds:
        return min(header.context_tokens, wanted_tokens)
    if wanted_tokens is None:
        return min(header.context_tokens, CONTEXT_TOKENS_DEFAULT)
    if wanted_tokens > header.context_tokens:
        raise ModelLoadError(
            f"{path} was trained for {header.context_tokens} tokens; "
            f"a context of {wanted_tokens} would give nonsense."
        )
    return wanted_tokens


def draft_context(draft: GgufHeader, context_tokens: int) -> int:
    """The context of a draft model, in tokens; beyond what it was trained for it is not asked."""
    return min(draft.context_tokens, context_tokens)


def memory_need(
    header: GgufHeader,
    context_tokens: int,
    draft: GgufHeader | None = None,
    projector: ProjectorHeader | None = None,
    *,
    kv_type: KvType = "f16",
) -> MemoryNeed:
    """What an engine for this file would use, with its draft model and its projector; rounded up
    rather than down. The draft model's cache is f16.
    """
    vision_bytes = 0
    if projector is not None:
        vision_bytes = projector.weights_bytes + projector.compute_bytes + PICTURE_BYTES
    draft_bytes = 0
    if draft is not None:
        beside = memory_need(draft, draft_context(draft, context_tokens))
        draft_bytes = beside.weights_bytes + beside.kv_bytes + beside.compute_bytes
    return MemoryNeed(
        weights_bytes=header.weights_bytes,
        kv_bytes_per_token=math.ceil(header.kv_bytes_per_token * KV_TYPE_BYTES_PER_F16[kv_type]),
        compute_bytes=header.embedding_length * COMPUTE_BYTES_PER_EMBEDDING,
        context_tokens=context_tokens,
        draft_bytes=draft_bytes,
        vision_bytes=vision_bytes,
    )


def stage_need(
    header: GgufHeader, stage: Stage, context_tokens: int, *, kv_type: KvType = "f16"
) -> StageNeed:
    """What a stage of this file would use; its layers take their share of the whole model's KV."""
    part = Fraction(stage.end - stage.first, stage.layers)
    kv_bytes_per_token = header.kv_bytes_per_token * KV_TYPE_BYTES_PER_F16[kv_type] * part
    return StageNeed(
        weights_bytes=stage.source_bytes,
        lookup_bytes=stage.lookup.count * stage.lookup.row_bytes if stage.is_first else 0,
        kv_bytes_per_token=math.ceil(kv_bytes_per_token),
        compute_bytes=stage.width * COMPUTE_BYTES_PER_EMBEDDING,
        context_tokens=context_tokens,
    )


def head_need(whole: MemoryNeed, stage: Stage) -> MemoryNeed:
    """What the last stage of a model would use, as an engine; it saves no KV."""
    part = Fraction(stage.end - stage.first, stage.layers)
    return replace(
        whole,
        weights_bytes=stage.source_bytes,
        kv_bytes_per_token=math.ceil(whole.kv_bytes_per_token * part),
        saves=False,
    )


def prefers_disk(stage: Stage, available_bytes: int) -> bool:
    """Whether the file that a stage is loaded from had better be on disk.

    A stage is copied out of the whole model, and llama.cpp makes a second copy of the weights that
    it arranges anew for this CPU. In memory the first can never be dropped.
    """
    return available_bytes < STAGE_ROOM * stage.source_bytes


def check_fits(path: str, need: MemoryNeed | StageNeed, available_bytes: int) -> None:
    """Raises `ModelLoadError` with the arithmetic if the need is larger than what there is."""
    if need.total_bytes > available_bytes:
        raise ModelLoadError(
            f"{path} does not fit into memory: it needs {need}, and {_mib(available_bytes)} are "
            "available. Use a smaller context or a smaller quantization of the model."
        )


def check_embedding_fits(
    path: str,
    header: GgufHeader,
    context_tokens: int,
    step_tokens: int,
    vocabulary_size: int,
    available_bytes: int,
) -> None:
    """Whether a loaded model may get a second context, for embeddings.

    Raises `ModelLoadError` with the arithmetic. Each token of a step has a row of logits, once
    where they are computed and once where llama.cpp keeps them for its caller.
    """
    kv_bytes = header.kv_bytes_per_token * context_tokens
    steps = -(-step_tokens // COMPUTE_STEP_TOKENS)
    compute_bytes = header.embedding_length * COMPUTE_BYTES_PER_EMBEDDING * steps
    compute_bytes += 2 * LOGIT_BYTES * vocabulary_size * step_tokens
    if kv_bytes + compute_bytes > available_bytes:
        raise ModelLoadError(
            f"There is no room for embeddings of {path}: they need {_mib(kv_bytes)} KV cache for "
            f"{context_tokens} tokens + {_mib(compute_bytes)} compute buffers, and "
            f"{_mib(available_bytes)} are available."
        )


def memory_budget_bytes(configured_bytes: int | None) -> int:
    """What this node offers to its mesh for models: as configured, or the default share.

    Raises `ConfigError` if the machine has less than what is configured.
    """
    total_bytes = _total_bytes()
    if configured_bytes is None:
        return total_bytes * BUDGET_QUARTERS // 4
    if configured_bytes > total_bytes:
        raise ConfigError(
            f"memory is set to {_mib(configured_bytes)}, but this machine has "
            f"{_mib(total_bytes)}: offer less, and leave some to everything else that runs here"
        )
    return configured_bytes


def available_bytes() -> int:
    """What the kernel can give without swapping, bounded by the cgroup's limit."""
    available = _meminfo_bytes("MemAvailable")
    limit = _cgroup_limit_bytes()
    if limit is None:
        return available
    used = int((_CGROUP / "memory.current").read_text())
    return min(available, max(0, limit - used))


def _total_bytes() -> int:
    """The machine's memory, or the cgroup's limit if that is lower."""
    total = _meminfo_bytes("MemTotal")
    limit = _cgroup_limit_bytes()
    return total if limit is None else min(total, limit)


def _meminfo_bytes(key: str) -> int:
    lines = _MEMINFO.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _cgroup_limit_bytes() -> int | None:
    """None without cgroup v2 or without a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else int(limit)


def _mib(size_bytes: int) -> str:
    return f"{-(-size_bytes // 1024**2)} MiB"
