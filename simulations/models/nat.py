"""Who can be dialled: NATs and firewalls, as an answer to `World.may_dial`.

A NAT gives a machine's port a port outside, its mapping. Kinds differ in whom a mapping lets in
(RFC 4787's filtering) and in whether it is the same towards everybody; the names are STUN's (RFC
3489). A mapping is refreshed by whatever the machine sends; towards whom it has sent is remembered
for `MAPPING_S`.

Production tells others the addresses of its own interfaces, since nobody tells it its outside
one, and has neither relays nor hole punching: behind a NAT it can dial, and cannot be dialled.
That is the default here. With `outside_known` (a study of what address discovery would bring) a
machine can be dialled at its mapping, as far as that lets strangers in. A connection that stands
works both ways in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from meshnode_simulations.kernel.loop import NS_PER_S, Loop
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.streams import stream

MAPPING_S = 30.0
"""Home routers forget a UDP mapping after this long; RFC 4787 asks for 120 s and gets it seldom."""


class Kind(Enum):
    """What stands between a machine and the Internet."""

    OPEN = "open"
    """Nothing, or a port forwarded by its owner."""
    FULL_CONE = "full-cone"
    """One mapping, open to everybody."""
    RESTRICTED = "restricted"
    """One mapping, open to hosts that were sent to."""
    PORT_RESTRICTED = "port-restricted"
    """One mapping, open to the very ports that were sent to."""
    SYMMETRIC = "symmetric"
    """A mapping of its own towards each peer, so nobody else knows where to send."""
    UDP_BLOCKED = "udp-blocked"
    """A firewall: out by TCP only, as production then does; in not at all."""


HOMES: Mapping[Kind, float] = {
    Kind.OPEN: 0.20,
    Kind.FULL_CONE: 0.10,
    Kind.RESTRICTED: 0.10,
    Kind.PORT_RESTRICTED: 0.40,
    Kind.SYMMETRIC: 0.15,
    Kind.UDP_BLOCKED: 0.05,
}
"""An assumption for machines at home; there is no measurement of those who would join a mesh."""
_OPEN_ONLY: Mapping[Kind, float] = {Kind.OPEN: 1.0}


class Nats:
    """The surroundings of all machines. Its `may_dial` is meant for `World.may_dial`."""

    def __init__(
        self,
        loop: Loop,
        seed: int,
        shares: Mapping[Kind, float] = _OPEN_ONLY,
        *,
        outside_known: bool = False,
    ) -> None:
        """`shares` of the machines are of each kind, but those `placed` otherwise."""
        self._loop = loop
        self._seed = seed
        self._shares = shares
        self._outside_known = outside_known
        self._kinds: dict[int, Kind] = {}
        self._sent_at_ns: dict[tuple[int, int], int] = {}

    def place(self, machine: Machine, kind: Kind) -> None:
        """Say what a machine stands behind: a bootstrap peer must be open."""
        self._kinds[machine.index] = kind

    def kind(self, machine: Machine) -> Kind:
        known = self._kinds.get(machine.index)
        if known is None:
            drawing = stream(self._seed, "nat", machine.index)
            (known,) = drawing.choices(tuple(self._shares), tuple(self._shares.values()))
            self._kinds[machine.index] = known
        return known

    def may_dial(self, dialer: Machine, other: Machine) -> bool:
        """Whether the dialer's first packet gets in, now; that it was sent is remembered."""
        now_ns = self._loop.now_ns
        self._sent_at_ns[dialer.index, other.index] = now_ns
        here, there = self.kind(dialer), self.kind(other)
        if there is Kind.OPEN:
            return True
        if not self._outside_known or here is Kind.UDP_BLOCKED:
            return False
        if there is Kind.FULL_CONE:
            return True
        sent_at_ns = self._sent_at_ns.get((other.index, dialer.index))
        if sent_at_ns is None or now_ns - sent_at_ns > MAPPING_S * NS_PER_S:
            return False
        if there is Kind.RESTRICTED:
            return True
        # It sent to the mapping that it was told of; a symmetric NAT dials from another one.
        return there is Kind.PORT_RESTRICTED and here is not Kind.SYMMETRIC


__all__ = ["HOMES", "Kind", "Nats"]
