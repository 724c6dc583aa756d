"""The apps' routes and the table of errors, without sockets."""

from __future__ import annotations

import json

import httpx
import pytest
import trio

from meshnode.gateway import Candidate
from meshnode.gateway.app import GatewayLimits, create_api_app
from meshnode.gateway.tunnel import TunnelApp
from tests.fakes import DIGEST, MODEL, FakeMesh, WordEngine, local_mesh

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "to be or"}]}
TEXT = {"model": MODEL, "prompt": "to be or", "max_tokens": 4}
TUNNEL = {"x-meshnode-hops": "1", "x-meshnode-session": "00" * 16, "x-meshnode-digest": DIGEST}


def peer_of(app):
    """A peer that asks the tunnel app, without a stream in between."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node")


@pytest.fixture
def engine():
    return WordEngine()


@pytest.fixture
def api(engine):
    return create_api_app(local_mesh(engine)).test_client()


async def test_chat_answers_whole(api):
    response = await api.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    answer = json.loads(await response.get_data())
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL
    assert answer["choices"] == [
        {
            "index": 0,
            "logprobs": None,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": "to be or to be ", "refusal": None},
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert response.headers["x-meshnode-served-by"] == "peer-a"
    assert response.headers["x-meshnode-route"] == "local"
    assert answer["id"] == f"chatcmpl-{response.headers['x-request-id']}"


def events(body: bytes) -> list[str]:
    assert body.endswith(b"\n\n")
    lines = body.decode().split("\n\n")[:-1]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("include_usage", [False, True])
async def test_chat_streams(api, include_usage):
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    response = await api.post("/v1/chat/completions", json={**CHAT, "stream": True, **options})
    assert response.headers["content-type"] == "text/event-stream"
    *chunks, done = events(await response.get_data())
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    usage = chunks.pop() if include_usage else None
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == "to be or to be "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 6 + ["length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    if include_usage:
        assert usage["choices"] == []
        assert usage["usage"]["total_tokens"] == 8
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)


async def test_text_whole_and_streamed(api):
    response = await api.post("/v1/completions", json=TEXT)
    answer = json.loads(await response.get_data())
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == "to be or to "
    response = await api.post("/v1/completions", json={**TEXT, "stream": True})
    *chunks, done = events(await response.get_data())
    assert done == "[DONE]"
    assert "".join(json.loads(c)["choices"][0]["text"] for c in chunks) == "to be or to "


async def test_models(api):
    response = await api.get("/v1/models")
    listed = json.loads(await response.get_data())
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model["id"] == MODEL
    assert model["meshnode"] == {
        "digest": DIGEST,
        "state": "ready",
        "served_by": ["peer-a"],
        "context_tokens": 512,
    }
    response = await api.get(f"/v1/models/{MODEL}")
    assert json.loads(await response.get_data()) == model


async def test_health_and_readiness():
    mesh = local_mesh(WordEngine())
    api = create_api_app(mesh).test_client()
    assert (await api.get("/healthz")).status_code == 200
    assert (await api.get("/readyz")).status_code == 200
    mesh.state = "loading"
    assert (await api.get("/healthz")).status_code == 200
    response = await api.get("/readyz")
    assert response.status_code == 503
    assert json.loads(await response.get_data())["error"]["state"] == "loading"


def chat(**changes):
    return json.dumps({**CHAT, **changes}).encode()


API_ERRORS = [
    # method, path, body, status, code, param
    ("GET", "/nothing", b"", 404, "unknown_url", None),
    ("GET", "/v1/chat/completions", b"", 405, "method_not_allowed", None),
    ("DELETE", "/v1/models", b"", 405, "method_not_allowed", None),
    ("POST", "/v1/chat/completions", b"", 400, "invalid_json", None),
    ("POST", "/v1/chat/completions", b"{", 400, "invalid_json", None),
    ("POST", "/v1/chat/completions", b"[]", 400, "invalid_value", None),
    ("POST", "/v1/chat/completions", b"x" * 2001, 413, "body_too_large", None),
    ("POST", "/v1/chat/completions", chat(model="gpt-9"), 404, "model_not_found", "model"),
    ("GET", "/v1/models/gpt-9", b"", 404, "model_not_found", "model"),
    ("POST", "/v1/chat/completions", chat(nonsense=1), 400, "unknown_parameter", "nonsense"),
    ("POST", "/v1/chat/completions", chat(store=True), 400, "unsupported_parameter", "store"),
    ("POST", "/v1/completions", chat(), 400, "missing_required_parameter", None),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code", "param"), API_ERRORS)
async def test_errors_have_openais_shape(engine, method, path, body, status, code, param):
    app = create_api_app(local_mesh(engine), GatewayLimits(body_bytes_max=2000))
    response = await app.test_client().open(path, method=method, data=body)
    assert response.status_code == status
    error = json.loads(await response.get_data())["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code or code == "missing_required_parameter"
    if param:
        assert error["param"] == param
    assert response.headers["x-request-id"]
    assert response.headers["x-meshnode-served-by"] == "peer-a"
    assert engine.requests == []


async def test_unknown_model_names_what_exists(api):
    response = await api.post("/v1/chat/completions", data=chat(model="gpt-9"))
    error = json.loads(await response.get_data())["error"]
    assert MODEL in error["message"]
    assert error["models"] == [MODEL]


async def test_no_replica_is_503_with_its_state():
    app = create_api_app(FakeMesh())
    response = await app.test_client().post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "8"
    error = json.loads(await response.get_data())["error"]
    assert (error["code"], error["state"]) == ("no_replica", "loading")


async def test_all_failed_is_503_with_every_attempt():
    mesh = local_mesh(WordEngine(busy=True))
    mesh.candidates += (Candidate("peer-x", False, "far"),)
    response = await create_api_app(mesh).test_client().post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    error = json.loads(await response.get_data())["error"]
    assert error["code"] == "replicas_failed"
    assert error["attempts"] == [
        {"peer": "peer-a", "reason": "busy"},
        {"peer": "peer-x", "reason": "unreachable"},
    ]
    # Every attempt is counted before it is made, and uncounted when it has failed.
    assert mesh.calls == [
        *(
            (said, peer)
            for peer in ("peer-a", "peer-x")
            for said in ("routed", "finished", "failed")
        ),
        ("refused", MODEL),
    ]


async def test_a_bug_is_500_and_says_nothing(caplog):
    mesh = local_mesh(WordEngine())

    def broken():
        raise ZeroDivisionError("secret detail")

    mesh.models = broken
    response = await create_api_app(mesh).test_client().get("/v1/models")
    assert response.status_code == 500
    assert b"secret" not in await response.get_data()
    assert "ZeroDivisionError" in caplog.text


async def test_mesh_is_told_what_happened(engine):
    mesh = local_mesh(engine)
    api = create_api_app(mesh).test_client()
    for stream in (False, True):
        await (await api.post("/v1/chat/completions", json={**CHAT, "stream": stream})).get_data()
    assert mesh.calls == [("routed", "peer-a"), ("finished", "peer-a")] * 2
    assert engine.running == 0


async def test_session_is_the_same_for_later_turns(engine):
    mesh = local_mesh(engine)
    api = create_api_app(mesh).test_client()
    later = [
        *CHAT["messages"],
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    await api.post("/v1/chat/completions", json=CHAT)
    await api.post("/v1/chat/completions", json={**CHAT, "messages": later})
    await api.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer k"})
    await api.post("/v1/chat/completions", json=CHAT, headers={"x-session-id": "s"})
    await api.post("/v1/chat/completions", json={**CHAT, "prompt_cache_key": "s"})
    first, second, unasked_key, *others = mesh.sessions
    # Where nobody is asked for a key, what clients send as one says nothing about who they are.
    assert first == second == unasked_key
    assert len({first, *others}) == 3
    assert [request.session for request in engine.requests] == mesh.sessions


async def test_mounted_routes_are_on_the_api_only(engine):
    def mount(app):
        @app.get("/api/status")
        async def status():
            return b"{}"

    mesh = local_mesh(engine)
    assert (
        await create_api_app(mesh, mount=mount).test_client().get("/api/status")
    ).status_code == 200
    tunnel = peer_of(TunnelApp(mesh))
    for path in ("/api/status", "/v1/models", "/healthz", "/readyz", "/"):
        assert (await tunnel.get(path, headers=TUNNEL)).status_code == 404


TUNNEL_ERRORS = [
    ({"x-meshnode-hops": None}, 400),
    ({"x-meshnode-hops": "2"}, 508),
    ({"x-meshnode-hops": "1, 1"}, 508),
    ({"x-meshnode-session": "zz" * 16}, 400),
    ({"x-meshnode-session": None}, 400),
    ({"x-meshnode-digest": "cd" * 32}, 503),
    ({"x-meshnode-digest": None}, 503),
]


@pytest.mark.parametrize(("change", "status"), TUNNEL_ERRORS)
async def test_tunnel_refuses(engine, change, status):
    headers = {key: value for key, value in {**TUNNEL, **change}.items() if value is not None}
    tunnel = peer_of(TunnelApp(local_mesh(engine)))
    response = await tunnel.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == status
    assert json.loads(response.content)["error"]["message"]
    assert response.headers.get("x-meshnode-retry") == ("elsewhere" if status == 503 else None)
    assert engine.requests == []


async def test_tunnel_answers_with_the_request_id_it_was_given(engine):
    tunnel = peer_of(TunnelApp(local_mesh(engine)))
    headers = {**TUNNEL, "x-request-id": "0123456789abcdef01234567"}
    response = await tunnel.post("/v1/completions", json=TEXT, headers=headers)
    assert json.loads(response.content)["id"] == "cmpl-0123456789abcdef01234567"
    assert engine.requests[0].session == bytes(16)


async def test_busy_tunnel_sends_elsewhere():
    tunnel = peer_of(TunnelApp(local_mesh(WordEngine(busy=True))))
    response = await tunnel.post("/v1/completions", json=TEXT, headers=TUNNEL)
    assert response.status_code == 503
    assert response.headers["x-meshnode-retry"] == "elsewhere"
    assert response.headers["retry-after"] == "3"


async def test_a_client_that_leaves_stops_the_engine(engine):
    """Before the first token, when nothing has been written that could fail."""
    started = trio.Event()

    async def never():
        started.set()
        await trio.sleep_forever()

    async def receive():
        if body := bodies.pop(0) if bodies else b"":
            return {"type": "http.request", "body": body, "more_body": False}
        await started.wait()
        assert engine.running == 1
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError("there is nothing to say yet")

    engine.pace = never
    bodies = [chat(stream=True)]
    mesh = local_mesh(engine)
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [],
    }
    with trio.fail_after(10):
        await create_api_app(mesh)(scope, receive, send)
    assert engine.running == 0
    assert mesh.calls == [("routed", "peer-a"), ("finished", "peer-a")]
