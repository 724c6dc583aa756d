"""Whether guessing pays: what the switch does with figures as machines of all kinds have them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from meshnode.engine.payoff import (
    KEEP_PASSES,
    RETRY_PASSES,
    RETRY_PASSES_MAX,
    TRIAL_PASSES,
    Payoff,
    Speculation,
)
from meshnode.engine.scheduler import Batch, Chunk
from meshnode.engine.speculate import Ask

PASS_S = 0.02


def run(payoff: Payoff, passes: int, tokens: float, cost: float, noise: float = 0.0) -> int:
    """A machine on which a pass with proposals yields `tokens` (others 1) and takes `cost` times
    as long; returns how many passes had proposals."""
    chance = random.Random(5)
    owed = 0.0
    speculated = 0
    for _ in range(passes):
        wall_s = PASS_S * (1 + noise * chance.uniform(-1, 1))
        if payoff.speculates:
            speculated += 1
            owed += tokens
            drawn, owed = int(owed), owed % 1
            payoff.observe(drawn, cost * wall_s)
        else:
            payoff.observe(1, wall_s)
    return speculated


@pytest.mark.parametrize(
    ("tokens", "cost", "pays"),
    [
        (1.8, 3.2, False),  # this project's first machine: a CPU, busy computing
        (1.8, 1.8, False),  # what it brings is what it costs
        (1.8, 1.7, False),  # 6 % is within the noise
        (1.8, 1.5, True),
        (1.8, 1.05, True),  # a slow network between two halves of a model
        (1.0, 1.0, False),  # nothing was right
        (5.0, 4.0, True),
    ],
)
def test_a_trial_decides(tokens: float, cost: float, pays: bool) -> None:
    payoff = Payoff()
    assert not payoff.speculates
    assert run(payoff, TRIAL_PASSES, tokens, cost) == TRIAL_PASSES // 2
    assert payoff.speculates is pays
    assert run(payoff, 100, tokens, cost) == (100 if pays else 0)


def test_noise_alone_turns_nothing_on() -> None:
    payoff = Payoff()
    run(payoff, TRIAL_PASSES, 1.0, 1.0, noise=0.25)
    assert not payoff.speculates


def test_what_is_on_stays_on_for_less_than_it_took_to_turn_it_on() -> None:
    payoff = Payoff()
    run(payoff, TRIAL_PASSES, 2.0, 1.0)
    run(payoff, KEEP_PASSES + TRIAL_PASSES, 2.1, 2.0)  # 5 %: too little to begin with
    assert payoff.speculates
    run(payoff, KEEP_PASSES + TRIAL_PASSES, 1.9, 2.0)
    assert not payoff.speculates
    # It was worth it once, so the next try comes soon.
    run(payoff, RETRY_PASSES + TRIAL_PASSES, 2.0, 1.0)
    assert payoff.speculates


def test_what_never_pays_is_tried_less_and_less() -> None:
    payoff = Payoff()
    assert run(payoff, TRIAL_PASSES, 1.0, 2.0) == TRIAL_PASSES // 2
    wait = 2 * RETRY_PASSES
    while wait < 4 * RETRY_PASSES_MAX:
        patience = min(wait, RETRY_PASSES_MAX)
        assert run(payoff, patience, 1.0, 2.0) == 0
        assert run(payoff, TRIAL_PASSES, 1.0, 2.0) == TRIAL_PASSES // 2
        wait *= 2


class Sure:
    def __init__(self) -> None:
        self.asked = 0

    def propose(self, asks: Sequence[Ask]) -> Mapping[int, tuple[int, ...]]:
        self.asked += 1
        return {ask.sequence: (5, 6) for ask in asks}


def passes(
    speculation: Speculation, count: int, sequences: int, cost: Callable[[int], float]
) -> None:
    """Sequences decode together; of each proposal, the first of two tokens is right."""
    for _ in range(count):
        asks = [Ask(number, b"", [1, 2], 2) for number in range(sequences)]
        proposals = speculation.propose(asks)
        chunks, draws = [], []
        for ask in asks:
            guess = tuple(proposals.get(ask.sequence, ()))
            chunks.append(Chunk(ask.sequence, ask.sequence, 1, (2, *guess), True, len(guess)))
            draws += [5, 7] if guess else [7]
        batch = Batch((), tuple(chunks))
        speculation.observe(batch, draws, PASS_S * cost(batch.tokens))


def test_each_order_of_magnitude_of_sequences_is_judged_apart() -> None:
    proposer = Sure()
    speculation = Speculation(proposer, adaptive=True)

    def free_up_to_eight(width: int) -> float:
        return max(1.0, width / 8)

    passes(speculation, TRIAL_PASSES, 1, free_up_to_eight)
    passes(speculation, TRIAL_PASSES, 8, free_up_to_eight)
    asked = proposer.asked
    passes(speculation, 10, 1, free_up_to_eight)
    assert proposer.asked == asked + 10
    assert speculation.stats().on
    passes(speculation, 10, 8, free_up_to_eight)
    assert proposer.asked == asked + 10
    assert not speculation.stats().on


def test_without_a_switch_it_is_on_and_counted() -> None:
    speculation = Speculation(Sure(), adaptive=False)
    passes(speculation, 10, 2, lambda width: width)
    stats = speculation.stats()
    assert (stats.on, stats.passes, stats.proposed, stats.accepted) == (True, 10, 40, 20)


def test_prompts_are_no_measure() -> None:
    speculation = Speculation(Sure(), adaptive=True)
    batch = Batch((), (Chunk(1, 0, 0, (1, 2, 3), True),))
    for number in range(10 * TRIAL_PASSES):
        # Also where the one that was about to decode had to give way to a prompt.
        speculation.propose([Ask(2, b"", [1, 2], 2)] if number % 2 else [])
        speculation.observe(batch, [7], 1000.0 + number)
    passes(speculation, TRIAL_PASSES, 1, lambda width: 1.0)
    assert speculation.stats().on
