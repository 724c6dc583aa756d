"""Records and providers through the real Kademlia DHT of three nodes in a row."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from meshnode.identity import KeyPair, open_envelope
from meshnode.messages import NodeRecord, decode
from meshnode.transport.dht import Dht
from meshnode.transport.libp2p import HostEvents, Libp2pHost
from tests.driver.nodes import LISTEN, MESH, make_node, running, until
from tests.driver.test_strangers import forged, record_of

MODEL = "ab" * 32


@dataclass
class DhtNode:
    """A host with a DHT and nothing else; everybody connected is a member."""

    key: KeyPair
    host: Libp2pHost
    dht: Dht


@asynccontextmanager
async def dht_node() -> AsyncIterator[DhtNode]:
    key = KeyPair.generate()
    checker = make_node(key).stack
    events = HostEvents(
        connected=lambda peer: host.admit(peer), disconnected=lambda peer, reason: None
    )
    host = Libp2pHost(key.seed, LISTEN, events)
    dht = Dht(
        host,
        MESH.mesh_id,
        lambda value: checker.check_record(value, trio.current_time()),
        checker.newest_record,
    )
    async with host.running(), dht.running():
        yield DhtNode(key, host, dht)


@asynccontextmanager
async def row_of_three() -> AsyncIterator[list[DhtNode]]:
    """A and C know only B."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(dht_node()) for _ in range(3)]
        middle = nodes[1]
        for end in (nodes[0], nodes[2]):
            await end.host.dial(middle.key.peer_id, middle.host.addrs())
            await until(lambda: end.key.peer_id in middle.host.peers())  # noqa: B023
            await end.dht.add_member(middle.key.peer_id, middle.host.addrs())
            await middle.dht.add_member(end.key.peer_id, end.host.addrs())
        yield nodes


async def test_what_one_publishes_another_finds_through_the_third() -> None:
    with trio.fail_after(120):
        async with row_of_three() as (a, _, c):
            record = record_of(a.key, 5, models=(MODEL,))
            assert await a.dht.publish_record(a.key.peer_id, record)
            assert await c.dht.find_record(a.key.peer_id) == record

            for subject in ("", MODEL):
                assert await a.dht.provide(subject)
                found = await c.dht.find_providers(subject)
                assert a.key.peer_id in found
                assert set(a.host.addrs()) <= set(found[a.key.peer_id])


async def test_who_provides_something_finds_the_others_that_do() -> None:
    with trio.fail_after(120):
        async with row_of_three() as (a, _, c):
            assert await a.dht.provide("")
            assert await c.dht.provide("")
            # The library answers from its own store, where it is itself: when it does not any
            # more, the door is simpler.
            own = await c.dht._kad.find_providers(c.dht._provider_key(""))
            assert c.key.peer_id in [str(info.peer_id) for info in own]
            assert set(await c.dht.find_providers("")) == {a.key.peer_id}


async def test_nobody_publishes_under_anothers_name() -> None:
    with trio.fail_after(120):
        async with row_of_three() as (a, b, c):
            lie = record_of(c.key, 9)
            assert not await c.dht.publish_record(a.key.peer_id, lie)
            lie = forged(record_of(a.key, 9))
            assert not await c.dht.publish_record(a.key.peer_id, lie)
            assert await b.dht.find_record(a.key.peer_id) is None


async def test_the_newest_record_wins() -> None:
    with trio.fail_after(120):
        async with row_of_three() as (a, _, c):
            for sequence in (1, 2):
                await a.dht.publish_record(a.key.peer_id, record_of(a.key, sequence))
            found = await c.dht.find_record(a.key.peer_id)
            assert found is not None
            assert _sequence(found) == 2


async def test_looking_for_what_nobody_has_ends() -> None:
    with trio.fail_after(120):
        async with row_of_three() as (a, _, _):
            assert await a.dht.find_record(KeyPair.generate().peer_id) is None
            assert await a.dht.find_providers("cd" * 32) == {}


async def test_members_of_a_node_are_in_its_dht_until_they_are_lost() -> None:
    with trio.fail_after(60):
        async with running() as stays:
            async with running() as goes:
                goes.meet(stays)
                await until(lambda: stays.driver.dht_size() == 1)
            await until(lambda: stays.driver.dht_size() == 0, 5.0)


def _sequence(envelope: bytes) -> int:
    signed = open_envelope(envelope, "meshnode-record", b"/meshnode/node-record/1")
    return decode(signed.payload, NodeRecord).sequence
