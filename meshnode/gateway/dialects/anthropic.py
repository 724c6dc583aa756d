"""Anthropic's /v1/messages to and from a chat request. Pure: bytes in, values out.

Decides which fields of a message request work, which are harmless, and which are refused by name.
The shapes follow Anthropic's reference for the Messages API. Where engines say less than it asks:
an answer that a stop sequence ended has the stop reason `end_turn`, and a stream tells its input
tokens at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec

from meshnode.engine import Finish, Usage
from meshnode.errors import RequestError
from meshnode.gateway.dialects import Asked, Name, Tokens, ask, read_error, stop_of
from meshnode.gateway.fields import Shape, decode_body, refuse_unsupported, unsupported
from meshnode.gateway.images import bare_image
from meshnode.gateway.openai import TOKEN_ID_MAX, Call, encode_error

__all__ = ["COUNT_REFUSED", "MESSAGES_SHAPE", "decode_messages", "encode_messages_error"]


class _CacheControl(msgspec.Struct, forbid_unknown_fields=True):
    """A hint where a prefix ends that is worth keeping; every prefix is kept here anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Text(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str
    cache_control: _CacheControl | None = None
    citations: Any = None


class _Source(msgspec.Struct, forbid_unknown_fields=True):
    """Only bytes that come with the request: a node fetches no images."""

    type: Literal["base64"]
    media_type: Literal["image/png", "image/jpeg", "image/webp", "image/gif"]
    data: str


class _Image(msgspec.Struct, tag_field="type", tag="image", forbid_unknown_fields=True):
    source: _Source
    cache_control: _CacheControl | None = None


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str | list[_Text | _Image]


class _Metadata(msgspec.Struct, forbid_unknown_fields=True):
    user_id: str | None = None


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`Any` marks fields of which only a neutral value works."""

    model: Name
    max_tokens: Tokens
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    system: str | list[_Text] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=TOKEN_ID_MAX)] | None = None
    # Harmless: they change no answer.
    metadata: _Metadata | None = None
    cache_control: _CacheControl | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    # Not supported yet.
    container: Any = None
    context_management: Any = None
    inference_geo: Any = None
    mcp_servers: Any = None
    output_config: Any = None
    output_format: Any = None
    thinking: Any = None
    tool_choice: Any = None
    tools: Any = None


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "output_config": ({},),
    "output_format": (),
    "thinking": ({"type": "disabled"},),
    "tool_choice": ({"type": "none"},),
    "tools": ([],),
}
_NEUTRAL_TEXT: Mapping[str, tuple[Any, ...]] = {"citations": ([],)}
MESSAGES_SHAPE = Shape(_Body, {_Body: _NEUTRAL, _Text: _NEUTRAL_TEXT})
_decoder = msgspec.json.Decoder(_Body)


def decode_messages(body: bytes) -> Asked:
    """Understand the body of /v1/messages. Raises `RequestError` naming the field."""
    asked: _Body = decode_body(_decoder, body)
    refuse_unsupported(asked, _NEUTRAL)
    fields = {
        "model": asked.model,
        "messages": _turns(asked),
        "max_tokens": asked.max_tokens,
        "stop": stop_of(asked.stop_sequences, "stop_sequences"),
        "stream": asked.stream,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
    }
    return ask(fields, lambda call: partial(_Writer, call))


def _turns(asked: _Body) -> list[dict[str, Any]]:
    """The messages of a chat request; neighbours of one role are one turn, as Anthropic has it."""
    turns: list[dict[str, Any]] = []
    if asked.system:
        turns.append({"role": "system", "content": _parts(asked.system, "system")})
    for index, message in enumerate(asked.messages):
        path = f"messages[{index}].content"
        parts = _parts(message.content, path)
        for place, part in enumerate(parts):
            if message.role == "assistant" and part["type"] != "text":
                raise unsupported(f"{path}[{place}].type")
        if turns and turns[-1]["role"] == message.role:
            turns[-1]["content"] += parts
        else:
            turns.append({"role": message.role, "content": parts})
    if turns[-1]["role"] == "assistant":
        last = f"messages[{len(asked.messages) - 1}].role"
        raise RequestError(
            f"`{last}` must be `user`: an answer that is begun already cannot be continued here.",
            param=last,
            code="unsupported_parameter",
        )
    return turns


def _parts(content: str | Sequence[_Text | _Image], path: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        if isinstance(block, _Image):
            parts.append(bare_image(block.source.data, f"{path}[{index}].source.data"))
        else:
            refuse_unsupported(block, _NEUTRAL_TEXT, f"{path}[{index}].")
            parts.append({"type": "text", "text": block.text})
    return parts


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------

_json = msgspec.json.Encoder()
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


def _event(type: str, **members: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (type.encode(), _json.encode({"type": type, **members}))


class _Writer:
    """Writes the answer to one message request."""

    stream_type = "text/event-stream"

    def __init__(self, call: Call, id: str, created: int) -> None:
        self._head: dict[str, Any] = {
            "id": f"msg_{id}",
            "type": "message",
            "role": "assistant",
            "model": call.model,
        }

    def opening(self) -> bytes:
        message = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(0, 0, 0)),
        }
        return b"".join(
            (
                _event("message_start", message=message),
                _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
                _event("ping"),
            )
        )

    def delta(self, text: str) -> bytes:
        return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def closing(self, finish: Finish) -> bytes:
        delta = {"stop_reason": _STOP_REASONS[finish.reason], "stop_sequence": None}
        return b"".join(
            (
                _event("content_block_stop", index=0),
                _event("message_delta", delta=delta, usage=_usage(finish.usage)),
                _event("message_stop"),
            )
        )

    def broken(self, message: str) -> bytes:
        return _event("error", error={"type": "api_error", "message": message})

    def whole(self, text: str, finish: Finish) -> bytes:
        return _json.encode(
            {
                **self._head,
                "content": [{"type": "text", "text": text}],
                "stop_reason": _STOP_REASONS[finish.reason],
                "stop_sequence": None,
                "usage": _usage(finish.usage),
            }
        )


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts tokens from the cache beside the others, not among them."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

COUNT_REFUSED = encode_error(
    "Tokens are not counted in advance here; the `usage` of an answer has its counts.",
    "invalid_request_error",
    code="not_implemented",
)
"""The answer of /v1/messages/count_tokens, in OpenAI's shape: only an engine can count, and engines
count what they answer."""


def encode_messages_error(status: int, body: bytes) -> bytes:
    """An error in OpenAI's shape, in Anthropic's."""
    other = "invalid_request_error" if status < 500 else "api_error"
    error = {"type": _ERROR_TYPES.get(status, other), "message": read_error(body).message}
    return _json.encode({"type": "error", "error": error})
