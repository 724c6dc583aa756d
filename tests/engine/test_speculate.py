"""Guessing ahead by itself: what is proposed, what stands, and that no answer ever changes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.engine import speculate
from meshnode.engine.scheduler import (
    PROPOSED_IN_BATCH_MAX,
    Batch,
    Chunk,
    Limits,
    Scheduler,
    Trim,
)
from meshnode.engine.speculate import (
    PROPOSED_TOKENS_MAX,
    Ask,
    PromptLookup,
    Proposer,
    Verdict,
    judge,
    verify,
)

END = 0


# --- which proposals stand -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proposed", "drawn", "verdict"),
    [
        ((), (5,), Verdict(0, 5)),
        ((5, 6), (5, 6, 7), Verdict(2, 7)),
        ((5, 6), (5, 9), Verdict(1, 9)),
        ((5, 6), (9,), Verdict(0, 9)),
        # A pipeline's last stage may draw everywhere: what follows a miss is not looked at.
        ((5, 6), (9, 6, 7), Verdict(0, 9)),
        ((5, 5), (5, 4, 5), Verdict(1, 4)),
        ((), (5, 6), Verdict(0, 5)),
    ],
)
def test_what_stands(proposed: tuple[int, ...], drawn: tuple[int, ...], verdict: Verdict) -> None:
    assert judge(proposed, drawn) == verdict


@pytest.mark.parametrize(("proposed", "drawn"), [((), ()), ((5,), ()), ((5, 6), (5, 6))])
def test_too_few_draws_are_no_verdict(proposed: tuple[int, ...], drawn: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="draws"):
        judge(proposed, drawn)


@pytest.mark.parametrize(
    ("proposed", "model", "drawn"),
    [((), "7", [7]), ((5, 6), "567", [5, 6, 7]), ((5, 6), "597", [5, 9]), ((5, 6), "967", [9])],
)
def test_nothing_is_drawn_after_a_miss(
    proposed: tuple[int, ...], model: str, drawn: list[int]
) -> None:
    asked: list[int] = []

    def draw(place: int) -> int:
        asked.append(place)
        return int(model[place])

    assert verify(proposed, draw) == drawn
    assert asked == list(range(len(drawn)))


# --- prompt lookup -------------------------------------------------------------------------------


def guess(lookup: PromptLookup, tokens: Sequence[int], tokens_max: int = 4) -> tuple[int, ...]:
    return lookup.propose([Ask(1, b"s", tokens, tokens_max)]).get(1, ())


@pytest.mark.parametrize(
    ("tokens", "tokens_max", "proposal"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], 4, (4, 5, 6, 1)),
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], 2, (4, 5)),
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], 0, ()),
        ([1, 2, 3, 4], 4, ()),
        ([], 4, ()),
        ([7], 4, ()),
        ([7, 7], 4, ()),
        # A loop goes on, also beyond what there is of it.
        ([7, 7, 7], 4, (7, 7, 7, 7)),
        ([1, 2, 1, 2, 1, 2], 5, (1, 2, 1, 2, 1)),
        # One common token is a coincidence, two are not; three win over two that came later.
        ([1, 9, 2, 9], 4, ()),
        ([8, 1, 2, 5, 1, 2], 1, (5,)),
        ([8, 1, 2, 5, 9, 1, 2, 6, 8, 1, 2], 1, (5,)),
        # Of equals, the latest.
        ([1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 3], 1, (6,)),
    ],
)
def test_what_the_text_proposes(
    tokens: list[int], tokens_max: int, proposal: tuple[int, ...]
) -> None:
    assert guess(PromptLookup(), tokens, tokens_max) == proposal


@given(st.lists(st.integers(0, 3), max_size=60))
def test_an_index_that_grows_knows_what_a_new_one_knows(tokens: list[int]) -> None:
    growing = PromptLookup()
    for length in range(len(tokens) + 1):
        expected = guess(PromptLookup(), tokens[:length])
        assert guess(growing, tokens[:length]) == expected


def test_memory_is_bounded_and_the_latest_text_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "NGRAMS_MAX", 20)
    lookup = PromptLookup()
    tokens = [*range(100, 200), 190, 191, 192]
    assert guess(lookup, tokens) == (193, 194, 195, 196)
    assert guess(lookup, [*tokens, 100, 101, 102]) == ()
    # A sequence that nobody asks about any more leaves nothing behind.
    lookup.propose([])
    assert guess(lookup, [193, 194]) == ()


# --- the scheduler -------------------------------------------------------------------------------


def decoding(scheduler: Scheduler, *numbers: int, max_tokens: int | None = None) -> None:
    """Bring sequences of prompt [1, 2, 3] to where they decode."""
    for number in numbers:
        scheduler.submit(number, bytes([number]), [1, 2, 3], max_tokens)
    while len(scheduler.asks()) < len(numbers):
        batch = scheduler.plan()
        assert batch is not None
        scheduler.commit(batch, [4] * batch.outputs)


def make(slots: int = 4, kv_tokens: int = 400) -> Scheduler:
    return Scheduler(Limits(slots, 100, kv_tokens, 4, 10, 4), frozenset({END}))


def test_proposals_go_behind_the_token_and_the_rejected_are_trimmed() -> None:
    scheduler = make()
    decoding(scheduler, 1, 2)
    assert [(ask.sequence, list(ask.tokens)) for ask in scheduler.asks()] == [
        (1, [1, 2, 3, 4]),
        (2, [1, 2, 3, 4]),
    ]
    batch = scheduler.plan({1: (5, 6, 7)})
    assert batch is not None
    assert batch.chunks == (Chunk(1, 0, 3, (4, 5, 6, 7), True, 3), Chunk(2, 1, 3, (4,), True))
    assert [(chunk.sequence, row) for chunk, row in batch.rows()] == [(1, 0), (2, 4)]
    assert batch.outputs == 5
    draws = [5, 6, 9, 8]  # two stand, then 9 instead of 7; 8 is the other sequence's
    assert batch.rejected(draws) == [Trim(0, 6)]
    results = scheduler.commit(batch, draws)
    assert [(result.sequence, result.token) for result in results] == [
        (1, 5),
        (1, 6),
        (1, 9),
        (2, 8),
    ]
    assert [result.usage.completion_tokens for result in results] == [2, 3, 4, 2]
    following = scheduler.plan()
    assert following is not None
    assert following.trims == ()
    assert following.chunks == (Chunk(1, 0, 6, (9,), True), Chunk(2, 1, 4, (8,), True))


@pytest.mark.parametrize("draws", [[], [5], [5, 6, 7, 8, 9], [9, 6, 7]])
def test_draws_that_do_not_fit_the_batch(draws: list[int]) -> None:
    scheduler = make()
    decoding(scheduler, 1)
    batch = scheduler.plan({1: (5, 6)})
    assert batch is not None
    with pytest.raises(ValueError, match="draws"):
        scheduler.commit(batch, draws)


@pytest.mark.parametrize(("max_tokens", "proposed"), [(2, 0), (3, 1), (4, 2), (6, 4), (9, 4)])
def test_an_answer_never_becomes_too_long(max_tokens: int, proposed: int) -> None:
    scheduler = make()
    decoding(scheduler, 1, max_tokens=max_tokens)
    (ask,) = scheduler.asks()
    assert ask.tokens_max == proposed
    batch = scheduler.plan({1: (5,) * 9})
    assert batch is not None
    assert batch.chunks[0].proposed == proposed
    results = scheduler.commit(batch, [5] * (proposed + 1))
    is_over = results[-1].finish == "length"
    assert is_over == (proposed + 2 == max_tokens)
    assert results[-1].usage.completion_tokens == proposed + 2
    assert all(result.finish is None for result in results[:-1])


def test_the_end_is_not_guessed_at_and_ends_a_run() -> None:
    scheduler = make()
    decoding(scheduler, 1)
    batch = scheduler.plan({1: (5, END, 6)})
    assert batch is not None
    assert batch.chunks[0].proposals == (5,)
    results = scheduler.commit(batch, [5, END])
    assert [result.finish for result in results] == [None, "stop"]
    assert scheduler.idle


def test_a_batch_is_only_so_wide_and_everybody_gets_an_equal_part() -> None:
    slots = PROPOSED_IN_BATCH_MAX // 2
    scheduler = make(slots, 10_000)
    decoding(scheduler, *range(1, slots + 1))
    assert {ask.tokens_max for ask in scheduler.asks()} == {2}
    batch = scheduler.plan(dict.fromkeys(range(1, slots + 1), (5, 6, 7, 8)))
    assert batch is not None
    assert {chunk.proposed for chunk in batch.chunks} == {2}


def test_a_prompt_beside_proposals_gets_its_whole_budget() -> None:
    scheduler = make()
    decoding(scheduler, 1)
    scheduler.submit(2, b"b", range(20, 40), None)
    batch = scheduler.plan({1: (5, 6)})
    assert batch is not None
    assert [len(chunk.tokens) for chunk in batch.chunks] == [3, 4]


def test_nobody_is_evicted_for_a_guess() -> None:
    scheduler = Scheduler(Limits(2, 12, 12, 4, 10, 4), frozenset({END}))
    scheduler.submit(1, b"a", [9] * 6, 1)
    batch = scheduler.plan()
    assert batch is not None
    scheduler.commit(batch, [4])  # over; its six cells stay
    decoding(scheduler, 2)
    batch = scheduler.plan({2: (5, 6, 7, 8)})
    assert batch is not None
    assert batch.trims == ()
    assert batch.chunks[0].proposals == (5, 6)  # 12 - 6 - 3 computed - 1 now


# --- no answer ever changes ----------------------------------------------------------------------


class Tale:
    """An honest tiny model: the next token hangs on seed, position and the last three tokens, so
    texts repeat themselves but not for ever. Its draws are counted, as a sampler's would be."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def next(self, tokens: Sequence[int]) -> int:
        chance = random.Random(hash((self._seed, len(tokens) // 7, *tokens[-3:])))
        return END if chance.random() < 0.02 else chance.randint(1, 3)


class Liar:
    """Proposes anything, also what it must not: too much, ends, for those who did not ask."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def propose(self, asks: Sequence[Ask]) -> Mapping[int, tuple[int, ...]]:
        chance = self._chance
        return {
            number: tuple(chance.randint(END, 4) for _ in range(chance.randint(0, 9)))
            for number in (*(ask.sequence for ask in asks), 10**6)
        }


class Nobody:
    def propose(self, asks: Sequence[Ask]) -> Mapping[int, tuple[int, ...]]:
        return {}


def tell(
    tale: Tale,
    proposer: Proposer,
    limits: Limits,
    prompts: Sequence[tuple[int, list[int], int | None]],
    leaves: Mapping[int, int] | None = None,
) -> tuple[dict[int, list[int]], int]:
    """Run prompts of (session, tokens, max_tokens); `leaves`: after so many passes, that one is
    cancelled. Returns the answers and the passes taken. The KV cache is checked at every step."""
    scheduler = Scheduler(limits, frozenset({END}))
    cells: dict[int, list[int]] = {slot: [] for slot in range(limits.slots)}
    texts = {number: list(prompt) for number, (_, prompt, _) in enumerate(prompts)}
    waiting = list(enumerate(prompts))
    passes = 0
    while waiting or not scheduler.idle:
        while waiting and scheduler.load().waiting < limits.waiting_max:
            number, (session, prompt, max_tokens) = waiting.pop(0)
            scheduler.submit(number, bytes([session]), prompt, max_tokens)
        passes += 1
        assert passes < 5000, "no progress"
        if leaves and passes in leaves:
            scheduler.end(leaves[passes])
        batch = scheduler.plan(proposer.propose(scheduler.asks()))
        if batch is None:
            continue
        decoders = [chunk for chunk in batch.chunks if chunk.is_decode]
        proposed = sum(chunk.proposed for chunk in decoders)
        assert proposed <= max(PROPOSED_IN_BATCH_MAX, 0)
        assert all(chunk.proposed <= PROPOSED_TOKENS_MAX for chunk in batch.chunks)
        assert batch.tokens <= len(decoders) + proposed + limits.prefill_tokens
        draws = perform(tale, batch, cells, texts)
        assert sum(map(len, cells.values())) <= limits.kv_tokens, "the cache overflows"
        results = scheduler.commit(batch, draws)
        assert Counter(r.sequence for r in results) == Counter(
            chunk.sequence for chunk, drawn in batch.drawn(draws) for _ in drawn
        )
        for trim in batch.rejected(draws):
            del cells[trim.slot][trim.keep :]
        for result in results:
            if result.finish != "stop":
                texts[result.sequence].append(result.token)
    return {
        number: texts[number][len(prompt) :] for number, (_, prompt, _) in enumerate(prompts)
    }, passes


def perform(
    tale: Tale, batch: Batch, cells: dict[int, list[int]], texts: dict[int, list[int]]
) -> list[int]:
    """What the model does with a batch, complaining of what would be nonsense."""
    for trim in batch.trims:
        assert trim.keep <= len(cells[trim.slot])
        del cells[trim.slot][trim.keep :]
    rows: list[tuple[int, ...]] = []
    for chunk in batch.chunks:
        lane = cells[chunk.slot]
        assert chunk.start == len(lane), "positions must be contiguous"
        for token in chunk.tokens:
            lane.append(token)
            rows.append(tuple(lane))
        known = texts[chunk.sequence]
        assert lane[: len(lane) - chunk.proposed] == known[: len(lane) - chunk.proposed]
    draws: list[int] = []
    for chunk, row in batch.rows():
        draws += verify(chunk.proposals, lambda place, row=row: tale.next(rows[row + place]))
    return draws


prompts = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.lists(st.integers(1, 3), min_size=1, max_size=30),
        st.none() | st.integers(1, 20),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=120, deadline=None)
@given(
    prompts=prompts,
    seed=st.integers(0, 10**6),
    slots=st.integers(1, 4),
    kv_tokens=st.integers(60, 140),
    leaves=st.dictionaries(st.integers(1, 60), st.integers(0, 5), max_size=2),
)
def test_answers_are_the_same_whoever_guesses(
    prompts: list[tuple[int, list[int], int | None]],
    seed: int,
    slots: int,
    kv_tokens: int,
    leaves: dict[int, int],
) -> None:
    tale = Tale(seed)
    limits = Limits(slots, 60, kv_tokens, 6, 12, 6)
    expected, _ = tell(tale, Nobody(), limits, prompts)
    for proposer in (PromptLookup(), Liar(seed)):
        assert tell(tale, proposer, limits, prompts)[0] == expected
        cut, _ = tell(tale, proposer, limits, prompts, leaves)
        for number, answer in cut.items():
            whole = expected[number]
            assert answer == (whole[: len(answer)] if number in leaves.values() else whole)


def test_lookup_saves_passes_on_a_text_that_repeats_itself() -> None:
    class Copy(Tale):
        def next(self, tokens: Sequence[int]) -> int:
            return tokens[-10]

    prompt = [(0, list(range(1, 11)) * 2, 60)]
    limits = Limits(1, 100, 100, 6)
    plain, passes = tell(Copy(0), Nobody(), limits, prompt)
    guessed, fewer = tell(Copy(0), PromptLookup(), limits, prompt)
    assert guessed == plain
    assert passes == 60
    assert fewer == 1 + 12  # the prompt, then five tokens at a time
