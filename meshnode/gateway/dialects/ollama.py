"""Ollama's /api to and from a chat request. Pure: bytes in, values out.

Decides which fields and options work, which are harmless, and which are refused by name; and what
Ollama's clients learn about the models of the mesh. The shapes follow Ollama's API reference.
A stream is one JSON object a line, and is what a client gets that does not say otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import msgspec

from meshnode.engine import PENALTY_TOKENS_MAX, EngineStats, ModelCard
from meshnode.errors import RequestError
from meshnode.gateway import ServedModel
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
from meshnode.gateway.embeddings import Embed, Vectors, embed_of, floats
from meshnode.gateway.fields import Shape, decode_body, refuse_unsupported, unsupported
from meshnode.gateway.images import bare_image
from meshnode.gateway.openai import TOKEN_ID_MAX
from meshnode.gateway.openai import Call as ChatCall
from meshnode.gateway.said import Arguments, Call, Content, Reasoning, Said

__all__ = [
    "API_VERSION",
    "CHAT_SHAPE",
    "EMBED_SHAPE",
    "GENERATE_SHAPE",
    "OLD_EMBED_SHAPE",
    "SHOW_SHAPE",
    "capabilities_of",
    "decode_chat",
    "decode_embed_body",
    "decode_generate",
    "decode_old_embed",
    "decode_show",
    "encode_embeddings",
    "encode_old_embedding",
    "encode_ollama_error",
    "encode_show",
    "encode_tags",
]

API_VERSION = "0.6.4"
"""The release of Ollama whose API this is. Its clients compare it; it says nothing of ours."""

_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]


class _Options(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`Any` marks options of which only a neutral value works."""

    num_predict: Annotated[int, msgspec.Meta(ge=-2)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=TOKEN_ID_MAX)] | None = None
    min_p: _Share | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    stop: str | list[str] | None = None
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] | None = None
    mirostat_eta: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] | None = None
    repeat_last_n: Annotated[int, msgspec.Meta(ge=-1, le=PENALTY_TOKENS_MAX)] | None = None
    typical_p: _Share | None = None
    # How much room there must be at least. No prompt is cut, however much there is.
    num_ctx: Tokens | None = None
    # Harmless: how Ollama uses its machine. A node's operator says how this one is used.
    low_vram: bool | None = None
    main_gpu: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    numa: bool | None = None
    use_mlock: bool | None = None
    use_mmap: bool | None = None
    # Harmless: what stays of a prompt that is cut. None is cut here.
    num_keep: int | None = None
    # Not supported yet.
    penalize_newline: Any = None
    tfs_z: Any = None


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: Name
    stream: bool | None = None
    options: _Options | None = None
    keep_alive: str | float | None = None  # harmless: models stay loaded
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: Any = None
    top_logprobs: Any = None


class _CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any] = {}
    description: Any = None
    index: int | None = None


class _ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    function: _CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct, forbid_unknown_fields=True):
    function: _Function
    type: Literal["function"] | None = None


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: list[str] | None = None
    thinking: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _ChatBody(_Body, forbid_unknown_fields=True, kw_only=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    tools: list[_Tool] | None = None


class _GenerateBody(_Body, forbid_unknown_fields=True, kw_only=True):
    prompt: Annotated[str, msgspec.Meta(min_length=1)]
    system: str | None = None
    images: list[str] | None = None
    context: Any = None
    raw: Any = None
    suffix: Any = None
    template: Any = None


class _AnyEmbedBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: Name
    options: Any = None
    keep_alive: str | float | None = None  # harmless: models stay loaded


class _EmbedBody(_AnyEmbedBody, forbid_unknown_fields=True, kw_only=True):
    input: str | list[str]
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    truncate: Any = None


class _OldEmbedBody(_AnyEmbedBody, forbid_unknown_fields=True, kw_only=True):
    prompt: Annotated[str, msgspec.Meta(min_length=1)]


class _ShowBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: Name | None = None
    name: Name | None = None  # as older clients call it
    verbose: Any = None


_NEUTRAL_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "penalize_newline": (True,),
    "tfs_z": (1.0,),
}
_NEUTRAL_BODY: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
}
_NEUTRAL_GENERATE: Mapping[str, tuple[Any, ...]] = {
    **_NEUTRAL_BODY,
    "context": ([],),
    "raw": (False,),
    "suffix": ("",),
    "template": ("",),
}
_NEUTRAL_CALL: Mapping[str, tuple[Any, ...]] = {"description": ("",)}
_NEUTRAL_OLD_EMBED: Mapping[str, tuple[Any, ...]] = {"options": ({},)}
_NEUTRAL_EMBED: Mapping[str, tuple[Any, ...]] = {**_NEUTRAL_OLD_EMBED, "truncate": (False,)}
_NEUTRAL_SHOW: Mapping[str, tuple[Any, ...]] = {"verbose": (False,)}
_FIELD_ROLES = (("images", "user"), ("thinking", "assistant"), ("tool_calls", "assistant"),
                ("tool_name", "tool"), ("tool_call_id", "tool"))  # fmt: skip
