"""The figures of a mesh as such: how long nodes take to join, who notices a death, what it costs.

Every figure is explained where it is made. Those of requests are made by `models/gateway.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.identity import PeerId
from meshnode.protocol import Event, MemberJoined, MemberLost
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import Power
from meshnode_simulations.record import quantile
from meshnode_simulations.run import Run

MEMBERS_ENOUGH = 16
"""Who is connected to so many members (or to all there are) has joined: it can lose any of them."""


@dataclass(slots=True)
class _Joining:
    since_s: float
    first_s: float | None = None
    members: int = 0


class MeshFigures:
    """Listens to a world; figures at the end.

    * `join_first_p50_s`, `_p99_s`: from power on to the first member
    * `join_p50_s`, `_p99_s`: from power on to `MEMBERS_ENOUGH`
    * `joined_share`: of all that were switched on
    * `death_seen_p50_s`, `_p99_s`, `_max_s`: from a kill to each connected member noticing it
    * `messages_per_node_s`, `bytes_per_node_s`: control messages and gossip that arrived
    * `events_per_node_s`: of the simulation, timers included
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._joining: dict[int, _Joining] = {}
        self._first_s: list[float] = []
        self._enough_s: list[float] = []
        self._powered = 0
        self._killed_s: dict[PeerId, float] = {}
        self._seen_s: list[float] = []
        self._node_seconds = 0.0
        self._messages = self._bytes = self._events = 0
        world = run.world
        world.on_power.append(self._on_power)
        world.on_event.append(self._on_event)
        run.recorder.gauge("nodes", lambda: len(world.running()))
        run.intervals.append(self._on_interval)
        run.closers.append(self._close)

    def _on_power(self, machine: Machine, power: Power) -> None:
        if power == "on":
            self._powered += 1
            self._killed_s.pop(machine.peer_id, None)
            self._joining[machine.index] = _Joining(self._run.now_s)
        elif power in ("killed", "stopped"):
            self._joining.pop(machine.index, None)
            if power == "killed":
                self._killed_s[machine.peer_id] = self._run.now_s
            self._run.recorder.count(power)

    def _on_event(self, machine: Machine, event: Event) -> None:
        match event:
            case MemberJoined():
                self._on_joined(machine)
            case MemberLost(peer) if peer in self._killed_s and self._run.is_warm:
                seen_s = self._run.now_s - self._killed_s[peer]
                self._seen_s.append(seen_s)
                dead = self._run.world.by_peer[peer].name
                self._run.recorder.row("deaths", node=machine.name, dead=dead, seen_s=seen_s)

    def _on_joined(self, machine: Machine) -> None:
        joining = self._joining.get(machine.index)
        if joining is None:
            return
        joining.members += 1
        waited_s = self._run.now_s - joining.since_s
        if joining.first_s is None:
            joining.first_s = waited_s
            self._first_s.append(waited_s)
        if joining.members >= min(MEMBERS_ENOUGH, self._run.scenario.mesh.nodes - 1):
            del self._joining[machine.index]
            self._enough_s.append(waited_s)
            self._run.recorder.row(
                "joins", node=machine.name, time_s=self._run.now_s, joined_s=waited_s
            )

    def _on_interval(self, seconds: float) -> None:
        """What it costs; series `messages` and `bytes` are per node and second."""
        world = self._run.world
        messages, size = sum(world.trace.messages.values()), sum(world.trace.bytes.values())
        nodes = max(len(world.running()), 1)
        recorder = self._run.recorder
        recorder.count("messages_per_node_s", (messages - self._messages) / nodes / seconds)
        recorder.count("bytes_per_node_s", (size - self._bytes) / nodes / seconds)
        if self._run.is_warm:
            self._node_seconds += nodes * seconds
            figures = self._run.figures
            for name, more in (
                ("messages", messages - self._messages),
                ("bytes", size - self._bytes),
                ("events", world.loop.events - self._events),
            ):
                figures[name] = figures.get(name, 0.0) + more
        self._messages, self._bytes, self._events = messages, size, world.loop.events

    def _close(self) -> None:
        figures = self._run.figures
        for name in ("messages", "bytes", "events"):
            figures[f"{name}_per_node_s"] = figures.pop(name, 0.0) / max(self._node_seconds, 1e-9)
        for name, values in (("join_first", self._first_s), ("join", self._enough_s)):
            figures[f"{name}_p50_s"] = quantile(values, 0.5)
            figures[f"{name}_p99_s"] = quantile(values, 0.99)
        figures["joined_share"] = len(self._enough_s) / max(self._powered, 1)
        if self._seen_s:
            figures["death_seen_p50_s"] = quantile(self._seen_s, 0.5)
            figures["death_seen_p99_s"] = quantile(self._seen_s, 0.99)
            figures["death_seen_max_s"] = max(self._seen_s)
