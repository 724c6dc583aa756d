"""`make bench` measures the hop; a run that loses or invents a token fails."""

from __future__ import annotations

from tests.bench.hop.measure import as_text, measure


def test_hop() -> None:
    report = measure()
    print("\n" + as_text(report))
    tunnelled = [row for row in report.rows if row.way == "tunnel"]
    assert {row.load for row in tunnelled} == {"paced", "saturated", "real"}
