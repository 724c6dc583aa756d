"""Cells keep pictures apart, and the scheduler computes each view whole and alone."""

from __future__ import annotations

import pytest

from meshnode.engine import Image
from meshnode.engine.cells import VIEW_CELLS_MAX, cells, stretch, view_at
from meshnode.engine.scheduler import Batch, Limits, Scheduler, common_prefix
from meshnode.engine.vision import Positions, View

A, B = cells(7, 4), cells(8, 4)
END = 0


def test_cells_tell_their_view() -> None:
    assert all(cell < 0 for cell in A + B)
    assert len(set(A + B)) == 8
    assert [view_at([5, *A, *B], place) for place in (0, 1, 4, 5)] == [None, 7, 7, 8]
    assert common_prefix([1, *A, 2], [1, *B, 2]) == 1
    for digest, count in ((-1, 4), (1, 0), (1, VIEW_CELLS_MAX + 1)):
        with pytest.raises(ValueError, match="cells"):
            cells(digest, count)


@pytest.mark.parametrize(
    ("start", "most", "expected"),
    [(0, 9, 2), (0, 1, 1), (2, 9, 4), (2, 1, 4), (6, 1, 4), (10, 9, 4), (14, 9, 1)],
)
def test_a_stretch_is_of_tokens_or_a_whole_view(start: int, most: int, expected: int) -> None:
    assert stretch([1, 2, *A, *A, *B, 3], start, most) == expected


def scheduler(kv_tokens: int = 400, slots: int = 4) -> Scheduler:
    return Scheduler(Limits(slots, kv_tokens, kv_tokens, 4, 16, 8), frozenset({END}))


def shape(batch: Batch | None) -> list[tuple[int, int, int]]:
    assert batch is not None
    return [(chunk.sequence, chunk.start, len(chunk.tokens)) for chunk in batch.chunks]


def test_a_view_is_a_batch_of_its_own_and_others_come_between_two() -> None:
    it = scheduler()
    it.submit(1, b"a", [1, 2, 3], None)
    it.submit(2, b"b", [4, *A, *B, 5], None)
    steps = []
    for _ in range(6):
        batch = it.plan()
        assert batch is not None
        steps.append((batch.view, shape(batch)))
        it.commit(batch, [9] * batch.outputs)
    assert steps == [
        (None, [(1, 0, 3), (2, 0, 1)]),
        (7, [(2, 1, 4)]),
        (None, [(1, 3, 1)]),
        (8, [(2, 5, 4)]),
        (None, [(1, 4, 1), (2, 9, 1)]),
        (None, [(1, 5, 1), (2, 10, 1)]),
    ]


def test_the_next_turn_reuses_a_picture_and_another_picture_does_not() -> None:
    it = scheduler()

    def run(number: int, prompt: list[int]) -> int:
        cached = -1
        it.submit(number, b"a", prompt, 1)
        while (batch := it.plan()) is not None:
            for result in it.commit(batch, [9] * batch.outputs):
                cached = result.usage.cached_tokens
        return cached

    assert run(1, [1, *A, 2]) == 0
    assert run(2, [1, *A, 2, 9, 3]) == 6
    assert run(3, [1, *B, 2]) == 1


def test_a_prompt_cannot_end_in_a_picture() -> None:
    with pytest.raises(ValueError, match="prompt token"):
        scheduler().submit(1, b"a", [1, *A], None)


def test_positions_of_pictures_that_take_fewer() -> None:
    it = Positions()
    view = View(Image(b"", 0), 0, 7, cells=16, positions=4)
    assert it.of(0, 5) == 5
    it.add(0, 2, view)
    it.add(0, 20, view)
    assert [it.of(0, place) for place in (2, 18, 20, 36, 40)] == [2, 6, 8, 12, 16]
    it.copy(0, 1, 20)
    assert it.of(1, 40) == 28
    it.trim(0, 20)
    assert it.of(0, 40) == 28
    it.trim(0, 2)
    assert (it.of(0, 40), it.of(1, 40)) == (40, 28)
    it.add(1, 30, View(Image(b"", 0), 0, 7, cells=4, positions=4))
    assert it.of(1, 40) == 28
