"""How much memory a mesh may plan with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from meshnode.config import KvType
from meshnode.engine import memory
from meshnode.engine.memory import available_bytes, memory_budget_bytes, memory_need
from meshnode.errors import ConfigError
from meshnode.models.gguf import GgufHeader

GIB = 1024**3


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight GiB, six available, no cgroup; the directory is the cgroup's."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 6291456 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def limit_to(cgroup: Path, limit: str, used_bytes: int) -> None:
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (cgroup / "memory.current").write_text(f"{used_bytes}\n")


def test_the_default_leaves_a_quarter(machine: Path) -> None:
    assert memory_budget_bytes(None) == 6 * GIB
    limit_to(machine, "max", GIB)
    assert memory_budget_bytes(None) == 6 * GIB
    limit_to(machine, str(4 * GIB), GIB)
    assert memory_budget_bytes(None) == 3 * GIB


def test_no_more_is_offered_than_there_is(machine: Path) -> None:
    assert memory_budget_bytes(8 * GIB) == 8 * GIB
    with pytest.raises(ConfigError, match=r"8193 MiB, but this machine has 8192 MiB"):
        memory_budget_bytes(8 * GIB + 1)


def test_what_is_available(machine: Path) -> None:
    assert available_bytes() == 6 * GIB
    limit_to(machine, "max", GIB)
    assert available_bytes() == 6 * GIB
    limit_to(machine, str(4 * GIB), GIB)
    assert available_bytes() == 3 * GIB
    limit_to(machine, str(4 * GIB), 5 * GIB)
    assert available_bytes() == 0


@pytest.mark.parametrize(
    ("kv_type", "context_tokens", "kv_mib", "saved_mib"),
    [("f16", 1024, 64, 16), ("q8_0", 1024, 34, 8.5), ("f16", 32768, 2048, 256)],
)
def test_the_cache_and_what_is_saved_of_it_are_reckoned(
    kv_type: KvType, context_tokens: int, kv_mib: float, saved_mib: float
) -> None:
    header = GgufHeader(
        architecture="llama",
        name="m",
        quantization="Q4_0",
        parameters=1,
        context_tokens=32768,
        layers=16,
        embedding_length=512,
        kv_bytes_per_token=64 * 1024,
        has_chat_template=True,
        tensors=1,
        weights_bytes=100 * 2**20,
        size_bytes=100 * 2**20,
    )
    need = memory_need(header, context_tokens, kv_type)
    assert (need.kv_bytes / 2**20, need.saved_bytes / 2**20) == (kv_mib, saved_mib)
    rest = need.weights_bytes + need.compute_bytes + memory.RUNTIME_BYTES
    assert need.total_bytes == rest + need.kv_bytes + need.saved_bytes
    assert f"{math.ceil(saved_mib)} MiB saved KV" in str(need)
