"""The scheduler with several batches in flight: tables, and random interleavings with two caches.

One cache is that of the first stage, which computes a batch as soon as it is planned; the other is
that of the last, which computes it when it is committed. Both refuse what llama.cpp would refuse.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.engine.prepare import prepare
from meshnode.engine.scheduler import (
    UNDRAWN,
    Batch,
    Change,
    Chunk,
    Limits,
    Sampled,
    Scheduler,
    Trim,
)
from meshnode.engine.speculate import Ask, verify
from meshnode.engine.states import StateStore
from tests.engine.small_cache import SmallCache

END = 0
WORD = 7


def make(
    slots: int = 2,
    in_flight_max: int = 2,
    context_tokens: int = 100,
    kv_tokens: int = 400,
    prefill_tokens: int = 10,
) -> Scheduler:
    limits = Limits(
        slots, context_tokens, kv_tokens, 4, prefill_tokens, 4, in_flight_max=in_flight_max
    )
    return Scheduler(limits, frozenset({END}))


def planned(scheduler: Scheduler) -> Batch:
    batch = scheduler.plan()
    assert batch is not None
    return batch


def commit(scheduler: Scheduler, batch: Batch, token: int = WORD) -> list[Sampled]:
    return scheduler.commit(batch, [token] * batch.outputs)


def spans(batch: Batch) -> list[tuple[int, int, int]]:
    """Sequence, start and length of each chunk."""
    return [(chunk.sequence, chunk.start, len(chunk.tokens)) for chunk in batch.chunks]


def decoding(scheduler: Scheduler, count: int) -> None:
    """Have `count` sequences begin, each with one token drawn."""
    for number in range(1, count + 1):
        scheduler.submit(number, bytes([number]), [number, number], None)
    commit(scheduler, planned(scheduler))


def test_chunks_of_a_prompt_follow_each_other_and_the_draw_waits_for_the_last() -> None:
    scheduler = make(in_flight_max=4)
    scheduler.submit(1, b"a", range(1, 24), None)
    batches = [planned(scheduler) for _ in range(3)]
    assert [spans(batch) for batch in batches] == [[(1, 0, 10)], [(1, 10, 10)], [(1, 20, 3)]]
    assert [batch.outputs for batch in batches] == [0, 0, 1]
    assert scheduler.plan() is None, "its next token is not drawn yet"
    assert not commit(scheduler, batches[0])
    assert not commit(scheduler, batches[1])
    assert scheduler.plan() is None
    (sampled,) = commit(scheduler, batches[2])
    assert (sampled.token, sampled.usage.completion_tokens) == (WORD, 1)
    assert spans(planned(scheduler)) == [(1, 23, 1)]


def test_no_more_batches_than_the_pipeline_takes() -> None:
    scheduler = make(in_flight_max=2)
    scheduler.submit(1, b"a", range(1, 41), None)
    first = planned(scheduler)
    planned(scheduler)
    assert scheduler.plan() is None
    commit(scheduler, first)
    assert spans(planned(scheduler)) == [(1, 20, 10)]


@pytest.mark.parametrize(
    ("sequences", "in_flight_max", "shares"),
    [(4, 2, [2, 2]), (5, 2, [3, 2]), (3, 4, [1, 1, 1]), (8, 3, [3, 3, 2]), (1, 2, [1])],
)
def test_those_that_decode_are_dealt_out_evenly(
    sequences: int, in_flight_max: int, shares: list[int]
) -> None:
    scheduler = make(8, in_flight_max, kv_tokens=1000, prefill_tokens=20)
    decoding(scheduler, sequences)
    batches = [planned(scheduler) for _ in shares]
    assert [len(batch.chunks) for batch in batches] == shares
    assert scheduler.plan() is None
    for batch in batches:  # and stay so
        commit(scheduler, batch)
        again = planned(scheduler)
        assert [span[0] for span in spans(again)] == [span[0] for span in spans(batch)]


def test_who_ends_in_flight_leaves_its_tokens_and_keeps_others_out_until_they_are_there() -> None:
    scheduler = make(slots=1)
    scheduler.submit(1, b"a", range(1, 24), None)
    batches = [planned(scheduler), planned(scheduler)]
    scheduler.end(1)
    scheduler.submit(2, b"a", range(1, 24), None)
    assert scheduler.plan() is None, "the only slot is in use"
    assert commit(scheduler, batches[0]) == []
    assert scheduler.plan() is None
    assert commit(scheduler, batches[1]) == []
    assert planned(scheduler).chunks == (Chunk(2, 0, 20, (21, 22, 23), True),)


def test_the_draw_of_who_ended_is_no_token() -> None:
    scheduler = make()
    decoding(scheduler, 1)
    batch = planned(scheduler)
    scheduler.end(1)
    assert scheduler.idle
    assert scheduler.commit(batch, [UNDRAWN]) == []
    scheduler.submit(2, b"\1", [1, 1, WORD, 9], None)
    assert spans(planned(scheduler)) == [(2, 3, 1)], "its slot has all three"


def test_what_is_in_flight_has_its_room_and_is_neither_preempted_nor_evicted() -> None:
    scheduler = make(context_tokens=20, kv_tokens=20)
    scheduler.submit(1, b"a", [1] * 12, None)
    first, second = planned(scheduler), planned(scheduler)
    assert (first.tokens, second.tokens) == (10, 2)
    scheduler.end(1)
    scheduler.submit(2, b"b", [2] * 15, None)
    commit(scheduler, first)
    assert scheduler.plan() is None, "10 cells are history, and 2 will be"
    scheduler.commit(second, [UNDRAWN])
    batch = planned(scheduler)
    assert batch.changes == (Trim(0, 0),)
    assert spans(batch) == [(2, 0, 10)]


def test_only_the_oldest_batch_can_be_committed() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", range(1, 24), None)
    planned(scheduler)
    second = planned(scheduler)
    with pytest.raises(ValueError, match="oldest"):
        commit(scheduler, second)


def test_after_a_break_all_is_computed_again_and_nothing_is_drawn_twice() -> None:
    scheduler = make(slots=3)
    decoding(scheduler, 2)
    lost = planned(scheduler)
    scheduler.submit(3, b"c", range(11, 16), None)
    planned(scheduler)
    scheduler.forget_all()
    with pytest.raises(ValueError, match="oldest"):
        commit(scheduler, lost)
    batch = planned(scheduler)
    assert spans(batch) == [(1, 0, 3), (2, 0, 3), (3, 0, 4)]
    assert [chunk.tokens for chunk in batch.chunks[:2]] == [(1, 1, WORD), (2, 2, WORD)]
    results = commit(scheduler, batch)
    assert [sampled.usage.completion_tokens for sampled in results] == [2, 2]


# -- random interleavings --------------------------------------------------------------------------


class Ring:
    """A scheduler and the caches of two stages; `texts` are prompts and answers by sequence.

    So many tokens are guessed for each that decodes, and the last of them is wrong.
    """

    def __init__(self, limits: Limits, guesses: int = 0) -> None:
        self.scheduler = Scheduler(limits, frozenset({END}))
        self.texts: dict[int, list[int]] = {}
        self.going: set[int] = set()
        self._limits = limits
        self._guesses = guesses
        self._states = StateStore(None, 1)
        self._start()

    def _start(self) -> None:
        self._first, self._last = SmallCache(self._limits), SmallCache(self._limits)
        self._in_flight: deque[tuple[list[Change], Batch]] = deque()
        # Changes that go out with the next batch.
        self._owed: list[Change] = []

    def submit(self, number: int, prompt: list[int], max_tokens: int | None) -> None:
        self.scheduler.submit(number, bytes([1 + number % 3]), prompt, max_tokens)
        self.texts[number] = list(prompt)
        self.going.add(number)

    def end(self, number: int) -> None:
        assert (self.scheduler.end(number) is not None) == (number in self.going)
        self.going.discard(number)

    def plan(self) -> bool:
        """False if nothing can be planned before a commit."""
        asks = self.scheduler.asks()
        batch = self.scheduler.plan({ask.sequence: guess(ask, self._guesses) for ask in asks})
        if batch is None:
            return False
        self._owed += batch.changes
        if batch.chunks:
            self._change(self._first, self._owed)
            self._first.decode(batch)
            self._in_flight.append((self._owed, batch))
            self._owed = []
        else:
            assert batch.changes, "an empty batch would spin"
        return True

    def commit(self) -> bool:
        """False if nothing is in flight."""
        if not self._in_flight:
            return False
        changes, batch = self._in_flight.popleft()
        self._change(self._last, changes)
        self._last.decode(batch)
        draws: list[int] = []
        for chunk, _ in batch.rows():
            draws += self._draw(chunk)
        results = self.scheduler.commit(batch, draws)
        assert [sampled.token for sampled in results] == [d for d in draws if d != UNDRAWN]
        for sampled in results:
            if sampled.finish != "stop":
                self.texts[sampled.sequence].append(sampled.token)
            if sampled.finish is not None:
                self.going.remove(sampled.sequence)
        self._owed += batch.rejected(draws)
        return True

    def _change(self, cache: SmallCache, changes: list[Change]) -> None:
        assert prepare(changes, cache, self._states, self.scheduler)

    def _draw(self, chunk: Chunk) -> list[int]:
        """From what the last stage has in its cache."""
        if chunk.sequence not in self.going:
            return [UNDRAWN]
        seen = self._last.tokens(chunk.slot)
        known = len(seen) - chunk.proposed
        assert seen[:known] == self.texts[chunk.sequence]
        return verify(chunk.proposals, lambda place: next_token(seen[: known + place]))

    def break_down(self) -> None:
        self.scheduler.forget_all()
        assert self.scheduler.load().slots_busy == 0
        self._start()

    def run(self) -> None:
        """Until every request has ended."""
        for _ in range(20_000):
            is_full = len(self._in_flight) == self._limits.in_flight_max
            if (is_full or not self.plan()) and not self.commit():
                break
        assert not self.going, "a request never ended"
        assert self.scheduler.idle


def next_token(tokens: Sequence[int]) -> int:
    """A model: any change of what came before changes what comes next."""
    value = zlib.crc32(bytes(tokens))
    return END if value % 50 == 0 else 1 + value % 5


def guess(ask: Ask, count: int) -> list[int]:
    """Right but for the last; what is too much is left out."""
    tokens: list[int] = []
    for _ in range(count - 1):
        tokens.append(next_token([*ask.tokens, *tokens]))
    return [*tokens, 6] if count else []


prompts = st.tuples(st.integers(1, 3), st.integers(1, 45), st.sampled_from([None, None, 1, 9]))
actions = st.lists(
    st.one_of(
        prompts,
        prompts,
        st.sampled_from(["plan", "plan", "plan", "commit", "commit", "commit", "break"]),
        st.sampled_from(["plan", "commit"]),
        st.integers(0, 20),  # cancel
    ),
    min_size=20,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(
    actions=actions,
    slots=st.integers(1, 4),
    slots_kept=st.integers(0, 4),
    kv_tokens=st.integers(120, 240),  # some cannot run beside each other for long
    prefill_tokens=st.integers(1, 20),
    in_flight_max=st.integers(2, 5),
    guesses=st.sampled_from([0, 1, 3]),
)
def test_any_interleaving_gives_the_texts_of_one_batch_at_a_time(
    actions: list[object],
    slots: int,
    slots_kept: int,
    kv_tokens: int,
    prefill_tokens: int,
    in_flight_max: int,
    guesses: int,
) -> None:
    plain = Limits(
        slots, 120, kv_tokens, 20, prefill_tokens, max(1, prefill_tokens // 2), slots_kept
    )
    ring = Ring(replace(plain, in_flight_max=in_flight_max), guesses)
    alone = Ring(plain)
    ended: set[int] = set()
    for number, action in enumerate(actions):
        match action:
            case "plan":
                ring.plan()
            case "commit":
                ring.commit()
            case "break":
                ring.break_down()
            case int():
                ended |= {action} & ring.going
                ring.end(action)
            case (int(kind), int(length), max_tokens) if len(ring.going) < slots + 20:
                # Few beginnings, so that they are shared.
                prompt = [kind] * (length // 2) + [5] * (length - length // 2)
                ring.submit(number, prompt, max_tokens)
                alone.submit(number, prompt, max_tokens)
                alone.run()
    ring.run()
    assert ring.scheduler.load().kv_tokens_free == kv_tokens
    for number, text in ring.texts.items():
        whole = alone.texts[number]
        assert text == (whole[: len(text)] if number in ended else whole)
