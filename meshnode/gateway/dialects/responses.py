"""OpenAI's /v1/responses to and from a chat request. Pure: bytes in, values out.

Decides which fields of a response request work, which are harmless, and which are refused by name;
and which conversation a request goes on with. Does not know where responses are kept (`kept.py`).
The shapes follow OpenAI's reference for the Responses API.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import msgspec

from meshnode.engine import ChatMessage, FunctionCall
from meshnode.errors import RequestError
from meshnode.gateway.dialects import Asked, End, Name, Tokens, Told, arguments_object, ask, given
from meshnode.gateway.dialects.kept import Kept
from meshnode.gateway.fields import Shape, decode_body, refuse_unsupported, unsupported
from meshnode.gateway.images import linked_image
from meshnode.gateway.openai import CacheOptions, message_json
from meshnode.gateway.openai import Call as ChatCall
from meshnode.gateway.said import Arguments, Call, Content, Reasoning, Said

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


class _ReasoningText(
    msgspec.Struct, tag_field="type", tag="reasoning_text", forbid_unknown_fields=True
):
    """What we thought, sent back to us."""

    text: str


class _Item(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message, of the client or one of ours; our thoughts; a call, or its result."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[_InputText | _InputImage | _OutputText | _ReasoningText] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[_InputText | _InputImage] | None = None
    # Of our own items; they say nothing more.
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Any = None
    summary: Any = None
    encrypted_content: Any = None
    namespace: Any = None


# What each type of item must have; it may have nothing else of this but those of our own.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "reasoning": (),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


class _Tool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Any = None


class _NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


class _Format(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class _TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    format: _Format | None = None
    verbosity: Any = None


class _Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Any = None
    generate_summary: Any = None


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
    tools: list[_Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: _TextConfig | None = None
    reasoning: _Reasoning | None = None
    # Harmless: they change no answer.
    metadata: _Metadata | None = None
    safety_identifier: str | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None
    max_tool_calls: Tokens | None = None  # of tools that we would run ourselves; there are none
    moderation: Any = None
    # Not supported yet.
    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    include: Any = None
    prompt: Any = None
    service_tier: Any = None
    top_logprobs: Any = None
    truncation: Any = None


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "include": ([],),
    "prompt": (),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_NEUTRAL_ITEM: Mapping[str, tuple[Any, ...]] = {
    "phase": (),
    "summary": ([],),
    "encrypted_content": (),
    "namespace": (),
}
_NEUTRAL_IMAGE: Mapping[str, tuple[Any, ...]] = {"file_id": ()}
_NEUTRAL_OUTPUT: Mapping[str, tuple[Any, ...]] = {"annotations": ([],), "logprobs": ([],)}
_NEUTRAL_TOOL: Mapping[str, tuple[Any, ...]] = {"defer_loading": (False,)}
_NEUTRAL_TEXT: Mapping[str, tuple[Any, ...]] = {"verbosity": ("medium",)}
_NEUTRAL_REASONING: Mapping[str, tuple[Any, ...]] = {"summary": (), "generate_summary": ()}
RESPONSES_SHAPE = Shape(
    _Body,
    {
        _Body: _NEUTRAL,
        _Item: _NEUTRAL_ITEM,
        _InputImage: _NEUTRAL_IMAGE,
        _OutputText: _NEUTRAL_OUTPUT,
        _Tool: _NEUTRAL_TOOL,
        _TextConfig: _NEUTRAL_TEXT,
        _Reasoning: _NEUTRAL_REASONING,
    },
)
# What fields of the chat request are called here.
_NAMES = (
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"reasoning_effort", "reasoning.effort"),
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
    if asked.text is not None:
        refuse_unsupported(asked.text, _NEUTRAL_TEXT, "text.")
    if asked.reasoning is not None:
        refuse_unsupported(asked.reasoning, _NEUTRAL_REASONING, "reasoning.")
    messages = _messages(asked.input)
    if asked.previous_response_id is not None:
        before = recall(asked.previous_response_id)
        messages[:0] = [message_json(each) for each in before]
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
        "response_format": _response_format(asked),
        "reasoning_effort": None if asked.reasoning is None else asked.reasoning.effort,
        **_tools(asked),
    }
    return ask(fields, lambda call: partial(_Writer, asked, call, keep), _NAMES)


def _tools(asked: _Body) -> dict[str, Any]:
    tools = []
    for index, tool in enumerate(asked.tools or ()):
        refuse_unsupported(tool, _NEUTRAL_TOOL, f"tools[{index}].")
        function = {"name": tool.name, "description": tool.description,
                    "parameters": tool.parameters, "strict": tool.strict}  # fmt: skip
        tools.append({"type": "function", "function": given(function)})
    choice: Any = asked.tool_choice
    if isinstance(choice, _NamedTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    if not tools and choice in (None, "auto", "none"):
        return {}  # nothing is asked for
    return {
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": asked.parallel_tool_calls,
    }


def _response_format(asked: _Body) -> dict[str, Any] | None:
    form = None if asked.text is None else asked.text.format
    if form is None:
        return None
    fields = {"name": form.name, "schema": form.schema, "strict": form.strict,
              "description": form.description}  # fmt: skip
    if form.type == "json_schema":
        return {"type": form.type, "json_schema": given(fields)}
    for name, value in fields.items():
        if value is not None:
            raise unsupported(f"text.format.{name}")
    return None if form.type == "text" else {"type": form.type}


def _messages(items: str | list[_Item]) -> list[dict[str, Any]]:
    """The items as turns of a chat: thoughts and calls belong to the message around them.

    A chat's results are text. What results show follows the last of them, in the user's turn.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    ours: dict[str, Any] | None = None  # the assistant's turn that goes on
    for index, item in enumerate(items):
        path = f"input[{index}]."
        _check_item(item, path)
        if item.type == "function_call_output":
            output = [_InputText(item.output)] if isinstance(item.output, str) else item.output
            parts = _parts(output, f"{path}output")
            texts = [part for part in parts if part["type"] == "text"]
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": texts})
            shown += [part for part in parts if part["type"] != "text"]
            ours = None
            continue
        if shown:
            messages.append({"role": "user", "content": shown})
            shown = []
            if item.role == "user":  # one turn: some templates refuse two in a row
                said = _content(item, path)
                more = [{"type": "text", "text": said}] if isinstance(said, str) else said
                messages[-1]["content"] += more
                ours = None
                continue
        if item.type == "message":
            if item.role == "assistant" and ours is not None and not ours["content"]:
                ours["content"] = _content(item, path)  # of the thoughts before it
                continue
            messages.append({"role": item.role, "content": _content(item, path)})
            ours = messages[-1] if item.role == "assistant" else None
        else:
            if ours is None:
                ours = {"role": "assistant", "content": ""}
                messages.append(ours)
            _add_to(ours, item)
    if shown:
        messages.append({"role": "user", "content": shown})
    return messages


