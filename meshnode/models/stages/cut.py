"""Cutting a model file by layers: which bytes of it a stage needs, and what is written before them.

A stage is a model file of its own: a header, and ranges of the whole file's bytes as they are.
Its layers are numbered from 0. It takes activations, never tokens; the rows of tokens are looked
up in the whole file (`lookup`). What llama.cpp demands but such a model never reads is a hole, a
row of one, or ones. Only the last stage has the vocabulary and computes logits.

Decides what is in a stage, from headers alone. Does not read weights, nor know llama.cpp.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import StageError
from meshnode.models.gguf import (
    Layout,
    Tensor,
    aligned,
    array_length,
    array_slice,
    read_layout,
    string_bytes,
    tensor_bytes,
    value_bytes,
)
from meshnode.models.stages.architectures import LAST_NORMS, REFUSED, RULES
from meshnode.models.stages.rules import ROWS_OF_TOKENS, Changes, Model

# Two ranges of the source with less between them are one: a request costs more than such a gap,
# which is the padding between two tensors.
GAP_BYTES_MAX = 64
# More makes no sense: llama.cpp takes 512 layers, and a step's rows are no wider (`steps.py`).
LAYERS_MAX = 512
WIDTH_MAX = 65_536
# What every stage needs, whichever its layers: how positions are rotated.
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_POSITIONS = "position_embd.weight"
_NORM_BIAS = "output_norm.bias"
_HEAD, _HEAD_BIAS = "output.weight", "output.bias"
_KNOWN = frozenset((*_FACTORS, _POSITIONS, ROWS_OF_TOKENS, _NORM_BIAS, _HEAD, _HEAD_BIAS))
# Arrays that are not about layers, however many items they have.
_NOT_PER_LAYER = ("rope.dimension_sections",)
_F32 = 0
_Q1_0, _Q1_0_BLOCK = 41, 128
_LAYER = "blk"


@dataclass(frozen=True, slots=True)
class Piece:
    """So many bytes of the source, and where they go in the stage's file."""

    source_offset: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of tokens are in the source: `count` of `row_bytes`, of a ggml type."""

    offset: int
    kind: int
    count: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `first` to `end - 1` of a model with `layers` in all, as a file of `bytes_total`.

    The file begins with `header`; then come `pieces`; whatever neither covers is zeros that nobody
    reads. `ranges` are what is needed of the source, first byte and end, ascending, and
    `source_bytes` how much that is; `edge_bytes` of it are in no layer. Activations have `width`
    numbers: whoever computes multiplies those of the stage before by `input_scale`, and looked-up
    rows by `lookup_scale`.
    """

    architecture: str
    first: int
    end: int
    layers: int
    width: int
    vocabulary: int
    is_first: bool
    is_last: bool
    header: bytes
    pieces: tuple[Piece, ...]
    ranges: tuple[tuple[int, int], ...]
    bytes_total: int
    source_bytes: int
    edge_bytes: int
    input_scale: float
    lookup_scale: float
    lookup: Rows


@dataclass(frozen=True, slots=True)
class Cuts:
    """What a planner must mind: stages begin at multiples of `step`, have at least `shortest`
    layers, and not as many as one of `not_so_many`."""

    layers: int
    step: int
    shortest: int
    not_so_many: tuple[int, ...] = ()

    def allows(self, first: int, end: int) -> bool:
        """Whether layers `first` to `end - 1` may be a stage."""
        begins = first % self.step == 0 and (end % self.step == 0 or end == self.layers)
        count = end - first
        fits = 0 <= first < end <= self.layers and count >= self.shortest
        return begins and fits and count not in self.not_so_many


def why_not(path: str | Path) -> str | None:
    """Why the model in this file cannot be cut; None if it can. Raises `ModelLoadError`."""
    return _refusal(Model(read_layout(path)))


