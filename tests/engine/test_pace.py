"""Threads follow the cores that are really free; rates are per kind of step."""

from __future__ import annotations

import os
import threading
import time
import zlib
from pathlib import Path

import pytest

from meshnode.engine import cores
from meshnode.engine.cores import IDLE_OVER_S, IdleCores, Waiting, usable_cores
from meshnode.engine.pace import (
    JUDGE_AFTER_S,
    RETRY_AFTER_S,
    RETRY_IDLE_AFTER_S,
    Rates,
    ThreadPolicy,
    Threads,
)


class Clock:
    """Goes on only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def advance(self, by_s: float) -> None:
        self.now += by_s


NOW = Clock()


def settle(
    policy: ThreadPolicy, free_cores: float, wall_s: float, *, tells: bool = False
) -> list[int]:
    """Counts used over `wall_s` of steps of 0.1 s while so many cores are free.

    `tells`: the machine says how many of these are idle.
    """
    counts = []
    for _ in range(round(wall_s / 0.1)):
        counts.append(policy.threads)
        got = min(free_cores, policy.threads)
        NOW.advance(0.1)
        waited_s = 0.1 * (policy.threads - got)
        policy.observe(waited_s, 0.1, NOW.now, free_cores - got if tells else 0.0)
    return counts


def test_a_free_machine_keeps_all_threads() -> None:
    assert set(settle(ThreadPolicy(4), free_cores=4, wall_s=30)) == {4}


def test_a_busy_machine_gets_down_to_what_is_free_and_not_below_one() -> None:
    policy = ThreadPolicy(4)
    settle(policy, free_cores=2.9, wall_s=JUDGE_AFTER_S)
    assert policy.threads == 3, "one judgement is enough"
    settle(policy, free_cores=0.5, wall_s=JUDGE_AFTER_S)
    assert policy.threads == 1


def test_one_busy_core_of_many_is_noticed() -> None:
    policy = ThreadPolicy(16)
    settle(policy, free_cores=15.3, wall_s=2 * JUDGE_AFTER_S)
    assert policy.threads == 15


def test_the_little_that_the_node_and_its_clients_need_costs_no_core() -> None:
    assert set(settle(ThreadPolicy(2), free_cores=1.7, wall_s=30)) == {2}


def test_threads_come_back_after_a_pause_without_steps() -> None:
    policy = ThreadPolicy(2)
    settle(policy, free_cores=1, wall_s=2 * JUDGE_AFTER_S, tells=True)
    NOW.advance(60)
    settle(policy, free_cores=2, wall_s=0.1, tells=True)
    assert policy.threads == 2, "however short the steps since then"


def test_prefill_and_decode_are_judged_apart() -> None:
    threads = Threads(2)
    settle(threads.policy(1), free_cores=1.1, wall_s=2 * JUDGE_AFTER_S)
    settle(threads.policy(512), free_cores=1.8, wall_s=2 * JUDGE_AFTER_S)
    assert threads.policy(8).threads == 1
    assert threads.policy(128).threads == 2


def test_threads_come_back_when_the_machine_is_free_again() -> None:
    policy = ThreadPolicy(2)
    settle(policy, free_cores=1, wall_s=2 * JUDGE_AFTER_S)
    assert policy.threads == 1
    settle(policy, free_cores=2, wall_s=RETRY_AFTER_S + 2 * JUDGE_AFTER_S)
    assert policy.threads == 2


def test_threads_come_back_at_once_to_an_idle_core() -> None:
    policy = ThreadPolicy(2)
    settle(policy, free_cores=1, wall_s=2 * JUDGE_AFTER_S, tells=True)
    assert policy.threads == 1
    settle(policy, free_cores=2, wall_s=RETRY_IDLE_AFTER_S + 2 * JUDGE_AFTER_S, tells=True)
    assert policy.threads == 2


def test_attempts_that_do_not_pay_become_rarer() -> None:
    counts = settle(ThreadPolicy(2), free_cores=1, wall_s=600)
    early, late = counts[: len(counts) // 2].count(2), counts[len(counts) // 2 :].count(2)
    assert late < early
    assert counts.count(1) / len(counts) > 0.9


def test_a_fixed_count_stays() -> None:
    policy = ThreadPolicy(2, adaptive=False)
    assert set(settle(policy, free_cores=0.5, wall_s=30)) == {2}


def test_rates_take_pure_steps_only() -> None:
    rates = Rates()
    rates.observe(prefill_tokens=100, decode_tokens=1, wall_s=1.0)
    rates.observe(prefill_tokens=3, decode_tokens=0, wall_s=1.0)
    assert (rates.prefill_tokens_per_s, rates.decode_tokens_per_s) == (0.0, 0.0)
    rates.observe(prefill_tokens=100, decode_tokens=0, wall_s=9.9)
    assert rates.prefill_tokens_per_s == 0.0, "that one read the weights from the disk"
    rates.observe(prefill_tokens=100, decode_tokens=0, wall_s=0.5)
    rates.observe(prefill_tokens=0, decode_tokens=4, wall_s=0.1)
    assert (rates.prefill_tokens_per_s, rates.decode_tokens_per_s) == (200.0, 40.0)
    for _ in range(100):
        rates.observe(prefill_tokens=0, decode_tokens=2, wall_s=0.1)
    assert 19.9 < rates.decode_tokens_per_s < 20.1


def test_there_is_at_least_one_core() -> None:
    assert usable_cores() >= 1


def test_idle_cores_are_what_the_kernel_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, now_s, ticks_per_s = tmp_path / "stat", 100.0, os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(cores, "_STAT", stat)
    monkeypatch.setattr("time.monotonic", lambda: now_s)

    def tell(idle_s: float) -> None:
        stat.write_text(f"cpu  7 0 7 {round(idle_s * ticks_per_s)} 0 0\ncpu0 1 1 1 1\n")

    tell(idle_s=50.0)
    idle = IdleCores()
    tell(idle_s=50.3)
    assert idle.lately() == 0.0, "too soon to look"
    now_s += IDLE_OVER_S
    assert idle.lately() == pytest.approx(0.3 / IDLE_OVER_S)
    stat.unlink()
    now_s += IDLE_OVER_S
    assert idle.lately() <= 0.0, "another kernel"


def test_threads_that_want_the_same_core_wait_for_it() -> None:
    if len(os.sched_getaffinity(0)) < 2 or not Path("/proc/self/schedstat").exists():
        pytest.skip("one core only, or a kernel that does not tell")
    waiting = Waiting()
    before_s = waiting.so_far_s()
    mask, number = os.sched_getaffinity(0), threading.get_native_id()
    os.sched_setaffinity(number, {min(mask)})  # this thread; what it starts inherits that
    try:
        busy = threading.Thread(target=_spin, args=(0.3,))
        busy.start()
        _spin(0.3)
        waited_s = waiting.so_far_s() - before_s
        busy.join()
    finally:
        os.sched_setaffinity(number, mask)
    assert waited_s > 0.05, "of about 0.3"


def _spin(wall_s: float) -> None:
    end = time.monotonic() + wall_s
    while time.monotonic() < end:
        zlib.crc32(bytes(1 << 20))  # without the interpreter's lock
