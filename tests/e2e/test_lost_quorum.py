"""What is left of agreement when most of its voters are gone, and the way back.

The node that made the mesh serves the model, two others vote with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from tests.e2e.agreed import epoch, group, owners, trouble, voters, wait_agreed
from tests.e2e.conftest import Figure
from tests.e2e.mesh import MODEL_NAME, Json, Mesh, NodeProcess, serves

NOTICED_S = 10.0
"""A death is noticed in three; the rest is the machine's own slowness."""


@dataclass
class Trio:
    """`nodes[0]` has made the mesh and serves."""

    mesh: Mesh
    nodes: list[NodeProcess]
    gate: NodeProcess

    def is_whole(self, status: Json) -> bool:
        return (
            voters(status) == {node.peer_id for node in self.nodes}
            and all(voter["alive"] for voter in group(status)["voters"])
            and owners(status, MODEL_NAME, "serving") == {self.nodes[0].peer_id}
            and serves(status, MODEL_NAME) == {self.nodes[0].peer_id}
        )

    def wait_whole(self) -> None:
        wait_agreed([*self.nodes, self.gate], self.is_whole)

    def start_again(self, killed: list[NodeProcess]) -> None:
        again = [self.mesh.again(node) for node in killed]
        for old, new in zip(killed, again, strict=True):
            self.nodes[self.nodes.index(old)] = new.wait_started()


@pytest.fixture(scope="module")
def three(module_mesh: Mesh) -> Trio:
    root = module_mesh.node("root").wait_started()
    token = root.invite()
    others = [
        module_mesh.node(name, "--join", token, models=(), standbys=(MODEL_NAME,))
        for name in ("left", "right")
    ]
    gate = module_mesh.gateway("gate", "--join", root.invite(role="gateway"))
    for node in (*others, gate):
        node.wait_started()
    return Trio(module_mesh, [root, *others], gate)


def test_everybody_at_once_as_in_a_power_cut(three: Trio, figure: Figure) -> None:
    three.wait_whole()
    before = group(three.gate.status())
    for node in (*three.nodes, three.gate):
        node.kill()
    three.gate = three.mesh.again(three.gate)
    three.start_again(list(three.nodes))
    three.gate.wait_started()
    begun = time.monotonic()
    three.wait_whole()
    figure("everybody was killed and starts again: whole after s", time.monotonic() - begun)
    after = group(three.gate.status())
    assert after["id"] == before["id"]
    assert after["epoch"] >= before["epoch"]
    assert three.gate.ask().served_by == three.nodes[0].peer_id


def test_a_lost_quorum_is_said_and_recovered_from(three: Trio, figure: Figure) -> None:
    """What is loaded goes on answering; only the node that made the mesh can force a way out."""
    three.wait_whole()
    root, *lost = three.nodes
    for node in lost:
        node.kill()
    root.wait_until(lambda status: "no quorum" in trouble(status), NOTICED_S)
    before = epoch(root.status())
    assert "recover --force" in trouble(root.status())
    assert three.gate.ask().served_by == root.ask().served_by == root.peer_id
    assert three.gate.request("POST", "/api/recover", {}).status == 409
    assert epoch(root.status()) == before, "one of three decides nothing"

    begun = time.monotonic()
    recovered = root.request("POST", "/api/recover", {})
    assert recovered.status == 200, recovered
    wait_agreed([root, three.gate], lambda status: voters(status) == {root.peer_id}, NOTICED_S)
    figure("recovered by force, s", time.monotonic() - begun)
    assert epoch(root.status()) > before
    assert "no quorum" not in trouble(root.status())

    begun = time.monotonic()
    three.start_again(lost)
    three.wait_whole()
    figure("the lost are back and vote, s", time.monotonic() - begun)
    assert three.gate.ask().served_by == root.peer_id
