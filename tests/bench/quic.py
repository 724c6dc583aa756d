"""How fast the QUIC transport is next to py-libp2p's own transports.

    python tests/bench/quic.py [rounds]

Two processes on loopback; every round runs every transport once, so that a busy machine
slows all of them alike.  Prints medians: MB/s up one stream, CPU-ms per MB of each side, and
the time to open a stream and get a byte back (with multistream; "raw" rows without).
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from multiaddr import Multiaddr

from meshnode.transport.quic.config import QuicConfig
from meshnode.transport.quic.libp2p import MuxedConnection, MuxedStream, QuicTransport

ROUNDS_DEFAULT = 3
PIECE = os.urandom(65_536)
ECHO = TProtocol("/bench/echo/1")
SINK = TProtocol("/bench/sink/1")
CONFIG = QuicConfig()
ETHERNET = replace(CONFIG, datagram_bytes_loopback=(1452,))
RUN_S_MAX = 120


@dataclass(frozen=True)
class Transport:
    """One row of the table."""

    host: Callable[[], IHost]
    address: str
    megabytes: int  # per round; the slow one gets less
    opens: int = 100  # streams per round; the 129th ends a connection of the stock transport


def ours(config: QuicConfig) -> IHost:
    key_pair = create_new_key_pair(os.urandom(32))
    return new_host(key_pair=key_pair, transports=[QuicTransport(key_pair, config)])


def stock(*, quic: bool) -> IHost:
    return new_host(key_pair=create_new_key_pair(os.urandom(32)), enable_quic=quic)


UDP, TCP = "/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/127.0.0.1/tcp/0"
TRANSPORTS = {
    "ours, loopback size": Transport(lambda: ours(CONFIG), UDP, 16),
    "ours, 1452 B": Transport(lambda: ours(ETHERNET), UDP, 8),
    "stock QUIC": Transport(lambda: stock(quic=True), UDP, 1, 30),
    "TCP+Noise+Yamux": Transport(lambda: stock(quic=False), TCP, 16),
}


async def sink(stream: INetStream) -> None:
    """8 bytes of length, then that many bytes; answers one byte."""
    left = int.from_bytes(await read_exactly(stream, 8), "big")
    while left:
        left -= len(await stream.read(min(left, 65_536)))
    await stream.write(b".")
    await finish_quietly(stream)


async def echo(stream: INetStream) -> None:
    await stream.write(await stream.read(1))
    await finish_quietly(stream)


async def finish_quietly(stream: INetStream) -> None:
    """Wait for the client's end: the stock transport loses what arrives together with ours."""
    try:
        await stream.read(1)
    except BaseLibp2pError:
        await stream.reset()


async def read_exactly(stream: INetStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))
    return data


async def serve_raw(transport: QuicTransport, nursery: trio.Nursery) -> Multiaddr:
    """Echo one byte per stream without multistream."""

    async def answer(stream: MuxedStream) -> None:
        await stream.write(await stream.read(1))
        await stream.close()

    async def accept(connection: MuxedConnection) -> None:
        try:
            while True:
                nursery.start_soon(answer, await connection.accept_stream())
        except MuxedConnUnavailable:
            return

    transport.set_background_nursery(nursery)
    listener = transport.create_listener(accept)  # type: ignore[arg-type]
    await listener.listen(Multiaddr(UDP))
    return listener.get_addrs()[0]


@asynccontextmanager
async def running(row: Transport) -> AsyncIterator[IHost]:
    host = row.host()
    async with host.run([Multiaddr(row.address)]):
        host.set_stream_handler(ECHO, echo)
        host.set_stream_handler(SINK, sink)
        yield host


async def server() -> None:
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        for name, row in TRANSPORTS.items():
            host = await stack.enter_async_context(running(row))
            print(f"{name}\t{host.get_addrs()[0]}", flush=True)
        raw = await serve_raw(QuicTransport(create_new_key_pair(os.urandom(32))), nursery)
        print(f"raw\t{raw}", flush=True)
        await trio.sleep_forever()


