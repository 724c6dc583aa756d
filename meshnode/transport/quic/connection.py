"""One QUIC connection as a value: datagrams and times in, datagrams and stream bytes out.

Decides: everything about a connection that needs no socket and no clock: TLS and the peer's
identity, streams and their windows, liveness, datagram size.  Does not know: Trio, sockets,
libp2p.  The caller passes `now` (seconds on one monotonic clock) wherever time matters.

This is the only module that imports aioquic; `_Engine` holds every place where we reach
into it.  The traps each of these covers are listed in the package docstring.
"""

from __future__ import annotations

import datetime
import logging
import math
import ssl
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aioquic._buffer import Buffer
from aioquic.quic import events
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.congestion.base import register_congestion_control
from aioquic.quic.connection import (
    END_STATES,
    MAX_STREAM_DATA_FRAME_CAPACITY,
    Limit,
    QuicConnection,
    QuicConnectionState,
    QuicNetworkPath,
    QuicReceiveContext,
)
from aioquic.quic.packet import (
    QuicFrameType,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketRecovery, QuicPacketSpace
from aioquic.quic.stream import QuicStream
from aioquic.tls import Epoch

from meshnode.transport.quic.config import QuicConfig
from meshnode.transport.quic.congestion import BurstPacer, RenoWindow
from meshnode.transport.quic.errors import (
    BadCertificate,
    ConnectionLost,
    StreamClosed,
    StreamReset,
)
from meshnode.transport.quic.tls import TlsIdentity, verified_peer_id

logger = logging.getLogger(__name__)

Address = tuple[Any, ...]  # what recvfrom gave: (host, port) or (host, port, flow, scope)
Datagram = tuple[bytes, Address]

ALPN = "libp2p"
CONNECTION_ID_BYTES = 8
# Datagrams every path carries (RFC 9000 section 14); also the least an Initial may have.
DATAGRAM_BYTES_MIN = SMALLEST_MAX_DATAGRAM_SIZE
# A probe size is given up after this many losses: one may be chance (RFC 8899 section 5.1.2).
PROBES_PER_SIZE = 3
# Probe timeouts in a row after which a larger datagram size is taken for a black hole
# (RFC 8899 section 4.3).
BLACK_HOLE_PTOS = 3
# Our own liveness rule acts long before; this is what we announce to peers as a backstop.
IDLE_TIMEOUT_S = 30.0
# RFC 9002 section 6.2.2 says 333 ms; volunteers' paths are mostly shorter, and a first
# retransmission after 200 ms costs one packet.
INITIAL_RTT_S = 0.1
# How long a lone packet waits for company before it is acknowledged.  We announce 25 ms
# (RFC 9000 section 18.2, the default); the rest is what a busy process may be late.  It
# exceeds the gap between the tokens of a quick model, so that two share an acknowledgement.
ACK_DELAY_S = 0.02
# The second packet is acknowledged this much later, not at once: its reader goes first.
ACK_SOON_S = 0.001
# Packets that ask for an acknowledgement before one is sent (RFC 9000 section 13.2.2).
PACKETS_PER_ACK = 2
# The timer granularity of RFC 9002 section 6.1.2: how late a Python process that shares its
# CPUs with inference may be without its packets being taken for lost.
GRANULARITY_S = 0.01
# The engine subtracts a wait only from what is longer than the sum of it and the least.
RTT_EPSILON_S = 0.000_001
# Round trips that `rtt_s` looks back on; an idle connection makes one per `keepalive_s`.
RTT_SAMPLES = 8
# Packets under one key: AES-GCM allows 2^23 (RFC 9001 section 6.6), the engine counts none.
KEY_PACKETS_MAX = 2**22
# aioquic may name a time in the past; never spin faster than this.
TIMER_STEP_S = 0.000_2

CODE_CLOSED = 0  # libp2p has no code registry for plain closes
CODE_BAD_CERTIFICATE = 0x100 + 42  # CRYPTO_ERROR + TLS alert bad_certificate
CODE_TOO_MANY_STREAMS = 0x0A  # PROTOCOL_VIOLATION

register_congestion_control("meshnode", RenoWindow)  # type: ignore[arg-type]


class StreamCore:
    """The two halves of one stream: bytes received and not taken, bytes given and not acked.

    The caller sets `wake_reader` / `wake_writer` while it waits for a change.
    """

    __slots__ = (
        "_buffer", "_connection", "_credited", "_engine_stream", "_finished", "_reset_code",
        "_stopped_code", "reading_ended", "wake_reader", "wake_writer",
        "writing_ended",
    )  # fmt: skip

    def __init__(self, connection: ConnectionCore, engine_stream: QuicStream) -> None:
        self._connection = connection
        self._engine_stream = engine_stream
        self._buffer = bytearray()
        self._credited = 0  # bytes the peer was (or need not be) granted again
        self._finished = False  # the peer's FIN has arrived, after the data in the buffer
        self._reset_code: int | None = None  # the peer abandoned its sending side
        self._stopped_code: int | None = None  # the peer will not read any more
        self.writing_ended = False  # we finished or reset our sending side
        self.reading_ended = False  # we do not want any more
        self.wake_reader: Callable[[], None] | None = None
        self.wake_writer: Callable[[], None] | None = None

    @property
    def stream_id(self) -> int:
        stream_id = self._engine_stream.stream_id
        assert stream_id is not None
        return stream_id

    # --- receiving ------------------------------------------------------------------------

    def take(self, bytes_max: int) -> bytes | None:
        """Up to `bytes_max` received bytes; b"" at the end of the stream, None if none yet.

        Raises:
            StreamReset: the peer abandoned the stream; what it sent is dropped.
            StreamClosed: we closed or reset it ourselves.
            ConnectionLost: the connection ended before the stream did.
        """
        if self.reading_ended:
            raise StreamClosed("the stream was closed here")
        if self._reset_code is not None:
            raise StreamReset(self._reset_code)
        if self._buffer:
            if bytes_max >= len(self._buffer):
                data = bytes(self._buffer)
                self._buffer.clear()
            else:
                data = bytes(self._buffer[:bytes_max])
                del self._buffer[:bytes_max]
            self._credit(len(data))
            return data
        if self._finished:
            return b""
        if self._connection.lost is not None:
            raise self._connection.lost
        return None

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    def stop(self, error_code: int = CODE_CLOSED) -> None:
        """We read no more: drop what is buffered and tell the peer, unless it has ended."""
        if self.reading_ended:
            return
        self.reading_ended = True
        self._buffer.clear()
        receiver = self._engine_stream.receiver
        if not receiver.is_finished and self._connection.lost is None:
            receiver.stop(error_code)
        self._credit_all()
        self._wake_reader()

    # --- sending --------------------------------------------------------------------------

    def room(self) -> int:
        """Bytes `put` would take now.

        Raises:
            StreamClosed: we finished or reset our side.
            StreamReset: the peer stopped reading.
            ConnectionLost: the connection has ended.
        """
        if self.writing_ended:
            raise StreamClosed("the stream was closed for writing here")
        if self._stopped_code is not None:
            raise StreamReset(self._stopped_code)
        if self._connection.lost is not None:
            raise self._connection.lost
        return self._send_room()

    def put(self, data: bytes | memoryview) -> None:
        """Queue `data`, at most `room()` bytes of it."""
        assert len(data) <= self.room()
        self._engine_stream.sender.write(bytes(data))

    def finish(self) -> None:
        """End our sending side after the queued data."""
        if not self.writing_ended:
            self.writing_ended = True
            if self._stopped_code is None and self._connection.lost is None:
                self._engine_stream.sender.write(b"", end_stream=True)
            self._wake_writer()

    def reset(self, error_code: int = CODE_CLOSED) -> None:
        """Abandon both sides: the peer learns at once that data is missing."""
        self.writing_ended = True
        if self._connection.lost is None:
            self._engine_stream.sender.reset(error_code)
        self.stop(error_code)
        self._wake_writer()

    # --- the peer's doings, reported by ConnectionCore ------------------------------------

    def on_data(self, data: bytes, end: bool) -> None:
        if self.reading_ended:
            self._credit_all()
        else:
            self._buffer += data
            self._finished = self._finished or end
            self._wake_reader()

    def on_reset(self, error_code: int) -> None:
        self._reset_code = error_code
        self._buffer.clear()
        self._credit_all()
        self._wake_reader()

    def on_stop_sending(self, error_code: int) -> None:
        self._stopped_code = error_code
        self._wake_writer()

    def on_connection_lost(self) -> None:
        self._wake_reader()
        self._wake_writer()

    def on_progress(self) -> None:
        """Acknowledgements may have made room."""
        if self._send_room() > 0:
            self._wake_writer()

    @property
    def is_over(self) -> bool:
        """Neither side can be used any more."""
        reading_over = self.reading_ended or self._reset_code is not None or self._finished
        writing_over = self.writing_ended or self._stopped_code is not None
        return self._connection.lost is not None or (reading_over and writing_over)

    # --- private --------------------------------------------------------------------------

    def _credit(self, size: int) -> None:
        self._credited += size
        self._connection.engine.grant(self._engine_stream, self._credited, size)

    def _credit_all(self) -> None:
        """Data nobody will read, or that will never come, must not use up the window."""
        self._credit(self._engine_stream.receiver.highest_offset - self._credited)

    def _send_room(self) -> int:
        sender = self._engine_stream.sender
        unacked_bytes = sender._buffer_stop - sender._buffer_start
        return max(0, self._connection.config.stream_send_bytes_max - unacked_bytes)

    def _wake_reader(self) -> None:
        if self.wake_reader is not None:
            self.wake_reader()

    def _wake_writer(self) -> None:
        if self.wake_writer is not None:
            self.wake_writer()


class ConnectionCore:
    """One connection, from the first packet to `lost`."""

    def __init__(
        self,
        engine: _Engine,
        config: QuicConfig,
        *,
        is_client: bool,
        remote: Address,
        is_loopback: bool,
        expected_peer_id: bytes | None,
        now: float,
    ) -> None:
        self.engine = engine
        self.config = config
        self.is_client = is_client
        self.remote = remote
        self.expected_peer_id = expected_peer_id
        self.peer_id: bytes | None = None  # set once the peer has proved it
        self.lost: ConnectionLost | None = None  # set once, when the connection has ended
        self.streams: dict[int, StreamCore] = {}
        self.unaccepted: deque[StreamCore] = deque()
        self._probe_sizes = deque(
            config.datagram_bytes_loopback if is_loopback else config.datagram_bytes
        )
        self._probes_left = PROBES_PER_SIZE
        self._keys_since_packet = 0
        self._started_at = now
        self._pinged_at = -math.inf
        self._suspected_at: float | None = None

    # --- making one -----------------------------------------------------------------------

    @classmethod
    def dial(
        cls,
        identity: TlsIdentity,
        config: QuicConfig,
        remote: Address,
        *,
        is_loopback: bool,
        expected_peer_id: bytes | None,
        now: float,
    ) -> ConnectionCore:
        """Start a handshake with `remote`; the first packets are ready to send."""
        engine = _Engine(config, _engine_configuration(identity, config, is_client=True), None)
        engine.connect(remote, now)
        return cls(
            engine,
            config,
            is_client=True,
            remote=remote,
            is_loopback=is_loopback,
            expected_peer_id=expected_peer_id,
            now=now,
        )

    @classmethod
    def answer(
        cls,
        identity: TlsIdentity,
        config: QuicConfig,
        remote: Address,
        first_packet_id: bytes,
        *,
        is_loopback: bool,
        now: float,
    ) -> ConnectionCore:
        """Prepare for the Initial packet whose destination id is `first_packet_id`."""
        engine = _Engine(
            config, _engine_configuration(identity, config, is_client=False), first_packet_id
        )
        return cls(
            engine,
            config,
            is_client=False,
            remote=remote,
            is_loopback=is_loopback,
            expected_peer_id=None,
            now=now,
        )

    # --- what the driver feeds and asks -----------------------------------------------------

    def receive(self, datagram: bytes, sender: Address, now: float) -> None:
        """Digest one datagram.  Never raises, whatever its bytes are."""
        if self.lost is None:
            with self._engine_failure_is_the_end():
                self.engine.receive_datagram(datagram, sender, now)
                self._digest_events()

    def datagrams_to_send(self, now: float) -> list[Datagram]:
        """What to send now, in order."""
        engine = self.engine
        if not engine._network_paths or (self.lost is not None and not engine._close_pending):
            return []
        datagrams: list[Datagram] = []
        with self._engine_failure_is_the_end():
            if not self._probe_sizes and engine.is_quiet(now):
                return []
            engine.bring_acknowledgements(now)
            self._check_path()
            if engine._packet_number - self._keys_since_packet > KEY_PACKETS_MAX:
                self._keys_since_packet = engine._packet_number
                engine.request_key_update()
            datagrams = engine.datagrams_to_send(now)
            if self._probe_sizes and engine._handshake_confirmed and self.lost is None:
                datagrams += engine.send_size_probe(self._probe_sizes[0], self._on_size_probe, now)
            self._digest_events()
        return datagrams

    def deadline(self, now: float) -> float:
        """When `handle_timer` has work next."""
        if self.lost is not None:
            return math.inf
        engine_at = None
        with self._engine_failure_is_the_end():
            engine_at = self.engine.get_timer() if self.engine._close_at is not None else None
        own_at = self._silence_deadline() if self.is_established else self._handshake_deadline()
        if self.is_established:
            own_at = min(own_at, self._keepalive_deadline())
        due_at = own_at if engine_at is None else min(own_at, engine_at)
        return max(due_at, now + TIMER_STEP_S)

    def handle_timer(self, now: float) -> None:
        """Act on deadlines that have passed; harmless when early."""
        if self.lost is not None:
            return
        if not self.is_established and now >= self._handshake_deadline():
            self._lose("the handshake timed out", by_remote=True)
            return
        if self.is_established and now >= self._silence_deadline():
            self._lose("the peer stopped answering", by_remote=True)
            return
        if self.is_established and now >= self._keepalive_deadline():
            self._ping(now)
        engine_at = self.engine.get_timer() if self.engine._close_at is not None else None
        if engine_at is not None and now >= engine_at:
            with self._engine_failure_is_the_end():
                self.engine.handle_timer(now)
                self._digest_events()

    # --- what the application does ------------------------------------------------------------

    @property
    def is_established(self) -> bool:
        """The handshake is over and the peer has proved its id."""
        return self.peer_id is not None

    @property
    def rtt_s(self) -> float:
        """The least of the latest round trips, in seconds; the initial guess before the first.

        What is above the least is waiting, mostly for a busy process, and not the path.
        """
        return min(self.engine.recovery.latest_rtts_s, default=INITIAL_RTT_S)

    @property
    def datagram_bytes(self) -> int:
        return int(self.engine._max_datagram_size)

    @property
    def is_decrypting(self) -> bool:
        """The peer has sent at least one packet that decrypted."""
        return self.engine._state is not QuicConnectionState.FIRSTFLIGHT

    def connection_ids(self) -> list[bytes]:
        """The ids packets for this connection may carry now."""
        ids = [connection_id.cid for connection_id in self.engine._host_cids]
        if not self.is_client and not self.engine._handshake_confirmed:
            ids.append(self.engine.original_destination_connection_id)
        return ids

    def can_open_stream(self) -> bool:
        """The peer's limit allows one more stream (or the connection is lost)."""
        engine = self.engine
        next_index = engine.get_next_available_stream_id() // 4
        return self.lost is not None or next_index < engine._remote_max_streams_bidi

    def open_stream(self) -> StreamCore:
        """A new stream; call only if `can_open_stream()`.

        Raises:
            ConnectionLost: the connection has ended.
        """
        if self.lost is not None:
            raise self.lost
        assert self.can_open_stream()
        stream_id = self.engine.get_next_available_stream_id()
        # Creating it inside the engine now reserves the id: see the package docstring.
        engine_stream = self.engine._get_or_create_stream_for_send(stream_id)
        stream = self.streams[stream_id] = StreamCore(self, engine_stream)
        return stream

    def close(self, error_code: int = CODE_CLOSED, reason: str = "") -> None:
        """End the connection; the next datagrams to send tell the peer."""
        if self.lost is None:
            self.engine.close(error_code, reason_phrase=reason)
            self._lose(reason or "closed here", by_remote=False)

    def suspect(self, now: float) -> None:
        """An unauthenticated hint says the peer is gone: make it answer soon or lose it."""
        if self.lost is None and self._suspected_at is None:
            self._suspected_at = now
            if self.is_established:
                self._ping(now)

    # --- liveness -------------------------------------------------------------------------

    def _heard_at(self) -> float:
        return max(self._started_at, self.engine.heard_at)

    def _keepalive_deadline(self) -> float:
        return max(self._heard_at(), self._pinged_at) + self.config.keepalive_s

    def _silence_deadline(self) -> float:
        return min(self._heard_at() + self.config.silence_s_max, self._suspicion_deadline())

    def _handshake_deadline(self) -> float:
        return min(self._started_at + self.config.handshake_s_max, self._suspicion_deadline())

    def _suspicion_deadline(self) -> float:
        if self._suspected_at is None:
            return math.inf
        if self.engine.heard_at > self._suspected_at:
            self._suspected_at = None
            return math.inf
        patience_s = self.config.suspicion_ptos * self.engine._loss.get_probe_timeout()
        return self._suspected_at + max(self.config.suspicion_s, patience_s)

    def _ping(self, now: float) -> None:
        self._pinged_at = now
        if not self.engine._ping_pending:
            self.engine.send_ping(0)

    # --- the engine -----------------------------------------------------------------------

    @contextmanager
    def _engine_failure_is_the_end(self) -> Iterator[None]:
        """A bug the peer's bytes found in the engine costs that peer, not this process."""
        try:
            yield
        except Exception as error:
            logger.warning("QUIC engine failed on %s", self.remote, exc_info=True)
            self.engine._close_pending = False
            if self.lost is None:
                self._lose(f"the engine failed: {error!r}", by_remote=True)

    def _check_path(self) -> None:
        """Return to small datagrams when larger ones vanish."""
        if (
            self.engine._loss._pto_count >= BLACK_HOLE_PTOS
            and self.engine._max_datagram_size > DATAGRAM_BYTES_MIN
        ):
            self.engine.use_datagram_bytes(DATAGRAM_BYTES_MIN)
            self._probe_sizes.clear()

    # --- events from the engine -------------------------------------------------------------

    def _digest_events(self) -> None:
        while self.lost is None and (event := self.engine.next_event()) is not None:
            if isinstance(event, events.StreamDataReceived):
                stream = self._stream(event.stream_id)
                if stream is not None:
                    stream.on_data(event.data, event.end_stream)
            elif isinstance(event, events.StreamReset):
                stream = self._stream(event.stream_id)
                if stream is not None:
                    stream.on_reset(event.error_code)
            elif isinstance(event, events.StopSendingReceived):
                stream = self._stream(event.stream_id)
                if stream is not None:
                    stream.on_stop_sending(event.error_code)
            elif isinstance(event, events.HandshakeCompleted):
                self._verify_peer()
            elif isinstance(event, events.ConnectionTerminated):
                self._lose(event.reason_phrase or "the engine ended", by_remote=True)
        if self.lost is None and self.engine._close_event is not None:
            # The engine reports the end only after its draining period of 3 PTOs.
            end = self.engine._close_event
            by_remote = self.engine._state is QuicConnectionState.DRAINING
            reason = end.reason_phrase or f"code {end.error_code:#x}"
            self._lose(f"closed by the {'peer' if by_remote else 'engine'}: {reason}", by_remote)

    def _stream(self, stream_id: int) -> StreamCore | None:
        """The stream of an event, made on the peer's first frame; None if it is forgotten."""
        stream = self.streams.get(stream_id)
        if stream is None and (stream_id & 1) == (1 if self.is_client else 0):
            engine_stream = self.engine._streams.get(stream_id)
            if engine_stream is None:
                return None
            if len(self.unaccepted) >= self.config.streams_unaccepted_max:
                self.close(CODE_TOO_MANY_STREAMS, "too many streams nobody accepted")
                return None
            stream = self.streams[stream_id] = StreamCore(self, engine_stream)
            self.unaccepted.append(stream)
        return stream

    def forget_finished_streams(self) -> None:
        """Free what the engine has freed: streams whose both sides ended (call after I/O)."""
        live = self.engine._streams
        if len(live) < len(self.streams):
            for stream_id in [each for each in self.streams if each not in live]:
                del self.streams[stream_id]

    def _verify_peer(self) -> None:
        certificate = self.engine.tls._peer_certificate
        try:
            if certificate is None:
                raise BadCertificate("the peer showed no certificate")
            if self.engine.tls._peer_certificate_chain:
                raise BadCertificate("the peer showed more than one certificate")
            peer_id = verified_peer_id(certificate, datetime.datetime.now(datetime.UTC))
            if self.expected_peer_id not in (None, peer_id):
                raise BadCertificate(f"peer id mismatch: the remote is {peer_id.hex()}")
        except BadCertificate as error:
            self.engine.close(CODE_BAD_CERTIFICATE, QuicFrameType.CRYPTO, str(error))
            self._lose(str(error), by_remote=True)
            return
        self.peer_id = peer_id

    def _on_size_probe(self, size: int, delivered: bool) -> None:
        """A path probe of `size` bytes was acknowledged or lost (RFC 8899)."""
        if not self._probe_sizes or self._probe_sizes[0] != size:
            return
        if delivered:
            self.engine.use_datagram_bytes(size)
            self._probe_sizes.clear()
        else:
            self._probes_left -= 1
            if self._probes_left == 0:
                self._probe_sizes.popleft()
                self._probes_left = PROBES_PER_SIZE

    def _lose(self, reason: str, by_remote: bool) -> None:
        assert self.lost is None
        self.lost = ConnectionLost(reason, by_remote=by_remote)
        for stream in self.streams.values():
            stream.on_connection_lost()


class _Engine(QuicConnection):
    """aioquic's connection with our flow control, pacing, probing and client certificates."""

    def __init__(
        self, config: QuicConfig, configuration: QuicConfiguration, first_packet_id: bytes | None
    ) -> None:
        super().__init__(
            configuration=configuration, original_destination_connection_id=first_packet_id
        )
        self.heard_at = -math.inf  # when the last authentic packet arrived
        self._stream_window = config.stream_window_bytes
        self._connection_window = config.connection_window_bytes
        self._credited = 0
        self._windows_to_announce: dict[int, QuicStream] = {}
        self._size_probe_in_flight = False
        self._local_max_streams_bidi = Limit(
            QuicFrameType.MAX_STREAMS_BIDI, "max_streams_bidi", config.streams_max
        )
        # libp2p uses no unidirectional streams.
        self._local_max_streams_uni = Limit(QuicFrameType.MAX_STREAMS_UNI, "max_streams_uni", 0)
        self._unacknowledged = 0  # packets received that ask for it, since we last did
        self._pacer = BurstPacer(self._max_datagram_size)
        self.recovery = _Recovery(
            congestion_control_algorithm=configuration.congestion_control_algorithm,
            initial_rtt=configuration.initial_rtt,
            max_datagram_size=self._max_datagram_size,
            peer_completed_address_validation=not self._is_client,
            send_probe=self._send_probe,
            logger=self._logger,
        )
        self.recovery._pacer = self._pacer  # type: ignore[assignment]
        self._loss = self.recovery

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        if not self._is_client:
            self.tls._request_client_certificate = True

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        self.heard_at = context.time
        asks_for_ack, is_probing = super()._payload_received(context, plain, crypto_frame_required)
        if asks_for_ack and context.epoch is Epoch.ONE_RTT:
            self._unacknowledged += 1
        return asks_for_ack, is_probing

    # --- acknowledgements -------------------------------------------------------------------

    def receive_datagram(self, data: bytes, addr: Address, now: float) -> None:
        """As the engine, but acknowledge lone packets late (RFC 9000 section 13.2.1)."""
        if not self._handshake_confirmed:
            super().receive_datagram(data, addr, now)
            return
        space = self._spaces[Epoch.ONE_RTT]
        expected = space.largest_received_packet + 1
        due_at = space.ack_at
        super().receive_datagram(data, addr, now)
        if space.ack_at is None:
            return
        if space.largest_received_packet != expected:
            space.ack_at = now  # out of order: the peer shall repair the gap
        elif self._unacknowledged >= PACKETS_PER_ACK:
            space.ack_at = min(space.ack_at, now + ACK_SOON_S)
        elif due_at is None:
            space.ack_at = now + ACK_DELAY_S

    def bring_acknowledgements(self, now: float) -> None:
        """Something is about to be sent: what is to be acknowledged goes along."""
        space = self._spaces[Epoch.ONE_RTT]
        if self._handshake_confirmed and space.ack_at is not None:
            space.ack_at = min(space.ack_at, now)

    def _write_ack_frame(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, now: float
    ) -> None:
        super()._write_ack_frame(builder, space, now)
        if space.is_application_data:
            self._unacknowledged = 0

    # --- sending ----------------------------------------------------------------------------

    def is_quiet(self, now: float) -> bool:
        """Whether nothing is to be sent, for certain.

        Building no packet costs the engine as much as building one, and most of what is
        received calls for none.
        """
        if not self._handshake_confirmed or self._state is not QuicConnectionState.CONNECTED:
            return False
        ack_at = self._spaces[Epoch.ONE_RTT].ack_at
        path = self._network_paths[0]
        return not (
            (ack_at is not None and ack_at <= now)
            or self._close_pending
            or self._ping_pending
            or self._probe_pending
            or self.has_windows_to_announce
            or self._has_stream_limit_to_announce
            or self._handshake_done_pending
            or self._retire_connection_ids
            or self._streams_blocked_pending
            or len(self._network_paths) > 1
            or not path.is_validated
            or path.remote_challenges
            or not self._crypto_streams[Epoch.ONE_RTT].sender.buffer_is_empty
            or not all(connection_id.was_sent for connection_id in self._host_cids)
            or any(map(_has_something_to_send, self._streams_queue))
        )

    def _flush_builder(
        self,
        builder: QuicPacketBuilder,
        network_path: QuicNetworkPath,
        peer_cid: bytes,
        now: float,
    ) -> list[Datagram]:
        datagrams = super()._flush_builder(builder, network_path, peer_cid, now)
        self._pacer.settle(sum(len(data) for data, _ in datagrams))
        return datagrams

    # --- flow control by consumed bytes -----------------------------------------------------

    def grant(self, stream: QuicStream, credited: int, size: int) -> None:
        """`size` more bytes were consumed, `credited` on this stream in all: move the windows.

        Windows move in halves, so that one frame announces half a window.  The connection's
        also moves when the peer has less than a stream window left: unread streams may hold
        so much of it that half of it is never consumed.
        """
        self._credited += size
        limit = credited + self._stream_window
        if (
            not stream.receiver.is_finished
            and stream.receiver._final_size is None
            and limit - stream.max_stream_data_local >= self._stream_window // 2
        ):
            stream.max_stream_data_local = limit
            assert stream.stream_id is not None
            self._windows_to_announce[stream.stream_id] = stream
        limit = self._credited + self._connection_window
        granted = self._local_max_data
        if limit - granted.value >= self._connection_window // 2 or (
            limit > granted.value and granted.value - granted.used < self._stream_window
        ):
            granted.value = limit

    @property
    def has_windows_to_announce(self) -> bool:
        return bool(self._windows_to_announce) or (
            self._local_max_data.sent != self._local_max_data.value
        )

    @property
    def _has_stream_limit_to_announce(self) -> bool:
        # The engine's own rule: when the peer may open fewer than it would be granted.
        limit = self._local_max_streams_bidi
        return limit.sent - limit.used < limit.value - limit.sent

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        # The engine doubles MAX_DATA when half of it was *received*; hide what was.
        received = self._local_max_data.used
        self._local_max_data.used = 0
        try:
            super()._write_connection_limits(builder, space)
        finally:
            self._local_max_data.used = received
        while self._windows_to_announce:
            stream_id, stream = next(iter(self._windows_to_announce.items()))
            buffer = builder.start_frame(
                QuicFrameType.MAX_STREAM_DATA,
                capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
                handler=self._on_max_stream_data_delivery,
                handler_args=(stream,),
            )
            buffer.push_uint_var(stream_id)
            buffer.push_uint_var(stream.max_stream_data_local)
            del self._windows_to_announce[stream_id]

    def _write_stream_limits(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream
    ) -> None:
        """Windows are announced by `_write_connection_limits`, never doubled."""

    def _on_max_stream_data_delivery(self, delivery: QuicDeliveryState, stream: QuicStream) -> None:
        if delivery is not QuicDeliveryState.ACKED and not stream.receiver.is_finished:
            assert stream.stream_id is not None
            self._windows_to_announce[stream.stream_id] = stream

    # --- datagram size ------------------------------------------------------------------------

    def use_datagram_bytes(self, size: int) -> None:
        self._max_datagram_size = size
        self._loss._cc.use_datagram_bytes(size)  # type: ignore[attr-defined]
        self._pacer.datagram_bytes = size

    def send_size_probe(
        self, size: int, on_result: Callable[[int, bool], None], now: float
    ) -> list[Datagram]:
        """One padded PING of `size` bytes, unless one is on its way.

        It is kept out of the congestion window: its loss says "too large", not "too fast"
        (RFC 9000 section 14.4).
        """
        if self._size_probe_in_flight or self._state in END_STATES:
            return []
        path = self._network_paths[0]
        if not path.is_validated:
            return []
        self._size_probe_in_flight = True

        def on_delivery(delivery: QuicDeliveryState) -> None:
            self._size_probe_in_flight = False
            on_result(size, delivery is QuicDeliveryState.ACKED)

        builder = QuicPacketBuilder(
            host_cid=self.host_cid,
            is_client=self._is_client,
            max_datagram_size=size,
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            spin_bit=self._spin_bit,
            version=self._version or QuicProtocolVersion.VERSION_1,
        )
        builder.start_packet(QuicPacketType.ONE_RTT, self._cryptos[Epoch.ONE_RTT])
        buffer = builder.start_frame(QuicFrameType.PING, handler=on_delivery)
        buffer.push_bytes(bytes(builder.remaining_buffer_space))
        assert builder._packet is not None
        builder._packet.in_flight = False
        return self._flush_builder(
            builder=builder, network_path=path, peer_cid=self._peer_cid.cid, now=now
        )


