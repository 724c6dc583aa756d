"""Scenarios: strict about their fields, and able to say where they are from."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import TINY, written

from meshnode.errors import ConfigError
from meshnode_simulations import Simulation, changed, load, shipped
from meshnode_simulations.scenario import Scenario, as_toml, toml_of, value_of
from meshnode_simulations.study.results import config_hash


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mesh.nodez": 3}, "nodez"),
        ({"mesh.nodes": 0}, "$.mesh.nodes"),
        ({"mesh.nodes": "many"}, "$.mesh.nodes"),
        ({"network.loss": 0.9}, "$.network.loss"),
        ({"routing.policy": "astrology"}, "$.routing.policy"),
        ({"models.0.slots": 0}, "$.models[0].slots"),
        ({"models.7.slots": 1}, "models.7.slots"),
        ({"weather.rain": 1}, "weather"),
        ({"mesh.nodes.first": 1}, "mesh.nodes.first"),
        ({"name": "other"}, "name"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    file = written(tmp_path, "tiny", TINY)
    if "name" in changes:
        file.write_text('name = "other"\n' + TINY)
        changes = {}
    with pytest.raises(ConfigError) as raised:
        load(file, changes)
    assert named in str(raised.value)


def test_a_file_that_is_not_there_and_one_that_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="line 1"):
        load(written(tmp_path, "odd", "mesh ["))
    with pytest.raises(ConfigError, match="owner-death"):  # says which there are
        load("no-such")


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_scenario_loads_can_be_built_and_is_written_as_it_was(
    name: str, tmp_path: Path
) -> None:
    scenario = load(name)
    about = scenario.scenario
    assert about.title
    assert about.question
    assert about.hypothesis
    assert about.expect
    again = load(written(tmp_path, name, toml_of(scenario)))
    assert config_hash(again) == config_hash(scenario)
    # Its faults, targets and demand are looked at when the world is built.
    small = changed(scenario, {"mesh.nodes": min(scenario.mesh.nodes, 20)})
    assert Simulation(small).prepare().world.machines


def test_origin_is_no_part_of_what_a_scenario_says(tmp_path: Path) -> None:
    file = written(tmp_path, "tiny", TINY)
    by_file = load(file, {"mesh.nodes": 6})
    by_hand = changed(load(file), {"mesh.nodes": 6})
    assert by_file.origin.changes == by_hand.origin.changes == {"mesh.nodes": 6}
    assert config_hash(by_file) == config_hash(by_hand)
    assert config_hash(by_file) != config_hash(load(file))
    plain = Scenario(scenario=by_file.scenario)
    assert plain.origin.source == ""


@pytest.mark.parametrize(
    "value",
    [True, 7, -0.25, 1e-06, "hrw", "true", "7", 'with "quotes"\n', [1, 2], {"a-b": [0.5, "x"]}],
)
def test_values_come_back_from_toml(value: object) -> None:
    back = value_of(as_toml(value))
    assert back == value
    assert type(back) is type(value)


def test_the_replay_line_leads_to_the_same_run(tmp_path: Path) -> None:
    file = written(tmp_path, "my tiny", TINY)
    changes = {"mesh.nodes": 5, "demand.kind": "none", "scenario.title": "7", "models": []}
    result = Simulation(file, seed=3, changes=dict(changes)).run()
    program, command, *arguments = shlex.split(result.replay)
    assert (program, command) == ("meshnode-sim", "replay")
    told = _sim("replay", *arguments, "--json")
    assert json.loads(told)["digest"] == result.digest


def test_equal_seeds_give_equal_digests_whatever_the_hash_seed(tmp_path: Path) -> None:
    file = written(tmp_path, "tiny", TINY)
    digests = {
        json.loads(_sim("replay", str(file), "--seed", seed, "--json", hash_seed=hash_seed))[
            "digest"
        ]
        for seed, hash_seed in (("5", "1"), ("5", "2"))
    }
    assert len(digests) == 1
    assert digests == {Simulation(file, seed=5).run().digest}
    assert Simulation(file, seed=6).run().digest not in digests


def test_simulating_needs_no_network_stack_and_no_engine(tmp_path: Path) -> None:
    """Whoever never runs a node may have none of it that works."""
    file = written(tmp_path, "tiny", TINY)
    program = f"""
import sys
from meshnode_simulations import Simulation, cli
from meshnode_simulations.study import plots, report
Simulation({str(file)!r}).run()
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "meshnode_simulations" in loaded
    of_nodes = {"aioquic", "hypercorn", "libp2p", "llama_cpp", "quart", "trio", "zeroconf"}
    assert not loaded & of_nodes


def _sim(*arguments: str, hash_seed: str = "0") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "meshnode_simulations", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
