"""Each kind of fault does what its row of the table says, and is put right again."""

from __future__ import annotations

import random

import pytest

from meshnode.errors import ConfigError
from meshnode_simulations.faults.buggify import Extreme
from meshnode_simulations.faults.draw import drawn
from meshnode_simulations.faults.schedule import KINDS, RIGHTS, Faults, find
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.run import Run
from meshnode_simulations.scenario import Fault, Scenario, load
from meshnode_simulations.simulation import Simulation

AT_S, FOR_S = 12.0, 4.0


def a_scenario() -> Scenario:
    changes = {
        "scenario.duration_s": 60.0,
        "mesh.nodes": 5,
        "chaos.kinds": [],
        "chaos.heal_at_s": 0.0,
        "chaos.buggify": 0.0,
        "demand.kind": "none",
    }
    return load("chaos", changes)


def a_run(fault: Fault | None = None) -> Run:
    """Five nodes that have settled, just before the fault strikes n3."""
    schedule = () if fault is None else (fault,)
    run = Simulation(a_scenario(), seed=1, check=True, schedule=schedule).prepare()
    run.world.loop.run(int((AT_S - 0.001) * NS_PER_S))
    assert all(len(machine.live.members()) == 4 for machine in run.world.machines)
    return run


def after(run: Run, seconds: float) -> None:
    run.world.loop.run(int((AT_S + seconds) * NS_PER_S))


def a_fault(kind: str, *, value: float = 0.0, other: str = "n1") -> Fault:
    return Fault(at_s=AT_S, kind=kind, target="n3", other=other, for_s=FOR_S, value=value)


def target(run: Run) -> Machine:
    return run.world.by_name["n3"]


@pytest.mark.parametrize("kind", ["kill", "stop", "wipe", "crash"])
def test_power_goes_and_comes_back(kind: str) -> None:
    run = a_run(a_fault(kind))
    disk = dict(target(run).disk)
    after(run, 2.0)
    assert target(run).stack is None
    if disk:
        assert bool(target(run).disk) == (kind != "wipe")
    noticed = [machine.lost() for machine in run.world.running()]
    assert all(noticed) == (kind == "stop"), "goodbyes are heard at once, silence is not"
    after(run, 30.0)
    assert target(run).starts == 2
    assert len(target(run).live.members()) == 4


def test_who_is_frozen_does_nothing_and_goes_on() -> None:
    run = a_run(a_fault("freeze"))
    after(run, 1.0)
    assert target(run).is_asleep
    after(run, 3.5)
    assert all(machine.lost() for machine in run.world.machines if machine is not target(run))
    after(run, 30.0)
    assert target(run).starts == 1
    assert len(target(run).live.members()) == 4


def test_a_cut_connection_comes_back_by_itself() -> None:
    run = a_run(a_fault("cut"))
    after(run, 0.001)
    assert 1 not in target(run).links
    after(run, 10.0)
    assert 1 in target(run).links


@pytest.mark.parametrize(("kind", "left"), [("sever", 3), ("block", 3), ("part", 0)])
def test_who_cannot_be_reached_is_lost_until_it_heals(kind: str, left: int) -> None:
    run = a_run(a_fault(kind))
    after(run, FOR_S - 0.5)
    assert len(target(run).links) == left
    after(run, 30.0)
    assert len(target(run).links) == 4


def test_what_is_clogged_piles_up_and_comes_all_the_same() -> None:
    run = a_run(a_fault("clog"))
    after(run, 3.0)
    held = [message for link in target(run).links.values() for message in link.held.values()]
    assert any(held)
    after(run, 6.0)
    assert not any(link.held for link in target(run).links.values())


