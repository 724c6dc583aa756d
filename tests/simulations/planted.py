"""Bugs that are planted in the node's cores, and how many seeds of chaos it takes to find each.

The bugs are those of the protocol's own tests (`tests/protocol/*/planted.py`); what is found here
is found by nothing but random faults and the promises S1 to S10, L1 and `spin`: no test was
written for any of them. A bug is found by the first seed that breaks a promise or ends in an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from meshnode.errors import MeshnodeError
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import World
from meshnode_simulations.scenario import Scenario, load
from meshnode_simulations.simulation import ANY, Simulation
from tests.protocol.agreement import planted as meshes
from tests.protocol.consensus import planted as registers
from tests.protocol.consensus.planted import Plant

_STORM: dict[str, Any] = {
    "scenario.duration_s": 75.0,
    "mesh.nodes": 5,
    "chaos.start_s": 8.0,
    "chaos.heal_at_s": 60.0,
    "chaos.per_min": 60.0,
    "demand.per_s": 1.0,
    "hosts.memory_gib": 1.8,
    "faults": [{"at_s": 30.0, "kind": "wipe", "target": "voter", "for_s": 1.0}],
}
_LIARS: dict[str, Any] = {
    **_STORM,
    "mesh.admission": "open",
    "mesh.sponsored": 6,
    "adversaries.kind": "equivocate",
    "adversaries.target": "leader",
    "adversaries.start_s": 8.0,
}


def storm() -> Scenario:
    """A minute of many faults for five nodes of which some vote."""
    return load("chaos", _STORM)


def liars() -> Scenario:
    """The same in an open mesh with a voter that says two things."""
    return load("chaos", _LIARS)


def forgers() -> Scenario:
    """The same with a voter that forges what others sign."""
    return load("chaos", {**_LIARS, "adversaries.kind": "forge"})


def usurpers() -> Scenario:
    """The same with one more node, so that a forged block can name two strangers."""
    return load("chaos", {**_LIARS, "adversaries.kind": "forge", "mesh.nodes": 6})


@contextmanager
def disks_are_lost() -> Iterator[None]:
    """`heads not kept`, of the simulator's machines."""
    switch_on = World.switch_on

    def forgetful(self: World, machine: Machine, *rest: Any, **more: Any) -> None:
        machine.disk.clear()
        switch_on(self, machine, *rest, **more)

    with patch.object(World, "switch_on", forgetful):
        yield


PLANTS: dict[str, Plant] = {
    **{bug.name: bug.plant for bug in (*registers.PLANTED, *meshes.PLANTED)},
    "heads not kept": disks_are_lost,
}


@dataclass(frozen=True)
class Found:
    """`promise` is what broke first, under the seed `seed`."""

    promise: str
    what: str
    seed: int


def hunt(plant: Plant, scenario: Scenario, seeds: range) -> Found | None:
    """The first seed under which the bug shows."""
    with plant():
        for seed in seeds:
            try:
                result = Simulation(scenario, seed=seed, check=True).run(until_broken=ANY)
            except (AssertionError, MeshnodeError, LookupError, ValueError) as error:
                return Found("error", repr(error), seed)
            if result.violations:
                first = result.violations[0]
                return Found(first.promise, first.what, seed)
    return None
