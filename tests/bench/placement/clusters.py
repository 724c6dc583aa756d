"""Random meshes from a seed: home machines, tens of milliseconds apart."""

from __future__ import annotations

import math
import random
from itertools import combinations

from meshnode.protocol.placement import Holding, Host, Model, Problem, Want, Way

GB = 10**9
US_PER_GB_RANGE = (2_500, 100_000)
"""400 GB/s of a good card to 10 GB/s of an old laptop."""
RTT_US_MAX = 80_000


def hosts(rng: random.Random, count: int, models: list[str]) -> list[Host]:
    """So many that hold all of `models` and run stages; 4 to 12 GB."""
    low, high = map(math.log, US_PER_GB_RANGE)
    return [
        Host(
            f"h{i:03}",
            rng.randrange(8, 25) * GB // 2,
            int(math.exp(rng.uniform(low, high))),
            GB,
            {model: Holding("file", False, 0) for model in models},
            stages=True,
        )
        for i in range(count)
    ]


def ways(rng: random.Random, peers: list[str]) -> dict[tuple[str, str], Way]:
    """Points in a square: neighbours are near each other's neighbours."""
    points = {peer: (rng.random(), rng.random()) for peer in peers}
    return {
        (one, other): Way(1000 + int(RTT_US_MAX * math.dist(points[one], points[other])))
        for one, other in combinations(peers, 2)
    }


def cut_problem(rng: random.Random, count: int, layers: int, *, share: float) -> Problem:
    """One model that fits on no host and takes up to `share` of all memory."""
    members = hosts(rng, count, ["m"])
    sizes = [host.memory_bytes for host in members]
    least = max(sizes) * 105 // 100
    weight_bytes = rng.randint(least, max(least, int(sum(sizes) * share)))
    model = Model("m", "m", weight_bytes, layers, 0, 0, GB // 10)
    between = ways(rng, [host.peer for host in members])
    return Problem({"m": model}, {host.peer: host for host in members}, {"m": Want(1)}, between)


def busy_problem(rng: random.Random, count: int) -> Problem:
    """Six models, four of which fit on one host; some hosts hold each, some run stages."""
    sizes = [1, 2, 4, 7, 16, 28]
    models = {
        f"m{i}": Model(f"m{i}", f"m{i}", gb * GB, 32, 50_000, 4096, GB // 10, 8192)
        for i, gb in enumerate(sizes)
    }
    members = {}
    for host in hosts(rng, count, list(models)):
        held = {name: one for name, one in host.holdings.items() if rng.random() < 0.6}
        members[host.peer] = Host(
            host.peer,
            host.memory_bytes,
            host.us_per_gb,
            host.load_bytes_per_s,
            held,
            stages=rng.random() < 0.8,
        )
    wants = {name: Want(rng.randint(1, 3), weight=rng.randint(1, 100)) for name in models}
    return Problem(models, members, wants, ways(rng, list(members)))
