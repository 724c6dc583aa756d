"""A group in words for people: who votes, who owns what, what is degraded, what would fix it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshnode.messages import Item
from meshnode.protocol.group import Group, Scene
from meshnode.protocol.quorum import Faults
from meshnode.protocol.rules import serving_models

__all__ = ["GroupView", "view_of"]


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group as `status` shows it."""

    group: str
    epoch: int
    faults: Faults
    voters: tuple[tuple[str, bool], ...]
    """Each with whether it is alive, as far as this node can tell."""
    quorum: int
    leader: str
    votes: bool
    abstains: bool
    is_deciding: bool
    view: int
    items: tuple[Item, ...]
    claims: tuple[tuple[str, str, int], ...]
    orders: tuple[tuple[str, str, str, str], ...]
    """(action, subject, peer, who gave it)."""
    lease_s: float
    """How much longer our own exclusive rights are safe; 0 for not at all."""
    trouble: tuple[tuple[str, str], ...]
    """What is degraded, each with what would fix it."""


def view_of(group: Group, scene: Scene) -> GroupView:
    """The group at this instant."""
    register, head = group.register, group.head
    until = group.lease.until(register.voters, register.quorum)
    return GroupView(
        group=register.group,
        epoch=head.epoch,
        faults=register.genesis.faults,
        voters=tuple((voter, scene.is_alive(voter)) for voter in register.voters),
        quorum=register.quorum,
        leader=register.leader(),
        votes=register.votes,
        abstains=not register.has_memory,
        is_deciding=register.is_deciding,
        view=register.view,
        items=head.body.items,
        claims=tuple((c.right, c.holder, c.since) for c in head.body.claims),
        orders=tuple(
            (order.action, order.subject, order.peer, signer)
            for signer, order in group.orders_in_force()
        ),
        lease_s=max(until - scene.now, 0.0) if math.isfinite(until) else 0.0,
        trouble=(
            *_trouble_with_voters(group, scene),
            *_trouble_with_models(group, scene),
            *(group.plan.missing if group.plan is not None else ()),
        ),
    )


def _trouble_with_voters(group: Group, scene: Scene) -> list[tuple[str, str]]:
    register = group.register
    of = len(register.voters)
    dead = sum(not scene.is_alive(voter) for voter in register.voters)
    if of - dead < register.quorum:
        return [
            (
                f"no quorum: {dead} of {of} voters do not answer, so nothing can be decided; "
                "what is loaded goes on answering",
                "start them again, or run `meshnode mesh recover --force` on the node that made "
                "the mesh",
            )
        ]
    if dead:
        return [
            (
                f"{dead} of {of} voters do not answer",
                "nothing to do: another node takes its place in half a minute, if there is one",
            )
        ]
    if of == 1 and scene.peerage.members():
        return [
            (
                "one voter decides alone: while it is away nobody takes over",
                "nothing to do for two nodes; a third makes three voters, of whom one may fail",
            )
        ]
    return []


def _trouble_with_models(group: Group, scene: Scene) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    body = group.head.body
    served = serving_models(body)
    for model in sorted({item.model for item in body.items}):
        items = [item for item in body.items if item.model == model]
        name = items[0].name
        living = [
            replica
            for replica in served.get(model, [])
            if all(scene.is_alive(item.owner) for item in replica)
        ]
        if not living:
            found.append(
                (
                    f"{name} is served by nobody at the moment",
                    "it is being loaded, or its owner starts again",
                )
            )
        elif len(living) == 1 and not any(item.standbys for item in items):
            found.append(
                (
                    f"{name} has one replica and no standby",
                    f"give another node the file: meshnode serve --standby {name}",
                )
            )
    return found
