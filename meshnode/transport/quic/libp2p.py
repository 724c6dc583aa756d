"""The QUIC transport behind py-libp2p's interfaces.

Decides: how multiaddrs, py-libp2p's exceptions and its swarm map to our endpoint.
Does not know: packets, timers, windows.

    transport = QuicTransport(key_pair)
    host = libp2p.new_host(key_pair=key_pair, transports=[transport])
    async with host.run([Multiaddr("/ip4/0.0.0.0/udp/4001/quic-v1")]):
        ...

The swarm hands us its background nursery, in which every endpoint runs.  It skips its
security and muxer upgrade for connections that are an `IMuxedConn` already, and it cancels
nothing itself: the handler of an inbound connection would hold one of the swarm's inbound
slots for the swarm's lifetime, were it not cancelled here when the connection ends.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any, cast

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.abc import IListener, IMuxedConn, IMuxedStream, IRawConnection, ITransport
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair, KeyType
from libp2p.custom_types import THandler
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr
from multiaddr.exceptions import ProtocolLookupError

from meshnode.transport.quic.config import QuicConfig
from meshnode.transport.quic.connection import Address
from meshnode.transport.quic.endpoint import Endpoint, bind_udp
from meshnode.transport.quic.errors import (
    ConnectionLost,
    StreamClosed,
    StreamLimitReached,
    StreamReset,
)
from meshnode.transport.quic.session import Connection, Stream
from meshnode.transport.quic.tls import TlsIdentity, tls_identity

# `read()` without a size returns what is buffered, at most one window.
READ_BYTES_DEFAULT = 1024 * 1024


class QuicTransport(ITransport):
    """`/ip4|ip6/…/udp/…/quic-v1`, listening and dialing on the same sockets.

    Args:
        host_key: the host's Ed25519 key, as py-libp2p's KeyPair or as a plain private key.
        config: limits and waits.

    Raises:
        ValueError: the key pair is not Ed25519.
    """

    provides_native_muxing = True

    def __init__(
        self, host_key: KeyPair | Ed25519PrivateKey, config: QuicConfig | None = None
    ) -> None:
        if isinstance(host_key, KeyPair):
            if host_key.private_key.get_type() != KeyType.Ed25519:
                raise ValueError("meshnode hosts have Ed25519 keys")
            host_key = Ed25519PrivateKey.from_private_bytes(host_key.private_key.to_bytes()[:32])
        self.config = config or QuicConfig()
        self.identity: TlsIdentity = tls_identity(host_key, datetime.datetime.now(datetime.UTC))
        self._nursery: trio.Nursery | None = None
        self._endpoints: list[Endpoint] = []
        self._opening = trio.Lock()

    @property
    def peer_id(self) -> ID:
        return ID(self.identity.peer_id)

    def set_background_nursery(self, nursery: trio.Nursery) -> None:
        """Called by the swarm (or by whoever owns the transport) before anything else."""
        self._nursery = nursery

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect; a `/p2p/…` part is the only peer id accepted.

        The result is a `MuxedConnection`, whatever the interface's annotation says.

        Raises:
            OpenConnectionError: not one of our addresses, nobody answered, or the wrong peer.
        """
        if not self.can_dial(maddr):
            raise OpenConnectionError(f"not a QUIC v1 address: {maddr}")
        remote = _socket_address(maddr)
        expected = maddr.get_peer_id()
        try:
            endpoint = await self._endpoint_for(remote)
            connection = await endpoint.dial(
                remote, ID.from_string(expected).to_bytes() if expected else None
            )
        except (ConnectionLost, OSError) as error:
            raise OpenConnectionError(f"cannot dial {maddr}: {error}") from error
        return cast(IRawConnection, MuxedConnection(connection))

    async def punch(self, maddr: Multiaddr) -> None:
        """Open our NAT towards `maddr`: send one meaningless datagram from our listening port."""
        remote = _socket_address(maddr)
        (await self._endpoint_for(remote)).punch(remote)

    def create_listener(self, handler_function: THandler) -> IListener:
        return QuicListener(self, handler_function)

    def can_dial(self, maddr: Multiaddr) -> bool:
        names = [protocol.name for protocol in maddr.protocols()]
        return names[:3] in (["ip4", "udp", "quic-v1"], ["ip6", "udp", "quic-v1"]) and (
            names[3:] in ([], ["p2p"])
        )

    def can_listen(self, maddr: Multiaddr) -> bool:
        return self.can_dial(maddr)

    def protocols(self) -> list[str]:
        return ["quic-v1"]

    async def close(self) -> None:
        """Close every socket; every peer is told."""
        for endpoint in self._endpoints[:]:
            await endpoint.close()
            self._endpoints.remove(endpoint)

    async def open_endpoint(self, host: str, port: int) -> Endpoint:
        """Bind a socket and serve it in the background nursery.

        Raises:
            OSError: the address is taken or not ours.
        """
        if self._nursery is None:
            raise OpenConnectionError("the transport has no background nursery yet")
        endpoint = Endpoint(bind_udp(host, port, self.config), self.identity, self.config)
        await self._nursery.start(endpoint.run)
        self._endpoints.append(endpoint)
        return endpoint

    async def close_endpoint(self, endpoint: Endpoint) -> None:
        await endpoint.close()
        if endpoint in self._endpoints:
            self._endpoints.remove(endpoint)

    async def _endpoint_for(self, remote: Address) -> Endpoint:
        """A socket that can reach `remote`: a listening one if possible, so that peers and
        NATs see our listening port."""
        is_ip6 = ":" in remote[0]
        async with self._opening:
            for endpoint in self._endpoints:
                if endpoint.can_reach(remote):
                    return endpoint
            return await self.open_endpoint("::" if is_ip6 else "0.0.0.0", 0)


