"""What is kept of evicted KV, by table; and its bytes, which are as private as memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.engine.kv import Slot
from meshnode.engine.saved import Change, Drop, Save, SavedStates, Spill
from meshnode.engine.states import StateLostError, StateStore

SIZE = 100


def slot(number: int, used: int, awaited_by: int | None = None, size: int = SIZE) -> Slot:
    """Of a session and tokens of its own."""
    slot = Slot(number)
    slot.tokens = [number] * size
    slot.session = bytes([number])
    slot.used, slot.awaited_by = used, awaited_by
    return slot


SAVES: list[tuple[str, tuple[int, int], list[Slot], list[Change]]] = [
    ("off", (0, 0), [slot(1, 1)], []),
    ("memory", (100, 0), [slot(1, 1)], [Save(1, 1, 100)]),
    ("too large", (99, 99), [slot(1, 1)], []),
    ("too large for memory", (99, 100), [slot(1, 1)], [Save(1, 1, 100), Spill(1)]),
    ("not worth it", (100, 0), [slot(1, 1, size=63)], []),
    (
        "the longest unused is dropped",
        (200, 0),
        [slot(1, 2), slot(2, 1), slot(3, 3)],
        [Save(1, 1, 100), Save(2, 2, 100), Drop(2), Save(3, 3, 100)],
    ),
    (
        "or moves to disk",
        (200, 100),
        [slot(1, 2), slot(2, 1), slot(3, 3)],
        [Save(1, 1, 100), Save(2, 2, 100), Spill(2), Save(3, 3, 100)],
    ),
    (
        "where another is dropped for it",
        (100, 100),
        [slot(1, 1), slot(2, 2), slot(3, 3)],
        [Save(1, 1, 100), Spill(1), Save(2, 2, 100), Drop(1), Spill(2), Save(3, 3, 100)],
    ),
    (
        "who is awaited stays",
        (200, 0),
        [slot(1, 1, awaited_by=7), slot(2, 2), slot(3, 3)],
        [Save(1, 1, 100), Save(2, 2, 100), Drop(2), Save(3, 3, 100)],
    ),
    (
        "and is not dropped for one that is not",
        (100, 0),
        [slot(1, 1, awaited_by=7), slot(2, 2)],
        [Save(1, 1, 100)],
    ),
    (
        "but for the other there is the disk",
        (100, 100),
        [slot(1, 1, awaited_by=7), slot(2, 2)],
        [Save(1, 1, 100), Save(2, 2, 100), Spill(2)],
    ),
    (
        "a longer history of the same beginning takes its place",
        (300, 0),
        [slot(1, 1), slot(1, 2, size=150)],
        [Save(1, 1, 100), Drop(1), Save(1, 2, 150)],
    ),
]


@pytest.mark.parametrize(
    ("limits", "slots", "changes"), [row[1:] for row in SAVES], ids=[row[0] for row in SAVES]
)
def test_what_is_saved(limits: tuple[int, int], slots: list[Slot], changes: list[Change]) -> None:
    saved = SavedStates(*limits)
    done = [change for slot in slots for change in saved.save(slot, len(slot.tokens))]
    assert done == changes
    assert saved.tokens <= sum(limits)


def test_what_others_share_is_not_saved_for_one() -> None:
    assert SavedStates(200, 0).save(slot(1, 1), 63) == []


def test_what_will_be_restored_in_a_moment_stays() -> None:
    saved = SavedStates(100, 0)
    saved.save(slot(1, 1), SIZE)
    state, common = saved.best([1] * 50)
    assert state is not None
    assert common == 50
    assert saved.save(slot(2, 2), SIZE, spare=state) == []
    assert saved.drop(state) == [Drop(1)]
    assert saved.save(slot(2, 2), SIZE) == [Save(2, 3, SIZE)]
    assert saved.sessions() == [b"\2"]


def test_once_settled_or_lost_it_is_like_any_other() -> None:
    saved = SavedStates(100, 0)
    saved.save(slot(1, 1, awaited_by=7), SIZE)
    saved.settle(7)
    assert saved.save(slot(2, 2), SIZE) == [Drop(1), Save(2, 2, SIZE)]
    saved.lose(2)
    assert saved.tokens == 0
    assert saved.best([2] * SIZE) == (None, 0)


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    directory = tmp_path / "cache" / "kv"
    states = StateStore(directory, 1)
    for key in (1, 2):
        states.put(key, bytearray([key]) * 5000)
    states.spill(2)
    assert list(directory.iterdir()) == []
    assert directory.stat().st_mode & 0o077 == 0
    assert [states.get(key) for key in (1, 2)] == [bytearray([key]) * 5000 for key in (1, 2)]
    for key in (1, 2, 3):
        states.drop(key)
        with pytest.raises(StateLostError):
            states.get(key)


def test_a_state_that_has_changed_is_noticed() -> None:
    states = StateStore(None, 1)
    state = bytearray(1000)
    states.put(1, state)
    state[500] = 1
    with pytest.raises(StateLostError, match="changed"):
        states.get(1)


def test_without_a_place_on_disk_a_spilled_state_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for directory in (None, file):
        states = StateStore(directory, 1)
        states.put(1, bytearray(10))
        for _ in range(2):
            with pytest.raises(StateLostError):
                states.spill(1)
        with pytest.raises(StateLostError):
            states.get(1)
