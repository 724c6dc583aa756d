"""Two gateways linked by streams: A takes the request, B (or C) has the engine."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing

from meshnode.gateway import Candidate
from meshnode.gateway import answer as answer_module
from meshnode.gateway.app import create_api_app
from tests.fakes import MODEL, WordEngine, local_mesh, tunnel_to
from tests.gateway.link import CHAT, HANG_S, Link, text_of


@pytest.mark.parametrize("stream", [False, True])
async def test_a_peer_answers_for_us(nursery, stream):
    link = Link(nursery, b=WordEngine())
    response, body = await link.ask(stream=stream)
    assert response.status_code == 200
    assert response.headers["x-meshnode-served-by"] == "peer-b"
    assert response.headers["x-meshnode-route"] == "tunnel"
    if stream:
        assert text_of(body) == "to be or to be "
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(body)["choices"][0]["message"]["content"] == "to be or to be "
    (request,) = link.engines["b"].requests
    assert [request.session] == link.mesh.sessions
    assert request.id == response.headers["x-request-id"]
    assert link.mesh.calls == [("routed", "peer-b"), ("finished", "peer-b")]


async def test_the_stream_to_a_peer_is_reused(nursery):
    link = Link(nursery, b=WordEngine())
    for stream in (True, False, True):
        await link.ask(stream=stream)
    assert len(link.streams) == 1


async def test_a_4xx_of_the_replica_passes_untouched(nursery):
    async def picky(scope, receive, send):
        body = b'{"error":{"code":"context_length_exceeded"}}'
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    link = Link(nursery, b=WordEngine(), c=WordEngine())
    link.mesh.tunnels["peer-b"] = tunnel_to(picky, nursery)
    response, body = await link.ask()
    assert response.status_code == 400
    assert body == b'{"error":{"code":"context_length_exceeded"}}'
    assert response.headers["x-meshnode-served-by"] == "peer-b"
    assert ("failed", "peer-b") not in link.mesh.calls


async def cut_before_body(scope, receive, send):
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": True})


async def not_http(scope, receive, send):
    await send({"type": "http.response.start", "status": 599, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "failure", ["unreachable", "busy", "not_loaded", "engine", "cut", "nonsense", "garbage"]
)
async def test_before_the_first_byte_the_next_candidate_takes_over(nursery, failure, stream):
    broken = WordEngine()
    link = Link(nursery, b=broken, c=WordEngine())
    match failure:
        case "unreachable":
            del link.mesh.tunnels["peer-b"]
        case "busy":
            broken.busy = True
        case "not_loaded":
            link.meshes["b"].engines.clear()
        case "engine":
            broken.die_after = 0
        case "cut":
            link.mesh.tunnels["peer-b"] = tunnel_to(cut_before_body, nursery)
        case "nonsense":
            link.mesh.tunnels["peer-b"] = tunnel_to(not_http, nursery)
        case "garbage":
            link.mesh.tunnels["peer-b"] = garbage
    response, body = await link.ask(stream=stream)
    assert response.status_code == 200
    assert response.headers["x-meshnode-served-by"] == "peer-c"
    assert body.count(b"to be or to be ") == 1 or text_of(body) == "to be or to be "
    assert ("failed", "peer-b") in link.mesh.calls
    assert link.mesh.calls.count(("routed", "peer-b")) == link.mesh.calls.count(
        ("finished", "peer-b")
    )
    assert link.mesh.calls[-2:] == [("routed", "peer-c"), ("finished", "peer-c")]


async def garbage():
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(b"\x00\x01\x02 what?\r\n\r\n")
    return near


async def test_a_whole_answer_survives_a_loss_midway(nursery):
    link = Link(nursery, b=WordEngine(die_after=3), c=WordEngine())
    response, body = await link.ask()
    assert response.headers["x-meshnode-served-by"] == "peer-c"
    assert json.loads(body)["choices"][0]["message"]["content"] == "to be or to be "


async def test_a_silent_peer_is_given_up_after_the_accept_timeout(autojump_clock):
    async def silent():
        near, far = trio.testing.memory_stream_pair()
        held.append(far)
        return near

    held = []
    async with trio.open_nursery() as nursery:
        link = Link(nursery, b=WordEngine(), c=WordEngine())
        link.mesh.tunnels["peer-b"] = silent
        response, _ = await link.ask()
        assert response.headers["x-meshnode-served-by"] == "peer-c"
        # A moment more: the body, too, takes its time to arrive.
        assert trio.current_time() == pytest.approx(answer_module.ACCEPT_TIMEOUT_S, abs=0.01)
        nursery.cancel_scope.cancel()


async def test_all_tunnels_failing_is_503(nursery):
    link = Link(nursery, b=WordEngine(busy=True), c=WordEngine(busy=True))
    response, body = await link.ask(stream=True)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    error = json.loads(body)["error"]
    assert (error["code"], error["state"]) == ("replicas_failed", "busy")
    assert link.mesh.calls[-1] == ("refused", MODEL)


@pytest.mark.parametrize(
    ("busy", "counted"), [(("b", "c"), True), (("b",), True), ((), False)]
)  # fmt: skip
@pytest.mark.parametrize("other", ["not_loaded", "gone", "broken"])
async def test_demand_is_refused_when_whoever_lives_is_full(nursery, busy, counted, other):
    link = Link(nursery, b=WordEngine(), c=WordEngine())
    for name, engine in link.engines.items():
        if name in busy:
            engine.busy = True
        elif other == "not_loaded":
            link.meshes[name].engines.clear()
        elif other == "gone":
            del link.mesh.tunnels[f"peer-{name}"]
        else:
            engine.die_after = 0
    response, _ = await link.ask()
    assert response.status_code == 503
    assert link.mesh.calls.count(("refused", MODEL)) == counted


async def test_who_finds_room_was_not_refused(nursery):
    link = Link(nursery, b=WordEngine(busy=True), c=WordEngine())
    response, _ = await link.ask()
    assert response.status_code == 200
    assert ("refused", MODEL) not in link.mesh.calls


async def test_a_local_engine_that_was_unloaded_leads_to_the_next_candidate(nursery):
    link = Link(nursery, b=WordEngine())
    link.mesh.candidates = (Candidate("peer-a", True, "ranked"), *link.mesh.candidates)
    response, body = await link.ask()
    assert response.headers["x-meshnode-served-by"] == "peer-b"
    assert json.loads(body)["choices"][0]["message"]["content"] == "to be or to be "


async def test_a_refusal_without_sense_or_end_is_one_lost_candidate(nursery):
    async def babbles(scope, receive, send):
        headers = [(b"x-meshnode-retry", b"elsewhere")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        while True:
            await send({"type": "http.response.body", "body": b"[" * 4096, "more_body": True})

    async def mumbles(scope, receive, send):
        headers = [(b"x-meshnode-retry", b"elsewhere")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b"\xff{" + b"[" * 5000})

    link = Link(nursery, b=WordEngine(), c=WordEngine(), d=WordEngine())
    link.mesh.tunnels["peer-b"] = tunnel_to(babbles, nursery)
    link.mesh.tunnels["peer-c"] = tunnel_to(mumbles, nursery)
    response, _ = await link.ask()
    assert response.headers["x-meshnode-served-by"] == "peer-d"


@pytest.mark.parametrize("how", ["engine", "stream"])
async def test_a_cut_midway_ends_in_an_error_event(nursery, how):
    engine = WordEngine(tokens_default=50)
    link = Link(nursery, b=engine, c=WordEngine())
    if how == "engine":
        engine.die_after = 3
    else:

        async def cut():
            await trio.testing.wait_all_tasks_blocked()
            if engine.produced == 3:
                await trio.aclose_forcefully(link.streams[0])

        engine.pace = cut
    response, body = await link.ask(stream=True)
    assert response.status_code == 200
    *_, last, empty = body.decode().split("\n\n")
    assert empty == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert b"[DONE]" not in body
    assert text_of(body) == "to be or "
    assert link.mesh.calls == [("routed", "peer-b"), ("failed", "peer-b"), ("finished", "peer-b")]


async def test_a_local_engine_that_dies_midway_ends_in_an_error_event():
    mesh = local_mesh(WordEngine(die_after=2))
    response = (
        await create_api_app(mesh)
        .test_client()
        .post("/v1/chat/completions", json={**CHAT, "stream": True})
    )
    body = await response.get_data()
    assert b'"replica_lost"' in body
    assert b"[DONE]" not in body
    assert text_of(body) == "to be "


async def test_half_an_event_never_reaches_the_client(nursery):
    async def torn(scope, receive, send):
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in (b'data: {"a":1}\n\ndata: {"b"', b":2}\n\ndata: {", b'"c":'):
            await send({"type": "http.response.body", "body": piece, "more_body": True})

    link = Link(nursery, b=WordEngine())
    link.mesh.tunnels["peer-b"] = tunnel_to(torn, nursery)
    _, body = await link.ask(stream=True)
    first, second, error, _ = body.split(b"\n\n")
    assert (first, second) == (b'data: {"a":1}', b'data: {"b":2}')
    assert error.startswith(b'data: {"error":')


@pytest.mark.parametrize("tokens_before", [0, 3])
async def test_a_client_that_leaves_stops_the_far_engine_within_one_token(nursery, tokens_before):
    """The far engine waits for the test before each token; after the client left it gets none."""
    permits = trio.Semaphore(tokens_before)
    engine = WordEngine(pace=permits.acquire, tokens_default=1000)
    link = Link(nursery, b=engine)
    leave = trio.Event()

    async def receive():
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        await trio.lowlevel.checkpoint()

    bodies = [json.dumps({**CHAT, "stream": True}).encode()]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [],
    }
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as client:
            client.start_soon(create_api_app(link.mesh), scope, receive, send)
            await trio.testing.wait_all_tasks_blocked()
            assert engine.running == 1
            assert engine.produced == tokens_before
            leave.set()
        # A memory stream's end looks like a half-close: the next write shows that we are gone.
        permits.release()
        await trio.testing.wait_all_tasks_blocked()
        assert engine.running == 0
        assert engine.produced <= tokens_before + 1
    assert link.mesh.calls == [("routed", "peer-b"), ("finished", "peer-b")]
