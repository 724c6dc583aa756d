"""How a mesh comes to decide, kept as transcripts to be read.

Left out is what goes on all the time: heartbeats, rumours, and how peers find each other. After a
wanted change, rewrite them with REWRITE_TRANSCRIPTS=1 and review the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.protocol.stack import GiveOrder
from tests.protocol.agreement.scenes import mesh_of
from tests.protocol.cluster import Cluster

EVERYDAY = ("Heartbeat", "Support", "Rumours", "GetPeers", "Peers,", "gossips", "dials", "Hello",
            "Welcome", "its record")  # fmt: skip


def first_block() -> list[str]:
    """ada founds a mesh; bob comes with a model that he wants to serve, cleo with its file."""
    return told(mesh_of(3), 0)


def takeover() -> list[str]:
    """bob, who serves, dies; ada, his standby, has loaded the model before it is decided."""
    cluster = mesh_of(3)
    start = len(cluster.trace)
    cluster.kill("bob")
    cluster.run(5.0)
    return told(cluster, start)


def drain() -> list[str]:
    """bob is drained: another loads, then serves, and only then he drains and is let go."""
    cluster = mesh_of(3)
    start = len(cluster.trace)
    cluster.tell("cleo", GiveOrder("drain", "", cluster.machines["bob"].peer_id))
    cluster.run(16.0)
    return told(cluster, start)


def told(cluster: Cluster, start: int) -> list[str]:
    return [line for line in cluster.trace[start:] if not any(word in line for word in EVERYDAY)]


@pytest.mark.parametrize("scene", [first_block, takeover, drain])
def test_it_is_decided_as_written_down(scene: Callable[[], list[str]]) -> None:
    name = getattr(scene, "__name__", "")
    text = f"# {scene.__doc__}\n" + "\n".join(scene()) + "\n"
    file = Path(__file__).parent / "transcripts" / f"{name}.txt"
    if os.environ.get("REWRITE_TRANSCRIPTS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
