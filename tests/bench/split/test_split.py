"""`make bench` checks how the measurement of stages counts; the measurement itself takes half an
hour and has a command of its own: `python -m tests.bench.split`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.engine.measure import Ratio
from tests.bench.split.links import Crossed, Links, round_trip_s
from tests.bench.split.measure import (
    LONG_TOKENS,
    SHORT_TOKENS,
    Point,
    Report,
    Run,
    Wire,
    as_json,
    as_text,
    round_trips,
    rows,
    wire,
)
from tests.bench.split.reading import bytes_read, forget
from tests.bench.split.systems import Load, Part

ALONE, MANY = Point(10.0, 1), Point(10.0, 8)


def run(system: str, tokens_per_s: float, point: Point = MANY, token_s: float = 0.1) -> Run:
    return Run(point, system, tokens_per_s, token_s, 1.0 / tokens_per_s, 0.001, 0.01, 0.5)


RUNS = [
    run("whole", 10.0),
    run("2 stages", 5.0),
    run("RPC", 2.0),
    run("2 stages", 9.0),
    run("RPC", 9.0),
    run("whole", 10.0),
    run("RPC", 5.0),
    run("whole", 20.0),
    run("2 stages", 20.0),
]


def test_ratios_are_taken_within_rounds_before_the_median() -> None:
    whole, stages, rpc = rows(RUNS)
    assert (whole.system, stages.system, rpc.system) == ("whole", "2 stages", "RPC")
    assert stages.speed_by["RPC"] == Ratio(2.5, 1.0, 4.0)
    assert stages.speed_by["whole"] == Ratio(0.9, 0.5, 1.0)
    assert stages.first_by["RPC"].median == pytest.approx(0.4)
    assert (stages.rounds, stages.tokens_per_s) == (3, 9.0)
    assert whole.speed_by.keys() == {"RPC"}, "nothing is compared with itself"


def test_an_unfinished_round_is_left_out() -> None:
    assert [row.rounds for row in rows([*RUNS, RUNS[0]])] == [3, 3, 3]
    assert rows([*RUNS, run("whole", 1.0, ALONE)]) == rows(RUNS)


def test_bytes_and_crossings_are_of_the_tokens_that_differ() -> None:
    tokens = LONG_TOKENS - SHORT_TOKENS
    short = (Crossed(90_000, 100), 2.0)
    long = (Crossed(90_000 + 4 * tokens * 2_500 + 3 * 400, 100 + 4 * tokens), 5.0)
    found = wire("2 stages", 4, [short, long], idle_bytes_per_s=400.0)
    assert found == Wire("2 stages", 4, 2_500.0, 1.0, 400.0)
    assert found.round_trips == 0.5


def test_round_trips_are_what_a_delay_costs_one_session() -> None:
    delayed = [
        run("2 stages", 1.0, Point(delay_ms, 1), 0.02 + 1.5 * 2e-3 * delay_ms)
        for delay_ms in (0.0, 5.0, 20.0)
    ]
    many = [replace(each, point=replace(each.point, sessions=8), token_s=9.0) for each in delayed]
    assert round_trips([*delayed, *many]) == {"2 stages": pytest.approx(1.5)}
    assert round_trips(delayed[:1]) == {}


def test_the_report_has_a_line_per_point_and_system() -> None:
    machine = {"platform": "", "cpus": 2, "cpu": "", "python": "", "packages": {}}
    machine |= {"load_before": 0.0, "read_ahead_bytes": 0}
    report = Report(
        "model.gguf", "off", machine | {"load_before": 0.0}, {0.0: 0.1}, rows=rows(RUNS)
    )
    report.loads["2 stages"] = Load(5.0, 1.0, (Part(0, 15, 30_000_000, 31_000_000),))
    lines = as_text(report).splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [["10", "8"]] * 3
    assert "  2 stages     5.0    1.0     0.0   0-14: 30.0 31.0" in lines
    assert as_json(report)["rows"][1]["speed_by"]["RPC"]["median"] == 2.5


def test_links_delay_and_count() -> None:
    with Links() as links:
        links.delay(0.01)
        assert 0.02 <= round_trip_s(links) < 0.2
        assert links.crossed() == Crossed()


def test_what_is_read_of_a_file_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(64 * 1024 * 1024))
    forget(file)
    if bytes_read(file):
        pytest.skip("the folder of tests is in memory")
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        opened.read(1_000_000)
    assert 1_000_000 <= bytes_read(file) < 2_000_000
