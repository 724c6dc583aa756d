"""Which kept tokens a new sequence begins with, in which slot, and which beginnings are pinned.

Decides by looking at the slots and at the sequence's tokens alone; does not know steps or room.

* The longest common prefix over all slots is used, whoever runs in them and whosever they are. It
  is copied into a slot of the sequence's own: its session's, or an empty one, or the least
  recently used. It stays where it is if it is there already, and where all of an idle slot is
  continued.
* A prefix that `PINNED_SESSIONS` sessions have begun with is no accident but a system prompt. It
  gets a slot of its own, which is evicted after every idle history: losing it would cost each of
  the next conversations what losing a history costs one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshnode.engine.kv import Slot, common_prefix

# Two conversations with one beginning may be one person's; three are a custom.
PINNED_SESSIONS = 3
# A template's default system prompt has 20 to 40 tokens and is soon computed again.
PINNED_TOKENS_MIN = 64
# Pins take at most this part of the slots and of the cells: histories need the rest.
PINNED_SLOTS_PART = 4
PINNED_CELLS_PART = 2


@dataclass(frozen=True, slots=True)
class Beginning:
    """Run in `slot`, with the first `keep` tokens of `source`, which may be the same slot."""

    slot: Slot
    source: Slot | None
    keep: int


@dataclass(frozen=True, slots=True)
class Pin:
    """Copy the first `tokens` tokens of `source` into `slot` and keep them there."""

    source: Slot
    slot: Slot
    tokens: int


def evicted_first(slots: Iterable[Slot]) -> list[Slot]:
    """Those that no sequence runs in: histories before pinned prefixes, each by last use."""
    idle = [slot for slot in slots if slot.is_idle]
    return sorted(idle, key=lambda slot: (slot.is_pinned, slot.used))


def beginning(
    slots: Sequence[Slot], tokens: Sequence[int], session: bytes, *, copies: bool
) -> Beginning:
    """Where a sequence begins; at least one slot is idle.

    Its last token is always computed: its logits give the next one. With `copies` False a slot
    cannot go back to a prefix of what it holds, nor lend one; it can only be continued.
    """
    common = {slot.number: common_prefix(slot.tokens, tokens[:-1]) for slot in slots}
    idle = evicted_first(slots)
    if not copies:
        continued = [slot for slot in idle if common[slot.number] == len(slot.tokens)]
        common = dict.fromkeys(common, 0) | {slot.number: len(slot.tokens) for slot in continued}
        idle = continued or idle

    def merit(slot: Slot) -> tuple[int, bool, bool, int]:
        is_own = slot.session == session and not slot.is_pinned
        return common[slot.number], is_own, slot.is_idle, slot.used

    source = max(slots, key=merit)
    keep = common[source.number]
    own = [slot for slot in idle if slot.session == session and session and slot.tokens]
    is_continued = source.is_idle and not source.is_pinned and keep == len(source.tokens)
    if own and copies:
        slot = max(own, key=merit)
    elif keep and is_continued:
        slot = source
    else:
        slot = next((slot for slot in idle if not slot.tokens), idle[0])
    if common[slot.number] == keep:
        source = slot
    return Beginning(slot, source if keep else None, keep)


def serves(pinned: Slot, tokens: Sequence[int]) -> bool:
    """Whether a pinned slot is of use to a sequence."""
    return common_prefix(pinned.tokens, tokens) >= PINNED_TOKENS_MIN


def pin(slots: Sequence[Slot], tokens: Sequence[int], session: bytes, cells: int) -> Pin | None:
    """A prefix of a sequence that just began, if it deserves a slot and has none yet.

    `cells` are all that the slots share.
    """
    common = {slot.number: common_prefix(slot.tokens, tokens) for slot in slots}
    by_session: dict[bytes, int] = {}
    for slot in slots:
        if slot.session and slot.session != session:
            known = by_session.get(slot.session, 0)
            by_session[slot.session] = max(known, common[slot.number])
    others = PINNED_SESSIONS - 1
    shared = sorted(by_session.values(), reverse=True)[others - 1 : others]
    if not session or not shared or shared[0] < PINNED_TOKENS_MIN:
        return None
    (length,) = shared
    pinned = [slot for slot in evicted_first(slots) if slot.is_pinned]
    if any(common[slot.number] >= length for slot in pinned):
        return None

    def is_too_much(others: list[Slot]) -> bool:
        held = sum(len(slot.tokens) for slot in others) + length
        count = len(others) + 1
        return held * PINNED_CELLS_PART > cells or count * PINNED_SLOTS_PART > len(slots)

    # It takes the place of a shorter one that it begins with, or else of the longest unused.
    replaced = [slot for slot in pinned if common[slot.number] == len(slot.tokens)]
    if not replaced and is_too_much(pinned):
        replaced = pinned
    source = max((slot for slot in slots if not slot.is_pinned), key=lambda s: common[s.number])
    histories = [slot for slot in evicted_first(slots) if not slot.is_pinned and slot is not source]
    empty = [slot for slot in histories if not slot.tokens]
    places = replaced or empty or histories
    if not places or is_too_much([slot for slot in pinned if slot is not places[0]]):
        return None
    return Pin(source, places[0], length)