class _Recovery(QuicPacketRecovery):
    """aioquic's loss detection, right about round trips shorter than a late acknowledgement."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.latest_rtts_s: deque[float] = deque(maxlen=RTT_SAMPLES)

    def get_probe_timeout(self, *, include_max_ack_delay: bool = True) -> float:
        probe_timeout_s = super().get_probe_timeout(include_max_ack_delay=include_max_ack_delay)
        if not self._rtt_initialized:
            return float(probe_timeout_s)
        return float(probe_timeout_s + max(0.0, GRANULARITY_S - 4 * self._rtt_variance))

    def on_ack_received(
        self, *, ack_rangeset: RangeSet, ack_delay: float, now: float, space: QuicPacketSpace
    ) -> None:
        """Subtract what the peer waited, down to the least round trip seen.

        The engine subtracts all or nothing, and takes no round trip for shorter than 1 ms: on
        shorter ones an acknowledgement that waited 20 ms would count as 20 ms of path.

        Nothing is acknowledged before it was sent, but `now` may be of before: when the loop woke
        that has meanwhile answered, and read what came back. A first round trip of less than
        nothing would make every later timeout negative, and due at once for ever.
        """
        now = max(now, self._time_of_last_sent_ack_eliciting_packet)
        newest = space.sent_packets.get(ack_rangeset.bounds().stop - 1)
        if newest is not None and newest.is_ack_eliciting and newest.sent_time is not None:
            now = max(now, newest.sent_time)  # a size probe is no "last sent" packet
            rtt_s = now - newest.sent_time
            ack_delay = min(
                ack_delay, self.max_ack_delay, max(0.0, rtt_s - self._rtt_min - RTT_EPSILON_S)
            )
            self.latest_rtts_s.append(rtt_s - ack_delay)
        super().on_ack_received(
            ack_rangeset=ack_rangeset, ack_delay=ack_delay, now=now, space=space
        )


def _has_something_to_send(stream: QuicStream) -> bool:
    return bool(
        not stream.sender.buffer_is_empty
        or stream.sender.reset_pending
        or stream.receiver.stop_pending
        or stream.is_finished  # to be discarded, which may raise the peer's limit
    )


def initial_packet_id(datagram: bytes) -> bytes | None:
    """The destination id if this datagram may open a connection, else None.

    Never raises, whatever the bytes are.
    """
    if len(datagram) < DATAGRAM_BYTES_MIN:
        return None
    try:
        header = pull_quic_header(Buffer(data=datagram), host_cid_length=CONNECTION_ID_BYTES)
    except ValueError:
        return None
    if (
        header.packet_type is not QuicPacketType.INITIAL
        or header.version != QuicProtocolVersion.VERSION_1
        or len(header.destination_cid) < CONNECTION_ID_BYTES
    ):
        return None
    return header.destination_cid


def version_negotiation(datagram: bytes) -> bytes | None:
    """The answer to a long packet of a version we do not speak, or None.

    Only full-size datagrams get one, so that it cannot amplify (RFC 9000 section 6.1).
    """
    if len(datagram) < DATAGRAM_BYTES_MIN or not datagram[0] & 0x80:
        return None
    version = int.from_bytes(datagram[1:5], "big")
    if version in (QuicProtocolVersion.NEGOTIATION, QuicProtocolVersion.VERSION_1):
        return None
    destination_end = 6 + datagram[5]
    source_end = destination_end + 1 + datagram[destination_end]
    if datagram[5] > 20 or datagram[destination_end] > 20:
        return None
    return encode_quic_version_negotiation(
        source_cid=datagram[6:destination_end],
        destination_cid=datagram[destination_end + 1 : source_end],
        supported_versions=[QuicProtocolVersion.VERSION_1],
    )


def _engine_configuration(
    identity: TlsIdentity, config: QuicConfig, *, is_client: bool
) -> QuicConfiguration:
    return QuicConfiguration(
        alpn_protocols=[ALPN],
        certificate=identity.certificate,
        private_key=identity.private_key,
        congestion_control_algorithm="meshnode",
        connection_id_length=CONNECTION_ID_BYTES,
        idle_timeout=IDLE_TIMEOUT_S,
        initial_rtt=INITIAL_RTT_S,
        is_client=is_client,
        max_data=config.connection_window_bytes,
        max_datagram_size=DATAGRAM_BYTES_MIN,
        max_stream_data=config.stream_window_bytes,
        supported_versions=[QuicProtocolVersion.VERSION_1],
        # Chains prove nothing here; `verified_peer_id` checks the libp2p extension instead.
        verify_mode=ssl.CERT_NONE,
    )
