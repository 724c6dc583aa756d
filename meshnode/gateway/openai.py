"""OpenAI's JSON to and from the engine's vocabulary. Pure: bytes in, values out.

Decides which fields of a request work, which are harmless, and which are refused by name: nothing
is ignored that the caller could have meant. Does not know engines, peers, sessions or HTTP.

The shapes follow OpenAI's reference for /v1/chat/completions, /v1/completions and /v1/models;
`top_k` and the settings after it are llama.cpp's, which the clients of local servers use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec

from meshnode.engine import (
    PENALTY_TOKENS_MAX,
    TOP_LOGPROBS_MAX,
    ChatMessage,
    ChatStyle,
    Continuation,
    Delta,
    Finish,
    FunctionCall,
    Grammar,
    Image,
    Logprob,
    Request,
    Sampling,
    TokenLogprobs,
    images_of,
)
from meshnode.errors import RequestError
from meshnode.gateway import ServedModel
from meshnode.gateway.calls import CALL_WORDS
from meshnode.gateway.fields import (
    Shape,
    decode_body,
    invalid_body,
    refuse_unsupported,
    unsupported,
)
from meshnode.gateway.images import check_images, content_of, image_part
from meshnode.gateway.reading import AnswerReader
from meshnode.gateway.reasoning import NO_WISH, Wish, let_think
from meshnode.gateway.said import Arguments, Content, Reasoning, Said
from meshnode.gateway.said import Call as ToolCall
from meshnode.gateway.schema import SchemaGrammar
from meshnode.gateway.tools import Function, Tools, in_plain_words

__all__ = [
    "CHAT_PATH",
    "CHAT_SHAPE",
    "TEXT_PATH",
    "TEXT_SHAPE",
    "CacheOptions",
    "Call",
    "Encoder",
    "decode_chat",
    "decode_text",
    "encode_error",
    "encode_error_event",
    "encode_model",
    "encode_models",
    "message_json",
]

CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"

# OpenAI's own bounds.
STOP_SEQUENCES_MAX = 4
LOGIT_BIAS_ENTRIES_MAX = 1024
CHOICES_MAX = 128
TOOLS_MAX = 128
# llama.cpp reads no more than 40 bytes of a breaker, and each costs a walk through the vocabulary.
DRY_BREAKERS_MAX = 16
DRY_BREAKER_BYTES_MAX = 40
# /v1/completions answers with 16 tokens unless told otherwise; clients rely on it.
TEXT_MAX_TOKENS_DEFAULT = 16
# Names travel in headers, logs and adverts.
NAME_CHARS_MAX = 256
TOKEN_ID_MAX = 2**31 - 1

Kind = Literal["chat", "text"]


@dataclass(frozen=True, slots=True)
class Call:
    """A request body, understood. `prompt` has the forms of `engine.Request`.

    What of it depends on the model is decided where the model is: `request` and `Encoder` take
    its `ChatStyle`.
    """

    kind: Kind
    model: str
    prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    prompt_cache_key: str | None
    user: str | None
    logprobs: int | None = None
    n: int = 1
    grammar: Grammar | None = None
    tools: Tools | None = None
    wish: Wish = NO_WISH

    @property
    def is_resumable(self) -> bool:
        """Whether another engine can go on in the middle of the answer as if it were its own.

        Mirostat's state is what it has drawn so far, with which chances; no other engine has it.
        Of several choices each would be somewhere else; and in a call there are too many places
        to be at.
        """
        return not self.sampling.mirostat and self.n == 1 and self.tools is None

    @property
    def images_bytes(self) -> int:
        """What the images take in a body, as base64."""
        return sum(len(image.data) for image in images_of(self.prompt)) * 4 // 3

    def request(self, id: str, session: bytes, style: ChatStyle) -> Request:
        """The same in the words of an engine whose model has this style; `session` is 16 bytes.

        Raises `RequestError` for what this model cannot do.
        """
        thinking, effort, does = self.wish.granted(style)
        prompt, grammar = self.prompt, self.grammar
        tools: tuple[str, ...] = ()
        shown: tuple[str, ...] = ()
        if self.kind == "chat":
            if grammar is not None and grammar.param != "grammar":
                grammar = let_think(grammar, does)
            if self.tools is not None:
                calls = style.calls or "hermes"
                grammar = self.tools.grammar(calls, does)
                shown = CALL_WORDS[calls].control
            if style.calls is None:
                prompt = in_plain_words(_messages(prompt), self.tools)
            elif self.tools is not None:
                tools = self.tools.definitions()
        return Request(
            id=id,
            session=session,
            prompt=prompt,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            logprobs=self.logprobs,
            grammar=grammar,
            n=self.n,
            tools=tools,
            thinking=thinking,
            effort=effort,
            shown=shown,
        )

    def reader(self, style: ChatStyle, continuation: Continuation | None) -> AnswerReader | None:
        """What reads one choice of the answer; None if all of it is text."""
        does = self.wish.granted(style)[2]
        if self.kind == "text" or (does == "none" and self.tools is None):
            return None
        names = frozenset() if self.tools is None else self.tools.names
        return AnswerReader(does, style.calls or "hermes", names, continuation)


def _messages(prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]) -> list[ChatMessage]:
    return [each for each in prompt if isinstance(each, ChatMessage)]


# ---------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]
_FunctionName = Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
_Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Top = Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS_MAX)]
_Lookback = Annotated[int, msgspec.Meta(ge=-1, le=PENALTY_TOKENS_MAX)]


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None


class CacheOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Which prefixes are worth keeping, and for how long; every prefix is kept here anyway."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: str | None = None


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of request share. `Any` marks fields of which only a neutral value works."""

    model: _Name
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=TOKEN_ID_MAX)] | None = None
    min_p: _Share | None = None
    typical_p: _Share | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] | None = None
    repeat_last_n: _Lookback | None = None
    dry_multiplier: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] | None = None
    dry_base: Annotated[float, msgspec.Meta(ge=1.0, le=100.0)] | None = None
    dry_allowed_length: Annotated[int, msgspec.Meta(ge=1, le=PENALTY_TOKENS_MAX)] | None = None
    dry_penalty_last_n: _Lookback | None = None
    dry_sequence_breakers: list[str] | None = None
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] | None = None
    mirostat_eta: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    grammar: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    # Harmless: they change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    store: Any = None
    service_tier: Any = None
    n: Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)] | None = None


