"""A standby without the file fetches it before it loads it, from whoever has it and is there."""

from __future__ import annotations

import pytest

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.network import SILENCE_S
from meshnode_simulations.models.access import BYTES_PER_MBIT
from meshnode_simulations.simulation import Simulation

WEIGHT_BYTES = 50_000_000
CHANGES: dict[str, object] = {
    "models.0.weight_bytes": WEIGHT_BYTES,
    "network.access": "dsl",
    "scenario.duration_s": 170.0,
    "faults": [{"at_s": 30.0, "kind": "kill", "target": "owner:small"}],
}
UPLOAD_S = WEIGHT_BYTES / (10 * BYTES_PER_MBIT)


def test_a_promotion_waits_for_the_file_as_long_as_its_sender_takes() -> None:
    there = Simulation("owner-death", seed=2, changes=CHANGES).run()
    fetched = Simulation("owner-death", seed=2, changes={**CHANGES, "models.0.fetched": 2}).run()
    assert "fetches" not in there.figures
    assert fetched.figures["fetches"] >= 1
    assert fetched.figures["fetch_p50_s"] == pytest.approx(UPLOAD_S, rel=0.01)
    waited_s = fetched.figures["promotion_p50_s"] - there.figures["promotion_p50_s"]
    assert waited_s == pytest.approx(UPLOAD_S, abs=2.0)


def test_the_rest_comes_from_another_when_the_sender_dies() -> None:
    changes = {**CHANGES, "models.0.fetched": 1, "faults": [], "demand.kind": "none"}
    world = Simulation("owner-death", seed=2, changes=changes).prepare().world
    loop = world.loop
    loop.run(20 * NS_PER_S)
    (receiver,) = (machine for machine in world.machines if machine.unfetched)
    (model,) = receiver.models
    has_s: list[float] = []
    world.fetch(receiver, model, lambda: has_s.append(loop.now_s))
    loop.run(int((20 + UPLOAD_S / 2) * NS_PER_S))
    sender = next(each for each in world.machines if each.models and each is not receiver)
    world.kill(sender)
    loop.run(100 * NS_PER_S)
    # What had come was not sent again.
    assert has_s == pytest.approx([20 + UPLOAD_S + SILENCE_S])
    assert not receiver.unfetched
