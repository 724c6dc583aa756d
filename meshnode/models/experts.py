"""An expert shard: a mixture-of-experts file with some experts of every layer, and all the rest.

Decides which files may be cut so and which bytes a shard consists of. Experts are the outermost
dimension of their tensors, so a shard is ranges of the source under a new header; no weight is
computed anew. Does not know which experts are worth keeping (`ranking.py`), nor how good the
result is (`receipt.py`). The router of a shard chooses among what is there: it is another model.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from meshnode.errors import ModelLoadError, ShardError
from meshnode.models.gguf import (
    SHARD_KEYS,
    Layout,
    ShardMark,
    Tensor,
    aligned,
    read_layout,
    string_bytes,
    value_bytes,
)

# Each was cut and permuted as a random model of its kind: all experts, in any order, answer alike.
ARCHITECTURES = frozenset({
    "afmoe", "bailingmoe2", "dbrx", "deepseek", "deepseek2", "dots1", "ernie4_5-moe", "exaone-moe",
    "glm4moe", "gpt-oss", "granitemoe", "grok", "hunyuan-moe", "llama", "llama4", "minimax-m2",
    "olmoe", "phimoe", "qwen2moe", "qwen3moe", "qwen3next",
})  # fmt: skip
_REFUSED = {"smallthinker": "permuting its experts changes its answers"}
# `blk.7.ffn_up_exps.weight`: parts whose outermost dimension is the layer's experts.
_BY_EXPERT = frozenset({
    "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps", "ffn_gate_inp",
    "exp_probs_b",
})  # fmt: skip
_COUNT, _USED, _GROUPS = "expert_count", "expert_used_count", "expert_group_count"
_VERSION = 3
# So much is copied at once; the kernel does it.
_COPY_BYTES = 16 * 1024 * 1024

Kept = Mapping[int, Sequence[int]]
"""By layer: the experts to keep, as the source numbers them."""


@dataclass(frozen=True, slots=True)
class Experts:
    """What a file that may be cut says of its experts; `layers` are those that have some."""

    layout: Layout
    count: int
    used: int
    layers: tuple[int, ...]


def read_experts(path: Path) -> Experts:
    """Raises `ModelLoadError` for a bad file, `ShardError` for one that may not be cut."""
    layout = read_layout(path)
    architecture, metadata = layout.architecture, layout.metadata
    count, used = (metadata.get(f"{architecture}.{key}", 0) for key in (_COUNT, _USED))
    if type(count) is not int or type(used) is not int or not 0 < used <= count:
        raise ShardError(f"{path} has no experts, or not as many in all layers.")
    if any(key in metadata for key in SHARD_KEYS):
        raise ShardError(f"{path} is a shard already; cut the whole model.")
    if architecture in _REFUSED:
        raise ShardError(f"{path}: {architecture} cannot be cut: {_REFUSED[architecture]}.")
    if architecture not in ARCHITECTURES:
        raise ShardError(f"{path}: {architecture} was never tested as a shard.")
    groups = metadata.get(f"{architecture}.{_GROUPS}", 1)
    if type(groups) is not int or groups > 1:
        raise ShardError(
            f"{path} chooses its experts by groups, which a shard would tear; it was never tested."
        )
    layers = set()
    for tensor in layout.tensors.values():
        part = _part(tensor)
        if part in _BY_EXPERT and tensor.shape[-1] == count:
            layers.add(_layer(tensor))
        elif "exp" in part and "shexp" not in part:
            raise ShardError(f"{path}: what the tensor {tensor.name} is to its experts is unknown.")
    if not layers:
        raise ShardError(f"{path} has no experts.")
    return Experts(layout, count, used, tuple(sorted(layers)))


def write_shard(source: Path, destination: Path, kept: Kept, mark: ShardMark) -> int:
    """Write the shard that keeps those experts of each layer, marked as one; its size in bytes.

    Blocks for as long as its bytes take to copy. Raises what `read_experts` does, and `ShardError`
    for experts that are not there, a full disk, and the like.
    """
    experts = read_experts(source)
    _check(experts, kept, mark)
    try:
        with open(source, "rb") as whole, open(destination, "wb") as shard:
            _write(experts, kept, mark, whole, shard)
            return shard.tell()
    except OSError as error:
        raise ShardError(f"{destination} cannot be written: {error.strerror}.") from error


def _check(experts: Experts, kept: Kept, mark: ShardMark) -> None:
    if (mark.of, tuple(sorted(kept))) != (experts.count, experts.layers):
        raise ShardError("Other layers have experts than those of which some are to be kept.")
    for layer, chosen in kept.items():
        if len(set(chosen)) != mark.kept or not all(0 <= each < experts.count for each in chosen):
            raise ShardError(f"Layer {layer} has no {mark.kept} such experts.")


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor of the shard, and the ranges of the source (offset, bytes) that it consists of."""

    name: str
    shape: tuple[int, ...]
    kind: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.ranges)


