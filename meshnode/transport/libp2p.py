"""The libp2p host: who we are on the network, who is connected, streams by protocol id.

py-libp2p does identities, Noise, Yamux, multistream and identify; QUIC is our own (`quic/`).
What py-libp2p 0.8.1 gets wrong is mended here, each with its reason:

* a handler that raises kills the host (py-libp2p #417): every handler runs guarded;
* `connect()` waits 250 ms even on success and tries one address per transport: `dial` goes to
  each address itself;
* inbound slots leak until the node is deaf: the limiter is lifted, our own limit counts peers;
* the auto-connector and pruner dial and hang up on their own: switched off, `Discovery` decides;
* a new stream costs two round trips of multistream-select before the first byte: ours sends the
  protocol id together with the first bytes (the spec allows it) and checks the echo on reading;
  on the listening side `multistream.py` answers in one packet what py-libp2p answers in two.

Members only: a protocol handler is called for peers that the node has admitted (`admit`), and
waits a moment for an admission under way; everybody else gets a reset stream.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import trio
from libp2p import new_host
from libp2p.abc import IMuxedStream, INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.config import ConnectionConfig
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer import muxer_multistream
from libp2p.stream_muxer.exceptions import MuxedConnError, MuxedStreamEOF, MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from meshnode.errors import ConfigError, PeerUnreachableError, RemoteProtocolError
from meshnode.identity import PeerId, public_key_of
from meshnode.transport import Handler, Stream, multistream
from meshnode.transport.addresses import resolved
from meshnode.transport.quic.libp2p import QuicTransport
from meshnode.transport.yamux import WatchedYamux

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 5.0
"""One address; a QUIC handshake over a bad path (300 ms RTT, 10 % loss) takes under 3 s."""
DIAL_STAGGER_S = 0.25
"""Between the starts of two addresses of one peer (RFC 8305, connection attempt delay)."""
ADMISSION_WAIT_S = 5.0
"""A stream may arrive before the handshake of its connection is over; two round trips are due."""
NEGOTIATION_TIMEOUT_S = 5
CONNECTIONS_MAX = 512
"""Members plus strangers knocking; about 64 MiB of QUIC state at the measured 0.12 MiB each."""
RTT_UNKNOWN_S = 0.02
"""Assumed for TCP connections, which do not measure it; a metropolitan round trip."""
END_TIMEOUT_S = 1.0
"""Ending a stream only queues a frame; a peer that does not take even that is left."""
READ_BYTES = 64 * 1024

# It makes its own Yamux, whatever class the options say.
muxer_multistream.Yamux = WatchedYamux  # type: ignore[attr-defined]
STREAM_ERRORS = (StreamError, MuxedStreamError, MuxedConnError, IOException, SwarmException)


@dataclass(slots=True)
class _Peer:
    """A connected peer: the one connection we use, and whether it is a member."""

    connection: INetConn
    admission: trio.Event


@dataclass(frozen=True, slots=True)
class HostEvents:
    """What the host tells its owner. Called synchronously, from the host's tasks."""

    connected: Callable[[PeerId], None]
    disconnected: Callable[[PeerId, str], None]