class _FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    name: _FunctionName
    arguments: str


class _ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    function: _FunctionCall
    type: Literal["function"] = "function"


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: _FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _Function


class _NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _NamedFunction


class _ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: Any = None
    refusal: Any = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None
    reasoning_content: str | None = None


class _JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: _Name
    schema: dict[str, Any] = msgspec.field(default_factory=dict)
    strict: bool | None = None
    description: str | None = None


class _ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _TemplateKwargs(msgspec.Struct, forbid_unknown_fields=True):
    """llama.cpp's and vLLM's way to talk to a chat template."""

    enable_thinking: bool | None = None


class _ChatBody(_Body, forbid_unknown_fields=True, kw_only=True):
    messages: Annotated[list[_ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: _Top | None = None
    response_format: _ResponseFormat | None = None
    tools: Annotated[list[_Tool], msgspec.Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: str | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: _TemplateKwargs | None = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None
    # Harmless: they change no answer.
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None


class _TextBody(_Body, forbid_unknown_fields=True, kw_only=True):
    prompt: str | list[Any]
    logprobs: _Top | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None


# The values, besides null, that ask for nothing: they are what we do anyway.
_NEUTRAL_BODY: Mapping[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_NEUTRAL_CHAT: Mapping[str, tuple[Any, ...]] = {
    **_NEUTRAL_BODY,
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
_NEUTRAL_TEXT: Mapping[str, tuple[Any, ...]] = {
    **_NEUTRAL_BODY,
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
_NEUTRAL_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "function_call": (),
    "audio": (),
    "annotations": ([],),
}
# OpenAI renamed `system` for its newer models; the templates of open models know `system`.
_FIELD_ROLES = (("tool_calls", "assistant"), ("reasoning_content", "assistant"),
                ("tool_call_id", "tool"))  # fmt: skip
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
          "tool": "tool"}  # fmt: skip

CHAT_SHAPE = Shape(_ChatBody, {_ChatBody: _NEUTRAL_CHAT, _ChatMessage: _NEUTRAL_MESSAGE})
TEXT_SHAPE = Shape(_TextBody, {_TextBody: _NEUTRAL_TEXT})
_chat_decoder = msgspec.json.Decoder(_ChatBody)
_text_decoder = msgspec.json.Decoder(_TextBody)


def decode_chat(body: bytes) -> Call:
    """Understand the body of /v1/chat/completions. Raises `RequestError` naming the field."""
    chat: _ChatBody = decode_body(_chat_decoder, body)
    refuse_unsupported(chat, _NEUTRAL_CHAT)
    if chat.max_tokens is not None and chat.max_completion_tokens is not None:
        raise RequestError(
            "Give either `max_tokens` or `max_completion_tokens`, not both.",
            param="max_completion_tokens",
            code="invalid_value",
        )
    messages = tuple(_chat_message(message, index) for index, message in enumerate(chat.messages))
    check_images(messages)
    tools = _tools(chat)
    if tools is not None:
        tools.grammar("hermes", "none")  # raises, before anybody is asked to compute it
    call = _call(
        chat,
        "chat",
        messages,
        chat.max_completion_tokens if chat.max_tokens is None else chat.max_tokens,
        _chat_logprobs(chat),
        _chat_grammar(chat),
    )
    kwargs = chat.chat_template_kwargs or _TemplateKwargs()
    if kwargs.enable_thinking and chat.reasoning_effort == "none":
        raise _conflict("reasoning_effort", "enable_thinking: true")
    wish = Wish(kwargs.enable_thinking, chat.reasoning_effort)
    return replace(call, tools=tools, wish=wish)


def _tools(chat: _ChatBody) -> Tools | None:
    """The tools that the model is told of: none, if it may not call them."""
    choice = chat.tool_choice
    named = choice.function.name if isinstance(choice, _NamedTool) else None
    names = [tool.function.name for tool in chat.tools or ()]
    if named is None and choice not in (None, "none", "auto", "required"):
        raise RequestError(
            "`tool_choice` is none, auto, required or a function.",
            param="tool_choice",
            code="invalid_value",
        )
    if (named is not None and named not in names) or (choice == "required" and not names):
        raise RequestError(
            "`tool_choice` asks for a function that is not in `tools`.",
            param="tool_choice",
            code="invalid_value",
        )
    if len(set(names)) < len(names):
        raise RequestError(
            "`tools` has two functions of one name.", param="tools", code="invalid_value"
        )
    if not chat.tools or choice == "none":
        return None
    if chat.grammar is not None:  # whose calls might be none that can be read
        raise _conflict("grammar", "tools")
    functions = []
    for index, tool in enumerate(chat.tools):
        path = f"tools[{index}].function"
        function = tool.function
        parameters = function.parameters
        if not parameters:
            parameters = {"type": "object", "properties": {}, "additionalProperties": False}
        if parameters.get("type") != "object":
            raise RequestError(
                f"`{path}.parameters` must be the schema of an object.",
                param=f"{path}.parameters",
                code="invalid_json_schema",
            )
        functions.append(
            Function(
                function.name,
                function.description,
                parameters,
                f"{path}.parameters",
                bool(function.strict),
            )
        )
    choice = named or ("auto" if not isinstance(choice, str) else choice)
    parallel = chat.parallel_tool_calls is not False
    return Tools(tuple(functions), choice, parallel, _form(chat.response_format))


def decode_text(body: bytes) -> Call:
    """Understand the body of /v1/completions. Raises `RequestError` naming the field."""
    text: _TextBody = decode_body(_text_decoder, body)
    refuse_unsupported(text, _NEUTRAL_TEXT)
    max_tokens = TEXT_MAX_TOKENS_DEFAULT if text.max_tokens is None else text.max_tokens
    return _call(text, "text", _text_prompt(text.prompt), max_tokens, text.logprobs, _grammar(text))


def _grammar(body: _Body) -> Grammar | None:
    return None if body.grammar is None else Grammar(body.grammar)


def _form(form: _ResponseFormat | None) -> tuple[Any, str] | None:
    """The schema that is asked for, strictly or not, and where it stands; None if none is."""
    if form is not None and form.type != "json_schema" and form.json_schema is not None:
        raise _conflict("response_format.json_schema", f"type: {form.type}")
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}, "response_format"
    param = "response_format.json_schema"
    if form.json_schema is None:
        raise RequestError(f"`{param}` is missing.", param=param, code="missing_required_parameter")
    return form.json_schema.schema, f"{param}.schema"


def _chat_grammar(chat: _ChatBody) -> Grammar | None:
    """The promise of `response_format`, kept by a grammar."""
    form = _form(chat.response_format)
    if form is None:
        return _grammar(chat)
    if chat.grammar is not None:
        raise _conflict("grammar", "response_format")
    rules = SchemaGrammar()
    schema, param = form
    return Grammar(rules.text(rules.add(schema, param)), param.removesuffix(".schema"))


def _chat_logprobs(chat: _ChatBody) -> int | None:
    if chat.logprobs:
        return chat.top_logprobs or 0
    if chat.top_logprobs is not None:
        raise RequestError(
            "`top_logprobs` is only allowed when `logprobs` is true.",
            param="top_logprobs",
            code="invalid_value",
        )
    return None


def _chat_message(message: _ChatMessage, index: int) -> ChatMessage:
    path = f"messages[{index}]"
    if message.role not in _ROLES:
        raise RequestError(
            f"`{path}.role` must be one of {', '.join(_ROLES)}.",
            param=f"{path}.role",
            code="unsupported_parameter" if message.role == "function" else "invalid_value",
        )
    refuse_unsupported(message, _NEUTRAL_MESSAGE, f"{path}.")
    for field, role in _FIELD_ROLES:
        if getattr(message, field) and message.role != role:
            raise unsupported(f"{path}.{field}")
    if message.role == "tool" and not message.tool_call_id:
        raise RequestError(
            f"`{path}.tool_call_id` is missing.",
            param=f"{path}.tool_call_id",
            code="missing_required_parameter",
        )
    content = message.content
    if content is None and message.tool_calls:
        content = ""
    if content is None:
        raise RequestError(
            f"`{path}.content` must be text.", param=f"{path}.content", code="invalid_value"
        )
    images: tuple[Image, ...] = ()
    if isinstance(content, list):
        content, images = _content(content, f"{path}.content", sees=message.role == "user")
    calls = tuple(
        FunctionCall(each.id, each.function.name, _arguments(each, f"{path}.tool_calls[{at}]"))
        for at, each in enumerate(message.tool_calls or ())
    )
    return ChatMessage(
        _ROLES[message.role],
        content,
        images,
        message.reasoning_content or "",
        calls,
        message.tool_call_id or "",
    )


def _content(
    parts: list[dict[str, Any]], path: str, *, sees: bool
) -> tuple[str, tuple[Image, ...]]:
    """Text, its parts on lines of their own, and the images where they stand in it.

    `sees`: whether there may be images.
    """
    content, follows_text = "", False
    images: list[Image] = []
    for index, part in enumerate(parts):
        if sees and part.get("type") == "image_url":
            images.append(image_part(part, f"{path}[{index}]", len(content)))
            follows_text = False
        else:
            content += "\n" * follows_text + _text_part(part, f"{path}[{index}]")
            follows_text = True
    return content, tuple(images)


def message_json(message: ChatMessage) -> dict[str, Any]:
    """A turn as a chat request has it: what `decode_chat` would make it of."""
    fields: dict[str, Any] = {"role": message.role, "content": content_of(message)}
    if message.reasoning:
        fields["reasoning_content"] = message.reasoning
    if message.call_id:
        fields["tool_call_id"] = message.call_id
    if message.calls:
        fields["tool_calls"] = [
            {"id": each.id, "type": "function",
             "function": {"name": each.name, "arguments": each.arguments}}
            for each in message.calls
        ]  # fmt: skip
    return fields


def _arguments(call: _ToolCall, path: str) -> str:
    """As they are: the model's own words, which its cache may hold. Half of them are none."""
    try:
        msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestError(
            f"`{path}.function.arguments` is not a JSON object.",
            param=f"{path}.function.arguments",
            code="invalid_value",
        ) from None
    return call.function.arguments or "{}"


def _text_part(part: dict[str, Any], path: str) -> str:
    if part.get("type") != "text":
        raise unsupported(f"{path}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(
            f"`{path}.text` must be a string.", param=f"{path}.text", code="invalid_value"
        )
    for field in part:
        if field not in ("type", "text"):
            raise invalid_body(f"Object contains unknown field `{field}` - at `$.{path}`")
    return text


def _text_prompt(prompt: str | list[Any]) -> str | tuple[int, ...]:
    # A batch of one is the same request; more would need several answers.
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if any(isinstance(item, (str, list)) for item in prompt):
        raise RequestError(
            "`prompt` must be one prompt; several in one request are not supported.",
            param="prompt",
            code="unsupported_parameter",
        )
    for token in prompt:
        if type(token) is not int or not 0 <= token <= TOKEN_ID_MAX:
            raise RequestError(
                "`prompt` must be a string or an array of token ids.",
                param="prompt",
                code="invalid_value",
            )
    return tuple(prompt)


def _call(
    body: _Body,
    kind: Kind,
    prompt: tuple[ChatMessage, ...] | str | tuple[int, ...],
    max_tokens: int | None,
    logprobs: int | None,
    grammar: Grammar | None,
) -> Call:
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "`stream_options` is only allowed when `stream` is true.",
            param="stream_options",
            code="invalid_value",
        )
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Call(
        kind=kind,
        model=body.model,
        prompt=prompt,
        sampling=_sampling(body),
        max_tokens=max_tokens,
        stop=_stop(body.stop),
        stream=bool(body.stream),
        include_usage=include_usage,
        prompt_cache_key=body.prompt_cache_key,
        user=body.user,
        logprobs=logprobs,
        grammar=grammar,
        n=body.n or 1,
    )


# Fields of a body that are fields of `Sampling`, as they are.
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repeat_penalty",
    "repeat_last_n",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
)


def _sampling(body: _Body) -> Sampling:
    given: dict[str, Any] = {
        name: value for name in _SAMPLING if (value := getattr(body, name)) is not None
    }
    if body.mirostat:
        # Mirostat draws by surprise alone; what it would ignore is refused.
        for name in ("top_k", "top_p", "min_p", "typical_p"):
            if name in given:
                raise _conflict(name, "mirostat")
        if body.temperature == 0.0:
            raise _conflict("mirostat", "temperature: 0")
    if body.repetition_penalty is not None:
        if body.repeat_penalty is not None:
            raise _conflict("repetition_penalty", "repeat_penalty")
        given["repeat_penalty"] = body.repetition_penalty
    for name in ("repeat_last_n", "dry_penalty_last_n"):
        if given.get(name) == -1:  # llama.cpp's word for the whole context
            given[name] = PENALTY_TOKENS_MAX
    if body.dry_sequence_breakers is not None:
        given["dry_sequence_breakers"] = _breakers(body.dry_sequence_breakers)
    return Sampling(**given, logit_bias=_logit_bias(body.logit_bias or {}))


def _conflict(param: str, other: str) -> RequestError:
    return RequestError(
        f"`{param}` cannot be combined with `{other}`.", param=param, code="invalid_value"
    )


def _breakers(breakers: list[str]) -> tuple[str, ...]:
    if len(breakers) > DRY_BREAKERS_MAX or any(
        not 0 < len(breaker.encode()) <= DRY_BREAKER_BYTES_MAX or "\0" in breaker
        for breaker in breakers
    ):
        raise RequestError(
            f"`dry_sequence_breakers` are up to {DRY_BREAKERS_MAX} strings of 1 to "
            f"{DRY_BREAKER_BYTES_MAX} bytes.",
            param="dry_sequence_breakers",
            code="invalid_value",
        )
    return tuple(breakers)


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if len(bias) > LOGIT_BIAS_ENTRIES_MAX:
        raise RequestError(
            f"`logit_bias` has more than {LOGIT_BIAS_ENTRIES_MAX} entries.",
            param="logit_bias",
            code="invalid_value",
        )
    entries: dict[int, float] = {}
    for token, value in bias.items():
        # Ten digits hold every token id; int() of a megabyte of digits would hold the node.
        plain = token.isascii() and token.isdigit() and len(token) <= 10
        if not plain or int(token) > TOKEN_ID_MAX or not -100.0 <= value <= 100.0:
            raise RequestError(
                "`logit_bias` maps token ids to numbers from -100 to 100.",
                param="logit_bias",
                code="invalid_value",
            )
        entries[int(token)] = value
    return tuple(sorted(entries.items()))


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    sequences = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(sequences) > STOP_SEQUENCES_MAX or "" in sequences:
        raise RequestError(
            f"`stop` is one string or up to {STOP_SEQUENCES_MAX}, none of them empty.",
            param="stop",
            code="invalid_value",
        )
    return sequences


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------

_json = msgspec.json.Encoder()
_DONE = b"data: [DONE]\n\n"
_PLAIN = ChatStyle()


class Encoder:
    """Writes the answer to one call, streamed or whole.

    Everything that is equal in all chunks is encoded once, so that a chunk costs microseconds:
    the text's escapes and two concatenations.
    """

    def __init__(
        self,
        call: Call,
        id: str,
        digest: str,
        created: int,
        style: ChatStyle = _PLAIN,
        continuation: Continuation | None = None,
    ) -> None:
        """`style` is the model's; `continuation`: the answer goes on here."""
        chat = call.kind == "chat"
        self._chat = chat
        self._include_usage = call.include_usage
        self._offsets = [0 if continuation is None else continuation.chars] * call.n
        self._finishes: list[Finish] = []
        self._id = id
        self._readers = [call.reader(style, continuation) for _ in range(call.n)]
        self._waits = call.is_resumable
        self._waiting: list[tuple[list[Said], list[TokenLogprobs]]] = [
            ([], []) for _ in range(call.n)
        ]
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{id}" if chat else f"cmpl-{id}",
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": call.model,
            # The same bytes under another name have the same fingerprint.
            "system_fingerprint": f"fp_{digest[:16]}",
        }
        chunk = {**self._head, "object": "chat.completion.chunk"} if chat else self._head
        self._open = b"data: " + _json.encode(chunk)[:-1]
        self._choices = [self._open + b',"choices":[{"index":%d,' % i for i in range(call.n)]
        # With include_usage every chunk but the last says that its usage is not known yet.
        self._close = b'}],"usage":null}\n\n' if call.include_usage else b"}]}\n\n"
        before, after = (b'"delta":{"content":', b"}") if chat else (b'"text":', b"")
        self._before = [choice + before for choice in self._choices]
        self._between = after + b',"logprobs":'
        self._after = b',"finish_reason":null' + self._close

    @property
    def is_complete(self) -> bool:
        """Whether every choice has come to its end, and so the stream."""
        return len(self._finishes) == len(self._choices)

    def opening(self) -> bytes:
        """What comes before the first text: the role of each choice, for a chat."""
        if not self._chat:
            return b""
        return b"".join(
            choice
            + b'"delta":{"role":"assistant","content":"","refusal":null},'
            + b'"logprobs":null'
            + self._after
            for choice in self._choices
        )

    @property
    def place(self) -> tuple[int, bool]:
        """Of an answer that others may go on with, after an event: how many tokens were thoughts,
        and whether these go on."""
        reader = self._readers[0]
        return (0, False) if reader is None else (reader.thoughts, reader.is_thinking)

    def delta(self, delta: Delta) -> bytes:
        """One event with some text; with tools, none or several of text and calls.

        Of an answer that others may go on with, an event comes only when nothing is held back, so
        that they need not know what was; until then it is none.
        """
        reader = self._readers[delta.index]
        if reader is None:
            return self._text(delta)
        waiting, logprobs = self._waiting[delta.index]
        waiting += reader.feed(delta)
        logprobs += delta.logprobs
        if not waiting or (self._waits and not reader.is_settled):
            return b""
        self._waiting[delta.index] = [], []
        return self._said(waiting, logprobs, delta.index)

    def _text(self, delta: Delta) -> bytes:
        logprobs = b"null"
        if delta.logprobs:
            logprobs = _json.encode(self._logprobs(delta.logprobs, delta.index))
        text = _json.encode(delta.text)
        return self._before[delta.index] + text + self._between + logprobs + self._after

    def _said(self, said: Sequence[Said], logprobs: Sequence[TokenLogprobs], choice: int) -> bytes:
        """Text and thoughts in one event, each beginning and each part of a call in its own.

        `logprobs` are of all tokens so far that no event has told of, those of tags included.
        """
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for each in said:
            if isinstance(each, Reasoning):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + each.text
            elif isinstance(each, Content):
                delta["content"] = delta.get("content", "") + each.text
            elif isinstance(each, ToolCall):
                function = {"name": each.name, "arguments": ""}
                id = self._call_id(choice, each.index)
                calls.append({"index": each.index, "id": id, "type": "function",
                              "function": function})  # fmt: skip
            else:
                calls.append({"index": each.index, "function": {"arguments": each.text}})
        deltas = [delta] if delta or (logprobs and not calls) else []
        deltas += [{"tool_calls": [call]} for call in calls]
        events = []
        for each_delta in deltas:
            first = each_delta is deltas[0]
            told = self._logprobs(logprobs, choice) if logprobs and first else None
            body = b'"delta":' + _json.encode(each_delta) + b',"logprobs":' + _json.encode(told)
            events.append(self._choices[choice] + body + self._after)
        return b"".join(events)

    def _call_id(self, choice: int, index: int) -> str:
        return f"call_{self._id}{choice:02x}{index:02x}"

    def closing(self, finish: Finish) -> bytes:
        """The reason of a choice's end; after the last, the usage if it was asked for, and the
        end."""
        self._finishes.append(finish)
        rest, reader = b"", self._readers[finish.index]
        if reader is not None:
            waiting, logprobs = self._waiting[finish.index]
            rest = self._said([*waiting, *reader.flush()], logprobs, finish.index)
        wire = rest + b"".join(
            (
                self._choices[finish.index],
                b'"delta":{}' if self._chat else b'"text":""',
                b',"logprobs":null,"finish_reason":"',
                _reason(reader, finish).encode(),
                b'"',
                self._stopped_by(finish),
                self._close,
            )
        )
        if not self.is_complete:
            return wire
        if self._include_usage:
            usage = _json.encode(self._usage(self._finishes))
            wire += self._open + b',"choices":[],"usage":' + usage + b"}\n\n"
        return wire + _DONE

    def whole(self, events: Sequence[Delta | Finish]) -> bytes:
        """The answer as one JSON object, from all its events."""
        finishes = sorted(
            (event for event in events if isinstance(event, Finish)),
            key=lambda finish: finish.index,
        )
        choices = []
        for finish in finishes:
            deltas = [
                event
                for event in events
                if isinstance(event, Delta) and event.index == finish.index
            ]
            logprobs = [each for delta in deltas for each in delta.logprobs]
            choice: dict[str, Any] = {
                "index": finish.index,
                "logprobs": self._logprobs(logprobs, finish.index) if logprobs else None,
                "finish_reason": finish.reason,
            }
            if finish.stop is not None:
                choice["stop_reason"] = finish.stop
            if self._chat:
                choice["message"] = self._message(deltas, finish)
                choice["finish_reason"] = _reason(self._readers[finish.index], finish)
            else:
                choice["text"] = "".join(delta.text for delta in deltas)
            choices.append(choice)
        return _json.encode({**self._head, "choices": choices, "usage": self._usage(finishes)})

    def _message(self, deltas: Sequence[Delta], finish: Finish) -> dict[str, Any]:
        """A choice's message, where there may be thoughts and calls in its text."""
        reader = self._readers[finish.index]
        said: list[Said] = []
        if reader is None:
            said += (Content(delta.text) for delta in deltas)
        else:
            said += (each for delta in deltas for each in reader.feed(delta))
            said += reader.flush()
        thoughts = "".join(each.text for each in said if isinstance(each, Reasoning))
        content = "".join(each.text for each in said if isinstance(each, Content))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        calls: list[dict[str, Any]] = []
        for each in said:
            if isinstance(each, ToolCall):
                function = {"name": each.name, "arguments": ""}
                id = self._call_id(finish.index, each.index)
                calls.append({"id": id, "type": "function", "function": function})
            elif isinstance(each, Arguments):
                calls[each.index]["function"]["arguments"] += each.text
        if calls:
            message["content"] = content or None
            message["tool_calls"] = calls
        return message

    def _stopped_by(self, finish: Finish) -> bytes:
        """Which stop string ended the answer: vLLM's field, and what other APIs than OpenAI's
        tell their clients."""
        return b"" if finish.stop is None else b',"stop_reason":' + _json.encode(finish.stop)

    def _usage(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """Of all choices together; they share the prompt, which is computed and counted once."""
        prompt_tokens = max(finish.usage.prompt_tokens for finish in finishes)
        completion_tokens = sum(finish.usage.completion_tokens for finish in finishes)
        cached_tokens = min(finish.usage.cached_tokens for finish in finishes)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        if self._chat:
            thoughts = sum(reader.thoughts for reader in self._readers if reader is not None)
            usage["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        return usage

    def _logprobs(self, tokens: Sequence[TokenLogprobs], index: int) -> dict[str, Any]:
        if self._chat:
            content = [
                {**_logprob(token.drawn), "top_logprobs": [_logprob(top) for top in token.top]}
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        texts = [_token_text(token.drawn.piece) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.drawn.piece.decode("utf-8", "ignore"))
        return {
            "tokens": texts,
            "token_logprobs": [token.drawn.logprob for token in tokens],
            "top_logprobs": [
                {_token_text(top.piece): top.logprob for top in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


def _reason(reader: AnswerReader | None, finish: Finish) -> str:
    called = reader is not None and reader.calls and finish.reason == "stop"
    return "tool_calls" if called else finish.reason


def _logprob(entry: Logprob) -> dict[str, Any]:
    return {
        "token": _token_text(entry.piece),
        "logprob": entry.logprob,
        "bytes": list(entry.piece),
    }


def _token_text(piece: bytes) -> str:
    """A token that is half a character has no text; OpenAI writes its bytes like this."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def encode_error(
    message: str,
    type: Literal["invalid_request_error", "requests", "server_error"],
    *,
    param: str | None = None,
    code: str | None = None,
    **details: Any,
) -> bytes:
    """OpenAI's error object; `details` are extra machine-readable members."""
    error = {"message": message, "type": type, "param": param, "code": code, **details}
    return _json.encode({"error": error})


def encode_error_event(message: str, code: str) -> bytes:
    """The last event of a stream that cannot be completed; no `[DONE]` follows it."""
    return b"data: " + encode_error(message, "server_error", code=code) + b"\n\n"


def encode_model(model: ServedModel) -> bytes:
    """The answer of /v1/models/{id}."""
    return _json.encode(_model(model))


def encode_models(models: Iterable[ServedModel]) -> bytes:
    """The answer of /v1/models."""
    return _json.encode({"object": "list", "data": [_model(model) for model in models]})


def _model(model: ServedModel) -> dict[str, Any]:
    about: dict[str, Any] = {} if model.approximate is None else {"approximate": model.approximate}
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "meshnode",
        "meshnode": {
            "digest": model.digest,
            "state": model.state,
            "served_by": model.served_by,
            "context_tokens": model.context_tokens,
            **about,
        },
    }
