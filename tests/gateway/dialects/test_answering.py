"""Answers in the words of each dialect: from an engine here or a peer's, whole, streamed, broken.

The shapes are checked by the types of the official clients.
"""

from __future__ import annotations

import contextlib
import json
from contextlib import aclosing
from dataclasses import replace

import httpx
import pytest
import trio
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ollama import ChatResponse, GenerateResponse, ShowResponse
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from meshnode.engine import ChatStyle, Delta, Finish, Usage
from meshnode.errors import EngineError
from meshnode.gateway import Candidate
from meshnode.gateway.app import create_api_app
from meshnode.gateway.dialects import End, ollama
from meshnode.gateway.dialects.answer import EventReader, told_as_stream, told_whole
from meshnode.gateway.door import Door
from meshnode.gateway.keys import ApiKey, generate_token, hash_token, with_key
from meshnode.gateway.said import Content
from meshnode.gateway.server import serve_api
from tests.fakes import DIGEST, MODEL, FakeMesh, WordEngine, local_mesh
from tests.gateway.link import HANG_S, Link

TURN = {"role": "user", "content": "to be or"}
BODIES = {
    "/v1/responses": {"model": MODEL, "input": "to be or", "max_output_tokens": 5, "stream": False},
    "/v1/messages": {"model": MODEL, "messages": [TURN], "max_tokens": 5, "stream": False},
    "/api/chat": {"model": MODEL, "messages": [TURN], "stream": False},
    "/api/generate": {"model": MODEL, "prompt": "to be or", "stream": False},
}
TEXT = "to be or to be "
WHOLE = {
    "/v1/responses": lambda body: Response.model_validate_json(body).output_text,
    "/v1/messages": lambda body: Message.model_validate_json(body).content[0].text,
    "/api/chat": lambda body: ChatResponse.model_validate_json(body).message.content,
    "/api/generate": lambda body: GenerateResponse.model_validate_json(body).response,
}
EVENTS = {
    "/v1/responses": TypeAdapter(ResponseStreamEvent),
    "/v1/messages": TypeAdapter(RawMessageStreamEvent),
}


def sse(body: bytes) -> list[dict[str, object]]:
    """The events of a stream, whose names are what their data says."""
    events = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def lines(body: bytes) -> list[dict[str, object]]:
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


def streamed_text(path: str, body: bytes) -> str:
    """The text of a stream, whose events must be such as the official client knows."""
    if path in EVENTS:
        for event in (events := sse(body)):
            if event["type"] not in ("ping", "error"):
                EVENTS[path].validate_python(event)
        deltas = [event.get("delta") for event in events if event["type"].endswith("delta")]
        return "".join(each if isinstance(each, str) else each.get("text", "") for each in deltas)
    parts = lines(body)
    if path == "/api/chat":
        return "".join(part["message"]["content"] for part in parts if "error" not in part)
    return "".join(part["response"] for part in parts if "error" not in part)


async def post(api, path: str, **changes):
    with trio.fail_after(HANG_S):
        response = await api.post(path, json={**BODIES[path], **changes})
        return response, await response.get_data()


@pytest.fixture(params=["here", "far"])
def api(request, nursery):
    """A node whose engine is its own, and one that asks a peer."""
    if request.param == "here":
        return create_api_app(local_mesh(WordEngine())).test_client()
    return Link(nursery, b=WordEngine()).api


@pytest.mark.parametrize("path", BODIES)
async def test_whole_and_streamed_alike(api, path):
    response, body = await post(api, path)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert WHOLE[path](body) == TEXT
    response, body = await post(api, path, stream=True)
    assert response.status_code == 200
    kind = "text/event-stream" if path in EVENTS else "application/x-ndjson"
    assert response.headers["content-type"] == kind
    assert response.headers["x-accel-buffering"] == "no"
    assert streamed_text(path, body) == TEXT


async def test_events_of_a_response(api):
    _, body = await post(api, "/v1/responses", stream=True)
    events = sse(body)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 5,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event["sequence_number"] for event in events] == list(range(13))
    last = events[-1]["response"]
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["usage"]["total_tokens"] == 8
    found = await api.get(f"/v1/responses/{last['id']}")
    assert json.loads(await found.get_data()) == last


async def test_events_of_a_message(api):
    _, body = await post(api, "/v1/messages", stream=True)
    events = sse(body)
    assert [event["type"] for event in events] == [
        *("message_start", "ping", "content_block_start"),
        *["content_block_delta"] * 5,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"] == {
        "input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 1,
        "output_tokens": 5,
    }


