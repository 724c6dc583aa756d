"""The simulator's checks, for tests: after every event, and one that is broken raises."""

from __future__ import annotations

from meshnode_simulations.checks.safety import Safety
from tests.protocol.cluster import Cluster

RIGHTS = ("the-pen",)
"""The exclusive rights that runs claim: one, so that they contend for it."""


def watch(cluster: Cluster) -> Safety:
    """Check `cluster` from now on."""
    return Safety(cluster.world, rights=RIGHTS)
