"""A model that fits into no node is cut by layers: nodes answer together, also when one dies."""

from __future__ import annotations

import threading

import pytest

from tests.e2e import load
from tests.e2e.agreed import items, wait_agreed
from tests.e2e.conftest import Figure
from tests.e2e.mesh import MODEL_NAME, Json, Mesh, NodeProcess

# The whole model takes 322 MiB with its KV cache, half of its layers 271 and a third 254 (with all
# that each process needs for itself).
MEMORY = {2: "300MiB", 3: "260MiB"}
STORY = "Repeat this ten times: one two three four five six seven eight nine ten."
STORY_TOKENS = 80
TOKENS_BEFORE_KILL = 20
PAUSE_MAX_S = 20.0
"""Four on a free machine: seen, decided, loaded, and what was said computed again."""


def cut(status: Json) -> list[Json]:
    """The parts of the model in order of their layers."""
    found = [item for item in items(status, MODEL_NAME) if item["layers"]]
    return sorted(found, key=lambda item: int(item["layers"].split("–")[0].split("-")[0]))


def is_served(status: Json, stages: int) -> bool:
    parts = cut(status)
    is_listed = any(m["state"] == "ready" for m in status["mesh_models"])
    return len(parts) == stages and all(p["state"] == "serving" for p in parts) and is_listed


class Split:
    """Nodes that all have the file, none of which can hold it, and a gateway."""

    def __init__(self, mesh: Mesh, stages: int, spares: int = 0) -> None:
        keep = {"models": (), "standbys": (MODEL_NAME,)}
        memory = ("--memory", MEMORY[stages])
        self.stages = stages
        first = mesh.node("first", *memory, **keep).wait_started()
        token = first.invite()
        self.nodes = [first] + [
            mesh.node(f"node-{number}", *memory, "--join", token, **keep)
            for number in range(1, stages + spares)
        ]
        self.gate = mesh.gateway("gate", "--join", first.invite(role="gateway"))
        for node in (*self.nodes[1:], self.gate):
            node.wait_started()
        wait_agreed([*self.nodes, self.gate], lambda status: is_served(status, stages))

    def owner(self, place: int) -> NodeProcess:
        peer = cut(self.gate.status())[place]["owner"]
        return next(node for node in self.nodes if node.peer_id == peer)


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_stages_say_what_the_whole_model_says(mesh: Mesh, figure: Figure, stages: int) -> None:
    split = Split(mesh, stages)
    head = split.owner(-1)
    head.wait_until(lambda status: status["models"][0]["self_test"] == "first")
    told = load.ask(split.gate, STORY, STORY_TOKENS)
    assert told.is_whole, told
    assert told.served_by == split.owner(-1).peer_id, "the owner of the last layers answers"
    for node in split.nodes:
        node.kill()
    whole = mesh.node("whole").wait_ready()
    alone = load.ask(whole, STORY, STORY_TOKENS)
    assert told.text == alone.text
    figure(f"{stages} stages, one answer, s", told.at[-1] - told.asked_at)
    figure("whole model, one answer, s", alone.at[-1] - alone.asked_at)


@pytest.mark.parametrize("place", [pytest.param(0, marks=pytest.mark.soak), 1, -1])
def test_an_answer_survives_the_owner_of_any_layers(mesh: Mesh, figure: Figure, place: int) -> None:
    split = Split(mesh, stages=3, spares=1)
    undisturbed = load.ask(split.gate, STORY, STORY_TOKENS)
    assert undisturbed.is_whole, undisturbed
    victim = split.owner(place)
    killed = threading.Timer(undisturbed.at[TOKENS_BEFORE_KILL] - undisturbed.asked_at, victim.kill)
    killed.start()
    told = load.ask(split.gate, STORY, STORY_TOKENS)
    killed.join()
    assert told.is_whole, told
    assert told.text == undisturbed.text
    figure(f"pause of an answer whose owner {place} of 3 was killed, s", told.pause_s)
    assert undisturbed.pause_s < told.pause_s < PAUSE_MAX_S
