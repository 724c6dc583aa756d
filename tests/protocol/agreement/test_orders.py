"""What operators ask for: pins and drains, from any node, also while others die."""

from __future__ import annotations

import msgspec
import pytest

from meshnode.messages import Orders
from meshnode.protocol import Effect, Send
from meshnode.protocol.group import DRAIN_S
from meshnode.protocol.stack import SetOffers
from tests.protocol.agreement.invariants import watch
from tests.protocol.agreement.scenes import (
    SMOL,
    give,
    is_served,
    is_served_everywhere,
    leader,
    loads,
    mesh_of,
    name_of,
    owners,
    restart,
    view,
    voters,
)
from tests.protocol.cluster import Cluster, Machine, a_holding

DECIDED_S = 2.0


def in_force(cluster: Cluster, name: str = "ada") -> list[tuple[str, str]]:
    """(action, peer), as `name` knows it."""
    return [(each[0], name_of(cluster, each[2])) for each in view(cluster, name).orders]


def a_follower(cluster: Cluster) -> str:
    return next(name for name in cluster.machines if name not in voters(cluster))


@pytest.mark.parametrize("giver", ["voter", "follower", "gateway"])
def test_anybody_in_a_private_mesh_may_pin_and_unpin(giver: str) -> None:
    cluster = mesh_of(4, prepare=watch)
    cluster.start("gate", ["ada"], roles=("gateway",))
    cluster.run(10.0)
    name = {"voter": leader(cluster), "follower": a_follower(cluster), "gateway": "gate"}[giver]
    give(cluster, name, "pin", SMOL.digest, "dan")
    took_s = cluster.run_until(lambda: owners(cluster).get("dan") == "serving", 10.0)
    assert took_s <= 2 * DECIDED_S
    assert owners(cluster)["bob"] == "serving", "a pin comes on top"
    cluster.run(60.0)
    assert in_force(cluster) == [("pin", "dan")]
    assert owners(cluster)["dan"] == "serving"
    give(cluster, name, "unpin", SMOL.digest, "dan")
    cluster.run_until(lambda: "dan" not in owners(cluster), DECIDED_S + DRAIN_S + 3.0)
    cluster.run(30.0)
    assert in_force(cluster) == []
    assert owners(cluster) == {"bob": "serving"}
    assert SMOL.digest not in cluster.machines["dan"].loaded


@pytest.mark.parametrize("giver", ["bob", "ada", "dan"])
def test_a_drain_cuts_over_without_a_moment_unserved(giver: str) -> None:
    cluster = mesh_of(4, prepare=watch)
    gaps: list[tuple[float, str]] = []

    def check() -> None:
        gaps.extend(
            (cluster.now, name) for name in cluster.machines if not is_served(cluster, name)
        )

    cluster.world.loop.after_each.append(check)
    give(cluster, giver, "drain", "", "bob")
    cluster.run_until(lambda: "bob" not in owners(cluster), DRAIN_S + 10.0)
    cluster.run(30.0)
    assert gaps == []
    assert SMOL.digest not in cluster.machines["bob"].loaded, "it has let go of it"
    assert cluster.stack("bob").agreement._duties.is_drained
    (owner,) = owners(cluster)
    assert loads(cluster)[owner] == 1
    give(cluster, giver, "undrain", "", "bob")
    cluster.run(30.0)
    assert gaps == []
    assert owners(cluster)["bob"] == "serving", "its operator wants it there"
    assert in_force(cluster) == []


def test_what_drains_has_its_time_and_no_more() -> None:
    cluster = mesh_of(4, prepare=watch)
    give(cluster, "ada", "drain", "", "bob")
    cluster.run_until(lambda: owners(cluster).get("bob") == "draining", 10.0)
    took_s = cluster.run_until(lambda: "bob" not in owners(cluster), 2 * DRAIN_S)
    assert DRAIN_S <= took_s <= DRAIN_S + 1.5


def test_a_drain_with_nowhere_to_go_leaves_the_model_served() -> None:
    cluster = mesh_of(3, standbys=(), prepare=watch)
    give(cluster, "bob", "drain", "", "bob")
    cluster.run(60.0)
    assert is_served_everywhere(cluster)


