"""Performs what a batch wants changed before it is decoded, and says what was lost by it.

Joins the scheduler's plan with the model's KV cache and the saved states; decides nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from meshnode.engine.saved import Drop, Restore, Save, Spill
from meshnode.engine.scheduler import Change, Copy, Scheduler, Trim
from meshnode.engine.states import StateLostError, StateStore


class KvCache(Protocol):
    """What a model can do with its slots; `LlamaModel` says how."""

    def trim(self, trim: Trim) -> bool: ...

    def copy(self, copy: Copy) -> None: ...

    def save(self, slot: int, bytes_max: int) -> bytearray | None: ...

    def restore(self, slot: int, state: bytearray) -> bool: ...


def prepare(
    changes: Sequence[Change], kv: KvCache, states: StateStore, scheduler: Scheduler
) -> bool:
    """False if some slot lost all its KV, so that the batch must be planned anew."""
    lost: set[int] = set()
    for change in changes:
        match change:
            case Trim(slot):
                if slot not in lost and not kv.trim(change):
                    lost.add(slot)
            case Copy(source, slot):
                if source in lost:
                    lost.add(slot)
                else:
                    kv.copy(change)
            case Restore(key, slot):
                if not _restore(key, slot, kv, states):
                    lost.add(slot)
                    scheduler.lose(key)
                    states.drop(key)
            case Save(slot, key, tokens):
                state = None if slot in lost else kv.save(slot, tokens * states.bytes_per_token)
                if state is None:
                    scheduler.lose(key)
                else:
                    states.put(key, state)
            case Spill(key):
                try:
                    states.spill(key)
                except StateLostError as error:
                    print(error, file=sys.stderr)
                    scheduler.lose(key)
            case Drop(key):
                states.drop(key)
    for slot in lost:
        kv.trim(Trim(slot, 0))  # where something has been put into it since
        scheduler.forget(slot)
    return not lost


def _restore(key: int, slot: int, kv: KvCache, states: StateStore) -> bool:
    try:
        return kv.restore(slot, states.get(key))
    except StateLostError as error:
        print(error, file=sys.stderr)
        return False