async def test_a_response_goes_on_from_another(api):
    _, body = await post(api, "/v1/responses", instructions="be brief")
    first = Response.model_validate_json(body)
    _, body = await post(api, "/v1/responses", previous_response_id=first.id, input="b c d e")
    second = Response.model_validate_json(body)
    assert second.previous_response_id == first.id
    assert second.output_text == "b c d e b "
    deleted = await api.delete(f"/v1/responses/{first.id}")
    assert json.loads(await deleted.get_data())["deleted"] is True
    response, body = await post(api, "/v1/responses", previous_response_id=first.id)
    assert response.status_code == 404
    assert json.loads(body)["error"]["code"] == "previous_response_not_found"
    response, body = await post(api, "/v1/responses", store=False)
    gone = await api.get(f"/v1/responses/{json.loads(body)['id']}")
    assert gone.status_code == 404
    assert json.loads(await gone.get_data())["error"]["code"] == "response_not_found"


async def test_what_a_turn_goes_on_from():
    engine = WordEngine()
    api = create_api_app(local_mesh(engine)).test_client()
    _, body = await post(api, "/v1/responses", instructions="be brief")
    await post(api, "/v1/responses", previous_response_id=json.loads(body)["id"], input="more")
    first, second = engine.requests
    assert [message.content for message in first.prompt] == ["be brief", "to be or"]
    assert [message.content for message in second.prompt] == ["to be or", TEXT, "more"]


@pytest.mark.parametrize("path", BODIES)
async def test_a_lost_replica_is_told_and_nothing_is_kept(path):
    api = create_api_app(local_mesh(WordEngine(die_after=2))).test_client()
    response, body = await post(api, path, stream=True)
    assert response.status_code == 200
    assert streamed_text(path, body) == "to be "
    if path == "/v1/responses":
        last = sse(body)[-1]
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        kept = await api.get(f"/v1/responses/{last['response']['id']}")
        assert kept.status_code == 404
    elif path == "/v1/messages":
        last = sse(body)[-1]
        assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    else:
        last = lines(body)[-1]
        assert set(last) == {"error"}
    assert "lost in the middle" in json.dumps(last)


@pytest.mark.parametrize("path", BODIES)
async def test_another_replica_goes_on_unseen(nursery, path):
    engines = {"b": WordEngine(tells_ids=True, die_after=2), "c": WordEngine(tells_ids=True)}
    _, body = await post(Link(nursery, **engines).api, path, stream=True)
    assert streamed_text(path, body) == TEXT


# ---------------------------------------------------------------------------------------------
# Thoughts and calls
# ---------------------------------------------------------------------------------------------