class Libp2pStream(Stream):
    """A libp2p stream with trio's contract, without the states and locks of `NetStream`."""

    def __init__(
        self, raw: IMuxedStream, owner: INetStream | None, protocol: str, opened: bool
    ) -> None:
        """`opened` by us: the protocol is proposed with the first bytes we send."""
        self._raw = raw
        self._owner = owner
        self._protocol = protocol
        self._peer_id = PeerId(str(raw.muxed_conn.peer_id))
        proposal = multistream.proposal(protocol) if opened else b""
        self._unsent = proposal
        self._unseen = proposal
        self._sent_eof = False
        self._received_eof = False
        self._closed = False

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def protocol(self) -> str:
        return self._protocol

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed:
            raise trio.ClosedResourceError("stream was closed")
        payload = self._unsent + bytes(data)
        self._unsent = b""
        try:
            await self._raw.write(payload)
        except STREAM_ERRORS as error:
            raise trio.BrokenResourceError(f"stream to {self._peer_id} broke: {error}") from error

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._closed:
            raise trio.ClosedResourceError("stream was closed")
        if self._unsent:
            await self.send_all(b"")
        while self._unseen:
            echoed = await self._read(len(self._unseen))
            if not echoed or not self._unseen.startswith(echoed):
                await self.reset()
                raise trio.BrokenResourceError(f"{self._peer_id} does not speak {self._protocol}")
            self._unseen = self._unseen[len(echoed) :]
        return await self._read(max_bytes or READ_BYTES)

    async def send_eof(self) -> None:
        if self._unsent:
            await self.send_all(b"")
        self._sent_eof = True
        try:
            # QUIC's and Yamux's names for the same; Yamux's `close` ends one direction only.
            await getattr(self._raw, "close_write", self._raw.close)()
        except STREAM_ERRORS as error:
            raise trio.BrokenResourceError(f"stream to {self._peer_id} broke: {error}") from error

    async def reset(self) -> None:
        self._closed = True
        await self._end("reset")

    async def aclose(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        await self._end("close" if self._sent_eof and self._received_eof else "reset")

    async def _end(self, how: str) -> None:
        """Shielded: whoever closes because it was cancelled must still reach the peer."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + END_TIMEOUT_S):
            try:
                await getattr(self._owner or self._raw, how)()
            except STREAM_ERRORS as error:
                logger.debug("%s of a broken stream to %s: %s", how, self._peer_id, error)

    async def _read(self, bytes_max: int) -> bytes:
        if self._received_eof:
            await trio.lowlevel.checkpoint()
            return b""
        try:
            data = await self._raw.read(bytes_max)
        except MuxedStreamEOF:
            data = b""
        except STREAM_ERRORS as error:
            raise trio.BrokenResourceError(f"stream to {self._peer_id} broke: {error}") from error
        if not data:
            self._received_eof = True
        return data


class Libp2pHost:
    """One node on the network. `running()` is its life."""

    def __init__(self, seed: bytes, listen: tuple[str, ...], events: HostEvents) -> None:
        """`seed` is the node's Ed25519 seed, `listen` multiaddrs without a peer id."""
        keys = create_new_key_pair(seed)
        self._events = events
        self._listen = tuple(_parse(address) for address in listen)
        self._quic = QuicTransport(keys)
        noise = NoiseTransport(keys, create_new_x25519_key_pair().private_key)
        self.raw = new_host(
            key_pair=keys,
            transports=[self._quic, TCP()],
            # Left alone it would also take "plaintext", in which a peer is who it says it is.
            sec_opt={NOISE_PROTOCOL_ID: noise},
            muxer_opt={TProtocol(YAMUX_PROTOCOL_ID): WatchedYamux},
            negotiate_timeout=NEGOTIATION_TIMEOUT_S,
            connection_config=ConnectionConfig(
                max_connections=CONNECTIONS_MAX,
                min_connections=0,
                low_watermark=0,
                high_watermark=CONNECTIONS_MAX,
                # A simultaneous dial leaves two connections; a third would be a fault.
                max_connections_per_peer=2,
            ),
        )
        network: Any = self.raw.get_network()
        network.set_resource_manager(None)
        network._inbound_limiter.total_tokens = math.inf
        network.auto_connector.maybe_connect = _connect_to_nobody
        network.register_notifee(_Notifee(self))
        network.notify_opened_stream = _tell_nobody
        network.set_stream_handler(self._serve_inbound)
        self._network = network
        self._peers: dict[PeerId, _Peer] = {}
        self.peer_id = PeerId(str(self.raw.get_id()))

    def running(self) -> AbstractAsyncContextManager[None]:
        """Listen and serve until the block is left. Raises `ConfigError` if a port is taken."""
        return _Running(self)

    def addrs(self) -> tuple[str, ...]:
        """What we listen on, as bound (port 0 resolved), without the peer id."""
        listeners = self._network.listeners.values()
        bound = [str(addr) for listener in listeners for addr in listener.get_addrs()]
        return tuple(dict.fromkeys(addr.partition("/p2p/")[0] for addr in bound))

    # --- peers ----------------------------------------------------------------------------------

    def peers(self) -> tuple[PeerId, ...]:
        """Everybody connected, admitted or not."""
        return tuple(self._peers)

    def admit(self, peer: PeerId) -> None:
        """The peer is a member: its streams reach our handlers from now on."""
        if (known := self._peers.get(peer)) is not None:
            known.admission.set()

    def is_admitted(self, peer: PeerId) -> bool:
        known = self._peers.get(peer)
        return known is not None and known.admission.is_set()

    def rtt_s(self, peer: PeerId) -> float | None:
        """Round-trip time of a connected peer; None if it is not connected."""
        known = self._peers.get(peer)
        if known is None:
            return None
        measured: float | None = getattr(known.connection.muxed_conn, "rtt_s", None)
        return measured if measured else RTT_UNKNOWN_S

    async def dial(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        """Connect by whichever address answers first. Raises `PeerUnreachableError`."""
        if peer in self._peers:
            return
        texts: list[str] = []
        with trio.move_on_after(DIAL_TIMEOUT_S):
            for text in addrs:
                texts.extend(await resolved(text))
        usable = [address for text in texts if (address := try_parse(text)) is not None]
        # QUIC first: it is one round trip shorter, and its death is noticed sooner.
        usable.sort(key=lambda address: "quic-v1" not in str(address))
        target = ID.from_string(peer)
        failures: list[str] = []
        async with trio.open_nursery() as nursery:
            for place, address in enumerate(usable):
                nursery.start_soon(
                    self._dial_one, target, address, place, failures, nursery.cancel_scope
                )
        if peer not in self._peers:
            raise PeerUnreachableError(f"no address of {peer} answered: {'; '.join(failures)}")

    async def _dial_one(
        self,
        target: ID,
        address: Multiaddr,
        place: int,
        failures: list[str],
        race: trio.CancelScope,
    ) -> None:
        await trio.sleep(place * DIAL_STAGGER_S)
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                await self._network._dial_addr_single_attempt(address, target)
        except (*STREAM_ERRORS, OSError) as error:
            failures.append(f"{address}: {error.__cause__ or error}")
        except trio.TooSlowError:
            failures.append(f"{address}: no answer in {DIAL_TIMEOUT_S:g} s")
        else:
            race.cancel()

    async def disconnect(self, peer: PeerId) -> None:
        """Close all connections to a peer."""
        await self._network.close_peer(ID.from_string(peer))

    # --- streams --------------------------------------------------------------------------------

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """A new stream to a connected peer. Raises `PeerUnreachableError`.

        Whether the peer speaks `protocol` shows at the first read.
        """
        known = self._peers.get(peer)
        if known is None:
            raise PeerUnreachableError(f"not connected to {peer}")
        try:
            raw = await known.connection.muxed_conn.open_stream()
        except STREAM_ERRORS as error:
            raise PeerUnreachableError(f"the connection to {peer} broke: {error}") from error
        return Libp2pStream(raw, None, protocol, opened=True)

    def handle(self, protocol: str, handler: Handler, *, members_only: bool = True) -> None:
        """Call `handler` with every stream that peers open for `protocol`.

        The stream is closed when the handler returns, and reset when it raises.
        """

        async def serve(net_stream: INetStream) -> None:
            raw = net_stream.muxed_stream  # type: ignore[attr-defined]
            stream = Libp2pStream(raw, net_stream, protocol, opened=False)
            try:
                await handler(stream)
            finally:
                await stream.aclose()

        self.handle_raw(protocol, serve, members_only=members_only)

    def handle_raw(
        self,
        protocol: str,
        handler: Callable[[INetStream], Awaitable[None]],
        *,
        members_only: bool = True,
    ) -> None:
        """As `handle`, for py-libp2p's own services, which want its stream type."""

        async def for_members(net_stream: INetStream) -> None:
            peer = PeerId(str(net_stream.muxed_conn.peer_id))
            # A stream can be here before py-libp2p has told us of its connection; and one of a
            # connection that was given up must not speak for the peer beside its successor.
            if not self._adopt(net_stream.swarm_conn):  # type: ignore[attr-defined]
                await net_stream.reset()
                return
            if members_only and not await self._wait_admitted(peer):
                logger.debug("refused %s to %s: not a member", protocol, peer)
                await net_stream.reset()
                return
            await handler(net_stream)

        self.raw.set_stream_handler(TProtocol(protocol), for_members)

    async def _serve_inbound(self, net_stream: INetStream) -> None:
        """A stream that a peer has opened: agree on its protocol, run the handler, guarded."""
        peer = str(net_stream.muxed_conn.peer_id)
        handlers: Any = self.raw.multiselect.handlers  # type: ignore[attr-defined]
        protocol: str | None = None
        try:
            with trio.move_on_after(NEGOTIATION_TIMEOUT_S):
                raw = net_stream.muxed_stream  # type: ignore[attr-defined]
                protocol = await multistream.answer(raw, handlers)
            if protocol is None:
                await net_stream.reset()
                return
            net_stream.set_protocol(TProtocol(protocol))
            await handlers[protocol](net_stream)
        except (*STREAM_ERRORS, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("stream %s of %s broke: %s", protocol, peer, error)
        except Exception:
            logger.exception("handler of %s failed; the stream of %s is reset", protocol, peer)
            await net_stream.reset()

    async def _wait_admitted(self, peer: PeerId) -> bool:
        known = self._peers.get(peer)
        if known is None:
            return False
        with trio.move_on_after(ADMISSION_WAIT_S):
            await known.admission.wait()
        return known.admission.is_set()

    # --- one connection per peer ----------------------------------------------------------------

    def _adopt(self, connection: INetConn) -> bool:
        """Use a new connection, or close it if the one we have is to be kept.

        Returns whether it is in use. Closing takes a moment and happens in a task of its own:
        py-libp2p runs this inside the task that it cancels when the connection closes.
        """
        peer = PeerId(str(connection.muxed_conn.peer_id))
        known = self._peers.get(peer)
        if known is not None and known.connection is connection:
            return True
        if connection.is_closed:
            return False
        if known is None and len(self._peers) >= CONNECTIONS_MAX:
            self._close_soon(connection)
            return False
        if known is not None:
            if not self._is_better(peer, connection, known.connection):
                self._close_soon(connection)
                return False
            self._drop(peer, "replaced by a new connection")
            self._close_soon(known.connection)
        self._use(peer, connection)
        return True

    def _is_better(self, peer: PeerId, connection: INetConn, current: INetConn) -> bool:
        """Whether a second connection to the peer is the one to keep.

        In the same direction it means that the peer has restarted or changed its address: the
        new one is right. In opposite directions both dialled at once: both ends keep the one
        that the smaller peer id made.
        """
        if current.is_closed or _direction(current) == _direction(connection):
            return True
        made_by_us = _direction(connection) is Direction.OUTBOUND
        return made_by_us == (self.peer_id < peer)

    def _close_soon(self, connection: INetConn) -> None:
        if not self._network._closing:
            self._network.manager.run_task(self._close, connection)

    async def _close(self, connection: INetConn) -> None:
        try:
            await connection.close()
        except STREAM_ERRORS as error:
            logger.debug("closing a connection: %s", error)

    def _use(self, peer: PeerId, connection: INetConn) -> None:
        self._peers[peer] = _Peer(connection, trio.Event())
        self._events.connected(peer)

    def _drop(self, peer: PeerId, reason: str) -> None:
        del self._peers[peer]
        self._events.disconnected(peer, reason)

    def _on_closed(self, connection: INetConn) -> None:
        peer = PeerId(str(connection.muxed_conn.peer_id))
        known = self._peers.get(peer)
        if known is not None and known.connection is connection:
            self._drop(peer, "connection lost")


async def _tell_nobody(stream: INetStream) -> None:
    """Nobody listens for opened streams, but py-libp2p would start a task each to tell them."""


async def _connect_to_nobody() -> None:
    """In place of py-libp2p's auto-connector, which no watermark switches off: below half of
    `high_watermark` it dials whatever addresses strangers have told it of.
    """


def _direction(connection: INetConn) -> Direction:
    return Direction(connection.direction)  # type: ignore[attr-defined]


class _Running:
    """Starts the host and proves that every address is really listened on."""

    def __init__(self, host: Libp2pHost) -> None:
        self._host = host
        self._life = host.raw.run(list(host._listen))

    async def __aenter__(self) -> None:
        await self._life.__aenter__()
        listening = self._host._network.listeners
        missing = [str(addr) for addr in self._host._listen if str(addr) not in listening]
        if missing:
            await self._life.__aexit__(None, None, None)
            raise ConfigError(
                f"cannot listen on {', '.join(missing)}: the port is taken or the address is not "
                "this machine's; choose another with --listen"
            )

    async def __aexit__(self, *exc_info: Any) -> None:
        # Told of an error, py-libp2p's nurseries would wrap it into groups.
        await self._life.__aexit__(None, None, None)


class _Notifee(INotifee):
    """Passes connection changes on; py-libp2p calls these from its own tasks."""

    def __init__(self, host: Libp2pHost) -> None:
        self._host = host

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._host._adopt(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        self._host._on_closed(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None: ...

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None: ...


def _parse(address: str) -> Multiaddr:
    try:
        return Multiaddr(address)
    except (MultiaddrError, ValueError) as error:
        raise ConfigError(
            f"{address!r} is not a multiaddr; for example /ip4/0.0.0.0/udp/9338/quic-v1"
        ) from error


def try_parse(address: str) -> Multiaddr | None:
    """Addresses of others are hearsay: what we cannot read or dial is skipped."""
    try:
        return Multiaddr(address)
    except (MultiaddrError, ValueError):
        return None


def split_peer(address: str) -> tuple[PeerId, str]:
    """`/…/p2p/<id>` to (peer id, address without it). Raises `ConfigError`."""
    _parse(address)
    head, marker, peer = address.rpartition("/p2p/")
    try:
        public_key_of(peer if marker else "")
    except RemoteProtocolError as error:
        raise ConfigError(f"{address!r} must end in /p2p/<peer id>") from error
    return PeerId(peer), head