def test_loss_lag_and_clocks_are_as_they_were_again() -> None:
    for kind, value in (("lose", 0.2), ("slow", 0.3), ("rate", 1.05), ("jump", 600.0)):
        run = a_run(a_fault(kind, value=value))
        machine, before = target(run), run.world.network.loss
        ahead_s = run.world.now_of(machine) - run.now_s
        after(run, FOR_S - 0.001)
        wrong = {
            "lose": run.world.network.loss - before,
            "slow": machine.lag_ns / NS_PER_S,
            "rate": 1.0 + (run.world.now_of(machine) - run.now_s - ahead_s) / (FOR_S - 0.001),
            "jump": machine.unix_ahead_s,
        }
        expected = value - before if kind == "lose" else value
        assert wrong[kind] == pytest.approx(expected, rel=1e-3)
        after(run, FOR_S + 5.0)
        gained_s = run.world.now_of(machine) - run.now_s
        after(run, FOR_S + 15.0)
        assert run.world.now_of(machine) - run.now_s == pytest.approx(gained_s)
        assert run.world.network.loss == before
        assert (machine.lag_ns, machine.unix_ahead_s) == (0, 0.0)


def test_orders_and_claims_are_given_and_taken_back() -> None:
    run = a_run(a_fault("drain"))
    after(run, FOR_S - 0.1)
    (view,) = target(run).live.agreement.views(run.world.now_of(target(run)))
    assert any(order[0] == "drain" for order in view.orders)
    after(run, 20.0)
    (view,) = target(run).live.agreement.views(run.world.now_of(target(run)))
    assert not any(order[0] == "drain" for order in view.orders)

    run = a_run(a_fault("claim"))
    after(run, FOR_S - 0.1)
    now_s = run.world.now_of(target(run))
    assert target(run).live.agreement.holds_right(RIGHTS[0], now_s)
    after(run, 20.0)
    now_s = run.world.now_of(target(run))
    assert not target(run).live.agreement.holds_right(RIGHTS[0], now_s)


def test_every_kind_is_tested_here() -> None:
    tested = {
        *("kill", "stop", "wipe", "crash", "freeze", "cut", "sever", "block", "part", "clog"),
        *("lose", "slow", "rate", "jump", "drain", "claim"),
    }
    assert tested == set(KINDS)


def test_targets_mean_who_they_say() -> None:
    run = a_run()
    rng = random.Random(1)
    names = {
        text: [machine.name for machine in find(run, text, rng)]
        for text in ("n2", "random:3", "share:0.4", "bootstrap", "leader", "voter", "owner:small")
    }
    assert names["n2"] == ["n2"]
    assert [len(names[text]) for text in ("random:3", "share:0.4")] == [3, 2]
    assert names["bootstrap"] == ["n0"]
    assert all(len(names[text]) == 1 for text in ("leader", "voter", "owner:small"))
    (owner,) = find(run, "owner:small", rng)
    assert owner.loaded
    for wrong in ("n", "anybody", "share:2", "random:x", "owner:"):
        with pytest.raises(ConfigError):
            Faults(run, (Fault(at_s=1.0, kind="kill", target=wrong),))
    with pytest.raises(ConfigError):
        Faults(run, (Fault(at_s=1.0, kind="kil"),))


def test_chaos_is_a_function_of_the_seed_and_ends_when_it_should() -> None:
    chaos = load("chaos")
    assert drawn(chaos, 1) == drawn(chaos, 1) != drawn(chaos, 2)
    faults = drawn(chaos, 1)
    assert {fault.kind for fault in faults} <= set(KINDS)
    assert all(chaos.chaos.start_s <= fault.at_s for fault in faults)
    assert max(fault.at_s + fault.for_s for fault in faults) <= chaos.chaos.heal_at_s + 0.01


def test_extreme_draws_are_legal() -> None:
    rng = Extreme(1, 0.9)
    drawn = [rng.uniform(0.75, 1.25) for _ in range(1000)]
    assert all(0.75 <= each <= 1.25 for each in drawn)
    assert sum(each in (0.75, max(drawn)) for each in drawn) > 800
    assert {rng.choice("abc") for _ in range(500)} == set("abc")
    assert sorted(rng.sample(range(10), 10)) == list(range(10))
