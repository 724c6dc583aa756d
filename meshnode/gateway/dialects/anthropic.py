"""Anthropic's /v1/messages, and its counts, to and from a chat request. Pure: bytes in, values out.

Decides which fields of a message request work, which are harmless, and which are refused by name.
The shapes follow Anthropic's reference for the Messages API. Where engines say less than it asks: a
stream tells its input tokens at its end, and thoughts have no signature, for nobody checks one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec

from meshnode.engine import Usage
from meshnode.errors import RequestError
from meshnode.gateway.dialects import (
    Asked,
    End,
    Name,
    Tokens,
    Told,
    arguments_object,
    ask,
    given,
    read_error,
    stop_of,
)
from meshnode.gateway.fields import Shape, decode_body, refuse_unsupported, unsupported
from meshnode.gateway.images import bare_image
from meshnode.gateway.openai import TOKEN_ID_MAX
from meshnode.gateway.openai import Call as ChatCall
from meshnode.gateway.said import Arguments, Call, Content, Reasoning, Said

__all__ = [
    "COUNT_SHAPE",
    "MESSAGES_SHAPE",
    "decode_count",
    "decode_messages",
    "encode_counted",
    "encode_messages_error",
]


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


class _Thinking(msgspec.Struct, tag_field="type", tag="thinking", forbid_unknown_fields=True):
    """What we thought, sent back to us."""

    thinking: str
    signature: str | None = None


class _ToolUse(msgspec.Struct, tag_field="type", tag="tool_use", forbid_unknown_fields=True):
    id: str
    name: str
    input: dict[str, Any]
    cache_control: _CacheControl | None = None
    caller: Any = None


class _ToolResult(msgspec.Struct, tag_field="type", tag="tool_result", forbid_unknown_fields=True):
    tool_use_id: str
    content: str | list[_Text | _Image] = ""
    is_error: bool | None = None
    cache_control: _CacheControl | None = None


_Block = _Text | _Image | _Thinking | _ToolUse | _ToolResult


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str | list[_Block]


class _Metadata(msgspec.Struct, forbid_unknown_fields=True):
    user_id: str | None = None


class _Tool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: _CacheControl | None = None
    eager_input_streaming: bool | None = None  # they stream as they come
    allowed_callers: Any = None
    defer_loading: Any = None
    input_examples: Any = None


class _ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _ThinkingWish(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["disabled", "adaptive", "enabled"]
    budget_tokens: Any = None
    display: Any = None


class _Format(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class _OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    format: _Format | None = None
    effort: Literal["low", "medium", "high", "xhigh"] | None = None
    task_budget: Any = None


class _Prompt(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What says how many tokens the input has. `Any` marks fields of which only a neutral value
    works."""

    model: Name
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    system: str | list[_Text] | None = None
    output_config: _OutputConfig | None = None
    output_format: _Format | None = None  # as older clients call it
    thinking: _ThinkingWish | None = None
    tool_choice: _ToolChoice | None = None
    tools: list[_Tool] | None = None
    # Harmless: it changes no answer.
    cache_control: _CacheControl | None = None
    # Not supported yet.
    context_management: Any = None
    mcp_servers: Any = None
    speed: Any = None


class _Body(_Prompt, forbid_unknown_fields=True, kw_only=True):
    max_tokens: Tokens
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=TOKEN_ID_MAX)] | None = None
    # Harmless: they change no answer.
    metadata: _Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    # Not supported yet.
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None


