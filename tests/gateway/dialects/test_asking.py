"""What each dialect's fields become in a chat request, and which are refused by name."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from meshnode.engine import ChatMessage, FunctionCall, Image
from meshnode.errors import RequestError
from meshnode.gateway.dialects import Asked, ollama
from meshnode.gateway.dialects.anthropic import decode_messages
from meshnode.gateway.dialects.kept import UnknownResponseError
from meshnode.gateway.dialects.responses import decode_response
from meshnode.gateway.openai import decode_chat

PNG_URL = "data:image/png;base64,aGk="
TURN = {"role": "user", "content": "hi"}
BEFORE = (ChatMessage("user", "a"), ChatMessage("assistant", "b"))


def recall(id: str) -> tuple[ChatMessage, ...]:
    if id != "resp_1":
        raise UnknownResponseError(id, "previous_response_id")
    return BEFORE


def respond(body: bytes) -> Asked:
    return decode_response(body, recall, lambda id, kept: None)


DECODERS = {
    "responses": (respond, {"model": "m", "input": "hi"}),
    "messages": (decode_messages, {"model": "m", "max_tokens": 5, "messages": [TURN]}),
    "chat": (
        partial(ollama.decode_chat, room=lambda name: 4096),
        {"model": "m", "messages": [TURN]},
    ),
    "generate": (
        partial(ollama.decode_generate, room=lambda name: 4096),
        {"model": "m", "prompt": "hi"},
    ),
}


def asked(dialect: str, **fields: Any) -> Asked:
    decode, least = DECODERS[dialect]
    return decode(json.dumps({**least, **fields}).encode())


def said(**fields: Any) -> dict[str, Any]:
    return {"type": "text", **fields}


SEEN = (ChatMessage("user", "hi", (Image(b"hi", 0),)),)


def anthropic_image(data: str = "aGk=") -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


WORKS = [
    # dialect, fields, attribute of the call, its value
    ("responses", {}, "prompt", (ChatMessage("user", "hi"),)),
    ("responses", {}, "max_tokens", None),
    ("responses", {}, "stream", False),
    ("responses", {"max_output_tokens": 7}, "max_tokens", 7),
    ("responses", {"stream": True}, "include_usage", True),
    ("responses", {"temperature": 0.5}, "sampling.temperature", 0.5),
    ("responses", {"top_p": 0.5}, "sampling.top_p", 0.5),
    ("responses", {"user": "u"}, "user", "u"),
    ("responses", {"prompt_cache_key": "k"}, "prompt_cache_key", "k"),
    (
        "responses",
        {
            "instructions": "be kind",
            "input": [
                {"role": "developer", "content": "x"},
                {"type": "message", "role": "user", "content": [said(type="input_text", text="y")]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "role": "assistant",
                    "content": [said(type="output_text", text="z", annotations=[], logprobs=[])],
                },
            ],
        },
        "prompt",
        (
            ChatMessage("system", "be kind"),
            ChatMessage("system", "x"),
            ChatMessage("user", "y"),
            ChatMessage("assistant", "z"),
        ),
    ),
    (
        "responses",
        {"instructions": "s", "previous_response_id": "resp_1"},
        "prompt",
        (ChatMessage("system", "s"), *BEFORE, ChatMessage("user", "hi")),
    ),
    (
        "responses",
        {
            "input": [
                {
                    **TURN,
                    "content": [
                        {"type": "input_text", "text": "hi"},
                        {"type": "input_image", "image_url": PNG_URL, "detail": "low"},
                    ],
                }
            ]
        },
        "prompt",
        (ChatMessage("user", "hi", (Image(b"hi", 2, True),)),),
    ),
    (  # what results show comes after all of them
        "responses",
        {
            "input": [
                TURN,
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": [
                        {"type": "input_image", "image_url": PNG_URL},
                        {"type": "input_text", "text": "42"},
                    ],
                },
                {"type": "function_call_output", "call_id": "d", "output": "43"},
                {"role": "user", "content": "and?"},
            ]
        },
        "prompt",
        (
            ChatMessage("user", "hi"),
            ChatMessage("assistant", "", calls=(FunctionCall("c", "f", "{}"),)),
            ChatMessage("tool", "42", call_id="c"),
            ChatMessage("tool", "43", call_id="d"),
            ChatMessage("user", "and?", (Image(b"hi", 0),)),
        ),
    ),
    ("responses", {"reasoning": {"effort": "low"}}, "wish.effort", "low"),
    (
        "responses",
        {"text": {"format": {"type": "json_object"}}},
        "grammar.param",
        "response_format",
    ),
    (
        "responses",
        {
            "tools": [{"type": "function", "name": "f"}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
        "tools.choice",
        "required",
    ),
    (
        "responses",
        {
            "tools": [{"type": "function", "name": "f"}],
            "tool_choice": {"type": "function", "name": "f"},
        },
        "tools.choice",
        "f",
    ),
    (
        "responses",
        {
            "input": [
                {
                    "type": "reasoning",
                    "summary": [],
                    "content": [said(type="reasoning_text", text="hm")],
                },
                {"type": "message", "role": "assistant", "content": "z"},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "42"},
            ]
        },
        "prompt",
        (
            ChatMessage("assistant", "z", reasoning="hm", calls=(FunctionCall("c", "f", "{}"),)),
            ChatMessage("tool", "42", call_id="c"),
        ),
    ),
    ("messages", {"thinking": {"type": "disabled"}}, "wish.thinking", False),
    ("messages", {"output_config": {"effort": "high"}}, "wish.effort", "high"),
    (
        "messages",
        {
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        },
        "tools.parallel",
        False,
    ),
    (
        "messages",
        {"output_format": {"type": "json_schema", "schema": {"type": "null"}}},
        "grammar.param",
        "response_format.json_schema",
    ),
    ("chat", {"think": False}, "wish.thinking", False),
    ("chat", {"think": "low"}, "wish.effort", "low"),
    ("chat", {"format": "json"}, "grammar.param", "response_format"),
    ("chat", {"format": {"type": "null"}}, "grammar.param", "response_format.json_schema"),
    ("chat", {"options": {"repeat_penalty": 1.1}}, "sampling.repeat_penalty", 1.1),
    ("chat", {"options": {"num_ctx": 4096}}, "max_tokens", None),
    ("chat", {"options": {"mirostat": 2}}, "sampling.mirostat", 2),
    ("messages", {}, "max_tokens", 5),
    (
        "messages",
        {"messages": [{**TURN, "content": [anthropic_image(), said(text="hi")]}]},
        "prompt",
        SEEN,
    ),
    ("chat", {"messages": [{**TURN, "images": ["aGk="]}]}, "prompt", SEEN),
    (
        "messages",
        {
            "messages": [
                TURN,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c", "content": "42"},
                        anthropic_image(),
                        said(text="hi"),
                    ],
                },
            ]
        },
        "prompt",
        (
            ChatMessage("user", "hi"),
            ChatMessage("assistant", "", calls=(FunctionCall("c", "f", "{}"),)),
            ChatMessage("tool", "42", call_id="c"),
            *SEEN,
        ),
    ),
    (  # what results show comes after all of them
        "messages",
        {
            "messages": [
                TURN,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": id, "name": "f", "input": {}} for id in "cd"
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "c",
                            "content": [
                                said(text="42"),
                                anthropic_image(),
                            ],
                        },
                        {
                            "type": "tool_result",
                            "tool_use_id": "d",
                            "content": [
                                anthropic_image("aG8="),
                            ],
                        },
                    ],
                },
            ]
        },
        "prompt",
        (
            ChatMessage("user", "hi"),
            ChatMessage(
                "assistant", "", calls=(FunctionCall("c", "f", "{}"), FunctionCall("d", "f", "{}"))
            ),
            ChatMessage("tool", "42", call_id="c"),
            ChatMessage("tool", "", call_id="d"),
            ChatMessage("user", "", (Image(b"hi", 0), Image(b"ho", 0))),
        ),
    ),
    ("generate", {"images": ["aGk="]}, "prompt", SEEN),
    ("messages", {"stream": True}, "include_usage", True),
    ("messages", {"stop_sequences": ["a", "b"]}, "stop", ("a", "b")),
    ("messages", {"temperature": 1.0}, "sampling.temperature", 1.0),
    ("messages", {"top_p": 0.5}, "sampling.top_p", 0.5),
    ("messages", {"top_k": 3}, "sampling.top_k", 3),
    ("messages", {"metadata": {"user_id": "u"}}, "user", None),
    (
        "messages",
        {
            "system": [said(text="s", cache_control={"type": "ephemeral"})],
            "messages": [
                {"role": "user", "content": [said(text="a"), said(text="b")]},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
                {"role": "user", "content": "e"},
            ],
        },
        "prompt",
        (
            ChatMessage("system", "s"),
            ChatMessage("user", "a\nb\nc"),
            ChatMessage("assistant", "d"),
            ChatMessage("user", "e"),
        ),
    ),
    ("chat", {}, "stream", True),
    ("chat", {"stream": False}, "stream", False),
    ("chat", {}, "max_tokens", None),
    ("chat", {"options": {"num_predict": 9}}, "max_tokens", 9),
    ("chat", {"options": {"num_predict": -1}}, "max_tokens", None),
    ("chat", {"options": {"stop": "x"}}, "stop", ("x",)),
    ("chat", {"options": {"seed": 4}}, "sampling.seed", 4),
    ("chat", {"options": {"temperature": 0}}, "sampling.temperature", 0),
    ("chat", {"options": {"top_k": 4}}, "sampling.top_k", 4),
    ("chat", {"options": {"min_p": 0.5}}, "sampling.min_p", 0.5),
    ("chat", {"options": {"presence_penalty": 1}}, "sampling.presence_penalty", 1),
    ("chat", {"keep_alive": "5m"}, "prompt", (ChatMessage("user", "hi"),)),
    (
        "generate",
        {"system": "s"},
        "prompt",
        (ChatMessage("system", "s"), ChatMessage("user", "hi")),
    ),
]


@pytest.mark.parametrize(("dialect", "fields", "attribute", "value"), WORKS)
def test_fields_that_work(
    dialect: str, fields: dict[str, Any], attribute: str, value: object
) -> None:
    request = asked(dialect, **fields)
    found: Any = request.call
    for name in attribute.split("."):
        found = getattr(found, name)
    assert found == value
    # A peer gets the body and understands the same.
    assert decode_chat(request.body) == request.call


HARMLESS = [
    ("responses", {"store": False, "metadata": {"a": "b"}, "safety_identifier": "s"}),
    ("responses", {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}),
    ("responses", {"text": {"format": {"type": "text"}}, "truncation": "disabled"}),
    ("responses", {"reasoning": {}, "text": {"verbosity": "medium"}}),
    ("responses", {"reasoning": None, "include": [], "background": False}),
    ("responses", {"stream": True, "stream_options": {"include_obfuscation": False}}),
    ("messages", {"service_tier": "auto", "thinking": {"type": "adaptive"}, "tools": []}),
    ("messages", {"cache_control": {"type": "ephemeral", "ttl": "1h"}}),
    ("chat", {"format": "", "tools": [], "keep_alive": 0}),
    ("chat", {"options": {"repeat_penalty": 1, "mirostat": 0, "typical_p": 1.0}}),
    ("generate", {"raw": False, "context": [], "suffix": "", "template": "", "images": []}),
]


@pytest.mark.parametrize(("dialect", "fields"), HARMLESS)
def test_fields_that_change_no_answer(dialect: str, fields: dict[str, Any]) -> None:
    changed = asked(dialect, **fields).call
    plain = asked(dialect, **({"stream": True} if "stream" in fields else {})).call
    assert changed == plain


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [TURN, {**TURN, **fields}]}


FUNCTION = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}},
}
REFUSED = [
    # dialect, fields, the field that the error names
    ("responses", {"model": ""}, "model"),
    ("responses", {"model": None}, "model"),
    ("responses", {"input": []}, "input"),
    ("responses", {"input": 3}, "input"),
    ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ("responses", {"input": [{**TURN, "role": "tool"}]}, "input[0].role"),
    (
        "responses",
        {"input": [{**TURN, "content": [{"type": "input_image", "image_url": "http://x/"}]}]},
        "input[0].content[0].image_url",
    ),
    ("responses", {"max_output_tokens": 0}, "max_output_tokens"),
    ("responses", {"temperature": 2.1}, "temperature"),
    ("responses", {"top_p": "1"}, "top_p"),
    ("responses", {"tools": [{"type": "web_search"}]}, "tools"),
    ("responses", {"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    (
        "responses",
        {"tools": [{**FUNCTION, "strict": True}]},
        "tools[0].parameters.properties.a.pattern",
    ),
    ("responses", {"tool_choice": "required"}, "tool_choice"),
    ("responses", {"tool_choice": {"type": "web_search"}}, "tool_choice"),
    ("responses", {"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
    ("responses", {"text": {"format": {"type": "text", "name": "x"}}}, "text.format.name"),
    ("responses", {"text": {"verbosity": "low"}}, "text.verbosity"),
    (
        "responses",
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
        "text.format.schema.not",
    ),
    ("responses", {"reasoning": {"effort": "much"}}, "reasoning.effort"),
    ("responses", {"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ("responses", {"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
    ("responses", {"input": [{**TURN, "output": "x"}]}, "input[0].output"),
    (
        "responses",
        {"input": [{"type": "reasoning", "encrypted_content": "x"}]},
        "input[0].encrypted_content",
    ),
    ("responses", {"truncation": "auto"}, "truncation"),
    ("responses", {"background": True}, "background"),
    ("responses", {"conversation": "c"}, "conversation"),
    ("responses", {"include": ["message.output_text.logprobs"]}, "include"),
    ("responses", {"metadata": {"k": "v" * 513}}, "metadata[...]"),
    ("responses", {"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ("responses", {"seed": 1}, "seed"),
    ("messages", {"max_tokens": None}, "max_tokens"),
    ("messages", {"messages": []}, "messages"),
    ("messages", message(role="system"), "messages[1].role"),
    ("messages", message(role="assistant"), "messages[1].role"),
    ("messages", message(content=[{"type": "image"}]), "messages[1].content[0].source"),
    (
        "messages",
        message(content=[{"type": "image", "source": {"type": "url", "url": "http://x/"}}]),
        "messages[1].content[0].source",
    ),
    ("messages", message(content=[anthropic_image("?")]), "messages[1].content[0].source.data"),
    (
        "messages",
        message(role="assistant", content=[anthropic_image()]),
        "messages[1].content[0].type",
    ),
    ("messages", message(content=[said(text="a", citations=[1])]), "messages[1].content[0]"),
    ("messages", {"stop_sequences": ["a"] * 5}, "stop_sequences"),
    ("messages", {"stop_sequences": [""]}, "stop_sequences"),
    ("messages", {"temperature": 1.1}, "temperature"),
    (
        "messages",
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        "thinking.budget_tokens",
    ),
    ("messages", {"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    (
        "messages",
        {"tools": [{"name": "f", "input_schema": {"type": "array"}}]},
        "tools[0].input_schema",
    ),
    ("messages", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
    ("messages", {"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ("messages", {"tool_choice": {"type": "any"}}, "tool_choice"),
    (
        "messages",
        message(content=[{"type": "tool_use", "id": "x", "name": "f", "input": {}}]),
        "messages[1].content[0].type",
    ),
    (
        "messages",
        {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
        "output_config.format.schema.not",
    ),
    ("messages", {"n": 2}, "n"),
    ("chat", {"options": {"num_ctx": 4097}}, "options.num_ctx"),
    ("chat", {"options": {"num_predict": 0}}, "options.num_predict"),
    ("chat", {"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
    ("chat", {"options": {"mirostat": 1, "top_k": 3}}, "options.top_k"),
    ("chat", {"options": {"vocab_only": True}}, "options.vocab_only"),
    ("chat", {"options": {"stop": ["a"] * 5}}, "options.stop"),
    ("chat", {"format": "yaml"}, "format"),
    ("chat", {"format": {"not": {}}}, "format.not"),
    ("chat", {"think": "deeply"}, "think"),
    ("chat", {"logprobs": True}, "logprobs"),
    ("chat", {"tools": [{}]}, "tools[0].function"),
    ("chat", message(tool_name="x"), "messages[1].tool_name"),
    ("chat", message(images=["http://x/"]), "messages[1].images[0]"),
    ("chat", message(role="assistant", images=["aGk="]), "messages[1].images"),
    ("chat", message(role="tool", images=["aGk="]), "messages[1].images"),
    ("chat", message(role="critic"), "messages[1].role"),
    ("chat", {"messages": []}, "messages"),
    ("generate", {"raw": True}, "raw"),
    ("generate", {"context": [1]}, "context"),
    ("generate", {"suffix": "x"}, "suffix"),
    ("generate", {"template": "x"}, "template"),
    ("generate", {"images": ["http://x/"]}, "images[0]"),
    ("generate", {"prompt": ""}, "prompt"),
]


@pytest.mark.parametrize(("dialect", "fields", "param"), REFUSED)
def test_fields_that_are_refused(dialect: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        asked(dialect, **fields)
    assert refused.value.param is not None
    assert refused.value.param.startswith(param)
    assert f"`{param}" in str(refused.value)


@pytest.mark.parametrize("dialect", DECODERS)
def test_missing_fields_are_named(dialect: str) -> None:
    decode, least = DECODERS[dialect]
    for field in least:
        with pytest.raises(RequestError, match=f"`{field}`"):
            decode(json.dumps({k: v for k, v in least.items() if k != field}).encode())


def test_unknown_previous_response() -> None:
    with pytest.raises(UnknownResponseError):
        asked("responses", previous_response_id="resp_2")
