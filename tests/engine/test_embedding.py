"""How inputs share the steps: whole or in pieces, in turns, within bounds."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine.embedding import CAPACITY_TOKENS_MIN, LANES, EmbedQueue, Piece


def drain(queue: EmbedQueue, tokens_max: int) -> list[list[Piece]]:
    steps = []
    while step := queue.plan(tokens_max):
        steps.append(step)
    return steps


def summary(steps: list[list[Piece]]) -> list[list[tuple[int, int, int, int]]]:
    return [[(p.job, p.index, p.start, len(p.tokens)) for p in step] for step in steps]


@pytest.mark.parametrize(
    ("reads_whole", "lengths", "steps"),
    [
        (False, [[3, 3]], [[(0, 0, 0, 3), (0, 1, 0, 3)]]),
        (False, [[25]], [[(0, 0, 0, 10)], [(0, 0, 10, 10)], [(0, 0, 20, 5)]]),
        # What goes on comes first; the rest of its step is for others.
        (False, [[8, 6]], [[(0, 0, 0, 8), (0, 1, 0, 2)], [(0, 1, 2, 4)]]),
        # Jobs take turns.
        (False, [[4, 4, 4], [1]], [[(0, 0, 0, 4), (1, 0, 0, 1), (0, 1, 0, 4), (0, 2, 0, 1)],
                                   [(0, 2, 1, 3)]]),
        (True, [[25]], [[(0, 0, 0, 25)]]),
        (True, [[8, 6]], [[(0, 0, 0, 8)], [(0, 1, 0, 6)]]),
        (True, [[4, 6, 25, 1]], [[(0, 0, 0, 4), (0, 1, 0, 6)], [(0, 2, 0, 25)], [(0, 3, 0, 1)]]),
    ],
)  # fmt: skip
def test_steps(
    reads_whole: bool, lengths: list[list[int]], steps: list[list[tuple[int, int, int, int]]]
) -> None:
    queue = EmbedQueue(reads_whole=reads_whole)
    for job, inputs in enumerate(lengths):
        queue.submit(job, [[0] * length for length in inputs])
    assert summary(drain(queue, 10)) == steps


def test_an_input_beyond_the_capacity_waits_for_a_step_of_its_own() -> None:
    queue = EmbedQueue(reads_whole=False)
    queue.submit(1, [[0] * 3, [0] * (CAPACITY_TOKENS_MIN + 1)])
    assert [len(piece.tokens) for piece in queue.plan(10)] == [3]
    assert queue.capacity_tokens == CAPACITY_TOKENS_MIN
    (piece,) = queue.plan(10)
    assert piece.start == 0
    assert queue.capacity_tokens == 2 * CAPACITY_TOKENS_MIN


def test_a_job_that_ends_early_is_not_read_on() -> None:
    queue = EmbedQueue(reads_whole=False)
    queue.submit(1, [[0] * 15, [0] * 5])
    queue.submit(2, [[0] * 5])
    queue.plan(10)
    queue.end(1)
    assert summary(drain(queue, 10)) == [[(2, 0, 0, 5)]]
    queue.end(2)  # it is over; nothing happens
    assert queue.plan(10) == []


@pytest.mark.parametrize("inputs", [[], [[1], []]])
def test_nothing_is_no_job(inputs: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="inputs"):
        EmbedQueue(reads_whole=False).submit(1, inputs)


@given(
    reads_whole=st.booleans(),
    jobs=st.lists(st.lists(st.integers(1, 1500), min_size=1, max_size=50), max_size=5),
    tokens_max=st.integers(1, 300),
)
def test_everything_is_read_once_in_order_and_within_bounds(
    reads_whole: bool, jobs: list[list[int]], tokens_max: int
) -> None:
    queue = EmbedQueue(reads_whole=reads_whole)
    wanted = {}
    for job, lengths in enumerate(jobs):
        inputs = [list(range(length)) for length in lengths]
        wanted[job] = inputs
        queue.submit(job, inputs)
    read: dict[int, list[list[int]]] = defaultdict(list)
    open_lane, capacity = None, 0
    while step := queue.plan(tokens_max):
        total = sum(len(piece.tokens) for piece in step)
        assert total <= tokens_max or (reads_whole and len(step) == 1)
        assert len({piece.lane for piece in step}) == len(step) <= LANES
        if open_lane is not None:
            # It goes on in its lane, and nothing has made the context anew meanwhile.
            assert (step[0].start > 0, step[0].lane) == (True, open_lane)
            assert queue.capacity_tokens == capacity
        assert all(piece.start == 0 for piece in step[open_lane is not None :])
        assert all(piece.is_last for piece in step[:-1])
        open_lane, capacity = None if step[-1].is_last else step[-1].lane, queue.capacity_tokens
        for piece in step:
            if piece.start == 0:
                assert len(read[piece.job]) == piece.index
                read[piece.job].append([])
            assert len(read[piece.job][-1]) == piece.start
            read[piece.job][-1] += piece.tokens
            assert piece.start + len(piece.tokens) <= queue.capacity_tokens
    assert dict(read) == wanted
