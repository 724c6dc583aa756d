"""What nodes say that their mesh has agreed on, read from `/api/status`."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from http.client import HTTPException

from tests.e2e.mesh import HANG_S, POLL_S, Json, NodeProcess

WATCH_S = 0.1
LOADED = frozenset({"loading", "ready", "unloading"})
"""States of a model that takes memory."""


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


def order(node: NodeProcess, action: str, at: NodeProcess, model: str | None = None) -> Json:
    body = {"action": action, "node": at.peer_id} | ({} if model is None else {"model": model})
    reply = node.request("POST", "/api/orders", body)
    assert reply.status == 200, reply
    return reply.body


def claim(node: NodeProcess, right: str, action: str = "claim", wait_s: float = 5.0) -> Json:
    """What the node says of the right; whoever did not get it has `error` besides."""
    body = {"action": action, "right": right, "wait_s": wait_s}
    reply = node.request("POST", "/api/claims", body)
    assert reply.status in (200, 409), reply
    return reply.body


class Watch:
    """Looks at nodes all the time: no epoch falls, and who has what in memory is written down.

    Nodes that do not answer are passed over; one that is started again goes on under its name.
    """

    def __init__(self, nodes: Callable[[], Sequence[NodeProcess]]) -> None:
        self.loaded: defaultdict[str, set[str]] = defaultdict(set)
        """Model → the names of the nodes that had it in memory at some time."""
        self.fallen: list[str] = []
        self._nodes = nodes
        self._epochs: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join(HANG_S)

    def _run(self) -> None:
        while not self._over.wait(WATCH_S):
            for node in self._nodes():
                try:
                    self._look(node.name, node.request("GET", "/api/status", timeout_s=1.0).body)
                except (OSError, HTTPException):
                    continue

    def _look(self, name: str, status: Json) -> None:
        for model in status["models"]:
            if model["state"] in LOADED:
                self.loaded[model["name"]].add(name)
        if (now := epoch(status)) < self._epochs.get(name, -1):
            self.fallen.append(f"{name}: {self._epochs[name]} to {now}")
        self._epochs[name] = max(now, self._epochs.get(name, -1))
