"""How fast the engine is, and how many threads it should use: measured step by step.

Decides the thread count and the published rates. Reads no clock: durations come as arguments.

Two threads on one free core are slower than one, since each waits at every barrier for the other
to be scheduled. Threads that wait for each other spin (`process.CHILD_ENVIRONMENT`), so a step
that got less CPU time than its threads could use was kept waiting by somebody else, and asks for
fewer. More are tried as soon as the machine has an idle core, now and then without that sign, and
less often each time that it did not last. Wide and narrow batches are judged apart.
"""

from __future__ import annotations

import math

# A step that lacks more than this of its threads' CPU time was kept waiting. Two spinning threads
# lack 0.1 on two idle cores; beside one other program they get 1 to 1.5 of the two.
LACKING_CORES_MAX = 0.4
# A core as idle as this is worth a try.
IDLE_CORES_MIN = 0.8
# Steps under one count are judged together over this much time; a single step is too noisy.
JUDGE_AFTER_S = 0.3
# How long a count stands before another thread is tried: on the sign of an idle core, and without.
RETRY_IDLE_AFTER_S = 0.5
RETRY_AFTER_S = 10.0
# More that lasted less than this was tried in vain. The waits then double, up to so many times.
LASTING_S = 10.0
PATIENCE_MAX = 32.0
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
        self._patience = 1.0

    def observe(self, cpu_s: float, wall_s: float, idle_cores: float = 0.0) -> None:
        """A step took this long with `threads`; may change it for the next one.

        `idle_cores` is how much of the machine nobody has used lately.
        """
        if not self._adaptive:
            return
        self._cpu_s += cpu_s
        self._wall_s += wall_s
        self._since_change_s += wall_s
        if self._wall_s < JUDGE_AFTER_S:
            return
        got_cores = self._cpu_s / self._wall_s
        self._cpu_s = self._wall_s = 0.0
        if self.threads > 1 and self.threads - got_cores > LACKING_CORES_MAX:
            self._lower(got_cores)
        elif self.threads < self.threads_max and self._is_due(idle_cores):
            self._change(self.threads + 1)

    def _is_due(self, idle_cores: float) -> bool:
        after_s = RETRY_IDLE_AFTER_S if idle_cores >= IDLE_CORES_MIN else RETRY_AFTER_S
        return self._since_change_s >= self._patience * after_s

    def _lower(self, got_cores: float) -> None:
        """As many as there was CPU time for, and one less at least; if one more was tried only
        now, the next try comes later."""
        in_vain = self._raised and self._since_change_s < LASTING_S
        self._patience = min(2 * self._patience, PATIENCE_MAX) if in_vain else 1.0
        enough = math.ceil(got_cores - LACKING_CORES_MAX)
        self._change(max(1, min(self.threads - 1, enough)))

    def _change(self, threads: int) -> None:
        self._raised = threads > self.threads
        self.threads = threads
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
