"""Real py-libp2p hosts on our transport, and against py-libp2p's own QUIC."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.ping import PingService
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamEOF, StreamReset
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from meshnode.transport.quic.errors import ConnectionLost
from meshnode.transport.quic.libp2p import MuxedConnection, QuicTransport

HANG_S = 30
ANY_PORT = Multiaddr("/ip4/127.0.0.1/udp/0/quic-v1")
ECHO = TProtocol("/echo/1")
HASH = TProtocol("/hash/1")
BODY_BYTES = 300_000


async def echo(stream: INetStream) -> None:
    try:
        while True:
            await stream.write(await stream.read(65_536))
    except StreamEOF:
        await stream.close()
    except StreamReset:
        pass


async def answer_with_hash(stream: INetStream) -> None:
    """The hash of BODY_BYTES; only the length tells their end, as the stock transport loses
    bytes that arrive together with an end of stream."""
    received = bytearray()
    while len(received) < BODY_BYTES:
        received += await stream.read(65_536)
    await stream.write(hashlib.sha256(received).digest())
    with contextlib.suppress(StreamEOF, StreamReset):
        await stream.read(1)
    await stream.close()


def ours() -> IHost:
    key_pair = create_new_key_pair(os.urandom(32))
    return new_host(key_pair=key_pair, transports=[QuicTransport(key_pair)])


def stock() -> IHost:
    """py-libp2p's own QUIC transport."""
    return new_host(key_pair=create_new_key_pair(os.urandom(32)), enable_quic=True)


@asynccontextmanager
async def running(*hosts: IHost) -> AsyncIterator[None]:
    with trio.fail_after(HANG_S):
        if not hosts:
            yield
            return
        async with hosts[0].run([ANY_PORT]):
            hosts[0].set_stream_handler(ECHO, echo)
            hosts[0].set_stream_handler(HASH, answer_with_hash)
            async with running(*hosts[1:]):
                yield


def muxed(host: IHost, peer: IHost) -> MuxedConnection:
    [connection] = host.get_network().get_connections(peer.get_id())
    assert isinstance(connection.muxed_conn, MuxedConnection)
    return connection.muxed_conn


async def dial(here: IHost, there: IHost) -> None:
    [address] = there.get_addrs()
    await here.get_network().dial_addr(address, there.get_id())


def identified(here: IHost, there: IHost) -> bool:
    """Whether `here` has learned by identify what `there` speaks."""
    try:
        return "/echo/1" in here.get_peerstore().get_protocols(there.get_id())
    except PeerStoreError:
        return False  # not even its name yet


async def test_hosts_negotiate_ping_and_identify() -> None:
    first, second = ours(), ours()
    async with running(first, second):
        await dial(first, second)
        stream = await first.new_stream(second.get_id(), [ECHO])
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"
        await stream.close_write()
        with pytest.raises(StreamEOF):
            await stream.read(1)
        assert len(await PingService(first).ping(second.get_id(), ping_amt=3)) == 3
        while not identified(first, second):
            await trio.sleep(0.01)

        connection = muxed(first, second)
        assert connection.peer_id == second.get_id()
        assert connection.is_initiator
        assert 0 < connection.rtt_s < 1
        assert not connection.is_closed
        [address] = second.get_addrs()
        assert str(address).startswith(f"{connection.remote_multiaddr}/p2p/")
        # The listening port is what the peer sees: observed addresses are useful.
        [own] = first.get_addrs()
        assert str(own).startswith(f"{muxed(second, first).remote_multiaddr}/p2p/")

        await first.disconnect(second.get_id())
        assert isinstance(await connection.wait_closed(), ConnectionLost)
        while second.get_network().connections:
            await trio.sleep(0.01)


async def test_inbound_slots_are_given_back() -> None:
    """Fails if the swarm's handler outlives its connection: it holds a slot for ever."""
    server = ours()
    async with running(server):
        limiter = server.get_network()._inbound_limiter  # type: ignore[attr-defined]
        for _ in range(3):
            client = ours()
            async with client.run([ANY_PORT]):
                await dial(client, server)
                while limiter.borrowed_tokens != 1:
                    await trio.sleep(0.01)
            while limiter.borrowed_tokens:
                await trio.sleep(0.01)


