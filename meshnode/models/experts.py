"""An expert shard: a mixture-of-experts file with some experts of every layer, and all the rest.

Decides which files may be cut so and which bytes a shard consists of. Experts are the outermost
dimension of their tensors, so a shard is ranges of the source under a new header; no weight is
computed anew. Does not know which experts are worth keeping (`ranking.py`), nor how good the
result is (`receipt.py`). The router of a shard chooses among what is there: it is another model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path

from meshnode.errors import ShardError
from meshnode.models.gguf import (
    SHARD_KEYS,
    Layout,
    ShardMark,
    Tensor,
    aligned,
    head_bytes,
    read_layout,
    table_line,
    value_bytes,
)
from meshnode.models.stages.file import copy_range
from meshnode.models.stages.names import layer_of

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
_AHEAD = "nextn_predict_layers"

Kept = Mapping[int, Sequence[int]]
"""By layer: the experts to keep, as the source numbers them."""


@dataclass(frozen=True, slots=True)
class Experts:
    """What a file that may be cut says of its experts.

    `layers` are those that have some; of these nobody computes `idle`, which guess ahead.
    """

    layout: Layout
    count: int
    used: int
    layers: tuple[int, ...]
    idle: tuple[int, ...]


def read_experts(path: Path) -> Experts:
    """Raises `ModelLoadError` for a bad file, `ShardError` for one that may not be cut."""
    layout = read_layout(path)
    architecture = layout.architecture
    count, used = _number(layout, _COUNT), _number(layout, _USED)
    if not 0 < used <= count:
        raise ShardError(f"{path} has no experts to choose from.")
    if any(key in layout.metadata for key in SHARD_KEYS):
        raise ShardError(f"{path} is a shard already; cut the whole model.")
    if architecture in _REFUSED:
        raise ShardError(f"{path}: {architecture} cannot be cut: {_REFUSED[architecture]}.")
    if architecture not in ARCHITECTURES:
        raise ShardError(f"{path}: {architecture} was never tested as a shard.")
    if _number(layout, _GROUPS) > 1:
        raise ShardError(
            f"{path} chooses its experts by groups, which a shard would tear; it was never tested."
        )
    layers = set()
    for tensor in layout.tensors.values():
        part, layer = _part(tensor), layer_of(tensor.name)
        if layer is not None and part in _BY_EXPERT and tensor.shape[-1] == count:
            layers.add(layer)
        elif part in _BY_EXPERT or ("exp" in part and "shexp" not in part):
            raise ShardError(f"{path}: what the tensor {tensor.name} is to its experts is unknown.")
    if not layers:
        raise ShardError(f"{path} has no experts.")
    end = _number(layout, "block_count") - _number(layout, _AHEAD)
    idle = tuple(sorted(layer for layer in layers if layer >= end))
    return Experts(layout, count, used, tuple(sorted(layers)), idle)


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
        layer = layer_of(tensor.name)
        if layer is not None and _part(tensor) in _BY_EXPERT:
            chosen = kept[layer]
            each = tensor.size_bytes // experts.count
            ranges = tuple((tensor.offset + expert * each, each) for expert in chosen)
            shape = (*shape[:-1], len(chosen))
        yield _Piece(tensor.name, shape, tensor.kind, ranges)


def _write(
    experts: Experts, kept: Kept, mark: ShardMark, whole: BufferedReader, shard: BufferedWriter
) -> None:
    layout = experts.layout
    values = dict(layout.values)
    values[f"{layout.architecture}.{_COUNT}"] = value_bytes(mark.kept)
    values[f"{layout.architecture}.{_USED}"] = value_bytes(min(experts.used, mark.kept))
    marks = (value_bytes(mark.source), value_bytes(mark.kept), value_bytes(mark.of))
    values.update(zip(SHARD_KEYS, marks, strict=True))
    pieces = list(_pieces(experts, kept))
    table, offset = [], 0
    for piece in pieces:
        table.append(table_line(piece.name, piece.kind, piece.shape, offset))
        offset = aligned(offset + piece.size_bytes, layout.alignment)
    shard.write(head_bytes(values, table))
    for piece in pieces:
        shard.write(bytes(-shard.tell() % layout.alignment))
        shard.flush()
        for start, size in piece.ranges:
            copy_range(shard.fileno(), whole.fileno(), start, size)
        shard.seek(0, os.SEEK_END)
    shard.write(bytes(-shard.tell() % layout.alignment))


def _number(layout: Layout, key: str) -> int:
    """A setting of the model; 0 if it has none. Lists, of other numbers by layer, are refused."""
    value = layout.metadata.get(f"{layout.architecture}.{key}", 0)
    if type(value) is not int:
        raise ShardError(f"{key} is not the same for all layers.")
    return value


def _part(tensor: Tensor) -> str:
    """`ffn_up_exps` of `blk.7.ffn_up_exps.weight`; "" outside of layers."""
    return "" if layer_of(tensor.name) is None else tensor.name.split(".")[2]