class QuicListener(IListener):
    """One listening socket."""

    def __init__(self, transport: QuicTransport, handler: THandler) -> None:
        self._transport = transport
        self._handler = handler
        self._endpoint: Endpoint | None = None

    async def listen(self, maddr: Multiaddr) -> None:
        """Bind and accept.

        Raises:
            OpenConnectionError: not one of our addresses, or no nursery yet.
            OSError: EADDRINUSE if the port is taken.
        """
        if not self._transport.can_listen(maddr):
            raise OpenConnectionError(f"cannot listen on {maddr}")
        host, port = _socket_address(maddr)[:2]
        endpoint = self._endpoint = await self._transport.open_endpoint(host, port)
        endpoint.accept_with(self._accept)

    async def _accept(self, connection: Connection) -> None:
        await self._handler(cast(Any, MuxedConnection(connection)))

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return (_multiaddr(self._endpoint.address),) if self._endpoint is not None else ()

    async def close(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            await self._transport.close_endpoint(endpoint)


class MuxedConnection(IMuxedConn):
    """An authenticated QUIC connection as py-libp2p's muxer."""

    negotiated_security_protocol = "/tls/1.0.0"

    def __init__(self, connection: Connection) -> None:
        assert connection.core.peer_id is not None
        self.connection = connection
        self.peer_id = ID(connection.core.peer_id)
        self.event_started = trio.Event()

    @property
    def remote_multiaddr(self) -> Multiaddr:
        """Where the peer is now, without its id; this is what it looks like from here."""
        return _multiaddr(self.connection.remote)

    @property
    def rtt_s(self) -> float:
        """The least of the latest round-trip times, in seconds."""
        return self.connection.core.rtt_s

    @property
    def is_initiator(self) -> bool:
        return self.connection.core.is_client

    @property
    def is_established(self) -> bool:
        return self.connection.core.is_established

    @property
    def is_closed(self) -> bool:
        return self.connection.is_closed

    async def wait_closed(self) -> ConnectionLost:
        """Return why the connection ended, once it has."""
        return await self.connection.wait_closed()

    async def start(self) -> None:
        self.event_started.set()
        await trio.lowlevel.checkpoint()

    async def open_stream(self) -> MuxedStream:
        try:
            return MuxedStream(self, await self.connection.open_stream())
        except (ConnectionLost, StreamLimitReached) as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def accept_stream(self) -> MuxedStream:
        try:
            return MuxedStream(self, await self.connection.accept_stream())
        except ConnectionLost as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def close(self) -> None:
        self.connection.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def get_remote_address(self) -> tuple[str, int]:
        host, port = self.connection.remote[:2]
        return host, port

    def get_transport_addresses(self) -> list[Multiaddr]:
        return [self.remote_multiaddr]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class MuxedStream(IMuxedStream):
    """A QUIC stream with py-libp2p's method names and exceptions."""

    def __init__(self, muxed_conn: MuxedConnection, stream: Stream) -> None:
        self.muxed_conn = muxed_conn
        self.stream = stream

    @property
    def stream_id(self) -> int:
        return self.stream.stream_id

    @property
    def unread_bytes(self) -> int:
        """What a read would return without waiting."""
        return self.stream.core.buffered_bytes

    async def read(self, n: int | None = None) -> bytes:
        """1 to `n` bytes (None or -1: whatever has arrived).

        Raises:
            MuxedStreamEOF: the peer finished and everything has been read.
            MuxedStreamReset: reset by the peer, closed here, or the connection ended.
        """
        if n == 0:
            return b""
        try:
            data = await self.stream.read(READ_BYTES_DEFAULT if n is None or n < 0 else n)
        except (StreamReset, StreamClosed, ConnectionLost) as error:
            raise MuxedStreamReset(str(error)) from error
        if not data:
            raise MuxedStreamEOF("the peer finished the stream")
        return data

    async def write(self, data: bytes) -> None:
        """Queue all of `data`, waiting while too much is unacknowledged.

        Raises:
            MuxedStreamReset: the peer stopped reading, or the connection ended.
            MuxedStreamClosed: we finished, closed or reset the stream.
        """
        try:
            await self.stream.write(data)
        except (StreamReset, ConnectionLost) as error:
            raise MuxedStreamReset(str(error)) from error
        except StreamClosed as error:
            raise MuxedStreamClosed(str(error)) from error

    async def close_write(self) -> None:
        self.stream.finish()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        self.stream.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def reset(self) -> None:
        self.stream.reset()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def is_closed(self) -> bool:
        return self.stream.core.is_over

    def set_deadline(self, ttl: int) -> None:
        """Not offered: time limits are Trio's cancel scopes."""
        raise NotImplementedError("use trio.fail_after")

    def get_remote_address(self) -> tuple[str, int]:
        return cast(MuxedConnection, self.muxed_conn).get_remote_address()

    async def __aenter__(self) -> MuxedStream:
        return self


def _socket_address(maddr: Multiaddr) -> Address:
    """The (host, port) of our kind of multiaddr, as the kernel writes it."""
    try:
        host: Any = maddr.value_for_protocol("ip4")
        family = socket.AF_INET
    except ProtocolLookupError:
        host = maddr.value_for_protocol("ip6")
        family = socket.AF_INET6
    port = int(maddr.value_for_protocol("udp") or 0)
    # Numeric, hence no blocking look-up; IPv6 addresses become the 4-tuples recvfrom gives.
    [(*_, address)] = socket.getaddrinfo(
        host, port, family, socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
    )
    return address


def _multiaddr(address: Address) -> Multiaddr:
    host, port = address[:2]
    kind = "ip6" if ":" in host else "ip4"
    return Multiaddr(f"/{kind}/{host}/udp/{port}/quic-v1")
