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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec

from meshnode.engine import Finish
from meshnode.errors import RequestError
from meshnode.gateway.openai import NAME_CHARS_MAX, STOP_SEQUENCES_MAX, Call, decode_chat

__all__ = ["Asked", "Name", "OpenAIError", "Tokens", "Writer", "ask", "read_error", "stop_of"]

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Tokens = Annotated[int, msgspec.Meta(ge=1)]


class Writer(Protocol):
    """Writes one answer. For a stream: `opening`, any number of `delta`, then `closing` or
    `broken`; else `whole`, alone."""

    stream_type: str
    """The content type of a stream."""

    def opening(self) -> bytes:
        """What comes before the first text."""
        ...

    def delta(self, text: str) -> bytes:
        """Some text, never empty."""
        ...

    def closing(self, finish: Finish) -> bytes:
        """The end of a complete answer."""
        ...

    def broken(self, message: str) -> bytes:
        """The end of an answer that nobody can complete."""
        ...

    def whole(self, text: str, finish: Finish) -> bytes:
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


def ask(fields: Mapping[str, Any], writer: Callable[[Call], Callable[[str, int], Writer]]) -> Asked:
    """`fields` are those of /v1/chat/completions; those that are None are left out.

    Raises `RequestError`, which names a field of that API: dialects check theirs before.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    given["messages"] = [_plain(message) for message in given["messages"]]
    if given.get("stream"):
        given["stream_options"] = {"include_usage": True}
    body = msgspec.json.encode(given)
    call = decode_chat(body)
    return Asked(call, body, writer(call))


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


class _ErrorBody(msgspec.Struct):
    error: OpenAIError


def read_error(body: bytes) -> OpenAIError:
    """The error of an answer that a node, perhaps a hostile one, gave."""
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return OpenAIError("The request was refused without a reason.")
