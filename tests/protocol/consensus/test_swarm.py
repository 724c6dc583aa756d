"""Storms, and what must have come true when they are over."""

from __future__ import annotations

import pytest

from meshnode.protocol.quorum import Faults
from tests.protocol.consensus.swarm import EPOCHS, Swarm, swarm


@pytest.mark.parametrize(
    ("size", "faults", "seeds"), [(3, "crash", 200), (5, "crash", 60), (4, "byzantine", 80)]
)
def test_a_group_survives_storms_and_goes_on(size: int, faults: Faults, seeds: int) -> None:
    assert swarm(range(seeds), size=size, faults=faults) >= EPOCHS * seeds


def test_one_seed_is_one_run() -> None:
    one, other, third = Swarm(1), Swarm(1), Swarm(2)
    for run in (one, other, third):
        run.run()
    assert one.trace == other.trace
    assert one.trace != third.trace


@pytest.mark.soak
@pytest.mark.parametrize("size", [3, 5, 7])
def test_many_storms(size: int) -> None:
    swarm(range(1000, 4000), size=size)
