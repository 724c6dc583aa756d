"""Which beginnings get a slot of their own."""

from __future__ import annotations

import pytest

from meshnode.engine.kv import KvPool, common_prefix
from meshnode.engine.prefix import Pin, evicted_first, pin

SYSTEM = list(range(100, 180))
CELLS = 1000


def pool(*histories: tuple[bytes, list[int]], pinned: tuple[list[int], ...] = ()) -> KvPool:
    """Eight slots: first these sessions', then pinned ones, used in this order; then empty ones."""
    pool = KvPool(CELLS, 8)
    rows = [*histories, *((b"", tokens) for tokens in pinned)]
    for used, (slot, (session, tokens)) in enumerate(zip(pool.slots, rows, strict=False), 1):
        pool.extend(slot, tokens)
        slot.session, slot.used, slot.is_pinned = session, used, used > len(histories)
    return pool


TWO = ((b"a", [*SYSTEM, 1]), (b"b", [*SYSTEM, 2]))
LONG = [*SYSTEM, *range(300)]
PINS = [
    ("a third session", pool(*TWO), b"c", SYSTEM, (0, 2, 80)),
    ("only the second", pool(TWO[0]), b"b", SYSTEM, None),
    ("one of the two again", pool(*TWO), b"b", SYSTEM, None),
    ("nobody in particular", pool(*TWO), b"", SYSTEM, None),
    ("two slots of one session", pool(TWO[0], TWO[0]), b"c", SYSTEM, None),
    ("too short", pool((b"a", SYSTEM[:63]), (b"b", SYSTEM[:63])), b"c", SYSTEM, None),
    ("just long enough", pool((b"a", SYSTEM[:64]), (b"b", SYSTEM)), b"c", SYSTEM, (1, 2, 64)),
    ("pinned already", pool(*TWO, pinned=(SYSTEM,)), b"c", SYSTEM, None),
    ("a shorter one is replaced", pool(*TWO, pinned=(SYSTEM[:70],)), b"c", SYSTEM, (0, 2, 80)),
    ("a second one", pool(*TWO, pinned=([9] * 80,)), b"c", SYSTEM, (0, 3, 80)),
    (
        "a quarter of the slots is pinned: the longest unused is replaced",
        pool(*TWO, pinned=([9] * 80, [8] * 80)),
        b"c",
        SYSTEM,
        (0, 2, 80),
    ),
    (
        "half of the cells is pinned: the longest unused is replaced",
        pool(*TWO, pinned=([9] * 450,)),
        b"c",
        SYSTEM,
        (0, 2, 80),
    ),
    ("over half of the cells", pool((b"a", [7] * 501), (b"b", [7] * 501)), b"c", [7] * 501, None),
    (
        "no empty slot: the longest unused history goes",
        pool(*((bytes([n]), [*SYSTEM, n]) for n in range(8))),
        b"c",
        SYSTEM,
        (0, 1, 80),
    ),
]


@pytest.mark.parametrize(
    ("kept", "session", "tokens", "expected"),
    [row[1:] for row in PINS],
    ids=[row[0] for row in PINS],
)
def test_pins(
    kept: KvPool, session: bytes, tokens: list[int], expected: tuple[int, int, int] | None
) -> None:
    made = pin(kept.slots, [*tokens, 999], session, CELLS)
    assert made is None or isinstance(made, Pin)
    assert (made and (made.source.number, made.slot.number, made.tokens)) == expected


def test_pinned_prefixes_outlast_histories() -> None:
    kept = pool((b"a", [1]), (b"b", [2]), pinned=([3],))
    kept.slots[2].used = 0
    kept.slots[0].owner = 5
    assert [slot.number for slot in evicted_first(kept.slots)] == [3, 4, 5, 6, 7, 1, 2]


def test_shared_cells_count_once_and_are_free_after_the_last() -> None:
    kept = pool((b"a", [1] * 10))
    first, second, third = kept.slots[:3]
    kept.copy(first, second, 8)
    kept.extend(second, [2, 2])
    kept.copy(second, third, 9)
    assert kept.free == CELLS - 12
    assert (kept.own(first), kept.own(second), kept.own(third)) == (2, 1, 0)
    assert kept.held([first, third]) == 11
    assert kept.held([third], second.cells) == 10
    assert kept.is_within(third, [second])
    assert not kept.is_within(second, [first, third])
    kept.trim(first, 0)
    kept.trim(second, 8)
    assert kept.free == CELLS - 9
    kept.trim(third, 0)
    assert kept.free == CELLS - 8


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 600])
def test_common_prefixes(length: int) -> None:
    left = [7] * length
    assert common_prefix(left, left) == length
    assert common_prefix([*left, 1], [*left, 2, 3]) == length
    assert common_prefix(left, [*left, 2]) == length
