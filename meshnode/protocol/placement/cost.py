"""What a model takes and how long it takes: on one host, on a stage of it, between two hosts.

Sizes are rounded up, so that what is committed never exceeds what is there.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshnode.protocol.placement.terms import (
    Holding,
    Host,
    Model,
    Part,
    Problem,
    Replica,
    Want,
    Way,
)

GB = 10**9
MICROSECONDS = 10**6
MICROTOKENS = 10**12  # a token a microsecond, in millionths of tokens a second
_ONCE = Want(replicas=1)


def up(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def want(problem: Problem, model: str) -> Want:
    """What is wanted of `model`; once, if nobody said."""
    return problem.wants.get(model, _ONCE)


def weight(problem: Problem, model: str) -> int:
    """Its demand, at least 1."""
    return max(1, want(problem, model).weight)


def by_demand(problem: Problem) -> list[str]:
    """All models, those asked for most first."""
    return sorted(problem.models, key=lambda model: (-weight(problem, model), model))


def holding(host: Host, model: str) -> Holding | None:
    """What `host` has of `model` that it could serve from, draining or not."""
    held = host.holdings.get(model)
    return held if held is not None and held.state != "failed" else None


def runs_stages(host: Host, model: str) -> bool:
    """Whether `host` can run a part of the model's layers."""
    held = holding(host, model)
    return host.stages and held is not None and held.cuts


def units(model: Model) -> int:
    """Its layers; 1 if nobody knows them, and then it cannot be cut."""
    return max(1, model.layers)


def shared_bytes(model: Model) -> int:
    """What the parts of a replica have to hold between them."""
    return model.weight_bytes + model.kv_bytes_per_token * model.context_tokens


def whole_bytes(model: Model, host: Host) -> int:
    """What a whole replica takes on `host`: its own estimate, else ours."""
    held = holding(host, model.digest)
    if held is not None and held.bytes > 0:
        return held.bytes
    return shared_bytes(model) + model.compute_bytes


def part_bytes(model: Model, layers: int) -> int:
    """What a stage of so many layers takes."""
    return up(shared_bytes(model) * layers, units(model)) + model.compute_bytes


def layers_max(model: Model, free_bytes: int) -> int:
    """How many layers fit; fewer than all, for a host of all of them needs no pipeline."""
    room = max(0, free_bytes - model.compute_bytes)
    return min(units(model) - 1, room * units(model) // max(1, shared_bytes(model)))


def whole_us(model: Model, host: Host) -> int:
    """What a token costs if `host` runs all layers; at least 1."""
    held = holding(host, model.digest)
    if held is not None and held.decode_us_per_token > 0:
        return held.decode_us_per_token
    return max(1, up(model.weight_bytes * host.us_per_gb, GB))


def stage_us(all_us: int, layers: int, of: int) -> int:
    """What a token costs in a stage, where all layers would cost `all_us`."""
    return up(all_us * layers, of)


def hop_us(problem: Problem, model: Model, one: str, other: str) -> int:
    """What a token's activation costs between two hosts: a whole round trip, which is more than it
    takes, and the transfer. The worse of both directions, so that it has none."""
    found = (problem.ways.get((one, other)), problem.ways.get((other, one)))
    measured = [_way_us(model, way) for way in found if way is not None]
    return max(measured) if measured else _way_us(model, problem.default_way)


def _way_us(model: Model, way: Way) -> int:
    transfer = 0
    if way.bytes_per_s > 0:
        transfer = up(model.activation_bytes * MICROSECONDS, way.bytes_per_s)
    return way.rtt_us + transfer


def replica_us(problem: Problem, replica: Replica) -> int:
    """What a token costs one request, the way back to the first stage included."""
    model = problem.models[replica.model]
    owners = [part.owner for part in replica.parts]
    compute = sum(_part_us(problem, model, part) for part in replica.parts)
    if len(owners) == 1:
        return compute
    hops = zip(owners, owners[1:] + owners[:1], strict=True)
    return compute + sum(hop_us(problem, model, one, other) for one, other in hops)


def bottleneck_us(problem: Problem, replica: Replica) -> int:
    """The time of its slowest stage: with many requests at once, what a token costs."""
    model = problem.models[replica.model]
    return max(_part_us(problem, model, part) for part in replica.parts)


def _part_us(problem: Problem, model: Model, part: Part) -> int:
    every = whole_us(model, problem.hosts[part.owner])
    return stage_us(every, part.end - part.first, units(model))


def load_us(problem: Problem, parts: Iterable[Part], model: str) -> int:
    """How long until all of `parts` are in memory, loading at once; 0 where it already is."""
    worst = 0
    for part in parts:
        host = problem.hosts[part.owner]
        held = holding(host, model)
        if held is None or held.state != "ready":
            worst = max(worst, up(part.bytes * MICROSECONDS, max(1, host.load_bytes_per_s)))
    return worst


def fits_one(problem: Problem, model: Model) -> bool:
    """Whether some host could hold all of it if it held nothing else: then it is not cut."""
    return any(
        whole_bytes(model, host) <= host.memory_bytes
        for host in problem.hosts.values()
        if not host.draining and holding(host, model.digest) is not None
    )