def test_an_order_outlives_the_leader_that_heard_it() -> None:
    for after_s in (0.0, 0.015, 0.03, 0.1):
        cluster = mesh_of(5, prepare=watch)
        first = leader(cluster)
        giver = next(name for name in cluster.machines if name not in (first, "bob"))
        give(cluster, giver, "pin", SMOL.digest, "eve")
        cluster.run(after_s)
        cluster.kill(first)
        cluster.run(20.0)
        assert owners(cluster, giver).get("eve") == "serving"
        restart(cluster, first)
        cluster.run(20.0)
        assert in_force(cluster, first) == [("pin", "eve")]


def test_an_order_given_while_cut_off_is_heard_afterwards() -> None:
    cluster = mesh_of(4, prepare=watch)
    name = a_follower(cluster)
    cluster.partition([name], [other for other in cluster.machines if other != name])
    cluster.run(10.0)
    give(cluster, name, "pin", SMOL.digest, "dan")
    cluster.run(5.0)
    cluster.heal()
    cluster.run_until(cluster.complete, 60.0)
    cluster.run(10.0)
    assert ("pin", "dan") in in_force(cluster)


def test_an_order_that_was_taken_back_cannot_be_brought_again() -> None:
    cluster = mesh_of(4, prepare=watch)
    said: list[Orders] = []

    def hear(machine: Machine, effect: Effect) -> None:
        if isinstance(effect, Send) and isinstance(effect.message, Orders):
            said.append(effect.message)

    cluster.world.on_effect.append(hear)
    give(cluster, "dan", "pin", SMOL.digest, "dan")
    cluster.run(10.0)
    give(cluster, "dan", "unpin", SMOL.digest, "dan")
    cluster.run(30.0)
    assert in_force(cluster) == []
    for voter in voters(cluster):
        cluster.tell(voter, said[0], sender=cluster.machines["bob"].peer_id)
    cluster.run(10.0)
    assert in_force(cluster) == []
    assert owners(cluster) == {"bob": "serving"}
    refused = [cluster.stack(name).agreement.refused for name in voters(cluster)]
    assert all(each["an order of long ago"] == 1 for each in refused)


def test_more_orders_than_a_block_holds_wait_and_harm_nothing() -> None:
    cluster = mesh_of(3, prepare=watch)
    for number in range(70):
        give(cluster, "ada", "pin", f"{number:064x}", "bob")
    cluster.run(5.0)
    assert len(in_force(cluster)) == 64
    assert cluster.complete()
    give(cluster, "ada", "unpin", f"{3:064x}", "bob")
    cluster.run(60.0)
    assert len(in_force(cluster)) <= 64
    assert cluster.complete()
    assert is_served_everywhere(cluster)


def test_a_busy_replica_gets_company_and_an_idle_one_loses_it_again() -> None:
    cluster = mesh_of(4, prepare=watch)
    busy = msgspec.structs.replace(SMOL, slots_busy=4, queue_depth=2)
    cluster.machines["bob"].models[SMOL.digest] = (busy, a_holding(SMOL))
    cluster.tell("bob", SetOffers((busy,)))
    cluster.run(25.0)
    assert owners(cluster) == {"bob": "serving"}, "a burst is no reason"
    cluster.run_until(lambda: list(owners(cluster).values()) == ["serving"] * 2, 20.0)
    (helper,) = set(owners(cluster)) - {"bob"}
    cluster.run(120.0)
    assert len(owners(cluster)) == 2, "half as busy is not idle"
    cluster.machines["bob"].models[SMOL.digest] = (SMOL, a_holding(SMOL))
    cluster.tell("bob", SetOffers((SMOL,)))
    cluster.run(280.0)
    assert len(owners(cluster)) == 2
    cluster.run(60.0)
    assert owners(cluster) == {"bob": "serving"}, "what its operator wants stays"
    assert SMOL.digest not in cluster.machines[helper].loaded


def test_a_second_replica_outlives_the_leader_that_called_for_it() -> None:
    cluster = mesh_of(8, prepare=watch)
    busy = msgspec.structs.replace(SMOL, slots_busy=4, queue_depth=2)
    cluster.machines["bob"].models[SMOL.digest] = (busy, a_holding(SMOL))
    cluster.tell("bob", SetOffers((busy,)))
    cluster.run_until(lambda: list(owners(cluster).values()) == ["serving"] * 2, 60.0)
    before = set(owners(cluster))
    for _ in range(3):
        gone = next(n for n in voters(cluster, "bob") if n not in before)
        cluster.kill(gone)
        cluster.run(40.0)
    assert set(owners(cluster, "bob")) == before
