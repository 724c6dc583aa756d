"""A model of the KV cache: which tokens each slot holds, and how many cells that takes.

Decides nothing. It counts as llama.cpp's unified cache does: a cell holds one token at one
position and belongs to every slot that it was copied to, so a beginning that ten slots share takes
its cells once, and a cell is free again when the last of them lets go of it. Slots share only
beginnings: whoever has a cell of another slot has all those before it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Prefixes are compared in pieces of this size first, which is a hundred times faster.
_COMPARED_TOKENS = 256


class Slot:
    """A lane of the cache: `tokens` are computed, each in the cell beside it in `cells`.

    `owner` is the sequence that runs in it, if one does; `awaited_by` one that was preempted and
    will come back. `in_flight` more tokens are on their way to be computed. `used` orders slots
    by last use. A pinned slot holds a prefix that many begin with, and belongs to no session.
    """

    __slots__ = ("awaited_by", "cells", "in_flight", "is_pinned", "number", "owner", "session",
                 "tokens", "used")  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: list[int] = []
        self.cells: list[int] = []
        self.session = b""
        self.owner: int | None = None
        self.awaited_by: int | None = None
        self.in_flight = 0
        self.is_pinned = False
        self.used = 0

    @property
    def is_idle(self) -> bool:
        """Whether it may be trimmed, or be somebody's."""
        return self.owner is None and not self.in_flight

    @property
    def end(self) -> int:
        """The position of the next token that is planned."""
        return len(self.tokens) + self.in_flight


class KvPool:
    """`cells` cells and the slots that share them."""

    def __init__(self, cells: int, slots: int) -> None:
        self.slots = tuple(Slot(number) for number in range(slots))
        self._cells = cells
        self._cells_made = 0
        # How many slots have a cell; cells that nobody has are not in it.
        self._holders: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Cells that nobody has, but for those that what is in flight will take."""
        return self._cells - len(self._holders) - sum(slot.in_flight for slot in self.slots)

    def extend(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Tokens were computed, or restored, in new cells."""
        first = self._cells_made
        self._cells_made += len(tokens)
        cells = range(first, self._cells_made)
        slot.tokens.extend(tokens)
        slot.cells.extend(cells)
        self._holders.update(dict.fromkeys(cells, 1))

    def trim(self, slot: Slot, keep: int) -> None:
        """All from position `keep` on is forgotten."""
        for cell in slot.cells[keep:]:
            self._holders[cell] -= 1
            if not self._holders[cell]:
                del self._holders[cell]
        del slot.tokens[keep:], slot.cells[keep:]

    def copy(self, source: Slot, slot: Slot, tokens: int) -> None:
        """Let `slot`, which is empty, begin with the first `tokens` tokens of `source`."""
        slot.tokens[:] = source.tokens[:tokens]
        slot.cells[:] = source.cells[:tokens]
        for cell in slot.cells:
            self._holders[cell] += 1

    def own(self, slot: Slot) -> int:
        """How many of its cells no other slot has."""
        return sum(self._holders[cell] == 1 for cell in slot.cells)

    def held(self, slots: Iterable[Slot], shared: Sequence[int] = ()) -> int:
        """How many cells these slots have, those of `shared` included, each counted once."""
        return len(set(shared).union(*(slot.cells for slot in slots)))

    def is_within(self, slot: Slot, others: Iterable[Slot]) -> bool:
        """Whether one of the others has all cells of a slot that is not empty."""
        last = len(slot.cells) - 1
        return any(
            len(other.cells) > last and other.cells[last] == slot.cells[last]
            for other in others
            if other is not slot
        )


def common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    """With how many equal items both begin."""
    shorter = min(len(left), len(right))
    equal = 0
    while equal < shorter:
        end = min(equal + _COMPARED_TOKENS, shorter)
        if left[equal:end] != right[equal:end]:
            break
        equal = end
    while equal < shorter and left[equal] == right[equal]:
        equal += 1
    return equal
