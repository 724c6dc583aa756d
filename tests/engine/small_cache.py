"""A KV cache without a model, honest about what the real one would refuse."""

from __future__ import annotations

from collections.abc import Sequence

from meshnode.engine.cells import VIEW_CELLS_MAX
from meshnode.engine.scheduler import Batch, Copy, Limits, Trim


class SmallCache:
    """llama.cpp's unified cache in small: slots whose cells may be the same ones.

    It complains where llama.cpp would return 1 or -1, or would compute nonsense. While `is_bad`,
    nothing can be saved or restored; without `copies`, beginnings cannot be kept either.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._slots: list[list[list[int]]] = [[] for _ in range(limits.slots + limits.slots_kept)]
        self.is_bad = False

    def tokens(self, slot: int) -> list[int]:
        return [token for (token,) in self._slots[slot]]

    def trim(self, trim: Trim) -> bool:
        cells = self._slots[trim.slot]
        assert trim.keep <= len(cells)
        if 0 < trim.keep < len(cells) and not self._limits.copies:
            cells.clear()
            return False
        del cells[trim.keep :]
        return True

    def copy(self, copy: Copy) -> None:
        assert self._limits.copies
        assert not self._slots[copy.slot]
        assert 0 < copy.tokens <= len(self._slots[copy.source])
        self._slots[copy.slot] = self._slots[copy.source][: copy.tokens]

    def save(self, slot: int, bytes_max: int) -> bytearray | None:
        state = bytearray(map(_byte, self.tokens(slot)))
        assert len(state) <= bytes_max
        return None if self.is_bad else state

    def restore(self, slot: int, state: bytearray) -> bool:
        assert not self._slots[slot]
        if self.is_bad:
            return False
        self.extend(slot, 0, list(map(_token, state)))
        return True

    def extend(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        assert start == len(self._slots[slot]), "positions must be contiguous"
        self._slots[slot].extend([token] for token in tokens)
        used = {id(cell) for cells in self._slots for cell in cells}
        assert len(used) <= self._limits.kv_tokens, "the cache overflows"

    def decode(self, batch: Batch) -> None:
        slots = [chunk.slot for chunk in batch.chunks]
        assert len(set(slots)) == len(slots), "two sequences in one slot"
        for chunk in batch.chunks:
            assert chunk.tokens
            self.extend(chunk.slot, chunk.start, chunk.tokens)


def _byte(token: int) -> int:
    """A token below 128, or a cell of one of four views of up to 32, as a saved state has it."""
    if token >= 0:
        return token
    view, place = divmod(-1 - token, VIEW_CELLS_MAX)
    return 128 + 32 * view + place


def _token(byte: int) -> int:
    if byte < 128:
        return byte
    view, place = divmod(byte - 128, 32)
    return -1 - view * VIEW_CELLS_MAX - place
