"""One UDP socket and all connections on it.

Decides: which connection a datagram belongs to, who may start one, when to send and when
the next timer is due.  Does not know: what is inside a datagram, libp2p.

One task receives: it reads up to a batch of datagrams, lets the tasks that waited for their
bytes run, and only then lets each connection answer, once per batch.  Another keeps time.  It
drains the socket before it runs timers, so that a process that was stopped for a while finds
its peers' packets before it decides that they are dead.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import logging
import math
import secrets
import socket
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import trio

from meshnode.transport.quic.config import QuicConfig
from meshnode.transport.quic.connection import (
    CONNECTION_ID_BYTES,
    Address,
    ConnectionCore,
    Datagram,
    initial_packet_id,
    version_negotiation,
)
from meshnode.transport.quic.session import Connection
from meshnode.transport.quic.tls import TlsIdentity

logger = logging.getLogger(__name__)

# Datagrams read before their connections answer: one acknowledgement covers the batch, yet
# other tasks run between batches.
BATCH_DATAGRAMS = 64
# Scheduler passes between received bytes and our answer to them: tasks woken by the bytes run
# in the next pass, in no order that is ours to choose.
PASSES_FOR_READERS = 2
# Batches read before timers run regardless, so that a flood cannot stop them.
BATCHES_BEFORE_TIMERS = 32
# Larger than any datagram we announce or probe for.
RECEIVE_BYTES_MAX = 16_384
# The kernel's limits for one segmented send (UDP_MAX_SEGMENTS, IPv4 payload).
GSO_SEGMENTS_MAX = 64
GSO_BYTES_MAX = 65_000
# Any size below an Initial packet's will do; DCUtR asks for random bytes.
PUNCH_BYTES = 64
# Error-queue entries looked at per wake-up; each is an unauthenticated hint.
ICMP_HINTS_MAX = 16

# Linux constants Python 3.11 does not name.
SOL_UDP, UDP_SEGMENT = 17, 103
IP_MTU_DISCOVER, IP_PMTUDISC_PROBE, IP_RECVERR = 10, 3, 11
IPV6_MTU_DISCOVER, IPV6_RECVERR = 23, 25
SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6 = 2, 3

ConnectionHandler = Callable[[Connection], Awaitable[None]]


@dataclass(frozen=True)
class EndpointStatistics:
    """Counts since the endpoint opened, and what is open now."""

    connections: int
    half_open: int
    datagrams_received: int
    datagrams_sent: int
    datagrams_refused: int


class Endpoint:
    """A bound UDP socket that dials and (with a handler) accepts connections.

    `run` must be running for anything to happen.
    """

    def __init__(self, udp_socket: socket.socket, identity: TlsIdentity, config: QuicConfig):
        self._socket = udp_socket
        self._identity = identity
        self._config = config
        self._handler: ConnectionHandler | None = None
        self._nursery: trio.Nursery | None = None
        self._connections: set[Connection] = set()
        self._by_id: dict[bytes, Connection] = {}
        self._ids: dict[Connection, set[bytes]] = {}
        self._half_open: set[Connection] = set()
        self._per_source: Counter[str] = Counter()
        self._half_open_per_source: Counter[str] = Counter()
        self._timers: list[tuple[float, int, Connection]] = []
        self._timer_of: dict[Connection, float] = {}
        self._timer_order = itertools.count()
        self._sleep_scope = trio.CancelScope()
        self._unsent: deque[Datagram] = deque()
        self._has_unsent = trio.Event()
        self._is_closed = trio.Event()
        self._gso = True
        self._datagrams_received = 0
        self._datagrams_sent = 0
        self._datagrams_refused = 0

    @property
    def address(self) -> Address:
        """The bound (host, port[, flow, scope])."""
        address: Address = self._socket.getsockname()
        return address

    @property
    def peer_id(self) -> bytes:
        """Our own peer id."""
        return self._identity.peer_id

    @property
    def family(self) -> int:
        return self._socket.family

    def statistics(self) -> EndpointStatistics:
        return EndpointStatistics(
            connections=len(self._connections),
            half_open=len(self._half_open),
            datagrams_received=self._datagrams_received,
            datagrams_sent=self._datagrams_sent,
            datagrams_refused=self._datagrams_refused,
        )

    def accept_with(self, handler: ConnectionHandler) -> None:
        """From now on answer strangers; `handler` runs per verified connection.

        It is cancelled when its connection ends.  An exception from it ends the connection.
        """
        self._handler = handler

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the socket until cancelled, then close all connections and the socket."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._send_unsent)
                nursery.start_soon(self._keep_time)
                task_status.started()
                await self._receive()
        finally:
            self._nursery = None
            for connection in list(self._connections):
                connection.close("the endpoint closed")
            self._socket.close()
            self._is_closed.set()

    async def close(self) -> None:
        """End `run`: every peer is told, every handler cancelled.  Safe to call twice."""
        if self._nursery is None:
            self._socket.close()
            return
        self._nursery.cancel_scope.cancel()
        await self._is_closed.wait()

    def can_reach(self, remote: Address) -> bool:
        """Whether a datagram from this socket can get to `remote`."""
        host = str(self.address[0])
        same_family = (self.family == socket.AF_INET6) == (":" in str(remote[0]))
        return same_family and (
            host in ("0.0.0.0", "::") or _is_loopback(self.address) == _is_loopback(remote)
        )

    def punch(self, remote: Address) -> None:
        """Send one datagram no QUIC peer answers, to open our NAT towards `remote`."""
        self._send([(secrets.token_bytes(PUNCH_BYTES), remote)])

    async def dial(self, remote: Address, expected_peer_id: bytes | None) -> Connection:
        """Connect from this socket.

        Args:
            remote: a resolved address of this socket's family.
            expected_peer_id: refuse any other peer; None accepts whoever answers.

        Raises:
            ConnectionLost: nobody answered in time, or the wrong peer did.
        """
        core = ConnectionCore.dial(
            self._identity,
            self._config,
            remote,
            is_loopback=_is_loopback(remote),
            expected_peer_id=expected_peer_id,
            now=trio.current_time(),
        )
        connection = self._register(core)
        self._flush(connection)
        try:
            await connection.wait_established()
        except trio.Cancelled:
            connection.close("dial cancelled")
            raise
        return connection

    # --- the tasks --------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            touched, _ = self._receive_batch(trio.current_time())
            for _ in range(PASSES_FOR_READERS):
                await trio.lowlevel.checkpoint()
            for connection in touched:
                self._flush(connection)

    async def _keep_time(self) -> None:
        while True:
            with trio.CancelScope(deadline=self._next_timer()) as self._sleep_scope:
                await trio.sleep_forever()
            now = trio.current_time()
            for _ in range(BATCHES_BEFORE_TIMERS):
                touched, is_drained = self._receive_batch(now)
                for connection in touched:
                    self._flush(connection)
                if is_drained:
                    break
            self._run_timers(now)

    async def _send_unsent(self) -> None:
        """Send what a full socket buffer held back."""
        while True:
            await self._has_unsent.wait()
            await trio.lowlevel.wait_writable(self._socket)
            held_back = list(self._unsent)
            self._unsent.clear()
            self._has_unsent = trio.Event()
            self._send(held_back)
            if not self._unsent:
                for connection in list(self._connections):
                    self._flush(connection)

    # --- receiving ----------------------------------------------------------------------------

    def _receive_batch(self, now: float) -> tuple[Iterable[Connection], bool]:
        """Read one batch; who is to answer (call `_flush`), and whether the socket is drained."""
        touched: dict[Connection, None] = {}
        receive = self._socket.recvfrom
        is_drained = False
        for count in range(BATCH_DATAGRAMS):
            try:
                datagram, sender = receive(RECEIVE_BYTES_MAX)
            except BlockingIOError:
                is_drained = True
                if count == 0:
                    self._take_icmp_hints(now)
                break
            except OSError as error:
                # A queued ICMP error surfaces here once; the queue itself says for whom.
                logger.debug("receive on %s: %s", self._socket, error)
                self._take_icmp_hints(now)
                continue
            self._datagrams_received += 1
            connection = self._connection_for(datagram, sender, now)
            if connection is not None:
                connection.core.receive(datagram, sender, now)
                touched[connection] = None
        for connection in touched:
            connection.wake()
        return touched, is_drained

    def _connection_for(self, datagram: bytes, sender: Address, now: float) -> Connection | None:
        if not datagram:
            return None
        if not datagram[0] & 0x80:
            return self._by_id.get(datagram[1 : 1 + CONNECTION_ID_BYTES])
        if len(datagram) < 7:
            return None
        connection = self._by_id.get(datagram[6 : 6 + datagram[5]])
        if connection is None and self._handler is not None:
            connection = self._answer_stranger(datagram, sender, now)
        return connection

    def _answer_stranger(self, datagram: bytes, sender: Address, now: float) -> Connection | None:
        """A new connection for a valid first packet within the limits, else None."""
        first_packet_id = initial_packet_id(datagram)
        if first_packet_id is None:
            answer = version_negotiation(datagram)
            if answer is not None:
                self._send([(answer, sender)])
            return None
        source = str(sender[0])
        config = self._config
        if (
            len(self._half_open) >= config.half_open_max
            or self._half_open_per_source[source] >= config.half_open_per_source_max
            or len(self._connections) >= config.connections_max
            or self._per_source[source] >= config.connections_per_source_max
        ):
            self._datagrams_refused += 1
            return None
        core = ConnectionCore.answer(
            self._identity,
            config,
            sender,
            first_packet_id,
            is_loopback=_is_loopback(sender),
            now=now,
        )
        core.receive(datagram, sender, now)
        if not core.is_decrypting:
            self._datagrams_refused += 1
            return None
        connection = self._register(core)
        self._flush(connection)
        return None  # it has been fed already

    def _take_icmp_hints(self, now: float) -> None:
        """Read the socket's error queue; "port unreachable" makes us doubt that peer."""
        for _ in range(ICMP_HINTS_MAX):
            try:
                _, ancillary, _, unreachable = self._socket.recvmsg(0, 512, socket.MSG_ERRQUEUE)
            except OSError:
                return  # empty (EAGAIN), or a further pending error: wait for the next wake-up
            for _, _, error in ancillary:
                code, origin = struct.unpack_from("=IB", error)
                if code == errno.ECONNREFUSED and origin in (
                    SO_EE_ORIGIN_ICMP,
                    SO_EE_ORIGIN_ICMP6,
                ):
                    for connection in list(self._connections):
                        if connection.remote[:2] == unreachable[:2]:
                            connection.core.suspect(now)
                            self._flush(connection)

    # --- sending ------------------------------------------------------------------------------

    def _flush(self, connection: Connection) -> None:
        """Let `connection` send, then note its new ids, timer and state."""
        now = trio.current_time()
        if not self._unsent:
            self._send(connection.core.datagrams_to_send(now))
        connection.wake()
        if connection.core.lost is not None:
            self._unregister(connection)
            return
        if connection in self._half_open and connection.core.is_established:
            self._admit(connection)
        self._note_ids(connection)
        self._set_timer(connection, connection.core.deadline(now))

    def _send(self, datagrams: list[Datagram]) -> None:
        """Send in order, equal-sized runs to one address in one call; keep what must wait."""
        start = 0
        while start < len(datagrams):
            end = _run_end(datagrams, start) if self._gso else start + 1
            try:
                self._send_run(datagrams[start:end])
            except BlockingIOError:
                self._unsent.extend(datagrams[start:])
                self._has_unsent.set()
                return
            except OSError as error:
                if end - start > 1 and error.errno in (errno.EINVAL, errno.EIO, errno.EOPNOTSUPP):
                    logger.info("UDP segmentation offload is not usable here: %s", error)
                    self._gso = False
                    continue
                # Too large for the path, or no route: to QUIC a lost datagram.
                logger.debug("send to %s: %s", datagrams[start][1], error)
            start = end

    def _send_run(self, run: list[Datagram]) -> None:
        first, remote = run[0]
        self._datagrams_sent += len(run)
        for attempt in ("a queued ICMP error may surface first", "then the send itself"):
            try:
                if len(run) == 1:
                    self._socket.sendto(first, remote)
                else:
                    segment = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", len(first)))]
                    self._socket.sendmsg([data for data, _ in run], segment, 0, remote)
                return
            except ConnectionRefusedError:
                logger.debug("send to %s: %s", remote, attempt)

    # --- timers -------------------------------------------------------------------------------

    def _next_timer(self) -> float:
        """When the earliest timer is due; drops entries that were replaced."""
        while self._timers:
            due_at, _, connection = self._timers[0]
            if self._timer_of.get(connection) == due_at:
                return due_at
            heapq.heappop(self._timers)
        return math.inf

    def _set_timer(self, connection: Connection, due_at: float) -> None:
        """An earlier entry stays: a timer that fires early is set anew, which is cheaper."""
        if due_at < self._timer_of.get(connection, math.inf):
            self._timer_of[connection] = due_at
            heapq.heappush(self._timers, (due_at, next(self._timer_order), connection))
            if due_at < self._sleep_scope.deadline:
                self._sleep_scope.deadline = due_at

    def _run_timers(self, now: float) -> None:
        while self._next_timer() <= now:
            _, _, connection = heapq.heappop(self._timers)
            del self._timer_of[connection]
            connection.core.handle_timer(now)
            self._flush(connection)

    # --- the table of connections ---------------------------------------------------------------

    def _register(self, core: ConnectionCore) -> Connection:
        connection = Connection(core, self._flush)
        self._connections.add(connection)
        self._ids[connection] = set()
        if not core.is_client:
            source = str(core.remote[0])
            self._half_open.add(connection)
            self._half_open_per_source[source] += 1
            self._per_source[source] += 1
        self._note_ids(connection)
        return connection

    def _note_ids(self, connection: Connection) -> None:
        current = connection.core.connection_ids()
        known = self._ids[connection]
        if len(current) == len(known) and known.issuperset(current):
            return
        for gone in known.difference(current):
            del self._by_id[gone]
        for each in current:
            self._by_id[each] = connection
        self._ids[connection] = set(current)

    def _admit(self, connection: Connection) -> None:
        """The stranger has proved who it is: hand it to the handler."""
        self._leave_half_open(connection)
        if self._nursery is not None:
            self._nursery.start_soon(self._handle, connection)

    async def _handle(self, connection: Connection) -> None:
        assert self._handler is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_when_closed, connection, nursery.cancel_scope)
                await self._handler(connection)
                await connection.wait_closed()
        except Exception:  # one connection's handler must not end the others
            logger.exception("the handler of a connection from %s failed", connection.remote)
            connection.close("internal error")

    @staticmethod
    async def _cancel_when_closed(connection: Connection, scope: trio.CancelScope) -> None:
        await connection.wait_closed()
        scope.cancel()

    def _leave_half_open(self, connection: Connection) -> None:
        if connection in self._half_open:
            self._half_open.discard(connection)
            _decrement(self._half_open_per_source, str(connection.core.remote[0]))

    def _unregister(self, connection: Connection) -> None:
        if connection not in self._connections:
            return
        self._leave_half_open(connection)
        self._connections.discard(connection)
        self._timer_of.pop(connection, None)
        for each in self._ids.pop(connection):
            del self._by_id[each]
        if not connection.core.is_client:
            _decrement(self._per_source, str(connection.core.remote[0]))


