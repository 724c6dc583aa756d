"""Cut in the middle: the serving node dies or falls silent, or the client leaves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from tests.e2e.conftest import Figure
from tests.e2e.mesh import Mesh, NodeProcess, chat, events_of, serves, slots_busy

CUT_S = 4.0
FREED_S = 2.0
LONG = chat("Write a long story about a dragon and a lighthouse.", stream=True, max_tokens=1000)
TOKENS_BEFORE_CUT = 4


@pytest.fixture
def pair(mesh: Mesh) -> tuple[NodeProcess, NodeProcess]:
    """A gateway, and the only node that serves."""
    server = mesh.node("server").wait_started()
    gate = mesh.gateway("gate", "--join", server.invite()).wait_started()
    gate.wait_until(lambda status: serves(status, "small") == {server.peer_id})
    return gate, server


def begin(response: HTTPResponse) -> Iterator[str]:
    """The rest of a stream that is well under way."""
    assert response.status == 200, response.read()
    assert response.headers["x-meshnode-route"] == "tunnel"
    events = events_of(response)
    for _ in range(TOKENS_BEFORE_CUT):
        assert "error" not in json.loads(next(events))
    return events


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_lost_replica_is_an_error_event(
    pair: tuple[NodeProcess, NodeProcess], how: str, figure: Figure
) -> None:
    gate, server = pair
    with gate.answering("POST", "/v1/chat/completions", LONG) as response:
        events = begin(response)
        cut_at = time.monotonic()
        getattr(server, how)()
        rest = list(events)
    figure(f"cut by {how} told after s", time.monotonic() - cut_at)
    assert time.monotonic() - cut_at < CUT_S
    error = json.loads(rest[-1])["error"]
    assert error["code"] == "replica_lost"
    assert server.peer_id in error["message"]
    assert "[DONE]" not in rest
    gone = gate.request("POST", "/v1/chat/completions", chat("Hello"))
    assert gone.status in (404, 503)


def test_whole_answer_of_a_lost_replica_is_a_503(pair: tuple[NodeProcess, NodeProcess]) -> None:
    gate, server = pair
    asked = {**LONG, "stream": False}
    killed = threading.Timer(1.0, server.kill)
    killed.start()
    try:
        reply = gate.request("POST", "/v1/chat/completions", asked)
    finally:
        killed.join()
    assert reply.status == 503
    assert reply.error["code"] == "replicas_failed"
    assert reply.headers["retry-after"]


def test_client_that_leaves_frees_the_slot(
    pair: tuple[NodeProcess, NodeProcess], figure: Figure
) -> None:
    gate, server = pair
    with gate.answering("POST", "/v1/chat/completions", LONG) as response:
        begin(response)
        server.wait_until(lambda status: slots_busy(status) == 1)
    figure("slot freed after s", server.wait_until(lambda s: slots_busy(s) == 0, FREED_S))


def test_gateway_that_dies_frees_the_slot(pair: tuple[NodeProcess, NodeProcess]) -> None:
    gate, server = pair
    with gate.answering("POST", "/v1/chat/completions", LONG) as response:
        begin(response)
        gate.kill()
        server.wait_until(lambda status: slots_busy(status) == 0, CUT_S)


def test_engine_that_dies_is_an_error_event(pair: tuple[NodeProcess, NodeProcess]) -> None:
    gate, server = pair
    with gate.answering("POST", "/v1/chat/completions", LONG) as response:
        events = begin(response)
        killed = server.children()
        for engine in killed:
            engine.kill()
        rest = list(events)
    assert json.loads(rest[-1])["error"]["code"] == "replica_lost"
    assert "[DONE]" not in rest
    # Its successor may be ready before anybody was told that it was gone.
    server.wait_until(lambda status: status["ready"] and {*server.children()} - {*killed})
    gate.wait_until(lambda status: serves(status, "small"))
    assert gate.ask("Hello").served_by == server.peer_id


def test_answers_in_progress_end_before_a_node_stops(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    gate, server = pair
    asked = {**LONG, "max_tokens": 60}
    with gate.answering("POST", "/v1/chat/completions", asked) as response:
        events = begin(response)
        server.process.terminate()
        rest = list(events)
    assert rest[-1] == "[DONE]"
    assert server.process.wait(15) == 0
