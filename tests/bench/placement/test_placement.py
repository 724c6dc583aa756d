"""`make bench` measures plans; one that misses its goals fails. MESHNODE_BENCH_QUICK=1: a tenth."""

from __future__ import annotations

import os
import statistics

from tests.bench.placement.measure import as_text, measure

LATENCY_RATIO_MAX = 1.03
THROUGHPUT_RATIO_MIN = 0.98


def test_placement() -> None:
    report = measure(quick=bool(os.environ.get("MESHNODE_BENCH_QUICK")))
    print("\n" + as_text(report))
    medians = {
        objective: statistics.median(planners["meshnode"])
        for objective, planners in report.ratios.items()
    }
    latency, pipelines, *_ = medians.values()
    assert latency <= LATENCY_RATIO_MAX
    assert pipelines >= THROUGHPUT_RATIO_MIN
