"""What a machine's access link carries, each way.

Round figures of common tariffs, not measurements: what matters to a mesh of homes is that they
send several times slower than they receive, and that a data centre is not the limit. Give other
figures where they matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.network import Access

BYTES_PER_MBIT = 125_000
BURST_S = 0.02
"""What a router's queue passes on at once after a pause, in seconds of its rate."""


@dataclass(frozen=True, slots=True)
class AccessKind:
    """The rates of one kind of link."""

    name: str
    down_bytes_per_s: float
    up_bytes_per_s: float

    def attach(self, machine: Machine) -> None:
        """Put the machine behind a link of this kind, an empty one."""
        machine.down = Access(self.down_bytes_per_s, int(self.down_bytes_per_s * BURST_S))
        machine.up = Access(self.up_bytes_per_s, int(self.up_bytes_per_s * BURST_S))


HOME_DSL = AccessKind("dsl", 50 * BYTES_PER_MBIT, 10 * BYTES_PER_MBIT)
HOME_CABLE = AccessKind("cable", 250 * BYTES_PER_MBIT, 25 * BYTES_PER_MBIT)
HOME_FIBRE = AccessKind("fibre", 500 * BYTES_PER_MBIT, 250 * BYTES_PER_MBIT)
DATA_CENTRE = AccessKind("datacentre", 10_000 * BYTES_PER_MBIT, 10_000 * BYTES_PER_MBIT)
KINDS = {kind.name: kind for kind in (HOME_DSL, HOME_CABLE, HOME_FIBRE, DATA_CENTRE)}

__all__ = ["DATA_CENTRE", "HOME_CABLE", "HOME_DSL", "HOME_FIBRE", "KINDS", "AccessKind"]