class Saying(WordEngine):
    """Says the last user message, a few characters at a time, whatever its grammar."""

    async def _tokens(self, request):
        text = next(each.content for each in reversed(request.prompt) if each.role == "user")
        for at in range(0, len(text), 3):
            yield Delta(text[at : at + 3])
        yield Finish("stop", Usage(2, 1, -(-len(text) // 3)), stop=self.stop)

    stop = None


CALLS = (
    '<think>Hm, two. </think>Well.\n<tool_call>\n{"name": "f", "arguments": {"a": "b}"}}\n'
    '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTIONS = [{"name": name, "description": "d", "parameters": PARAMETERS} for name in "fg"]
USER = {"role": "user", "content": CALLS}
TOOLS = {
    "/v1/responses": {
        "input": CALLS,
        "tools": [{"type": "function", **each} for each in FUNCTIONS],
    },
    "/v1/messages": {
        "messages": [USER],
        "tools": [{"name": each["name"], "input_schema": PARAMETERS} for each in FUNCTIONS],
    },
    "/api/chat": {
        "messages": [USER],
        "tools": [{"type": "function", "function": each} for each in FUNCTIONS],
    },
}
THINKS = ChatStyle("may", "may", "none")


async def stream(api, path: str) -> bytes:
    """As `post`, of more pieces than the test client would keep."""
    body = b""
    headers = {"content-type": "application/json"}
    with trio.fail_after(HANG_S):
        async with api.request(path, method="POST", headers=headers) as connection:
            asked = {**BODIES[path], **TOOLS[path], "stream": True}
            await connection.send(json.dumps(asked).encode())
            await connection.send_complete()
            with contextlib.suppress(trio.EndOfChannel):
                while True:
                    body += await connection.receive()
    return body


@pytest.fixture(params=["here", "far"])
def caller(request, nursery):
    engine = Saying(style=THINKS)
    if request.param == "here":
        return create_api_app(local_mesh(engine)).test_client()
    return Link(nursery, b=engine).api


async def test_thoughts_and_calls_of_a_response(caller):
    _, body = await post(caller, "/v1/responses", **TOOLS["/v1/responses"])
    whole = Response.model_validate_json(body)
    thoughts, said, first, second = whole.output
    assert (thoughts.type, thoughts.content[0].text) == ("reasoning", "Hm, two.")
    assert (said.type, said.content[0].text, said.status) == ("message", "Well.", "completed")
    assert (first.type, first.name, first.arguments) == ("function_call", "f", '{"a": "b}"}')
    assert (second.name, second.arguments, second.status) == ("g", "{}", "completed")
    assert whole.usage.output_tokens_details.reasoning_tokens == 8
    assert whole.tools[0].name == "f"
    body = await stream(caller, "/v1/responses")
    events = sse(body)
    for event in events:
        EVENTS["/v1/responses"].validate_python(event)
    streamed = Response.model_validate(events[-1]["response"])
    plain = [each.model_dump(exclude={"id", "call_id"}) for each in whole.output]
    assert [each.model_dump(exclude={"id", "call_id"}) for each in streamed.output] == plain
    for kind in ("reasoning_text", "output_text", "function_call_arguments"):
        deltas = [e["delta"] for e in events if e["type"] == f"response.{kind}.delta"]
        assert len(deltas) > 1, kind
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    # The next turn has the calls in it, and gives their results.
    results = [
        {"type": "function_call_output", "call_id": each["call_id"], "output": "42"}
        for each in done[2:]
    ]
    more = {"previous_response_id": streamed.id, "input": [*results, {**USER, "content": "and"}]}
    _, body = await post(caller, "/v1/responses", **more)
    assert Response.model_validate_json(body).output_text == "and"
    echoed = [{"role": "user", "content": "x"}, *done, *results, {**USER, "content": "and"}]
    response, body = await post(caller, "/v1/responses", input=echoed)
    assert response.status_code == 200, body


async def test_thoughts_and_calls_of_a_message(caller):
    _, body = await post(caller, "/v1/messages", **TOOLS["/v1/messages"])
    whole = Message.model_validate_json(body)
    thoughts, said, first, second = whole.content
    assert (thoughts.type, thoughts.thinking) == ("thinking", "Hm, two.")
    assert (said.type, said.text) == ("text", "Well.")
    assert (first.type, first.name, first.input) == ("tool_use", "f", {"a": "b}"})
    assert (second.name, second.input) == ("g", {})
    assert (whole.stop_reason, whole.stop_sequence) == ("tool_use", None)
    body = await stream(caller, "/v1/messages")
    blocks = []
    for event in sse(body):
        if event["type"] != "ping":
            EVENTS["/v1/messages"].validate_python(event)
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            for key in ("text", "thinking"):
                if key in event["delta"]:
                    blocks[-1][key] += event["delta"][key]
            blocks[-1]["json"] += event["delta"].get("partial_json", "")
    assert (blocks[0]["thinking"], blocks[1]["text"]) == ("Hm, two.", "Well.")
    assert [json.loads(block["json"]) for block in blocks[2:]] == [{"a": "b}"}, {}]
    content = [each.model_dump(exclude_none=True) for each in whole.content]
    results = [
        {"type": "tool_result", "tool_use_id": each["id"], "content": "42", "is_error": True}
        for each in content[2:]
    ]
    turns = [USER, {"role": "assistant", "content": content},
             {"role": "user", "content": [*results, {"type": "text", "text": "and"}]}]  # fmt: skip
    _, body = await post(caller, "/v1/messages", messages=turns)
    assert Message.model_validate_json(body).content[0].text == "and"


async def test_thoughts_and_calls_of_ollama(caller):
    _, body = await post(caller, "/api/chat", **TOOLS["/api/chat"])
    said = ChatResponse.model_validate_json(body)
    assert (said.message.thinking, said.message.content) == ("Hm, two.", "Well.")
    calls = [(each.function.name, each.function.arguments) for each in said.message.tool_calls]
    assert calls == [("f", {"a": "b}"}), ("g", {})]
    assert said.done_reason == "stop"
    body = await stream(caller, "/api/chat")
    parts = [ChatResponse.model_validate(line) for line in lines(body)]
    assert "".join(part.message.thinking or "" for part in parts) == "Hm, two."
    assert "".join(part.message.content or "" for part in parts) == "Well."
    told = [call for part in parts for call in part.message.tool_calls or ()]
    assert [(each.function.name, each.function.arguments) for each in told] == calls
    turns = [USER, said.message.model_dump(exclude_none=True),
             {"role": "tool", "tool_name": "g", "content": "1"},
             {"role": "tool", "content": "2"}, {"role": "user", "content": "and"}]  # fmt: skip
    _, body = await post(caller, "/api/chat", messages=turns)
    assert ChatResponse.model_validate_json(body).message.content == "and"
    _, body = await post(caller, "/api/generate", prompt="<think>a</think>b")
    generated = GenerateResponse.model_validate_json(body)
    assert (generated.thinking, generated.response) == ("a", "b")


async def test_the_stop_sequence_is_named(nursery):
    engine = Saying()
    engine.stop = "or"
    api = Link(nursery, b=engine).api
    _, body = await post(api, "/v1/messages", stop_sequences=["or"])
    whole = Message.model_validate_json(body)
    assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", "or")
    _, body = await post(api, "/v1/messages", stop_sequences=["or"], stream=True)
    assert sse(body)[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "or"}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/responses", {"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ("/v1/messages", {"output_config": {"effort": "low"}}, "output_config.effort"),
        ("/v1/messages", {"thinking": {"type": "enabled"}}, "thinking.type"),
        ("/api/chat", {"think": True}, "think"),
        ("/api/generate", {"think": "high"}, "think"),
    ],
)
async def test_what_this_model_cannot_is_refused_in_the_callers_words(api, path, fields, param):
    response, body = await post(api, path, **fields)
    assert response.status_code == 400
    assert f"`{param}`" in error_of(path, body)


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def error_of(path: str, body: bytes) -> str:
    """The message of an error, in the shape that the path's clients know."""
    said = json.loads(body)
    if path.startswith("/api/"):
        assert set(said) == {"error"}
        return said["error"]
    if path.startswith("/v1/messages"):
        assert said["type"] == "error"
        assert set(said["error"]) == {"type", "message"}
    else:
        assert set(said["error"]) >= {"message", "type", "param", "code"}
    return said["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
async def test_errors_have_the_shape_of_the_dialect(path):
    api = create_api_app(local_mesh(WordEngine())).test_client()
    response, body = await post(api, path, model="gpt-9")
    assert response.status_code == 404
    assert "`gpt-9`" in error_of(path, body)
    response, body = await post(api, path, nonsense=1)
    assert response.status_code == 400
    assert "`nonsense`" in error_of(path, body)
    response = await api.put(path)
    assert response.status_code == 405
    assert error_of(path, await response.get_data())
    response, body = await post(create_api_app(FakeMesh()).test_client(), path)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "8"
    assert error_of(path, body)


async def test_a_peers_refusal_has_the_shape_of_the_dialect(nursery):
    class Picky(WordEngine):
        def generate(self, request):
            raise EngineError("never said")

    response, body = await post(Link(nursery, b=Picky()).api, "/v1/messages")
    assert response.status_code == 503
    assert json.loads(body)["error"]["type"] == "overloaded_error"


async def count(api, **fields):
    path = "/v1/messages/count_tokens"
    with trio.fail_after(HANG_S):
        response = await api.post(path, json={"model": MODEL, "messages": [TURN], **fields})
        return response, json.loads(await response.get_data())


async def test_tokens_are_counted_where_the_model_is(api):
    response, body = await count(api)
    assert response.status_code == 200
    assert MessageTokensCount.model_validate(body, strict=True).input_tokens == 3
    _, body = await count(api, system="that is the question")
    assert body == {"input_tokens": 7}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 5}, "`max_tokens`"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "`tools[0].input_schema`"),
        ({"thinking": {"type": "enabled"}}, "`thinking.type`"),  # the model says so, not the edge
        ({"messages": [{"role": "user", "content": []}]}, "`messages`"),
    ],
)
async def test_what_is_not_counted_is_named(api, fields, named):
    response, body = await count(api, **fields)
    assert response.status_code == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]


