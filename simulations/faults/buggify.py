"""Rare but legal: what the cores may meet, or choose, once in a thousand runs happens often.

After FoundationDB's BUGGIFY, without a switch in the product: everything that a core may choose
freely it draws from the generator it is given, and everything else that may vary is its driver's.
So these are the points, for the share `buggify` of a scenario's chaos of all occasions:

* every draw of a core is as small or as large as it can be: when to dial again, to ask for peers,
  to refresh a record, to tell an advert; whom to ask, to whom rumours go, which records to tell
  (`discovery`, `stack`, `adverts`, `liveness`)
* a core is ticked late, by up to `LATE_MAX_S`, as a busy event loop does
* a disk takes up to `DISK_MAX_S` for one write, and what was to be sent after it waits
"""

from __future__ import annotations

import random

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.streams import number, stream
from meshnode_simulations.kernel.world import World

LATE_MAX_S = 0.2
"""Ordinary under load is 0.05 s (`protocol/liveness.py`); from 0.5 s on a node calls itself
stalled."""
DISK_MAX_S = 0.5
"""An fsync on a hard disk that others use too."""


class Extreme(random.Random):
    """Draws as `random.Random` does, but for a share of its draws, which are the smallest or the
    largest that are possible."""

    def __init__(self, seed: int, share: float) -> None:
        super().__init__(seed)
        self._share = share

    def random(self) -> float:
        # All of a generator's methods draw by way of this one, as it has no `getrandbits` of its
        # own.
        drawn = super().random()
        if super().random() >= self._share:
            return drawn
        return 0.0 if drawn < 0.5 else 1.0 - 2.0**-53


def buggify(world: World, share: float) -> None:
    """Let it happen to every stack of this world that is started from now on."""
    seed = world.seed

    def rng_of(machine: Machine) -> random.Random:
        return Extreme(number(seed, "stack", machine.name, machine.starts), share)

    rng = stream(seed, "buggify")

    def some_ns(longest_s: float) -> int:
        return int(rng.uniform(0.0, longest_s) * NS_PER_S) if rng.random() < share else 0

    world.rng_of = rng_of
    world.tick_late_ns = lambda machine: some_ns(LATE_MAX_S)
    world.write_ns = lambda machine: some_ns(DISK_MAX_S)
