"""What the node and the child that computes a stage say to each other: as `wire.py`.

A run is what the stage computes between one `Begin` and the next. Whatever is on its way when a run
ends belongs to no other, so steps and their answers say which run they are of.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from meshnode.config import KvType
from meshnode.engine.stages.steps import PIPELINE_BYTES, STATE_BYTES_MAX, Codec
from meshnode.engine.wire import decode, with_length

# A slot's KV is the largest that is said; the rest of its frame is a few words.
FRAME_BYTES_MAX = STATE_BYTES_MAX + 1024


class Load(msgspec.Struct, frozen=True, tag="load"):
    """First frame to the child. `threads` None: adapt to the cores that are really free."""

    path: str
    first: int
    end: int
    context_tokens: int
    slots: int
    kv_type: KvType
    threads: int | None


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Forget all KV; from here on compute steps of this pipeline and epoch, from number 0 on."""

    run: int
    pipeline: Annotated[bytes, Meta(min_length=PIPELINE_BYTES, max_length=PIPELINE_BYTES)]
    epoch: int
    codec: Codec


class Compute(msgspec.Struct, frozen=True, tag="compute"):
    """A step as it came from a peer."""

    run: int
    step: bytes


class Save(msgspec.Struct, frozen=True, tag="save"):
    """Answered by `Saved` or `Unable`, after all steps that were said before it."""

    number: int
    slot: int


class Restore(msgspec.Struct, frozen=True, tag="restore"):
    """Answered by `Restored` or `Unable`; `state` comes from a peer."""

    number: int
    slot: int
    state: bytes


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How much of the stage is loaded, 0..1."""

    progress: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """What it takes; the fields are those of `steps.Shape`."""

    width: int
    slots: int
    context_tokens: int
    vocabulary: int


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The stage cannot be loaded; the child exits."""

    message: str


class Computed(msgspec.Struct, frozen=True, tag="computed"):
    """What became of a step with so many rows: the next stage's, in the order of coming."""

    run: int
    step: bytes
    rows: int


class RunFailed(msgspec.Struct, frozen=True, tag="run_failed"):
    """No more steps of this run are computed. `theirs`: a step was wrong in itself."""

    run: int
    message: str
    theirs: bool


class Saved(msgspec.Struct, frozen=True, tag="saved"):
    """The KV of a slot."""

    number: int
    state: bytes


class Restored(msgspec.Struct, frozen=True, tag="restored"):
    """The slot now holds so many tokens."""

    number: int
    tokens: int


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    """A slot's KV could not be saved or restored."""

    number: int
    message: str


ToChild = Load | Begin | Compute | Save | Restore
FromChild = Loading | Ready | LoadFailed | Computed | RunFailed | Saved | Restored | Unable

_encoder = msgspec.msgpack.Encoder()
_to_child: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


def encode(frame: ToChild | FromChild) -> bytes:
    """A frame with its length. Raises `LocalProtocolError` if it is over `FRAME_BYTES_MAX`."""
    return with_length(_encoder.encode(frame), FRAME_BYTES_MAX)


def decode_to_child(body: bytes) -> ToChild:
    """Raises `LocalProtocolError` if the parent sent something else."""
    return decode(_to_child, body)


def decode_from_child(body: bytes) -> FromChild:
    """Raises `LocalProtocolError` if the child sent something else."""
    return decode(_from_child, body)
