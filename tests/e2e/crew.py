"""Three nodes that have a model on disk, of which one serves it and all vote; two gateways."""

from __future__ import annotations

from dataclasses import dataclass

from tests.e2e.agreed import group, items, owners, standbys, voters, wait_agreed
from tests.e2e.mesh import MODEL_NAME, Json, Mesh, NodeProcess


@dataclass
class Crew:
    """A node that is started again takes the place of the old one in `nodes`."""

    mesh: Mesh
    nodes: list[NodeProcess]
    gates: list[NodeProcess]

    @classmethod
    def start(cls, mesh: Mesh) -> Crew:
        first = mesh.node("first", models=(), standbys=(MODEL_NAME,)).wait_started()
        token, gate_token = first.invite(), first.invite(role="gateway")
        others = [
            mesh.node(name, "--join", token, models=(), standbys=(MODEL_NAME,))
            for name in ("second", "third")
        ]
        gates = [mesh.gateway(name, "--join", gate_token) for name in ("gate", "gate-2")]
        for node in (*others, *gates):
            node.wait_started()
        return cls(mesh, [first, *others], gates)

    def everybody(self) -> list[NodeProcess]:
        return [*self.nodes, *self.gates]

    def by_peer(self, peer_id: str) -> NodeProcess:
        return next(node for node in self.nodes if node.peer_id == peer_id)

    def owner(self) -> NodeProcess:
        (peer,) = owners(self.gates[0].status(), MODEL_NAME, "serving")
        return self.by_peer(peer)

    def leader(self) -> NodeProcess:
        return self.by_peer(str(group(self.gates[0].status())["leader"]))

    def standby(self) -> NodeProcess:
        return self.by_peer(standbys(self.gates[0].status(), MODEL_NAME)[0])

    def others(self, *nodes: NodeProcess) -> list[NodeProcess]:
        return [node for node in self.nodes if node not in nodes]

    def start_again(self, killed: list[NodeProcess]) -> None:
        again = [self.mesh.again(node) for node in killed]
        for old, new in zip(killed, again, strict=True):
            self.nodes[self.nodes.index(old)] = new.wait_started()

    def wait_whole(self) -> float:
        """Seconds until all three vote, one of them serves, another would take over, and nothing
        is degraded."""

        def is_whole(status: Json) -> bool:
            return (
                voters(status) == {node.peer_id for node in self.nodes}
                and all(voter["alive"] for voter in group(status)["voters"])
                and len(owners(status, MODEL_NAME, "serving")) == 1
                and len(items(status, MODEL_NAME)) == 1
                and bool(standbys(status, MODEL_NAME))
                and not group(status)["trouble"]
            )

        return wait_agreed(self.everybody(), is_whole)
