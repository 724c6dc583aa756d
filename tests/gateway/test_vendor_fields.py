"""Every request field that the vendors' own clients know works here, or is refused by its name.

The clients' parameter types are walked down to their leaves. One value at a time is added to a body
that is accepted; then either the request means something else, or a 400 names the field, or the
value is in `NOTHING`, which says why it asks for nothing.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import anthropic.types
import ollama._types
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.responses.response_create_params
import pydantic
import pytest
import typing_extensions

from meshnode.engine import Usage
from meshnode.errors import RequestError
from meshnode.gateway.dialects import Asked, End, Told
from meshnode.gateway.dialects import ollama as ollamas
from meshnode.gateway.dialects.anthropic import decode_count, decode_messages
from meshnode.gateway.dialects.responses import decode_response
from meshnode.gateway.embeddings import decode_embed
from meshnode.gateway.openai import decode_chat, decode_text

DEPTH_MAX = 7
END = End("stop", Usage(1, 0, 1))
PNG_BASE64 = "aGk="
PNG_URL = f"data:image/png;base64,{PNG_BASE64}"
PLAIN: dict[Any, tuple[Any, ...]] = {
    bool: (True, False), int: (2,), float: (0.5,), str: ("x",),
}  # fmt: skip
EVERY: tuple[Any, ...] = ()
# Values that are taken and change nothing, by the place of their field; `EVERY` of a field.
NOTHING = [
    # What is done anyway.
    (r"stream|echo|logprobs|store|raw|background|truncate|.*\bdefer_loading", (False,)),
    (r"stream", (True,)),  # Ollama's default
    (r"store", (True,)),  # and that of responses
    (r"function_call|tool_choice", ("none", "auto")),  # without tools
    (r"parallel_tool_calls", (True, False)),  # the same, or the default
    (r"modalities", ("text",)),
    (r"format", ("",)),
    (r"encoding_format", ("float",)),
    (r"truncation", ("disabled",)),
    (r"(text\.)?verbosity", ("medium",)),
    (r"response_format|text\.format", ({"type": "text"},)),
    (r"service_tier", ("auto", "default", "standard_only")),
    (r"speed", ("standard",)),
    (r"thinking", ({"type": "adaptive"},)),
    (r"thinking\.display", ("summarized",)),
    (r"options\.penalize_newline", (True,)),
    (r"tools\.(function\.)?strict|.*\.is_error|.*\.disable_parallel_tool_use", (False,)),
    (r"tools\.allowed_callers", ("direct",)),
    (r"tools\.type", ("custom",)),
    (r"input\.type", ("message",)),
    (r".*\.image_url\.detail|input\.content\.detail", ("auto", "high")),
    (r"stream_options\.include_obfuscation", (False,)),  # of what an eavesdropper sees
    (r"options\.num_ctx", (2,)),  # there is as much room; no prompt is cut in any
    # The same text as a list of one part.
    (r"messages\.content", ({"type": "text", "text": "x"},)),
    (r"input\.content", ({"type": "input_text", "text": "x"},)),
    # For the vendor's books, about the one who asks.
    (r"metadata(\..*)?|safety_identifier|user", EVERY),
    # Which prefixes are worth keeping: all are kept.
    (r"(.*\.)?cache_control(\..*)?|prompt_cache_options(\..*)?|prompt_cache_retention", EVERY),
    # Of tools that the vendor runs; a node runs none.
    (r"max_tool_calls", EVERY),
    # The grammar promises every schema, strict or not; the model is told nothing of it.
    (r"response_format\.json_schema\.(strict|description)", EVERY),
    # Of our own items, sent back to us.
    (r"input\.(id|status)", EVERY),
    # What a file is, it says itself.
    (r".*\.source\.media_type", EVERY),
    # Arguments stream as they come.
    (r"tools\.eager_input_streaming", EVERY),
    # How the vendor uses its machine, and what stays of a prompt that is cut: none is.
    (r"options\.(numa|num_batch|num_gpu|main_gpu|low_vram|use_mmap|use_mlock|num_thread)", EVERY),
    (r"options\.num_keep|keep_alive", EVERY),
]


class Api(NamedTuple):
    """One route: the client's type of its body, what understands it, the least of it, and some
    fields that must work: that refusing all of them would pass shows nothing."""

    type: Any
    meaning: Callable[[bytes], Any]
    least: dict[str, Any]
    works: set[str]


def of(decode: Callable[[bytes], Asked]) -> Callable[[bytes], Any]:
    """What a translated request means: the chat request, and how its answer is told."""

    def meaning(body: bytes) -> Any:
        asked = decode(body)
        return asked.body, asked.writer("0", 0).opening(), told(asked)

    return meaning


def told(asked: Asked) -> bytes:
    whole = asked.writer("0", 0).whole(Told("", "x"), END)
    return re.sub(rb'"total_duration":\d+', b"", whole)


def respond(body: bytes) -> Any:
    kept: list[str] = []
    asked = decode_response(body, lambda id: (), lambda id, _: kept.append(id))
    return asked.body, told(asked), kept


TURN = {"role": "user", "content": "hi"}
CHAT, TEXT = openai.types.chat.completion_create_params, openai.types.completion_create_params
RESPONSE = openai.types.responses.response_create_params
APIS = {
    "chat": Api(
        CHAT.CompletionCreateParamsNonStreaming,
        decode_chat,
        {"model": "m", "messages": [TURN]},
        {"messages.tool_calls", "n", "response_format", "seed", "stop", "tools", "top_p"},
    ),
    "completions": Api(
        TEXT.CompletionCreateParamsNonStreaming,
        decode_text,
        {"model": "m", "prompt": "hi"},
        {"logprobs", "n", "presence_penalty", "seed", "stop"},
    ),
    "responses": Api(
        RESPONSE.ResponseCreateParamsNonStreaming,
        respond,
        {"model": "m", "input": "hi"},
        {"input", "instructions", "previous_response_id", "text.format", "tools"},
    ),
    "embeddings": Api(
        openai.types.EmbeddingCreateParams,
        decode_embed,
        {"model": "m", "input": "hi"},
        {"dimensions", "encoding_format", "input"},
    ),
    "messages": Api(
        anthropic.types.message_create_params.MessageCreateParamsNonStreaming,
        of(decode_messages),
        {"model": "m", "messages": [TURN], "max_tokens": 5},
        {"messages.content", "output_config.format", "stop_sequences", "system", "tools"},
    ),
    "count": Api(
        anthropic.types.MessageCountTokensParams,
        of(decode_count),
        {"model": "m", "messages": [TURN]},
        {"messages.content", "system", "tools"},
    ),
    "ollama chat": Api(
        ollama._types.ChatRequest,
        of(partial(ollamas.decode_chat, room=lambda name: 2)),
        {"model": "m", "messages": [TURN]},
        {"format", "messages.images", "options.seed", "think", "tools.function.name"},
    ),
    "ollama generate": Api(
        ollama._types.GenerateRequest,
        of(partial(ollamas.decode_generate, room=lambda name: 2)),
        {"model": "m", "prompt": "hi"},
        {"format", "images", "options.stop", "system", "think"},
    ),
    "ollama embed": Api(
        ollama._types.EmbedRequest,
        ollamas.decode_embed_body,
        {"model": "m", "input": "hi"},
        {"dimensions", "input"},
    ),
    "ollama old embed": Api(
        ollama._types.EmbeddingsRequest,
        ollamas.decode_old_embed,
        {"model": "m", "prompt": "hi"},
        {"prompt"},
    ),
    "ollama show": Api(
        ollama._types.ShowRequest,
        ollamas.decode_show,
        {"model": "m"},
        {"model"},
    ),
}


ABSENT = "absent"


class Sample(NamedTuple):
    """A value, the path to what makes it differ, what it is without that, and that itself."""

    value: Any
    path: str = ""
    without: Any = ABSENT
    leaf: Any = None


# Where any text would do for a type, but not for what it means.
TEXTS = {
    "url": PNG_URL, "image_url": PNG_URL, "data": PNG_BASE64, "arguments": "{}", "role": "user",
}  # fmt: skip
OBJECTS = {"parameters", "input_schema", "schema"}


def samples(hint: Any, name: str = "", depth: int = 0) -> Iterator[Sample]:
    """Values of a type, the plainest first: each way in which they can differ, one at a time."""
    origin, arguments = get_origin(hint), get_args(hint)
    if depth > DEPTH_MAX or hint is type(None):
        return
    if origin in (Annotated, typing_extensions.Required, typing_extensions.NotRequired):
        yield from samples(arguments[0], name, depth)
    elif origin in (Union, types.UnionType):
        for each in arguments:
            yield from samples(each, name, depth)
    elif origin is Literal:
        yield from map(leaf, arguments)
    elif hint in PLAIN:
        yield from (leaf(TEXTS.get(name, each)) for each in PLAIN[hint])
    elif name in OBJECTS:
        yield leaf({"type": "object"})
    elif origin is not None and issubclass(origin, Mapping):
        for each in samples(arguments[1], depth=depth + 1):
            yield wrapped(each, lambda value: {"k": value})
    elif origin is not None:
        for each in samples(arguments[0], depth=depth + 1):
            yield wrapped(each, lambda value: [value])
    elif typing_extensions.is_typeddict(hint) or is_model(hint):
        yield from objects(*fields_of(hint), depth)
    else:
        yield leaf({})  # it may be anything


def leaf(value: Any) -> Sample:
    return Sample(value, leaf=value)


def wrapped(sample: Sample, wrap: Callable[[Any], Any], name: str = "") -> Sample:
    path = f"{name}.{sample.path}".strip(".")
    without = ABSENT if sample.without is ABSENT else wrap(sample.without)
    return Sample(wrap(sample.value), path, without, sample.leaf)


def is_model(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, pydantic.BaseModel)


def fields_of(hint: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The fields of a client's type, and which of them are needed; headers are none."""
    if is_model(hint):
        fields = hint.model_fields
        needed = (name for name, field in fields.items() if field.is_required())
        return {name: field.annotation for name, field in fields.items()}, frozenset(needed)
    hints = get_type_hints(hint, include_extras=True)
    # The clients' modules postpone their annotations, so that `__required_keys__` knows nothing.
    marked = {name: get_origin(each) for name, each in hints.items()}
    if hint.__total__:
        needed = {n for n, mark in marked.items() if mark is not typing_extensions.NotRequired}
    else:
        needed = {n for n, mark in marked.items() if mark is typing_extensions.Required}
    return {n: h for n, h in hints.items() if "-" not in alias(h)}, frozenset(needed)


