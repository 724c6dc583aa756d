"""Files of strangers: a header is either understood or refused with a reason."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import LLAMA, TENSORS, Tensor, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshnode.errors import ModelLoadError
from meshnode.models.catalog import resolve
from meshnode.models.gguf import GgufHeader, read_header

# The fixture's directory is shared by all examples of a test: each overwrites the file.
SHARED_PATH = [HealthCheck.function_scoped_fixture]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def read(path: Path, data: bytes) -> GgufHeader:
    path.write_bytes(data)
    return read_header(path)


def test_a_small_file(path: Path) -> None:
    data = write_gguf()
    assert read(path, data) == GgufHeader(
        architecture="llama",
        name="Tiny",
        quantization="Q4_0",
        parameters=192,
        context_tokens=512,
        layers=2,
        embedding_length=64,
        kv_bytes_per_token=2 * 2 * (16 + 16) * 2,
        has_chat_template=True,
        tensors=2,
        weights_bytes=72 + 256,
        size_bytes=len(data),
    )


def test_the_default_model(tmp_path: Path) -> None:
    header = read_header(resolve("default", tmp_path).path)
    assert (header.architecture, header.quantization, header.layers) == ("llama", "Q4_1", 30)
    assert header.parameters == 134_515_008
    assert header.kv_bytes_per_token == 23_040  # as measured
    assert header.has_chat_template


def test_heads_per_layer_and_their_sizes(path: Path) -> None:
    metadata = LLAMA | {
        "llama.attention.head_count_kv": [1, 3],
        "llama.attention.key_length": 10,
        "llama.attention.value_length": 20,
    }
    assert read(path, write_gguf(metadata)).kv_bytes_per_token == (1 + 3) * (10 + 20) * 2


def test_models_for_embeddings(path: Path) -> None:
    header = read(path, write_gguf(LLAMA | {"llama.pooling_type": 3}))
    assert (header.embeds, header.kv_bytes_per_token > 0) == (True, True)
    header = read(path, write_gguf(LLAMA | {"llama.attention.causal": False}))
    assert (header.embeds, header.kv_bytes_per_token) == (False, 0)


def test_unknown_keys_and_the_older_version_are_fine(path: Path) -> None:
    metadata = LLAMA | {"x.flag": True, "x.number": 1.5, "x.many": list(range(5000))}
    assert read(path, write_gguf(metadata, version=2)).name == "Tiny"


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in LLAMA.items() if name != key}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends within its header"),
        (b"not a model", "does not begin with GGUF"),
        (bytes(1000), "does not begin with GGUF"),
        (write_gguf(version=1), "version 1 is not supported"),
        (write_gguf(version=4), "version 4 is not supported"),
        (write_gguf()[:40], "ends within its header"),
        (write_gguf()[:-1], "truncated: 1 of"),
        (write_gguf(tensors=()), "no tensors"),
        (write_gguf(tensors=(TENSORS[0], TENSORS[0])), "two tensors named 'a'"),
        (write_gguf(tensors=(Tensor("a", kind=4),)), "unknown type 4"),
        (write_gguf(tensors=(Tensor("a", kind=999),)), "unknown type 999"),
        (write_gguf(tensors=(Tensor("a", (33,)),)), "impossible shape"),
        (write_gguf(tensors=(Tensor("a", (64, 0)),)), "impossible shape"),
        (write_gguf(tensors=(Tensor("a", (2**62, 2**62)),)), "impossible shape"),
        (write_gguf(tensors=(Tensor("a", (64, 1, 1, 1, 1)),)), "5 dimensions"),
        (write_gguf(tensors=(Tensor("a", offset=8),)), "not aligned"),
        (write_gguf(LLAMA | {"general.alignment": 24}), "alignment is 24"),
        (write_gguf(LLAMA | {"general.alignment": 0}), "alignment is 0"),
        (write_gguf(LLAMA | {"split.count": 3}), "one part of a split model"),
        (write_gguf(without("general.architecture")), "does not say its architecture"),
        (write_gguf(without("llama.context_length")), "lacks the sizes"),
        (write_gguf(without("llama.block_count")), "lacks the sizes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 1), "claims 9223372036854775808 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**63), "metadata keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**62), "bytes in a string"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 1, 1, b"k", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 1, 1, b"k", 9, 9, 1), "unknown type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 1, 1, b"k", 9, 8, 2**60), "items in 'k'"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 1, 1, b"k", 9, 4, 4096), "within its header"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_reason(path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason) as error:
        read(path, data)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"gone\.gguf cannot be read"):
        read_header(tmp_path / "gone.gguf")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_header(tmp_path)


def test_a_truncated_tensor_far_beyond_the_file(path: Path) -> None:
    tensors = (replace(TENSORS[0], offset=2**40 * 32), TENSORS[1])
    data = write_gguf(tensors=(TENSORS[0],))
    with pytest.raises(ModelLoadError, match="truncated"):
        read(path, data[:0] + write_header_only(tensors))


def write_header_only(tensors: tuple[Tensor, ...]) -> bytes:
    """A header that places its first tensor far away, without writing all that is between."""
    far = tensors[0].offset
    assert far is not None
    near = replace(tensors[0], offset=2**20)
    data = write_gguf(tensors=(near,))
    return data.replace(struct.pack("<Q", 2**20), struct.pack("<Q", far), 1)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.none() | st.integers(0, 900),
)
def test_any_damage_is_read_or_refused(
    path: Path, changes: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(write_gguf())
    for position, value in changes:
        data[position % len(data)] = value
    try:
        header = read(path, bytes(data[:cut]))
    except ModelLoadError as error:
        assert str(path) in str(error)  # noqa: PT017  # either outcome is right
    else:
        assert header.weights_bytes <= header.size_bytes * 2
        assert header.layers > 0


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(path: Path, data: bytes) -> None:
    with pytest.raises(ModelLoadError):
        read(path, b"GGUF\x03\0\0\0" + data)
