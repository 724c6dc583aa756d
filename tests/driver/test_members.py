"""Members among each other, on real QUIC: meeting, losing, meeting again."""

from __future__ import annotations

import logging

import pytest
import trio
from libp2p.rcmgr import Direction

from meshnode.errors import PeerUnreachableError
from meshnode.identity import KeyPair
from meshnode.protocol.stack import Learn, SetOffers
from meshnode.transport import Stream
from tests.driver.nodes import HTTP_PROTOCOL, LiveNode, make_node, mesh_of, running, until
from tests.protocol.cluster import an_offer


async def ask(node: LiveNode, other: LiveNode, protocol: str = HTTP_PROTOCOL) -> bytes:
    """A round trip on a member protocol."""
    async with await node.host.open_stream(other.peer_id, protocol) as stream:
        await stream.send_all(b"ping")
        await stream.send_eof()
        answer = await stream.receive_some()
        await stream.receive_some()
        return answer


def are_settled(one: LiveNode, other: LiveNode) -> bool:
    """Whether they are members over one connection: the one that the smaller peer id made."""
    for node, peer in ((one, other), (other, one)):
        directions = [each.direction for each in node.host.raw.get_network().get_connections()]
        wanted = Direction.OUTBOUND if node.peer_id < peer.peer_id else Direction.INBOUND
        if directions != [wanted] or node.members() != {peer.peer_id}:
            return False
    return True


async def test_three_nodes_with_one_introducer_become_members_of_each_other() -> None:
    with trio.fail_after(60):
        async with mesh_of(3) as nodes:
            for node in nodes:
                for other in nodes:
                    if node is not other:
                        assert node.joined(other.peer_id) == 1
                        assert node.lost(other.peer_id) == 0
                        assert await ask(node, other) == b"ping"


async def test_adverts_reach_everybody() -> None:
    with trio.fail_after(60):
        async with mesh_of(3) as nodes:
            for place, node in enumerate(nodes):
                node.driver.submit(node.peer_id, SetOffers((an_offer(f"model-{place}"),)))

            def complete() -> bool:
                names = ({o.name for os in n.stack.offers().values() for o in os} for n in nodes)
                return all(each == {"model-0", "model-1", "model-2"} for each in names)

            await until(complete)
            assert not any(node.stack.adverts.refused["forged"] for node in nodes)


async def test_simultaneous_dials_end_in_one_connection() -> None:
    """Ten times, because who is faster is a matter of luck."""
    with trio.fail_after(90):
        for _ in range(10):
            async with running() as one, running() as other:
                one.meet(other)
                other.meet(one)
                await until(lambda: are_settled(one, other))
                assert await ask(one, other) == b"ping"
                assert await ask(other, one) == b"ping"
                assert not one.stack.refused, "nobody was taken for a liar"
                assert not other.stack.refused


async def test_a_goodbye_is_heard_at_once_and_not_called_after() -> None:
    with trio.fail_after(60):
        async with mesh_of(2) as (stays, leaves):
            await leaves.driver.say_goodbye()
            await until(lambda: stays.lost(leaves.peer_id) == 1, 2.0)
            assert not stays.members()


async def test_a_vanished_peer_is_lost_and_its_return_is_noticed() -> None:
    with trio.fail_after(60):
        async with running() as stays:
            key = KeyPair.generate()
            for first_sequence in (1_000_000, 2_000_000):
                goes = make_node(key, first_sequence=first_sequence)
                async with running(goes, offers=(an_offer(),)):
                    goes.meet(stays)
                    await until(lambda: key.peer_id in stays.members())
                    assert key.peer_id in stays.stack.offers()
                await until(lambda: not stays.members(), 5.0)
                assert key.peer_id not in stays.stack.offers()
            assert stays.joined(key.peer_id) == 2
            assert not stays.stack.adverts.refused["forged"]


async def test_a_node_whose_clock_went_back_is_believed_if_its_numbers_went_on() -> None:
    """What `DataDir.first_sequence` promises; without it the mesh goes by the old numbers."""
    with trio.fail_after(60):
        async with running() as stays:
            key = KeyPair.generate()
            for first_sequence, model in ((5_000_000, "first"), (1_000_000, "old")):
                goes = make_node(key, first_sequence=first_sequence)
                async with running(goes, offers=(an_offer(model),)):
                    goes.meet(stays)
                    await until(lambda: key.peer_id in stays.members())
                    if model == "first":
                        await until(lambda: key.peer_id in stays.stack.offers())
                    else:
                        await until(lambda: stays.stack.adverts.refused["rolled back"] > 0)
                        assert stays.stack.records.refused["rolled back"] > 0
                        assert key.peer_id not in stays.stack.offers()
                await until(lambda: not stays.members(), 5.0)


async def test_a_handler_that_raises_costs_its_stream_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(stream: Stream) -> None:
        await stream.receive_some()
        raise ZeroDivisionError("on purpose")

    with trio.fail_after(60), caplog.at_level(logging.CRITICAL):
        async with mesh_of(2) as (one, other):
            other.host.handle("/broken/1", broken)
            for _ in range(3):
                with pytest.raises(trio.BrokenResourceError):
                    await ask(one, other, "/broken/1")
            assert await ask(one, other) == b"ping"
            assert one.members() == {other.peer_id}


async def test_a_stream_for_a_protocol_nobody_handles_is_broken_and_nothing_else() -> None:
    with trio.fail_after(60):
        async with mesh_of(2) as (one, other):
            with pytest.raises(trio.BrokenResourceError):
                await ask(one, other, "/unheard-of/1")
            assert await ask(one, other) == b"ping"


STRANGE_ADDRS = (
    "/ip4/127.0.0.1/udp/0/quic-v1",
    "/ip4/127.0.0.1/tcp/1",
    "/ip4/127.0.0.1/udp/9",
    "/ip4/127.0.0.1",
    "/ip6/::1/udp/1/quic-v1",
    "/ip6/fe80::1/udp/1/quic-v1",
    "/unix/tmp/x",
    "/dns4/nowhere.invalid/udp/1/quic-v1",
    "/dns4/nowhere.invalid/tcp/1",
    "/dns4/..../tcp/1",
    "/ip4/255.255.255.255/udp/1/quic-v1",
    "/ip4/127.0.0.1/tcp/1/ws",
    "/ip4/127.0.0.1/udp/1/quic-v1/p2p-circuit",
    "/ip4/127.0.0.1/udp/1/quic-v1/webtransport",
    "/onion3/" + "a" * 56 + ":1",
    "/not-a-protocol/1",
    "/",
    "//",
    "/ip4/999.1.1.1/udp/1/quic-v1",
    "/ip4/127.0.0.1/udp/99999/quic-v1",
    "/dns4/" + "x" * 200 + "/udp/1/quic-v1",
    "/ip4/127.0.0.1/udp/1/quic-v1/p2p/12D3KooWBogus",
)


async def test_no_address_that_others_tell_can_hurt_whoever_dials_it() -> None:
    """A record may hold any text that looks like an address."""
    with trio.fail_after(60):
        async with mesh_of(2) as (one, other):
            peer = KeyPair.generate().peer_id
            with pytest.raises(PeerUnreachableError):
                await one.host.dial(peer, STRANGE_ADDRS)
            one.driver.submit(peer, Learn(STRANGE_ADDRS))
            assert await ask(one, other) == b"ping"