def alias(hint: Any) -> str:
    """The name under which the clients send a field."""
    notes = [getattr(each, "alias", None) for each in getattr(hint, "__metadata__", ())]
    inner = [alias(each) for each in get_args(hint) if get_origin(hint) is not Literal]
    return next((each for each in [*notes, *inner] if each), "")


def objects(hints: dict[str, Any], needed: frozenset[str], depth: int) -> Iterator[Sample]:
    """The least of it, then with something else in it."""
    if set(hints) == {"value"}:  # Ollama's Image, which it sends as base64
        yield leaf(PNG_BASE64)
        return
    values = {name: list(samples(hint, name, depth + 1)) for name, hint in hints.items()}
    first = {name: values[name][0].value for name in hints if name in needed and values[name]}
    yield leaf(first)
    for name, each in ((name, each) for name, some in values.items() for each in some):
        if name in needed and each == values[name][0]:
            continue
        placed = wrapped(each, lambda value, name=name: {**first, name: value}, name)
        yield placed if placed.without is not ABSENT else placed._replace(without=first)


@pytest.mark.parametrize("name", APIS)
def test_a_field_works_or_is_named_or_asks_for_nothing(name: str) -> None:
    api = APIS[name]
    fields, _ = fields_of(api.type)
    silent, works = [], set()
    for field, hint in fields.items():
        for sample in samples(hint, field):
            changed = meaning(api, {field: sample.value}, field)
            if changed is None:
                continue
            without = {} if sample.without is ABSENT else {field: sample.without}
            place = f"{field}.{sample.path}".strip(".")
            if changed != meaning(api, without, field):
                works.add(place)
            elif not asks_for_nothing(place, sample.leaf):
                silent.append((place, sample.leaf))
    assert not silent
    assert works >= api.works


def meaning(api: Api, fields: dict[str, Any], field: str) -> Any:
    """What a request with these fields means; None if it is refused, which must name `field`."""
    try:
        return api.meaning(json.dumps({**api.least, **fields}).encode())
    except RequestError as error:
        refusal = error
    named = re.split(r"[.\[]", refusal.param or "")[0]
    assert named == field, f"{fields} is refused for `{refusal.param}`: {refusal}"
    assert f"`{refusal.param}`" in str(refusal)
    return None


def asks_for_nothing(place: str, value: Any) -> bool:
    # JSON's true is not 1, though Python's is.
    return value == {} or any(
        re.fullmatch(pattern, place)
        and (values == EVERY or any(type(v) is type(value) and v == value for v in values))
        for pattern, values in NOTHING
    )
