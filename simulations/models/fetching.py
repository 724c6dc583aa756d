"""Nodes that stand by for a model without its file: they fetch it before they load it.

From one member at a time that has the file, of those that can be reached the one that sends the
fewest now; over both access links, shared fairly with all other files on their way
(`transfers.py`). When the sender is gone the rest comes from another. What was fetched stays.

Not known here: proofs of what was sent, and that messages wait behind files; a host of some layers
fetches the whole file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.network import Access
from meshnode_simulations.kernel.world import SILENCE_NS, Power
from meshnode_simulations.models.transfers import Flow, Transfers
from meshnode_simulations.record import quantile
from meshnode_simulations.run import Run

ASK_AGAIN_S = 1.0
"""Nobody who has the file can be reached: looked for again after this long."""

Then = Callable[[], None]
_Key = tuple[int, str]
"""A machine's index and the digest of a model."""


class Fetching:
    """Every file on its way. Figures: `fetches`, and `fetch_p50_s` and `fetch_max_s`, from when a
    node was to load a model until it had the file."""

    def __init__(self, run: Run, machines: list[Machine]) -> None:
        """Call it once machines have their access links."""
        self._run = run
        self._world = run.world
        self._transfers = Transfers(run.world.loop)
        for machine in machines:
            self._transfers.attach(machine.index, _rate(machine.up), _rate(machine.down))
        self._waiting: dict[_Key, list[Then]] = {}
        self._left_bytes: dict[_Key, int] = {}
        self._since_s: dict[_Key, float] = {}
        self._took_s: list[float] = []
        run.world.fetch = self.fetch
        run.world.on_power.append(self._on_power)
        run.closers.append(self._close)

    def fetch(self, machine: Machine, model: str, then: Then) -> None:
        """Have `then` happen once the machine has the file; at once if it does."""
        key = (machine.index, model)
        if model not in machine.unfetched:
            then()
        elif key in self._waiting:
            self._waiting[key].append(then)
        else:
            self._waiting[key] = [then]
            self._since_s[key] = self._run.now_s
            self._left_bytes.setdefault(key, machine.models[model][1].weight_bytes)
            self._begin(machine, machine.starts, model)

    def _begin(self, machine: Machine, run: int, model: str) -> None:
        key = (machine.index, model)
        if machine.stack is None or machine.starts != run:
            return
        source = None if machine.is_asleep else self._source(machine, model)
        if source is None:
            wait_ns = int(ASK_AGAIN_S * NS_PER_S)
            self._world.loop.after(wait_ns, self._begin, machine, run, model)
            return
        flows: list[Flow] = []

        def ended(is_whole: bool) -> None:
            if is_whole:
                self._has(machine, model)
            else:
                self._left_bytes[key] = math.ceil(flows[0].left_bytes)
                # Which has to be noticed first.
                self._world.loop.after(SILENCE_NS, self._begin, machine, run, model)

        flows.append(
            self._transfers.start(source.index, machine.index, self._left_bytes[key], ended)
        )

    def _source(self, machine: Machine, model: str) -> Machine | None:
        sends = Counter(flow.source for flow in self._transfers.flows())
        having = (
            other
            for other in self._world.running()
            if other is not machine
            and other.is_awake
            and model in other.models
            and model not in other.unfetched
            and self._world.network.joins(machine.index, other.index)
        )
        return min(having, key=lambda other: (sends[other.index], other.index), default=None)

    def _has(self, machine: Machine, model: str) -> None:
        key = (machine.index, model)
        del machine.unfetched[model], self._left_bytes[key]
        self._took_s.append(self._run.now_s - self._since_s.pop(key))
        for then in self._waiting.pop(key):
            then()

    def _on_power(self, machine: Machine, power: Power) -> None:
        if power in ("on", "awake"):
            return
        if power != "asleep":
            for key in [key for key in self._waiting if key[0] == machine.index]:
                del self._waiting[key], self._since_s[key]
        # Told before it is off: whoever it was sending to looks for another afterwards.
        self._world.loop.after(0, partial(self._transfers.break_off, machine.index))

    def _close(self) -> None:
        figures = self._run.figures
        figures["fetches"] = float(len(self._took_s))
        if self._took_s:
            figures["fetch_p50_s"] = quantile(self._took_s, 0.5)
            figures["fetch_max_s"] = max(self._took_s)


def _rate(link: Access | None) -> float:
    return math.inf if link is None else link.bytes_per_s


__all__ = ["Fetching"]