def _pieces(experts: Experts, kept: Kept) -> Iterator[_Piece]:
    for tensor in experts.layout.tensors.values():
        ranges: tuple[tuple[int, int], ...] = ((tensor.offset, tensor.size_bytes),)
        shape = tensor.shape
        if _part(tensor) in _BY_EXPERT:
            chosen = kept[_layer(tensor)]
            each = tensor.size_bytes // experts.count
            ranges = tuple((tensor.offset + expert * each, each) for expert in chosen)
            shape = (*shape[:-1], len(chosen))
        yield _Piece(tensor.name, shape, tensor.kind, ranges)


def _write(
    experts: Experts, kept: Kept, mark: ShardMark, whole: BinaryIO, shard: BinaryIO
) -> None:
    layout = experts.layout
    values = dict(layout.values)
    values[f"{layout.architecture}.{_COUNT}"] = value_bytes(mark.kept)
    values[f"{layout.architecture}.{_USED}"] = value_bytes(min(experts.used, mark.kept))
    for key, value in zip(SHARD_KEYS, (mark.source, mark.kept, mark.of), strict=True):
        values[key] = value_bytes(value)
    pieces = list(_pieces(experts, kept))
    shard.write(b"GGUF" + struct.pack("<IQQ", _VERSION, len(pieces), len(values)))
    for key, raw in values.items():
        shard.write(string_bytes(key) + raw)
    offset = 0
    for piece in pieces:
        dimensions = struct.pack(f"<I{len(piece.shape)}Q", len(piece.shape), *piece.shape)
        shard.write(string_bytes(piece.name) + dimensions)
        shard.write(struct.pack("<IQ", piece.kind, offset))
        offset = aligned(offset + piece.size_bytes, layout.alignment)
    for piece in pieces:
        shard.write(bytes(-shard.tell() % layout.alignment))
        shard.flush()
        for start, size in piece.ranges:
            _copy(whole, shard, start, size)
    shard.write(bytes(-shard.tell() % layout.alignment))


def _copy(source: BinaryIO, destination: BinaryIO, start: int, size: int) -> None:
    end = start + size
    while start < end:
        count = min(end - start, _COPY_BYTES)
        copied = os.sendfile(destination.fileno(), source.fileno(), start, count)
        if not copied:
            raise ModelLoadError(f"{source.name} became shorter while it was being read.")
        start += copied
    destination.seek(0, os.SEEK_CUR)


def _part(tensor: Tensor) -> str:
    """`ffn_up_exps` of `blk.7.ffn_up_exps.weight`; "" outside of layers."""
    block, _, rest = tensor.name.partition(".")
    layer, _, part = rest.partition(".")
    return part.partition(".")[0] if block == "blk" and layer.isdecimal() else ""


def _layer(tensor: Tensor) -> int:
    return int(tensor.name.split(".")[1])