_NEUTRAL_PROMPT: Mapping[str, tuple[Any, ...]] = {
    "context_management": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **_NEUTRAL_PROMPT,
    "container": (),
    "diagnostics": (),
    "inference_geo": (),
}
_NEUTRAL_TEXT: Mapping[str, tuple[Any, ...]] = {"citations": ([],)}
_NEUTRAL_TOOL: Mapping[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "input_examples": ([],),
}
_NEUTRAL_THINKING: Mapping[str, tuple[Any, ...]] = {"budget_tokens": (), "display": ("summarized",)}
_NEUTRAL_OUTPUT: Mapping[str, tuple[Any, ...]] = {"task_budget": ()}
_NEUTRAL_TOOL_USE: Mapping[str, tuple[Any, ...]] = {"caller": ({"type": "direct"},)}
_WITHIN: Mapping[type[msgspec.Struct], Mapping[str, tuple[Any, ...]]] = {
    _Text: _NEUTRAL_TEXT,
    _Tool: _NEUTRAL_TOOL,
    _ToolUse: _NEUTRAL_TOOL_USE,
    _ThinkingWish: _NEUTRAL_THINKING,
    _OutputConfig: _NEUTRAL_OUTPUT,
}
MESSAGES_SHAPE = Shape(_Body, {**_WITHIN, _Body: _NEUTRAL})
COUNT_SHAPE = Shape(_Prompt, {**_WITHIN, _Prompt: _NEUTRAL_PROMPT})
# What fields of the chat request are called here.
_NAMES = (
    (r"tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"response_format\.json_schema", "output_config.format"),
    (r"response_format", "output_config.format"),
    (r"reasoning_effort", "output_config.effort"),
    (r"chat_template_kwargs\.enable_thinking", "thinking.type"),
)
_decoder = msgspec.json.Decoder(_Body)
_prompt_decoder = msgspec.json.Decoder(_Prompt)


def decode_messages(body: bytes) -> Asked:
    """Understand the body of /v1/messages. Raises `RequestError` naming the field."""
    asked: _Body = decode_body(_decoder, body)
    refuse_unsupported(asked, _NEUTRAL)
    return _ask(
        asked,
        max_tokens=asked.max_tokens,
        stop=stop_of(asked.stop_sequences, "stop_sequences"),
        stream=asked.stream,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
    )


def decode_count(body: bytes) -> Asked:
    """Understand the body of /v1/messages/count_tokens. Raises `RequestError` naming the field."""
    asked: _Prompt = decode_body(_prompt_decoder, body)
    refuse_unsupported(asked, _NEUTRAL_PROMPT)
    return _ask(asked)


def _ask(asked: _Prompt, **fields: Any) -> Asked:
    _refuse_within(asked)
    prompt = {
        "model": asked.model,
        "messages": _turns(asked),
        **_tools(asked),
        **_thinking_and_format(asked),
    }
    return ask({**prompt, **fields}, lambda call: partial(_Writer, call), _NAMES)


def _refuse_within(asked: _Prompt) -> None:
    for index, tool in enumerate(asked.tools or ()):
        refuse_unsupported(tool, _NEUTRAL_TOOL, f"tools[{index}].")
    if asked.thinking is not None:
        refuse_unsupported(asked.thinking, _NEUTRAL_THINKING, "thinking.")
    if asked.output_config is not None:
        refuse_unsupported(asked.output_config, _NEUTRAL_OUTPUT, "output_config.")


def _tools(asked: _Prompt) -> dict[str, Any]:
    if not asked.tools and asked.tool_choice is None:
        return {}
    tools = [
        {
            "type": "function",
            "function": given({
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            }),
        }
        for tool in asked.tools or ()
    ]  # fmt: skip
    choice = asked.tool_choice or _ToolChoice("auto")
    if (choice.type == "tool") != (choice.name is not None):
        raise RequestError(
            "`tool_choice.name` goes with the type `tool`.",
            param="tool_choice.name",
            code="invalid_value",
        )
    named = {"type": "function", "function": {"name": choice.name}}
    words = {"auto": "auto", "none": "none", "any": "required", "tool": named}
    parallel = False if choice.disable_parallel_tool_use else None
    return {"tools": tools, "tool_choice": words[choice.type], "parallel_tool_calls": parallel}


def _thinking_and_format(asked: _Prompt) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if asked.thinking is not None and asked.thinking.type != "adaptive":
        enabled = asked.thinking.type == "enabled"
        fields["chat_template_kwargs"] = {"enable_thinking": enabled}
    config = asked.output_config or _OutputConfig()
    if config.format is not None and asked.output_format is not None:
        raise RequestError(
            "`output_format` is the old name of `output_config.format`; give one of them.",
            param="output_format",
            code="invalid_value",
        )
    form = config.format or asked.output_format
    if form is not None:
        schema = {"name": "answer", "schema": form.schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {**fields, "reasoning_effort": config.effort}


def _turns(asked: _Prompt) -> list[dict[str, Any]]:
    """The messages of a chat request; neighbours of one role are one turn, as Anthropic has it."""
    turns: list[dict[str, Any]] = []
    if asked.system:
        turns.append({"role": "system", "content": _parts(asked.system, "system")})
    for index, message in enumerate(asked.messages):
        _add_turn(turns, message, f"messages[{index}].content")
    if not turns or turns[-1]["role"] == "system":
        raise RequestError("`messages` say nothing.", param="messages", code="invalid_value")
    if turns[-1]["role"] == "assistant":
        last = f"messages[{len(asked.messages) - 1}].role"
        raise RequestError(
            f"`{last}` must be `user`: an answer that is begun already cannot be continued here.",
            param=last,
            code="unsupported_parameter",
        )
    return turns


def _add_turn(turns: list[dict[str, Any]], message: _Message, path: str) -> None:
    """A message's blocks: results are turns of their own, all else is one of the message's role.

    A chat's results are text. What a result shows follows all of them, in the user's turn.
    """
    blocks = message.content
    shown: list[dict[str, Any]] = []
    for at, block in enumerate([_Text(blocks)] if isinstance(blocks, str) else blocks):
        here = f"{path}[{at}]"
        is_users = isinstance(block, (_Image, _ToolResult))
        if not isinstance(block, _Text) and is_users != (message.role == "user"):
            raise unsupported(f"{here}.type")
        if isinstance(block, _ToolResult):
            text, images = _result(block, here)
            turns.append(text)
            shown += images
            continue
        if not turns or turns[-1]["role"] != message.role:
            turns.append({"role": message.role, "content": shown})
            shown = []
        turn = turns[-1]
        if isinstance(block, (_Text, _Image)):
            turn["content"] += _parts([block], path, at)
        elif isinstance(block, _Thinking):
            turn["reasoning_content"] = turn.get("reasoning_content", "") + block.thinking
        else:
            refuse_unsupported(block, _NEUTRAL_TOOL_USE, f"{here}.")
            arguments = _json.encode(block.input).decode()
            function = {"name": block.name, "arguments": arguments}
            call = {"id": block.id, "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
    if shown:
        turns.append({"role": "user", "content": shown})


def _result(block: _ToolResult, path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The turn, and the images that go after it."""
    parts = _parts(block.content, f"{path}.content")
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    # A chat has no field for it; in words, every model understands.
    content = f"Error: {text}" if block.is_error else text
    images = [part for part in parts if part["type"] != "text"]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}, images


def _parts(
    content: str | Sequence[_Text | _Image], path: str, first: int = 0
) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(content, first):
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
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _event(type: str, **members: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (type.encode(), _json.encode({"type": type, **members}))


class _Writer:
    """Writes the answer to one message request."""

    stream_type = "text/event-stream"

    def __init__(self, call: ChatCall, id: str, created: int) -> None:
        self._id = id
        self._head: dict[str, Any] = {
            "id": f"msg_{id}",
            "type": "message",
            "role": "assistant",
            "model": call.model,
        }
        # Of the block that is open, and how many there were before it.
        self._open: type[Said] | None = None
        self._block = -1

    def opening(self) -> bytes:
        message = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(0, 0, 0)),
        }
        return _event("message_start", message=message) + _event("ping")

    def say(self, said: Said) -> bytes:
        match said:
            case Reasoning(text=text):
                empty = _thinking_block("")
                return self._in_block(Reasoning, empty) + self._delta("thinking", thinking=text)
            case Content(text=text):
                return self._in_block(Content, _text_block("")) + self._delta("text", text=text)
            case Call(index=index, name=name):
                return self._stop() + self._in_block(Call, _use_block(self._id, index, name, {}))
            case Arguments(text=text):
                return self._delta("input_json", partial_json=text)

    def closing(self, end: End) -> bytes:
        nothing = b"" if self._block >= 0 else self._in_block(Content, _text_block(""))
        ended = _event("message_delta", delta=_stop_reason(end), usage=_usage(end.usage))
        return nothing + self._stop() + ended + _event("message_stop")

    def _in_block(self, kind: type[Said], block: dict[str, Any]) -> bytes:
        """What opens a block of this kind, unless it is open."""
        if self._open is kind:
            return b""
        stop = self._stop()
        self._open = kind
        self._block += 1
        return stop + _event("content_block_start", index=self._block, content_block=block)

    def _delta(self, kind: str, **members: str) -> bytes:
        delta = {"type": f"{kind}_delta", **members}
        return _event("content_block_delta", index=self._block, delta=delta)

    def _stop(self) -> bytes:
        """What closes the open block, if one is."""
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._block)

    def broken(self, message: str) -> bytes:
        return _event("error", error={"type": "api_error", "message": message})

    def whole(self, told: Told, end: End) -> bytes:
        content = [_thinking_block(told.thoughts)] if told.thoughts else []
        if told.text or not (told.thoughts or told.calls):
            content.append(_text_block(told.text))
        for index, (name, arguments) in enumerate(told.calls):
            content.append(_use_block(self._id, index, name, arguments_object(arguments) or {}))
        message = {**self._head, "content": content, **_stop_reason(end)}
        return _json.encode({**message, "usage": _usage(end.usage)})


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _thinking_block(thoughts: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": thoughts, "signature": ""}


def _use_block(id: str, index: int, name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{id}{index:02x}", "name": name, "input": arguments}


def _stop_reason(end: End) -> dict[str, str | None]:
    reason = "stop_sequence" if end.stop is not None else _STOP_REASONS[end.reason]
    return {"stop_reason": reason, "stop_sequence": end.stop}


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


def encode_counted(prompt_tokens: int) -> bytes:
    """The answer of /v1/messages/count_tokens."""
    return _json.encode({"input_tokens": prompt_tokens})


def encode_messages_error(status: int, body: bytes) -> bytes:
    """An error in OpenAI's shape, in Anthropic's."""
    other = "invalid_request_error" if status < 500 else "api_error"
    error = {"type": _ERROR_TYPES.get(status, other), "message": read_error(body).message}
    return _json.encode({"type": "error", "error": error})
