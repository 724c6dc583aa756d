"""Two endpoints on loopback, and a UDP relay in between that loses or delays datagrams.

Everything is real: sockets, TLS, certificates.  Only the relay is made up.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.transport.quic.config import QuicConfig
from meshnode.transport.quic.connection import Address
from meshnode.transport.quic.endpoint import Endpoint, bind_udp
from meshnode.transport.quic.session import Connection, Stream
from meshnode.transport.quic.tls import TlsIdentity, tls_identity

CONFIG = QuicConfig()


def identity() -> TlsIdentity:
    return tls_identity(Ed25519PrivateKey.generate(), datetime.datetime.now(datetime.UTC))


@dataclass
class Pair:
    """A connection between two endpoints of this process, seen from both ends."""

    dialer: Endpoint
    listener: Endpoint
    dialed: Connection
    accepted: Connection

    async def stream(self) -> tuple[Stream, Stream]:
        """A new stream's two ends; one byte has already gone from the first to the second."""
        near = await self.dialed.open_stream()
        await near.write(b"!")
        far = await self.accepted.accept_stream()
        assert await far.read(1) == b"!"
        return near, far


@asynccontextmanager
async def endpoint(config: QuicConfig = CONFIG, port: int = 0) -> AsyncIterator[Endpoint]:
    async with trio.open_nursery() as nursery:
        served = Endpoint(bind_udp("127.0.0.1", port, config), identity(), config)
        await nursery.start(served.run)
        try:
            yield served
        finally:
            await served.close()


@asynccontextmanager
async def pair(
    config: QuicConfig = CONFIG,
    listener_config: QuicConfig | None = None,
    via: Callable[[Address], Relay] | None = None,
) -> AsyncIterator[Pair]:
    """A connected pair; with `via` the dialer talks to the relay made for the listener."""
    accepted: list[Connection] = []
    arrived = trio.Event()

    async def accept(connection: Connection) -> None:
        accepted.append(connection)
        arrived.set()
        await connection.wait_closed()

    async with (
        endpoint(config) as dialer,
        endpoint(listener_config or config) as listener,
        trio.open_nursery() as nursery,
    ):
        listener.accept_with(accept)
        address = listener.address
        if via is not None:
            relay = via(address)
            nursery.start_soon(relay.run)
            address = relay.address
        with trio.fail_after(20):
            dialed = await dialer.dial(address, listener.peer_id)
            await arrived.wait()
        yield Pair(dialer, listener, dialed, accepted[0])
        nursery.cancel_scope.cancel()


class Relay:
    """Forwards datagrams between one dialer and a listener; loses some; can go silent."""

    def __init__(self, target: Address, *, loss: float = 0.0, seed: int = 1) -> None:
        self._target = target
        self._loss = loss
        self._random = random.Random(seed)
        self._dialer: Address | None = None
        self.is_silent = False
        self.largest_bytes = 65_536  # datagrams above are dropped, like a path's MTU would
        self._bound = bind_udp("127.0.0.1", 0, CONFIG)
        self._socket = trio.socket.from_stdlib_socket(self._bound)

    @property
    def address(self) -> Address:
        address: Address = self._bound.getsockname()
        return address

    async def run(self) -> None:
        while True:
            data, sender = await self._socket.recvfrom(65_536)
            if sender == self._target:
                destination = self._dialer
            else:
                self._dialer, destination = sender, self._target
            lost = self._random.random() < self._loss or len(data) > self.largest_bytes
            if destination is not None and not lost and not self.is_silent:
                await self._socket.sendto(data, destination)


async def read_all(stream: Stream, piece_bytes: int = 65_536) -> bytes:
    """Everything up to the end of the stream."""
    received = bytearray()
    while piece := await stream.read(piece_bytes):
        received += piece
    return bytes(received)


def small_windows() -> QuicConfig:
    """Windows small enough that tests fill them quickly."""
    return replace(
        CONFIG,
        stream_window_bytes=64 * 1024,
        connection_window_bytes=512 * 1024,
        stream_send_bytes_max=64 * 1024,
    )
