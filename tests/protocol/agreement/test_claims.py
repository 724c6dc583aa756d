"""Exclusive rights through the whole stack: claimed, given back, and taken over from the dead."""

from __future__ import annotations

import pytest

from meshnode.protocol.lease import LEASE_S, WAIT_S
from meshnode.protocol.stack import GiveOrder
from tests.protocol.agreement.invariants import watch
from tests.protocol.agreement.scenes import (
    leader,
    mesh_of,
    name_of,
    restart,
    view,
)
from tests.protocol.cluster import SILENCE_S, Cluster

PEN = "the-pen"


def ask(cluster: Cluster, name: str, action: str) -> None:
    cluster.tell(name, GiveOrder(action, PEN, ""))  # type: ignore[arg-type]


def holds(cluster: Cluster, name: str) -> bool:
    return cluster.stack(name).agreement.holds_right(PEN, cluster.now)


def holder(cluster: Cluster, asked: str = "ada") -> str | None:
    """By the newest block that `asked` knows."""
    return next(
        (name_of(cluster, peer) for right, peer, _ in view(cluster, asked).claims if right == PEN),
        None,
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_right_is_claimed_kept_and_given_back(count: int) -> None:
    cluster = mesh_of(count, prepare=watch)
    name = list(cluster.machines)[-1]
    ask(cluster, name, "claim")
    took_s = cluster.run_until(lambda: holds(cluster, name), 10.0)
    assert took_s <= 2.0
    checks = watch(cluster)
    cluster.run(60.0)
    assert [who for _, _, who in checks.handed] == [name], "heartbeats keep it without a gap"
    ask(cluster, name, "release")
    assert not holds(cluster, name), "at once, whenever others hear of it"
    cluster.run_until(lambda: holder(cluster) is None, 5.0)


def test_the_first_of_two_gets_it_and_the_other_when_it_is_free() -> None:
    cluster = mesh_of(5, prepare=watch)
    ask(cluster, "dan", "claim")
    cluster.run_until(lambda: holds(cluster, "dan"), 5.0)
    ask(cluster, "eve", "claim")
    cluster.run(20.0)
    assert holds(cluster, "dan")
    ask(cluster, "dan", "release")
    took_s = cluster.run_until(lambda: holds(cluster, "eve"), 10.0)
    assert took_s <= 3.0, "a release needs not be waited out"


@pytest.mark.parametrize("victim", ["dan", "ada"])
def test_a_dead_holders_right_is_taken_over_when_its_lease_is_over(victim: str) -> None:
    """Also if it was the leader."""
    cluster = mesh_of(5, prepare=watch)
    assert leader(cluster) == "ada"
    ask(cluster, victim, "claim")
    cluster.run_until(lambda: holds(cluster, victim), 5.0)
    cluster.run(5.0)
    cluster.kill(victim)
    cluster.run(0.5)
    ask(cluster, "eve", "claim")
    took_s = cluster.run_until(lambda: holds(cluster, "eve"), 20.0)
    assert took_s >= LEASE_S - 1.0 - 0.5, "it was promised"
    assert took_s <= SILENCE_S + WAIT_S + 2.0
    restart(cluster, victim)
    cluster.run(10.0)
    assert not holds(cluster, victim), "and it knows that it has lost it"


def test_a_holder_that_restarts_must_claim_again() -> None:
    cluster = mesh_of(5, prepare=watch)
    ask(cluster, "dan", "claim")
    cluster.run_until(lambda: holds(cluster, "dan"), 5.0)
    cluster.kill("dan")
    cluster.run(0.5)
    restart(cluster, "dan")
    cluster.run(10.0)
    assert holder(cluster) == "dan"
    assert not holds(cluster, "dan"), "the run before may have given it back"
    ask(cluster, "dan", "claim")
    cluster.run_until(lambda: holds(cluster, "dan"), 5.0)


@pytest.mark.parametrize("asleep_s", [1.5, 30.0, 120.0])
def test_a_holder_that_sleeps_wakes_without_its_lease(asleep_s: float) -> None:
    cluster = mesh_of(5, prepare=watch)
    ask(cluster, "dan", "claim")
    cluster.run_until(lambda: holds(cluster, "dan"), 5.0)
    cluster.sleep("dan")
    ask(cluster, "eve", "claim")
    cluster.run(asleep_s)
    assert holds(cluster, "dan") == (asleep_s < 2.0)
    assert holds(cluster, "eve") == (asleep_s > 20.0)
    cluster.wake("dan")
    cluster.run(20.0)
    assert holder(cluster) == ("dan" if asleep_s < SILENCE_S else "eve")
    assert holds(cluster, "dan") != holds(cluster, "eve")


def test_a_holder_that_is_cut_off_stops_before_another_begins() -> None:
    cluster = mesh_of(5, prepare=watch)
    ask(cluster, "dan", "claim")
    cluster.run_until(lambda: holds(cluster, "dan"), 5.0)
    checks = watch(cluster)
    cluster.partition(["dan"], ["ada", "bob", "cleo", "eve"])
    ask(cluster, "eve", "claim")
    cluster.run(30.0)
    assert holds(cluster, "eve")
    assert [who for _, _, who in checks.handed] == ["dan", None, "eve"]
    cluster.heal()
    cluster.run_until(cluster.complete, 60.0)
    cluster.run(5.0)
    assert holds(cluster, "eve")


def test_whom_its_leader_cannot_reach_keeps_its_right_while_a_quorum_hears_it() -> None:
    cluster = mesh_of(5, prepare=watch)
    ask(cluster, "dan", "claim")
    cluster.run_until(lambda: holds(cluster, "dan"), 5.0)
    checks = watch(cluster)
    cluster.sever("dan", leader(cluster))
    ask(cluster, "eve", "claim")
    cluster.run(25.0)
    assert holds(cluster, "dan")
    assert [who for _, _, who in checks.handed] == ["dan"]
    cluster.tell("bob", GiveOrder("drain", "", cluster.machines["bob"].peer_id))
    took_s = cluster.run_until(lambda: len(view(cluster, "eve").orders) > 0, 20.0)
    assert took_s <= 5.0, "and nothing else waits for that"


def test_more_rights_than_a_block_holds_are_not_given() -> None:
    cluster = mesh_of(3, prepare=watch)
    for name in ("ada", "bob"):
        for number in range(40):
            cluster.tell(name, GiveOrder("claim", f"right-{number}-of-{name}", ""))
    cluster.run(20.0)
    assert cluster.complete()
    assert len(view(cluster, "cleo").claims) == 64
