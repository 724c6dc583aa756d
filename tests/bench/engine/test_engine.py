"""`make bench` checks how the engine's measurement counts; the measurement itself takes half an
hour and has a command of its own: `python -m tests.bench.engine`."""

from __future__ import annotations

import pytest

from tests.bench.engine.client import FOLLOW_UP_WORDS, Conversation
from tests.bench.engine.measure import Point, Ratio, Report, Run, as_text, rows

POINT = Point(4, "short", "cold")


def run(server: str, tokens_per_s: float, cpu_s: dict[str, float], first_s: float) -> Run:
    """Four answers; the last of them begins late."""
    return Run(POINT, server, tokens_per_s, (first_s, first_s, first_s, 9.0), cpu_s, 120, 8, 0.5)


RUNS = [
    run("ours", 10.0, {"node": 0.4, "engine": 3.6}, 0.5),
    run("llama-server", 20.0, {"server": 8.0}, 1.0),
    run("llama-server", 40.0, {"server": 4.0}, 1.0),
    run("ours", 80.0, {"node": 0.4, "engine": 3.6}, 0.5),
    run("ours", 30.0, {"node": 0.8, "engine": 3.2}, 0.5),
    run("llama-server", 30.0, {"server": 4.0}, 2.0),
]


def test_ratios_are_taken_within_pairs_before_the_median() -> None:
    (row,) = rows(RUNS)
    assert row.speed == Ratio(1.0, 0.5, 2.0)
    assert row.cpu == Ratio(1.0, 0.5, 1.0)
    assert row.first_p50.median == 0.5
    assert row.first_p95.median == 1.0


def test_costs_are_per_answer_and_of_all_parts() -> None:
    (row,) = rows(RUNS)
    assert row.cpu_per_answer_s == (1.0, 1.0)
    assert row.node_cpu_s == pytest.approx(0.1)
    assert (row.prompt_tokens, row.cached_tokens) == (30, (2, 2))
    assert row.tokens_per_s == (30.0, 30.0)


def test_half_a_pair_is_left_out() -> None:
    (row,) = rows([*RUNS, RUNS[0]])
    assert row.pairs == 3
    assert rows(RUNS[:1]) == []


def test_the_report_has_a_line_per_point() -> None:
    machine = {"platform": "", "cpus": 2, "cpu": "", "python": "", "packages": {}}
    report = Report("as they come", "model.gguf", machine | {"load_before": 0.0}, rows(RUNS))
    line = as_text(report).splitlines()[-1].split()
    assert line[:5] == ["4", "3", "short", "cold", "30"]


def test_conversations_are_alike_only_to_both_servers() -> None:
    assert Conversation.of(600, 7) == Conversation.of(600, 7)
    one, other = Conversation.of(600, 7), Conversation.of(600, 8)
    assert one.messages[0]["content"].split()[0] != other.messages[0]["content"].split()[0]
    assert one.messages[1] != other.messages[1]
    one.go_on("Yes.", 9)
    assert [each["role"] for each in one.messages] == ["system", "user", "assistant", "user"]
    assert len(one.messages[-1]["content"].split()) == FOLLOW_UP_WORDS
