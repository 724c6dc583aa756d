"""Threads follow the cores that are really free; rates are per kind of step."""

from __future__ import annotations

from meshnode.engine.cores import usable_cores
from meshnode.engine.pace import JUDGE_AFTER_S, RETRY_AFTER_S, Rates, ThreadPolicy, Threads


def settle(policy: ThreadPolicy, free_cores: float, wall_s: float) -> list[int]:
    """Counts used over `wall_s` of steps of 0.1 s while so many cores are free."""
    counts = []
    for _ in range(round(wall_s / 0.1)):
        counts.append(policy.threads)
        policy.observe(0.1 * min(free_cores, policy.threads), 0.1)
    return counts


def test_a_free_machine_keeps_all_threads() -> None:
    assert set(settle(ThreadPolicy(4), free_cores=4, wall_s=30)) == {4}


def test_a_busy_machine_gets_down_to_what_is_free_and_not_below_one() -> None:
    policy = ThreadPolicy(4)
    settle(policy, free_cores=0.5, wall_s=5 * JUDGE_AFTER_S)
    assert policy.threads == 1


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
