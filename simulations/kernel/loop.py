"""Virtual time: one heap of events, taken in order of (time, order of scheduling).

Integer nanoseconds, because sums of floats differ with the order of summing. An event is never
taken out; whoever scheduled one that is void by now finds that out when it comes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

NS_PER_S = 1_000_000_000

Action = Callable[..., None]


class Loop:
    """See the module. `events` counts what has happened so far."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.events = 0
        self.after_each: list[Callable[[], None]] = []
        """Called after every event: where invariants are checked."""
        self._heap: list[tuple[int, int, Action, tuple[Any, ...]]] = []
        self._scheduled = 0

    @property
    def now_s(self) -> float:
        return self.now_ns / NS_PER_S

    def at(self, time_ns: int, action: Action, *arguments: Any) -> None:
        """Schedule `action(*arguments)`; what lies in the past happens now, after all that is
        scheduled for now already."""
        self._scheduled += 1
        if time_ns < self.now_ns:
            time_ns = self.now_ns
        heapq.heappush(self._heap, (time_ns, self._scheduled, action, arguments))

    def after(self, delay_ns: int, action: Action, *arguments: Any) -> None:
        self.at(self.now_ns + delay_ns, action, *arguments)

    def run(self, until_ns: int) -> None:
        """Take every event up to and at `until_ns`; then it is that late."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_ns:
            self.now_ns, _, action, arguments = pop(heap)
            self.events += 1
            action(*arguments)
            for check in self.after_each:
                check()
        self.now_ns = until_ns

    def run_until(self, holds: Callable[[], bool], until_ns: int) -> bool:
        """Take events until `holds` does, but none after `until_ns`; returns whether it holds."""
        heap, pop = self._heap, heapq.heappop
        while not holds():
            if not heap or heap[0][0] > until_ns:
                return False
            self.now_ns, _, action, arguments = pop(heap)
            self.events += 1
            action(*arguments)
            for check in self.after_each:
                check()
        return True
