"""OpenAI's JSON: every field works, is harmless, or is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.engine import (
    ChatMessage,
    Continuation,
    Delta,
    Finish,
    Logprob,
    Sampling,
    TokenLogprobs,
    Usage,
)
from meshnode.errors import RequestError
from meshnode.gateway.openai import Encoder, decode_chat, decode_text
from meshnode.gateway.session import SESSION_BYTES, session_key

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return decode_chat(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def text(**fields):
    return decode_text(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def test_defaults():
    call = chat()
    assert call.prompt == (ChatMessage("user", "hi"),)
    assert call.sampling == Sampling()
    assert (call.max_tokens, call.stop, call.stream, call.include_usage) == (None, (), False, False)
    assert text().max_tokens == 16


def test_every_working_field_arrives():
    call = chat(
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        seed=-3,
        frequency_penalty=1,
        presence_penalty=-1,
        logit_bias={"5": 100, "3": -1.5},
        typical_p=0.9,
        repetition_penalty=1.1,
        repeat_last_n=-1,
        dry_multiplier=0.8,
        dry_base=2,
        dry_allowed_length=3,
        dry_penalty_last_n=100,
        dry_sequence_breakers=[";"],
        mirostat=0,
        mirostat_tau=4,
        mirostat_eta=0.2,
        stop=["a", "b"],
        max_completion_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        user="u",
        prompt_cache_key="k",
    )
    openais = (0.0, 7, 0.5, 0.1, -3, 1.0, -1.0, ((3, -1.5), (5, 100.0)))
    llamas = (0.9, 1.1, 2048, 0.8, 2.0, 3, 100, (";",), 0, 4.0, 0.2)
    assert call.sampling == Sampling(*openais, *llamas)
    assert (call.stop, call.max_tokens, call.stream, call.include_usage) == (
        ("a", "b"),
        9,
        True,
        True,
    )
    assert (call.user, call.prompt_cache_key) == ("u", "k")


def test_content_may_be_text_parts_and_developer_is_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = chat(messages=[{"role": "developer", "content": parts}, *MESSAGES])
    assert call.prompt[0] == ChatMessage("system", "a\nb")


@pytest.mark.parametrize("prompt", ["hi", ["hi"]])
def test_text_prompts(prompt):
    assert text(prompt=prompt).prompt == "hi"


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_token_prompts(prompt):
    assert text(prompt=prompt).prompt == (1, 2)


HARMLESS = [
    {"metadata": {"a": "b"}},
    {"store": False},
    {"service_tier": "auto"},
    {"n": 1},
    {"logprobs": False},
    {"tools": []},
    {"tool_choice": "none"},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
    {"max_tokens": None, "temperature": None, "stop": None, "stream_options": None},
    {
        "messages": [
            *MESSAGES,
            {"role": "assistant", "content": "x", "refusal": None, "tool_calls": []},
        ]
    },
]


@pytest.mark.parametrize("fields", HARMLESS)
def test_harmless_fields_pass(fields):
    assert chat(**fields).model == "m"


def function(name="f", **fields):
    return {"type": "function", "function": {"name": name, **fields}}


def named(name):
    return {"type": "function", "function": {"name": name}}


def called(name, arguments):
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


F = function()
REFUSED = [
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [F, F]}, "tools"),
    ({"tools": [F], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [F], "tool_choice": named("g")}, "tool_choice"),
    ({"tools": [F], "grammar": 'root ::= "a"'}, "grammar"),
    ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters"),
    (
        {
            "tools": [
                function(
                    parameters={"type": "object", "properties": {"a": {"not": {}}}}, strict=True
                ),
            ],
        },
        "tools[0].function.parameters.properties.a.not",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]},
        "messages[0].tool_call_id",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [called("f", "{")]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "a"}},
            }
        },
        "response_format.json_schema.schema.pattern",
    ),
    ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "grammar"),
    ({"grammar": ""}, "grammar"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"reasoning_effort": "hard"}, "reasoning_effort"),
    (
        {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
        "reasoning_effort",
    ),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
    (
        {"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]},
        "messages[0].reasoning_content",
    ),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "3"}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"typical_p": 1.1}, "typical_p"),
    ({"repeat_penalty": 0}, "repeat_penalty"),
    ({"repeat_penalty": 1.1, "repetition_penalty": 1.1}, "repetition_penalty"),
    ({"repeat_last_n": 1_000_000}, "repeat_last_n"),
    ({"dry_multiplier": -1}, "dry_multiplier"),
    ({"dry_base": 0.5}, "dry_base"),
    ({"dry_allowed_length": 0}, "dry_allowed_length"),
    ({"dry_penalty_last_n": -2}, "dry_penalty_last_n"),
    ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers"),
    ({"dry_sequence_breakers": ["x" * 41]}, "dry_sequence_breakers"),
    ({"dry_sequence_breakers": ["x"] * 17}, "dry_sequence_breakers"),
    ({"mirostat": 3}, "mirostat"),
    ({"mirostat": 2, "temperature": 0}, "mirostat"),
    ({"mirostat": 2, "top_k": 5}, "top_k"),
    ({"mirostat_tau": 0}, "mirostat_tau"),
    ({"mirostat_eta": 2}, "mirostat_eta"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"best_of": 2}, "best_of"),
    ({"unheard_of": None}, "unheard_of"),
    ({"model": ""}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x", "zz": 1}]}, "messages[0].zz"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "zz": 1}]}]},
        "messages[0].content[0].zz",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_does_not_work_is_refused_by_name(fields, param):
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert caught.value.code
    assert param.rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, "b"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": MESSAGES}, "messages"),
    ],
)
def test_text_refuses_by_name(fields, param):
    with pytest.raises(RequestError) as caught:
        text(**fields)
    assert caught.value.param == param


FIELD = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "stop",
        "seed",
        "logit_bias",
        "n",
        "stream",
        "metadata",
        "tools",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": JSON}
)
BODY = st.dictionaries(FIELD | st.text(), JSON, max_size=5) | st.fixed_dictionaries(
    {"model": st.text(), "messages": st.lists(MESSAGE, max_size=3), "prompt": JSON}
)
RAW = st.binary() | BODY.map(lambda body: json.dumps(body).encode()) | st.just(b"[" * 100_000)


@settings(max_examples=300, deadline=None)
@given(RAW, st.integers(0, 200), st.binary(max_size=3))
def test_no_body_raises_anything_but_request_error(body, at, noise):
    for decode in (decode_chat, decode_text):
        for raw in (body, body[:at] + noise + body[at:]):
            try:
                call = decode(raw)
            except RequestError as error:
                str(error).encode()
            else:
                assert len(session_key(call, header=None, tenant=b"")) == SESSION_BYTES


@pytest.mark.parametrize("escape", ["\\ud800", "\\udc00 trailing text", "\\ud800\\u0041 trailing"])
def test_lone_surrogates_are_refused(escape):
    body = b'{"model":"m","messages":[{"role":"user","content":"%s and some more"}]}'
    with pytest.raises(RequestError):
        decode_chat(body % escape.encode())


@settings(deadline=None)
@given(st.text(), st.booleans())
def test_chunks_are_json_whatever_the_text(content, include_usage):
    call = chat(stream=True, stream_options={"include_usage": include_usage})
    encoder = Encoder(call, "id", "ab" * 32, 1)
    finish = Finish("stop", Usage(1, 0, 1))
    wire = encoder.opening() + encoder.delta(Delta(content)) + encoder.closing(finish)
    *events, done, empty = wire.decode().split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[1]["choices"][0]["delta"] == {"content": content}
    assert chunks[2]["choices"][0]["finish_reason"] == "stop"
    assert len(chunks) == 3 + include_usage
    whole = json.loads(encoder.whole([Delta(content), finish]))
    assert whole["choices"][0]["message"]["content"] == content


SAID = TokenLogprobs(Logprob(b"hi", -0.5), (Logprob(b"hi", -0.5), Logprob(b"ho", -1.0)))
HALF = TokenLogprobs(Logprob(b"\xf0\x9f", -0.25), ())


def test_logprobs_of_a_chat():
    call = chat(logprobs=True, top_logprobs=2)
    assert call.logprobs == 2
    assert chat(logprobs=True).logprobs == 0
    events = [Delta("hi", logprobs=(SAID, HALF)), Finish("stop", Usage(1, 0, 2))]
    choice = json.loads(Encoder(call, "id", "ab" * 32, 1).whole(events))["choices"][0]
    hi = {"token": "hi", "logprob": -0.5, "bytes": [104, 105]}
    ho = {"token": "ho", "logprob": -1.0, "bytes": [104, 111]}
    half = {"token": "bytes:\\xf0\\x9f", "logprob": -0.25, "bytes": [240, 159]}
    content = [{**hi, "top_logprobs": [hi, ho]}, {**half, "top_logprobs": []}]
    assert choice["logprobs"] == {"content": content, "refusal": None}


def test_logprobs_of_a_text_go_on_counting_characters():
    call = text(logprobs=2, stream=True)
    assert call.logprobs == 2
    encoder = Encoder(call, "id", "ab" * 32, 1, continuation=Continuation((), 10))
    told = []
    for _ in range(2):
        chunk = json.loads(encoder.delta(Delta("hi", logprobs=(SAID,)))[6:])
        told.append(chunk["choices"][0]["logprobs"])
    assert told[0] == {
        "tokens": ["hi"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"hi": -0.5, "ho": -1.0}],
        "text_offset": [10],
    }
    assert told[1]["text_offset"] == [12]
