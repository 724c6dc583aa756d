"""What the node and its engine child say to each other: length-prefixed MessagePack.

Decides the frames and their bounds. Both ends are ours and of one version, so there is no
negotiation; a frame that does not decode means that one side is broken, and the pipe is closed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from meshnode.config import KvType
from meshnode.engine import (
    IMAGES_BYTES_MAX,
    ChatMessage,
    ChatStyle,
    Continuation,
    EmbedRequest,
    Grammar,
    Purpose,
    Request,
    Sampling,
    Speculate,
    SpeculationStats,
    TokenLogprobs,
    Usage,
)
from meshnode.engine.stages.steps import WIDTH_MAX, step_bytes_max
from meshnode.errors import LocalProtocolError

# A prompt is at most a context: 1 Mi tokens of 6 bytes is more than any model here takes.
PROMPT_BYTES_MAX = 8 * 1024 * 1024
# Rows of a pipeline are the largest that is said.
FRAME_BYTES_MAX = max(PROMPT_BYTES_MAX + IMAGES_BYTES_MAX, step_bytes_max(WIDTH_MAX))
Frame = TypeVar("Frame")
_LENGTH = struct.Struct(">I")


class Draft(msgspec.Struct, frozen=True):
    """The model that guesses."""

    path: str
    context_tokens: int


class Load(msgspec.Struct, frozen=True, tag="load"):
    """First frame to the child. `threads` None: adapt to the cores that are really free.

    KV of `saved_bytes` may be in memory outside of the cache, and of `spilled_bytes` in files.
    `projector`: the path of an mmproj file, for a model that can see. `part`: first layer and end,
    if not all are loaded.
    """

    path: str
    context_tokens: int
    slots: int
    waiting_max: int
    threads: int | None
    speculate: Speculate = "off"
    draft: Draft | None = None
    projector: str | None = None
    kv_type: KvType = "f16"
    kv_bytes_per_token: int = 0
    saved_bytes: int = 0
    spilled_bytes: int = 0
    spill_dir: str | None = None
    part: tuple[int, int] | None = None


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Start a sequence under the parent's `number`; exactly one prompt form is not None."""

    number: int
    session: bytes
    messages: tuple[ChatMessage, ...] | None
    text: str | None
    tokens: tuple[int, ...] | None
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    continuation: Continuation | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    n: int = 1
    tools: tuple[str, ...] = ()
    thinking: bool | None = None
    effort: str | None = None
    shown: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[ChatMessage, ...] | str | tuple[int, ...]:
        forms = (self.messages, self.text, self.tokens)
        return next(form for form in forms if form is not None)

    @classmethod
    def of(cls, number: int, request: Request) -> Generate:
        prompt = request.prompt
        text = prompt if isinstance(prompt, str) else None
        items = () if isinstance(prompt, str) else prompt
        messages = tuple(item for item in items if isinstance(item, ChatMessage))
        tokens = tuple(item for item in items if isinstance(item, int))
        return cls(
            number=number,
            session=request.session,
            messages=messages or None,
            text=text,
            tokens=tokens if text is None and not messages else None,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
            continuation=request.continuation,
            logprobs=request.logprobs,
            grammar=request.grammar,
            n=request.n,
            tools=request.tools,
            thinking=request.thinking,
            effort=request.effort,
            shown=request.shown,
        )


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    """Read inputs under the parent's `number`; the fields are those of `EmbedRequest`."""

    number: int
    inputs: tuple[str | tuple[int, ...], ...]
    query: str | None = None
    dimensions: int | None = None

    @classmethod
    def of(cls, number: int, request: EmbedRequest) -> Embed:
        return cls(number, request.inputs, request.query, request.dimensions)


