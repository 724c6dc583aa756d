"""The checkers see what they are to see: each is shown a world in which its promise is broken."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from meshnode.messages import Body, Claim, Shard
from meshnode_simulations.checks.safety import Safety, check_body
from meshnode_simulations.kernel.keys import genuine
from meshnode_simulations.run import Run
from meshnode_simulations.scenario import load
from meshnode_simulations.simulation import Simulation


@pytest.fixture(scope="module")
def run() -> Run:
    changes = {"mesh.nodes": 4, "chaos.kinds": [], "chaos.heal_at_s": 0.0, "demand.kind": "none"}
    run = Simulation(load("chaos", changes), seed=1).prepare()
    run.world.loop.run(15 * 10**9)
    return run


def the_head(run: Run) -> tuple[Body, str]:
    (register,) = run.world.machines[0].live.agreement.registers()
    assert register.head.body.items
    return register.head.body, register.group


def broken_by(body: Body, group: str) -> set[str]:
    found: list[str] = []
    check_body(body, group, genuine, lambda promise, what: found.append(promise))
    return set(found)


def test_a_decided_body_is_in_order(run: Run) -> None:
    assert broken_by(*the_head(run)) == set()


def test_what_is_wrong_with_a_body_is_seen(run: Run) -> None:
    body, group = the_head(run)
    item = body.items[0]
    half = Shard("layers", 0, 1, 2)
    wrong = {
        "S4": replace(body, items=(item, item)),
        "S5": replace(body, claims=(Claim("pen", item.owner, 1), Claim("pen", item.owner, 2))),
        "S7": replace(body, items=(replace(item, shard=half),)),
        "S8": replace(body, items=(replace(item, bytes=2**39),)),
    }
    for promise, changed in wrong.items():
        assert promise in broken_by(changed, group)


def test_a_head_that_falls_and_a_second_block_are_seen(run: Run) -> None:
    found: list[str] = []
    safety = Safety(run.world, lambda promise, what: found.append(promise))
    machine = run.world.machines[0]
    (register,) = machine.live.agreement.registers()
    safety.epochs[machine.index, register.group] = register.head.epoch + 1
    safety.blocks[register.group, register.head.epoch] = bytes(32)
    safety._check_head(machine, register)
    assert {"S1", "S3"} <= set(found)
    assert not {"S2", "S9"} & set(found)
