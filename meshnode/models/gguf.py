"""What a GGUF file says of itself, read strictly and within bounds.

Decides whether a file is whole and of a kind that we can run, before llama.cpp maps it: a mapped
file that is shorter than its header says kills the process that touches the missing page. Reads
the header only, never the weights; knows nothing of engines. `read_layout` says where everything
is, for those who cut a file into parts (`stages`).

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3; all
numbers little-endian).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from meshnode.errors import ModelLoadError

# The largest real models have a few thousand tensors and some dozens of keys.
TENSORS_MAX = 65_536
KEYS_MAX = 4_096
NAME_BYTES_MAX = 1_024
# Chat templates are the longest strings that matter; the longest known are about 100 KB.
STRING_BYTES_MAX = 4 * 1024 * 1024
# Vocabularies and merge lists: the largest known have 262 144 entries.
ARRAY_ITEMS_MAX = 4 * 1024 * 1024
# Numeric arrays up to this length are kept (one number per layer); longer ones are skipped.
ARRAY_ITEMS_KEPT_MAX = 1_024
DIMENSIONS_MAX = 4
# A hundred times the largest known model; keeps sums far from any overflow elsewhere.
WEIGHTS_MAX = 2**47
DEFAULT_ALIGNMENT = 32
ALIGNMENT_MAX = 1024 * 1024
# Pixels on a side of what a vision encoder looks at; the largest known take 1 536.
IMAGE_SIDE_MAX = 16_384
# Only `read_layout` keeps a header's bytes; the largest known (262 144 words) has 16 MB.
HEADER_BYTES_MAX = 128 * 1024 * 1024
# The KV cache holds keys and values as 16-bit floats.
KV_CELL_BYTES = 2

# What an expert shard says of itself, in the order of `ShardMark`'s fields.
SHARD_KEYS = ("meshnode.shard.source", "meshnode.shard.kept", "meshnode.shard.of")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY, _BOOL, _UNSIGNED, _SIGNED, _FLOAT = 8, 9, 7, 4, 5, 6
_ARRAY_HEAD_BYTES = 16  # its type, that of its items, and how many there are
_NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}

# ggml_type: (weights per block, bytes per block), from ggml 0.25.
_TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip

# general.file_type (llama_ftype): how most of the weights are stored.
_QUANTIZATIONS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0",
    38: "MXFP4", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip

Value = int | float | bool | str | list[int | float | bool] | None
"""Of a metadata key; None stands for an array of strings, or of too many items."""


@dataclass(frozen=True, slots=True)
class ShardMark:
    """The file is an expert shard: it has `kept` of the `of` experts that each layer has in the
    file with the digest `source`."""

    source: str
    kept: int
    of: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header of a whole, supported file says. Sizes in bytes, context in tokens.

    `kv_bytes_per_token` is what a token costs in the KV cache, over all layers. `embeds`: the file
    says how its vectors are pooled, so it was made for embeddings or reranking, not to generate.
    `shard`: it is only a part of the model that it is named after.
    """

    architecture: str
    name: str
    quantization: str
    parameters: int
    context_tokens: int
    layers: int
    embedding_length: int
    kv_bytes_per_token: int
    has_chat_template: bool
    tensors: int
    weights_bytes: int
    size_bytes: int
    embeds: bool = False
    shard: ShardMark | None = None


@dataclass(frozen=True, slots=True)
class ProjectorHeader:
    """What the header of a projector (an mmproj file) says: it gives a model eyes.

    `compute_bytes` is what looking at one picture takes besides the weights.
    """

    weights_bytes: int
    compute_bytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One line of a file's table of tensors; `offset` counts from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is in a whole file. `values` are the bytes of each key's type and value."""

    architecture: str
    metadata: dict[str, Value]
    values: dict[str, bytes]
    tensors: dict[str, Tensor]
    alignment: int
    size_bytes: int


def read_header(path: str | Path) -> GgufHeader:
    """Read and check a file's header; blocks for a fraction of a second.

    Raises `ModelLoadError`, naming the file and what is wrong with it.
    """
    with _opened(path) as reader:
        return _describe(reader.contents())


def read_projector(path: str | Path) -> ProjectorHeader:
    """As `read_header`, of an mmproj file."""
    with _opened(path) as reader:
        return _describe_projector(reader.contents())


def read_layout(path: str | Path) -> Layout:
    """As `read_header`, and where the file has what; a second for the largest vocabularies."""
    with _opened(path) as reader:
        contents = reader.contents()
        described = _describe(contents)
        return Layout(
            architecture=described.architecture,
            metadata=contents.metadata,
            values={key: reader.between(*span) for key, span in contents.spans.items()},
            tensors=contents.tensors,
            alignment=contents.alignment,
            size_bytes=contents.size_bytes,
        )


def value_bytes(value: bool | int | float | str | list[bool] | list[int]) -> bytes:
    """A key's type and value as a file has them; whole numbers are 32-bit ones."""
    match value:
        case bool():
            return _U32.pack(_BOOL) + _NUMBERS[_BOOL].pack(value)
        case int():
            return _U32.pack(_UNSIGNED) + _U32.pack(value)
        case float():
            return _U32.pack(_FLOAT) + _NUMBERS[_FLOAT].pack(value)
        case str():
            return _U32.pack(_STRING) + string_bytes(value)
        case list():
            kind = _BOOL if all(type(item) is bool for item in value) else _SIGNED
            items = b"".join(_NUMBERS[kind].pack(item) for item in value)
            return _U32.pack(_ARRAY) + _U32.pack(kind) + _U64.pack(len(value)) + items


