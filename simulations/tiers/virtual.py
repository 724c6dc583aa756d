"""Virtual time under Trio: the simulator's loop of events, and tasks that sleep, on one clock.

The clock jumps to whatever is due next once every task waits, so hours pass in seconds. Trio
shuffles the tasks that can run; here with a generator of its own, so that equal seeds give equal
runs. There must be no worker threads: their waiting does not hold the clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import trio
from trio.testing import MockClock

from meshnode_simulations.kernel.loop import NS_PER_S, Action, Loop

T = TypeVar("T")


class TrioLoop(Loop):
    """The simulator's events, taken by a task (`drive`) when Trio's clock shows their time."""

    def __init__(self) -> None:
        self._earlier = trio.Event()
        super().__init__()

    @property
    def now_ns(self) -> int:
        return round(trio.current_time() * NS_PER_S)

    @now_ns.setter
    def now_ns(self, time_ns: int) -> None:
        """`Loop.run` says how late it is, which is what the clock shows anyway."""

    def at(self, time_ns: int, action: Action, *arguments: Any) -> None:
        super().at(time_ns, action, *arguments)
        self._earlier.set()

    async def drive(self) -> None:
        """Until cancelled."""
        while True:
            self._earlier = trio.Event()
            due_s = self._heap[0][0] / NS_PER_S if self._heap else math.inf
            with trio.move_on_at(due_s):
                await self._earlier.wait()
            self.run(self.now_ns)


def run_virtual(main: Callable[..., Awaitable[T]], *arguments: Any, seed: int) -> T:
    """`trio.run` in virtual time, from 0 on."""
    with _repeatable(seed):
        return trio.run(main, *arguments, clock=MockClock(autojump_threshold=0))


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """What Trio has for Hypothesis: tasks in order of their birth, then shuffled from a seed."""
    core: Any = trio._core._run
    before = core._ALLOW_DETERMINISTIC_SCHEDULING, core._r
    core._ALLOW_DETERMINISTIC_SCHEDULING, core._r = True, random.Random(seed)
    try:
        yield
    finally:
        core._ALLOW_DETERMINISTIC_SCHEDULING, core._r = before
