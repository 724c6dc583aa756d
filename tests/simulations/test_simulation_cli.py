"""`meshnode-sim` as people call it, Ctrl-C included."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from click.testing import Result as Called
from small_runs import BROKEN, TINY, written

from meshnode_simulations import shipped
from meshnode_simulations.cli import main
from meshnode_simulations.study import results


def sim(*arguments: str | Path) -> Called:
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return written(tmp_path, "tiny", TINY)


def test_list_says_what_there_is() -> None:
    told = sim("list")
    assert told.exit_code == 0
    assert all(name in told.stdout for name in shipped())
    document = json.loads(sim("list", "--json").stdout)
    assert [each["name"] for each in document] == list(shipped())
    assert all(each["question"] for each in document)


@pytest.mark.parametrize("command", ["run", "sweep", "replay", "shrink", "report", "list"])
def test_help_teaches(command: str) -> None:
    assert command in sim("--help").stdout
    assert sim(command, "--help").exit_code == 0


def test_run_prints_figures_beside_what_was_expected(tiny: Path, tmp_path: Path) -> None:
    told = sim("run", tiny, "--seed", "4", "--out", tmp_path / "out", "--check")
    assert told.exit_code == 0, told.output
    assert "1 .. 1: met" in told.stdout
    assert "unmet: met in 0 of 1 runs" in told.stdout
    (folder,) = results.folders(tmp_path / "out")
    assert (folder.parent / "report.html").is_file()
    found = results.read(folder)
    assert (found.seed, found.checked) == (4, True)


def test_replay_of_a_folder_must_come_out_the_same(tiny: Path, tmp_path: Path) -> None:
    sim("run", tiny, "--seed", "1", "--out", tmp_path, "--no-report", "--nodes", "3")
    (folder,) = results.folders(tmp_path)
    assert not (folder.parent / "report.html").exists()
    told = sim("replay", folder, "--json")
    assert told.exit_code == 0
    assert json.loads(told.stdout)["digest"] == results.read(folder).digest
    other = json.loads(sim("replay", folder, "--set", "mesh.nodes=4", "--json").stdout)
    assert other["digest"] != results.read(folder).digest
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": "00"}))
    differs = sim("replay", folder, "--json")
    assert differs.exit_code == 1
    assert "RunFailedError" in differs.stdout


def test_replay_narrates(tiny: Path) -> None:
    told = sim("replay", tiny, "--seed", "1", "--narrate")
    assert "n0 starts" in told.stdout
    assert "n1 dials n0" in told.stdout
    assert sim("replay", tiny, "--narrate", "--json").exit_code == 2


def test_a_broken_promise_ends_with_1_and_the_line_that_runs_it_again(tmp_path: Path) -> None:
    file = written(tmp_path, "broken", BROKEN)
    told = sim("run", file, "--seed", "2", "--out", tmp_path, "--set", "network.loss=0.001",
               "--no-report")  # fmt: skip
    assert told.exit_code == 1
    (line,) = (line for line in told.stdout.splitlines() if "again:" in line)
    again = sim(*shlex.split(line.partition("again: meshnode-sim ")[2]))
    assert again.exit_code == 1
    assert "L1 broken" in again.stdout
    smallest = tmp_path / "smallest.toml"
    shrunk = sim("shrink", file, "--seed", "2", "--out", smallest)
    assert shrunk.exit_code == 0
    assert shrunk.stdout.count("[[faults]]") == 2
    assert sim("replay", smallest, "--seed", "2").exit_code == 1


def test_a_sweep_has_a_report_of_its_own(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = sim("sweep", tiny, "--over", "network.jitter=0,0.5", "--seed", "1..2", "--out", out,
               "--jobs", "1", "--json")  # fmt: skip
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout)
    assert len(document["runs"]) == 4
    file = Path(document["report"])
    written_s = file.stat().st_mtime_ns
    again = json.loads(sim("report", file.parent, "--json").stdout)
    assert again == {"report": str(file), "runs": 4}
    assert file.stat().st_mtime_ns > written_s


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "no-such"), "no scenario"),
        (("run", "TINY", "--seed", "x"), "seeds are 7 or 1..20"),
        (("run", "TINY", "--seed", "5..3"), "seeds are 7 or 1..20"),
        (("run", "TINY", "--set", "nonsense"), "KEY=VALUE"),
        (("run", "TINY", "--set", "mesh.nodes=-1"), "$.mesh.nodes"),
        (("run", "TINY", "--on", "moon", "--seed", "1..2"), "not to 'moon'"),
        (("sweep", "TINY"), "--over"),
        (("shrink", "TINY", "--seed", "1"), "nothing to shrink"),
        (("report", "EMPTY"), "no results"),
    ],
)
def test_what_was_asked_wrongly_ends_with_2(
    tiny: Path, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"TINY": tiny, "EMPTY": tmp_path / "empty"}
    found = sim(*(places.get(each, each) for each in arguments))
    assert found.exit_code == 2
    assert told in found.output


def test_ctrl_c_keeps_what_is_done_and_the_sweep_goes_on(tiny: Path, tmp_path: Path) -> None:
    """The terminal sends it to the whole group: workers too."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "meshnode_simulations", "run", str(tiny), "--out", str(out)]
    command += ["--seed", "1..2000", "--jobs", "1"]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Some shells have their children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        give_up_s = time.monotonic() + 120.0
        while len(list(out.glob("*/seed-*"))) < 2:
            assert running.poll() is None
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGINT)
        _, stderr = running.communicate(timeout=60.0)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()
    assert running.returncode == 130
    assert "Traceback" not in stderr
    done = results.folders(out)
    assert 2 <= len(done) < 2000
    assert all(results.read(folder).virtual_s == 12.0 for folder in done)
    last = len(done) + 1
    told = sim("run", tiny, "--out", out, "--seed", f"1..{last}", "--jobs", "1", "--no-report")
    assert told.exit_code == 0
    assert f"{len(done)} were there" in told.stderr or len(results.folders(out)) == last
