"""OpenAI's fields from the API to the real model and back."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import trio

from meshnode.engine import ChatStyle, Engine, ModelCard
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.errors import RequestError
from meshnode.gateway.answer import Ask, answer_locally
from meshnode.gateway.openai import decode_chat, decode_text
from meshnode.gateway.refusal import refusal_of

# Generous: the machine may be busy, and all of it takes seconds on a free one.
HANG_S = 120
OPTIONS = EngineOptions(context_tokens=2048, slots=4, waiting_max=4, threads=1)
QUESTION = [{"role": "user", "content": "What is the weather in Paris and in Rome?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time"}}


@pytest.fixture
async def api(q4_0_card: ModelCard) -> AsyncIterator[Engine]:
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            engine = EngineProcess(q4_0_card, OPTIONS)
            await nursery.start(engine.run)
            await engine.wait_ready()
            yield engine
            nursery.cancel_scope.cancel()


async def post(
    engine: Engine, path: str = "/v1/chat/completions", **fields: Any
) -> tuple[int, Any]:
    """The status, and the JSON answer or the list of a stream's chunks."""
    body = {"model": "m", "temperature": 0, "max_tokens": 60, **fields}
    chat = path.endswith("chat/completions")
    if chat:
        body.setdefault("messages", QUESTION)
    raw = json.dumps(body).encode()
    data = b""
    async with AsyncExitStack() as stack:
        try:
            call = (decode_chat if chat else decode_text)(raw)
            ask = Ask(call, "id", bytes(16), path, raw)
            answer = await answer_locally(engine, ask, "ab" * 32, "peer-a", stack)
        except RequestError as error:
            refusal = refusal_of(error)
            assert refusal is not None
            return refusal.status, json.loads(refusal.body)
        async for piece in answer.body:
            data += piece
    if not fields.get("stream"):
        return 200, json.loads(data)
    *events, done, _ = data.decode().split("\n\n")
    assert done == "data: [DONE]"
    # Between nodes, notes stand before the events.
    return 200, [json.loads(event.partition("data: ")[2]) for event in events]


