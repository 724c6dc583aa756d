"""Whether a stage may open: what a peer says about a pipeline against what the mesh has decided.

Pure. Both ends hold the same register, give or take an epoch. Whoever knows less refuses, and is
asked again a moment later; nobody computes for a pipeline that was not decided.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from msgspec.structs import replace

from meshnode.config import KvType
from meshnode.engine.stages.steps import PIPELINE_BYTES, Codec
from meshnode.messages import Item, Opening
from meshnode.protocol.agreement import Assigned

__all__ = ["complete", "next_opening", "opening_of", "refusal"]


def complete(assigned: Assigned | None, owner: str) -> tuple[Item, ...]:
    """The items, in order of the layers, of the replica whose last part `owner` has, if all are
    serving; else none. Of several the first."""
    if assigned is None:
        return ()
    for items in _replicas(assigned.items):
        if items[-1].owner == owner and all(item.state != "loading" for item in items):
            return items
    return ()


def opening_of(
    assigned: Assigned,
    items: tuple[Item, ...],
    pipeline: bytes,
    codec: Codec,
    context_tokens: int,
    kv_type: KvType = "f16",
) -> Opening:
    """What the head says to the owner of the first layers."""
    assert len(pipeline) == PIPELINE_BYTES
    return Opening(
        group=assigned.group,
        epoch=assigned.epoch,
        model=items[0].model,
        replica=items[0].replica,
        owners=tuple(item.owner for item in items),
        cuts=_cuts(items),
        place=0,
        pipeline=pipeline,
        codec=codec,
        context_tokens=context_tokens,
        kv_type=kv_type,
    )


def next_opening(opening: Opening) -> Opening:
    """What its receiver says to the owner of the layers behind its own."""
    return replace(opening, place=opening.place + 1)


def refusal(opening: Opening, sender: str, own: str, assigned: Assigned | None) -> str | None:
    """Why `own` must not take steps from `sender`; None if the register says that it shall."""
    owners, cuts, place = opening.owners, opening.cuts, opening.place
    if len(cuts) != len(owners) + 1 or list(cuts) != sorted(set(cuts)) or cuts[0] != 0:
        return "these are no layers"
    if place >= len(owners) or owners[place] != own or len(set(owners)) != len(owners):
        return "not the owner"
    if owners[place - 1] != sender:  # before the first comes the head, which is the last
        return "not from the owner before it"
    if assigned is None or assigned.group != opening.group:
        return "nothing is decided about the model here"
    for items in _replicas(assigned.items):
        if (
            items[0].replica == opening.replica
            and tuple(item.owner for item in items) == owners
            and _cuts(items) == cuts
        ):
            return None
    which = "newer" if opening.epoch < assigned.epoch else "other"
    return f"epoch {assigned.epoch} has {which} owners"


def _replicas(items: Iterable[Item]) -> list[tuple[Item, ...]]:
    """The replicas that are cut, each in order of the layers, if none of it is missing."""
    found: defaultdict[int, list[Item]] = defaultdict(list)
    for item in items:
        if item.shard.kind == "layers":
            found[item.replica].append(item)
    ordered = (tuple(sorted(each, key=lambda item: item.shard)) for each in found.values())
    return [each for each in ordered if _is_whole(each)]


def _is_whole(items: tuple[Item, ...]) -> bool:
    ends = [0, *(item.shard.end for item in items)]
    return [item.shard.first for item in items] == ends[:-1] and ends[-1] == items[0].shard.of


def _cuts(items: tuple[Item, ...]) -> tuple[int, ...]:
    return (0, *(item.shard.end for item in items))
