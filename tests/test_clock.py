"""Time advances, never falls, and counts the machine's sleep where that can be seen."""

from __future__ import annotations

import sys
import time

import pytest

from meshnode import clock


def test_it_never_falls_and_advances() -> None:
    readings = [clock.now() for _ in range(1000)]
    assert readings == sorted(readings)
    begun = time.monotonic()
    while clock.now() == readings[-1]:
        assert time.monotonic() < begun + 5.0, "stands still"


def test_it_keeps_pace_with_the_monotonic_clock() -> None:
    monotonic, ours = time.monotonic(), clock.now()
    while time.monotonic() < monotonic + 0.05:
        pass
    assert clock.now() - ours >= 0.05 * 0.999
    assert clock.now() - ours < 5.0


@pytest.mark.skipif(sys.platform != "linux", reason="the clocks share their origin on Linux only")
def test_it_is_ahead_of_the_monotonic_clock_by_the_time_slept() -> None:
    monotonic = time.monotonic()
    ours = clock.now()
    boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert monotonic <= ours <= boottime


def test_without_a_clock_for_sleep_it_is_the_monotonic_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clock, "_CLOCK", None)
    before = time.monotonic()
    assert before <= clock.now() <= time.monotonic()
