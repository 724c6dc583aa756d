"""Messages reach all members once, spread only if accepted, and get round what is broken."""

from __future__ import annotations

from itertools import pairwise

import pytest

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import World
from meshnode_simulations.models.pubsub import DEGREE_HIGH, DEGREE_LOW, Gossipsub

MACHINES = 24


class Heard(World):
    """Notes who hears what, and accepts or refuses it, in the place of the stacks."""

    def __init__(self, seed: int, refusing: tuple[str, ...] = ()) -> None:
        super().__init__(seed)
        self.heard: list[tuple[str, bytes, int]] = []
        self.refusing = refusing

    def hear(self, machine: Machine, advert: bytes) -> bool:
        if advert.startswith(b"test"):
            self.heard.append((machine.name, advert, self.loop.now_ns))
            return machine.name not in self.refusing
        return super().hear(machine, advert)


def a_mesh(seed: int = 1, refusing: tuple[str, ...] = ()) -> tuple[Heard, Gossipsub]:
    world = Heard(seed, refusing)
    gossip = Gossipsub(world)
    world.pubsub = gossip
    machines = [world.add(f"m{place}") for place in range(MACHINES)]
    world.switch_on(machines[0])
    for machine in machines[1:]:
        world.switch_on(machine, machines[:1])
    world.loop.run(100 * NS_PER_S)
    return world, gossip


def run(world: World, seconds: float) -> None:
    world.loop.run(world.loop.now_ns + int(seconds * NS_PER_S))


def names(world: Heard) -> list[str]:
    return sorted(name for name, *_ in world.heard)


@pytest.mark.parametrize("seed", range(2))
def test_everybody_hears_once_within_hops(seed: int) -> None:
    world, gossip = a_mesh(seed)
    gossip.publish(world.machines[7], b"test")
    run(world, 5)
    assert names(world) == sorted(m.name for m in world.machines[:7] + world.machines[8:])
    last_ns = max(at for *_, at in world.heard)
    assert last_ns - 100 * NS_PER_S <= 0.05 * NS_PER_S, "a few hops of 10 ms"


def test_meshes_are_mutual_and_within_their_bounds() -> None:
    world, gossip = a_mesh()
    gossip.publish(world.machines[0], b"test")
    for machine in world.machines:
        near = gossip.neighbours(machine)
        assert DEGREE_LOW <= len(near) <= DEGREE_HIGH
        assert all(machine.index in gossip.neighbours(world.machines[index]) for index in near)


def test_what_is_refused_goes_no_further() -> None:
    world, gossip = a_mesh(refusing=tuple(f"m{place}" for place in range(MACHINES)))
    near = {f"m{index}" for index in gossip.neighbours(world.machines[3])}
    gossip.publish(world.machines[3], b"test")
    run(world, 0.5)
    assert near
    assert {name for name, *_ in world.heard} == near


def test_a_broken_mesh_is_repaired_by_gossip() -> None:
    """Links of a machine's whole mesh break as a message comes: it still hears, a bit later."""
    world, gossip = a_mesh()
    gossip.publish(world.machines[0], b"test 1")
    run(world, 0.5)
    lonely = world.machines[9]
    for index in gossip.neighbours(lonely):
        world.cut(lonely, world.machines[index])
    run(world, 0.001)
    before_ns = world.loop.now_ns
    gossip.publish(world.machines[0], b"test 2")
    run(world, 5)
    (at_ns,) = (at for name, data, at in world.heard if name == "m9" and data == b"test 2")
    assert 0 < at_ns - before_ns < 3 * NS_PER_S


def test_the_cut_off_and_the_sleeping_neither_send_nor_hear() -> None:
    world, gossip = a_mesh()
    cut, asleep = world.machines[4], world.machines[5]
    world.partition([cut])
    world.sleep(asleep)
    gossip.publish(cut, b"test from the cut off")
    gossip.publish(world.machines[0], b"test")
    run(world, 1.0)
    assert not [data for _, data, _ in world.heard if data == b"test from the cut off"]
    heard = {name for name, *_ in world.heard}
    assert not heard & {cut.name, asleep.name}
    assert len(heard) == MACHINES - 3
    world.wake(asleep)
    run(world, 1.0)
    assert [name for name, *_ in world.heard].count(asleep.name) == 1, "from its buffers, once"


def test_copies_are_counted_as_if_each_had_been_sent() -> None:
    """With links of one length no neighbour can have said in time that it has it: everybody sends
    to all its neighbours but the one that it is from and the author."""
    world, gossip = a_mesh()
    gossip.publish(world.machines[0], b"test 1")
    run(world, 1.5)
    gossip._look_after_meshes()
    before = gossip.spread.copies + gossip.spread.spared
    gossip.publish(world.machines[0], b"test 2")
    edges = sum(len(gossip.neighbours(machine)) for machine in world.machines)
    run(world, 0.5)
    authors = len(gossip.neighbours(world.machines[0]))
    assert gossip.spread.copies + gossip.spread.spared - before == edges - authors - (
        MACHINES - 1 - authors
    )
    times = sorted(at for _, data, at in world.heard if data == b"test 2")
    assert all(later >= earlier for earlier, later in pairwise(times))
