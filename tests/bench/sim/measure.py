"""The runs, and what is made of them."""

from __future__ import annotations

import cProfile
import gc
import os
import platform
import pstats
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.network import Network
from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.kernel.world import World
from meshnode_simulations.models.latency import PlanetLab
from meshnode_simulations.models.pubsub import Gossipsub
from tests.bench.sim.pingpong import loop_events_per_s, simpy_events_per_s

SEED = 1
SIZES = (100, 300)
"""Larger ones by `--nodes`: a join sends some 12 rumours for each pair of nodes, so what it costs
grows with the square."""
SIZES_QUICK = (20, 50)
JOIN_S = 60
"""Nodes are switched on evenly over so long; whether all have met by then depends on the size."""
SETTLE_S = 60
IDLE_S = 60
PAIRS, PINGS_S = 500, 10
HOT_MAX = 12
SHOWN_MIN = 0.01
"""Kinds of events that are rarer than this, per node and second, are not shown."""
_KINDS = {
    "Heartbeat": "heartbeats, to every voter (the protocol's)",
    "Support": "supports, one for each heartbeat (the protocol's)",
    "Advert": "adverts heard (the protocol's)",
}


@dataclass(frozen=True)
class Mesh:
    """One mesh: what its join and a minute of idling took."""

    nodes: int
    join_events: int
    join_cpu_s: float
    idle_events: int
    idle_cpu_s: float
    bytes_per_node: float
    kinds: tuple[tuple[float, str], ...]
    """What an idle node's events are: how many a second, of each kind."""
    hot: tuple[tuple[float, str], ...]
    """Where the time of an idle mesh goes: shares and functions."""

    @property
    def idle_events_per_s(self) -> float:
        return self.idle_events / self.idle_cpu_s


@dataclass(frozen=True)
class Report:
    meshes: tuple[Mesh, ...]
    loop_events_per_s: float
    simpy_events_per_s: float


def measure(sizes: Sequence[int] = SIZES) -> Report:
    return Report(
        tuple(_mesh(nodes) for nodes in sizes),
        loop_events_per_s(PAIRS, PINGS_S),
        simpy_events_per_s(PAIRS, PINGS_S),
    )


def _mesh(nodes: int) -> Mesh:
    gc.collect()
    resident_bytes = psutil.Process().memory_info().rss
    world = World(SEED, Network(PlanetLab(SEED), stream(SEED, "network"), jitter=0.1))
    world.pubsub = Gossipsub(world)
    machines = [world.add(f"n{place}", is_root=place == 0) for place in range(nodes)]
    for place, machine in enumerate(machines):
        at_ns = JOIN_S * NS_PER_S * place // nodes
        world.loop.at(at_ns, world.switch_on, machine, machines[:1] if place else ())
    join_cpu_s = _run(world, JOIN_S + SETTLE_S)
    join_events = world.loop.events
    grown_bytes = psutil.Process().memory_info().rss - resident_bytes
    world.trace.messages.clear()
    idle_cpu_s = _run(world, IDLE_S)
    idle_events = world.loop.events - join_events
    kinds = _kinds(world, idle_events)
    return Mesh(
        nodes,
        join_events,
        join_cpu_s,
        idle_events,
        idle_cpu_s,
        grown_bytes / nodes,
        kinds,
        _hot(world),
    )


def _kinds(world: World, events: int) -> tuple[tuple[float, str], ...]:
    """Messages by kind, the most frequent first, and all that is none."""
    found = world.trace.messages.most_common()
    rest = events - sum(count for _, count in found)
    node_seconds = len(world.machines) * IDLE_S
    counted = [*found, ("ticks, and copies of adverts that another overtook", rest)]
    return tuple((count / node_seconds, _KINDS.get(kind, kind)) for kind, count in counted)


def _run(world: World, seconds: int) -> float:
    began = time.process_time()
    world.loop.run(world.loop.now_ns + seconds * NS_PER_S)
    return time.process_time() - began


def _hot(world: World) -> tuple[tuple[float, str], ...]:
    """Profile some idle seconds more; the profiler slows small functions most."""
    profile = cProfile.Profile()
    profile.enable()
    _run(world, IDLE_S // 10)
    profile.disable()
    stats = pstats.Stats(profile)
    rows = [
        (own_s, f"{os.path.basename(file)}:{name}")
        for (file, _, name), (_, _, own_s, _, _) in stats.stats.items()  # type: ignore[attr-defined]
    ]
    total_s = sum(own_s for own_s, _ in rows)
    rows.sort(reverse=True)
    return tuple((own_s / total_s, name) for own_s, name in rows[:HOT_MAX])


def as_text(report: Report) -> str:
    lines = [
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {sys.platform}",
        "",
        f"{'nodes':>6} {'join CPU s':>11} {'events':>10} {'idle ev/s of CPU':>17} "
        f"{'ev/node/s':>10} {'virtual/CPU s':>14} {'KiB/node':>9}",
    ]
    for mesh in report.meshes:
        lines.append(
            f"{mesh.nodes:>6} {mesh.join_cpu_s:>11.1f} {mesh.join_events:>10} "
            f"{mesh.idle_events_per_s:>17.0f} {mesh.idle_events / mesh.nodes / IDLE_S:>10.2f} "
            f"{IDLE_S / mesh.idle_cpu_s:>14.1f} {mesh.bytes_per_node / 1024:>9.0f}"
        )
    largest = report.meshes[-1]
    lines += ["", f"What the events of {largest.nodes} idle nodes are, per node and second:"]
    lines += [f"{rate:>7.2f} {kind}" for rate, kind in largest.kinds if rate >= SHOWN_MIN]
    lines += ["", f"Where the time of {largest.nodes} idle nodes goes:"]
    lines += [f"{share:>7.1%} {name}" for share, name in largest.hot]
    ratio = report.loop_events_per_s / report.simpy_events_per_s
    lines += [
        "",
        f"Ping-pong of {PAIRS} pairs: bare loop {report.loop_events_per_s:,.0f} messages/s of CPU, "
        f"SimPy {report.simpy_events_per_s:,.0f} ({ratio:.1f}×)",
    ]
    return "\n".join(lines)