def _add_to(turn: dict[str, Any], item: _Item) -> None:
    if item.type == "reasoning":
        content = item.content if isinstance(item.content, list) else []
        thoughts = "".join(part.text for part in content if isinstance(part, _ReasoningText))
        turn["reasoning_content"] = turn.get("reasoning_content", "") + thoughts
        return
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    turn.setdefault("tool_calls", []).append(call)


def _check_item(item: _Item, path: str) -> None:
    """Raises `RequestError` for what such an item needs, or cannot have."""
    refuse_unsupported(item, _NEUTRAL_ITEM, path)
    needs = _NEEDS[item.type]
    for name in dict.fromkeys(name for names in _NEEDS.values() for name in names):
        value = getattr(item, name)
        if name in needs and value is None:
            raise RequestError(
                f"`{path}{name}`: missing required field.",
                param=path + name,
                code="missing_required_parameter",
            )
        if name not in needs and value is not None and (item.type, name) != _THOUGHTS:
            raise unsupported(path + name)
    wanted: tuple[type[msgspec.Struct], ...] = (_InputText, _OutputText)
    if item.type == "reasoning":
        wanted = (_ReasoningText,)
    elif item.role == "user":
        wanted = (*wanted, _InputImage)
    parts = item.content if isinstance(item.content, list) else []
    for index, part in enumerate(parts):
        if not isinstance(part, wanted):
            raise unsupported(f"{path}content[{index}].type")
        if isinstance(part, _OutputText):
            refuse_unsupported(part, _NEUTRAL_OUTPUT, f"{path}content[{index}].")


