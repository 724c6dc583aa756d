"""The DHT finds what was stored, shuns the dead, and lets a newcomer find the mesh."""

from __future__ import annotations

import subprocess
import sys

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import World
from meshnode_simulations.models import kademlia
from meshnode_simulations.models.kademlia import Kademlia, RoutingTable, key_of

MACHINES = 16


def a_mesh(seed: int = 1) -> tuple[World, Kademlia, list[Machine]]:
    """A mesh that has met, all of whose records are in the DHT."""
    world = World(seed)
    dht = Kademlia(world)
    world.dht = dht
    machines = [world.add(f"m{place}") for place in range(MACHINES)]
    world.switch_on(machines[0])
    for machine in machines[1:]:
        world.switch_on(machine, machines[:1])
    world.loop.run(60 * NS_PER_S)
    for machine in machines:
        dht.publish(machine, machine.live._own_record(world.now_of(machine)), ())
    world.loop.run(120 * NS_PER_S)
    return world, dht, machines


def find_record(world: World, dht: Kademlia, machine: Machine, author: Machine) -> list[object]:
    """What a look-up comes to, with the virtual time that it took."""
    found: list[object] = []
    began_ns = world.loop.now_ns
    node = dht._nodes[machine.index]
    node.records.pop(key_of(author.peer_id), None)
    dht._find_record(
        machine, node, author.index, lambda record: found.extend((record, world.loop.now_ns))
    )
    world.loop.run(began_ns + 60 * NS_PER_S)
    record, ended_ns = found
    assert isinstance(ended_ns, int)
    return [record, (ended_ns - began_ns) / NS_PER_S]


def test_the_parameters_are_those_of_production() -> None:
    """In a process of its own, since libp2p takes a second and 100 MB to import."""
    code = """if True:
        from libp2p.kad_dht import common, kad_dht, peer_routing
        from meshnode import driver
        from meshnode.transport import dht, gossip
        from meshnode_simulations.models import kademlia, pubsub
        assert kademlia.BUCKET_SIZE == common.BUCKET_SIZE and kademlia.ALPHA == common.ALPHA
        assert kademlia.BETA == common.BETA and kademlia.QUERY_TIMEOUT_S == common.QUERY_TIMEOUT
        assert kademlia.ROUNDS_MAX == peer_routing.MAX_PEER_LOOKUP_ROUNDS
        assert kademlia.REFRESH_EVERY_S == kad_dht.ROUTING_TABLE_REFRESH_INTERVAL
        for name in ("OPERATION_TIMEOUT_S", "PROVIDERS_MAX"):
            assert getattr(kademlia, name) == getattr(dht, name)
        for name in ("LOOKUP_FIRST_S", "LOOKUP_EVERY_S"):
            assert getattr(kademlia, name) == getattr(driver, name)
        for name in ("DEGREE", "DEGREE_LOW", "DEGREE_HIGH", "HEARTBEAT_S"):
            assert getattr(pubsub, name) == getattr(gossip, name)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_table_knows_its_neighbourhood_best() -> None:
    own, keys = key_of("own"), {place: key_of(f"peer {place}") for place in range(500)}
    table = RoutingTable(own)
    for place, key in keys.items():
        table.add(place, key, lambda oldest: True)
    nearest = sorted(keys, key=lambda place: keys[place] ^ own)
    assert table.nearest(own, 10) == nearest[:10]
    assert 60 < len(table) < 140, "20 of each half, quarter, eighth …"
    far = max(keys, key=lambda place: keys[place] ^ own)
    assert far not in table or far < 60, "a full bucket keeps whom it has known for longest"


def test_a_full_bucket_replaces_only_the_dead() -> None:
    table = RoutingTable(0, bucket_size=1)
    far = 1 << 255
    assert table.add(1, far | 1, lambda oldest: True)
    assert not table.add(2, far | 2, lambda oldest: True)
    assert table.add(2, far | 2, lambda oldest: False)
    assert 1 not in table


def test_a_record_is_found_within_round_trips() -> None:
    world, dht, (ada, *_, bob) = a_mesh()
    record, took_s = find_record(world, dht, ada, bob)
    assert isinstance(record, bytes)
    assert bob.live.check_record(record, world.now_of(bob)) == bob.peer_id
    assert took_s < 0.2, "some round trips of 20 ms"


def test_the_dead_cost_a_timeout_and_are_forgotten() -> None:
    world, dht, (ada, *others) = a_mesh()
    for machine in others[:5]:
        world.kill(machine)
    record, took_s = find_record(world, dht, ada, others[-1])
    assert record is not None
    assert kademlia.QUERY_TIMEOUT_S <= took_s < kademlia.OPERATION_TIMEOUT_S + 10
    timeouts = dht.lookups.timeouts
    record, took_s = find_record(world, dht, ada, others[-2])
    assert record is not None
    assert took_s < 0.2, "by now everybody has noticed, and nobody dead is asked again"
    assert dht.lookups.timeouts == timeouts > 0
    assert not any(machine.index in dht._nodes[0].table for machine in others[:5])


def test_a_forged_record_is_not_stored() -> None:
    _, dht, (ada, bob, *_) = a_mesh()
    true = dht._nodes[0].records[key_of(ada.peer_id)]
    dht._store_record(key_of(ada.peer_id), true[:-1] + b"x", bob, dht._nodes[bob.index])
    assert dht._nodes[bob.index].records.get(key_of(ada.peer_id)) in (true, None)


def test_a_newcomer_finds_members_that_nobody_told_it_of() -> None:
    """Its only acquaintance is silent about others; the DHT's providers fill the gap."""
    world, _, machines = a_mesh()
    world.tamper = lambda machine, other, message: (
        () if type(message).__name__ == "Peers" else (message,)
    )
    newcomer = world.add("newcomer")
    world.switch_on(newcomer, machines[:1])
    world.loop.run(world.loop.now_ns + 4 * NS_PER_S)
    assert set(newcomer.links) == {0}
    world.loop.run(world.loop.now_ns + 30 * NS_PER_S)
    assert len(newcomer.links) >= kademlia.PROVIDERS_MAX


def test_a_run_is_repeatable() -> None:
    digests = set()
    for _ in range(2):
        world, _, machines = a_mesh(3)
        world.kill(machines[5])
        world.loop.run(world.loop.now_ns + 30 * NS_PER_S)
        digests.add(world.trace.digest())
    assert len(digests) == 1
