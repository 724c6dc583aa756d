"""Presence follows its distribution from the first moment on, and overlays add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.models.churn import (
    IPFS,
    LAB,
    Change,
    Churn,
    Presence,
    Weibull,
    changes,
    churning,
    flash_crowd,
    from_trace,
    without,
)

HOUR_S = 3600.0


def share_on(presence: Presence, at_s: float) -> float:
    at_ns = at_s * NS_PER_S
    there = [any(start <= at_ns < end for start, end in each) for each in presence.values()]
    return sum(there) / len(there)


def test_sessions_are_those_that_were_measured() -> None:
    """Half of IPFS's last 2 h and four fifths 8 h: of those that begin within the run."""
    presence = churning(1, range(1500), IPFS, 300 * HOUR_S)
    lengths_h = sorted(
        (end - start) / NS_PER_S / HOUR_S
        for intervals in presence.values()
        for start, end in intervals[1:-1]
        if start < 100 * HOUR_S * NS_PER_S
    )
    assert len(lengths_h) > 5000
    assert lengths_h[len(lengths_h) // 2] == pytest.approx(2.0, rel=0.08)
    assert lengths_h[len(lengths_h) * 4 // 5] == pytest.approx(8.0, rel=0.08)


@pytest.mark.parametrize("churn", [IPFS, LAB], ids=["ipfs", "lab"])
def test_a_run_begins_in_the_middle_of_it_all(churn: Churn) -> None:
    """As many are there at first as later; with fresh sessions at the start, most would leave."""
    presence = churning(2, range(3000), churn, 6 * HOUR_S)
    for at_s in (0.0, 600.0, 3 * HOUR_S, 6 * HOUR_S - 1):
        assert share_on(presence, at_s) == pytest.approx(churn.availability, abs=0.03)


def test_a_machine_more_changes_no_other() -> None:
    few, many = churning(3, range(10), LAB, HOUR_S), churning(3, range(11), LAB, HOUR_S)
    assert {machine: many[machine] for machine in few} == few


def test_a_lost_region_is_off_together() -> None:
    always = dict.fromkeys(range(4), ((0, 100 * NS_PER_S),))
    presence = without(always, [1, 3], 20.0, 30.0)
    assert share_on(presence, 19.9) == share_on(presence, 50.0) == 1.0
    assert share_on(presence, 20.0) == 0.5
    assert changes(presence, 100.0) == [
        *(Change(0, machine, True) for machine in range(4)),
        *(Change(20 * NS_PER_S, machine, False) for machine in (1, 3)),
        *(Change(50 * NS_PER_S, machine, True) for machine in (1, 3)),
    ]


def test_a_flash_crowd_comes_within_its_time() -> None:
    crowd = flash_crowd(
        4, range(500), from_s=60.0, within_s=10.0, horizon_s=600.0, stay=Weibull(1.0, 100.0)
    )
    assert share_on(crowd, 59.9) == 0.0
    assert share_on(crowd, 65.0) == pytest.approx(0.5, abs=0.07)
    assert all(60 * NS_PER_S <= start < 70 * NS_PER_S for ((start, _),) in crowd.values())


def test_a_trace_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("node,up_s,down_s\nada,20,30.5\nbob,0,5\nada,1,2\n")
    assert from_trace(path, {"ada": 0, "bob": 1, "cleo": 2}) == {
        0: ((1 * NS_PER_S, 2 * NS_PER_S), (20 * NS_PER_S, 30_500_000_000)),
        1: ((0, 5 * NS_PER_S),),
        2: (),
    }
    for line in ("dan,1,2", "ada,2,1", "ada,x,1", "ada,nan,1", "ada,1,inf", "bob,4,9", "ada,1"):
        path.write_text(f"node,up_s,down_s\nbob,0,5\n{line}\n")
        with pytest.raises(ValueError, match=r"trace\.csv:3"):
            from_trace(path, {"ada": 0, "bob": 1})
