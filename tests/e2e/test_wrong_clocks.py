"""An owner whose wall clock is ten minutes wrong: promises do not depend on it."""

from __future__ import annotations

import time

import pytest

from tests.e2e.agreed import Watch, claim, owners, voters, wait_agreed
from tests.e2e.conftest import Figure
from tests.e2e.mesh import MODEL_NAME, Mesh, serves

SKEW_S = 600
SERVED_S = 15.0
"""A few seconds on a free machine."""


@pytest.mark.parametrize("skew_s", [SKEW_S, pytest.param(-SKEW_S, marks=pytest.mark.soak)])
def test_owner_ten_minutes_off(mesh: Mesh, skew_s: int, figure: Figure) -> None:
    """It owns, votes and holds a right as any other; so does its successor."""
    keep = {"models": (), "standbys": (MODEL_NAME,)}
    right = mesh.node("right", **keep).wait_started()
    wrong = mesh.node("wrong", "--join", right.invite(), env=mesh.clock_off(skew_s))
    third = mesh.node("third", "--join", right.invite(), **keep)
    gate = mesh.gateway("gate", "--join", right.invite(role="gateway"))
    for node in (wrong, third, gate):
        node.wait_started()
    running = [right, third, gate]
    with Watch(lambda: running) as watch:
        wait_agreed(
            [*running, wrong],
            lambda status: (
                voters(status) == {right.peer_id, wrong.peer_id, third.peer_id}
                and wrong.peer_id in owners(status, MODEL_NAME, "serving")
            ),
        )
        assert claim(wrong, "writer")["holds"]
        wrong.kill()
        killed_at = time.monotonic()
        wait_agreed(
            running,
            lambda status: (
                wrong.peer_id not in owners(status, MODEL_NAME)
                and owners(status, MODEL_NAME, "serving")
            ),
            SERVED_S,
        )
        gate.wait_until(lambda status: serves(status, MODEL_NAME))
        gate.ask()
        figure("owner with a wrong clock killed: served elsewhere, s",
               time.monotonic() - killed_at)  # fmt: skip
        answer = claim(right, "writer", wait_s=SERVED_S)
        assert answer["holds"]
    assert not watch.fallen
