"""Cut in the middle: the serving node dies or falls silent, or the client leaves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from tests.e2e.conftest import Figure
from tests.e2e.mesh import (
    MODEL_NAME,
    OTHER_NAME,
    Mesh,
    NodeProcess,
    Reply,
    chat,
    events_of,
    serves,
    slots_busy,
)

CUT_S = 4.0
RESUME_S = 15.0
"""A gateway waits so long for somebody who can go on."""
FREED_S = 2.0
LONG = chat("Write a long story about a dragon and a lighthouse.", stream=True, max_tokens=1000)
TOKENS_BEFORE_CUT = 4
ANSWER_TOKENS = 100


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


@pytest.mark.soak  # what it waits for is the whole patience of a gateway
def test_lost_replica_is_an_error_event(mesh: Mesh, figure: Figure) -> None:
    """Nobody else has the model: a while for somebody to go on with the answer, then the truth.

    One server is killed and one falls silent, each in the middle of an answer of its own model.
    """
    killed = mesh.node("killed").wait_started()
    token = killed.invite()
    frozen = mesh.node("frozen", "--join", token, models=(OTHER_NAME,)).wait_started()
    gate = mesh.gateway("gate", "--join", token).wait_started()
    for node, model in ((killed, MODEL_NAME), (frozen, OTHER_NAME)):
        gate.wait_until(
            lambda status, node=node, model=model: serves(status, model) == {node.peer_id}
        )
    asked = [{**LONG, "model": model} for model in (MODEL_NAME, OTHER_NAME)]
    with (
        gate.answering("POST", "/v1/chat/completions", asked[0]) as of_killed,
        gate.answering("POST", "/v1/chat/completions", asked[1]) as of_frozen,
    ):
        ends = {killed: begin(of_killed), frozen: begin(of_frozen)}
        cut_at = time.monotonic()
        killed.kill()
        frozen.freeze()
        for node, events in ends.items():
            rest = list(events)
            told_s = time.monotonic() - cut_at
            figure(f"cut of the {node.name} told after s", told_s)
            assert told_s < CUT_S + RESUME_S
            error = json.loads(rest[-1])["error"]
            assert error["code"] == "replica_lost"
            assert node.peer_id in error["message"]
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


def test_engine_that_dies_is_a_pause(pair: tuple[NodeProcess, NodeProcess], figure: Figure) -> None:
    """Its successor goes on where it was, and nobody could tell from the text."""
    gate, server = pair
    prompt = LONG["messages"][0]["content"]
    undisturbed = gate.stream(prompt, max_tokens=ANSWER_TOKENS)
    asked = {**LONG, "max_tokens": ANSWER_TOKENS}
    with gate.answering("POST", "/v1/chat/completions", asked) as response:
        events = events_of(response)
        come = [next(events) for _ in range(TOKENS_BEFORE_CUT)]
        killed, cut_at = server.children(), time.monotonic()
        for engine in killed:
            engine.kill()
        come.append(next(events))
        figure("pause of an answer whose engine died, s", time.monotonic() - cut_at)
        come += events
    assert come[-1] == "[DONE]"
    assert Reply(200, {}, {}, tuple(come)).text == undisturbed.text
    assert {*server.children()} - {*killed}
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