async def test_servers_of_other_kinds_are_not_asked_to_count():
    mesh = FakeMesh(candidates=(Candidate("peer-a", True, "only", upstream=True),))
    response, body = await count(create_api_app(mesh).test_client())
    assert response.status_code == 400
    assert "`model`" in body["error"]["message"]
    # But an engine with the same bytes is, wherever it stands in the ranking.
    mesh.engines[DIGEST] = WordEngine()
    behind = Candidate("peer-b", False, "first", upstream=True)
    mesh.candidates = (behind, Candidate("peer-a", True, "second"))
    response, body = await count(create_api_app(mesh).test_client())
    assert body == {"input_tokens": 3}


async def test_a_count_that_is_none_is_an_error(nursery):
    class Liar(WordEngine):
        async def count(self, request):
            return "many"

    response, body = await count(Link(nursery, b=Liar()).api)
    assert response.status_code == 503
    assert "count" in body["error"]["message"]


async def test_streams_tell_ollamas_clients_their_speed(api):
    _, body = await post(api, "/api/chat", stream=True)
    last = ChatResponse.model_validate(lines(body)[-1])
    assert last.prompt_eval_duration > 0
    assert last.eval_duration > 0
    assert last.prompt_eval_duration + last.eval_duration == last.total_duration


@pytest.mark.parametrize(
    ("name", "tokens", "status"), [(MODEL, 512, 200), (MODEL, 513, 400), ("nobody", 513, 404)]
)
async def test_ollama_may_ask_for_as_much_room_as_there_is(api, name, tokens, status):
    response, body = await post(api, "/api/chat", model=name, options={"num_ctx": tokens})
    assert response.status_code == status
    assert (b"`options.num_ctx`: the model's context is 512." in body) == (status == 400)


