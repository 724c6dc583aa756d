"""What the package ships can be read, says what it is about, and asks for figures that exist."""

from __future__ import annotations

import pytest

from meshnode_simulations.scenario import changed, load, shipped
from meshnode_simulations.simulation import Simulation

SMALL = ("owner-death", "equivocation", "cut-model-owner-death")
"""Those that take about two seconds a seed; the rest run in their own right."""


@pytest.mark.parametrize("name", shipped())
def test_a_scenario_says_what_it_asks_and_expects(name: str) -> None:
    scenario = load(name)
    about = scenario.scenario
    assert about.title
    assert about.question.endswith("?")
    assert about.hypothesis
    assert about.expect
    assert all(low <= high for low, high in about.expect.values())
    Simulation(changed(scenario, {"mesh.nodes": min(scenario.mesh.nodes, 30)})).prepare()


@pytest.mark.parametrize("name", SMALL)
def test_what_is_expected_is_found(name: str) -> None:
    result = Simulation(name, seed=2, check=True).run()
    assert result.unmet() == {}
    assert result.violations == ()