def string_bytes(text: str) -> bytes:
    """A string as a file has it: its length goes before it."""
    data = text.encode()
    return _U64.pack(len(data)) + data


def head_bytes(values: Mapping[str, bytes], table: Sequence[bytes]) -> bytes:
    """A file's beginning, of values as `Layout.values` has them and lines of `table_line`."""
    head = _MAGIC + _U32.pack(_VERSIONS[-1]) + _U64.pack(len(table)) + _U64.pack(len(values))
    head += b"".join(string_bytes(key) + value for key, value in values.items())
    return head + b"".join(table)


def table_line(name: str, kind: int, shape: tuple[int, ...], offset: int) -> bytes:
    """A tensor's line in the table; `offset` counts from where the weights begin."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string_bytes(name) + dimensions + struct.pack("<IQ", kind, offset)


def tensor_bytes(kind: int, shape: tuple[int, ...]) -> int:
    """How much a tensor of a known type and a possible shape takes in a file."""
    block_elements, block_bytes = _TENSOR_TYPES[kind]
    return math.prod(shape) // block_elements * block_bytes


def aligned(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` from `offset` on."""
    return -(-offset // alignment) * alignment


def array_slice(value: bytes, first: int, end: int) -> bytes:
    """Items `first` to `end - 1` of an array of numbers, both as `Layout.values` has them."""
    kind = _U32.unpack_from(value, 4)[0]
    size = _NUMBERS[kind].size
    items = value[_ARRAY_HEAD_BYTES:]
    return value[:8] + _U64.pack(end - first) + items[first * size : end * size]


def array_length(value: bytes) -> int:
    """Of an array of numbers, as `Layout.values` has it; 0 for whatever else it is."""
    if _U32.unpack_from(value)[0] != _ARRAY or _U32.unpack_from(value, 4)[0] not in _NUMBERS:
        return 0
    length: int = _U64.unpack_from(value, 8)[0]
    return length


@contextmanager
def _opened(path: str | Path) -> Iterator[_Reader]:
    try:
        with open(path, "rb") as file:
            yield _Reader(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
    except _BadFileError as error:
        raise ModelLoadError(f"{path} is not a usable GGUF file: {error}.") from error


class _BadFileError(Exception):
    """What is wrong with the file, without its name."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """A header, read and checked."""

    metadata: dict[str, Value]
    spans: dict[str, tuple[int, int]]
    tensors: dict[str, Tensor]
    alignment: int
    parameters: int
    weights_bytes: int
    size_bytes: int


class _Reader:
    """One pass over the header. No allocation is larger than a bound above."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file = file
        self._size_bytes = size_bytes

    def contents(self) -> _Contents:
        if self._bytes(4) != _MAGIC:
            raise _BadFileError("it does not begin with GGUF")
        version = self._u32()
        if version not in _VERSIONS:
            raise _BadFileError(f"GGUF version {version} is not supported (2 and 3 are)")
        tensors = self._bounded(self._u64(), TENSORS_MAX, "tensors")
        keys = self._bounded(self._u64(), KEYS_MAX, "metadata keys")
        metadata: dict[str, Value] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(keys):
            key = self._string(NAME_BYTES_MAX)
            first = self._file.tell()
            metadata[key] = self._value(self._u32(), key)
            spans[key] = (first, self._file.tell())
        alignment = _alignment(metadata)
        table = self._tensors(tensors, alignment)
        return _Contents(
            metadata=metadata,
            spans=spans,
            tensors=table,
            alignment=alignment,
            parameters=sum(math.prod(tensor.shape) for tensor in table.values()),
            weights_bytes=sum(tensor.size_bytes for tensor in table.values()),
            size_bytes=self._size_bytes,
        )

    def between(self, first: int, end: int) -> bytes:
        """Bytes of the header once more, as they are."""
        if end > HEADER_BYTES_MAX:
            raise _BadFileError(f"its header is larger than {HEADER_BYTES_MAX} bytes")
        self._file.seek(first)
        return self._bytes(end - first)

    # -- metadata ------------------------------------------------------------------------------

    def _value(self, kind: int, key: str) -> Value:
        if kind in _NUMBERS:
            return self._number(kind)
        if kind == _STRING:
            return self._string(STRING_BYTES_MAX)
        if kind == _ARRAY:
            return self._array(key)
        raise _BadFileError(f"the metadata key {key!r} has the unknown type {kind}")

    def _array(self, key: str) -> list[int | float | bool] | None:
        """A short array of numbers; any other one is checked and skipped."""
        kind = self._u32()
        count = self._bounded(self._u64(), ARRAY_ITEMS_MAX, f"items in {key!r}")
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._bounded(self._u64(), STRING_BYTES_MAX, f"bytes in {key!r}"))
            return None
        if kind not in _NUMBERS:
            raise _BadFileError(f"the array {key!r} has the unknown type {kind}")
        if count <= ARRAY_ITEMS_KEPT_MAX:
            return [self._number(kind) for _ in range(count)]
        self._skip(count * _NUMBERS[kind].size)
        return None

    # -- tensors -------------------------------------------------------------------------------

    def _tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        """The table of tensors, each of which lies within the file."""
        if count == 0:
            raise _BadFileError("it has no tensors")
        listed: dict[str, Tensor] = {}
        for _ in range(count):
            tensor = self._tensor()
            if tensor.name in listed:
                raise _BadFileError(f"it has two tensors named {tensor.name!r}")
            if tensor.offset % alignment:
                raise _BadFileError(f"the tensor {tensor.name!r} is not aligned")
            listed[tensor.name] = tensor
        data_start = aligned(self._file.tell(), alignment)
        expected = data_start + max(item.offset + item.size_bytes for item in listed.values())
        if expected > self._size_bytes:
            missing = expected - self._size_bytes
            raise _BadFileError(
                f"it is truncated: {missing} of {expected} bytes are missing; download it again"
            )
        return {
            name: replace(tensor, offset=data_start + tensor.offset)
            for name, tensor in listed.items()
        }

    def _tensor(self) -> Tensor:
        """The next line of the table; its offset still counts from where the weights begin."""
        name = self._string(NAME_BYTES_MAX)
        dimensions = self._u32()
        if not 1 <= dimensions <= DIMENSIONS_MAX:
            raise _BadFileError(f"the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._u64() for _ in range(dimensions))
        kind = self._u32()
        if kind not in _TENSOR_TYPES:
            raise _BadFileError(f"the tensor {name!r} has the unknown type {kind}")
        if not 0 < math.prod(shape) <= WEIGHTS_MAX or shape[0] % _TENSOR_TYPES[kind][0]:
            raise _BadFileError(f"the tensor {name!r} has the impossible shape {list(shape)}")
        return Tensor(name, shape, kind, self._u64(), tensor_bytes(kind, shape))

    # -- primitives ----------------------------------------------------------------------------

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise _BadFileError("it ends within its header")
        return data

    def _skip(self, count: int) -> None:
        if self._file.seek(count, os.SEEK_CUR) > self._size_bytes:
            raise _BadFileError("it ends within its header")

    def _u32(self) -> int:
        value: int = _U32.unpack(self._bytes(4))[0]
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack(self._bytes(8))[0]
        return value

    def _number(self, kind: int) -> int | float | bool:
        form = _NUMBERS[kind]
        value: int | float | bool = form.unpack(self._bytes(form.size))[0]
        return value

    def _string(self, bytes_max: int) -> str:
        length = self._bounded(self._u64(), bytes_max, "bytes in a string")
        return self._bytes(length).decode("utf-8", "replace")

    def _bounded(self, count: int, largest: int, what: str) -> int:
        if count > largest:
            raise _BadFileError(f"its header claims {count} {what}; at most {largest} make sense")
        return count


def _describe(contents: _Contents) -> GgufHeader:
    metadata = contents.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _BadFileError("it does not say its architecture")
    if _whole(metadata, "split.count", 1) > 1:
        raise _BadFileError("it is one part of a split model; merge the parts into one file first")
    context_tokens = _whole(metadata, f"{architecture}.context_length", 0)
    layers = _whole(metadata, f"{architecture}.block_count", 0)
    embedding_length = _whole(metadata, f"{architecture}.embedding_length", 0)
    if not (context_tokens and layers and embedding_length):
        raise _BadFileError(f"it lacks the sizes of a {architecture} model")
    name = metadata.get("general.name")
    return GgufHeader(
        architecture=architecture,
        name=name if isinstance(name, str) else "",
        quantization=_QUANTIZATIONS.get(_whole(metadata, "general.file_type", -1), "unknown"),
        parameters=contents.parameters,
        context_tokens=context_tokens,
        layers=layers,
        embedding_length=embedding_length,
        kv_bytes_per_token=_kv_bytes_per_token(metadata, architecture, layers, embedding_length),
        has_chat_template=isinstance(metadata.get("tokenizer.chat_template"), str),
        tensors=len(contents.tensors),
        weights_bytes=contents.weights_bytes,
        size_bytes=contents.size_bytes,
        embeds=_whole(metadata, f"{architecture}.pooling_type", 0) > 0,
        shard=_shard_mark(metadata),
    )


def _shard_mark(metadata: dict[str, Value]) -> ShardMark | None:
    source, kept, of = (metadata.get(key) for key in SHARD_KEYS)
    if source is None and kept is None and of is None:
        return None
    if not isinstance(source, str) or type(kept) is not int or type(of) is not int:
        raise _BadFileError("it does not say clearly which experts of which model it has")
    return ShardMark(source, kept, of)


def _describe_projector(contents: _Contents) -> ProjectorHeader:
    metadata = contents.metadata
    if metadata.get("general.architecture") != "clip":
        raise _BadFileError("it is no projector (mmproj)")
    if metadata.get("clip.has_vision_encoder") is not True:
        raise _BadFileError("it has no eyes (no vision encoder)")
    side = _whole(metadata, "clip.vision.image_size", 0)
    patch = _whole(metadata, "clip.vision.patch_size", 0)
    width = _whole(metadata, "clip.vision.embedding_length", 0)
    wide = _whole(metadata, "clip.vision.feed_forward_length", 0)
    if not (side and patch and width and wide) or side > IMAGE_SIDE_MAX:
        raise _BadFileError("it lacks the sizes of a vision encoder")
    # Of one layer at a time, in float32: a few vectors of each width, for every patch.
    compute_bytes = (side // patch) ** 2 * (8 * width + 2 * wide) * 4
    return ProjectorHeader(contents.weights_bytes, compute_bytes)


def _kv_bytes_per_token(
    metadata: dict[str, Value], architecture: str, layers: int, embedding_length: int
) -> int:
    """Over all layers; an upper bound for architectures that do not say their heads."""
    if metadata.get(f"{architecture}.attention.causal") is False:
        return 0  # an encoder: it sees all at once, and keeps nothing
    heads = max(1, _largest(metadata, f"{architecture}.attention.head_count", 1))
    head_size = -(-embedding_length // heads)
    key_size = _whole(metadata, f"{architecture}.attention.key_length", head_size)
    value_size = _whole(metadata, f"{architecture}.attention.value_length", head_size)
    kv_heads = metadata.get(f"{architecture}.attention.head_count_kv")
    if isinstance(kv_heads, list):  # one number per layer
        total_heads = sum(int(count) for count in kv_heads if math.isfinite(count))
    else:
        total_heads = layers * _whole(metadata, f"{architecture}.attention.head_count_kv", heads)
    return total_heads * (key_size + value_size) * KV_CELL_BYTES


def _whole(metadata: dict[str, Value], key: str, default: int) -> int:
    value = metadata.get(key)
    return value if type(value) is int and value >= 0 else default


def _largest(metadata: dict[str, Value], key: str, default: int) -> int:
    value = metadata.get(key)
    if isinstance(value, list):
        return max((item for item in value if type(item) is int), default=default)
    return _whole(metadata, key, default)


def _alignment(metadata: dict[str, Value]) -> int:
    alignment = _whole(metadata, "general.alignment", DEFAULT_ALIGNMENT)
    if not 1 <= alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
        raise _BadFileError(f"its alignment is {alignment}")
    return alignment
