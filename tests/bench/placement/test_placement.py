"""`make bench` measures plans; a planner that misses its goals fails."""

from __future__ import annotations

import statistics

from tests.bench.placement.measure import as_text, measure

LATENCY_RATIO_MAX = 1.03
THROUGHPUT_RATIO_MIN = 0.98


def test_placement() -> None:
    report = measure()
    print("\n" + as_text(report))
    medians = {
        objective: statistics.median(planners["meshnode"])
        for objective, planners in report.ratios.items()
    }
    latency, pipelines, *_ = medians.values()
    assert latency <= LATENCY_RATIO_MAX
    assert pipelines >= THROUGHPUT_RATIO_MIN