async def test_a_wrong_peer_id_is_refused() -> None:
    first, second = ours(), ours()
    async with running(first, second):
        someone_else = ID.from_pubkey(create_new_key_pair().public_key)
        [address] = second.get_network().listeners.popitem()[1].get_addrs()
        with pytest.raises(SwarmException):
            await first.get_network().dial_addr(address, someone_else)


async def test_reset_is_told_from_end() -> None:
    first, second = ours(), ours()
    async with running(first, second):

        async def reset_after_data(stream: INetStream) -> None:
            await stream.write(await stream.read(1))
            with pytest.raises(StreamEOF):
                await stream.read(1)
            await stream.reset()

        second.set_stream_handler(ECHO, reset_after_data)
        await dial(first, second)
        stream = await first.new_stream(second.get_id(), [ECHO])
        await stream.write(b"x")
        assert await stream.read(1) == b"x"
        await stream.close_write()
        with pytest.raises(StreamReset):
            await stream.read(1)


async def test_a_taken_port_is_an_error() -> None:
    first = ours()
    async with running(first):
        port = first.get_addrs()[0].value_for_protocol("udp")
        transport = QuicTransport(create_new_key_pair())
        async with trio.open_nursery() as nursery:
            transport.set_background_nursery(nursery)

            async def refuse(connection: object) -> None:
                raise AssertionError

            listener = transport.create_listener(refuse)
            with pytest.raises(OSError, match="in use") as caught:
                await listener.listen(Multiaddr(f"/ip4/127.0.0.1/udp/{port}/quic-v1"))
            assert caught.value.errno == errno.EADDRINUSE


async def test_dialing_without_listening_and_unfit_addresses() -> None:
    transport = QuicTransport(create_new_key_pair())
    server = ours()
    async with running(server), trio.open_nursery() as nursery:
        transport.set_background_nursery(nursery)
        connection = await transport.dial(server.get_addrs()[0])
        assert isinstance(connection, MuxedConnection)
        await connection.close()
        for unfit in (
            "/ip4/127.0.0.1/tcp/1",
            "/dns4/localhost/udp/1/quic-v1",
            "/ip4/1.2.3.4/udp/1",
        ):
            with pytest.raises(OpenConnectionError):
                await transport.dial(Multiaddr(unfit))
        await transport.close()


async def test_punching_leaves_from_the_listening_port() -> None:
    key_pair = create_new_key_pair()
    transport = QuicTransport(key_pair)
    host = new_host(key_pair=key_pair, transports=[transport])
    async with running(host):
        target = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
        await target.bind(("127.0.0.1", 0))
        await transport.punch(Multiaddr(f"/ip4/127.0.0.1/udp/{target.getsockname()[1]}/quic-v1"))
        _, sender = await target.recvfrom(1500)
        assert str(sender[1]) == host.get_addrs()[0].value_for_protocol("udp")
        target.close()


@pytest.mark.parametrize(("dialer", "listener"), [(ours, stock), (stock, ours)])
async def test_interoperates_with_the_stock_transport(dialer: object, listener: object) -> None:
    here: IHost = dialer()  # type: ignore[operator]
    there: IHost = listener()  # type: ignore[operator]
    body = random.Random(3).randbytes(BODY_BYTES)
    async with running(there, here):
        await dial(here, there)
        stream = await here.new_stream(there.get_id(), [ECHO])
        for n in range(20):
            await stream.write(b"%05d" % n)
            assert await stream.read(5) == b"%05d" % n
        await stream.close()
        stream = await here.new_stream(there.get_id(), [HASH])
        await stream.write(body)
        digest = b""
        while len(digest) < 32:
            digest += await stream.read(32 - len(digest))
        assert digest == hashlib.sha256(body).digest()
        await stream.close()
        while not identified(here, there):
            await trio.sleep(0.01)
