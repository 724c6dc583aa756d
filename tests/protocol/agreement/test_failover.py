"""Nodes die, are cut off, fall asleep, and come back."""

from __future__ import annotations

import pytest

from meshnode.messages import LINEAGE_MAX
from meshnode.protocol.stack import RecoverQuorum
from tests.protocol.agreement.invariants import watch
from tests.protocol.agreement.scenes import (
    NAMES,
    OTHER,
    SETTLES_S,
    SMOL,
    awake,
    epochs,
    is_served,
    is_served_everywhere,
    leader,
    loaders,
    loads,
    mesh_of,
    owners,
    restart,
    standbys,
    view,
    voters,
)
from tests.protocol.cluster import LOAD_S, SILENCE_S, Cluster, a_holding

soak = pytest.mark.soak
SERVED_AGAIN_S = 5.0
"""L2."""


def victims(cluster: Cluster, roles: str) -> list[str]:
    (owner,) = owners(cluster)
    (standby,) = standbys(cluster)
    by_role = {"leader": leader(cluster), "owner": owner, "standby": standby}
    return list(dict.fromkeys(by_role[role] for role in roles.split("+")))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("roles", ["leader", "owner", "standby", "leader+owner", "owner+standby"])
def test_the_model_is_served_again_and_nobody_loads_who_need_not(roles: str, seed: int) -> None:
    cluster = mesh_of(5, seed, prepare=watch)
    cluster.run(seed / 3)
    dead, before, standby = victims(cluster, roles), loads(cluster), standbys(cluster)
    owner_dies = "owner" in roles
    for name in dead:
        cluster.kill(name)
    took_s = cluster.run_until(lambda: is_served_everywhere(cluster), 20.0)
    assert took_s <= SERVED_AGAIN_S
    cluster.run(30.0)
    assert is_served_everywhere(cluster)
    loading = loaders(cluster, before)
    if not owner_dies:
        assert loading == [], "its owner lives"
    elif standby[0] in dead:
        assert len(loading) == 1, "one, and not all that have the file"
    else:
        assert loading == standby
    assert len(standbys(cluster, awake(cluster)[0])) == 1, "and there is an heir again"

    for name in dead:  # from its disk: `watch` sees to it that no epoch falls and no vote is broken
        restart(cluster, name)
    cluster.run_until(lambda: len(set(epochs(cluster).values())) == 1, 5.0)
    cluster.run(30.0)
    assert is_served_everywhere(cluster)
    assert len(set(epochs(cluster).values())) == 1


def test_an_owner_that_is_back_serves_again_if_its_operator_wants_it() -> None:
    cluster = mesh_of(5, prepare=watch)
    cluster.kill("bob")
    cluster.run(10.0)
    restart(cluster, "bob")
    cluster.run(20.0)
    assert owners(cluster)["bob"] == "serving"
    assert is_served_everywhere(cluster)


def two_models(seed: int) -> Cluster:
    """Two owners, three standbys that have both files and room for one."""
    cluster = Cluster(seed)
    watch(cluster)
    both = tuple((offer, a_holding(offer, wanted=False)) for offer in (SMOL, OTHER))
    cluster.start("ada", is_root=True, models=both, memory_bytes=3 * 2**29)
    for name, offer in (("bob", SMOL), ("cleo", OTHER)):
        cluster.start(name, ["ada"], models=((offer, a_holding(offer)),))
    for name in ("dan", "eve"):
        cluster.start(name, ["ada"], models=both, memory_bytes=3 * 2**29)
    cluster.run(SETTLES_S)
    return cluster


@pytest.mark.parametrize("seed", range(5))
def test_two_models_that_lose_their_owners_at_once_get_one_standby_each(seed: int) -> None:
    cluster = two_models(seed)
    assert owners(cluster) == {"bob": "serving"}
    assert owners(cluster, model=OTHER.digest) == {"cleo": "serving"}
    assert standbys(cluster) != standbys(cluster, model=OTHER.digest)
    cluster.run(seed / 5)
    before = loads(cluster)
    cluster.kill("bob")
    cluster.kill("cleo")
    took_s = cluster.run_until(
        lambda: is_served_everywhere(cluster) and is_served_everywhere(cluster, OTHER.digest), 20.0
    )
    assert took_s <= SERVED_AGAIN_S
    cluster.run(30.0)
    after = loads(cluster)
    assert sum(after.values()) - sum(before.values()) == 2, "no stampede"
    assert len(owners(cluster)) == len(owners(cluster, model=OTHER.digest)) == 1
    assert set(owners(cluster)).isdisjoint(owners(cluster, model=OTHER.digest))


@pytest.mark.parametrize("seed", range(3))
def test_the_majority_decides_and_the_minority_waits(seed: int) -> None:
    cluster = mesh_of(5, seed, owners=("dan",), prepare=watch)
    cluster.partition(NAMES[:3], NAMES[3:5])
    before = epochs(cluster)
    cluster.run(25.0)
    assert epochs(cluster)["dan"] == before["dan"], "two of five decide nothing"
    assert epochs(cluster)["ada"] > before["ada"]
    assert all(is_served(cluster, name) for name in NAMES[:3]), "by one of the majority"
    assert is_served(cluster, "eve"), "and what is loaded goes on answering"
    assert any("no quorum" in what for what, _ in view(cluster, "eve").trouble)
    cluster.heal()
    cluster.run_until(cluster.complete, 60.0)
    took_s = cluster.run_until(lambda: len(set(epochs(cluster).values())) == 1, 10.0)
    assert took_s <= 2.0, "L4"
    cluster.run(20.0)
    settled = epochs(cluster), loads(cluster)
    assert is_served_everywhere(cluster)
    cluster.run(120.0)
    assert (epochs(cluster), loads(cluster)) == settled, "L3: and there is nothing left to move"


