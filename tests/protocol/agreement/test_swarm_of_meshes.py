"""Random faults over many seeds: S1 to S10 after every event, L1 after peace (`swarm.py`)."""

from __future__ import annotations

import pytest

from tests.protocol.agreement.swarm import Life
from tests.protocol.consensus.linearizability import is_linearizable

HEALED_S = 10.0
"""L1: 5 s, and 10 s at the worst; the last step of it is the model's being loaded."""


def live(seed: int, steps: int) -> None:
    life = Life(seed, count=3 + 2 * (seed % 2)).run(steps)
    assert life.healed_s <= HEALED_S, f"seed {seed}: {life.healed_s:.1f} s"
    assert is_linearizable(life.history), f"seed {seed}: {life.history}"


@pytest.mark.parametrize("seed", range(8))
def test_a_mesh_lives_through_anything(seed: int) -> None:
    live(seed, steps=25)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_meshes_live_through_anything_for_longer(seed: int) -> None:
    live(seed, steps=80)
