"""The scheduler by itself: tables for its choices, and invariants under random histories."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshnode.engine.cells import cells
from meshnode.engine.prepare import prepare
from meshnode.engine.saved import Restore, Save
from meshnode.engine.scheduler import (
    IDLE_TOKENS_MAX,
    PUT_ASIDE_FOR_TOKENS_MIN,
    Batch,
    Change,
    Chunk,
    Copy,
    Limits,
    Sampled,
    Scheduler,
    Trim,
)
from meshnode.engine.states import StateStore
from meshnode.errors import ContextLengthError, EngineBusyError
from tests.engine.small_cache import SmallCache

END = 0
WORD = 7


def make(
    slots: int = 2,
    context_tokens: int = 100,
    kv_tokens: int = 400,
    waiting_max: int = 4,
    prefill_tokens: int = 10,
    prefill_tokens_beside_decode: int = 4,
    slots_kept: int = 0,
    saved_tokens: int = 0,
    spilled_tokens: int = 0,
    copies: bool = True,
) -> Scheduler:
    limits = Limits(
        slots,
        context_tokens,
        kv_tokens,
        waiting_max,
        prefill_tokens,
        prefill_tokens_beside_decode,
        slots_kept,
        saved_tokens,
        spilled_tokens,
        copies,
    )
    return Scheduler(limits, frozenset({END}))


def planned(scheduler: Scheduler) -> Batch:
    batch = scheduler.plan()
    assert batch is not None
    return batch


def step(scheduler: Scheduler, token: int = WORD) -> tuple[Batch, list[Sampled]]:
    batch = planned(scheduler)
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
    scheduler.submit(2, b"b", range(11, 31), None)
    batch, _ = step(scheduler)
    assert [(chunk.sequence, len(chunk.tokens)) for chunk in batch.chunks] == [(1, 1), (2, 4)]


def test_two_prompts_share_the_budget_oldest_first() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", range(1, 9), None)
    scheduler.submit(2, b"b", range(11, 19), None)
    batch, _ = step(scheduler)
    assert [(chunk.sequence, len(chunk.tokens)) for chunk in batch.chunks] == [(1, 8), (2, 2)]


def test_an_end_token_is_no_part_of_the_answer() -> None:
    scheduler = make()
    scheduler.submit(1, b"a", [1, 2], None)
    _, results = step(scheduler, END)
    assert results[0].finish == "stop"
    assert results[0].usage.completion_tokens == 0


def kept(*histories: tuple[bytes, list[int]], slots: int = 4, **sizes: int) -> Scheduler:
    """A scheduler whose slots 0, 1, ... keep these sessions and tokens."""
    scheduler = make(slots=slots, context_tokens=400, prefill_tokens=400, **sizes)
    for number, (session, tokens) in enumerate(histories, 1):
        scheduler.submit(number, session, tokens, None)
        run(scheduler)
    return scheduler


BEGINNINGS = [
    # kept sessions and tokens; who comes with what; what is done first, then where it begins
    ("its own slot", [(b"a", [1, 2, 3])], b"a", [1, 2, 3, 9], [], (0, 3)),
    ("its own, trimmed", [(b"a", [1, 2, 3, 4])], b"a", [1, 2, 9], [Trim(0, 2)], (0, 2)),
    (
        "its own slot, with more from another's",
        [(b"a", [1, 2, 3]), (b"b", [1, 2, 4, 5, 6])],
        b"a",
        [1, 2, 4, 5, 9],
        [Trim(0, 0), Copy(1, 0, 4)],
        (0, 4),
    ),
    ("continued by a stranger", [(b"a", [1, 2])], b"b", [1, 2, 3], [], (0, 2)),
    ("shared with a stranger", [(b"a", [1, 2, 3, 4])], b"b", [1, 2, 9], [Copy(0, 1, 2)], (1, 2)),
    ("nothing in common", [(b"a", [1, 2])], b"b", [7, 8], [], (1, 0)),
    ("an equal prompt", [(b"a", [1, 2])], b"a", [1, 2], [Trim(0, 1)], (0, 1)),
    (
        "no slot is empty: the longest unused one goes",
        [(b"a", [1] * 5), (b"b", [2] * 5), (b"c", [3] * 5), (b"d", [4] * 5)],
        b"e",
        [3, 3, 9],
        [Trim(0, 0), Copy(2, 0, 2)],
        (0, 2),
    ),
    (
        "the longest unused one is also the best",
        [(b"a", [1] * 5), (b"b", [2] * 5), (b"c", [3] * 5), (b"d", [4] * 5)],
        b"e",
        [1, 1, 9],
        [Trim(0, 2)],
        (0, 2),
    ),
]


@pytest.mark.parametrize(
    ("histories", "session", "prompt", "changes", "begins"),
    [row[1:] for row in BEGINNINGS],
    ids=[row[0] for row in BEGINNINGS],
)
def test_where_a_sequence_begins(
    histories: list[tuple[bytes, list[int]]],
    session: bytes,
    prompt: list[int],
    changes: list[Change],
    begins: tuple[int, int],
) -> None:
    scheduler = kept(*histories)
    scheduler.submit(99, session, prompt, None)
    done: list[Change] = []
    while not (batch := planned(scheduler)).chunks:
        done += batch.changes
    assert done + list(batch.changes) == changes
    chunk = only_chunk(batch)
    assert (chunk.slot, chunk.start) == begins
    (result,) = scheduler.commit(batch, [END])
    assert result.usage.cached_tokens == begins[1]


def test_a_pinned_slot_that_is_run_in_is_a_history_again() -> None:
    system = [*range(1, 71)]
    scheduler = make(slots=4, context_tokens=400, kv_tokens=1000, prefill_tokens=400)
    for number in range(1, 4):
        scheduler.submit(number, bytes([number]), [*system, 100 + number], None)
        run(scheduler)
    pinned = scheduler._slots[3]
    assert (pinned.is_pinned, pinned.tokens) == (True, system)
    for number in range(4, 8):  # all run at once, so one has to run in there
        scheduler.submit(number, bytes([number]), [*system, 100 + number], None)
    while scheduler.load().slots_busy < 4:
        step(scheduler)
    assert (pinned.is_pinned, pinned.session) == (False, bytes([pinned.owner or 0]))


def test_a_model_without_beginnings_only_continues_what_it_kept() -> None:
    scheduler = kept((b"a", [1, 2, 3]), copies=False)
    scheduler.submit(2, b"b", [1, 2, 9], None)
    batch, _ = step(scheduler)
    assert batch.changes == ()
    assert only_chunk(batch) == Chunk(2, 1, 0, (1, 2, 9), True)
    scheduler.submit(3, b"a", [1, 2, 3, 5], None)
    batch = planned(scheduler)
    assert batch.changes == ()
    assert [(chunk.slot, chunk.start) for chunk in batch.chunks] == [(1, 3), (0, 3)]


def test_without_copies_the_longest_continued_slot_is_taken_also_from_others() -> None:
    scheduler = kept((b"b", [1, 2]), (b"a", [1]), copies=False)
    scheduler.submit(9, b"a", [1, 2, 3], None)
    assert planned(scheduler) == Batch((), (Chunk(9, 0, 2, (3,), True),))


def test_a_younger_one_waits_for_the_prefix_that_is_being_computed() -> None:
    scheduler = make(slots=3)
    scheduler.submit(1, b"a", [*range(1, 21), 30], None)
    scheduler.submit(2, b"b", [*range(1, 21), 40], None)
    steps = []
    for _ in range(4):
        batch, _ = step(scheduler)
        chunks = [(chunk.sequence, chunk.start, len(chunk.tokens)) for chunk in batch.chunks]
        steps.append((list(batch.changes), chunks))
    assert steps == [
        ([], [(1, 0, 10)]),
        ([], [(1, 10, 10)]),
        ([Copy(0, 1, 20)], []),
        ([], [(1, 20, 1), (2, 20, 1)]),
    ]


def test_the_least_recently_used_slot_is_overwritten() -> None:
    scheduler = make()
    for number, session, prompt in ((1, b"a", [1] * 8), (2, b"b", [2] * 8), (3, b"a", [1] * 9)):
        scheduler.submit(number, session, prompt, None)
        run(scheduler)
    scheduler.submit(4, b"new", [5] * 8, None)
    batch = planned(scheduler)
    assert only_chunk(batch).slot == 1
    assert batch.changes == (Trim(1, 0),)


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
    assert batch.changes == (Trim(0, 0),)
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
    assert batch.changes == (Trim(0, 2),)
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


class Placed(StateStore):
    """Looks after its limits; a state has a byte for each token."""

    def __init__(self, limits: Limits, directory: Path) -> None:
        super().__init__(directory, 1)
        self._limits = limits

    def check(self) -> None:
        assert sum(map(len, self._in_memory.values())) <= self._limits.saved_tokens
        assert sum(size for _, size in self._on_disk.values()) <= self._limits.spilled_tokens


VIEWS = [tuple(cells(digest, 3 + 4 * digest)) for digest in range(4)]

requests = st.tuples(
    st.sampled_from([2, 20, 70, 99]),  # prompt length
    st.lists(st.sampled_from(VIEWS), max_size=2),  # pictures in its middle
    st.integers(0, 1),  # which of a few prompts, so that prefixes are shared
    st.integers(0, 3),  # session
    st.sampled_from([None, None, 1, 30]),  # max_tokens
    st.sampled_from([1, 95]),  # tokens until it draws the end token
)
actions = st.lists(
    st.one_of(
        requests,
        requests,
        st.just("step"),
        st.just("run"),
        st.just("abort"),
        st.just("bad"),
        st.integers(0, 20),  # cancel
    ),
    min_size=30,  # shorter ones never fill the cache
    max_size=60,
)


@pytest.fixture(scope="module")
def spill_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@settings(max_examples=150, deadline=None)
@given(
    actions=actions,
    slots=st.integers(1, 4),
    slots_kept=st.integers(0, 6),
    kv_tokens=st.integers(100, 220),
    prefill_tokens=st.integers(1, 32),
    saved_tokens=st.sampled_from([0, 90, 200]),
    spilled_tokens=st.sampled_from([0, 150]),
    copies=st.booleans(),
)
@example(  # two that grow until one is preempted, saved and restored
    actions=[(2, [], 0, 0, None, 95), (2, [], 1, 1, None, 95), "run"],
    slots=2,
    slots_kept=0,
    kv_tokens=150,
    prefill_tokens=8,
    saved_tokens=90,
    spilled_tokens=0,
    copies=True,
)
def test_invariants_hold_and_every_request_ends(
    spill_dir: Path,
    actions: list[object],
    slots: int,
    slots_kept: int,
    kv_tokens: int,
    prefill_tokens: int,
    saved_tokens: int,
    spilled_tokens: int,
    copies: bool,
) -> None:
    limits = Limits(
        slots,
        100,
        kv_tokens,
        6,
        prefill_tokens,
        max(1, prefill_tokens // 2),
        slots_kept,
        saved_tokens,
        spilled_tokens,
        copies,
    )
    scheduler = Scheduler(limits, frozenset({END}))
    cache = SmallCache(limits)
    states = Placed(limits, spill_dir)
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
        assert batch.chunks or batch.changes, "an empty batch would spin"
        whole = prepare(batch.changes, cache, states, scheduler)
        states.check()
        if not whole:
            return True
        for chunk in batch.chunks:
            assert min(chunk.tokens) >= 0 or chunk.tokens in VIEWS, "a view is computed whole"
            assert batch.view is None or len(batch.chunks) == 1, "and alone"
        cache.decode(batch)
        for chunk in batch.chunks:
            tokens = prompts[chunk.sequence] + answers[chunk.sequence]
            assert cache.tokens(chunk.slot) == tokens[: chunk.start + len(chunk.tokens)]
        if not commit:
            for chunk in batch.chunks:
                if not cache.trim(chunk.undo):
                    scheduler.forget(chunk.slot)
            return True
        draws = []
        for chunk in batch.chunks:
            if chunk.wants_logits:
                patience[chunk.sequence] -= 1
                draws.append(END if patience[chunk.sequence] <= 0 else 20 + chunk.sequence)
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
        elif action == "run":
            while one_step(commit=True):
                pass
        elif action == "abort":
            one_step(commit=False)
        elif action == "bad":
            cache.is_bad = True
            one_step(commit=True)
            cache.is_bad = False
        elif isinstance(action, int):
            known = scheduler.end(action) is not None
            assert known == (action in patience)
            patience.pop(action, None)
        elif isinstance(action, tuple):
            length, views, kind, session, max_tokens, words = action
            own = max(1, length // 4)
            prompt = [kind + 1] * (length - own)
            prompt += [cell for view in views for cell in view]
            prompt += [5 + session] * own
            try:
                scheduler.submit(number, bytes([session]), prompt, max_tokens)
            except ContextLengthError:
                assert len(prompt) + (max_tokens or 1) > 100
            except EngineBusyError:
                assert len(patience) == slots + 6
            else:
                prompts[number], answers[number], patience[number] = prompt, [], words

    for _ in range(20_000):
        if not one_step(commit=True):
            break
    assert not patience, "a request never ended"
    assert scheduler.load().slots_busy == 0


def test_what_is_put_aside_while_nobody_runs_is_a_batch_of_changes() -> None:
    long = IDLE_TOKENS_MAX + 1
    scheduler = make(context_tokens=400, prefill_tokens=400, saved_tokens=long)
    scheduler.submit(1, b"a", [1] * long, max_tokens=1)
    step(scheduler)
    batch = planned(scheduler)
    assert [type(change) for change in batch.changes] == [Save, Trim]
    assert batch.chunks == ()
    assert scheduler.plan() is None


def test_idle_sessions_are_put_aside_for_a_long_prompt_and_come_back() -> None:
    long = PUT_ASIDE_FOR_TOKENS_MIN
    scheduler = make(
        slots=4, context_tokens=500, kv_tokens=2000, prefill_tokens=500, saved_tokens=long + 8
    )
    history = [1] * long
    scheduler.submit(1, b"a", history, max_tokens=1)
    run(scheduler)
    scheduler.submit(2, b"b", [2] * (long - 1), max_tokens=1)
    batch, _ = step(scheduler)
    assert batch.changes == (), "it does not pay for a shorter one"
    run(scheduler)
    scheduler.submit(3, b"c", [3] * long, max_tokens=1)
    batch, _ = step(scheduler)
    assert [type(change) for change in batch.changes] == [Save, Trim], "there is room for one"
    run(scheduler)
    scheduler.submit(4, b"a", [*history, 9], max_tokens=1)
    batch, _ = step(scheduler)
    assert isinstance(batch.changes[0], Restore)
    batch, _ = step(scheduler)
    assert only_chunk(batch).tokens == (9,)