@pytest.mark.parametrize(("one", "other"), [("ada", "bob"), ("cleo", "bob"), ("ada", "cleo")])
def test_two_that_cannot_reach_each_other_do_not_keep_the_rest_busy(one: str, other: str) -> None:
    """The leader and the owner; a voter and the owner; two voters."""
    cluster = mesh_of(5, prepare=watch)
    cluster.sever(one, other)
    cluster.run(60.0)
    settled = epochs(cluster), loads(cluster)
    cluster.delivered.clear()
    cluster.run(120.0)
    assert (epochs(cluster), loads(cluster)) == settled
    rate = cluster.delivered.total() / 120.0 / 5
    assert rate <= 15.0, f"{rate:.1f} messages per node and second: {cluster.delivered}"
    assert is_served(cluster, "eve")
    cluster.heal()
    cluster.run_until(cluster.complete, 90.0)
    cluster.run(10.0)
    assert is_served_everywhere(cluster)
    assert len(set(epochs(cluster).values())) == 1


# --- suspended machines --------------------------------------------------------------------------


@pytest.mark.parametrize("asleep_s", [1.5, 10.0, 90.0, pytest.param(3600.0, marks=soak)])
@pytest.mark.parametrize("sleeper", ["ada", "bob", "dan"])
def test_a_machine_that_slept_harms_nobody_and_catches_up(sleeper: str, asleep_s: float) -> None:
    """The leader, the owner, and a voter."""
    cluster = mesh_of(5, prepare=watch)
    cluster.sleep(sleeper)
    cluster.run(asleep_s)
    if asleep_s > SILENCE_S + SERVED_AGAIN_S:
        assert is_served_everywhere(cluster)
    asleep, before = view(cluster, sleeper).epoch, loads(cluster)
    cluster.wake(sleeper)
    cluster.run(SERVED_AGAIN_S)
    others = [name for name in awake(cluster) if name != sleeper]
    assert loaders(cluster, before) in ([], [sleeper]), "who wakes may load what it owns"
    assert all(is_served(cluster, name) for name in others)
    cluster.run(70.0)
    assert len(set(epochs(cluster).values())) == 1
    if asleep_s > 60.0:
        assert view(cluster, sleeper).epoch > asleep
    assert is_served_everywhere(cluster)
    assert len(voters(cluster)) == 5
    settled = epochs(cluster)
    cluster.run(120.0)
    assert epochs(cluster) == settled


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_lone_voter_that_wakes_without_a_network_takes_nothing_from_others(sleeps: bool) -> None:
    """The lid opens, the wireless is back two seconds later: nobody has died."""
    cluster = mesh_of(2, owners=(), standbys=("bob",), prepare=watch)
    before = loads(cluster), epochs(cluster)
    if sleeps:
        cluster.sleep("ada")
        cluster.run(600.0)
        cluster.partition(["ada"], ["bob"])
        cluster.wake("ada")
    else:
        cluster.kill("ada")
        cluster.run(600.0)
        cluster.partition(["ada"], ["bob"])
        restart(cluster, "ada")
    cluster.run(1.0)
    cluster.heal()
    cluster.run(90.0)
    assert owners(cluster) == {"bob": "serving"}
    assert loads(cluster) == before[0]
    assert epochs(cluster) == before[1]


# --- a quorum that is lost -----------------------------------------------------------------------


def test_the_root_recovers_a_lost_quorum_and_who_was_lost_follows_when_it_is_back() -> None:
    cluster = mesh_of(3, owners=("cleo",), prepare=watch)
    cluster.kill("bob")
    cluster.kill("cleo")
    cluster.run(60.0)
    before = view(cluster, "ada")
    assert any("recover" in remedy for _, remedy in before.trouble)
    cluster.tell("ada", RecoverQuorum())
    cluster.run(10.0)
    assert view(cluster, "ada").epoch > 2**32
    assert voters(cluster) == ["ada"]
    assert is_served_everywhere(cluster)
    for name in ("bob", "cleo"):
        restart(cluster, name)
    cluster.run(20.0)
    assert len(set(epochs(cluster).values())) == 1
    assert voters(cluster) == ["ada", "bob", "cleo"]
    assert owners(cluster)["cleo"] == "serving"
    assert is_served_everywhere(cluster)


def test_who_was_away_for_more_changes_of_voters_than_one_message_holds_catches_up() -> None:
    cluster = mesh_of(3, prepare=watch)
    cluster.kill("cleo")
    cluster.run(5.0)
    for _ in range(LINEAGE_MAX + 36):
        cluster.tell("ada", RecoverQuorum())
        cluster.run(0.2)
    assert view(cluster, "ada").epoch > (LINEAGE_MAX + 35) * 2**32
    cluster.start("dan", ["ada"])
    restart(cluster, "cleo")
    cluster.run_until(cluster.complete, 5.0)
    took_s = cluster.run_until(lambda: len(set(epochs_known(cluster))) == 1, 10.0)
    assert took_s <= 2.0
    cluster.run(20.0)
    assert len(voters(cluster)) == 3
    assert is_served_everywhere(cluster)


def epochs_known(cluster: Cluster) -> list[int]:
    """Of everybody; 0 for who does not know of the group yet."""
    found = [cluster.stack(name).agreement.views(cluster.now) for name in awake(cluster)]
    return [views[0].epoch if views else 0 for views in found]


def test_the_time_that_a_standby_loads_is_most_of_what_a_takeover_takes() -> None:
    cluster = mesh_of(5, prepare=watch)
    cluster.kill("bob")
    took_s = cluster.run_until(lambda: is_served_everywhere(cluster), 20.0)
    assert took_s <= SILENCE_S + LOAD_S + 0.5
