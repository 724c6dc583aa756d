"""The answer to a chat request, read back and told to the writer of another dialect.

Decides what of an answer's events counts: thoughts, text, calls, how it ended, what it cost, and
that it cannot be completed. Does not know which dialect it is told in, nor whether an engine here
or a peer spoke: what a peer said is hostile until it has been read.

Each piece of text goes on as soon as it is here, and nothing is read ahead: a client that is slow,
or gone, is felt by the engine as it is without a translation.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Literal

import msgspec

from meshnode.engine import Usage
from meshnode.errors import EngineError
from meshnode.gateway.dialects import End, OpenAIError, Told, Writer
from meshnode.gateway.said import Arguments, Call, Content, Reasoning, Said

__all__ = ["EventReader", "told_as_stream", "told_whole"]

_UNREADABLE = "The replica's answer cannot be read. Ask again."
_CUT = "The answer ended before it was complete. Ask again."

_EVENT_END = re.compile(rb"\n\n|\r\n\r\n|\r\r")
_Reason = Literal["stop", "length", "tool_calls"]


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Thoughts(msgspec.Struct):
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    # vLLM's are null.
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Thoughts | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str = ""


class _Call(msgspec.Struct):
    function: _Function
    index: int = 0


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's word for it
    tool_calls: list[_Call] | None = None

    @property
    def thoughts(self) -> str:
        return self.reasoning_content or self.reasoning or ""

    @property
    def calls(self) -> list[_Call]:
        return self.tool_calls or []


class _Choice(msgspec.Struct):
    """`delta` of a streamed answer, `message` of a whole one."""

    delta: _Text | None = None
    message: _Text | None = None
    finish_reason: _Reason | None = None
    stop_reason: str | int | None = None  # of some, a token


class _Said(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: OpenAIError | None = None


_said = msgspec.json.Decoder(_Said)


class EventReader:
    """Reads the events of one stream. They end with an `End` or an `OpenAIError`."""

    def __init__(self) -> None:
        self._reason: _Reason | None = None
        self._stop: str | None = None
        self._calls = 0
        self._usage: _Usage | None = None

    def feed(self, events: bytes) -> Iterator[Said | End | OpenAIError]:
        """Whole events, as `gateway.answer` passes them on."""
        for event in _EVENT_END.split(events):
            data = _data(event)
            if not data:
                continue  # a comment, or nothing
            if data == b"[DONE]":
                yield _end(self._reason, self._usage, self._stop) or OpenAIError(_UNREADABLE)
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
                self._stop = _stop(choice) or self._stop
                if choice.delta is None:
                    continue
                if choice.delta.thoughts:
                    yield Reasoning(choice.delta.thoughts)
                if choice.delta.content:
                    yield Content(choice.delta.content)
                for call in choice.delta.calls:
                    if not self._follows(call):
                        yield OpenAIError(_UNREADABLE)
                        return
                    if call.function.name:
                        yield Call(call.index, call.function.name)
                    if call.function.arguments:
                        yield Arguments(call.index, call.function.arguments)

    def _follows(self, call: _Call) -> bool:
        """Calls come one after the other; each is named once, and then has arguments."""
        if call.function.name:
            self._calls += 1
        return call.index == self._calls - 1


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
            if isinstance(piece, End | OpenAIError):
                told += _last(piece, writer)
                yield bytes(told)
                return
            told += writer.say(piece)
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
    end = _end(choice.finish_reason, said.usage, _stop(choice))
    message = choice.message
    if end is None or message is None or any(not each.function.name for each in message.calls):
        raise EngineError(_UNREADABLE)
    calls = tuple((each.function.name or "", each.function.arguments) for each in message.calls)
    return writer.whole(Told(message.thoughts, message.content or "", calls), end)


def _stop(choice: _Choice) -> str | None:
    return choice.stop_reason if isinstance(choice.stop_reason, str) else None


def _last(piece: End | OpenAIError, writer: Writer) -> bytes:
    return writer.closing(piece) if isinstance(piece, End) else writer.broken(piece.message)


def _end(reason: _Reason | None, usage: _Usage | None, stop: str | None) -> End | None:
    """None if an answer that ended did not say how, or what it cost."""
    if usage is None or reason is None:
        return None
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    details = usage.completion_tokens_details
    counts = Usage(usage.prompt_tokens, cached, usage.completion_tokens)
    return End(reason, counts, details.reasoning_tokens if details else 0, stop)
