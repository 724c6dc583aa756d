"""A model file of which only some leaves are there, at their places; the rest are holes.

Remembers the hash of each leaf that is there, beside the file: after a restart, or a crash in the
middle of a write, what has that hash is there and all else is not. Only proven leaves are to be
put in; that is not checked here. All of it blocks: for threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from meshnode.messages import LEAVES_MAX
from meshnode.models.digest import HASH_BYTES, LEAF_BYTES, corners, leaf_count, leaf_hash

__all__ = ["PartialFile", "Range"]

Range = tuple[int, int]
"""First byte and end."""
_ABSENT = bytes(HASH_BYTES)


class PartialFile:
    """`size_bytes` is the whole file's. Whoever makes one removes it, or leaves it to go on."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """A new one, of holes only. Raises `OSError`."""
        self.path = path
        self.size_bytes = size_bytes
        self.leaf_count = leaf_count(size_bytes)
        self._hashes = [_ABSENT] * self.leaf_count
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(size_bytes)
        with open(_notes(path), "wb") as file:
            file.truncate(self.leaf_count * HASH_BYTES)

    @classmethod
    def reopen(cls, path: Path, look: Callable[[], None] = lambda: None) -> PartialFile | None:
        """What an earlier run has left there: read through, and only what is as it was counts.

        None if there is nothing, or too little for its size to be proven. `look` is called between
        two leaves, and may raise. Raises `OSError`.
        """
        try:
            noted = _notes(path).read_bytes()
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            return None
        found = cls.__new__(cls)
        found.path, found.size_bytes = path, size_bytes
        found.leaf_count = leaf_count(size_bytes)
        if len(noted) != found.leaf_count * HASH_BYTES:
            return None
        hashes = [noted[at : at + HASH_BYTES] for at in range(0, len(noted), HASH_BYTES)]
        with open(path, "rb", buffering=0) as file:
            for number, expected in enumerate(hashes):
                if expected != _ABSENT:
                    look()
                    leaf = os.pread(file.fileno(), LEAF_BYTES, number * LEAF_BYTES)
                    if leaf_hash(leaf) != expected:
                        hashes[number] = _ABSENT
        found._hashes = hashes
        return found if found.is_proven else None

    def leaf_bytes(self, number: int) -> int:
        """Of one leaf; only the last may be shorter than the others."""
        return min(LEAF_BYTES, self.size_bytes - number * LEAF_BYTES)

    @property
    def is_proven(self) -> bool:
        """Whether its size is: the corners of its tree are there."""
        return all(self._hashes[number] != _ABSENT for number in corners(self.leaf_count))

    @property
    def held_bytes(self) -> int:
        return sum(
            self.leaf_bytes(number) for number, known in enumerate(self._hashes) if known != _ABSENT
        )

    def batches(self, numbers: Iterable[int]) -> list[tuple[int, int]]:
        """What is missing of these leaves, as first and count, each no more than one request."""
        found: list[tuple[int, int]] = []
        for number in sorted(numbers):
            if self._hashes[number] != _ABSENT:
                continue
            first, count = found[-1] if found else (-1, 0)
            if number == first + count and count < LEAVES_MAX:
                found[-1] = (first, count + 1)
            else:
                found.append((number, 1))
        return found

    def leaves_of(self, ranges: Iterable[Range]) -> set[int]:
        """The leaves in which these bytes are. Those behind the end do not exist."""
        return {
            number
            for start, stop in ranges
            for number in range(start // LEAF_BYTES, leaf_count(min(stop, self.size_bytes)))
            if start < stop
        }

    def write(self, first: int, leaves: Sequence[bytes]) -> None:
        """Put in leaves that are proven, bytes before notes. Raises `OSError`."""
        hashes = [leaf_hash(leaf) for leaf in leaves]
        with open(self.path, "r+b", buffering=0) as file:
            for number, leaf in enumerate(leaves, first):
                _write_all(file.fileno(), leaf, number * LEAF_BYTES)
        with open(_notes(self.path), "r+b", buffering=0) as file:
            _write_all(file.fileno(), b"".join(hashes), first * HASH_BYTES)
        self._hashes[first : first + len(hashes)] = hashes

    def move(self, target: Path) -> None:
        """The file, all of which is there, to its place. Raises `OSError`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, target)
        _notes(self.path).unlink()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        _notes(self.path).unlink(missing_ok=True)


def _notes(path: Path) -> Path:
    return path.with_name(f"{path.name}.leaves")


def _write_all(target: int, data: bytes, offset: int) -> None:
    """A write may take less than it is given, before a disk is full."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(target, rest, offset)
        rest, offset = rest[written:], offset + written
