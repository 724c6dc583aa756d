"""How long a message takes, and who can reach whom.

Connections are QUIC's: in order, and what is lost arrives later instead of never. So loss is a
delay, and a partition is silence: both ends find out when they have heard nothing for
`SILENCE_S`, as with production's transport. What a message weighs counts on the two access links,
which is where homes are slow; the middle of the network is never full.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from math import log
from typing import Protocol

from meshnode_simulations.kernel.loop import NS_PER_S

SILENCE_S = 2.5
"""A peer that died without a word is missed after this long (transport: at most 3 s)."""
RESEND_MIN_S = 0.05
"""What a lost packet costs at least: QUIC's probe timeout is 1.5 RTT and a timer's grain."""
PROBE_RTTS = 1.5
LOST_IN_A_ROW_MAX = 10
"""Bounds the delay of one message; at 10 % loss that happens once in 10 billion."""


class Latency(Protocol):
    """How far two machines, given by index, are from each other."""

    def one_way_ns(self, a: int, b: int) -> int:
        """Without any queue or jitter; the same both ways."""
        ...


class Constant:
    """Everybody is equally far from everybody."""

    def __init__(self, one_way_ns: int) -> None:
        self._one_way_ns = one_way_ns

    def one_way_ns(self, a: int, b: int) -> int:
        return self._one_way_ns


class Access:
    """One direction of a machine's access link: what it carries, one after the other.

    A token bucket: up to `burst_bytes` pass at once after a pause.
    """

    __slots__ = ("_burst_ns", "_free_ns", "bytes_per_s")

    def __init__(self, bytes_per_s: float, burst_bytes: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._burst_ns = int(burst_bytes / bytes_per_s * NS_PER_S)
        self._free_ns = 0

    def pass_at(self, now_ns: int, size_bytes: int) -> int:
        """When the last byte of something that comes now is through."""
        start_ns = max(self._free_ns, now_ns - self._burst_ns)
        self._free_ns = start_ns + int(size_bytes / self.bytes_per_s * NS_PER_S)
        return max(self._free_ns, now_ns)


class Network:
    """See the module."""

    def __init__(
        self,
        latency: Latency,
        rng: random.Random,
        *,
        jitter: float = 0.0,
        loss: float = 0.0,
    ) -> None:
        """`jitter` is the mean of an exponential delay on top, as a share of the latency; `loss`
        the share of messages of which a packet is lost.
        """
        self.latency = latency
        self.jitter = jitter
        self.loss = loss
        self._rng = rng
        self._islands: dict[int, int] = {}
        self._blocked: set[tuple[int, int]] = set()
        """Only ever asked for one pair, so its order reaches nothing."""

    def delay_ns(self, source: int, target: int) -> int:
        """How long one message travels from one machine to another, queues apart."""
        base_ns = self.latency.one_way_ns(source, target)
        delay_ns = base_ns
        if self.jitter:
            # An exponential of mean 1, as `expovariate` draws it, at half its price.
            delay_ns += int(base_ns * self.jitter * -log(1.0 - self._rng.random()))
        if self.loss:
            lost = 0
            while lost < LOST_IN_A_ROW_MAX and self._rng.random() < self.loss:
                probe_ns = max(int(2 * base_ns * PROBE_RTTS), int(RESEND_MIN_S * NS_PER_S))
                delay_ns += probe_ns << lost
                lost += 1
        return delay_ns

    def rtt_ns(self, a: int, b: int) -> int:
        """There and back without queues, jitter and loss: what a node would measure at best."""
        return 2 * self.latency.one_way_ns(a, b)

    # --- who can reach whom ---------------------------------------------------------------------

    def reaches(self, source: int, target: int) -> bool:
        """Whether packets of one get to the other."""
        if not self._islands and not self._blocked:
            return True
        together = self._islands.get(source) == self._islands.get(target)
        return together and (source, target) not in self._blocked

    def joins(self, a: int, b: int) -> bool:
        """Whether packets get through both ways, as a connection needs."""
        return self.reaches(a, b) and self.reaches(b, a)

    def partition(self, islands: Iterable[Iterable[int]]) -> None:
        """Only machines of one island reach each other; all that are on none are on one."""
        self._islands = {
            machine: place for place, island in enumerate(islands) for machine in island
        }

    def block(self, source: int, target: int) -> None:
        """Nothing of one gets to the other any more, though all may the other way."""
        self._blocked.add((source, target))

    def heal(self) -> None:
        self._islands = {}
        self._blocked.clear()