_THOUGHTS = ("reasoning", "content")


def _content(item: _Item, path: str) -> str | list[dict[str, Any]]:
    return item.content if isinstance(item.content, str) else _parts(item.content, f"{path}content")


def _parts(
    parts: Sequence[_InputText | _InputImage | _OutputText | _ReasoningText] | None, path: str
) -> list[dict[str, Any]]:
    return [
        _image(part, f"{path}[{index}]")
        if isinstance(part, _InputImage)
        else {"type": "text", "text": part.text}
        for index, part in enumerate(parts or ())
    ]


def _image(part: _InputImage, path: str) -> dict[str, Any]:
    refuse_unsupported(part, _NEUTRAL_IMAGE, f"{path}.")
    return linked_image(part.image_url or "", part.detail, f"{path}.image_url")


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
        call: ChatCall,
        keep: Callable[[str, Kept], None],
        id: str,
        created: int,
    ) -> None:
        self._call = call
        self._keep = keep
        self._store = asked.store is not False
        self._instructed = asked.instructions is not None
        self._number = id
        self._id = f"resp_{id}"
        self._output: list[_Output] = []
        self._is_open = False
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
            "reasoning": {"effort": call.wish.effort, "summary": None},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": self._store,
            "temperature": call.sampling.temperature,
            "text": {"format": _format_told(asked)},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [_tool_told(tool) for tool in asked.tools or ()],
            "top_p": call.sampling.top_p,
            "truncation": "disabled",
            "user": asked.user,
        }

    def opening(self) -> bytes:
        begun = self._response("in_progress")
        return self._event("response.created", response=begun) + self._event(
            "response.in_progress", response=begun
        )

    def say(self, said: Said) -> bytes:
        match said:
            case Reasoning(text=text):
                return self._more("reasoning", text)
            case Content(text=text):
                return self._more("message", text)
            case Call(name=name):
                return self._close() + self._open("function_call", name)
            case Arguments(text=text):
                return self._more("function_call", text)

    def _more(self, kind: _Kind, text: str) -> bytes:
        """Text for the item of this kind, which is begun if it is not open."""
        opened = b""
        if not self._is_open or self._output[-1].kind != kind:
            opened = self._close() + self._open(kind)
        item = self._output[-1]
        item.texts.append(text)
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return opened + self._item_event(f"{_TEXTS[kind]}.delta", delta=text, **logprobs)

    def _open(self, kind: _Kind, name: str = "") -> bytes:
        item = _Output(kind, self._number, len(self._output), name)
        self._output.append(item)
        self._is_open = True
        added = self._event(
            "response.output_item.added",
            output_index=item.index,
            item=item.wire("in_progress", whole=False),
        )
        if kind == "function_call":
            return added
        return added + self._item_event("response.content_part.added", part=item.part(""))

    def _close(self, status: str = "completed") -> bytes:
        """The end of the item that is open, if one is."""
        if not self._is_open:
            return b""
        self._is_open = False
        item = self._output[-1]
        text = "".join(item.texts)
        if item.kind == "function_call":
            done = self._item_event(f"{_TEXTS[item.kind]}.done", arguments=text, name=item.name)
        else:
            logprobs: dict[str, Any] = {"logprobs": []} if item.kind == "message" else {}
            done = self._item_event(f"{_TEXTS[item.kind]}.done", text=text, **logprobs)
            done += self._item_event("response.content_part.done", part=item.part(text))
        return done + self._event(
            "response.output_item.done", output_index=item.index, item=item.wire(status)
        )

    def closing(self, end: End) -> bytes:
        empty = b"" if self._output else self._open("message")
        closed = empty + self._close(_status(end))
        response = self._end(end)
        return closed + self._event(f"response.{response['status']}", response=response)

    def broken(self, message: str) -> bytes:
        error = {"code": "server_error", "message": message}
        failed = {**self._response("failed", "incomplete"), "error": error}
        return self._event("response.failed", response=failed)

    def whole(self, told: Told, end: End) -> bytes:
        items: list[tuple[_Kind, str, str]] = []
        if told.thoughts:
            items.append(("reasoning", "", told.thoughts))
        if told.text or not (told.thoughts or told.calls):
            items.append(("message", "", told.text))
        items += [("function_call", name, arguments) for name, arguments in told.calls]
        for index, (kind, name, text) in enumerate(items):
            self._output.append(_Output(kind, self._number, index, name, [text]))
        return _json.encode(self._end(end))

    def _end(self, end: End) -> dict[str, Any]:
        """The whole response, which is kept if it is to be."""
        response = self._response(_status(end), _status(end))
        response["usage"] = _usage(end)
        if end.reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if self._store:
            said = (each for each in self._call.prompt if isinstance(each, ChatMessage))
            heard = tuple(said)[self._instructed :]
            self._keep(self._id, Kept(_json.encode(response), (*heard, self._turn())))
        return response

    def _turn(self) -> ChatMessage:
        """What was said, for the next turn; calls that were cut off were not made."""
        texts = {kind: "".join(text for item in self._output if item.kind == kind
                               for text in item.texts) for kind in _TEXTS}  # fmt: skip
        calls = tuple(
            FunctionCall(item.call_id, item.name, "".join(item.texts))
            for item in self._output
            if item.kind == "function_call" and arguments_object("".join(item.texts)) is not None
        )
        return ChatMessage("assistant", texts["message"], reasoning=texts["reasoning"], calls=calls)

    def _response(self, status: str, last: str = "completed") -> dict[str, Any]:
        """`last` is the status of the last item; those before it are complete."""
        output = [item.wire("completed") for item in self._output[:-1]]
        output += [item.wire(last) for item in self._output[-1:]]
        return {**self._head, "status": status, "output": output, "usage": None}

    def _item_event(self, type: str, **members: Any) -> bytes:
        item = self._output[-1]
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.kind != "function_call":
            place["content_index"] = 0
        return self._event(type, **place, **members)

    def _event(self, type: str, **members: Any) -> bytes:
        event = {"type": type, "sequence_number": self._events, **members}
        self._events += 1
        return b"event: %b\ndata: %b\n\n" % (type.encode(), _json.encode(event))


