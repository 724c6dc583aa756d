"""Was there one order of all operations that explains every answer? Wing & Gong's search with
Lowe's memory of what was tried (WGL), for exclusive rights that are claimed, released and read.

Rights do not touch each other, so each is judged alone. `claim` answers whether the client holds
the right now, `release` whether it did hold it, `owner` who holds it, or None. An operation whose
answer never came (`returned_at` infinite, `result` None) may have happened at any time since, or
not at all. The search is exponential in how many operations overlap: about ten is the limit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Operation", "is_linearizable"]

OVERLAP_MAX = 12
"""Above this a history is refused: the answer might take minutes."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call on one right. `argument` is the right's name."""

    client: str
    kind: Literal["claim", "release", "owner"]
    argument: str
    result: bool | str | None
    called_at: float
    returned_at: float = math.inf

    @property
    def is_pending(self) -> bool:
        return self.returned_at == math.inf


def is_linearizable(history: Sequence[Operation]) -> bool:
    """Whether every right behaved as if its operations had happened one at a time.

    Raises `ValueError` if more than `OVERLAP_MAX` operations on one right overlap; one that was
    never answered overlaps with all that follow.
    """
    rights: defaultdict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        if operation.kind != "owner" or not operation.is_pending:
            rights[operation.argument].append(operation)
    return all(_has_an_order(operations) for operations in rights.values())


def _has_an_order(history: list[Operation]) -> bool:
    """Try every operation that may come next, depth first, no situation twice."""
    history.sort(key=lambda operation: (operation.called_at, operation.returned_at))
    _refuse_wide(history)
    everything = sum(1 << n for n, each in enumerate(history) if not each.is_pending)
    start: tuple[int, str | None] = (0, None)
    seen, open_ = {start}, [start]
    while open_:
        done, holder = open_.pop()
        if done & everything == everything:
            return True
        first_return = math.inf
        for number, operation in enumerate(history):
            if done >> number & 1:
                continue
            if operation.called_at > first_return:
                break  # something else had returned before this was called
            first_return = min(first_return, operation.returned_at)
            answer, after = _apply(operation, holder)
            if answer == operation.result or operation.is_pending:
                situation = (done | 1 << number, after)
                if situation not in seen:
                    seen.add(situation)
                    open_.append(situation)
    return False


def _apply(operation: Operation, holder: str | None) -> tuple[bool | str | None, str | None]:
    """What a right answers that `holder` holds, and who holds it then."""
    match operation.kind:
        case "claim":
            return (True, operation.client) if holder in (None, operation.client) else (
                False, holder,
            )  # fmt: skip
        case "release":
            return (True, None) if holder == operation.client else (False, holder)
        case "owner":
            return holder, holder


def _refuse_wide(history: list[Operation]) -> None:
    ends: list[float] = []
    for operation in history:
        ends = [end for end in ends if end > operation.called_at] + [operation.returned_at]
        if len(ends) > OVERLAP_MAX:
            raise ValueError(f"more than {OVERLAP_MAX} operations overlap")
