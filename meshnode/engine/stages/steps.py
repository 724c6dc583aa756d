"""What travels between the stages of a pipeline: one batch, as the next stage needs it.

A model that is cut by layers runs as a ring. The *head* is the engine of the last stage: it has
the scheduler, the vocabulary and the samplers. It sends the tokens of a batch to the first stage;
that one sends activations to the second, and so on back to the head, which computes its own layers,
samples, and plans the next batch. So a token costs one hop for each stage, and several batches are
on their way round at once.

The same frame is used on every hop, between machines and between a node and its stage's process.
This module decides its form and its bounds. Frames come from peers: `decode` refuses whatever a
stage could not compute. It does not know streams, models or llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from meshnode.errors import RemoteProtocolError

__all__ = [
    "CODECS",
    "PIPELINE_BYTES",
    "STATE_BYTES_MAX",
    "STEP_ROWS_MAX",
    "STEP_SLOTS_MAX",
    "WIDTH_MAX",
    "Codec",
    "Keep",
    "Shape",
    "Share",
    "Step",
    "check_due",
    "decode",
    "encode",
    "step_bytes_max",
]

Codec = Literal["f32", "f16", "i8"]
CODECS: tuple[Codec, ...] = ("f32", "f16", "i8")

STEP_ROWS_MAX = 512
"""As many tokens as one decode takes (`scheduler.PREFILL_TOKENS_MAX`)."""
STEP_SLOTS_MAX = 256
"""Sequences that llama.cpp can have (`LLAMA_MAX_SEQ`)."""
PIPELINE_BYTES = 16
"""A random name for one run of a pipeline: nothing of another run is ever taken for its own."""
STATE_BYTES_MAX = 1024**3
"""No slot's KV is moved that takes more: it crosses pipes and networks as one message."""
WIDTH_MAX = 65536
"""Of an activation: its places are said in 16 bits."""
CHANGES_MAX = 4 * STEP_SLOTS_MAX
_HEADER_BYTES_MAX = 64 * 1024
"""What a frame has besides its rows: 8 bytes a token, and the changes."""

Slot = Annotated[int, Meta(ge=0, lt=STEP_SLOTS_MAX)]
Position = Annotated[int, Meta(ge=0, lt=2**31)]


class Keep(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="keep"):
    """Of the KV of `slot`, only the first `tokens` stay."""

    slot: Slot
    tokens: Position


class Share(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="share"):
    """`slot`, which is empty, begins with the first `tokens` of slot `source`."""

    source: Slot
    slot: Slot
    tokens: Position


class Step(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One batch on its way. `changes` come first, in this order.

    `slots` is uint16[n], `positions` int32[n], both little-endian, for n rows. To the first stage
    goes `tokens`, int32[n], and no `rows`; to the others `rows`, n activations in `codec`, and no
    tokens. `number` counts the steps of a pipeline from 0; n is 0 in a step of changes only.
    """

    pipeline: Annotated[bytes, Meta(min_length=PIPELINE_BYTES, max_length=PIPELINE_BYTES)]
    epoch: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    number: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    changes: Annotated[tuple[Keep | Share, ...], Meta(max_length=CHANGES_MAX)]
    slots: Annotated[bytes, Meta(max_length=2 * STEP_ROWS_MAX)]
    positions: Annotated[bytes, Meta(max_length=4 * STEP_ROWS_MAX)]
    tokens: Annotated[bytes, Meta(max_length=4 * STEP_ROWS_MAX)] = b""
    rows: bytes = b""
    codec: Codec = "f32"

    @property
    def count(self) -> int:
        """How many rows it has."""
        return len(self.slots) // 2


@dataclass(frozen=True, slots=True)
class Shape:
    """What a stage takes: `width` of an activation, and its own bounds."""

    width: int
    slots: int
    context_tokens: int
    vocabulary: int
    """Of the first stage, which looks tokens up; 0 for the others."""


def row_bytes(codec: Codec, width: int) -> int:
    """Of one activation of `width` numbers on the wire (`activations.py` says of what)."""
    return {"f32": 4 * width, "f16": 2 * width, "i8": width + 4 + OUTLIERS * 4}[codec]


OUTLIERS = 8
"""The largest of a row travel apart in "i8", each as uint16 place and f16 value."""


def step_bytes_max(width: int) -> int:
    """No frame of a model of this width is larger."""
    return _HEADER_BYTES_MAX + STEP_ROWS_MAX * row_bytes("f32", width)


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Step)


def encode(step: Step) -> bytes:
    return _ENCODER.encode(step)


def decode(frame: bytes, shape: Shape) -> Step:
    """A step that such a stage can compute. Raises `RemoteProtocolError` for all other bytes.

    Whether the rows are numbers is seen when they are unpacked (`activations.unpack`), and
    whether the step is the next of its pipeline by whoever knows the pipeline.
    """
    try:
        step = _DECODER.decode(frame)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"no step: {error}") from None
    count = step.count
    takes_tokens = shape.vocabulary > 0
    sizes = (len(step.slots), len(step.positions), len(step.tokens), len(step.rows))
    rows = 0 if takes_tokens else count * row_bytes(step.codec, shape.width)
    if sizes != (2 * count, 4 * count, 4 * count if takes_tokens else 0, rows):
        raise RemoteProtocolError(f"a step of sizes {sizes} for width {shape.width}")
    slots = np.frombuffer(step.slots, "<u2")
    positions = np.frombuffer(step.positions, "<i4")
    tokens = np.frombuffer(step.tokens, "<i4")
    named = [change.slot for change in step.changes]
    named += [change.source for change in step.changes if isinstance(change, Share)]
    if max(named, default=0) >= shape.slots or (count and slots.max() >= shape.slots):
        raise RemoteProtocolError(f"a step for a slot of {shape.slots} that there is not")
    if count and not (positions.min() >= 0 and positions.max() < shape.context_tokens):
        raise RemoteProtocolError("a step beyond the context")
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < shape.vocabulary):
        raise RemoteProtocolError("a token that the vocabulary has not")
    return step


def check_due(step: Step, pipeline: bytes, epoch: int, number: int) -> None:
    """Raises `RemoteProtocolError` for a step of another run or epoch, or out of its order."""
    if (step.pipeline, step.epoch) != (pipeline, epoch):
        raise RemoteProtocolError(f"a step of another pipeline, or of epoch {step.epoch}")
    if step.number != number:
        raise RemoteProtocolError(f"step {step.number} where step {number} was due")
