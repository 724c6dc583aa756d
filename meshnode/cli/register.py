"""How what a mesh has agreed on looks in a terminal: who decides, who owns what, what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from meshnode.cli.output import print_table, short_peer, size, warn

if TYPE_CHECKING:
    from meshnode.console.snapshot import GroupSnapshot, ItemSnapshot, MeshSnapshot


def node_name(peer_id: str, own: str) -> str:
    return "this node" if peer_id == own else short_peer(peer_id)


def node_names(peer_ids: Iterable[str], own: str) -> str:
    return ", ".join(node_name(peer_id, own) for peer_id in peer_ids)


def warn_of(what: str, fix: str) -> None:
    warn(f"{what}\n  → {fix}")


def warn_of_no_group(mesh: MeshSnapshot) -> None:
    what = (
        "this mesh has agreed on nothing yet: every node serves what its own operator told it to, "
        "and nobody takes over from another"
    )
    if mesh.root_key_here:
        warn_of(what, "wait a second: this node made the mesh, and founds its group")
    else:
        warn_of(
            what,
            "start the node that made the mesh, in this version: it founds the group when it is "
            "seen once, and need not stay",
        )


def group_facts(group: GroupSnapshot, own: str) -> Iterable[tuple[str, str]]:
    """Who decides, and how far they are."""
    told = ", the next is being decided" if group.deciding else ""
    if group.deciding and group.view > 1:
        told += f" (try {group.view})"
    yield "epoch", f"{group.epoch}{told}"
    yield "voters", _voters(group, own)
    if group.abstains:
        yield "", "this node abstains: its disk has lost what it had voted; it will be replaced"
    for order in group.orders:
        what = "everything off" if order.action == "drain" else f"{order.name} on"
        where = node_name(order.peer, own)
        yield order.action, f"{what} {where} (ordered at {node_name(order.given_by, own)})"
    for claim in group.claims:
        safe = f", safe for {group.lease_s:.1f} s" if claim.holder == own else ""
        held = f"held by {node_name(claim.holder, own)} since epoch {claim.since}"
        yield "right", f"{claim.right}: {held}{safe}"


def _voters(group: GroupSnapshot, own: str) -> str:
    if len(group.voters) == 1:
        return f"{node_names((group.voters[0].peer_id,), own)} – one voter: no quorum to lose"
    named = []
    for voter in group.voters:
        notes = [] if voter.alive else ["does not answer"]
        notes += ["leads"] if voter.peer_id == group.leader else []
        note = f" ({', '.join(notes)})" if notes else ""
        named.append(node_name(voter.peer_id, own) + note)
    alive = sum(voter.alive for voter in group.voters)
    return f"{', '.join(named)} – {alive} of {len(named)} answer, {group.quorum} must"


def print_items(items: Iterable[ItemSnapshot], own: str) -> None:
    """The register as a table."""
    rows = list(items)
    is_cut = any(item.layers for item in rows)
    columns = ("model", ">replica", *(("layers",) if is_cut else ()), "owner", "state")
    print_table(
        (*columns, ">memory", "standbys"),
        (
            (
                item.name,
                str(item.replica),
                *((item.layers or "all",) if is_cut else ()),
                node_name(item.owner, own),
                item.state,
                size(item.bytes),
                node_names(item.standbys, own) or "–",
            )
            for item in rows
        ),
    )


def print_groups(groups: Iterable[GroupSnapshot], own: str) -> None:
    for group in groups:
        click.echo()
        if group.items:
            click.echo(f"who owns what (epoch {group.epoch}):")
            print_items(group.items, own)
        else:
            click.echo(f"epoch {group.epoch}: nobody owns a model yet")