@pytest.mark.parametrize(
    ("changes", "capabilities"),
    [
        ({}, ["completion", "tools"]),
        ({"sees": True}, ["completion", "tools", "vision"]),
        ({"style": ChatStyle("may")}, ["completion", "tools", "thinking"]),
        ({"purpose": "embed"}, ["embedding"]),
        ({"purpose": "rank", "sees": True}, []),
    ],
)
async def test_ollama_is_told_what_a_model_can_do(changes, capabilities):
    class Able(WordEngine):
        def stats(self):
            return replace(super().stats(), **changes)

    api = create_api_app(local_mesh(Able())).test_client()
    body = await (await api.post("/api/show", json={"model": MODEL})).get_data()
    assert ShowResponse.model_validate_json(body).capabilities == capabilities


async def test_a_stored_response_takes_no_options():
    api = create_api_app(local_mesh(WordEngine())).test_client()
    response = await api.get("/v1/responses/resp_1?stream=true")
    assert response.status_code == 400
    assert json.loads(await response.get_data())["error"]["param"] == "stream"


READS = [
    *(("GET", path) for path in ("/api/tags", "/api/version", "/v1/responses/resp_1")),
    *(("POST", path) for path in (*BODIES, "/api/show", "/v1/messages/count_tokens")),
    ("DELETE", "/v1/responses/resp_1"),
]


@pytest.mark.parametrize(("method", "path"), READS)
async def test_a_key_is_asked_for(tmp_path, method, path):
    token = generate_token()
    file = tmp_path / "api-keys.toml"
    file.write_text(with_key("", ApiKey("alice", hash_token(token)), file))
    file.chmod(0o600)
    api = create_api_app(local_mesh(WordEngine()), door=Door(file)).test_client()
    response = await api.open(path, method=method, json=BODIES.get(path, {"model": MODEL}))
    assert response.status_code == 401
    assert "key" in error_of(path, await response.get_data())
    for headers in ({"x-api-key": token}, {"authorization": f"Bearer {token}"}):
        response = await api.open(
            path, method=method, json=BODIES.get(path, {"model": MODEL}), headers=headers
        )
        assert response.status_code in (200, 400, 404)


async def test_a_key_does_not_see_anothers_responses(tmp_path):
    tokens = {name: generate_token() for name in ("alice", "bob")}
    file = tmp_path / "api-keys.toml"
    text = ""
    for name, token in tokens.items():
        text = with_key(text, ApiKey(name, hash_token(token)), file)
    file.write_text(text)
    file.chmod(0o600)
    api = create_api_app(local_mesh(WordEngine()), door=Door(file)).test_client()
    alice, bob = ({"x-api-key": token} for token in tokens.values())
    response = await api.post("/v1/responses", json=BODIES["/v1/responses"], headers=alice)
    id = json.loads(await response.get_data())["id"]
    assert (await api.get(f"/v1/responses/{id}", headers=bob)).status_code == 404
    assert (await api.delete(f"/v1/responses/{id}", headers=bob)).status_code == 404
    stolen = {**BODIES["/v1/responses"], "previous_response_id": id}
    assert (await api.post("/v1/responses", json=stolen, headers=bob)).status_code == 404
    assert (await api.get(f"/v1/responses/{id}", headers=alice)).status_code == 200


