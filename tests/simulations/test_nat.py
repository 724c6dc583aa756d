"""Who can be dialled behind what."""

from __future__ import annotations

from collections import Counter

import pytest

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import World
from meshnode_simulations.models.nat import HOMES, MAPPING_S, Kind, Nats


def a_world(kinds: tuple[Kind, ...], *, outside_known: bool) -> tuple[World, Nats, list[Machine]]:
    world = World(1)
    nats = Nats(world.loop, 1, outside_known=outside_known)
    machines = [world.add(f"m{place}") for place in range(len(kinds))]
    for machine, kind in zip(machines, kinds, strict=True):
        nats.place(machine, kind)
    return world, nats, machines


@pytest.mark.parametrize("there", Kind)
def test_production_reaches_only_who_is_open(there: Kind) -> None:
    for here in Kind:
        _, nats, (dialer, other) = a_world((here, there), outside_known=False)
        nats.may_dial(other, dialer)
        assert nats.may_dial(dialer, other) == (there is Kind.OPEN)


@pytest.mark.parametrize(
    ("there", "stranger", "sent_to", "sent_to_symmetric"),
    [
        (Kind.OPEN, True, True, True),
        (Kind.FULL_CONE, True, True, True),
        (Kind.RESTRICTED, False, True, True),
        (Kind.PORT_RESTRICTED, False, True, False),
        (Kind.SYMMETRIC, False, False, False),
        (Kind.UDP_BLOCKED, False, False, False),
    ],
)
def test_mappings_let_in_whom_they_were_made_for(
    there: Kind, stranger: bool, sent_to: bool, sent_to_symmetric: bool
) -> None:
    kinds = (there, Kind.FULL_CONE, Kind.SYMMETRIC)
    world, nats, (other, dialer, symmetric) = a_world(kinds, outside_known=True)
    assert nats.may_dial(dialer, other) == stranger
    nats.may_dial(other, dialer)
    nats.may_dial(other, symmetric)
    assert nats.may_dial(dialer, other) == sent_to
    assert nats.may_dial(symmetric, other) == sent_to_symmetric
    world.loop.run(int((MAPPING_S + 1) * NS_PER_S))
    assert nats.may_dial(dialer, other) == stranger, "the mapping is forgotten"


def test_kinds_are_drawn_by_their_shares() -> None:
    world = World(1)
    nats = Nats(world.loop, 5, HOMES)
    counts = Counter(nats.kind(world.add(f"m{place}")) for place in range(2000))
    for kind, share in HOMES.items():
        assert counts[kind] / 2000 == pytest.approx(share, abs=0.04)


def test_a_mesh_forms_round_one_open_machine() -> None:
    """Those behind NATs are connected to the open one, and not to each other."""
    kinds = (Kind.OPEN, Kind.PORT_RESTRICTED, Kind.FULL_CONE)
    world, nats, (hub, *homes) = a_world(kinds, outside_known=False)
    world.may_dial = nats.may_dial
    world.switch_on(hub)
    for home in homes:
        world.switch_on(home, (hub,))
    world.loop.run(30 * NS_PER_S)
    assert sorted(hub.links) == [1, 2]
    assert all(list(home.links) == [hub.index] for home in homes)
