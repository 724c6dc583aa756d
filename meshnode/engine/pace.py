"""How fast the engine is, and how many threads it should use: measured step by step.

Decides the thread count and the published rates. Reads no clock: durations come as arguments.

Two threads on one free core are slower than one, since each waits at every barrier for the other
to be scheduled. A step whose threads were ready to run and had to wait for a CPU shares the
machine with somebody else, and asks for fewer. More are tried as soon as the machine has an idle
core, now and then without that sign, and less often each time that it did not last. Wide and
narrow batches are judged apart.
"""

from __future__ import annotations

import math

# Threads that wait for a CPU for more than this, on average, have a busy neighbour: beside one, two
# threads on two cores wait for 0.67. What the node and its client need for streaming is less, and
# worth it: a core given up for them is half the speed.
LACKING_CORES_MAX = 0.5
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
        self._waited_s = self._wall_s = 0.0
        self._changed_at = -math.inf
        self._raised = False
        self._patience = 1.0

    def observe(self, waited_s: float, wall_s: float, now: float, idle_cores: float = 0.0) -> None:
        """A step took this long with `threads`, which waited for a CPU so long, all together;
        may change their number for the next one.

        `idle_cores` is how much of the machine nobody has used lately.
        """
        if not self._adaptive:
            return
        self._waited_s += waited_s
        self._wall_s += wall_s
        if self.threads < self.threads_max and self._is_due(now, idle_cores):
            self._change(self.threads + 1, now)
        elif self._wall_s >= JUDGE_AFTER_S:
            lacking_cores = self._waited_s / self._wall_s
            self._waited_s = self._wall_s = 0.0
            if self.threads > 1 and lacking_cores > LACKING_CORES_MAX:
                self._lower(lacking_cores, now)

    def _is_due(self, now: float, idle_cores: float) -> bool:
        after_s = RETRY_IDLE_AFTER_S if idle_cores >= IDLE_CORES_MIN else RETRY_AFTER_S
        return now - self._changed_at >= self._patience * after_s

    def _lower(self, lacking_cores: float, now: float) -> None:
        """As many as there was CPU time for, and one less at least; if one more was tried only
        now, the next try comes later."""
        in_vain = self._raised and now - self._changed_at < LASTING_S
        self._patience = min(2 * self._patience, PATIENCE_MAX) if in_vain else 1.0
        enough = math.ceil(self.threads - lacking_cores - LACKING_CORES_MAX)
        self._change(max(1, min(self.threads - 1, enough)), now)

    def _change(self, threads: int, now: float) -> None:
        self._raised = threads > self.threads
        self.threads = threads
        self._changed_at = now
        self._waited_s = self._wall_s = 0.0


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
