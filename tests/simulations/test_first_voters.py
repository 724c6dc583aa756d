"""A mesh that starts without models gets voters that vote."""

from __future__ import annotations

import pytest

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.network import Network
from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.kernel.world import World
from meshnode_simulations.models.latency import Plane


@pytest.mark.parametrize("seed", [8, 9])
def test_the_first_voters_vote(seed: int) -> None:
    """Whoever the first block names has heard of the group when it was empty: it has nothing to
    have forgotten, and must not abstain as one that has."""
    world = World(seed, Network(Plane(seed), stream(seed, "network")))
    machines = [world.add(f"m{place}", is_root=place == 0) for place in range(8)]
    for place, machine in enumerate(machines):
        world.switch_on(machine, machines[:1] if place else ())
    world.loop.run(60 * NS_PER_S)
    for machine in machines:
        (group,) = machine.live.agreement._groups.values()
        assert len(group.register.voters) == 5
        assert group.register.votes == (machine.peer_id in group.register.voters)
