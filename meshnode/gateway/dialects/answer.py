"""The answer to a chat request, read back and told to the writer of another dialect.

Decides what of an answer's events counts: text, how it ended, what it cost, and that it cannot be
completed. Does not know which dialect it is told in, nor whether an engine here or a peer spoke:
what a peer said is hostile until it has been read.

Each piece of text goes on as soon as it is here, and nothing is read ahead: a client that is slow,
or gone, is felt by the engine as it is without a translation.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Literal

import msgspec

from meshnode.engine import Finish, Usage
from meshnode.errors import EngineError
from meshnode.gateway.dialects import OpenAIError, Writer

__all__ = ["EventReader", "told_as_stream", "told_whole"]

_UNREADABLE = "The replica's answer cannot be read. Ask again."
_CUT = "The answer ended before it was complete. Ask again."

_EVENT_END = re.compile(rb"\n\n|\r\n\r\n|\r\r")
_Reason = Literal["stop", "length"]


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None  # vLLM's is null


class _Text(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    """`delta` of a streamed answer, `message` of a whole one."""

    delta: _Text | None = None
    message: _Text | None = None
    finish_reason: _Reason | None = None


class _Said(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: OpenAIError | None = None


_said = msgspec.json.Decoder(_Said)


class EventReader:
    """Reads the events of one stream. They end with a `Finish` or an `OpenAIError`."""

    def __init__(self) -> None:
        self._reason: _Reason | None = None
        self._usage: _Usage | None = None

    def feed(self, events: bytes) -> Iterator[str | Finish | OpenAIError]:
        """Whole events, as `gateway.answer` passes them on."""
        for event in _EVENT_END.split(events):
            data = _data(event)
            if not data:
                continue  # a comment, or nothing
            if data == b"[DONE]":
                yield _finish(self._reason, self._usage) or OpenAIError(_UNREADABLE)
                return
            try:
                said = _said.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                yield OpenAIError(_UNREADABLE)
                return
            if said.error is not None:
                yield said.error
                return
            self._usage = said.usage or self._usage
            for choice in said.choices:
                self._reason = choice.finish_reason or self._reason
                if choice.delta is not None and choice.delta.content:
                    yield choice.delta.content


def _data(event: bytes) -> bytes:
    """What servers of other kinds send has any legal form, not only ours."""
    lines = (line for line in event.splitlines() if line.startswith(b"data:"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


async def told_as_stream(
    events: AsyncIterator[bytes], writer: Writer
) -> AsyncGenerator[bytes, None]:
    """A stream in the writer's words; it ends with `closing` or `broken`, never without."""
    reader = EventReader()
    opening = writer.opening()
    async for chunk in events:
        told = bytearray(opening)
        opening = b""
        for piece in reader.feed(chunk):
            if isinstance(piece, str):
                told += writer.delta(piece)
                continue
            told += _end(piece, writer)
            yield bytes(told)
            return
        if told:
            yield bytes(told)
    yield writer.broken(_CUT)


def told_whole(body: bytes, writer: Writer) -> bytes:
    """A whole answer in the writer's words. Raises `EngineError` if it is none."""
    try:
        said = _said.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EngineError(_UNREADABLE) from None
    choice = said.choices[0] if said.choices else _Choice()
    finish = _finish(choice.finish_reason, said.usage)
    if finish is None or choice.message is None:
        raise EngineError(_UNREADABLE)
    return writer.whole(choice.message.content or "", finish)


def _end(piece: Finish | OpenAIError, writer: Writer) -> bytes:
    return writer.closing(piece) if isinstance(piece, Finish) else writer.broken(piece.message)


def _finish(reason: _Reason | None, usage: _Usage | None) -> Finish | None:
    """None if an answer that ended did not say how, or what it cost."""
    if usage is None or reason is None:
        return None
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return Finish(reason, Usage(usage.prompt_tokens, cached, usage.completion_tokens))
