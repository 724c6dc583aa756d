"""Performs what a batch wants changed before it is decoded, and says what was lost by it.

Joins the scheduler's plan with the model's KV cache and the saved states; decides nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from meshnode.engine.saved import Drop, Restore, Save, Spill
from meshnode.engine.scheduler import Change, Copy, Scheduler, Trim
from meshnode.engine.states import StateLostError, StateStore

if TYPE_CHECKING:
    from meshnode.engine.llama import LlamaModel


def prepare(
    changes: Sequence[Change], model: LlamaModel, states: StateStore, scheduler: Scheduler
) -> bool:
    """False if some slot lost all its KV, so that the batch must be planned anew."""
    is_whole = True
    for change in changes:
        match change:
            case Trim(slot):
                if not model.trim(change):
                    scheduler.forget(slot)
                    is_whole = False
            case Copy():
                model.copy(change)
            case Save(slot, key, tokens):
                state = model.save(slot, tokens * states.bytes_per_token)
                if state is None:
                    scheduler.lose(key)
                else:
                    states.put(key, state)
            case Restore(key, slot):
                if not _restore(key, slot, model, states):
                    scheduler.forget(slot)
                    scheduler.lose(key)
                    states.drop(key)
                    is_whole = False
            case Spill(key):
                try:
                    states.spill(key)
                except StateLostError as error:
                    print(error, file=sys.stderr)
                    scheduler.lose(key)
            case Drop(key):
                states.drop(key)
    return is_whole


def _restore(key: int, slot: int, model: LlamaModel, states: StateStore) -> bool:
    try:
        return model.restore(slot, states.get(key))
    except StateLostError as error:
        print(error, file=sys.stderr)
        return False
