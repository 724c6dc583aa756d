"""Every kind of liar is contained: no promise breaks, and what the mesh serves goes on."""

from __future__ import annotations

from typing import Any

import pytest

from meshnode.errors import ConfigError
from meshnode_simulations.faults.adversaries import KINDS
from meshnode_simulations.record import Result
from meshnode_simulations.scenario import Scenario, load
from meshnode_simulations.simulation import Simulation

BASE: dict[str, Any] = {
    "scenario.duration_s": 45.0,
    "scenario.warmup_s": 12.0,
    "mesh.nodes": 10,
    "faults": [{"at_s": 25.0, "kind": "kill", "target": "owner:small", "for_s": 8.0}],
    "adversaries.start_s": 15.0,
    "adversaries.count": 2,
    "network.loss": 0.0,
}
HUNG_UP_ON = {"forge", "replay"}
"""Whose lies prove themselves: to send them is reason enough to end the connection."""


def a_scenario(kind: str, **more: Any) -> Scenario:
    target = {"adversaries.target": "leader"} if kind in ("equivocate", "forge") else {}
    return load("sybil", {**BASE, "adversaries.kind": kind, **target, **more})


def lives_with(kind: str, **more: Any) -> Result:
    return Simulation(a_scenario(kind, **more), seed=1, check=True).run()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_with_liars_keeps_its_promises(kind: str) -> None:
    more = {"adversaries.count": 12} if kind in ("sybil", "eclipse") else {}
    result = lives_with(kind, **more)
    assert result.violations == ()
    assert result.figures["unserved_at_end"] == 0.0
    assert result.figures["promotion_p99_s"] < 8.0
    # Whom all hang up on again and again is no good gateway to its own clients.
    assert result.figures["answered_share"] >= (0.9 if kind in HUNG_UP_ON else 1.0)
    assert (result.figures["hung_up_on_liars"] > 0) == (kind in HUNG_UP_ON)


def test_made_up_identities_get_no_vote_and_no_way_into_an_invited_mesh() -> None:
    result = lives_with("sybil", **{"adversaries.count": 12})
    assert result.figures["liar_voters"] == 0.0
    run = Simulation(a_scenario("sybil", **{"mesh.admission": "invite"}), seed=1).prepare()
    run.world.loop.run(20 * 10**9)
    liar = run.world.by_name["liar0"]
    assert liar.live.members() == ()
    assert run.world.by_name["n0"].live.refused


def test_an_equivocating_voter_is_convicted() -> None:
    run = Simulation(a_scenario("equivocate"), seed=1, check=True).prepare()
    run.world.loop.run(45 * 10**9)
    convicted = {
        peer
        for machine in run.world.running()
        for group in machine.live.agreement.registers()
        for peer in group.equivocations
    }
    assert len(convicted) == 1


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError):
        Simulation(a_scenario("sybil", **{"adversaries.kind": "nice"})).prepare()