_WITHIN: Mapping[type[msgspec.Struct], Mapping[str, tuple[Any, ...]]] = {
    _Options: _NEUTRAL_OPTIONS,
    _CalledFunction: _NEUTRAL_CALL,
}
# What fields of the chat request are called here.
_NAMES = (
    (r"response_format\.json_schema\.schema", "format"),
    (r"response_format", "format"),
    (r"reasoning_effort", "think"),
    (r"chat_template_kwargs\.enable_thinking", "think"),
    (r"(mirostat|top_k|top_p|min_p|typical_p|repeat_penalty)$", r"options.\1"),
)
CHAT_SHAPE = Shape(_ChatBody, {**_WITHIN, _ChatBody: _NEUTRAL_BODY})
GENERATE_SHAPE = Shape(_GenerateBody, {**_WITHIN, _GenerateBody: _NEUTRAL_GENERATE})
EMBED_SHAPE = Shape(_EmbedBody, {_EmbedBody: _NEUTRAL_EMBED})
OLD_EMBED_SHAPE = Shape(_OldEmbedBody, {_OldEmbedBody: _NEUTRAL_OLD_EMBED})
SHOW_SHAPE = Shape(_ShowBody, {_ShowBody: _NEUTRAL_SHOW})
_chat_decoder = msgspec.json.Decoder(_ChatBody)
_generate_decoder = msgspec.json.Decoder(_GenerateBody)
_embed_decoder = msgspec.json.Decoder(_EmbedBody)
_old_embed_decoder = msgspec.json.Decoder(_OldEmbedBody)
_show_decoder = msgspec.json.Decoder(_ShowBody)


Room = Callable[[str], int | None]
"""The context of a model by its name, in tokens: 0 if nobody knows it, None if there is no such
model, which others will say."""


def decode_chat(body: bytes, room: Room) -> Asked:
    """Understand the body of /api/chat. Raises `RequestError` naming the field."""
    chat: _ChatBody = decode_body(_chat_decoder, body)
    refuse_unsupported(chat, _NEUTRAL_BODY)
    tools = [
        {
            "type": "function",
            "function": given({
                "name": tool.function.name,
                "description": tool.function.description,
                "parameters": tool.function.parameters,
                "strict": tool.function.strict,
            }),
        }
        for tool in chat.tools or ()
    ]  # fmt: skip
    return _ask(chat, room, _turns(chat.messages), _chat_told, tools)


def _turns(messages: Sequence[_Message]) -> list[dict[str, Any]]:
    """The messages of a chat request. Calls need ids there; here results follow in their order,
    or name the function."""
    turns: list[dict[str, Any]] = []
    unanswered: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]."
        for field, role in _FIELD_ROLES:
            if getattr(message, field) and message.role != role:
                raise unsupported(path + field)
        turn: dict[str, Any] = {
            "role": message.role,
            "content": _content(message.content, message.images, f"{path}images"),
        }
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            unanswered = []
            turn["tool_calls"] = []
            for at, call in enumerate(message.tool_calls):
                refuse_unsupported(
                    call.function, _NEUTRAL_CALL, f"{path}tool_calls[{at}].function."
                )
                id = call.id or f"call_{index}_{at}"
                unanswered.append((call.function.name, id))
                arguments = _json.encode(call.function.arguments).decode()
                function = {"name": call.function.name, "arguments": arguments}
                turn["tool_calls"].append({"id": id, "type": "function", "function": function})
        if message.role == "tool":
            turn["tool_call_id"] = message.tool_call_id or _answered(message, unanswered)
        turns.append(turn)
    return turns


def _answered(message: _Message, unanswered: list[tuple[str, str]]) -> str:
    """The id of the call that a result answers, which is then answered."""
    for at, (name, id) in enumerate(unanswered):
        if message.tool_name in (None, "", name):
            del unanswered[at]
            return id
    return f"call_{message.tool_name or ''}"


def decode_generate(body: bytes, room: Room) -> Asked:
    """Understand the body of /api/generate: a chat of one turn, as Ollama's own templates have it.

    Raises `RequestError` naming the field.
    """
    asked: _GenerateBody = decode_body(_generate_decoder, body)
    refuse_unsupported(asked, _NEUTRAL_GENERATE)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": _content(asked.prompt, asked.images, "images")}
    ]
    if asked.system:
        messages.insert(0, {"role": "system", "content": asked.system})
    return _ask(asked, room, messages, _generate_told)


