"""What a stage is: some layers of a model, as a file that is made of ranges of the model's file.

Only says what things are; `cut` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass


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
