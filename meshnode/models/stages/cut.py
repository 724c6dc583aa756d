"""Cutting a model file by layers: which bytes of it a stage needs, and what is written before them.

A stage is a model file of its own: a header, and ranges of the whole file's bytes as they are.
Its layers are numbered from 0. It takes activations, never tokens; the rows of tokens are looked
up in the whole file (`lookup`). What llama.cpp demands but such a model never reads is a hole, a
row of one, or ones. Only the last stage has the vocabulary and computes logits.

Decides what is in a stage, from headers alone. Does not read weights, nor know llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from meshnode.models.gguf import (
    Layout,
    Tensor,
    aligned,
    array_length,
    array_slice,
    head_bytes,
    table_line,
    tensor_bytes,
    value_bytes,
)
from meshnode.models.stages.allowed import stage_of
from meshnode.models.stages.architectures import RULES
from meshnode.models.stages.names import (
    HEAD,
    HEAD_BIAS,
    LAYER,
    NORM_BIAS,
    POSITIONS,
    ROTATION_FACTORS,
    ROWS_OF_TOKENS,
    last_norm,
    layer_of,
)
from meshnode.models.stages.rules import Changes, Model
from meshnode.models.stages.stage import Piece, Rows, Stage

# Two ranges of the source with less between them are one: a request costs more than such a gap,
# which is the padding between two tensors.
GAP_BYTES_MAX = 64
# Arrays that are not about layers, however many items they have.
_NOT_PER_LAYER = ("rope.dimension_sections",)
_F32 = 0
_Q1_0, _Q1_0_BLOCK = 41, 128


def cut(path: str | Path, first: int, end: int) -> Stage:
    """The stage of layers `first` to `end - 1`; reads the file's header only.

    Raises `StageError` if these layers cannot be one, and `ModelLoadError` if the file is bad.
    """
    return _Cutter(stage_of(path, first, end), first, end).stage()


class _Cutter:
    """Collects what goes into one stage's file."""

    def __init__(self, model: Model, first: int, end: int) -> None:
        self._model = model
        self._layout: Layout = model.layout
        self._first, self._end = first, end
        self._is_last = end == model.layers
        self._changes = Changes()
        for rule in RULES[model.architecture]:
            rule.change(model, first, end, self._changes)

    def stage(self) -> Stage:
        model, tokens = self._model, self._layout.tensors[ROWS_OF_TOKENS]
        header, pieces, bytes_total = self._file()
        ranges = _coalesced(pieces)
        return Stage(
            architecture=model.architecture,
            first=self._first,
            end=self._end,
            layers=model.layers,
            width=model.width,
            vocabulary=tokens.shape[1],
            is_first=self._first == 0,
            is_last=self._is_last,
            header=header,
            pieces=pieces,
            ranges=ranges,
            bytes_total=bytes_total,
            source_bytes=sum(end - start for start, end in ranges),
            edge_bytes=sum(
                tensor.size_bytes for name, tensor in self._tensors() if layer_of(name) is None
            ),
            input_scale=self._changes.input_scale,
            lookup_scale=self._changes.lookup_scale,
            lookup=Rows(
                tokens.offset, tokens.kind, tokens.shape[1], tokens.size_bytes // tokens.shape[1]
            ),
        )

    # -- settings ------------------------------------------------------------------------------

    def _settings(self) -> dict[str, bytes]:
        """The whole model's, but for what is about other layers, and what the rules change."""
        architecture = self._model.architecture
        settings = {
            key: self._own_layers(key, value)
            for key, value in self._layout.values.items()
            if self._is_last or not key.startswith("tokenizer.")
        }
        changed: dict[str, bool | int | float | str | list[bool] | list[int]] = {
            "block_count": self._end - self._first,
            **self._changes.settings,
        }
        if self._model.whole("nextn_predict_layers"):
            changed["nextn_predict_layers"] = 0
        if not self._is_last:
            # One word: llama.cpp copies logits of the whole vocabulary for every row otherwise.
            changed["vocab_size"] = 1
            settings["tokenizer.ggml.model"] = value_bytes("no_vocab")
        for key, value in changed.items():
            settings[f"{architecture}.{key}"] = value_bytes(value)
        return settings

    def _own_layers(self, key: str, value: bytes) -> bytes:
        """Of a list with an item for each layer, the items of ours."""
        name = key.removeprefix(f"{self._model.architecture}.")
        is_global = key.startswith(("general.", "tokenizer.")) or name in _NOT_PER_LAYER
        if is_global or array_length(value) != self._model.whole("block_count"):
            return value
        return array_slice(value, self._first, self._end)

    # -- tensors -------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those that are copied, by the names they get."""
        for name, tensor in self._layout.tensors.items():
            layer = layer_of(name)
            if layer is not None:
                if self._first <= layer < self._end:
                    part = name.split(".", 2)[2]
                    yield f"{LAYER}.{layer - self._first}.{part}", tensor
            elif name in ROTATION_FACTORS:
                if self._changes.rotation_factors:
                    yield name, tensor
            elif name == POSITIONS:
                if self._first == 0:
                    yield name, tensor
            elif self._is_last and (name != ROWS_OF_TOKENS or self._is_tied):
                yield name, tensor

    @property
    def _is_tied(self) -> bool:
        """The rows of tokens are also the head."""
        return HEAD not in self._layout.tensors

    def _stand_ins(self) -> Iterator[tuple[str, int, tuple[int, ...], bytes]]:
        """What llama.cpp demands, but a stage never reads: name, type, shape, bytes (or zeros)."""
        tensors, width = self._layout.tensors, self._model.width
        if not self._is_last:
            # Norm and head come after the layers, where a stage stops computing.
            norm = last_norm(self._model.architecture)
            if norm in tensors:
                yield norm, _F32, (width,), struct.pack("<f", 1.0) * width
            if NORM_BIAS in tensors:
                yield NORM_BIAS, _F32, (width,), b""
            yield ROWS_OF_TOKENS, _F32, (width, 1), b""
            if HEAD in tensors:
                yield HEAD, _F32, (width, 1), b""
            if HEAD_BIAS in tensors:
                yield HEAD_BIAS, _F32, (1,), b""
        elif not self._is_tied:
            words = tensors[ROWS_OF_TOKENS]
            yield ROWS_OF_TOKENS, _smallest(words.kind, words.shape), words.shape, b""
        if self._first > 0 and POSITIONS in tensors:
            # Positions were added before the first layer; here nothing is.
            yield POSITIONS, tensors[POSITIONS].kind, tensors[POSITIONS].shape, b""

    # -- the file ------------------------------------------------------------------------------

    def _file(self) -> tuple[bytes, tuple[Piece, ...], int]:
        """Its beginning, what is copied behind it, and how long it is.

        Stand-ins come first, so that those that are not zeros belong to the beginning.
        """
        alignment = self._layout.alignment
        stand_ins, copied = list(self._stand_ins()), list(self._tensors())
        settings = self._settings()
        table: list[bytes] = []
        written = bytearray()
        position = 0
        for name, kind, shape, data in stand_ins:
            table.append(table_line(name, kind, shape, position))
            if data:
                written += bytes(position - len(written)) + data
            position = aligned(position + tensor_bytes(kind, shape), alignment)
        places = []
        for name, tensor in copied:
            table.append(table_line(name, tensor.kind, tensor.shape, position))
            places.append(position)
            position = aligned(position + tensor.size_bytes, alignment)
        head = head_bytes(settings, table)
        start = aligned(len(head), alignment)
        pieces = tuple(
            Piece(tensor.offset, start + place, tensor.size_bytes)
            for place, (_, tensor) in zip(places, copied, strict=True)
        )
        return head + bytes(start - len(head)) + written, pieces, start + position


def _smallest(kind: int, shape: tuple[int, ...]) -> int:
    """The type of numbers that takes least, if such rows can be of it; else `kind`."""
    return _Q1_0 if shape[0] % _Q1_0_BLOCK == 0 else kind


def _coalesced(pieces: tuple[Piece, ...]) -> tuple[tuple[int, int], ...]:
    """The source's bytes that pieces need, in as few ranges as it takes."""
    ranges: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda piece: piece.source_offset):
        start, end = piece.source_offset, piece.source_offset + piece.size_bytes
        if ranges and start - ranges[-1][1] <= GAP_BYTES_MAX:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], end))
        else:
            ranges.append((start, end))
    return tuple(ranges)
