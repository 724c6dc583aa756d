"""Many runs: folders that say everything, sweeps that go on, plots and reports, small schedules."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from multiprocessing import active_children
from pathlib import Path

import pytest
from small_runs import BROKEN, TINY, written

from meshnode.errors import ConfigError
from meshnode_simulations import Result, Simulation, changed, load, plot
from meshnode_simulations.scenario import Scenario
from meshnode_simulations.study import plots, report, results, summary, sweep
from meshnode_simulations.study.shrink import ddmin, shrink


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return load(written(tmp_path_factory.mktemp("tiny"), "tiny", TINY))


@pytest.fixture(scope="module")
def runs(tiny: Scenario) -> list[Result]:
    """Two seeds at two sizes each."""
    jobs = sweep.plan(tiny, [1, 2], {"mesh.nodes": [4, 3]}, check=True)
    return [sweep.run_job(job) for job in jobs]


# --- folders -------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_result_comes_back_byte_for_byte(runs: list[Result], tmp_path: Path) -> None:
    result = runs[0]
    result.figures["never_measured_s"] = math.nan
    folder = results.write(result, tmp_path / "one")
    back = results.read(folder)
    again = results.write(back, tmp_path / "two")
    assert _files(folder) == _files(again)
    assert back.scenario == result.scenario
    assert (back.digest, back.seed, back.replay) == (result.digest, result.seed, result.replay)
    assert back.series == result.series
    assert {n: t.columns for n, t in back.tables.items()} == {
        n: t.columns for n, t in result.tables.items()
    }
    assert math.isnan(back.figures.pop("never_measured_s"))
    del result.figures["never_measured_s"]
    assert back.figures == result.figures


@pytest.mark.parametrize(
    ("file", "text"),
    [("manifest.json", "{"), ("manifest.json", '{"format": 99}'), ("series.parquet", "no")],
)
def test_a_spoilt_result_is_named(runs: list[Result], tmp_path: Path, file: str, text: str) -> None:
    folder = results.write(runs[0], tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(ConfigError, match="seed-0001"):
        results.read(folder)


def test_a_result_counts_only_if_the_same_code_checked_as_much(
    tiny: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.write(Simulation(tiny).run(), tmp_path)
    assert results.is_there(tmp_path, tiny, 1, checked=False)
    assert not results.is_there(tmp_path, tiny, 1, checked=True)
    assert not results.is_there(tmp_path, tiny, 2, checked=False)
    monkeypatch.setattr(results, "code_hash", lambda: "edited")
    assert not results.is_there(tmp_path, tiny, 1, checked=False)


def test_folders_of_one_scenario_are_found_and_of_two_refused(
    runs: list[Result], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no results"):
        results.folders(tmp_path)
    for run in runs:
        results.write(run, tmp_path)
    assert len(results.folders(tmp_path)) == 4
    stands_for = results.write_sweep(runs[:2], tmp_path)
    assert [results.read(each).seed for each in results.folders(stands_for)] == [1, 2]
    results.write(Simulation(load("owner-death", {"scenario.duration_s": 1.0})).run(), tmp_path)
    with pytest.raises(ConfigError, match="owner-death, tiny"):
        results.folders(tmp_path)


def test_frames_are_arrow_tables(runs: list[Result]) -> None:
    joins = runs[0].frame("joins")
    assert joins.num_rows == 4
    assert runs[0].frame()["time_s"].to_pylist() == runs[0].series["time_s"]
    with pytest.raises(KeyError, match="joins"):
        runs[0].frame("nothing")


# --- sweeps --------------------------------------------------------------------------------------


def test_a_plan_is_every_seed_of_every_combination(tiny: Scenario) -> None:
    jobs = sweep.plan(tiny, [1, 2, 3], {"mesh.nodes": [3, 4], "network.loss": [0.0, 0.1]})
    assert (
        len({(job.scenario.mesh.nodes, job.scenario.network.loss, job.seed) for job in jobs}) == 12
    )
    with pytest.raises(ConfigError, match=r"mesh\.nodes"):
        sweep.plan(tiny, [1], {"mesh.nodes": [3, 0]})
    with pytest.raises(ConfigError, match="more than"):
        sweep.plan(tiny, range(1000), {"mesh.nodes": list(range(1, 1000))})


@pytest.fixture(scope="module")
def dask() -> Iterator[str]:
    """A cluster of one worker, as `--on` names it."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        dashboard_address=":0",
    ) as cluster:
        yield cluster.scheduler_address.replace("tcp://", "dask://")


