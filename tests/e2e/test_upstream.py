"""A server of another kind behind a node: another mesh's node, which is an OpenAI server with a
real model; asked through a third node, over QUIC."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest

from tests.e2e.agreed import order
from tests.e2e.mesh import MODEL_NAME, QUESTION, Json, Mesh, NodeProcess, chat, serves

CHAT = "/v1/chat/completions"
BACK_WITHIN_S = 60.0
"""Its model loads again, and then the front looks again: 30 s after the last try at most."""


@dataclass(frozen=True)
class Chain:
    """`gateway` asks `front` over QUIC, `front` asks `server` over HTTP."""

    server: NodeProcess
    front: NodeProcess
    gateway: NodeProcess


@pytest.fixture(scope="module")
def chain(module_mesh: Mesh) -> Chain:
    server = module_mesh.node("server").wait_ready()
    network = ("--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--api", "127.0.0.1:0", "--no-mdns")
    front = module_mesh.run(
        "front", ("-m", "meshnode", "serve", "--upstream", f"{server.url}/v1", *network)
    ).wait_ready()
    gateway = module_mesh.gateway("gateway", "--join", front.invite()).wait_started()
    gateway.wait_until(lambda status: serves(status, MODEL_NAME) == {front.peer_id})
    return Chain(server, front, gateway)


def raw(node: NodeProcess, body: Json) -> tuple[int, dict[str, str], bytes]:
    with node.answering("POST", CHAT, body) as response:
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read()


def timeless(said: bytes) -> bytes:
    """Without what differs from one answer to the next: id, date, and how much was cached."""
    named = re.sub(rb'"(id|created|cached_tokens)":("[^"]*"|\d+)', rb'"\1":0', said)
    assert named != said
    return named


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_is_the_servers_to_the_byte(chain: Chain, stream: bool) -> None:
    asked = chat(QUESTION, stream=stream, max_tokens=24)
    direct = raw(chain.server, asked)
    for node, route in ((chain.front, "local"), (chain.gateway, "tunnel")):
        status, headers, said = raw(node, asked)
        assert status == direct[0] == 200
        assert timeless(said) == timeless(direct[2])
        assert headers["content-type"] == direct[1]["content-type"]
        assert headers["x-meshnode-upstream"] == "1"
        assert headers["x-meshnode-route"] == route
        assert headers["x-meshnode-served-by"] == chain.front.peer_id


def test_what_a_field_means_is_the_servers_to_say(chain: Chain) -> None:
    asked = chat(QUESTION) | {"no_such_field": 1}
    status, headers, said = raw(chain.gateway, asked)
    assert (status, refused_field(said)) == (400, "no_such_field")
    assert headers["x-meshnode-upstream"] == "1"  # it went all the way


def refused_field(said: bytes) -> str:
    return str(json.loads(said)["error"]["param"])


def test_other_apis_are_translated(chain: Chain) -> None:
    asked = {"model": MODEL_NAME, "max_tokens": 12, "temperature": 0,
             "messages": [{"role": "user", "content": QUESTION}]}  # fmt: skip
    told = chain.gateway.request("POST", "/v1/messages", asked)
    assert told.status == 200, told
    assert told.body["content"][0]["text"] == chain.server.ask().text


def test_vectors_are_the_servers_too(chain: Chain) -> None:
    asked = {"model": MODEL_NAME, "input": [QUESTION, "Paris."]}
    direct, far = (
        node.request("POST", "/v1/embeddings", asked) for node in (chain.server, chain.gateway)
    )
    assert direct.status == far.status == 200
    assert far.body == direct.body
    assert far.headers["x-meshnode-upstream"] == "1"


def test_the_mesh_neither_counts_nor_moves_it(chain: Chain) -> None:
    def is_agreed(status: Json) -> bool:
        return bool(status["groups"]) and not status["groups"][0]["deciding"]

    chain.front.wait_until(is_agreed)
    order(chain.front, "drain", chain.front)
    chain.front.wait_until(lambda status: status["groups"][0]["orders"])
    assert chain.gateway.ask().served_by == chain.front.peer_id
    status = chain.front.status()
    (group,) = status["groups"]
    assert group["items"] == []
    assert not [trouble for trouble in group["trouble"] if MODEL_NAME in str(trouble)]
    assert [model["memory_bytes"] for model in status["models"]] == [0]
    order(chain.front, "undrain", chain.front)


def test_a_server_that_dies_is_withdrawn_and_comes_back(chain: Chain, module_mesh: Mesh) -> None:
    with chain.gateway.answering(
        "POST", CHAT, chat("Tell me a long story.", stream=True, max_tokens=1500)
    ) as response:
        assert response.readline().startswith(b"data: ")
        chain.server.kill()
        rest = response.read()
    error = json.loads(rest.rstrip().rpartition(b"\n")[2].removeprefix(b"data: "))["error"]
    assert error["code"] == "replica_lost"
    for node in (chain.front, chain.gateway):
        node.wait_until(lambda status: not serves(status, MODEL_NAME))
        status, _, said = raw(node, chat(QUESTION))
        assert status == 503
        assert json.loads(said)["error"]["code"] in ("no_replica", "replicas_failed")
    (row,) = chain.front.status()["models"]
    assert row["state"] == "failed"
    assert chain.server.url in row["error"]
    again = [*chain.server.command]
    again[again.index("--api") + 1] = chain.server.url.removeprefix("http://")
    module_mesh.run("server", again, data_dir=chain.server.data_dir).wait_ready()
    chain.gateway.wait_until(
        lambda status: serves(status, MODEL_NAME) == {chain.front.peer_id}, BACK_WITHIN_S
    )
    assert raw(chain.gateway, chat(QUESTION))[0] == 200
