"""The socket side: deaths, strangers, garbage, ports, stalls."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from quic_pair import CONFIG, Relay, endpoint, identity, pair, read_all

from meshnode.transport.quic.config import QuicConfig
from meshnode.transport.quic.connection import Address, ConnectionCore
from meshnode.transport.quic.endpoint import Endpoint, bind_udp
from meshnode.transport.quic.errors import ConnectionLost
from meshnode.transport.quic.session import Connection, Stream

HANG_S = 30
HERE = Path(__file__).parent


@asynccontextmanager
async def child() -> AsyncIterator[tuple[trio.Process, Address, bytes]]:
    """A real process that echoes; (process, its address, its peer id)."""
    paths = f"{HERE}:{HERE.parents[1]}"
    process = await trio.lowlevel.open_process(
        [sys.executable, str(HERE / "quic_child.py")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(HANG_S):
            line = b""
            while not line.endswith(b"\n"):
                piece = await process.stdout.receive_some()
                assert piece, "the child died early"
                line += piece
        port, peer_id = line.split()
        yield process, ("127.0.0.1", int(port)), bytes.fromhex(peer_id.decode())
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def test_a_killed_process_is_noticed_in_well_under_three_seconds() -> None:
    async with child() as (process, address, peer_id), endpoint() as ours:
        connection = await ours.dial(address, peer_id)
        stream = await connection.open_stream()
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"
        killed_at = trio.current_time()
        process.send_signal(signal.SIGKILL)
        with trio.fail_after(HANG_S):
            with pytest.raises(ConnectionLost):
                await stream.read(1)
            lost = await connection.wait_closed()
        assert lost.by_remote
        assert trio.current_time() - killed_at < 3.0
        with pytest.raises(ConnectionLost):
            await stream.write(b"x")
        assert ours.statistics().connections == 0


async def test_a_killed_process_is_noticed_at_once_by_a_writer() -> None:
    """The kernel's "port unreachable" shortens the wait."""
    async with child() as (process, address, peer_id), endpoint() as ours:
        connection = await ours.dial(address, peer_id)
        stream = await connection.open_stream()
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"
        process.kill()
        await process.wait()
        died_at = trio.current_time()

        async def write_until_told() -> None:
            while True:
                await stream.write(b"x")
                await trio.sleep(0.01)

        with trio.fail_after(HANG_S), pytest.raises(ConnectionLost):
            await write_until_told()
        assert trio.current_time() - died_at < 1.5


async def test_a_silent_path_is_noticed_within_three_seconds() -> None:
    relays: list[Relay] = []

    def via(address: Address) -> Relay:
        relays.append(Relay(address))
        return relays[0]

    async with pair(via=via) as ends:
        near, far = await ends.stream()
        relays[0].is_silent = True
        since = trio.current_time()
        with trio.fail_after(HANG_S):
            for stream in (near, far):
                with pytest.raises(ConnectionLost):
                    await stream.read(1)
        assert trio.current_time() - since < 3.2


async def test_an_idle_connection_stays() -> None:
    quick = replace(CONFIG, keepalive_s=0.05, silence_s_max=0.4)
    async with pair(quick) as ends:
        near, far = await ends.stream()
        await trio.sleep(1.0)  # more than two silences
        await near.write(b"still here")
        with trio.fail_after(HANG_S):
            assert await far.read(100) == b"still here"


async def test_our_own_stall_kills_no_connection_whose_packets_wait() -> None:
    """Fails if timers run before the socket is drained."""
    hasty = replace(CONFIG, keepalive_s=0.1, silence_s_max=0.6)
    async with child() as (_, address, peer_id), endpoint(hasty) as ours:
        connection = await ours.dial(address, peer_id)
        stream = await connection.open_stream()
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"
        before = ours.statistics().datagrams_received
        time.sleep(1.5)  # noqa: ASYNC251  the child pings meanwhile; nothing of ours runs
        with trio.fail_after(HANG_S):
            while ours.statistics().datagrams_received == before:
                await trio.sleep(0.001)
            assert not connection.is_closed
            await stream.write(b"again")
            assert await stream.read(5) == b"again"


async def test_dialing_a_closed_port_fails_fast() -> None:
    async with endpoint() as ours:
        unused = bind_udp("127.0.0.1", 0, CONFIG)
        address = unused.getsockname()
        unused.close()
        since = trio.current_time()
        with trio.fail_after(HANG_S), pytest.raises(ConnectionLost):
            await ours.dial(address, None)
        assert trio.current_time() - since < 2.0
        assert ours.statistics().connections == 0


