"""`make bench` kills owners; a run in which a client loses an answer fails."""

from __future__ import annotations

import pytest

from tests.bench.failover.measure import KILLS_DEFAULT, as_text, measure


@pytest.mark.timeout(1800)  # thirty kills take seven minutes on two cores
def test_failover() -> None:
    report = measure()
    print("\n" + as_text(report))
    assert report.kills == KILLS_DEFAULT
    assert report.answers_broken == 0