class Count(msgspec.Struct, frozen=True, tag="count"):
    """Tokenise the prompt of `request`, whose number it has, and compute nothing."""

    request: Generate


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End all choices; answered by `Done` with reason "cancelled" for each still going.

    Inputs that are being read are answered by `Embedded`, early.
    """

    number: int


class StartPipeline(msgspec.Struct, frozen=True, tag="start_pipeline"):
    """To a part: all KV is lost, and from now on steps go out and rows come in under this name.

    `stages` batches are in flight at once, at most.
    """

    pipeline: bytes
    epoch: int
    stages: int


class StopPipeline(msgspec.Struct, frozen=True, tag="stop_pipeline"):
    """To a part: what is in flight is lost, and so is all KV. Requests wait for the next start."""

    reason: str


class Rows(msgspec.Struct, frozen=True, tag="rows"):
    """To a part: a `steps.Step` of a pipeline, from the stage before it."""

    pipeline: bytes
    step: bytes


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How much of the model is loaded, 0..1."""

    progress: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Requests may come now."""

    context_tokens: int
    style: ChatStyle
    purpose: Purpose = "generate"


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The model cannot be loaded; the child exits."""

    message: str


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The prompt was tokenised and fits."""

    number: int
    prompt_tokens: int


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    """How many tokens the prompt has; nothing follows under this number."""

    number: int
    prompt_tokens: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request is wrong in itself, as `RequestError` says."""

    number: int
    message: str
    param: str | None
    code: str | None


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    """The request is right, but cannot be served here, as `EngineError` says."""

    number: int
    message: str


class TooLong(msgspec.Struct, frozen=True, tag="too_long"):
    """The prompt and the tokens asked for exceed the context."""

    number: int
    prompt_tokens: int


class Text(msgspec.Struct, frozen=True, tag="text"):
    """More of an answer: `text` is what `tokens` new tokens, `ids`, have released."""

    number: int
    text: str
    tokens: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The end of a choice; after that of each, nothing follows under this number."""

    number: int
    reason: Literal["stop", "length", "cancelled"]
    usage: Usage
    index: int = 0
    stop: str | None = None


class Vector(msgspec.Struct, frozen=True, tag="vector"):
    """What became of the next input, as in `engine.Embedded`."""

    number: int
    floats: bytes


class Embedded(msgspec.Struct, frozen=True, tag="embedded"):
    """All inputs have been read, or no more will be; nothing follows under this number."""

    number: int


class Planned(msgspec.Struct, frozen=True, tag="planned"):
    """Of a part: a `steps.Step` for the first stage of a pipeline."""

    pipeline: bytes
    step: bytes


class PipelineFailed(msgspec.Struct, frozen=True, tag="pipeline_failed"):
    """Of a part: what came as rows could not be used, and the pipeline has stopped. `theirs`: it
    was not what was planned, or no numbers."""

    pipeline: bytes
    message: str
    theirs: bool


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Measurements, as in `EngineStats`."""

    slots_busy: int
    queue_depth: int
    kv_tokens_free: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    memory_bytes: int
    saved_tokens: int
    sessions: tuple[bytes, ...]
    speculation: SpeculationStats | None = None


ToChild = Load | Generate | Embed | Count | Cancel | StartPipeline | StopPipeline | Rows
FromChild = (
    Loading
    | Ready
    | LoadFailed
    | Accepted
    | Counted
    | Refused
    | Unable
    | TooLong
    | Text
    | Done
    | Vector
    | Embedded
    | Planned
    | PipelineFailed
    | Status
)

_encoder = msgspec.msgpack.Encoder()
_to_child: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


def encode(frame: ToChild | FromChild) -> bytes:
    """A frame with its length. Raises `LocalProtocolError` if it is over `FRAME_BYTES_MAX`."""
    return with_length(_encoder.encode(frame), FRAME_BYTES_MAX)


def with_length(body: bytes, frame_bytes_max: int) -> bytes:
    """Raises `LocalProtocolError` if it is larger than that."""
    if len(body) > frame_bytes_max:
        raise LocalProtocolError(f"an engine frame of {len(body)} bytes is too large")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frames; holds at most one incomplete frame."""

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> list[bytes]:
        """Add bytes; returns the bodies of the frames that are complete.

        Raises `LocalProtocolError` on an impossible length.
        """
        self._buffer += data
        bodies = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._frame_bytes_max:
                raise LocalProtocolError(f"an engine frame claims {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return bodies


def decode_to_child(body: bytes) -> ToChild:
    """Raises `LocalProtocolError` if the parent sent something else."""
    return decode(_to_child, body)


def decode_from_child(bodies: Sequence[bytes]) -> list[FromChild]:
    """Raises `LocalProtocolError` if the child sent something else."""
    return [decode(_from_child, body) for body in bodies]


def decode(decoder: msgspec.msgpack.Decoder[Frame], body: bytes) -> Frame:
    """Raises `LocalProtocolError` if the other side of the pipe sent something else."""
    try:
        frame: Frame = decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise LocalProtocolError(f"an engine frame does not decode: {error}") from error
    return frame