_Kind = Literal["reasoning", "message", "function_call"]
_TEXTS: Mapping[_Kind, str] = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}
_ID_PREFIXES: Mapping[_Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


@dataclass(slots=True)
class _Output:
    """An item of the output, as far as it has come; `name` is a function's."""

    kind: _Kind
    number: str
    index: int
    name: str = ""
    texts: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{_ID_PREFIXES[self.kind]}_{self.number}{self.index:02x}"

    @property
    def call_id(self) -> str:
        return f"call_{self.number}{self.index:02x}"

    def part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def wire(self, status: str, *, whole: bool = True) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        text = "".join(self.texts)
        if self.kind == "function_call":
            return {**item, "call_id": self.call_id, "name": self.name, "arguments": text}
        content = [self.part(text)] if whole else []
        if self.kind == "reasoning":
            return {**item, "summary": [], "content": content}
        return {**item, "role": "assistant", "content": content}


def _status(end: End) -> Literal["completed", "incomplete"]:
    return "incomplete" if end.reason == "length" else "completed"


def _tool_told(tool: _Tool) -> dict[str, Any]:
    return {"type": "function", "name": tool.name, "description": tool.description,
            "parameters": tool.parameters, "strict": tool.strict}  # fmt: skip


def _format_told(asked: _Body) -> Any:
    form = None if asked.text is None else asked.text.format
    if form is None or form.type != "json_schema":
        return {"type": "text" if form is None else form.type}
    return form


def _usage(end: End) -> dict[str, Any]:
    usage = end.usage
    return {
        "input_tokens": usage.prompt_tokens,
        # Nothing is charged for writing a cache, so nobody counts it.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": end.thoughts},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def encode_deleted(id: str) -> bytes:
    """The answer of DELETE /v1/responses/{id}."""
    return _json.encode({"id": id, "object": "response", "deleted": True})