@pytest.mark.parametrize("where", ["processes", "dask"])
def test_a_sweep_goes_on_where_it_was_interrupted(
    where: str, tiny: Scenario, runs: list[Result], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same results wherever they are made, and none is made twice."""
    address = request.getfixturevalue("dask") if where == "dask" else where
    jobs = sweep.plan(tiny, [1, 2], {"mesh.nodes": [4, 3]}, check=True)
    fresh: list[Path] = []
    there: list[Path] = []

    def interrupted(folder: Path, result: Result | None) -> None:
        fresh.append(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), sweep.pool_on(address, 1) as pool:
        sweep.sweep(jobs, tmp_path, pool, interrupted)
    assert len(results.folders(tmp_path)) == 1

    def count(folder: Path, result: Result | None) -> None:
        (there if result is None else fresh).append(folder)

    with sweep.pool_on(address, 1) as pool:
        folders = sweep.sweep(jobs, tmp_path, pool, count)
    assert there == fresh[:1]
    assert sorted(fresh) == sorted(folders)
    found = [results.read(folder) for folder in folders]
    assert [each.digest for each in found] == [each.digest for each in runs]


def test_a_worker_that_dies_is_told_and_what_was_done_is_kept(
    tiny: Scenario, tmp_path: Path
) -> None:
    before = set(active_children())
    jobs = sweep.plan(changed(tiny, {"scenario.duration_s": 600.0}), [1])
    with sweep.pool_on("processes", 1) as pool:
        sweep.sweep(sweep.plan(tiny, [1]), tmp_path, pool)
        future = pool.submit(jobs[0])
        for worker in set(active_children()) - before:
            worker.kill()
        with pytest.raises(sweep.RunFailedError, match="worker process died"):
            pool.result(future)
    assert len(results.folders(tmp_path)) == 1


def test_a_dask_worker_that_dies_is_told(tiny: Scenario, tmp_path: Path) -> None:
    import dask.config
    from distributed import LocalCluster

    job = sweep.plan(changed(tiny, {"scenario.duration_s": 36000.0}), [1])
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        sweep.pool_on(cluster.scheduler_address.replace("tcp://", "dask://")) as pool,
    ):
        future = pool.submit(job[0])
        states = cluster.scheduler.workers
        _until(lambda: any(state.processing for state in states.values()))
        os.kill(next(iter(cluster.workers.values())).pid, 9)
        with pytest.raises(sweep.RunFailedError, match="died of it"):
            pool.result(future)


def test_a_worker_with_other_code_is_refused(tiny: Scenario) -> None:
    with pytest.raises(sweep.RunFailedError, match="another version"):
        sweep.run_job(sweep.Job(tiny, 1, code="0" * 16))


def test_places_that_runs_cannot_go_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CONNECT_S", 0.2)
    for where, told in (("dask://127.0.0.1:1", "no Dask scheduler"), ("moon", "not to 'moon'")):
        with pytest.raises(ConfigError, match=told), sweep.pool_on(where):
            pass


def _until(holds: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 60.0
    while not holds():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


# --- what they say together ----------------------------------------------------------------------


def test_variants_are_told_apart_by_what_differs(runs: list[Result], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    found = summary.variants(runs)
    assert [(each.label, len(each.runs)) for each in found] == [("nodes=3", 2), ("nodes=4", 2)]
    summary.write_table(runs, tmp_path / "figures.parquet")
    table = pq.read_table(tmp_path / "figures.parquet").to_pylist()
    assert [(row["mesh.nodes"], row["seed"]) for row in table] == [(3, 1), (3, 2), (4, 1), (4, 2)]
    assert all(row["joined_share"] == 1.0 for row in table)


def test_expectations_count_the_runs_that_met_them(runs: list[Result]) -> None:
    met, unmet = summary.expectations(runs[:2])
    assert (met.figure, met.is_met, met.met, met.runs) == ("joined_share", True, 2, 2)
    assert (unmet.figure, unmet.is_met, unmet.met) == ("join_p99_s", False, 0)
    assert "0 of 2" in unmet.verdict


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("ttft_p95_s", "ttft p95 (s)"),
        ("bytes_per_node_s", "bytes (per node and second)"),
        ("loads_per_node_min", "loads (per node and minute)"),
        ("hit_share", "hit (share)"),
        ("one_way_ms", "one way (ms)"),
        ("prefill_tokens_per_s", "prefill tokens (per second)"),
        ("nodes", "nodes"),
    ],
)
def test_axes_have_units(name: str, label: str) -> None:
    assert plots.named(name) == label


def test_plots_are_files_without_a_date(runs: list[Result], tmp_path: Path) -> None:
    figure = plot({"4 nodes": runs[:2], "3 nodes": runs[2:]}, "messages_per_node_s")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "virtual time (s)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["4 nodes", "3 nodes"]
    plots.save(figure, tmp_path / "one")
    again = plot({"4 nodes": runs[:2], "3 nodes": runs[2:]}, "messages_per_node_s")
    plots.save(again, tmp_path / "two")
    for kind in ("svg", "png"):
        one, two = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("one", "two"))
        assert one == two
    with pytest.raises(KeyError, match="messages_per_node_s"):
        plot(runs[0], "nothing")


def test_a_distribution_counts_rows_without_a_value(runs: list[Result]) -> None:
    result = results_with(runs[0], [1.0, 2.0, None, None])
    line = plot(result, "requests.ttft_s").axes[0].get_lines()[0]
    assert max(line.get_xdata()) == 2.0
    assert 0.49 < max(line.get_ydata()) <= 0.5


def results_with(run: Result, ttft_s: list[float | None]) -> Result:
    from dataclasses import replace

    from meshnode_simulations.record import Table

    return replace(run, tables={"requests": Table({"ttft_s": list(ttft_s)})})


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_needs_nothing_else(runs: list[Result], tmp_path: Path) -> None:
    file = report.write(tmp_path / "sweep", runs)
    page = _Page()
    page.feed(file.read_text())
    assert page.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "script" not in page.tags
    assert "anything" not in page.tags  # the question is text
    for told in ("Does <anything> work?", "nodes=3", "unmet: met in 0 of 2 runs", "None was seen",
                 runs[0].digest, "mesh.nodes=4", results.code_hash()):  # fmt: skip
        assert told in page.text
    kept = {path.name for path in (tmp_path / "sweep" / "plots").iterdir()}
    assert {"join_p99_s.png", "join_p99_s.svg", "joins.joined_s.png"} <= kept


def test_groups_are_shown_side_by_side(runs: list[Result]) -> None:
    page = _Page()
    page.feed(
        report.compared({"T1": runs[:2], "T2": runs[2:]}, "Tiers beside each other", "all near")
    )
    assert "Tiers beside each other" in page.text
    assert "all near" in page.text
    assert "figureT1T2" in "".join(page.text.split())


# --- shrinking -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "culprits"),
    [(1, {0}), (2, {1}), (6, {3, 4}), (8, {0, 7}), (9, {2, 4, 6}), (20, {19}), (5, set())],
)
def test_ddmin_finds_what_it_takes(size: int, culprits: set[int]) -> None:
    left, is_minimal = ddmin(range(size), lambda part: culprits <= set(part), lambda: True)
    assert set(left) == culprits
    assert is_minimal


def test_ddmin_stops_when_it_is_told_to() -> None:
    budget = iter([True] * 3)
    left, is_minimal = ddmin(range(64), lambda part: 63 in part, lambda: next(budget, False))
    assert 63 in left
    assert not is_minimal


def test_a_schedule_shrinks_to_the_two_faults_that_it_takes(tmp_path: Path) -> None:
    scenario = load(written(tmp_path, "broken", BROKEN))
    told: list[tuple[int, int]] = []
    found = shrink(scenario, 1, scenario.faults, "L1", lambda *each: told.append(each))
    assert found is not None
    assert [fault.kind for fault in found.schedule] == ["sever", "cut"]
    assert found.is_minimal
    assert found.violation.promise == "L1"
    assert told[-1] == (found.runs, 2)
    assert shrink(scenario, 1, scenario.faults, "S1") is None


def test_a_broken_run_says_so_in_its_report(tmp_path: Path) -> None:
    file = written(tmp_path, "broken", BROKEN)
    result = Simulation(file, check=True).run()
    folder = results.write(result, tmp_path)
    assert json.loads((folder / "violations.json").read_text())[0]["promise"] == "L1"
    page = _Page()
    page.feed(report.page([results.read(folder)]))
    assert "not all are connected again" in page.text
    assert f"meshnode-sim replay {file} --seed 1" in page.text