# ---------------------------------------------------------------------------------------------
# Streams, piece by piece
# ---------------------------------------------------------------------------------------------

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
REASON = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":1}}\n\n'
DONE = b"data: [DONE]\n\n"


def a_writer():
    asked = ollama.decode_chat(json.dumps(BODIES["/api/chat"]).encode(), lambda name: 0)
    return asked.writer("id", 0)


async def test_text_goes_on_before_the_next_comes():
    async def events():
        yield CHUNK
        await trio.sleep_forever()

    with trio.fail_after(HANG_S):
        async with aclosing(events()) as source, aclosing(told_as_stream(source, a_writer())) as it:
            assert lines(await anext(it))[0]["message"]["content"] == "a"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("where", ["here", "far"])
async def test_the_engine_stops_when_the_client_leaves(nursery, path, where):
    async def one_token_a_second():
        if engine.produced:
            await trio.sleep(1.0)

    engine = WordEngine(pace=one_token_a_second, tokens_default=10**6)
    mesh = local_mesh(engine) if where == "here" else Link(nursery, b=engine).mesh
    leave = trio.Event()
    with trio.fail_after(HANG_S):
        port = (await nursery.start(serve_until, leave, create_api_app(mesh)))[1]
        body = {**BODIES[path], "stream": True}
        for limit in ("max_output_tokens", "max_tokens"):
            if limit in body:
                body[limit] = 10**6
        async with (
            httpx.AsyncClient(timeout=HANG_S) as client,
            client.stream("POST", f"http://127.0.0.1:{port}{path}", json=body) as response,
        ):
            await anext(response.aiter_raw())
            assert engine.running == 1
        while engine.running:
            await trio.sleep(0.01)
    assert engine.produced < 100
    leave.set()


async def serve_until(leave, app, task_status):
    await serve_api(app, ("127.0.0.1", 0), shutdown=leave.wait, task_status=task_status)


def test_an_answer_is_read():
    read = list(EventReader().feed(CHUNK + CHUNK + REASON + USAGE + DONE))
    assert read == [Content("a"), Content("a"), End("stop", Usage(2, 0, 1))]


HOSTILE = [
    b"data: nothing\n\n",
    b"data: []\n\n",
    b'data: {"choices":[{"delta":{"content":5}}]}\n\n',
    b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"a"}}]}}]}\n\n',
    b'data: {"choices":[{"delta":{"tool_calls":[{"index":3,"function":{"name":"a"}}]}}]}\n\n',
    b'data: {"choices":[{"delta":{},"finish_reason":"bored"}]}\n\n',
    b'data: {"usage":{"prompt_tokens":"x","completion_tokens":1}}\n\n',
    b"data: " + b"[" * 100_000 + b"\n\n",
    b"data: \xff\n\n",
    DONE,
    REASON + DONE,
    USAGE + DONE,
    b"",
]


@pytest.mark.parametrize("events", HOSTILE)
async def test_what_a_peer_says_wrongly_ends_in_an_error(events):
    async def source():
        yield CHUNK
        yield events

    async with aclosing(told_as_stream(source(), a_writer())) as told:
        first, *_, last = lines(b"".join([part async for part in told]))
    assert first["message"]["content"] == "a"
    assert set(last) == {"error"}


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b"\xff", b'{"choices":[]}', b'{"choices":[{"message":{}}]}']
)
def test_a_whole_answer_that_is_none(body):
    with pytest.raises(EngineError):
        told_whole(body, a_writer())


# ---------------------------------------------------------------------------------------------
# Hostile bodies
# ---------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("model", "input", "messages", "prompt", "system", "stream", "options", "max_tokens"),
        *("instructions", "previous_response_id", "store", "metadata", "tools", "stop_sequences"),
        *("text", "temperature", "format", "keep_alive", "name", "verbose", "max_output_tokens"),
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([*BODIES, "/api/show"]),
    changes=st.dictionaries(FIELDS, JSON, max_size=3),
    raw=st.none() | st.binary(max_size=40),
)
async def test_no_body_makes_a_5xx(path, changes, raw):
    api = create_api_app(local_mesh(WordEngine())).test_client()
    valid = BODIES.get(path, {"model": MODEL})
    body = json.dumps({**valid, **changes}).encode() if raw is None else raw
    with trio.fail_after(HANG_S):
        response = await api.post(path, data=body)
        said = await response.get_data()
    assert response.status_code < 500, said
    if response.status_code >= 400:
        assert error_of(path, said)
