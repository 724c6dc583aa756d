"""Big transfers (weights, KV caches) as fluid: each flow has a rate, and rates are max-min fair.

A flow takes from two links, its sender's up and its receiver's down. Max-min: nobody's rate could
rise without that of a flow that has no more falling; it is what TCP and QUIC flows of like round
trips come to. Rates change only when a flow begins or ends, and only then is anything computed:
no packets. Progress is kept in floats, with an error far below one byte.

Not known here: control messages, which are small and have the `Access` of the kernel; and how
much a flow is slowed by loss or a long way.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from meshnode_simulations.kernel.loop import NS_PER_S, Loop

_DONE_BYTES = 1e-3
"""Less than this left is nothing left: a flow's end is rounded up to a nanosecond."""


@dataclass(eq=False, slots=True)
class _Link:
    bytes_per_s: float
    flows: dict[Flow, None] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Flow:
    """One transfer on its way. `rate_bytes_per_s` holds until the next flow begins or ends."""

    source: int
    target: int
    left_bytes: float
    ended: Callable[[bool], None]
    rate_bytes_per_s: float = 0.0


class Transfers:
    """See the module. Machines are given by index; one without a link is not held up by it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._up: dict[int, _Link] = {}
        self._down: dict[int, _Link] = {}
        self._flows: dict[Flow, None] = {}
        self._settled_ns = loop.now_ns
        self._turn = 0

    def attach(self, machine: int, up_bytes_per_s: float, down_bytes_per_s: float) -> None:
        """Give a machine links of these rates, before it has any flow; `math.inf` is no limit."""
        for links, bytes_per_s in ((self._up, up_bytes_per_s), (self._down, down_bytes_per_s)):
            if bytes_per_s < math.inf:
                links[machine] = _Link(bytes_per_s)

    def start(
        self, source: int, target: int, size_bytes: int, ended: Callable[[bool], None]
    ) -> Flow:
        """Begin a transfer. `ended(True)` is called when its last byte has left the link,
        `ended(False)` if it was broken off; how long that byte then travels is the caller's.
        """
        self._settle()
        flow = Flow(source, target, float(size_bytes), ended)
        self._flows[flow] = None
        for link in self._links(flow):
            link.flows[flow] = None
        self._share()
        return flow

    def break_off(self, *machines: int) -> None:
        """End every flow from and to these machines: they are gone."""
        self._settle()
        gone = [flow for flow in self._flows if flow.source in machines or flow.target in machines]
        for flow in gone:
            self._remove(flow)
        self._share()
        for flow in gone:
            flow.ended(False)

    def flows(self) -> tuple[Flow, ...]:
        """All that are on their way, the oldest first."""
        self._settle()
        return tuple(self._flows)

    # --- within ---------------------------------------------------------------------------------

    def _links(self, flow: Flow) -> list[_Link]:
        both = (self._up.get(flow.source), self._down.get(flow.target))
        return [link for link in both if link is not None]

    def _remove(self, flow: Flow) -> None:
        del self._flows[flow]
        for link in self._links(flow):
            del link.flows[flow]

    def _settle(self) -> None:
        """Count what has flowed since rates last changed."""
        passed_s = (self._loop.now_ns - self._settled_ns) / NS_PER_S
        self._settled_ns = self._loop.now_ns
        if passed_s > 0:
            for flow in self._flows:
                if flow.rate_bytes_per_s < math.inf:
                    flow.left_bytes -= flow.rate_bytes_per_s * passed_s

    def _share(self) -> None:
        """Find the max-min fair rates, and when the first flow ends by them.

        The link that grants its flows the least fixes their rates; what they leave of their other
        links is shared among the rest. Every flow is fixed once and every link left once.
        """
        links = self._busy()
        left = {link: (link.bytes_per_s, len(link.flows)) for link in links}
        # What a link grants each of its flows only rises while others are fixed, so an entry that
        # is out of date stands too early in the heap, and is put back when it comes.
        heap = [(link.bytes_per_s / len(link.flows), place) for place, link in enumerate(links)]
        heapq.heapify(heap)
        fixed: set[Flow] = set()
        while heap:
            rate, place = heapq.heappop(heap)
            capacity, waiting = left[links[place]]
            if waiting == 0:
                continue
            if capacity / waiting > rate:
                heapq.heappush(heap, (capacity / waiting, place))
                continue
            for flow in links[place].flows:
                if flow not in fixed:
                    fixed.add(flow)
                    flow.rate_bytes_per_s = rate
                    for link in self._links(flow):
                        capacity, waiting = left[link]
                        left[link] = (capacity - rate, waiting - 1)
        for flow in self._flows:
            if flow not in fixed:
                flow.rate_bytes_per_s, flow.left_bytes = math.inf, 0.0
        self._turn += 1
        ends_s = [flow.left_bytes / flow.rate_bytes_per_s for flow in self._flows]
        if ends_s:
            ends_ns = math.ceil(max(min(ends_s), 0.0) * NS_PER_S)
            self._loop.after(ends_ns, self._finish, self._turn)

    def _busy(self) -> list[_Link]:
        """Links with flows, in an order that follows from that of the flows."""
        return list(dict.fromkeys(link for flow in self._flows for link in self._links(flow)))

    def _finish(self, turn: int) -> None:
        if turn != self._turn:
            return  # rates have changed since; another call is on its way
        self._settle()
        done = [flow for flow in self._flows if flow.left_bytes < _DONE_BYTES]
        for flow in done:
            self._remove(flow)
        self._share()
        for flow in done:
            flow.ended(True)


__all__ = ["Flow", "Transfers"]
