"""Guessing the next tokens, so that one pass of the model may yield several of them.

Decides what to propose from a sequence's own text, and which proposals stand once the model has
drawn. Does not know models, batches or time; whether guessing pays is for `payoff.py`, and a
small model that guesses better than this is `draft.py`.

What is promised. A sequence with proposals is computed at several positions in one pass, and its
own sampler then draws at the first, the second, ... for as long as each draw is the token that
was proposed there. So every token of the answer is drawn by the sequence's own chain (seed,
penalties, grammar and all), once, in order, from the model's logits after exactly the tokens
before it: proposals decide how many tokens a pass yields and never which. The one difference to
drawing without proposals is the width of the batch: llama.cpp rounds differently in batches of
different width, as it does beside other sequences, so two tokens that the model finds equally
likely to within that rounding may change places, greedy or seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# Each proposal costs about as much as a token of prefill; guesses further ahead are seldom right.
PROPOSED_TOKENS_MAX = 4
# Words shared by three tokens are likely a quotation; by one, a coincidence.
NGRAM_TOKENS_MAX = 3
NGRAM_TOKENS_MIN = 2
# Per sequence, about 3 MB; the latest n-grams of a context of 8192 tokens.
NGRAMS_MAX = 16_384


@dataclass(frozen=True, slots=True)
class Ask:
    """A sequence that is about to draw its next token: `tokens` are its prompt and answer.

    `tokens` is the scheduler's own list; it grows between asks and is not to be changed. At most
    `tokens_max` proposals (from 0) are of use.
    """

    sequence: int
    session: bytes
    tokens: Sequence[int]
    tokens_max: int


class Proposer(Protocol):
    """Guesses how sequences go on."""

    def propose(self, asks: Sequence[Ask]) -> Mapping[int, tuple[int, ...]]:
        """By sequence, its probable next tokens; none for a sequence without a good guess.

        A sequence that is not asked about may be forgotten; asked about again, its tokens begin
        with those of before.
        """
        ...


class PromptLookup:
    """Proposes what followed the last time that a sequence had the tokens it ends with now.

    Right where text repeats itself: quotations, code, tables, summaries with names. Costs some
    microseconds per token and no model.
    """

    def __init__(self) -> None:
        self._indexes: dict[int, _Index] = {}

    def propose(self, asks: Sequence[Ask]) -> dict[int, tuple[int, ...]]:
        self._indexes = {ask.sequence: self._indexes.get(ask.sequence, _Index()) for ask in asks}
        proposals = {
            ask.sequence: self._indexes[ask.sequence].guess(ask.tokens, ask.tokens_max)
            for ask in asks
        }
        return {sequence: tokens for sequence, tokens in proposals.items() if tokens}


class _Index:
    """Of one sequence: after which n-grams which position came last. Holds `NGRAMS_MAX`."""

    __slots__ = ("_after", "_indexed")

    def __init__(self) -> None:
        # In order of their latest occurrence, so that the first is the one to forget.
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def guess(self, tokens: Sequence[int], tokens_max: int) -> tuple[int, ...]:
        self._extend(tokens)
        for size in range(NGRAM_TOKENS_MAX, NGRAM_TOKENS_MIN - 1, -1):
            start = self._after.get(tuple(tokens[-size:]))
            if start is not None:
                break
        else:
            return ()
        proposal: list[int] = []
        for place in range(start, start + tokens_max):
            # A match close to the end is a loop: its next round begins in the proposal itself.
            beyond = place - len(tokens)
            proposal.append(tokens[place] if beyond < 0 else proposal[beyond])
        return tuple(proposal)

    def _extend(self, tokens: Sequence[int]) -> None:
        """Up to the last token but one: what the sequence ends with has nothing after it yet."""
        for after in range(max(self._indexed, NGRAM_TOKENS_MIN), len(tokens)):
            for size in range(NGRAM_TOKENS_MIN, min(NGRAM_TOKENS_MAX, after) + 1):
                ngram = tuple(tokens[after - size : after])
                self._after.pop(ngram, None)
                self._after[ngram] = after
        self._indexed = len(tokens)
        while len(self._after) > NGRAMS_MAX:
            del self._after[next(iter(self._after))]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first `accepted` proposals stand, and `token` comes after them."""

    accepted: int
    token: int


def judge(proposed: Sequence[int], drawn: Sequence[int]) -> Verdict:
    """Which proposals stand: those before the first that is not what the model drew there.

    `drawn[i]` is the token drawn after `proposed[:i]`. Draws after the first that differs are not
    looked at and need not exist; they followed tokens that are no part of the text. Raises
    `ValueError` if the draws end before the verdict.
    """
    for place, token in enumerate(drawn[: len(proposed) + 1]):
        if place == len(proposed) or token != proposed[place]:
            return Verdict(place, token)
    raise ValueError(f"{len(drawn)} draws do not judge {len(proposed)} proposals")


def verify(proposed: Sequence[int], draw: Callable[[int], int]) -> list[int]:
    """Draw at places 0, 1, ... for as long as the draws are the proposed tokens.

    The last token returned is the first that was not proposed, so a sampler that remembers its
    draws has seen exactly the tokens of the text.
    """
    drawn: list[int] = []
    for place, guess in enumerate(proposed):
        drawn.append(draw(place))
        if drawn[-1] != guess:
            return drawn
    drawn.append(draw(len(proposed)))
    return drawn
