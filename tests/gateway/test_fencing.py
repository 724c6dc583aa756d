"""A route that follows an old decision: fenced, learned from, routed again, and never for ever."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx
import pytest

from meshnode.fence import Fence
from meshnode.gateway import answer as answer_module
from meshnode.gateway.tunnel import TunnelApp
from meshnode.messages import MESSAGE_BYTES_MAX
from tests.fakes import DIGEST, GROUP, MODEL, FakeMesh, WordEngine, a_decision, tunnel_to
from tests.gateway.link import CHAT, Link, text_of

OLD = Fence(GROUP, 3, "0.whole")
FENCED = [("routed", "peer-b"), ("learn", "peer-b"), ("finished", "peer-b"), ("again", MODEL)]
ANSWERED = [("routed", "peer-b"), ("finished", "peer-b")]


class FencedLink(Link):
    """All routes of A follow epoch 3; B knows epoch 7."""

    def __init__(self, nursery, **engines):
        super().__init__(nursery, **engines)
        self.mesh.candidates = tuple(replace(each, fence=OLD) for each in self.mesh.candidates)
        self.meshes["b"].decided = a_decision(7)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fenced_gateway_learns_and_asks_again_unseen(nursery, stream):
    link = FencedLink(nursery, b=WordEngine(), c=WordEngine())
    response, body = await link.ask(stream=stream)
    assert response.status_code == 200
    assert "to be or to be " in (text_of(body) if stream else body.decode())
    assert response.headers["x-meshnode-served-by"] == "peer-b"
    assert link.mesh.calls == [*FENCED, *ANSWERED]
    assert link.meshes["b"].fences == [OLD, Fence(GROUP, 7, "0.whole")]
    assert len(link.engines["b"].requests) == 1  # the first was not computed
    assert len(link.mesh.sessions) == 1  # and the demand not counted twice
    assert len(link.streams) == 1  # the refusal was read to its end


async def test_what_was_learned_is_sent_with_the_next_request(nursery):
    link = FencedLink(nursery, b=WordEngine())
    await link.ask()
    await link.ask()
    assert link.mesh.calls == [*FENCED, *ANSWERED, *ANSWERED]


@pytest.mark.parametrize("fence", [None, Fence(GROUP, 7, "0.whole"), Fence(GROUP, 8, "0.whole")])
async def test_who_is_as_far_or_ahead_or_in_no_group_is_served(nursery, fence):
    link = FencedLink(nursery, b=WordEngine())
    link.mesh.candidates = tuple(replace(each, fence=fence) for each in link.mesh.candidates)
    response, _ = await link.ask()
    assert response.status_code == 200
    assert link.mesh.calls == ANSWERED
    assert link.meshes["b"].fences == [fence]


async def test_the_new_route_is_followed(nursery):
    """The newer decision has given the model to C."""
    link = FencedLink(nursery, b=WordEngine(), c=WordEngine())
    learn = link.mesh.learn

    def moved(peer_id, decided):
        learn(peer_id, decided)
        link.mesh.candidates = link.mesh.candidates[::-1]

    link.mesh.learn = moved
    response, _ = await link.ask()
    assert response.headers["x-meshnode-served-by"] == "peer-c"
    assert link.engines["b"].requests == []
    assert ("failed", "peer-b") not in link.mesh.calls


async def test_who_fences_for_ever_is_passed_over(nursery):
    """Each proof is of a newer epoch, and still the peer is not content."""
    epochs = iter(range(7, 10_000))

    def insatiable(fence, digest):
        return a_decision(next(epochs)).proof

    link = FencedLink(nursery, b=WordEngine(), c=WordEngine())
    link.meshes["b"].check = insatiable
    response, _ = await link.ask(stream=True)
    assert response.headers["x-meshnode-served-by"] == "peer-c"
    assert link.mesh.calls.count(("again", MODEL)) == answer_module.REROUTES_MAX
    assert link.mesh.calls.count(("failed", "peer-b")) == 1
    assert link.engines["b"].requests == []


async def test_if_everybody_fences_for_ever_the_client_is_told(nursery):
    link = FencedLink(nursery, b=WordEngine(), c=WordEngine())
    for mesh in link.meshes.values():
        mesh.check = lambda fence, digest: a_decision(7).proof
    response, body = await link.ask()
    assert response.status_code == 503
    assert json.loads(body)["error"]["attempts"] == [
        {"peer": "peer-b", "reason": "fenced"},
        {"peer": "peer-c", "reason": "fenced"},
    ]
    assert ("refused", MODEL) not in link.mesh.calls


async def test_a_peer_that_failed_is_not_tried_again_after_a_new_route(nursery):
    link = FencedLink(nursery, b=WordEngine(), c=WordEngine())
    link.mesh.candidates = link.mesh.candidates[::-1]  # C first
    del link.mesh.tunnels["peer-c"]
    response, _ = await link.ask()
    assert response.headers["x-meshnode-served-by"] == "peer-b"
    assert link.mesh.calls.count(("routed", "peer-c")) == 1


def fences_with(body: bytes):
    async def app(scope, receive, send):
        headers = [(b"content-type", answer_module.DECIDED_TYPE.encode())]
        await send({"type": "http.response.start", "status": 409, "headers": headers})
        for start in range(0, len(body), 65536):
            piece = body[start : start + 65536]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b'{"error":{}}', b"\x91" * 9000, bytes(MESSAGE_BYTES_MAX + 1)],
    ids=["empty", "not msgpack", "json", "deep", "too large"],
)
async def test_a_hostile_proof_is_one_lost_candidate(nursery, body):
    link = FencedLink(nursery, b=WordEngine(), c=WordEngine())
    link.mesh.tunnels["peer-b"] = tunnel_to(fences_with(body), nursery)
    response, _ = await link.ask(stream=True)
    assert response.status_code == 200
    assert response.headers["x-meshnode-served-by"] == "peer-c"
    assert link.mesh.calls.count(("failed", "peer-b")) == 1
    assert ("again", MODEL) not in link.mesh.calls


async def test_another_409_is_the_replicas_answer(nursery):
    async def conflicted(scope, receive, send):
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 409, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error":{}}'})

    link = FencedLink(nursery, b=WordEngine(), c=WordEngine())
    link.mesh.tunnels["peer-b"] = tunnel_to(conflicted, nursery)
    response, body = await link.ask()
    assert (response.status_code, body) == (409, b'{"error":{}}')


async def test_our_own_engine_is_fenced_as_a_peers_is(nursery):
    """A newer decision was learned between routing and serving."""
    link = FencedLink(nursery, b=WordEngine())
    engine = WordEngine()
    link.mesh.engines[DIGEST] = engine
    link.mesh.candidates = (replace(link.mesh.candidates[0], peer_id="peer-a", local=True),)
    overtaken = iter([a_decision(7).proof])
    link.mesh.check = lambda fence, digest: next(overtaken, None)
    response, _ = await link.ask()
    assert response.status_code == 200
    assert link.mesh.calls == [
        ("routed", "peer-a"), ("finished", "peer-a"), ("again", MODEL),
        ("routed", "peer-a"), ("finished", "peer-a"),
    ]  # fmt: skip
    assert len(engine.requests) == 1


# --- what the serving side says ------------------------------------------------------------------


async def ask_tunnel(mesh: FakeMesh, epoch: str | None):
    headers = {
        "x-meshnode-hops": "1",
        "x-meshnode-session": "00" * 16,
        "x-meshnode-digest": DIGEST,
    }
    if epoch is not None:
        headers["x-meshnode-epoch"] = epoch
    transport = httpx.ASGITransport(TunnelApp(mesh))
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        return await client.post("/v1/chat/completions", json=CHAT, headers=headers)


async def test_a_lower_epoch_gets_the_proof_and_nothing_is_computed():
    engine = WordEngine()
    mesh = FakeMesh(engines={DIGEST: engine}, decided=a_decision(7))
    response = await ask_tunnel(mesh, f"{GROUP}/3/0.whole")
    assert response.status_code == 409
    assert response.headers["content-type"] == "application/vnd.meshnode.decided"
    assert response.headers["x-meshnode-epoch"] == f"{GROUP}/7/0.whole"
    assert response.content == a_decision(7).proof
    assert engine.requests == []


@pytest.mark.parametrize("epoch", ["", "7", f"{GROUP}/7", f"{GROUP}/-7/0.whole", "x" * 5000])
async def test_nonsense_for_an_epoch_is_refused(epoch):
    engine = WordEngine()
    response = await ask_tunnel(FakeMesh(engines={DIGEST: engine}), epoch)
    assert response.status_code == 400
    assert json.loads(response.content)["error"]["param"] == "x-meshnode-epoch"
    assert engine.requests == []
