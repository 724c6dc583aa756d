"""A mesh's group: how it begins, who votes in it, and that it leaves well alone."""

from __future__ import annotations

import pytest

from tests.protocol.agreement.invariants import watch
from tests.protocol.agreement.scenes import (
    NAMES,
    SMOL,
    epochs,
    is_served_everywhere,
    leader,
    loads,
    mesh_of,
    owners,
    restart,
    standbys,
    view,
    voters,
)
from tests.protocol.cluster import Cluster, a_holding


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_a_mesh_founds_one_group_gives_it_voters_and_serves(count: int) -> None:
    cluster = mesh_of(count, prepare=watch)
    groups = {view(cluster, name).group for name in NAMES[:count]}
    assert len(groups) == 1
    assert len(voters(cluster)) == {1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 8: 5}[count]
    assert is_served_everywhere(cluster)
    assert len(set(epochs(cluster).values())) == 1
    assert view(cluster, "ada").epoch <= 5, "one step for the model, one or two for the voters"
    if count > 1:
        assert len(standbys(cluster)) == 1
        assert standbys(cluster)[0] not in owners(cluster)


def test_the_first_model_is_served_within_three_seconds() -> None:
    cluster = mesh_of(3, run_s=0.0, prepare=watch)
    took_s = cluster.run_until(lambda: is_served_everywhere_known(cluster), 10.0)
    assert took_s < 3.0


def is_served_everywhere_known(cluster: Cluster) -> bool:
    told = all(each.live.agreement.views(cluster.now) for each in cluster.machines.values())
    return told and is_served_everywhere(cluster)


def test_one_voter_is_said_plainly() -> None:
    cluster = mesh_of(2)
    (what, remedy), *_ = view(cluster, "bob").trouble
    assert "one voter" in what
    assert "third" in remedy
    assert not any("voter" in what for what, _ in view(mesh_of(1), "ada").trouble)
    assert view(mesh_of(3), "bob").trouble == ()


def test_ten_quiet_minutes_decide_nothing_and_cost_little() -> None:
    """L3, and the bound on messages: no block, no load, no more than 15 events a second."""
    for count in (2, 5):
        cluster = mesh_of(count, run_s=20.0, prepare=watch)
        before = epochs(cluster), loads(cluster)
        cluster.delivered.clear()
        cluster.run(600.0)
        assert (epochs(cluster), loads(cluster)) == before
        rate = cluster.delivered.total() / 600.0 / count
        assert rate <= 15.0, f"{rate:.1f} messages per node and second: {cluster.delivered}"


def test_who_leaves_for_good_is_replaced_by_a_spare_one_at_a_time() -> None:
    cluster = mesh_of(8, prepare=watch)
    gone = next(name for name in voters(cluster) if name not in ("ada", leader(cluster)))
    cluster.kill(gone)
    cluster.run(29.0)
    assert gone in voters(cluster), "a restart or an upgrade takes less"
    cluster.run(8.0)
    assert gone not in voters(cluster)
    assert len(voters(cluster)) == 5
    assert len(set(epochs(cluster).values())) == 1


def test_a_voter_that_is_back_in_time_stays() -> None:
    cluster = mesh_of(5, prepare=watch)
    before = voters(cluster)
    cluster.kill("dan")
    cluster.run(20.0)
    restart(cluster, "dan")
    cluster.run(40.0)
    assert voters(cluster) == before


def test_voters_become_fewer_as_nodes_leave() -> None:
    cluster = mesh_of(5, prepare=watch)
    cluster.kill("eve")
    cluster.run(45.0)
    assert len(voters(cluster)) == 3
    assert "eve" not in voters(cluster)
    cluster.kill("dan")
    cluster.run(45.0)
    assert len(voters(cluster)) == 3
    cluster.kill("cleo")
    cluster.run(45.0)
    assert len(voters(cluster)) == 1, "two voters would both be needed"
    assert is_served_everywhere(cluster)
    for name in ("cleo", "dan", "eve"):
        restart(cluster, name)
    cluster.run(40.0)
    assert len(voters(cluster)) == 5, "and more again as they come back"
    assert len(set(epochs(cluster).values())) == 1


def test_a_gateway_knows_what_is_decided_and_never_votes_or_owns() -> None:
    cluster = mesh_of(2, run_s=2.0, prepare=watch)
    cluster.start("gate", ["ada"], models=((SMOL, a_holding(SMOL)),), roles=("gateway",))
    cluster.run(20.0)
    assert voters(cluster) == ["ada"], "two nodes and a gateway are two nodes"
    assert "gate" not in owners(cluster)
    assert "gate" not in standbys(cluster)
    assert view(cluster, "gate").epoch == view(cluster, "ada").epoch


def test_a_root_that_has_lost_its_disk_founds_no_second_group() -> None:
    cluster = mesh_of(3, prepare=watch)
    group = view(cluster, "bob").group
    cluster.kill("ada")
    cluster.run(10.0)
    cluster.machines["ada"].disk.clear()
    restart(cluster, "ada")
    cluster.run(10.0)
    assert view(cluster, "ada").group == group
    assert view(cluster, "bob").group == group


def test_a_voter_that_has_lost_its_disk_abstains_and_is_replaced() -> None:
    cluster = mesh_of(5, prepare=watch)
    cluster.kill("dan")
    cluster.run(5.0)
    cluster.machines["dan"].disk.clear()
    restart(cluster, "dan")
    cluster.run(5.0)
    assert view(cluster, "dan").abstains or "dan" not in voters(cluster)
    cluster.start("fay", ["ada"])
    cluster.run(20.0)
    assert "fay" in voters(cluster)


@pytest.mark.parametrize("restarts", ["ada", "bob"])
@pytest.mark.parametrize("is_wanted", [True, False])
def test_the_restart_of_one_of_two_nodes_takes_nothing_from_the_other(
    restarts: str, is_wanted: bool
) -> None:
    """A lone voter comes back and knows nobody yet: that is no reason to call them dead."""
    other = "bob" if restarts == "ada" else "ada"
    cluster = mesh_of(2, owners=(other,) if is_wanted else (), standbys=(other,), prepare=watch)
    assert owners(cluster) == {other: "serving"}
    cluster.kill(restarts)
    cluster.run(6.0)
    before = cluster.machines[other].loads, view(cluster, other).epoch
    restart(cluster, restarts)
    cluster.run(20.0)
    assert owners(cluster) == {other: "serving"}
    assert (cluster.machines[other].loads, view(cluster, other).epoch) == before


def test_a_lone_voter_that_restarts_decides_nothing_before_it_knows_what_it_has() -> None:
    cluster = mesh_of(1, owners=("ada",))
    before = view(cluster, "ada")
    assert owners(cluster) == {"ada": "serving"}
    cluster.kill("ada")
    cluster.machines["ada"].models.clear()  # its files are still being read
    cluster.start("ada")
    cluster.run(3.0)
    assert view(cluster, "ada").epoch == before.epoch
    assert view(cluster, "ada").items == before.items
