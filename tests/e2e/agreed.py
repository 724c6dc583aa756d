"""What nodes say that their mesh has agreed on, read from `/api/status`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from tests.e2e.mesh import HANG_S, POLL_S, Json, NodeProcess


def group(status: Json) -> Json:
    """The one group of a mesh; nothing is decided while there is none."""
    groups = status["groups"]
    return dict(groups[0]) if groups else {"id": "", "epoch": -1, "voters": [], "items": []}


def epoch(status: Json) -> int:
    return int(group(status)["epoch"])


def voters(status: Json) -> set[str]:
    return {str(voter["peer_id"]) for voter in group(status)["voters"]}


def items(status: Json, model: str) -> list[Json]:
    return [item for item in group(status)["items"] if item["name"] == model]


def owners(status: Json, model: str, *states: str) -> set[str]:
    """Who owns a replica of `model`, in one of `states` if any are given."""
    found = items(status, model)
    return {str(item["owner"]) for item in found if not states or item["state"] in states}


def standbys(status: Json, model: str) -> list[str]:
    return [str(peer) for item in items(status, model) for peer in item["standbys"]]


def trouble(status: Json) -> str:
    """What is degraded and what would fix it, in the node's words."""
    return json.dumps(group(status).get("trouble", []))


def wait_agreed(
    nodes: Sequence[NodeProcess],
    holds: Callable[[Json], object] = lambda status: group(status)["id"],
    within_s: float = HANG_S,
) -> float:
    """Seconds until all of `nodes` tell of one and the same decision, and `holds` of each."""
    begun = time.monotonic()
    while True:
        told = [node.status() for node in nodes]
        decided = {(group(status)["id"], epoch(status)) for status in told}
        if len(decided) == 1 and all(holds(status) for status in told):
            return time.monotonic() - begun
        if time.monotonic() - begun > within_s:
            said = {n.name: status["groups"] for n, status in zip(nodes, told, strict=True)}
            raise AssertionError(f"no such agreement in {within_s} s: {json.dumps(said, indent=1)}")
        time.sleep(POLL_S)


def engine_states(node: NodeProcess) -> dict[str, str]:
    """A node's own models: "standby" is a file on its disk, all else takes or took memory."""
    return {str(model["name"]): str(model["state"]) for model in node.status()["models"]}
