"""KV that had to leave its slot: what of it is kept, where, and what it gives way to.

Decides only; `states.py` does it. A state is the whole of a slot's KV, kept in memory and, if the
operator gave room for it, on disk. One that a preempted sequence will come back for outranks those
of idle sessions; among equals the longest unused goes first. Memory is full: the least valuable
moves to disk. The disk is full: the least valuable is dropped. Sizes are in tokens, which all take
the same number of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshnode.engine.kv import Slot, common_prefix

# Computing so many anew takes about as long as a step or two; fewer are not worth a copy.
SAVED_TOKENS_MIN = 64


@dataclass(frozen=True, slots=True)
class Save:
    """Put the KV of `slot` aside in memory as state `key`, `tokens` long; the slot keeps it."""

    slot: int
    key: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Spill:
    """Move state `key` from memory to disk."""

    key: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Put state `key` into `slot`, which is empty."""

    key: int
    slot: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget state `key`."""

    key: int


Change = Save | Spill | Drop


class State:
    """A saved slot: its tokens, whose they are, and which sequence waits for them if one does."""

    __slots__ = ("awaited_by", "is_on_disk", "key", "session", "tokens", "used")

    def __init__(self, key: int, slot: Slot) -> None:
        self.key = key
        self.tokens = list(slot.tokens)
        self.session = slot.session
        self.awaited_by = slot.awaited_by
        self.is_on_disk = False
        self.used = slot.used

    @property
    def value(self) -> tuple[bool, int]:
        """The smallest goes first."""
        return self.awaited_by is not None, self.used


class SavedStates:
    """At most `memory_tokens` and `disk_tokens` tokens of state."""

    def __init__(self, memory_tokens: int, disk_tokens: int) -> None:
        self._memory_tokens = memory_tokens
        self._disk_tokens = disk_tokens
        self._states: dict[int, State] = {}
        self._keys = 0

    def save(self, slot: Slot, own_tokens: int, spare: State | None = None) -> list[Change]:
        """What to do about a slot that loses its KV, before it does; often nothing.

        `own_tokens` of it are in no other slot. `spare` is about to be restored and stays.
        """
        size = len(slot.tokens)
        if own_tokens < SAVED_TOKENS_MIN:
            return []
        self._keys += 1
        state = State(self._keys, slot)
        changes = self._drop_covered(state, spare)
        for on_disk in (False, True):
            room = self._make_room(size, on_disk, state, spare)
            if room is not None:
                state.is_on_disk = on_disk
                self._states[state.key] = state
                spill = [Spill(state.key)] if on_disk else []
                return [*changes, *room, Save(slot.number, state.key, size), *spill]
        return changes

    def has_room(self, tokens: int) -> bool:
        """Whether a state of this size goes into memory without anything giving way to it."""
        return self.tokens + tokens <= self._memory_tokens

    def _drop_covered(self, state: State, spare: State | None) -> list[Change]:
        """What it begins with need not be kept twice."""
        covered = [
            other
            for other in self._states.values()
            if other is not spare
            and other.value <= state.value
            and common_prefix(other.tokens, state.tokens) == len(other.tokens)
        ]
        return [change for other in covered for change in self.drop(other)]

    def best(self, tokens: Sequence[int]) -> tuple[State | None, int]:
        """The state with the longest common prefix, and that one's length."""
        found, longest = None, 0
        for state in self._states.values():
            common = common_prefix(state.tokens, tokens)
            if common > longest:
                found, longest = state, common
        return found, longest

    def drop(self, state: State) -> list[Change]:
        del self._states[state.key]
        return [Drop(state.key)]

    def lose(self, key: int) -> None:
        """It could not be saved or spilled."""
        self._states.pop(key, None)

    def settle(self, sequence: int) -> None:
        """The sequence runs again, or never will: what it waited for is an idle session's now."""
        for state in self._states.values():
            if state.awaited_by == sequence:
                state.awaited_by = None

    def sessions(self) -> list[bytes]:
        """Whose they are, most recently used last."""
        states = sorted(self._states.values(), key=lambda state: state.used)
        return [state.session for state in states]

    @property
    def tokens(self) -> int:
        """All that is saved, wherever."""
        return self._used(False) + self._used(True)

    def _used(self, on_disk: bool) -> int:
        return sum(
            len(state.tokens) for state in self._states.values() if state.is_on_disk == on_disk
        )

    def _make_room(
        self, size: int, on_disk: bool, newcomer: State, spare: State | None
    ) -> list[Change] | None:
        """For `size` tokens in one of the two places; None if better ones are in the way."""
        limit = self._disk_tokens if on_disk else self._memory_tokens
        if size > limit:
            return None
        victims = sorted(
            (
                state
                for state in self._states.values()
                if state.is_on_disk == on_disk and state is not spare
            ),
            key=lambda state: state.value,
        )
        leaving: list[State] = []
        excess = self._used(on_disk) + size - limit
        while excess > 0:
            if not victims or victims[0].value > newcomer.value:
                return None
            leaving.append(victims.pop(0))
            excess -= len(leaving[-1].tokens)
        changes: list[Change] = []
        for state in leaving:
            del self._states[state.key]
            room = None if on_disk else self._make_room(len(state.tokens), True, state, spare)
            if room is None:
                changes.append(Drop(state.key))
            else:
                state.is_on_disk = True
                self._states[state.key] = state
                changes += [*room, Spill(state.key)]
        return changes
