"""Other APIs for the same request: one file for each way of asking that is not OpenAI's chat.

Decides what a dialect is: two pure translations. A body becomes a body of /v1/chat/completions, so
that everything behind the gateway's edge, tunnels and peers included, knows one kind of request;
and the answer to that becomes what the dialect's clients expect, piece by piece as it comes. Does
not know HTTP, engines or peers.

* `responses.py`  OpenAI's /v1/responses; `kept.py` remembers them for the next turn
* `anthropic.py`  /v1/messages
* `ollama.py`     /api/chat, /api/generate and what their clients look up first
* `answer.py`     the answer to a chat request, read back and told to a writer
* `routes.py`     the paths
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import msgspec

from meshnode.engine import Usage
from meshnode.errors import RequestError
from meshnode.gateway.openai import (
    NAME_CHARS_MAX,
    STOP_SEQUENCES_MAX,
    Call,
    decode_chat,
    encode_error,
)
from meshnode.gateway.said import Said

__all__ = [
    "Asked",
    "End",
    "Name",
    "Names",
    "OpenAIError",
    "Tokens",
    "Told",
    "Writer",
    "arguments_object",
    "ask",
    "given",
    "read_error",
    "stop_of",
]

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Tokens = Annotated[int, msgspec.Meta(ge=1)]


Names = Sequence[tuple[str, str]]
"""What fields of /v1/chat/completions are called in a dialect: patterns and what replaces them, the
first that fits. Errors name a field in the words of whoever asked."""


@dataclass(frozen=True, slots=True)
class End:
    """How an answer ended, and what it cost; `thoughts` are tokens, `stop` the stop string."""

    reason: Literal["stop", "length", "tool_calls"]
    usage: Usage
    thoughts: int = 0
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """A whole answer. `calls` are names of functions and their arguments, as JSON text."""

    thoughts: str
    text: str
    calls: tuple[tuple[str, str], ...] = ()


class Writer(Protocol):
    """Writes one answer. For a stream: `opening`, any number of `say`, then `closing` or
    `broken`; else `whole`, alone."""

    stream_type: str
    """The content type of a stream."""

    def opening(self) -> bytes:
        """What comes before the first text."""
        ...

    def say(self, said: Said) -> bytes:
        """Some more, never empty."""
        ...

    def closing(self, end: End) -> bytes:
        """The end of a complete answer."""
        ...

    def broken(self, message: str) -> bytes:
        """The end of an answer that nobody can complete."""
        ...

    def whole(self, told: Told, end: End) -> bytes:
        """The answer as one JSON object."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, understood: `body` says it to /v1/chat/completions, `call` is what that means.

    `writer` makes the answer's writer from its id and its date in Unix seconds.
    """

    call: Call
    body: bytes
    writer: Callable[[str, int], Writer]
    names: Names = ()

    def renamed(self, error: RequestError) -> RequestError:
        """An error of the chat request that names the field as whoever asked did."""
        return _renamed(error, self.names)

    def renamed_body(self, body: bytes) -> bytes:
        """The same of an error that a peer has answered with."""
        said = read_error(body)
        error = self.renamed(RequestError(said.message, param=said.param, code=said.code))
        return encode_error(str(error), "invalid_request_error", param=error.param, code=error.code)


def ask(
    fields: Mapping[str, Any],
    writer: Callable[[Call], Callable[[str, int], Writer]],
    names: Names = (),
) -> Asked:
    """`fields` are those of /v1/chat/completions; those that are None are left out.

    Raises `RequestError`, which names the field by `names`.
    """
    chat = given(fields)
    chat["messages"] = [_plain(message) for message in chat["messages"]]
    if chat.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    body = msgspec.json.encode(chat)
    try:
        call = decode_chat(body)
    except RequestError as error:
        raise _renamed(error, names) from None
    return Asked(call, body, writer(call), names)


def _renamed(error: RequestError, names: Names) -> RequestError:
    param = error.param
    for pattern, name in names:
        if param is not None and (found := re.match(pattern, param)):
            theirs = found.expand(name) + param[found.end() :]
            message = str(error).replace(f"`{param}", f"`{theirs}")
            return RequestError(message, param=theirs, code=error.code)
    return error


def arguments_object(arguments: str) -> dict[str, Any] | None:
    """A call's arguments, parsed; None if they were cut off midway."""
    try:
        parsed: dict[str, Any] = msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return parsed


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are None."""
    return {name: value for name, value in fields.items() if value is not None}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """With a single text as a string: servers behind nodes may know no parts."""
    match message.get("content"):
        case [{"type": "text", "text": str(text), **more}] if not more:
            return {**message, "content": text}
    return message


def stop_of(sequences: list[str] | None, param: str) -> list[str] | None:
    """Stop strings within the bounds of /v1/chat/completions. Raises `RequestError`."""
    if sequences and (len(sequences) > STOP_SEQUENCES_MAX or "" in sequences):
        raise RequestError(
            f"`{param}` has up to {STOP_SEQUENCES_MAX} strings, none of them empty.",
            param=param,
            code="invalid_value",
        )
    return sequences or None


class OpenAIError(msgspec.Struct):
    """What other dialects keep of an error in OpenAI's shape."""

    message: str
    code: str | None = None
    param: str | None = None


class _ErrorBody(msgspec.Struct):
    error: OpenAIError


def read_error(body: bytes) -> OpenAIError:
    """The error of an answer that a node, perhaps a hostile one, gave."""
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return OpenAIError("The request was refused without a reason.")
