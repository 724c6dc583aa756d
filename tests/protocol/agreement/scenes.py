"""Meshes to start from, and what is asked of them again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meshnode.messages import Item
from meshnode.protocol.overview import GroupView
from meshnode.protocol.stack import GiveOrder
from tests.protocol.cluster import Cluster, a_holding, an_offer

SMOL = an_offer()
OTHER = an_offer("other", "cd" * 32)
NAMES = ("ada", "bob", "cleo", "dan", "eve", "fay", "gus", "hal")
SETTLES_S = 12.0
"""Everybody has met, and nothing is left to decide."""


def mesh_of(
    count: int,
    seed: int = 1,
    *,
    owners: Sequence[str] = ("bob",),
    standbys: Sequence[str] | None = None,
    run_s: float = SETTLES_S,
    prepare: Callable[[Cluster], object] = lambda cluster: None,
) -> Cluster:
    """`ada` has made the mesh; `owners` serve the model, and all others (or just `standbys`) have
    its file."""
    cluster = Cluster(seed)
    prepare(cluster)
    for place, name in enumerate(NAMES[:count]):
        has = name in owners or standbys is None or name in standbys
        models = ((SMOL, a_holding(SMOL, wanted=name in owners)),) if has else ()
        cluster.start(name, NAMES[:1] if place else (), models=models, is_root=place == 0)
    cluster.run(run_s)
    return cluster


def restart(cluster: Cluster, name: str) -> None:
    """Switch a machine on again; it knows whom to dial from its disk."""
    cluster.start(name, [other for other in cluster.machines if other != name])


def view(cluster: Cluster, name: str) -> GroupView:
    (found,) = cluster.stack(name).agreement.views(cluster.now)
    return found


def epochs(cluster: Cluster) -> dict[str, int]:
    """The newest epoch of everybody who is awake."""
    return {
        name: view(cluster, name).epoch
        for name, machine in cluster.machines.items()
        if machine.is_awake
    }


def voters(cluster: Cluster, name: str = "ada") -> list[str]:
    return sorted(name_of(cluster, voter) for voter, _ in view(cluster, name).voters)


def leader(cluster: Cluster, name: str = "ada") -> str:
    return name_of(cluster, view(cluster, name).leader)


def name_of(cluster: Cluster, peer: str) -> str:
    names = (n for n, machine in cluster.machines.items() if machine.peer_id == peer)
    return next(names, "nobody")


def items(cluster: Cluster, name: str, model: str = SMOL.digest) -> tuple[Item, ...]:
    return tuple(item for item in view(cluster, name).items if item.model == model)


def owners(cluster: Cluster, name: str = "ada", model: str = SMOL.digest) -> dict[str, str]:
    """Who has the model in which state, by the newest block that `name` knows."""
    return {name_of(cluster, item.owner): item.state for item in items(cluster, name, model)}


def standbys(cluster: Cluster, name: str = "ada", model: str = SMOL.digest) -> list[str]:
    return [
        name_of(cluster, peer) for item in items(cluster, name, model) for peer in item.standbys
    ]


def awake(cluster: Cluster) -> list[str]:
    return [name for name, machine in cluster.machines.items() if machine.is_awake]


def is_served(cluster: Cluster, asker: str, model: str = SMOL.digest) -> bool:
    """Whether a gateway on `asker` would find a replica that is loaded, alive and in order."""
    for name, state in owners(cluster, asker, model).items():
        machine = cluster.machines[name]
        knows = name == asker or machine.peer_id in {
            member.peer for member in cluster.stack(asker).members()
        }
        if state == "serving" and machine.is_awake and model in machine.loaded and knows:
            return True
    return False


def is_served_everywhere(cluster: Cluster, model: str = SMOL.digest) -> bool:
    return all(is_served(cluster, name, model) for name in awake(cluster))


def loads(cluster: Cluster) -> dict[str, int]:
    return {name: machine.loads for name, machine in cluster.machines.items()}


def loaders(cluster: Cluster, before: dict[str, int]) -> list[str]:
    """Who has begun to load something since."""
    return sorted(name for name, count in loads(cluster).items() if count > before[name])


def give(cluster: Cluster, name: str, action: str, subject: str = "", peer: str = "") -> None:
    """An order by the operator of `name`."""
    target = cluster.machines[peer].peer_id if peer else ""
    cluster.tell(name, GiveOrder(action, subject, target))  # type: ignore[arg-type]
