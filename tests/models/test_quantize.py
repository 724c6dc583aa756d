"""The faster version of a model file, made by llama.cpp in another process."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from gguf_writer import LLAMA, write_gguf

from meshnode.errors import ModelLoadError
from meshnode.models.catalog import resolve
from meshnode.models.gguf import read_header
from meshnode.models.quantize import requantized

DIGEST = "0123456789abcdef" * 4
HANG_S = 120


async def test_q4_1_becomes_q4_0_once(tmp_path: Path) -> None:
    source = resolve("default", tmp_path).path
    with trio.fail_after(HANG_S):
        version = await requantized(source, DIGEST, tmp_path)
        made_at = version.stat().st_mtime_ns
        assert await requantized(source, DIGEST, tmp_path) == version
    assert version.stat().st_mtime_ns == made_at
    assert version.parent == tmp_path / "models" / "cache"
    assert read_header(version).quantization == "Q4_0"
    assert read_header(version).parameters == read_header(source).parameters
    assert [file.name for file in version.parent.iterdir()] == [version.name]


async def test_other_quantizations_stay(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    source.write_bytes(write_gguf())
    assert await requantized(source, DIGEST, tmp_path) == source


async def test_what_llama_cpp_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    source.write_bytes(write_gguf(LLAMA | {"general.file_type": 3, "general.architecture": "x",
                                           "x.context_length": 1, "x.block_count": 1,
                                           "x.embedding_length": 1}))  # fmt: skip
    with trio.fail_after(HANG_S), pytest.raises(ModelLoadError, match=r"tiny\.gguf"):
        await requantized(source, DIGEST, tmp_path)
    assert list((tmp_path / "models" / "cache").iterdir()) == []