def decode_embed_body(body: bytes) -> Embed:
    """Understand the body of /api/embed. Raises `RequestError` naming the field.

    What is too long is refused, as with `truncate: false`: half a text has another meaning.
    """
    asked: _EmbedBody = decode_body(_embed_decoder, body)
    refuse_unsupported(asked, _NEUTRAL_EMBED)
    return embed_of(asked.model, asked.input, asked.dimensions)


def decode_old_embed(body: bytes) -> Embed:
    """Understand the body of /api/embeddings, for one text. Raises `RequestError` as well."""
    asked: _OldEmbedBody = decode_body(_old_embed_decoder, body)
    refuse_unsupported(asked, _NEUTRAL_OLD_EMBED)
    return embed_of(asked.model, asked.prompt)


def decode_show(body: bytes) -> str:
    """The model that /api/show is asked about. Raises `RequestError` naming the field."""
    asked: _ShowBody = decode_body(_show_decoder, body)
    refuse_unsupported(asked, _NEUTRAL_SHOW)
    named = asked.model or asked.name
    if named is None:
        raise RequestError(
            "`model`: missing required field.", param="model", code="missing_required_parameter"
        )
    return named


def _content(text: str, images: list[str] | None, path: str) -> str | list[dict[str, Any]]:
    """Images come before the text, as in Ollama's own prompts."""
    if not images:
        return text
    parts = [bare_image(data, f"{path}[{index}]") for index, data in enumerate(images)]
    return [*parts, {"type": "text", "text": text}]