def cut_points(path: str | Path) -> Cuts:
    """Where it may be cut. Raises `StageError` if nowhere, and `ModelLoadError`."""
    model = _cuttable(path)
    step, layers = _step(model), model.layers
    starts = range(0, layers, step)
    refused = [
        end - first
        for first in starts
        for end in (*starts[first // step + 1 :], layers)
        if (first, end) != (0, layers) and _stage_refusal(model, first, end)
    ]
    # Mostly it is stages that are too short; a count that is refused beyond those stands alone.
    shortest = 1
    while shortest in refused:
        shortest += 1
    beyond = tuple(sorted({count for count in refused if count > shortest}))
    return Cuts(layers, step, shortest, beyond)


def cut(path: str | Path, first: int, end: int) -> Stage:
    """The stage of layers `first` to `end - 1`; reads the file's header only.

    Raises `StageError` if these layers cannot be one, and `ModelLoadError` if the file is bad.
    """
    model = _cuttable(path)
    if not 0 <= first < end <= model.layers:
        raise StageError(f"{path} has layers 0 to {model.layers - 1}, not {first} to {end - 1}.")
    reason = _stage_refusal(model, first, end)
    if reason is not None:
        raise StageError(f"Layers {first} to {end - 1} of {path} cannot be a stage: {reason}.")
    return _Cutter(model, first, end).stage()


def _cuttable(path: str | Path) -> Model:
    model = Model(read_layout(path))
    reason = _refusal(model)
    if reason is not None:
        raise StageError(f"{path} cannot be cut into stages: {reason}.")
    return model


def _refusal(model: Model) -> str | None:
    architecture, layout = model.architecture, model.layout
    if architecture in REFUSED:
        return f"{architecture}: {REFUSED[architecture]}"
    if architecture not in RULES:
        return f"{architecture}: this architecture was never tried"
    if not 1 <= model.layers <= LAYERS_MAX or not 1 <= model.width <= WIDTH_MAX:
        return f"{architecture}: {model.layers} layers of width {model.width} make no sense"
    if sum(tensor.size_bytes for tensor in layout.tensors.values()) > layout.size_bytes:
        return f"{architecture}: its tensors overlap"
    norm = _last_norm(architecture)
    strange = next((name for name in layout.tensors if name != norm and not _is_known(name)), None)
    if strange is not None:
        return f"{architecture}: what to do with its tensor {strange!r} is not known"
    tokens = layout.tensors.get(ROWS_OF_TOKENS)
    if tokens is None or len(tokens.shape) != 2 or tokens.shape[0] != model.width:
        return f"{architecture}: it has no rows of tokens of its width"
    for rule in RULES[architecture]:
        reason = rule.why_not(model)
        if reason is not None:
            return f"{architecture}: {reason}"
    return None


def _stage_refusal(model: Model, first: int, end: int) -> str | None:
    step = _step(model)
    if first % step or (end % step and end != model.layers):
        return f"stages of {model.architecture} begin at multiples of {step}"
    for rule in RULES[model.architecture]:
        reason = rule.why_not_stage(model, first, end)
        if reason is not None:
            return reason
    return None


def _step(model: Model) -> int:
    return math.lcm(*(rule.step(model) for rule in RULES[model.architecture]))


def _is_known(name: str) -> bool:
    return name in _KNOWN or _layer_of(name) is not None


def _last_norm(architecture: str) -> str:
    return LAST_NORMS.get(architecture, "output_norm.weight")


def _layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, if its name says one."""
    kind, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    return int(number) if kind == _LAYER and number.isdecimal() and part else None


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
                tensor.size_bytes for name, tensor in self._tensors() if _layer_of(name) is None
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
            layer = _layer_of(name)
            if layer is not None:
                if self._first <= layer < self._end:
                    part = name.split(".", 2)[2]
                    yield f"{_LAYER}.{layer - self._first}.{part}", tensor
            elif name in _FACTORS:
                if self._changes.rotation_factors:
                    yield name, tensor
            elif name == _POSITIONS:
                if self._first == 0:
                    yield name, tensor
            elif self._is_last and (name != ROWS_OF_TOKENS or self._is_tied):
                yield name, tensor

    @property
    def _is_tied(self) -> bool:
        """The rows of tokens are also the head."""
        return _HEAD not in self._layout.tensors

    def _stand_ins(self) -> Iterator[tuple[str, int, tuple[int, ...], bytes]]:
        """What llama.cpp demands, but a stage never reads: name, type, shape, bytes (or zeros)."""
        tensors, width = self._layout.tensors, self._model.width
        if not self._is_last:
            # Norm and head come after the layers, where a stage stops computing.
            norm = _last_norm(self._model.architecture)
            if norm in tensors:
                yield norm, _F32, (width,), struct.pack("<f", 1.0) * width
            if _NORM_BIAS in tensors:
                yield _NORM_BIAS, _F32, (width,), b""
            yield ROWS_OF_TOKENS, _F32, (width, 1), b""
            if _HEAD in tensors:
                yield _HEAD, _F32, (width, 1), b""
            if _HEAD_BIAS in tensors:
                yield _HEAD_BIAS, _F32, (1,), b""
        elif not self._is_tied:
            words = tensors[ROWS_OF_TOKENS]
            yield ROWS_OF_TOKENS, _smallest(words.kind, words.shape), words.shape, b""
        if self._first > 0 and _POSITIONS in tensors:
            # Positions were added before the first layer; here nothing is.
            yield _POSITIONS, tensors[_POSITIONS].kind, tensors[_POSITIONS].shape, b""

    # -- the file ------------------------------------------------------------------------------

    def _file(self) -> tuple[bytes, tuple[Piece, ...], int]:
        """Its beginning, what is copied behind it, and how long it is.

        Stand-ins come first, so that those that are not zeros belong to the beginning.
        """
        alignment = self._layout.alignment
        stand_ins, copied = list(self._stand_ins()), list(self._tensors())
        settings = self._settings()
        table, written = bytearray(), bytearray()
        position = 0
        for name, kind, shape, data in stand_ins:
            table += _table_line(name, kind, shape, position)
            if data:
                written += bytes(position - len(written)) + data
            position = aligned(position + tensor_bytes(kind, shape), alignment)
        places = []
        for name, tensor in copied:
            table += _table_line(name, tensor.kind, tensor.shape, position)
            places.append(position)
            position = aligned(position + tensor.size_bytes, alignment)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(stand_ins) + len(copied), len(settings))
        head += b"".join(string_bytes(key) + value for key, value in settings.items()) + table
        start = aligned(len(head), alignment)
        pieces = tuple(
            Piece(tensor.offset, start + place, tensor.size_bytes)
            for place, (_, tensor) in zip(places, copied, strict=True)
        )
        return head + bytes(start - len(head)) + written, pieces, start + position


def _smallest(kind: int, shape: tuple[int, ...]) -> int:
    """The type of numbers that takes least, if such rows can be of it; else `kind`."""
    return _Q1_0 if shape[0] % _Q1_0_BLOCK == 0 else kind


def _table_line(name: str, kind: int, shape: tuple[int, ...], offset: int) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string_bytes(name) + dimensions + struct.pack("<IQ", kind, offset)


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
