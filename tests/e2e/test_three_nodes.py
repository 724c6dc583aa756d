"""A bootstrap process, three nodes and a gateway that each know only the bootstrap.

`a` and `b` serve the same model, `c` another one, `gate` none. The tests share them, in this
order, and each leaves the mesh whole.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

import pytest

from tests.e2e.agreed import voters
from tests.e2e.conftest import Figure
from tests.e2e.mesh import (
    MODEL_NAME,
    OTHER_NAME,
    QUESTION,
    Mesh,
    NodeProcess,
    serves,
    wait_all_see,
)

FIND_S = 30.0
NEWS_S = 2.0
"""Adverts tell who holds a chat within a second and a half; people read an answer for longer."""
LEAVE_S = 2.0
LOST_S = 4.0
"""A peer that dies or falls silent is noticed in three; one for the machine's own slowness."""


@dataclass
class Nodes:
    """The processes by the names above; a restart replaces one."""

    mesh: Mesh
    bootstrap: NodeProcess
    token: str
    a: NodeProcess
    b: NodeProcess
    c: NodeProcess
    gate: NodeProcess

    def all(self) -> list[NodeProcess]:
        return [self.a, self.b, self.c, self.gate]

    def by_peer(self, peer_id: str) -> NodeProcess:
        return next(node for node in self.all() if node.peer_id == peer_id)

    def restart(self, node: NodeProcess) -> None:
        """The same data directory; nothing said about meshes, tokens or addresses."""
        again = self.mesh.node(f"{node.name}-again", data_dir=node.data_dir).wait_ready()
        assert again.peer_id == node.peer_id
        if node is self.a:
            self.a = again
        else:
            self.b = again

    def wait_whole(self) -> float:
        """Seconds until everybody sees everybody, and `a` and `b` serving."""
        begun = time.monotonic()
        wait_all_see(self.all())
        for node in self.all():
            node.wait_until(
                lambda status: serves(status, MODEL_NAME) == {self.a.peer_id, self.b.peer_id}
            )
        return time.monotonic() - begun


@pytest.fixture(scope="module")
def nodes(module_mesh: Mesh) -> Nodes:
    bootstrap = module_mesh.bootstrap("bootstrap", "--mesh", "home", "--create").wait_started()
    token = bootstrap.invite()
    return Nodes(
        module_mesh,
        bootstrap,
        token,
        module_mesh.node("a", "--join", token),
        module_mesh.node("b", "--join", token),
        module_mesh.node("c", "--join", token, models=(OTHER_NAME,)),
        module_mesh.gateway("gate", "--join", token),
    )


def test_all_find_all_through_the_bootstrap(nodes: Nodes, figure: Figure) -> None:
    for node in nodes.all():
        node.wait_started()
    took_s = wait_all_see([nodes.bootstrap, *nodes.all()])
    figure("found_each_other_s", took_s)
    assert took_s < FIND_S
    for node in nodes.all():
        status = node.status()
        assert status["mesh"]["name"] == "home"
        assert not [why for why in status["refused"] if "certificate" in why or "forged" in why]
        assert not status["warnings"]


def test_everybody_answers_everything(nodes: Nodes) -> None:
    nodes.wait_whole()
    for node in nodes.all():
        node.wait_until(lambda status: serves(status, OTHER_NAME) == {nodes.c.peer_id})
        listed = node.request("GET", "/v1/models").body["data"]
        assert {model["id"] for model in listed} == {MODEL_NAME, OTHER_NAME}
        for model in (MODEL_NAME, OTHER_NAME):
            reply = node.ask(QUESTION, model=model)
            assert "Paris" in reply.text
            assert reply.body["model"] == model
            assert reply.route == ("local" if reply.served_by == node.peer_id else "tunnel")


def test_a_model_of_one_node_is_reached_from_all(nodes: Nodes) -> None:
    for node in (nodes.a, nodes.b, nodes.gate):
        reply = node.stream(QUESTION, model=OTHER_NAME)
        assert reply.headers["x-meshnode-served-by"] == nodes.c.peer_id
        assert reply.headers["x-meshnode-route"] == "tunnel"
        assert reply.events[-1] == "[DONE]"
        assert "Paris" in reply.text


def test_embeddings_from_every_gateway(nodes: Nodes) -> None:
    """In full precision, whoever computed them; what one node has, all can use."""
    asked = {"model": OTHER_NAME, "input": ["The cat sat on the mat.", "It rains."]}
    replies = [node.request("POST", "/v1/embeddings", asked) for node in (nodes.c, nodes.gate)]
    assert [(reply.status, reply.route) for reply in replies] == [(200, "local"), (200, "tunnel")]
    here, there = replies
    assert there.served_by == nodes.c.peer_id
    assert there.body["usage"] == here.body["usage"]
    for one, other in zip(here.body["data"], there.body["data"], strict=True):
        likeness = sum(a * b for a, b in zip(one["embedding"], other["embedding"], strict=True))
        assert likeness == pytest.approx(1.0, abs=1e-3)
    old = {"model": OTHER_NAME, "prompt": asked["input"][0]}
    assert len(nodes.gate.request("POST", "/api/embeddings", old).body["embedding"]) == 576