def cpu_s_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def upload_s(host: IHost, address: Multiaddr, megabytes: int) -> float:
    stream = await host.new_stream(info_from_p2p_addr(address).peer_id, [SINK])
    since = time.perf_counter()
    await stream.write((megabytes << 20).to_bytes(8, "big"))
    for _ in range(megabytes * 16):
        await stream.write(PIECE)
    await read_exactly(stream, 1)
    took = time.perf_counter() - since
    await stream.close()
    return took


async def opened_ms(count: int, open_and_echo: Callable[[], Awaitable[None]]) -> list[float]:
    took = []
    for _ in range(count):
        since = time.perf_counter()
        await open_and_echo()
        took.append((time.perf_counter() - since) * 1e3)
    return took


async def client(rounds: int, pid: int, addresses: dict[str, Multiaddr]) -> None:
    speed, own_cpu, far_cpu, opened = (defaultdict[str, list[float]](list) for _ in range(4))
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        hosts = {
            name: await stack.enter_async_context(running(row)) for name, row in TRANSPORTS.items()
        }
        for name, host in hosts.items():
            peer = info_from_p2p_addr(addresses[name])
            await host.get_network().dial_addr(addresses[name], peer.peer_id)
        raw_transport = QuicTransport(create_new_key_pair(os.urandom(32)))
        raw_transport.set_background_nursery(nursery)
        raw = await raw_transport.dial(addresses["raw"])
        assert isinstance(raw, MuxedConnection)

        async def raw_echo() -> None:
            stream = await raw.open_stream()
            await stream.write(b"x")
            await stream.read(1)
            await stream.close()

        for _ in range(rounds):
            opened["ours, raw"] += await opened_ms(100, raw_echo)
            for name, row in TRANSPORTS.items():
                host, address = hosts[name], addresses[name]
                own, far = time.process_time(), cpu_s_of(pid)
                took = await upload_s(host, address, row.megabytes)
                speed[name].append(row.megabytes / took)
                own_cpu[name].append((time.process_time() - own) * 1e3 / row.megabytes)
                far_cpu[name].append((cpu_s_of(pid) - far) * 1e3 / row.megabytes)
                peer_id = info_from_p2p_addr(address).peer_id

                async def echo_once(host: IHost = host, peer_id: object = peer_id) -> None:
                    stream = await host.new_stream(peer_id, [ECHO])  # type: ignore[arg-type]
                    await stream.write(b"x")
                    await read_exactly(stream, 1)
                    await stream.reset()

                opened[name] += await opened_ms(row.opens, echo_once)

        print(f"{'':20} {'MB/s':>7} {'CPU-ms/MB':>17} {'open+byte ms':>15}")
        print(f"{'':20} {'':>7} {'client':>8} {'server':>8} {'p50':>7} {'p99':>7}")
        for name in [*TRANSPORTS, "ours, raw"]:
            times = sorted(opened[name])
            p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
            rates = (
                f"{statistics.median(speed[name]):7.1f} {statistics.median(own_cpu[name]):8.0f} "
                f"{statistics.median(far_cpu[name]):8.0f}"
                if name in speed
                else f"{'':7} {'':8} {'':8}"
            )
            print(f"{name:20} {rates} {p50:7.2f} {p99:7.2f}")
        await raw_transport.close()


def main() -> None:
    if sys.argv[1:] == ["server"]:
        trio.run(server)
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS_DEFAULT
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, libp2p {version('libp2p')}, "
        f"aioquic {version('aioquic')}, {rounds} rounds"
    )
    process = subprocess.Popen(
        [sys.executable, __file__, "server"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().split("\t") for _ in range(len(TRANSPORTS) + 1)]
        addresses = {name: Multiaddr(address.strip()) for name, address in lines}

        async def bounded() -> None:
            with trio.fail_after(RUN_S_MAX):
                await client(rounds, process.pid, addresses)

        trio.run(bounded)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
