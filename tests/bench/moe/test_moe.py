"""`make bench` measures shards; a run in which the order of the rankings is not as known fails."""

from __future__ import annotations

from tests.bench.moe.measure import as_text, measure


def test_moe() -> None:
    report = measure()
    print("\n" + as_text(report))
    kl = {(row.kept, row.ranking): row.kl for row in report.rows}
    for kept in {row.kept for row in report.rows}:
        per_layer = kl[kept, "output-norm"]
        assert per_layer < kl[kept, "global"] < kl[kept, "random"]
        assert per_layer < kl[kept, "probability"]
    assert kl[24, "output-norm"] < kl[16, "output-norm"] < kl[8, "output-norm"]
