"""How fast the engine is, and how many threads it should use: measured step by step.

Decides the thread count and the published rates. Reads no clock: durations come as arguments.

Two threads on one free core are slower than one, since each waits at every barrier for the other
to be scheduled; so a step that got much less CPU than its threads could use asks for fewer. More
are tried again now and then, and less often each time that it did not pay. Wide and narrow
batches are judged apart: even on an idle machine, a small model decodes fastest with one thread.
"""

from __future__ import annotations

# Below this share of the possible CPU time, threads were waiting rather than computing. Measured
# with a 135M model on two idle cores: prefill 0.90 and 1.7 times the speed of one thread, decode
# 0.53 and half the speed of one thread.
UTILISATION_MIN = 0.8
# Steps under one count are judged together over this much time; a single step is too noisy.
JUDGE_AFTER_S = 1.0
# First pause before another thread is tried again, and its bound as it doubles.
RETRY_AFTER_S = 10.0
RETRY_AFTER_MAX_S = 300.0
# Weight of the newest step in the published rates: about the last twenty steps.
RATE_WEIGHT = 0.1
# From this size on, a batch is matrix products, and more threads and tokens pay; below it is
# dominated by the fixed costs of a step.
WIDE_BATCH_TOKENS_MIN = 32


class ThreadPolicy:
    """The number of threads for the next step: from 1 to `threads_max`, or fixed at it."""

    def __init__(self, threads_max: int, *, adaptive: bool = True) -> None:
        self.threads_max = threads_max
        self._adaptive = adaptive
        self.threads = threads_max
        self._cpu_s = self._wall_s = 0.0
        self._since_change_s = 0.0
        self._raised = False
        self._retry_after_s = RETRY_AFTER_S

    def observe(self, cpu_s: float, wall_s: float) -> None:
        """A step took this long with `threads`; may change it for the next one."""
        if not self._adaptive:
            return
        self._cpu_s += cpu_s
        self._wall_s += wall_s
        self._since_change_s += wall_s
        if self._wall_s < JUDGE_AFTER_S:
            return
        utilisation = self._cpu_s / (self._wall_s * self.threads)
        self._cpu_s = self._wall_s = 0.0
        if utilisation < UTILISATION_MIN:
            if self.threads > 1:
                self._lower()
        elif self.threads < self.threads_max and self._since_change_s >= self._retry_after_s:
            self._change(+1)

    def _lower(self) -> None:
        """One thread less; if one more was tried only now, the next try comes later."""
        in_vain = self._raised and self._since_change_s < self._retry_after_s
        doubled_s = min(2 * self._retry_after_s, RETRY_AFTER_MAX_S)
        self._retry_after_s = doubled_s if in_vain else RETRY_AFTER_S
        self._change(-1)

    def _change(self, threads: int) -> None:
        self.threads += threads
        self._raised = threads > 0
        self._since_change_s = 0.0


class Threads:
    """One policy for wide batches (prefill) and one for narrow ones (decode)."""

    def __init__(self, threads_max: int, *, adaptive: bool = True) -> None:
        self._wide = ThreadPolicy(threads_max, adaptive=adaptive)
        self._narrow = ThreadPolicy(threads_max, adaptive=adaptive)

    def policy(self, batch_tokens: int) -> ThreadPolicy:
        """The one that decides for a batch of this size."""
        return self._wide if batch_tokens >= WIDE_BATCH_TOKENS_MIN else self._narrow


class Rates:
    """Smoothed tokens per second; 0.0 before the first measurement.

    Prefill is counted over steps that only prefill, decoding over steps that only decode and
    over all sessions together; mixed steps count for neither. The first prefill is not counted:
    it reads the weights from the disk, and a node that looks slow gets no work to correct that.
    """

    def __init__(self) -> None:
        self._is_warm = False
        self.prefill_tokens_per_s = 0.0
        self.decode_tokens_per_s = 0.0

    def observe(self, prefill_tokens: int, decode_tokens: int, wall_s: float) -> None:
        if wall_s <= 0:
            return
        if not decode_tokens and prefill_tokens >= WIDE_BATCH_TOKENS_MIN:
            if self._is_warm:
                rate = prefill_tokens / wall_s
                self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, rate)
            self._is_warm = True
        elif decode_tokens and not prefill_tokens:
            self.decode_tokens_per_s = _smooth(self.decode_tokens_per_s, decode_tokens / wall_s)


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - RATE_WEIGHT) * old + RATE_WEIGHT * new
