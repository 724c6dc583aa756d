"""Bugs in the wiring of agreement, put in on purpose, and what must catch each.

The register's own, and the table of those in other parts, are in `consensus/planted.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from msgspec.structs import replace

from meshnode.messages import Decided, decode
from meshnode.protocol import draft as draft_module
from meshnode.protocol import group as group_module
from meshnode.protocol import rules as rules_module
from meshnode.protocol.agreement import Agreement
from meshnode.protocol.group import Group
from meshnode.protocol.placement import Problem
from meshnode.protocol.stack import GiveOrder
from tests.protocol.agreement.invariants import watch
from tests.protocol.agreement.scenes import (
    NAMES,
    SMOL,
    is_served_everywhere,
    leader,
    loaders,
    loads,
    mesh_of,
    owners,
    restart,
    standbys,
    view,
)
from tests.protocol.cluster import Cluster, a_holding
from tests.protocol.consensus.parts import Violation
from tests.protocol.consensus.planted import Planted

# --- checks: each raises `Violation` -------------------------------------------------------------


def _must(holds: object, what: str) -> None:
    if not holds:
        raise Violation(what)


def a_request_of_yesterday() -> None:
    """S6: what stands on an older epoch is refused, with a proof that teaches its sender."""
    cluster = mesh_of(3)
    ada = cluster.stack("ada").agreement
    assigned = ada.assigned(SMOL.digest)
    assert assigned is not None
    now = (assigned.group, assigned.epoch)
    _must(ada.overtakes(SMOL.digest, now) is None, "a request of today was refused")
    for stood_on in (None, (assigned.group, assigned.epoch - 1)):
        proof = ada.overtakes(SMOL.digest, stood_on)
        _must(proof is not None, f"a request that stands on {stood_on} is served")
        newest = decode(proof or b"", Decided).newest
        _must(newest and newest.header.epoch == assigned.epoch, "the proof proves nothing")


def an_owner_dies() -> None:
    """It is replaced by exactly one of its standbys, within seconds."""
    cluster = mesh_of(5)
    before = loads(cluster)
    cluster.kill("bob")
    cluster.run(10.0)
    _must(is_served_everywhere(cluster), "nobody took over")
    _must(len(loaders(cluster, before)) == 1, f"a stampede: {loaders(cluster, before)}")


def a_drain() -> None:
    """At every instant somebody serves."""
    cluster = mesh_of(4)
    _must(standbys(cluster), "nobody stands by")
    cluster.tell("ada", GiveOrder("drain", "", cluster.machines["bob"].peer_id))
    for _ in range(80):
        cluster.run(0.25)
        _must(is_served_everywhere(cluster), "served by nobody while it moves")
    _must("bob" not in owners(cluster), "it was not drained")


def too_little_memory() -> None:
    """S8: three models of one gigabyte are wanted on a node that offers two and a half."""
    cluster = Cluster()
    watch(cluster)
    offers = [replace(SMOL, name=f"m{n}", digest=f"{n}" * 64) for n in range(3)]
    models = tuple((offer, a_holding(offer, bytes=2**30)) for offer in offers)
    try:
        cluster.start("ada", models=models, is_root=True, memory_bytes=5 * 2**29)
        cluster.run(10.0)
    except AssertionError as error:
        raise Violation(str(error)) from error
    _must(len(view(cluster, "ada").items) == 2, "it does not serve what fits")


def a_dead_leader() -> None:
    """The others go on without it."""
    cluster = mesh_of(5, owners=("eve",))
    gone = leader(cluster)
    cluster.kill(gone)
    cluster.kill("eve")
    cluster.run(12.0)
    _must(is_served_everywhere(cluster), f"{gone} led, and nobody does now")


def everybody_restarts() -> None:
    """S3: a power cut for all costs no epoch."""
    cluster = mesh_of(3)
    before = view(cluster, "ada")
    for name in NAMES[:3]:
        cluster.kill(name)
    for name in NAMES[:3]:
        restart(cluster, name)
    cluster.run(20.0)
    _must(is_served_everywhere(cluster), "not served again")
    after = view(cluster, "ada")
    _must(after.group == before.group and after.epoch >= before.epoch, "it is another mesh")


# --- plants --------------------------------------------------------------------------------------


@contextmanager
def epoch_ignored() -> Iterator[None]:
    with patch.object(Agreement, "overtakes", lambda self, model, stood_on: None):
        yield


@contextmanager
def every_standby_loads() -> Iterator[None]:
    def stampede(self: Group, item: object) -> bool:
        own = self._scene.own
        return own == item.owner or own in self._file_holders()  # type: ignore[attr-defined]

    def holders(self: Group) -> set[str]:
        return {peer for peer, _ in self.words}

    with (
        patch.object(Group, "has_to_load", stampede),
        patch.object(Group, "_file_holders", holders, create=True),
    ):
        yield


@contextmanager
def drains_at_once() -> Iterator[None]:
    """The old owner goes before the new one has proved itself; and no voter minds."""

    def hasty(item: object, words: object) -> object:
        return replace(item, state="draining", standbys=())  # type: ignore[type-var]

    with (
        patch.object(draft_module, "_staying", hasty),
        patch.object(rules_module, "_refused_changes", lambda *_: None),
    ):
        yield


@contextmanager
def memory_is_no_object() -> Iterator[None]:
    """The planner takes every host for ten times as large, and no voter adds it up."""
    honest = group_module.problem_of

    def generous(*facts: object) -> Problem:
        problem = honest(*facts)  # type: ignore[arg-type]
        hosts = {
            peer: dataclasses.replace(host, memory_bytes=10 * host.memory_bytes)
            for peer, host in problem.hosts.items()
        }
        return dataclasses.replace(problem, hosts=hosts)

    with (
        patch.object(group_module, "problem_of", generous),
        patch.object(rules_module, "_refused_items", lambda *_: None),
    ):
        yield


@contextmanager
def heads_not_kept() -> Iterator[None]:
    with patch.object(Cluster, "start", _amnesiac(Cluster.start)):
        yield


def _amnesiac(start: object) -> object:
    def forgetful(self: Cluster, name: str, *rest: object, **more: object) -> object:
        if name in self.machines:
            self.machines[name].disk.clear()
        return start(self, name, *rest, **more)  # type: ignore[operator]

    return forgetful


@contextmanager
def waits_for_the_dead() -> Iterator[None]:
    with (
        patch.object(Group, "is_alive", lambda self, voter: True),
        patch.object(Group, "wants", lambda self: False),
    ):
        yield


PLANTED: tuple[Planted, ...] = (
    Planted("epoch ignored", "a request that stands on an older decision is served (S6)",
            epoch_ignored, a_request_of_yesterday),
    Planted("stampede", "everybody who has the file loads it",
            every_standby_loads, an_owner_dies),
    Planted("drains at once", "the old owner goes before the new one is ready",
            drains_at_once, a_drain),
    Planted("memory is no object", "more is committed than a node offers (S8)",
            memory_is_no_object, too_little_memory),
    Planted("heads not kept", "nobody remembers decisions over a restart (S3)",
            heads_not_kept, everybody_restarts),
    Planted("waits for the dead", "no voter ever asks for the next block",
            waits_for_the_dead, a_dead_leader),
)  # fmt: skip
