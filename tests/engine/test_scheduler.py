"""The scheduler by itself: tables for its choices, and invariants under random histories."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.engine.cells import cells
from meshnode.engine.scheduler import Batch, Chunk, Limits, Sampled, Scheduler, Trim
from meshnode.errors import ContextLengthError, EngineBusyError

END = 0
WORD = 7


def make(
    slots: int = 2,
    context_tokens: int = 100,
    kv_tokens: int = 400,
    waiting_max: int = 4,
    prefill_tokens: int = 10,
    prefill_tokens_beside_decode: int = 4,
) -> Scheduler:
    limits = Limits(
        slots, context_tokens, kv_tokens, waiting_max, prefill_tokens, prefill_tokens_beside_decode
    )
    return Scheduler(limits, frozenset({END}))


def step(scheduler: Scheduler, token: int = WORD) -> tuple[Batch, list[Sampled]]:
    batch = scheduler.plan()
    assert batch is not None
    return batch, scheduler.commit(batch, [token] * batch.outputs)


def run(scheduler: Scheduler, tokens: int = 1) -> None:
    """Until everything has ended; each sequence draws `tokens - 1` words, then the end."""
    drawn: dict[int, int] = {}
    while (batch := scheduler.plan()) is not None:
        draws = []
        for chunk in batch.chunks:
            if chunk.wants_logits:
                drawn[chunk.sequence] = drawn.get(chunk.sequence, 0) + 1
                draws.append(END if drawn[chunk.sequence] >= tokens else WORD)
        scheduler.commit(batch, draws)


def only_chunk(batch: Batch) -> Chunk:
    (chunk,) = batch.chunks
    return chunk


def test_a_prompt_is_computed_in_chunks_and_only_the_last_wants_logits() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", range(1, 24), max_tokens=2)
    spans = []
    for _ in range(3):
        batch, _ = step(scheduler)
        chunk = only_chunk(batch)
        spans.append((chunk.start, len(chunk.tokens), chunk.wants_logits))
    assert spans == [(0, 10, False), (10, 10, False), (20, 3, True)]
    batch, results = step(scheduler)
    assert only_chunk(batch) == Chunk(1, 0, 23, (WORD,), True)
    assert results[0].finish == "length"
    assert results[0].usage.completion_tokens == 2
    assert scheduler.idle


def test_prefill_goes_beside_decoding_in_smaller_chunks() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", [1, 2, 3], None)
    step(scheduler)
    scheduler.submit(2, b"b", range(1, 21), None)
    batch, _ = step(scheduler)
    assert [(chunk.sequence, len(chunk.tokens)) for chunk in batch.chunks] == [(1, 1), (2, 4)]


def test_two_prompts_share_the_budget_oldest_first() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", range(1, 9), None)
    scheduler.submit(2, b"b", range(1, 9), None)
    batch, _ = step(scheduler)
    assert [(chunk.sequence, len(chunk.tokens)) for chunk in batch.chunks] == [(1, 8), (2, 2)]


def test_an_end_token_is_no_part_of_the_answer() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", [1, 2], None)
    _, results = step(scheduler, END)
    assert results[0].finish == "stop"
    assert results[0].usage.completion_tokens == 0


def test_the_next_turn_reuses_its_session_although_another_slot_matches_better() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", [1, 2, 3, 4], None)
    scheduler.submit(2, b"b", [1, 2, 3, 4, 5, 6], None)
    run(scheduler)
    scheduler.submit(3, b"a", [1, 2, 3, 4, 5, 6, 7], None)
    batch = scheduler.plan()
    assert batch is not None
    chunk = only_chunk(batch)
    assert (chunk.slot, chunk.start) == (0, 4)
    assert batch.trims == ()


def test_without_a_session_the_longest_common_prefix_wins_and_the_rest_is_trimmed() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", [1, 2, 9, 9], None)
    scheduler.submit(2, b"b", [1, 2, 3, 4], None)
    run(scheduler)
    scheduler.submit(3, b"c", [1, 2, 3, 8], None)
    batch = scheduler.plan()
    assert batch is not None
    assert batch.trims == (Trim(1, 3),)
    assert only_chunk(batch) == Chunk(3, 1, 3, (8,), True)
    (result,) = scheduler.commit(batch, [END])
    assert result.usage.cached_tokens == 3


def test_a_shared_system_prompt_does_not_cost_another_conversation_its_history() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", [1, 2, *range(10, 40)], None)
    run(scheduler)
    scheduler.submit(2, b"b", [1, 2, 50], None)
    batch = scheduler.plan()
    assert batch is not None
    assert only_chunk(batch).slot == 1


def test_the_least_recently_used_slot_is_overwritten() -> None:
    scheduler = make()
    for number, prompt in ((1, [1] * 8), (2, [2] * 8), (3, [1] * 9)):
        scheduler.submit(number, bytes([number]), prompt, None)
        run(scheduler)
    scheduler.submit(4, b"new", [5] * 8, None)
    batch = scheduler.plan()
    assert batch is not None
    assert only_chunk(batch).slot == 1
    assert batch.trims == (Trim(1, 0),)


def test_an_equal_prompt_still_computes_its_last_token() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", [1, 2, 3], None)
    run(scheduler)
    scheduler.submit(2, b"a", [1, 2, 3], None)
    batch = scheduler.plan()
    assert batch is not None
    assert only_chunk(batch) == Chunk(2, 0, 2, (3,), True)


def test_a_full_queue_is_busy_and_a_long_prompt_is_refused() -> None:
    scheduler = make(slots=1, waiting_max=1)
    scheduler.submit(1, b"a", [1], None)
    scheduler.submit(2, b"b", [1], None)
    with pytest.raises(EngineBusyError) as busy:
        scheduler.submit(3, b"c", [1], None)
    assert busy.value.retry_after_s > 0
    with pytest.raises(ContextLengthError):
        make().submit(1, b"a", range(1, 101), None)
    with pytest.raises(ContextLengthError):
        make().submit(1, b"a", range(1, 51), 51)
    make().submit(1, b"a", range(1, 51), 50)


def test_idle_slots_are_evicted_when_the_cache_is_full() -> None:
    scheduler = make(slots=2, context_tokens=20, kv_tokens=20)
    scheduler.submit(1, b"a", [1] * 15, None)
    run(scheduler)
    scheduler.submit(2, b"b", [2] * 10, None)
    batch = scheduler.plan()
    assert batch is not None
    assert batch.trims == (Trim(0, 0),)
    assert only_chunk(batch).slot == 1
    assert scheduler.load().kv_tokens_free == 10


def test_a_full_cache_preempts_the_youngest_which_then_finishes() -> None:
    scheduler = make(slots=2, context_tokens=200, kv_tokens=200, prefill_tokens=100)
    scheduler.submit(1, b"a", [1] * 30, 150)
    scheduler.submit(2, b"b", [2] * 30, 150)
    usages = {}
    preempted = False
    for _ in range(1000):
        batch = scheduler.plan()
        if batch is None:
            break
        preempted = preempted or (scheduler.load().waiting == 1 and not scheduler.idle)
        for result in scheduler.commit(batch, [WORD] * batch.outputs):
            if result.finish is not None:
                assert result.finish == "length"
                usages[result.sequence] = result.usage
    assert preempted
    assert {number: usage.completion_tokens for number, usage in usages.items()} == {1: 150, 2: 150}


def test_ending_works_while_waiting_and_while_running() -> None:
    scheduler = make(slots=1)
    scheduler.submit(1, b"a", [1, 2, 3], None)
    scheduler.submit(2, b"b", [4], None)
    step(scheduler)
    usage = scheduler.end(1)
    assert usage is not None
    assert usage.completion_tokens == 1
    assert scheduler.end(2) is not None
    assert scheduler.end(2) is None
    assert scheduler.idle
    assert scheduler.plan() is None
    assert scheduler.load().sessions == (b"a",)


def test_a_batch_that_was_not_committed_is_planned_again() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", range(1, 30), None)
    assert scheduler.plan() == scheduler.plan()


def test_a_slot_that_could_not_be_trimmed_is_computed_from_the_start() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", [1, 2, 3, 4], None)
    run(scheduler)
    scheduler.submit(2, b"a", [1, 2, 5, 6], None)
    batch = scheduler.plan()
    assert batch is not None
    assert batch.trims == (Trim(0, 2),)
    scheduler.forget(0)
    batch, results = step(scheduler, END)
    assert only_chunk(batch) == Chunk(2, 0, 0, (1, 2, 5, 6), True)
    assert results[0].usage.cached_tokens == 0


def test_sessions_are_listed_once_most_recent_last() -> None:
    scheduler = make(slots=3)
    scheduler.submit(1, b"a", [1, 2, 3], None)
    scheduler.submit(2, b"a", [1, 2, 3], None)
    scheduler.submit(3, b"b", [4, 5, 6], None)
    run(scheduler)
    scheduler.submit(4, b"a", [1, 2, 3, 4], None)
    run(scheduler)
    assert scheduler.load().sessions == (b"b", b"a")


# -- invariants ------------------------------------------------------------------------------------


@dataclass
class Cache:
    """A model KV cache that complains where llama.cpp would, or would compute nonsense."""

    kv_tokens: int
    slots: dict[int, list[int]] = field(default_factory=dict)

    def perform(self, batch: Batch) -> None:
        for trim in batch.trims:
            tokens = self.slots.setdefault(trim.slot, [])
            assert trim.keep <= len(tokens)
            del tokens[trim.keep :]
        assert batch.chunks, "an empty batch would spin"
        slots = [chunk.slot for chunk in batch.chunks]
        assert len(set(slots)) == len(slots), "two sequences in one slot"
        for chunk in batch.chunks:
            tokens = self.slots.setdefault(chunk.slot, [])
            assert chunk.start == len(tokens), "positions must be contiguous"
            assert chunk.tokens
            assert min(chunk.tokens) >= 0 or chunk.tokens in VIEWS, "a view is computed whole"
            assert batch.view is None or len(batch.chunks) == 1, "and alone"
            tokens.extend(chunk.tokens)
        assert sum(map(len, self.slots.values())) <= self.kv_tokens, "the cache overflows"


VIEWS = [tuple(cells(digest, 3 + 4 * digest)) for digest in range(4)]

requests = st.tuples(
    st.integers(1, 40),  # prompt length
    st.lists(st.sampled_from(VIEWS), max_size=2),  # pictures in its middle
    st.integers(0, 3),  # which of a few prompts, so that prefixes are shared
    st.integers(0, 3),  # session
    st.none() | st.integers(1, 30),  # max_tokens
    st.integers(1, 30),  # tokens until it draws the end token
)
actions = st.lists(
    st.one_of(
        requests,
        st.just("step"),
        st.just("abort"),
        st.integers(0, 20),  # cancel
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    actions=actions,
    slots=st.integers(1, 4),
    kv_tokens=st.integers(50, 120),
    prefill_tokens=st.integers(1, 16),
)
def test_invariants_hold_and_every_request_ends(
    actions: list[object], slots: int, kv_tokens: int, prefill_tokens: int
) -> None:
    limits = Limits(slots, 50, kv_tokens, 6, prefill_tokens, max(1, prefill_tokens // 2))
    scheduler = Scheduler(limits, frozenset({END}))
    cache = Cache(kv_tokens)
    prompts: dict[int, list[int]] = {}
    patience: dict[int, int] = {}
    answers: dict[int, list[int]] = {}

    def one_step(*, commit: bool) -> bool:
        batch = scheduler.plan()
        if batch is None:
            assert scheduler.idle
            return False
        decoding = [chunk for chunk in batch.chunks if len(chunk.tokens) == 1]
        assert batch.view is not None or batch.tokens <= len(decoding) + prefill_tokens
        cache.perform(batch)
        for chunk in batch.chunks:
            whole = prompts[chunk.sequence] + answers[chunk.sequence]
            assert cache.slots[chunk.slot] == whole[: len(cache.slots[chunk.slot])]
        if not commit:
            for chunk in batch.chunks:
                del cache.slots[chunk.slot][chunk.undo.keep :]
            return True
        draws = []
        for chunk in batch.chunks:
            if chunk.wants_logits:
                patience[chunk.sequence] -= 1
                draws.append(END if patience[chunk.sequence] <= 0 else 100 + chunk.sequence)
        for result in scheduler.commit(batch, draws):
            if result.finish != "stop":
                answers[result.sequence].append(result.token)
            if result.finish is not None:
                assert result.usage.completion_tokens == len(answers[result.sequence])
                assert result.usage.cached_tokens < result.usage.prompt_tokens
                del patience[result.sequence]
        return True

    for number, action in enumerate(actions):
        if action == "step":
            one_step(commit=True)
        elif action == "abort":
            one_step(commit=False)
        elif isinstance(action, int):
            known = scheduler.end(action) is not None
            assert known == (action in patience)
            patience.pop(action, None)
        elif isinstance(action, tuple):
            length, views, kind, session, max_tokens, words = action
            prompt = [kind + 1] * (length // 2)
            prompt += [cell for view in views for cell in view]
            prompt += list(range(10, 10 + length - length // 2))
            try:
                scheduler.submit(number, bytes([session]), prompt, max_tokens)
            except ContextLengthError:
                assert len(prompt) + (max_tokens or 1) > 50
            except EngineBusyError:
                assert len(patience) == slots + 6
            else:
                prompts[number], answers[number], patience[number] = prompt, [], words

    for _ in range(20_000):
        if not one_step(commit=True):
            break
    assert not patience, "a request never ended"
    assert scheduler.load().slots_busy == 0
