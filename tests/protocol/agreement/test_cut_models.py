"""A model that fits on nobody is cut: its parts are decided, loaded, taken over and given back."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from meshnode.messages import Item
from meshnode.pipeline.opening import complete, opening_of, refusal
from tests.protocol.agreement.invariants import watch
from tests.protocol.agreement.scenes import NAMES, SETTLES_S, give, items, name_of
from tests.protocol.cluster import Cluster, a_holding, an_offer

GIB = 2**30
LARGE = an_offer("large", "ef" * 32)
LAYERS = 30
CUT = {
    "bytes": 12 * GIB, "weight_bytes": 10 * GIB, "kv_bytes": GIB, "layers": LAYERS,
    "activation_bytes": 16384, "edge_bytes": GIB,
}  # fmt: skip
SERVED_AGAIN_S = 8.0
"""L2, and the load of a part."""


def mesh_of(count: int, seed: int = 1, **changes: object) -> Cluster:
    """All have the file, and nobody wants it in particular."""
    cluster = Cluster(seed)
    watch(cluster)
    holding = a_holding(LARGE, wanted=False, **{**CUT, **changes})
    for place, name in enumerate(NAMES[:count]):
        cluster.start(
            name, NAMES[:1] if place else (), models=((LARGE, holding),), is_root=place == 0
        )
    cluster.run(SETTLES_S)
    return cluster


def parts(cluster: Cluster, name: str = "ada") -> tuple[Item, ...]:
    return tuple(sorted(items(cluster, name, LARGE.digest), key=lambda item: item.shard))


def owners(cluster: Cluster, name: str = "ada") -> list[str]:
    return [name_of(cluster, item.owner) for item in parts(cluster, name)]


def is_served(cluster: Cluster) -> bool:
    """Whether the head could form a ring: its register names a complete replica, all of whose
    owners are awake, have loaded just that, and would let it open."""
    for name in [n for n, m in cluster.machines.items() if m.is_awake]:
        own = cluster.machines[name].peer_id
        assigned = cluster.stack(name).agreement.assigned(LARGE.digest)
        found = complete(assigned, own)
        if assigned is None or not found:
            continue
        opening = opening_of(assigned, found, bytes(16), "f32", 64)
        senders = [own, *opening.owners]
        return all(
            (machine := cluster.machines[name_of(cluster, item.owner)]).is_awake
            and machine.parts.get((LARGE.digest, item.shard.first, item.shard.end), False)
            and refusal(
                replace(opening, place=place), senders[place], item.owner,
                cluster.stack(machine.name).agreement.assigned(LARGE.digest),
            ) is None
            for place, item in enumerate(found)
        )  # fmt: skip
    return False


@pytest.mark.parametrize("seed", range(3))
def test_two_hold_what_one_cannot(seed: int) -> None:
    cluster = mesh_of(3, seed)
    assert len(parts(cluster)) == 2
    assert {item.shard.kind for item in parts(cluster)} == {"layers"}
    assert is_served(cluster)


def test_parts_begin_where_they_may() -> None:
    cluster = mesh_of(3, cut_every=4)
    assert [item.shard.first % 4 for item in parts(cluster)] == [0, 0]
    assert parts(cluster)[-1].shard.end == LAYERS
    assert is_served(cluster)


def test_a_model_that_cannot_be_cut_is_not() -> None:
    cluster = mesh_of(3, activation_bytes=0)
    assert parts(cluster) == ()


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("seed", range(3))
def test_a_part_whose_owner_dies_is_loaded_by_its_standby(which: int, seed: int) -> None:
    cluster = mesh_of(5, seed)
    before = parts(cluster)
    lost = before[which]
    standby, dead = name_of(cluster, lost.standbys[0]), name_of(cluster, lost.owner)
    cluster.kill(dead)
    took_s = cluster.run_until(lambda: is_served(cluster), 30.0)
    assert took_s <= SERVED_AGAIN_S
    asker = next(n for n, m in cluster.machines.items() if m.is_awake)
    after = parts(cluster, asker)
    assert name_of(cluster, after[which].owner) == standby
    kept = [item.owner for item in before if item is not lost]
    assert [item.owner for item in after if item.owner in kept] == kept, "nobody else moves"


def test_a_machine_that_can_hold_it_all_gets_it_all() -> None:
    cluster = mesh_of(3, bytes=7 * GIB, weight_bytes=5 * GIB)
    assert [item.shard.kind for item in parts(cluster)] == ["whole"]


@pytest.mark.parametrize("which", [0, -1])
def test_a_drained_owner_goes_once_another_has_its_layers(which: int) -> None:
    cluster = mesh_of(4)
    leaving = owners(cluster)[which]
    give(cluster, "ada", "drain", "", leaving)
    unserved_s = 0.0
    for _ in range(300):
        cluster.run(0.1)
        unserved_s += 0.0 if is_served(cluster) else 0.1
    assert leaving not in owners(cluster)
    assert len(parts(cluster)) == 2
    assert is_served(cluster)
    assert unserved_s == 0.0