async def test_cancelled_dial_leaves_nothing() -> None:
    silent = bind_udp("127.0.0.1", 0, CONFIG)
    async with endpoint() as ours:
        with trio.move_on_after(0.05) as scope:
            await ours.dial(silent.getsockname(), None)
        assert scope.cancelled_caught
        assert ours.statistics().connections == 0
    silent.close()


async def test_a_taken_port_says_so() -> None:
    async with endpoint() as first:
        with pytest.raises(OSError, match="in use") as caught:
            bind_udp("127.0.0.1", first.address[1], CONFIG)
        assert caught.value.errno == errno.EADDRINUSE


async def test_dials_leave_from_the_listening_port() -> None:
    async with pair() as ends:
        assert ends.accepted.remote[1] == ends.dialer.address[1]
        assert ends.dialed.remote[1] == ends.listener.address[1]


async def test_both_sides_may_dial_at_once() -> None:
    async with endpoint() as first, endpoint() as second:

        async def accept(connection: Connection) -> None:
            await connection.wait_closed()

        first.accept_with(accept)
        second.accept_with(accept)
        made: list[Connection] = []

        async def dial(here: object, there: object) -> None:
            made.append(await here.dial(there.address, there.peer_id))  # type: ignore[attr-defined]

        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(dial, first, second)
                nursery.start_soon(dial, second, first)
        assert len(made) == 2
        assert not any(connection.is_closed for connection in made)


def hostile_datagrams(rng: random.Random, first_packet: bytes) -> list[bytes]:
    """Noise of up to 10,000 bytes, noise behind valid headers, and bent real packets."""
    noise = [rng.randbytes(rng.randrange(0, 10_000)) for _ in range(150)]
    headed = [b"\xc3\0\0\0\1\x08" + rng.randbytes(1300) for _ in range(100)]
    bent = []
    for _ in range(150):
        packet = bytearray(first_packet)
        for _ in range(rng.randrange(1, 20)):
            packet[rng.randrange(len(packet))] = rng.randrange(256)
        bent.append(bytes(packet[: rng.randrange(1, len(packet) + 1)]))
    return noise + headed + bent


async def test_garbage_is_survived_and_leaves_nothing_behind() -> None:
    config = replace(CONFIG, handshake_s_max=0.5)
    first_packet = ConnectionCore.dial(
        identity(), CONFIG, ("127.0.0.1", 1), is_loopback=True, expected_peer_id=None, now=0.0
    ).datagrams_to_send(0.0)[0][0]
    async with pair(listener_config=config) as ends:
        near, far = await ends.stream()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
            for datagram in hostile_datagrams(random.Random(5), first_packet):
                attacker.sendto(datagram, ends.listener.address)
                await trio.lowlevel.checkpoint()
        with trio.fail_after(HANG_S):
            await near.write(b"still fine")
            assert await far.read(100) == b"still fine"
            while ends.listener.statistics().half_open:
                await trio.sleep(0.01)
            again = await ends.dialer.dial(ends.listener.address, ends.listener.peer_id)
            again.close()


async def test_packets_for_a_previous_process_get_no_answer() -> None:
    async with endpoint() as ours:

        async def accept(connection: Connection) -> None:
            raise AssertionError("nobody dialed")

        ours.accept_with(accept)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as old_peer:
            for size in (21, 100, 1200):
                old_peer.sendto(b"\x40" + os.urandom(size), ours.address)
            with trio.fail_after(HANG_S):
                while ours.statistics().datagrams_received < 3:
                    await trio.sleep(0.001)
        assert ours.statistics().datagrams_sent == 0
        assert ours.statistics().connections == 0


async def test_half_open_handshakes_per_source_are_bounded() -> None:
    config = replace(CONFIG, half_open_per_source_max=5, handshake_s_max=0.5)
    async with pair(listener_config=config) as ends:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            for _ in range(50):
                core = ConnectionCore.dial(
                    identity(),
                    CONFIG,
                    ends.listener.address,
                    is_loopback=True,
                    expected_peer_id=None,
                    now=0.0,
                )
                for data, address in core.datagrams_to_send(0.0):
                    flood.sendto(data, address)
            with trio.fail_after(HANG_S):
                while ends.listener.statistics().datagrams_refused < 45:
                    await trio.sleep(0.001)
                assert ends.listener.statistics().half_open == 5
                while ends.listener.statistics().half_open:
                    await trio.sleep(0.01)
                again = await ends.dialer.dial(ends.listener.address, ends.listener.peer_id)
                assert not again.is_closed


