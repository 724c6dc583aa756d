"""Whether guessing tokens pays here and now: measured, pass by pass.

Decides if the next pass has proposals in it, and counts what became of them. Reads no clock:
durations come as arguments. Does not know how proposals are made or judged.

A proposal makes a pass wider. Where a wider pass costs nothing (a GPU that waits for its memory,
a model split over a slow network) each accepted token is a gain; on a CPU that is busy computing
it costs as much as it brings, or more. No table of hardware tells, so it is tried: short runs of
passes with and without proposals take turns, and the tokens per second of both decide. What has
been decided is tried again later, less and less often while it stays off. The number of sequences
that decode together changes the balance, so each order of magnitude is judged apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshnode.engine import SpeculationStats
from meshnode.engine.scheduler import Batch
from meshnode.engine.speculate import Ask, Proposer

# Runs are short, so that a neighbour's load hits both kinds alike, but longer than the pass in
# which a draft model catches up with what was decoded without it.
RUN_PASSES = 8
# With and without each half of it; a pass is 10 to 100 ms, so a trial takes seconds.
TRIAL_PASSES = 64
# To start, the gain must be clear of the noise; to go on, it must be there at all.
START_RATIO = 1.1
KEEP_RATIO = 1.0
# What pays is tried again this many passes later, for texts differ.
KEEP_PASSES = 1024
# What does not pay costs half a trial at half the speed: 5 % of the first wait, and then less and
# less as the wait doubles, up to half an hour of passes.
RETRY_PASSES = 512
RETRY_PASSES_MAX = 32_768

_NONE: Mapping[int, tuple[int, ...]] = {}


class Payoff:
    """The switch for one order of magnitude of sequences; starts with a trial."""

    def __init__(self) -> None:
        self._is_on = False
        self._is_trial = True
        self._passes = 0
        self._retry_passes = RETRY_PASSES
        self._with, self._without = _Rate(), _Rate()

    @property
    def speculates(self) -> bool:
        """Whether the next pass should have proposals."""
        if self._is_trial:
            return self._passes // RUN_PASSES % 2 == 1
        return self._is_on

    def observe(self, tokens: int, wall_s: float) -> None:
        """A pass as `speculates` said it should be gave so many tokens and took so long."""
        if self._is_trial:
            (self._with if self.speculates else self._without).add(tokens, wall_s)
        self._passes += 1
        if self._is_trial and self._passes >= TRIAL_PASSES:
            self._decide()
        elif not self._is_trial and self._passes >= self._wait_passes:
            self._is_trial, self._passes = True, 0
            self._with, self._without = _Rate(), _Rate()

    @property
    def _wait_passes(self) -> int:
        return KEEP_PASSES if self._is_on else self._retry_passes

    def _decide(self) -> None:
        was_on = self._is_on
        ratio = KEEP_RATIO if was_on else START_RATIO
        self._is_on = self._with.tokens_per_s >= ratio * self._without.tokens_per_s
        in_vain = not was_on and not self._is_on
        doubled = min(2 * self._retry_passes, RETRY_PASSES_MAX)
        self._retry_passes = doubled if in_vain else RETRY_PASSES
        self._is_trial, self._passes = False, 0


class _Rate:
    """Tokens over time."""

    def __init__(self) -> None:
        self._tokens = 0
        self._wall_s = 0.0

    def add(self, tokens: int, wall_s: float) -> None:
        self._tokens += tokens
        self._wall_s += wall_s

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._wall_s if self._wall_s > 0 else 0.0


class Speculation:
    """A proposer with its switch (if `adaptive`; else it is always on) and its figures."""

    def __init__(self, proposer: Proposer, *, adaptive: bool) -> None:
        self._proposer = proposer
        self._adaptive = adaptive
        # By the number of sequences in binary digits: 1, 2 to 3, 4 to 7, ...
        self._payoffs: dict[int, Payoff] = {}
        self._decoding = 0
        self._is_on = not adaptive
        self._passes = self._proposed = self._accepted = 0

    def propose(self, asks: Sequence[Ask]) -> Mapping[int, tuple[int, ...]]:
        """Proposals for the next pass, by sequence; none while it does not pay."""
        self._decoding = len(asks)
        if asks and self._adaptive:
            self._is_on = self._payoff.speculates
        return self._proposer.propose(asks) if asks and self._is_on else _NONE

    def observe(self, batch: Batch, draws: Sequence[int], wall_s: float) -> None:
        """What became of the pass after `propose`; `wall_s` includes the time of proposing."""
        proposed = sum(chunk.proposed for chunk in batch.chunks)
        if proposed:
            self._passes += 1
            self._proposed += proposed
            self._accepted += len(draws) - sum(chunk.wants_logits for chunk in batch.chunks)
        only_decodes = all(chunk.is_decode for chunk in batch.chunks)
        if self._adaptive and only_decodes and len(batch.chunks) == self._decoding:
            self._payoff.observe(len(draws), wall_s)

    @property
    def _payoff(self) -> Payoff:
        return self._payoffs.setdefault(self._decoding.bit_length(), Payoff())

    def stats(self) -> SpeculationStats:
        return SpeculationStats(self._is_on, self._passes, self._proposed, self._accepted)