def _ask(
    body: _Body,
    room: Room,
    messages: Sequence[Mapping[str, Any]],
    shown: Callable[[Told], dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> Asked:
    options = body.options or _Options()
    refuse_unsupported(options, _NEUTRAL_OPTIONS, "options.")
    stop = [options.stop] if isinstance(options.stop, str) else options.stop
    there_is = room(body.model)
    if options.num_ctx is not None and there_is is not None and options.num_ctx > there_is:
        raise RequestError(
            f"`options.num_ctx`: the model's context is {there_is or 'not known; it may be less'}.",
            param="options.num_ctx",
            code="unsupported_parameter",
        )
    limit = options.num_predict
    if limit == 0:  # releases of Ollama disagree on what it means
        raise unsupported("options.num_predict")
    fields = {
        "model": body.model,
        "messages": messages,
        # -1 and -2: as many as there is room for.
        "max_tokens": None if limit is None or limit < 0 else limit,
        "stop": stop_of(stop, "options.stop"),
        "stream": body.stream is not False,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "seed": options.seed,
        "frequency_penalty": options.frequency_penalty,
        "presence_penalty": options.presence_penalty,
        "mirostat": options.mirostat,
        "mirostat_tau": options.mirostat_tau,
        "mirostat_eta": options.mirostat_eta,
        "repeat_penalty": options.repeat_penalty,
        "repeat_last_n": options.repeat_last_n,
        "typical_p": options.typical_p,
        "tools": tools or None,
        "response_format": _format(body.format),
    }
    if isinstance(body.think, bool):
        fields["chat_template_kwargs"] = {"enable_thinking": body.think}
    elif body.think is not None:
        fields["reasoning_effort"] = body.think
    return ask(fields, lambda call: partial(_Writer, call, shown), _NAMES)


def _format(format: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not format and format != {}:
        return None
    if isinstance(format, str):
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format}}


def _chat_told(told: Told) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": told.text}
    if told.thoughts:
        message["thinking"] = told.thoughts
    if told.calls:
        message["tool_calls"] = [
            {"function": {"name": name, "arguments": arguments_object(arguments) or {}}}
            for name, arguments in told.calls
        ]
    return {"message": message}


def _generate_told(told: Told) -> dict[str, Any]:
    thoughts = {"thinking": told.thoughts} if told.thoughts else {}
    return {"response": told.text, **thoughts}


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------

_json = msgspec.json.Encoder()


class _Writer:
    """Writes the answer to one request; `shown` puts what is told where the route has it.

    Calls go out when they are complete: clients expect them so.
    """

    stream_type = "application/x-ndjson"

    def __init__(
        self,
        call: ChatCall,
        shown: Callable[[Told], dict[str, Any]],
        id: str,
        created: int,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._shown = shown
        self._head = {"model": call.model, "created_at": _date(created)}
        self._calls: list[tuple[str, str]] = []
        self._clock = clock
        self._began = clock()
        self._first: int | None = None

    def opening(self) -> bytes:
        return b""

    def say(self, said: Said) -> bytes:
        self._first = self._first or self._clock()
        match said:
            case Reasoning(text=text):
                return self._line(Told(text, ""))
            case Content(text=text):
                return self._complete() + self._line(Told("", text))
            case Call(name=name):
                before = self._complete()
                self._calls = [(name, "")]
                return before
            case Arguments(text=text):
                ((name, begun),) = self._calls
                self._calls = [(name, begun + text)]
                return b""

    def _complete(self) -> bytes:
        """The call that was being told, if there was one."""
        calls, self._calls = self._calls, []
        return self._line(Told("", "", tuple(calls))) if calls else b""

    def _line(self, told: Told) -> bytes:
        return _json.encode({**self._head, **self._shown(told), "done": False}) + b"\n"

    def closing(self, end: End) -> bytes:
        return self._complete() + self.whole(Told("", ""), end) + b"\n"

    def broken(self, message: str) -> bytes:
        return _json.encode({"error": message}) + b"\n"

    def whole(self, told: Told, end: End) -> bytes:
        return _json.encode(
            {
                **self._head,
                **self._shown(told),
                "done": True,
                "done_reason": "length" if end.reason == "length" else "stop",
                **self._durations(),
                "prompt_eval_count": end.usage.prompt_tokens,
                "eval_count": end.usage.completion_tokens,
            }
        )

    def _durations(self) -> dict[str, int]:
        """In nanoseconds. Of a stream, up to its first text and after it, too: its clients tell
        people its speed by them. Of a whole answer nobody here knows when its text began."""
        now = self._clock()
        durations = {"total_duration": now - self._began}
        if self._first is not None:
            durations["prompt_eval_duration"] = self._first - self._began
            durations["eval_duration"] = now - self._first
        return durations


def encode_embeddings(embed: Embed, answer: Vectors, took_ns: int) -> bytes:
    """The answer of /api/embed."""
    return _json.encode(
        {
            "model": embed.model,
            "embeddings": [floats(vector) for vector in answer.vectors],
            "total_duration": took_ns,
            "prompt_eval_count": answer.prompt_tokens,
        }
    )


def encode_old_embedding(answer: Vectors) -> bytes:
    """The answer of /api/embeddings."""
    return _json.encode({"embedding": floats(answer.vectors[0])})


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


Known = tuple[ServedModel, ModelCard | None]
"""A model of the mesh, and its file's card if the file is on this node."""


def encode_tags(models: Iterable[Known]) -> bytes:
    """The answer of /api/tags."""
    return _json.encode({"models": [_tag(*known) for known in models]})


def _tag(model: ServedModel, card: ModelCard | None) -> dict[str, Any]:
    return {
        "name": model.id,
        "model": model.id,
        "modified_at": _date(model.created),
        "size": card.size_bytes if card else 0,
        "digest": model.digest,
        "details": _details(card),
    }


def capabilities_of(engine: EngineStats | None) -> list[str]:
    """What a model can do, in Ollama's words; it has none for ranking. None: of a peer's."""
    if engine is not None and engine.purpose != "generate":
        return ["embedding"] if engine.purpose == "embed" else []
    # Any model can be told of tools; whether it is good at them is another matter.
    capabilities = ["completion", "tools"]
    if engine is not None and engine.style.thinking != "none":
        capabilities.append("thinking")
    if engine is not None and engine.sees:
        capabilities.append("vision")
    return capabilities


def encode_show(model: ServedModel, card: ModelCard | None, capabilities: Sequence[str]) -> bytes:
    """The answer of /api/show."""
    architecture = card.architecture if card else "unknown"
    return _json.encode(
        {
            "details": _details(card),
            "model_info": {
                "general.architecture": architecture,
                "general.parameter_count": card.parameters if card else 0,
                f"{architecture}.context_length": model.context_tokens,
            },
            "capabilities": capabilities,
            "modified_at": _date(model.created),
        }
    )


def _details(card: ModelCard | None) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": card.architecture if card else "",
        "families": [card.architecture] if card else [],
        "parameter_size": _people_size(card.parameters) if card else "",
        "quantization_level": card.quantization if card else "",
    }


def _people_size(parameters: int) -> str:
    """`134.52M`, `8.03B`, as Ollama writes it."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 10**9 else f"{parameters / 1e6:.2f}M"


def encode_ollama_error(status: int, body: bytes) -> bytes:
    """An error in OpenAI's shape, in Ollama's, which has no types."""
    return _json.encode({"error": read_error(body).message})