@pytest.mark.parametrize("subject", ["tea", "rain", "iron"])
def test_second_turn_through_another_gateway_finds_its_cache(nodes: Nodes, subject: str) -> None:
    opening = f"Tell me one thing about {subject}."
    first = nodes.a.ask(opening)
    time.sleep(NEWS_S)
    for gateway in (nodes.gate, nodes.b, nodes.c):
        second = gateway.ask(opening, first.text, "And another one.")
        assert second.served_by == first.served_by
        assert second.cached_tokens > 0


def test_join_late_and_leave(nodes: Nodes, figure: Figure) -> None:
    late = nodes.mesh.node("late", "--join", nodes.token).wait_started()
    figure("late_seen_s", wait_all_see([*nodes.all(), late]))
    late.wait_ready()
    for node in nodes.all():
        node.wait_until(lambda status: late.peer_id in serves(status, MODEL_NAME))

    begun = time.monotonic()
    late.process.send_signal(signal.SIGTERM)
    for node in nodes.all():
        node.wait_until(lambda status: not _mentions(status, late), LEAVE_S)
    figure("leave_seen_s", time.monotonic() - begun)
    assert late.process.wait(15) == 0


def test_killed_node_is_missed_and_comes_back(nodes: Nodes, figure: Figure) -> None:
    opening = "Tell me one thing about gold."
    first = nodes.gate.ask(opening)
    holder = nodes.by_peer(first.served_by)
    killed_at = time.monotonic()
    holder.kill()
    second = nodes.gate.ask(opening, first.text, "And another one.")
    figure("answer_after_kill_s", time.monotonic() - killed_at)
    assert time.monotonic() - killed_at < LOST_S
    assert second.served_by != holder.peer_id

    others = [node for node in nodes.all() if node is not holder]
    for node in others:
        left_s = max(0.0, LOST_S - (time.monotonic() - killed_at))
        node.wait_until(lambda status: not _mentions(status, holder), left_s)
    figure("kill_seen_s", time.monotonic() - killed_at)

    nodes.restart(holder)
    figure("rejoined_s", nodes.wait_whole())


def test_silent_node_is_passed_over(nodes: Nodes, figure: Figure) -> None:
    opening = "Tell me one thing about wood."
    asked_at = time.monotonic()
    first = nodes.gate.ask(opening)
    answer_s = time.monotonic() - asked_at
    holder = nodes.by_peer(first.served_by)
    others = [node for node in nodes.all() if node is not holder]
    holder.freeze()
    frozen_at = time.monotonic()
    try:
        second = nodes.gate.ask(opening, first.text, "And another one.")
        figure("answer_after_freeze_s", time.monotonic() - frozen_at)
        assert time.monotonic() - frozen_at < LOST_S + answer_s
        assert second.served_by != holder.peer_id
        for node in others:
            left_s = max(0.0, LOST_S - (time.monotonic() - frozen_at))
            node.wait_until(lambda status: not _mentions(status, holder), left_s)
        figure("freeze_seen_s", time.monotonic() - frozen_at)
        # Nobody brings it back while it is silent.
        time.sleep(1.0)
        assert not any(_mentions(node.status(), holder) for node in others)
    finally:
        holder.thaw()
    figure("thawed_s", nodes.wait_whole())


def test_who_only_asks_does_not_vote(nodes: Nodes) -> None:
    """The gateway was let in by a token for nodes; it decides nothing for all that."""
    for node in nodes.all():
        status = node.status()
        staying = {node.peer_id for node in (nodes.bootstrap, nodes.a, nodes.b, nodes.c)}
        assert voters(status) <= staying
        assert len(voters(status)) == 3


def test_goes_on_without_its_bootstrap(nodes: Nodes, figure: Figure) -> None:
    nodes.bootstrap.kill()
    for node in nodes.all():
        node.wait_until(lambda status: not _mentions(status, nodes.bootstrap), LOST_S)
        assert "Paris" in node.ask(QUESTION).text
    # `a` knew nobody but the bootstrap when it was made; now its disk does.
    assert nodes.a.terminate() == 0
    nodes.restart(nodes.a)
    figure("back_without_bootstrap_s", nodes.wait_whole())
    assert nodes.a.ask(QUESTION, model=OTHER_NAME).served_by == nodes.c.peer_id


def _mentions(status: dict[str, object], node: NodeProcess) -> bool:
    """Whether `node` is in any part of a view: as a peer, or as a server of a model."""
    return node.peer_id in str(status["peers"]) or node.peer_id in str(status["mesh_models"])