async def test_forced_calls(api: Engine) -> None:
    _, one = await post(
        api,
        tools=[CLOCK, WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    choice = one["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)

    _, chunks = await post(
        api,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        stream=True,
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    pieces = [delta["tool_calls"][0]["function"]["arguments"]
              for delta in deltas if "tool_calls" in delta]  # fmt: skip
    assert len(pieces) > 3
    jsonschema.validate(json.loads("".join(pieces)), PARAMETERS)

    _, some = await post(api, tools=[CLOCK, WEATHER], tool_choice="required", max_tokens=400)
    calls = some["choices"][0]["message"]["tool_calls"]
    assert {call["function"]["name"] for call in calls} <= {"clock", "weather"}
    assert len({call["id"] for call in calls}) == len(calls) >= 1
    _, single = await post(
        api, tools=[CLOCK, WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    assert len(single["choices"][0]["message"]["tool_calls"]) == 1


async def test_choices_have_their_own_index(api: Engine) -> None:
    _, chunks = await post(
        api, n=3, temperature=1.2, seed=3, max_tokens=8, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = chunks
    assert last["usage"]["completion_tokens"] == 24
    for index in range(3):
        own = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert [each["finish_reason"] for each in own].count("length") == 1
        assert own[-1]["finish_reason"] == "length"
        assert "".join(each["delta"].get("content", "") for each in own)
    _, whole = await post(api, "/v1/completions", prompt="The sea", n=2, max_tokens=4)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    status, refusal = await post(api, n=5)
    assert (status, refusal["error"]["param"]) == (400, "n")


async def test_schemas_and_grammars(api: Engine) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "w", "schema": PARAMETERS, "strict": True},
    }
    for stream in (False, True):
        _, said = await post(api, response_format=form, stream=stream)
        if stream:
            text = "".join(each["choices"][0]["delta"].get("content", "") for each in said)
        else:
            text = said["choices"][0]["message"]["content"]
        jsonschema.validate(json.loads(text), PARAMETERS)
    _, said = await post(api, "/v1/completions", prompt="The sea", grammar='root ::= " is " [a-c]+')
    assert said["choices"][0]["text"].startswith(" is ")
    status, refusal = await post(api, grammar="root ::= (")
    assert (status, refusal["error"]["param"]) == (400, "grammar")
    assert refusal["error"]["code"] == "invalid_grammar"


async def test_logprobs_of_both_kinds(api: Engine) -> None:
    _, chat = await post(api, logprobs=True, top_logprobs=2, max_tokens=5)
    choice = chat["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == choice["message"]["content"]
    assert all(len(each["top_logprobs"]) == 2 for each in content)
    _, chunks = await post(api, logprobs=True, max_tokens=5, stream=True)
    told = [each["choices"][0]["logprobs"] for each in chunks]
    tokens = [one["token"] for each in told if each for one in each["content"]]
    assert tokens == [each["token"] for each in content]
    _, text = await post(api, "/v1/completions", prompt="The sea", logprobs=1, max_tokens=5)
    choice = text["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    ends = [0, *(len("".join(choice["logprobs"]["tokens"][: i + 1])) for i in range(4))]
    assert choice["logprobs"]["text_offset"] == ends


async def test_llamas_own_settings_are_accepted(api: Engine) -> None:
    fields = {"temperature": 0.9, "typical_p": 0.9, "repeat_penalty": 1.1, "dry_multiplier": 0.8}
    status, _ = await post(api, **fields, max_tokens=5)
    assert status == 200
    status, _ = await post(api, temperature=0.9, mirostat=2, max_tokens=5)
    assert status == 200


# --- a model that thinks -------------------------------------------------------------------------

# Thinks like Qwen3: by itself, unless it is told not to.
THINKING = (
    b"{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    b"<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}"
)


@pytest.fixture(scope="module")
def thinking_path(q4_0_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file with another chat template in the place of its own, padded to its length."""
    data = q4_0_path.read_bytes()
    at = data.index(b"tokenizer.chat_template") + len(b"tokenizer.chat_template") + 4
    (length,) = struct.unpack_from("<Q", data, at)
    padding = b"{#" + b" " * (length - len(THINKING) - 4) + b"#}"
    path = tmp_path_factory.mktemp("thinking") / "thinks.gguf"
    path.write_bytes(data[: at + 8] + THINKING + padding + data[at + 8 + length :])
    assert path.stat().st_size == len(data)
    return path


async def test_thoughts_are_told_apart(q4_0_card: ModelCard, thinking_path: Path) -> None:
    card = replace(q4_0_card, path=str(thinking_path))
    said = "<think>France. \\n</think>\\n\\nParis </b>."
    forced = {"grammar": f'root ::= "{said}"'}
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            engine = EngineProcess(card, OPTIONS)
            await nursery.start(engine.run)
            await engine.wait_ready()
            assert engine.stats().style == ChatStyle("may", "may", "none")
            _, whole = await post(engine, **forced)
            message = whole["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == ("France.", "Paris </b>.")
            usage = whole["usage"]
            thoughts = usage["completion_tokens_details"]["reasoning_tokens"]
            assert 3 < thoughts < usage["completion_tokens"]
            options = {"stream": True, "stream_options": {"include_usage": True}}
            _, chunks = await post(engine, **forced, **options)
            deltas = [each["choices"][0]["delta"] for each in chunks if each["choices"]]
            assert "".join(each.get("reasoning_content", "") for each in deltas) == "France."
            assert "".join(each.get("content", "") for each in deltas) == "Paris </b>."
            assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == thoughts
            # Told not to think, it says what it says.
            off = {"chat_template_kwargs": {"enable_thinking": False}}
            _, plain = await post(engine, **forced, **off)
            assert plain["choices"][0]["message"]["content"].startswith("<think>France.")
            status, refused = await post(engine, reasoning_effort="low")
            assert (status, refused["error"]["param"]) == (400, "reasoning_effort")
            # An answer that must be JSON is so after the thoughts, which are free.
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
            turns = [
                turn
                for city in ("Oslo", "Bonn", "Lima")
                for turn in (
                    {"role": "user", "content": city},
                    {"role": "assistant",
                     "content": f'<think>Ok.</think>{{"city": "{city}", "days": 1}}'},
                )
            ]  # fmt: skip
            turns.append({"role": "user", "content": "Rome"})
            _, told = await post(engine, messages=turns, response_format=form)
            message = told["choices"][0]["message"]
            assert message["reasoning_content"]
            jsonschema.validate(json.loads(message["content"]), PARAMETERS)
            nursery.cancel_scope.cancel()


async def test_a_call_that_may_be_is_valid_once_it_begins(api: Engine) -> None:
    """A small model is led to the word by the conversation, and everything after it is forced."""
    turns = []
    for city in ("Oslo", "Bonn", "Lima"):
        function = {"name": "weather", "arguments": json.dumps({"city": city, "days": 1})}
        called = {"id": city, "type": "function", "function": function}
        turns += [
            {"role": "user", "content": f"Weather in {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [called]},
        ]
    turns.append({"role": "user", "content": "Weather in Rome?"})
    _, free = await post(api, messages=turns, tools=[WEATHER, CLOCK], max_tokens=120)
    (choice,) = free["choices"]
    assert choice["finish_reason"] == "tool_calls", choice
    for call in choice["message"]["tool_calls"]:
        if call["function"]["name"] == "weather":
            jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)
