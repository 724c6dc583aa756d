"""OpenAI's /v1/responses to and from a chat request. Pure: bytes in, values out.

Decides which fields of a response request work, which are harmless, and which are refused by name;
and which conversation a request goes on with. Does not know where responses are kept (`kept.py`).
The shapes follow OpenAI's reference for the Responses API.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import msgspec

from meshnode.engine import ChatMessage, Finish, Usage
from meshnode.gateway.dialects import Asked, Name, Tokens, ask
from meshnode.gateway.dialects.kept import Kept
from meshnode.gateway.fields import Shape, decode_body, refuse_unsupported, unsupported
from meshnode.gateway.images import content_of, linked_image
from meshnode.gateway.openai import Call

__all__ = ["RESPONSES_SHAPE", "decode_response", "encode_deleted"]

# OpenAI's own bounds.
METADATA_PAIRS_MAX = 16
METADATA_KEY_CHARS_MAX = 64
METADATA_VALUE_CHARS_MAX = 512


class _InputText(msgspec.Struct, tag_field="type", tag="input_text", forbid_unknown_fields=True):
    text: str


class _InputImage(msgspec.Struct, tag_field="type", tag="input_image", forbid_unknown_fields=True):
    image_url: str | None = None
    detail: Literal["auto", "low", "high"] | None = None
    file_id: Any = None


class _OutputText(msgspec.Struct, tag_field="type", tag="output_text", forbid_unknown_fields=True):
    """What we said, sent back to us."""

    text: str
    annotations: Any = None
    logprobs: Any = None


class _Item(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message, of the client or one of ours."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_InputText | _InputImage | _OutputText]
    type: Literal["message"] | None = None
    # Of our own messages; they say nothing more.
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Any = None


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_obfuscation: Literal[False] | None = None


_Metadata = Annotated[
    dict[
        Annotated[str, msgspec.Meta(max_length=METADATA_KEY_CHARS_MAX)],
        Annotated[str, msgspec.Meta(max_length=METADATA_VALUE_CHARS_MAX)],
    ],
    msgspec.Meta(max_length=METADATA_PAIRS_MAX),
]


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`Any` marks fields of which only a neutral value works."""

    model: Name
    input: str | Annotated[list[_Item], msgspec.Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    # Harmless: they change no answer.
    metadata: _Metadata | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None
    parallel_tool_calls: bool | None = None  # there are no tools to call
    max_tool_calls: Tokens | None = None
    # Not supported yet.
    background: Any = None
    context_management: Any = None
    conversation: Any = None
    include: Any = None
    prompt: Any = None
    reasoning: Any = None
    service_tier: Any = None
    text: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    truncation: Any = None


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "include": ([],),
    "prompt": (),
    "reasoning": ({},),
    "service_tier": ("auto", "default"),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_NEUTRAL_ITEM: Mapping[str, tuple[Any, ...]] = {"phase": ()}
_NEUTRAL_IMAGE: Mapping[str, tuple[Any, ...]] = {"file_id": ()}
_NEUTRAL_OUTPUT: Mapping[str, tuple[Any, ...]] = {"annotations": ([],), "logprobs": ([],)}
RESPONSES_SHAPE = Shape(
    _Body,
    {
        _Body: _NEUTRAL,
        _Item: _NEUTRAL_ITEM,
        _InputImage: _NEUTRAL_IMAGE,
        _OutputText: _NEUTRAL_OUTPUT,
    },
)
_decoder = msgspec.json.Decoder(_Body)


def decode_response(
    body: bytes,
    recall: Callable[[str], tuple[ChatMessage, ...]],
    keep: Callable[[str, Kept], None],
) -> Asked:
    """Understand the body of POST /v1/responses. Raises `RequestError` naming the field.

    `recall` gives the conversation up to a response that is kept, or raises; `keep` gets the
    response, when it is complete, unless the client asks not to store it.
    """
    asked: _Body = decode_body(_decoder, body)
    refuse_unsupported(asked, _NEUTRAL)
    messages = _messages(asked.input)
    if asked.previous_response_id is not None:
        before = recall(asked.previous_response_id)
        messages[:0] = [{"role": each.role, "content": content_of(each)} for each in before]
    if asked.instructions is not None:  # of this turn only: those of earlier ones are not kept
        messages.insert(0, {"role": "system", "content": asked.instructions})
    fields = {
        "model": asked.model,
        "messages": messages,
        "max_tokens": asked.max_output_tokens,
        "stream": asked.stream,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "prompt_cache_key": asked.prompt_cache_key,
        "user": asked.user,
    }
    return ask(fields, lambda call: partial(_Writer, asked, call, keep))


def _messages(given: str | list[_Item]) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [
        {"role": item.role, "content": _content(item, f"input[{index}].")}
        for index, item in enumerate(given)
    ]


def _content(item: _Item, path: str) -> str | list[dict[str, Any]]:
    refuse_unsupported(item, _NEUTRAL_ITEM, path)
    if isinstance(item.content, str):
        return item.content
    return [
        _part_of(item, part, f"{path}content[{index}].") for index, part in enumerate(item.content)
    ]


def _part_of(
    item: _Item, part: _InputText | _InputImage | _OutputText, path: str
) -> dict[str, Any]:
    if isinstance(part, _InputImage):
        refuse_unsupported(part, _NEUTRAL_IMAGE, path)
        if item.role != "user":
            raise unsupported(f"{path}type")
        return linked_image(part.image_url or "", part.detail, f"{path}image_url")
    if isinstance(part, _OutputText):
        refuse_unsupported(part, _NEUTRAL_OUTPUT, path)
    return {"type": "text", "text": part.text}


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------

_json = msgspec.json.Encoder()


class _Writer:
    """Writes the answer to one response request."""

    stream_type = "text/event-stream"

    def __init__(
        self,
        asked: _Body,
        call: Call,
        keep: Callable[[str, Kept], None],
        id: str,
        created: int,
    ) -> None:
        self._call = call
        self._keep = keep
        self._store = asked.store is not False
        self._instructed = asked.instructions is not None
        self._id = f"resp_{id}"
        self._item_id = f"msg_{id}"
        self._texts: list[str] = []
        self._events = 0
        self._head: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": created,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": call.model,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": self._store,
            "temperature": call.sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [],
            "top_p": call.sampling.top_p,
            "truncation": "disabled",
            "user": asked.user,
        }

    def opening(self) -> bytes:
        begun = self._response("in_progress", [])
        return b"".join(
            (
                self._event("response.created", response=begun),
                self._event("response.in_progress", response=begun),
                self._event(
                    "response.output_item.added",
                    output_index=0,
                    item=self._item("in_progress", []),
                ),
                self._part_event("response.content_part.added", part=_part("")),
            )
        )

    def delta(self, text: str) -> bytes:
        self._texts.append(text)
        return self._part_event("response.output_text.delta", delta=text, logprobs=[])

    def closing(self, finish: Finish) -> bytes:
        text = "".join(self._texts)
        status, response = self._end(text, finish)
        return b"".join(
            (
                self._part_event("response.output_text.done", text=text, logprobs=[]),
                self._part_event("response.content_part.done", part=_part(text)),
                self._event(
                    "response.output_item.done", output_index=0, item=response["output"][0]
                ),
                self._event(f"response.{status}", response=response),
            )
        )

    def broken(self, message: str) -> bytes:
        output = [self._item("incomplete", [_part("".join(self._texts))])]
        error = {"code": "server_error", "message": message}
        failed = {**self._response("failed", output), "error": error}
        return self._event("response.failed", response=failed)

    def whole(self, text: str, finish: Finish) -> bytes:
        return _json.encode(self._end(text, finish)[1])

    def _end(self, text: str, finish: Finish) -> tuple[str, dict[str, Any]]:
        """Its status and the whole response, which is kept if it is to be."""
        status = "completed" if finish.reason == "stop" else "incomplete"
        response = self._response(status, [self._item(status, [_part(text)])])
        response["usage"] = _usage(finish.usage)
        if finish.reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if self._store:
            said = (each for each in self._call.prompt if isinstance(each, ChatMessage))
            heard = tuple(said)[self._instructed :]
            conversation = (*heard, ChatMessage("assistant", text))
            self._keep(self._id, Kept(_json.encode(response), conversation))
        return status, response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "status": status, "output": output, "usage": None}

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _part_event(self, type: str, **members: Any) -> bytes:
        return self._event(type, item_id=self._item_id, output_index=0, content_index=0, **members)

    def _event(self, type: str, **members: Any) -> bytes:
        event = {"type": type, "sequence_number": self._events, **members}
        self._events += 1
        return b"event: %b\ndata: %b\n\n" % (type.encode(), _json.encode(event))


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        # Nothing is charged for writing a cache, so nobody counts it.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def encode_deleted(id: str) -> bytes:
    """The answer of DELETE /v1/responses/{id}."""
    return _json.encode({"id": id, "object": "response", "deleted": True})
