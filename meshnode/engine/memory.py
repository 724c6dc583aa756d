"""Whether a model fits into this machine's memory: estimated before anything is loaded.

A kernel that runs out of memory kills the largest process; saying so first, with the arithmetic,
is kinder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import ModelLoadError
from meshnode.models.gguf import GgufHeader

# Python, numpy, llama.cpp's libraries and the vocabulary: 120 MB measured with a small model.
RUNTIME_BYTES = 128 * 1024**2
# Activations of one compute pass: 512 tokens of about 16 float32 vectors of the embedding's size.
COMPUTE_BYTES_PER_EMBEDDING = 512 * 16 * 4

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes by purpose."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    context_tokens: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + RUNTIME_BYTES

    def __str__(self) -> str:
        return (
            f"{_mib(self.weights_bytes)} weights + {_mib(self.kv_bytes)} KV cache for "
            f"{self.context_tokens} tokens + {_mib(self.compute_bytes)} compute buffers + "
            f"{_mib(RUNTIME_BYTES)} runtime = {_mib(self.total_bytes)}"
        )


def memory_need(header: GgufHeader, context_tokens: int) -> MemoryNeed:
    """What an engine for this file would use, rounded up rather than down."""
    return MemoryNeed(
        weights_bytes=header.weights_bytes,
        kv_bytes=header.kv_bytes_per_token * context_tokens,
        compute_bytes=header.embedding_length * COMPUTE_BYTES_PER_EMBEDDING,
        context_tokens=context_tokens,
    )


def check_fits(path: str, need: MemoryNeed, available_bytes: int) -> None:
    """Raises `ModelLoadError` with the arithmetic if the need is larger than what there is."""
    if need.total_bytes > available_bytes:
        raise ModelLoadError(
            f"{path} does not fit into memory: it needs {need}, and {_mib(available_bytes)} are "
            "available. Use a smaller context or a smaller quantization of the model."
        )


def available_bytes() -> int:
    """What the kernel can give without swapping, bounded by the cgroup's limit."""
    lines = _MEMINFO.read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:  # no cgroup v2 here
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def _mib(size_bytes: int) -> str:
    return f"{-(-size_bytes // 1024**2)} MiB"