async def test_connections_are_bounded_and_freed() -> None:
    config = replace(CONFIG, connections_max=3)
    async with pair(listener_config=config) as ends:
        hasty = replace(CONFIG, handshake_s_max=0.3)
        async with endpoint(hasty) as other:
            with trio.fail_after(HANG_S):
                more = [await other.dial(ends.listener.address, None) for _ in range(2)]
                with pytest.raises(ConnectionLost):
                    await other.dial(ends.listener.address, None)
                more[0].close()
                while ends.listener.statistics().connections == 3:
                    await trio.sleep(0.001)
                assert not (await other.dial(ends.listener.address, None)).is_closed


async def test_a_failing_handler_ends_its_connection_only() -> None:
    async with endpoint() as first, endpoint() as second:
        count = 0

        async def accept(connection: Connection) -> None:
            nonlocal count
            count += 1
            if count == 1:
                raise RuntimeError("a bug in a handler")
            await connection.wait_closed()

        second.accept_with(accept)
        with trio.fail_after(HANG_S):
            unlucky = await first.dial(second.address, None)
            await unlucky.wait_closed()
            lucky = await first.dial(second.address, None)
            stream = await lucky.open_stream()
            await stream.write(b"x")
            assert not lucky.is_closed


class ReluctantSocket(socket.socket):
    """A real UDP socket that refuses every third send, or all segmented ones."""

    refusal: OSError = BlockingIOError(errno.EAGAIN, "not now")
    sends = 0
    segmented = 0

    def sendmsg(self, *arguments: object) -> int:  # type: ignore[override]
        self.segmented += 1
        if self.refusal.errno == errno.EINVAL:
            raise self.refusal
        self._refuse_some()
        return super().sendmsg(*arguments)  # type: ignore[arg-type]

    def sendto(self, *arguments: object) -> int:  # type: ignore[override]
        self._refuse_some()
        return super().sendto(*arguments)  # type: ignore[call-overload,no-any-return]

    def _refuse_some(self) -> None:
        self.sends += 1
        if self.sends % 3 == 0 and self.refusal.errno == errno.EAGAIN:
            raise self.refusal


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINVAL])
async def test_a_full_socket_buffer_or_no_segmentation_loses_nothing(code: int) -> None:
    body = os.urandom(1_000_000)
    bound = bind_udp("127.0.0.1", 0, CONFIG)
    reluctant = ReluctantSocket(bound.family, bound.type, fileno=bound.detach())
    reluctant.setblocking(False)
    reluctant.refusal = OSError(code, "refused")
    assert isinstance(reluctant.refusal, BlockingIOError) == (code == errno.EAGAIN)
    received: list[bytes] = []
    done = trio.Event()

    async def accept(connection: Connection) -> None:
        received.append(await read_all(await connection.accept_stream()))
        done.set()

    with trio.fail_after(HANG_S):
        async with endpoint() as listener, trio.open_nursery() as nursery:
            listener.accept_with(accept)
            sender = Endpoint(reluctant, identity(), CONFIG)
            await nursery.start(sender.run)
            stream = await (await sender.dial(listener.address, None)).open_stream()
            await stream.write(body)
            stream.finish()
            await done.wait()
            await sender.close()
    assert received == [body]
    assert reluctant.segmented == 1 if code == errno.EINVAL else reluctant.segmented > 1


async def test_ipv6() -> None:
    config = QuicConfig()
    received: list[bytes] = []
    done = trio.Event()

    async def accept(connection: Connection) -> None:
        stream: Stream = await connection.accept_stream()
        received.append(await read_all(stream))
        done.set()
        await connection.wait_closed()

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            ends = [Endpoint(bind_udp("::1", 0, config), identity(), config) for _ in range(2)]
            for each in ends:
                await nursery.start(each.run)
            ends[1].accept_with(accept)
            connection = await ends[0].dial(ends[1].address, ends[1].peer_id)
            stream = await connection.open_stream()
            await stream.write(bytes(100_000))
            stream.finish()
            await done.wait()
            assert received == [bytes(100_000)]
            nursery.cancel_scope.cancel()
