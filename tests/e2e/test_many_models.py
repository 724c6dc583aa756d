"""Two models with an owner each, three nodes that could take over either, all voting."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from tests.e2e.agreed import (
    Watch,
    engine_states,
    group,
    items,
    owners,
    standbys,
    voters,
    wait_agreed,
)
from tests.e2e.conftest import Figure
from tests.e2e.mesh import MODEL_NAME, OTHER_NAME, Json, Mesh, NodeProcess, serves

MODELS = (MODEL_NAME, OTHER_NAME)
LOADED_S = 20.0
"""A warm standby serves within five; two of them load at once here, beside five nodes."""


@dataclass
class Five:
    mesh: Mesh
    pinned: list[NodeProcess]
    spare: list[NodeProcess]
    gate: NodeProcess

    def nodes(self) -> list[NodeProcess]:
        return [*self.pinned, *self.spare]

    def is_whole(self, status: Json) -> bool:
        """Everybody votes, and each model is served by the node that is told to."""
        wanted = dict(zip(MODELS, self.pinned, strict=True))
        return (
            voters(status) == {node.peer_id for node in self.nodes()}
            and all(voter["alive"] for voter in group(status)["voters"])
            and all(
                owners(status, model) == owners(status, model, "serving") == {node.peer_id}
                and standbys(status, model)
                for model, node in wanted.items()
            )
        )


@pytest.fixture
def five(mesh: Mesh) -> Five:
    one = mesh.node("one").wait_started()
    token = one.invite()
    two = mesh.node("two", "--join", token, models=(OTHER_NAME,))
    spare = [
        mesh.node(name, "--join", token, models=(), standbys=MODELS)
        for name in ("spare-1", "spare-2", "spare-3")
    ]
    gate = mesh.gateway("gate", "--join", one.invite(role="gateway"))
    for node in (two, *spare, gate):
        node.wait_started()
    return Five(mesh, [one, two], spare, gate)


def test_both_owners_killed(five: Five, figure: Figure) -> None:
    """Each model is taken over by one standby, and nobody else loads it meanwhile."""
    wait_agreed([*five.nodes(), five.gate], five.is_whole)
    for node in five.spare:  # until they have let go of what they stood in for
        node.wait_until(lambda status: {m["state"] for m in status["models"]} == {"standby"})
    with Watch(lambda: five.spare) as watch:
        killed_at = time.monotonic()
        for node in five.pinned:
            node.kill()
        gone = {node.peer_id for node in five.pinned}
        alive = [*five.spare, five.gate]

        def is_taken_over(status: Json) -> bool:
            return all(
                len(owners(status, model)) == 1 and owners(status, model, "serving") - gone
                for model in MODELS
            )

        wait_agreed(alive, is_taken_over, LOADED_S)
        figure("both owners killed: both models decided anew, s", time.monotonic() - killed_at)
        for model in MODELS:
            five.gate.wait_until(lambda status, model=model: serves(status, model) - gone)
            five.gate.ask(model=model)
        figure("both owners killed: both models answer, s", time.monotonic() - killed_at)
    assert {model: len(by) for model, by in watch.loaded.items()} == dict.fromkeys(MODELS, 1)
    for model in MODELS:
        (item,) = items(five.gate.status(), model)
        holders = [node for node in five.spare if engine_states(node)[model] == "ready"]
        assert [node.peer_id for node in holders] == [item["owner"]]
