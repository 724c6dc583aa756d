"""Whoever has no certificate of this mesh gets refused streams; whoever lies is found out."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from meshnode.credentials import issue_certificate
from meshnode.driver import CONTROL_PROTOCOL, FRAMES_PER_S_MAX
from meshnode.identity import KeyPair, PeerId, seal
from meshnode.messages import (
    MESSAGE_BYTES_MAX,
    Advert,
    GetPeers,
    Hello,
    Message,
    NodeRecord,
    Peers,
    Refused,
    Welcome,
    decode,
    encode,
)
from meshnode.protocol.stack import HELLO_TIMEOUT_S, RecordFound
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame
from meshnode.transport.libp2p import Libp2pHost
from tests.driver.nodes import (
    HTTP_PROTOCOL,
    MESH,
    LiveNode,
    chain_for,
    running,
    stranger,
    until,
)
from tests.protocol.cluster import an_offer

DHT_PROTOCOL = f"/meshnode/{MESH.mesh_id}/kad/1.0.0"
MEMBER_PROTOCOLS = (HTTP_PROTOCOL, DHT_PROTOCOL, "/meshsub/1.2.0", "/meshsub/1.1.0")
OTHER_ROOT = KeyPair.from_seed(b"o" * 32)


def record_of(key: KeyPair, sequence: int = 1, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "mesh": MESH.mesh_id,
        "sequence": sequence,
        "issued_at": int(time.time()),
        "ttl_s": 1800,
        "addrs": (),
        "roles": ("node",),
        "models": (),
    }
    record = NodeRecord(**{**fields, **changes})  # type: ignore[arg-type]
    return seal(key, "meshnode-record", b"/meshnode/node-record/1", encode(record))


def advert_of(key: KeyPair, sequence: int = 1) -> bytes:
    advert = Advert(
        mesh=MESH.mesh_id,
        sequence=sequence,
        ttl_s=150,
        offers=(an_offer(),),
        demand=(),
        memory_bytes=0,
        cores=1,
        accelerator="cpu",
    )
    return seal(key, "meshnode-record", b"/meshnode/advert/1", encode(advert))


def forged(envelope: bytes) -> bytes:
    """With another last byte of the signature."""
    return envelope[:-1] + bytes([envelope[-1] ^ 1])


def hello_of(key: KeyPair, chain: tuple[bytes, ...], mesh: str = MESH.mesh_id) -> Hello:
    return Hello(1, mesh, chain, int(time.time() * 1000))


def welcome_of(key: KeyPair) -> Welcome:
    return Welcome(record_of(key), advert_of(key))


@asynccontextmanager
async def conversation(
    node: LiveNode, key: KeyPair, *said: Message
) -> AsyncIterator[tuple[Libp2pHost, Stream, list[Message]]]:
    """A peer that says what it is told; `heard` is what the node says to it."""
    heard: list[Message] = []

    async def listen(stream: Stream) -> None:
        while (frame := await receive_frame(stream, MESSAGE_BYTES_MAX)) is not None:
            heard.append(decode(frame, Hello | Welcome | Refused | GetPeers | Peers))

    async with stranger(key) as host:
        host.handle(CONTROL_PROTOCOL, listen, members_only=False)
        await host.dial(node.peer_id, node.addrs)
        async with await host.open_stream(node.peer_id, CONTROL_PROTOCOL) as stream:
            for message in said:
                await send_frame(stream, encode(message))
            yield host, stream, heard


async def is_refused(host: Libp2pHost, peer: PeerId, protocol: str) -> bool:
    """Whether a stream ends without a byte of an answer."""
    async with await host.open_stream(peer, protocol) as stream:
        try:
            await stream.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            return await stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True


async def test_a_stranger_gets_nothing_but_refused_streams() -> None:
    with trio.fail_after(30):
        async with running() as node, stranger() as host:
            await host.dial(node.peer_id, node.addrs)
            refused: dict[str, bool] = {}

            async def knock(protocol: str) -> None:
                refused[protocol] = await is_refused(host, node.peer_id, protocol)

            async with trio.open_nursery() as nursery:
                for protocol in MEMBER_PROTOCOLS:
                    nursery.start_soon(knock, protocol)
            assert refused == dict.fromkeys(MEMBER_PROTOCOLS, True)
            await until(lambda: not node.host.peers(), 3.0)  # and soon no connection either


async def test_a_member_gets_through_where_strangers_do_not() -> None:
    """Or the test above would prove nothing."""
    with trio.fail_after(30):
        key = KeyPair.generate()
        async with running() as node:
            said = (hello_of(key, chain_for(key.peer_id)), welcome_of(key))
            async with conversation(node, key, *said) as (host, _, _):
                assert not await is_refused(host, node.peer_id, HTTP_PROTOCOL)


async def test_what_libp2p_itself_answers_to_anybody_names_no_mesh() -> None:
    """identify lists protocol ids to every connected peer."""
    with trio.fail_after(30):
        async with running() as node, stranger() as host:
            await host.dial(node.peer_id, node.addrs)
            async with await host.open_stream(node.peer_id, "/ipfs/id/1.0.0") as stream:
                told = b""
                while chunk := await stream.receive_some():
                    told += chunk
            assert HTTP_PROTOCOL.encode() in told, "this is what identify does"
            assert MESH.name.encode() not in told


@pytest.mark.parametrize(
    ("chain", "mesh", "reason"),
    [
        ((), MESH.mesh_id, "no membership certificate"),
        ("other root", MESH.mesh_id, "does not lead to this mesh's root"),
        ("other peer", MESH.mesh_id, "of another peer"),
        ("expired", MESH.mesh_id, "has expired"),
        ((b"nonsense",), MESH.mesh_id, "invalid"),
        ("valid", "0" * 32, "another mesh"),
    ],
)
async def test_a_hello_without_a_right_is_refused_with_the_reason(
    chain: object, mesh: str, reason: str
) -> None:
    key = KeyPair.generate()
    chains: dict[object, tuple[bytes, ...]] = {
        "other root": chain_for(key.peer_id, root=OTHER_ROOT),
        "other peer": chain_for(KeyPair.generate().peer_id),
        "expired": (
            issue_certificate(
                KeyPair.from_seed(b"r" * 32), MESH, key.peer_id, ("node",), int(time.time()), -3600
            ),
        ),
        "valid": chain_for(key.peer_id),
    }
    proof = chains.get(chain, chain if isinstance(chain, tuple) else ())
    with trio.fail_after(30):
        async with running() as node:
            hello = hello_of(key, proof, mesh)
            async with conversation(node, key, hello, welcome_of(key)) as (_, _, heard):
                await until(lambda: any(isinstance(each, Refused) for each in heard))
                (refusal,) = (each for each in heard if isinstance(each, Refused))
                assert reason in refusal.reason
                await until(lambda: not node.host.peers(), 5.0)
            assert not node.members()
            assert not node.stack.offers(), "what a stranger offers is not heard"
            assert node.stack.records.get(key.peer_id) is None
            assert sum(node.stack.refused.values()) == 1


@asynccontextmanager
async def member(node: LiveNode, key: KeyPair) -> AsyncIterator[tuple[Stream, list[Message]]]:
    """A member with a will of its own."""
    said = (hello_of(key, chain_for(key.peer_id)), welcome_of(key))
    async with conversation(node, key, *said) as (_, stream, heard):
        await until(lambda: key.peer_id in node.members())
        yield stream, heard


async def test_lies_about_others_are_refused_and_counted() -> None:
    victim, absent = KeyPair.generate(), KeyPair.generate()
    honest = record_of(victim, 9)
    lies = {
        "forged": forged(honest),
        "rolled back": record_of(victim, 8),
        "foreign mesh": record_of(absent, mesh="0" * 32),
        "expired": record_of(absent, issued_at=int(time.time()) - 3600, ttl_s=60),
        "malformed": seal(absent, "meshnode-record", b"/meshnode/node-record/1", b"\x80"),
    }
    with trio.fail_after(30):
        async with running() as node, member(node, KeyPair.generate()) as (stream, _):
            await send_frame(stream, encode(Peers((honest, *lies.values()))))
            await until(lambda: sum(node.stack.records.refused.values()) == len(lies))
            assert dict(node.stack.records.refused) == dict.fromkeys(lies, 1)
            known = node.stack.records.get(victim.peer_id)
            assert known is not None
            assert known.record.sequence == 9
            assert node.stack.records.get(absent.peer_id) is None


async def test_the_dht_is_believed_no_more_than_anybody() -> None:
    key = KeyPair.generate()
    with trio.fail_after(30):
        async with running() as node:
            node.driver.submit(key.peer_id, RecordFound(forged(record_of(key))))
            assert node.stack.records.refused["forged"] == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x00\x00\x00\x04\xff\xff\xff\xff",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        (5).to_bytes(4, "big") + b"\x81\xa1t\xa1x",
        random.Random(7).randbytes(4096),
    ],
    ids=["not msgpack", "4 GiB frame", "empty frame", "unknown message", "noise"],
)
async def test_nonsense_is_hung_up_on(nonsense: bytes) -> None:
    with trio.fail_after(30):
        async with running() as node, member(node, key := KeyPair.generate()) as (stream, _):
            await stream.send_all(nonsense)
            await until(lambda: key.peer_id not in node.members(), 5.0)
            await until(lambda: not node.host.peers(), 5.0)


@pytest.mark.parametrize("message", [GetPeers(1), Peers(())], ids=lambda m: type(m).__name__)
async def test_asking_before_the_handshake_is_over_is_hung_up_on(message: Message) -> None:
    with trio.fail_after(30):
        async with running() as node:
            async with conversation(node, KeyPair.generate(), message):
                await until(lambda: not node.host.peers(), 4.0)
            assert not node.events


async def test_a_peer_that_never_says_who_it_is_is_hung_up_on() -> None:
    with trio.fail_after(30):
        async with (
            running() as node,
            conversation(node, KeyPair.generate()),
            conversation(node, (other := KeyPair.generate()), welcome_of(other)),
        ):
            await until(lambda: len(node.host.peers()) == 2)
            await until(lambda: not node.host.peers(), HELLO_TIMEOUT_S + 3.0)
            assert not node.events


async def test_a_flood_is_read_slowly_and_answered_to_nobody_who_does_not_read() -> None:
    """Backpressure: the flooder waits in its own send, and our memory does not grow."""
    with trio.fail_after(60):
        async with running() as node, member(node, KeyPair.generate()) as (stream, _):
            key = KeyPair.generate()
            start = trio.current_time()
            sent = 0
            with trio.move_on_after(1.0):
                for sequence in itertools.count(1):
                    filler = record_of(key, sequence, models=("ab" * 32,) * 32)
                    await send_frame(stream, encode(Peers((filler,) * 64)))
                    sent += 1
            took_s = trio.current_time() - start
            heard = node.stack.records.get(key.peer_id)
            assert heard is not None
            assert heard.record.sequence <= FRAMES_PER_S_MAX * took_s + 5
            assert len(node.members()) == 1


async def test_a_second_control_stream_is_one_too_many() -> None:
    """Or each would have the pace of a whole peer."""
    with trio.fail_after(30):
        async with running() as node:
            key = KeyPair.generate()
            said = (hello_of(key, chain_for(key.peer_id)), welcome_of(key))
            async with conversation(node, key, *said) as (host, _, _):
                await until(lambda: key.peer_id in node.members())
                async with await host.open_stream(node.peer_id, CONTROL_PROTOCOL) as second:
                    await send_frame(second, encode(GetPeers(1)))
                    await until(lambda: not node.host.peers(), 5.0)
