"""How much memory a mesh may plan with."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.config import KvType
from meshnode.engine import memory
from meshnode.engine.memory import (
    available_bytes,
    check_embedding_fits,
    check_fits,
    context_for,
    draft_context,
    memory_budget_bytes,
    memory_need,
)
from meshnode.errors import ConfigError, ModelLoadError
from meshnode.models.catalog import DEFAULT_ALIAS, resolve
from meshnode.models.gguf import GgufHeader, ProjectorHeader, read_header

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


def test_eyes_count(tmp_path: Path) -> None:
    header = read_header(resolve("default", tmp_path).path)
    blind = memory_need(header, 1000)
    seeing = memory_need(header, 1000, projector=ProjectorHeader(GIB, 100))
    assert seeing.total_bytes - blind.total_bytes == GIB + 100 + memory.PICTURE_BYTES
    check_fits("model", blind, GIB)
    with pytest.raises(ModelLoadError, match="1153 MiB vision"):
        check_fits("model", seeing, GIB)


@pytest.mark.parametrize(
    ("kv_type", "context_tokens", "kv_mib", "saved_mib"),
    [("f16", 1024, 64, 64), ("q8_0", 1024, 34, 34), ("f16", 32768, 2048, 256)],
)
def test_the_cache_and_what_is_saved_of_it_are_reckoned(
    kv_type: KvType, context_tokens: int, kv_mib: float, saved_mib: float
) -> None:
    need = memory_need(
        replace(header(), kv_bytes_per_token=64 * 1024), context_tokens, kv_type=kv_type
    )
    assert (need.kv_bytes / 2**20, need.saved_bytes / 2**20) == (kv_mib, saved_mib)
    rest = need.weights_bytes + need.compute_bytes + memory.RUNTIME_BYTES
    assert need.total_bytes == rest + need.kv_bytes + need.saved_bytes
    assert f"{math.ceil(saved_mib)} MiB saved KV" in str(need)


def header(*, embeds: bool = False) -> GgufHeader:
    return GgufHeader("llama", "m", "F16", 1, 512, 2, 64, 1024, True, 1, 1, 1, embeds)


def test_a_context_beyond_training_is_cut_for_embeddings_only() -> None:
    assert context_for("m", header(embeds=True), 2048) == 512
    assert context_for("m", header(embeds=True), 128) == 128
    with pytest.raises(ModelLoadError, match="nonsense"):
        context_for("m", header(), 2048)


def test_the_second_context_must_fit() -> None:
    """1 MiB of KV cache, 4 MiB of activations for two steps, 16 MiB of logits, twice."""
    check_embedding_fits("m", header(), 1024, 1024, 4096, 37 * 1024**2)
    with pytest.raises(ModelLoadError, match=r"1 MiB KV cache.*36 MiB compute.*36 MiB are"):
        check_embedding_fits("m", header(), 1024, 1024, 4096, 36 * 1024**2)


def test_a_draft_model_is_counted_once_with_its_own_context(tmp_path: Path) -> None:
    header = read_header(resolve(DEFAULT_ALIAS, tmp_path).path)
    small = replace(header, context_tokens=256)
    alone = memory_need(header, 1024)
    assert draft_context(small, 1024) == 256
    both = memory_need(header, 1024, small)
    expected = alone.weights_bytes + alone.kv_bytes // 4 + alone.compute_bytes
    assert both.total_bytes - alone.total_bytes == both.draft_bytes == expected
    assert "draft model" not in str(alone)
    with pytest.raises(ModelLoadError, match=r"\d+ MiB draft model"):
        check_fits("x.gguf", both, alone.total_bytes)
