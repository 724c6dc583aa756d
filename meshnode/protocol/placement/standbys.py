"""Who would take over a part whose owner is lost: one host with the file and the memory for it.

A model with two replicas needs none: the other one is there already. Standbys commit no memory, so
two parts may share a host; they do so only if there is no other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from meshnode.protocol.placement.cost import (
    holding,
    part_bytes,
    runs_stages,
    units,
    weight,
    whole_bytes,
    whole_us,
)
from meshnode.protocol.placement.terms import Problem, Replica


@dataclass(frozen=True, slots=True)
class _Post:
    """A part that wants a standby: which one, and who could be it."""

    replica: int
    part: int
    candidates: tuple[str, ...]


def with_standbys(problem: Problem, replicas: tuple[Replica, ...]) -> tuple[Replica, ...]:
    """`replicas` with at most one standby for each part; who is one already stays if as good."""
    free = {peer: host.memory_bytes for peer, host in problem.hosts.items()}
    owners = set()
    for replica in replicas:
        for part in replica.parts:
            free[part.owner] -= part.bytes
            owners.add(part.owner)
    before = {
        (one.model, part.first, part.end, peer)
        for one in problem.current
        for part, peers in zip(one.parts, one.standbys, strict=False)
        for peer in peers
    }
    copies = Counter(replica.model for replica in replicas)
    posts = [
        _Post(i, j, _candidates(problem, replica, j, free))
        for i, replica in enumerate(replicas)
        if copies[replica.model] == 1
        for j in range(len(replica.parts))
    ]
    # Whoever has the least choice chooses first, or it would find its only host taken.
    posts.sort(
        key=lambda post: (
            len(post.candidates),
            -weight(problem, replicas[post.replica].model),
            post.replica,
            post.part,
        )
    )
    duties: Counter[str] = Counter()
    chosen: dict[tuple[int, int], tuple[str, ...]] = {}
    for post in posts:
        replica = replicas[post.replica]
        part = replica.parts[post.part]
        model = problem.models[replica.model]

        def rank(peer: str) -> tuple[int, bool, bool, bool, int, str]:
            held = holding(problem.hosts[peer], model.digest)  # noqa: B023
            return (
                duties[peer],
                held is None or held.state != "ready",
                peer in owners,
                (model.digest, part.first, part.end, peer) not in before,  # noqa: B023
                whole_us(model, problem.hosts[peer]),  # noqa: B023
                peer,
            )

        if post.candidates:
            best = min(post.candidates, key=rank)
            duties[best] += 1
            chosen[post.replica, post.part] = (best,)
    return tuple(
        replace(one, standbys=tuple(chosen.get((i, j), ()) for j in range(len(one.parts))))
        for i, one in enumerate(replicas)
    )


def _candidates(
    problem: Problem, replica: Replica, part: int, free: dict[str, int]
) -> tuple[str, ...]:
    """Hosts that could take this part as it is, beside what they own."""
    model = problem.models[replica.model]
    owners = {one.owner for one in replica.parts}
    layers = replica.parts[part].end - replica.parts[part].first
    found = []
    for peer, host in sorted(problem.hosts.items()):
        if peer in owners or host.draining or holding(host, model.digest) is None:
            continue
        whole = layers == units(model)
        size = whole_bytes(model, host) if whole else part_bytes(model, layers)
        if size <= free[peer] and (whole or runs_stages(host, model.digest)):
            found.append(peer)
    return tuple(found)
