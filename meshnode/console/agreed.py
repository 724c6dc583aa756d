"""What a mesh has agreed on, as people see it: from the cores' views to snapshots."""

from __future__ import annotations

import re
from collections.abc import Mapping

from meshnode.console.snapshot import (
    ClaimSnapshot,
    GroupSnapshot,
    ItemSnapshot,
    OrderSnapshot,
    TroubleSnapshot,
    VoterSnapshot,
)
from meshnode.messages import Item, Shard
from meshnode.protocol.agreement import GroupView

_DIGEST = re.compile(r"[0-9a-f]{64}")


def group_snapshot(view: GroupView, names: Mapping[str, str]) -> GroupSnapshot:
    """`names` maps the digests of all models that are known here to what people call them."""
    named = {**names, **{item.model: item.name for item in view.items}}
    return GroupSnapshot(
        id=view.group,
        epoch=view.epoch,
        faults=view.faults,
        voters=tuple(VoterSnapshot(voter, alive) for voter, alive in view.voters),
        quorum=view.quorum,
        leader=view.leader,
        votes=view.votes,
        abstains=view.abstains,
        deciding=view.is_deciding,
        view=view.view,
        items=tuple(item_snapshot(item) for item in view.items),
        claims=tuple(ClaimSnapshot(*claim) for claim in view.claims),
        orders=tuple(
            OrderSnapshot(action, subject, named.get(subject, subject[:12]), peer, given_by)
            for action, subject, peer, given_by in view.orders
            # The others stand in the block that heeds them, and order nothing any more.
            if action in ("pin", "drain")
        ),
        lease_s=view.lease_s,
        trouble=tuple(TroubleSnapshot(_in_words(what, named), fix) for what, fix in view.trouble),
    )


def item_snapshot(item: Item) -> ItemSnapshot:
    return ItemSnapshot(
        model=item.model,
        name=item.name,
        replica=item.replica,
        layers=_layers(item.shard),
        owner=item.owner,
        standbys=item.standbys,
        state=item.state,
        bytes=item.bytes,
    )


def _layers(shard: Shard) -> str:
    if shard.kind == "whole":
        return ""
    unit = "" if shard.kind == "layers" else f"{shard.kind} "
    return f"{unit}{shard.first}–{shard.end - 1} of {shard.of}"


def _in_words(what: str, names: Mapping[str, str]) -> str:
    """A bare digest is the planner's way to say that it found no place for a model."""
    if _DIGEST.fullmatch(what):
        return f"{names.get(what, what[:12])} is served by nobody: no node has room for it"
    return what
