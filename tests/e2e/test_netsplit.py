"""Five machines on one Ethernet that is cut in two and put together again."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.e2e.agreed import Watch, claim, epoch, group, owners, trouble, voters, wait_agreed
from tests.e2e.conftest import Figure
from tests.e2e.lossy import Place, Switch, Weather
from tests.e2e.mesh import MODEL_NAME, Json, Mesh, NodeProcess, serves

LISTEN = "/ip4/{}/udp/9338/quic-v1"
RIGHT = "writer"
DECIDED_S = 20.0
"""Silence is noticed in three seconds, a lease ends in three, a standby loads in two."""
HEALED_S = 30.0
"""A dial that fails takes five seconds, and the next comes up to eight later."""


@pytest.fixture
def places() -> Iterator[tuple[Switch, list[Place]]]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command `ip` (Debian: apt install iproute2)")
    with Switch(Weather(delay_s=0.005, loss=0.001)) as switch:
        try:
            yield switch, [switch.place() for _ in range(5)]
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root and /dev/net/tun for network namespaces: {error}")


def test_two_and_three(mesh: Mesh, places: tuple[Switch, list[Place]], figure: Figure) -> None:
    """The three decide; the two answer with what they have and hold no right; then all agree."""
    switch, there = places
    at = [p.reached() | {"listen": LISTEN.format(p.address)} for p in there]
    owner = mesh.node("owner", **at[0]).wait_started()
    token = owner.invite()
    keep = {"models": (), "standbys": (MODEL_NAME,)}
    others = [
        mesh.node(f"other-{number}", "--join", token, **keep, **at[number])
        for number in range(1, 5)
    ]
    for node in others:
        node.wait_started()
    nodes = [owner, *others]
    everybody = {node.peer_id for node in nodes}
    wait_agreed(
        nodes,
        lambda status: (
            voters(status) == everybody and owners(status, MODEL_NAME, "serving") == {owner.peer_id}
        ),
    )
    assert claim(owner, RIGHT)["holds"]

    minority, majority = nodes[:2], nodes[2:]
    with Watch(lambda: nodes) as watch:
        before, cut_at = epoch(owner.status()), time.monotonic()
        switch.split(there[:2], there[2:])
        wait_agreed(majority, lambda status: _is_served(status, majority), DECIDED_S)
        figure("split 2+3: the three serve by a new decision, s", time.monotonic() - cut_at)
        here = {node.peer_id for node in majority}
        majority[0].wait_until(lambda status: serves(status, MODEL_NAME) & here)
        assert majority[0].ask().served_by in here
        for node in minority:
            node.wait_until(lambda status: "no quorum" in trouble(status), DECIDED_S)
            assert epoch(node.status()) == before
            assert node.ask().served_by == owner.peer_id
        assert not claim(owner, RIGHT, "read")["holds"], "a lease that nobody renews is over"
        answer: Json = {}
        while not answer.get("holds"):
            answer = claim(majority[0], RIGHT, wait_s=2.0)
            assert time.monotonic() - cut_at < DECIDED_S, answer
        figure("split 2+3: the three have the right of the two, s", time.monotonic() - cut_at)
        assert "error" in claim(owner, RIGHT, wait_s=0.5)
        decided = epoch(majority[0].status())

        healed_at = time.monotonic()
        switch.split()
        wait_agreed(nodes, lambda status: epoch(status) >= decided, HEALED_S)
        figure("healed: all of one mind, s", time.monotonic() - healed_at)
        assert len({group(node.status())["id"] for node in nodes}) == 1
        holders = [node for node in nodes if claim(node, RIGHT, "read")["holds"]]
        assert holders == [majority[0]]
        wait_agreed(nodes, lambda status: len(owners(status, MODEL_NAME, "serving")) == 1)
        figure("healed: one owner, s", time.monotonic() - healed_at)
    assert not watch.fallen


def _is_served(status: Json, side: list[NodeProcess]) -> bool:
    return bool(owners(status, MODEL_NAME, "serving") & {node.peer_id for node in side})