def bind_udp(host: str, port: int, config: QuicConfig) -> socket.socket:
    """A bound non-blocking UDP socket; IPv6 sockets carry IPv6 only.

    Raises:
        OSError: EADDRINUSE if the port is taken (SO_REUSEPORT is off on purpose).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    udp_socket = socket.socket(family, socket.SOCK_DGRAM)
    try:
        udp_socket.setblocking(False)
        udp_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, config.socket_buffer_bytes)
        udp_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.socket_buffer_bytes)
        if family == socket.AF_INET6:
            udp_socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            udp_socket.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IP_PMTUDISC_PROBE)
            udp_socket.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        else:
            udp_socket.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
            udp_socket.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        udp_socket.bind((host, port))
    except OSError:
        udp_socket.close()
        raise
    return udp_socket


def _run_end(datagrams: list[Datagram], start: int) -> int:
    """The end of the run from `start` that one segmented send can carry.

    All segments have the first one's size; only the last may be shorter.
    """
    first, remote = datagrams[start]
    total_bytes = len(first)
    end = start + 1
    while end < len(datagrams) and end - start < GSO_SEGMENTS_MAX:
        data, address = datagrams[end]
        total_bytes += len(data)
        if len(data) > len(first) or total_bytes > GSO_BYTES_MAX or address != remote:
            break
        end += 1
        if len(data) < len(first):
            break
    return end


def _is_loopback(address: Address) -> bool:
    host = str(address[0])
    return host.startswith("127.") or host == "::1"


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
