"""How much memory a mesh may plan with."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.engine import memory
from meshnode.engine.memory import available_bytes, check_fits, memory_budget_bytes, memory_need
from meshnode.errors import ConfigError, ModelLoadError
from meshnode.models.catalog import resolve
from meshnode.models.gguf import ProjectorHeader, read_header

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
    seeing = memory_need(header, 1000, ProjectorHeader(GIB, 100))
    assert seeing.total_bytes - blind.total_bytes == GIB + 100 + memory.PICTURE_BYTES
    check_fits("model", blind, GIB)
    with pytest.raises(ModelLoadError, match="1153 MiB vision"):
        check_fits("model", seeing, GIB)
