"""HTTP/1.1 over any trio stream: both ends of the tunnel.

Decides how requests and answers are framed, when a stream is kept for the next request, and what
a broken or misbehaving peer costs us. Does not know libp2p, peers' identities, models or routes:
it is handed a `trio.abc.HalfCloseableStream` and, on the serving side, an ASGI application.

* client: `HttpConnection` (one stream), `TunnelPool` (idle streams per peer)
* server: `serve_asgi` (one stream, one application)

The stream's `receive_some` must be safe to cancel, and `aclose` without a prior `send_eof` must
abandon the stream, so that the far side sees a cut and never a complete answer.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import h11
import trio

from meshnode.errors import LocalProtocolError, MeshnodeError, RemoteProtocolError

__all__ = [
    "AsgiApp",
    "Headers",
    "HttpConnection",
    "HttpResponse",
    "Message",
    "ServerLimits",
    "TunnelPool",
    "send_within_stall",
    "serve_asgi",
]

Headers = Sequence[tuple[bytes, bytes]]
Message = dict[str, Any]
# Any: the three ASGI arguments are typed differently by every framework.
AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]

# One read takes what one QUIC flow-control step usually delivers; larger reads only cost memory.
RECEIVE_BYTES = 64 * 1024
# node.js allows 80 KiB, nginx 32 KiB: no honest head comes near it.
HEAD_BYTES_MAX = 64 * 1024
# A million tokens of text is about 4 MiB; twice that leaves room for JSON escapes.
BODY_BYTES_MAX = 8 * 1024 * 1024
# Longer than the client's idle time, so that it is nearly always the client who closes.
SERVER_IDLE_S = 60.0
CLIENT_IDLE_S = 30.0
# A peer that takes no byte for this long is gone or hostile; its engine slot is worth more.
SEND_STALL_S = 60.0
# The stall is counted anew for each piece, so that a long body on a slow link is no stall.
SEND_BYTES = 256 * 1024
# Streams kept for reuse: a burst beyond it opens new ones (one round trip) and drops them after.
IDLE_PER_PEER_MAX = 8
IDLE_TOTAL_MAX = 64

_log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------
# Client
# ---------------------------------------------------------------------------------------------


class HttpResponse:
    """The answer to one request: its head at once, its body by iterating.

    `status` is 200..599, `headers` are lower-case names and raw values. Iteration yields non-empty
    bytes as they arrive, joining what is already here, and ends only after a complete body: a cut
    raises `trio.BrokenResourceError` (reset) or `RemoteProtocolError` (ended early, malformed).
    """

    def __init__(self, connection: HttpConnection, head: h11.Response) -> None:
        self.status = int(head.status_code)
        self.headers: tuple[tuple[bytes, bytes], ...] = tuple(
            (bytes(name), bytes(value)) for name, value in head.headers
        )
        self.complete = False
        self._connection = connection

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; `name` in lower case."""
        return next((value for key, value in self.headers if key == name), None)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        parts: list[bytes] = []
        while not self.complete:
            event = self._connection.next_event()
            if isinstance(event, h11.Data):
                parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self.complete = True
            elif parts:
                break
            else:
                await self._connection.receive()
        if parts:
            return b"".join(parts)
        raise StopAsyncIteration

    async def read(self, bytes_max: int) -> bytes:
        """The whole body. Raises `RemoteProtocolError` if it is longer than `bytes_max`."""
        body = bytearray()
        async for chunk in self:
            body += chunk
            if len(body) > bytes_max:
                raise RemoteProtocolError(f"The answer is longer than {bytes_max} bytes.")
        return bytes(body)


class HttpConnection:
    """The client's end of one stream; carries one request at a time.

    `response_bytes` counts what the peer has sent since the last request began: while it is 0 the
    request may be repeated elsewhere without anybody having seen a part of an answer.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.response_bytes = 0
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def begin(
        self, method: str, target: str, headers: Headers, body: bytes = b""
    ) -> HttpResponse:
        """Send a request and wait for the head of its answer.

        `headers` must name `host`; the length of the body is added here.
        Raises `trio.BrokenResourceError`, `trio.ClosedResourceError` or `RemoteProtocolError`;
        the connection is then of no further use. `LocalProtocolError` if it is still in use.
        """
        self.response_bytes = 0
        try:
            wire = self._h11.send(
                h11.Request(
                    method=method,
                    target=target,
                    headers=[*headers, (b"content-length", b"%d" % len(body))],
                )
            )
            wire = (wire or b"") + (self._h11.send(h11.Data(data=body)) or b"")
            wire += self._h11.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError as error:
            raise LocalProtocolError(f"This request cannot be sent: {error}") from error
        await send_within_stall(self.stream, wire)
        while True:
            event = self.next_event()
            if isinstance(event, h11.Response):
                return HttpResponse(self, event)
            if not isinstance(event, h11.InformationalResponse):
                await self.receive()

    @asynccontextmanager
    async def request(
        self, method: str, target: str, headers: Headers, body: bytes = b""
    ) -> AsyncIterator[HttpResponse]:
        """`begin`, then on leaving: ready for the next request, or closed if that cannot be."""
        try:
            yield await self.begin(method, target, headers, body)
        finally:
            if not self.recycle():
                await _abandon(self.stream)

    def recycle(self) -> bool:
        """Make ready for the next request; False if this stream cannot carry another."""
        ended = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        # Bytes after the end of an answer would be taken for the next one.
        if not ended or self._h11.trailing_data != (b"", False):
            return False
        self._h11.start_next_cycle()
        return True

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """h11's next event, with its errors named ours."""
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise RemoteProtocolError(f"The peer's answer is not HTTP/1.1: {error}") from error

    async def receive(self) -> None:
        """Wait for more bytes, or the end, from the peer."""
        data = await self.stream.receive_some(RECEIVE_BYTES)
        self.response_bytes += len(data)
        self._h11.receive_data(bytes(data))


class TunnelPool:
    """Keep-alive streams to peers: an idle one is reused, else a new one is opened.

    Bounds: `IDLE_PER_PEER_MAX` and `IDLE_TOTAL_MAX` idle streams, each for `CLIENT_IDLE_S`.
    Streams in use are not bounded here but by whoever admits requests.
    """

    def __init__(self, open_stream: Callable[[str], Awaitable[trio.abc.Stream]]) -> None:
        self._open_stream = open_stream
        # Oldest first, so that expiry looks at one end only.
        self._idle: deque[_Idle] = deque()

    @asynccontextmanager
    async def request(
        self, peer_id: str, method: str, target: str, headers: Headers, body: bytes = b""
    ) -> AsyncIterator[HttpResponse]:
        """One request to a peer; leaving before the end of the body resets the stream.

        Raises what `open_stream` and `HttpConnection.begin` raise.
        """
        connection, response = await self._begin(peer_id, method, target, headers, body)
        try:
            yield response
        finally:
            # What ended the block does not matter, only whether the answer was read to its end:
            # servers cancel the task of a request as soon as its answer is complete.
            if connection.recycle():
                self._idle.append(_Idle(peer_id, connection, trio.current_time() + CLIENT_IDLE_S))
                await self._drop_surplus(peer_id)
            else:
                await _abandon(connection.stream)

    async def aclose(self) -> None:
        """Close all idle streams."""
        while self._idle:
            await _abandon(self._idle.popleft().connection.stream)

    @property
    def idle_streams(self) -> int:
        return len(self._idle)

    async def _begin(
        self, peer_id: str, method: str, target: str, headers: Headers, body: bytes
    ) -> tuple[HttpConnection, HttpResponse]:
        await self._drop_expired()
        kept = self._take(peer_id)
        if kept is not None:
            try:
                return kept, await _begin_or_abandon(kept, method, target, headers, body)
            except (trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError):
                # The peer may have closed it while it lay idle: only then is a fresh one due.
                if kept.response_bytes:
                    raise
        fresh = HttpConnection(await self._open_stream(peer_id))
        return fresh, await _begin_or_abandon(fresh, method, target, headers, body)

    def _take(self, peer_id: str) -> HttpConnection | None:
        # The most recently used: the least likely to have been closed by the peer.
        for index in range(len(self._idle) - 1, -1, -1):
            if self._idle[index].peer_id == peer_id:
                connection = self._idle[index].connection
                del self._idle[index]
                return connection
        return None

    async def _drop_expired(self) -> None:
        now = trio.current_time()
        while self._idle and self._idle[0].expires_at <= now:
            await _abandon(self._idle.popleft().connection.stream)

    async def _drop_surplus(self, peer_id: str) -> None:
        of_peer = [idle for idle in self._idle if idle.peer_id == peer_id]
        surplus = of_peer[:-IDLE_PER_PEER_MAX]
        if not surplus and len(self._idle) > IDLE_TOTAL_MAX:
            surplus = [self._idle[0]]
        for idle in surplus:
            self._idle.remove(idle)
            await _abandon(idle.connection.stream)


@dataclass(frozen=True, slots=True, eq=False)
class _Idle:
    peer_id: str
    connection: HttpConnection
    expires_at: float


async def _begin_or_abandon(
    connection: HttpConnection, method: str, target: str, headers: Headers, body: bytes
) -> HttpResponse:
    begun = False
    try:
        response = await connection.begin(method, target, headers, body)
        begun = True
        return response
    finally:
        if not begun:
            await _abandon(connection.stream)


# ---------------------------------------------------------------------------------------------
# Server
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one stream may cost the serving side."""

    body_bytes_max: int = BODY_BYTES_MAX
    idle_s: float = SERVER_IDLE_S


async def serve_asgi(
    stream: trio.abc.HalfCloseableStream,
    app: AsgiApp,
    scope_extra: Mapping[str, Any] | None = None,
    limits: ServerLimits | None = None,
) -> None:
    """Answer the requests of one stream, one after another, until either side ends it.

    The stream is always closed on return. Malformed requests are answered with 400 (431, 413) and
    the stream is closed; a peer that resets or vanishes gets its application task cancelled at
    once; an application that fails gets a 500, or, once its answer has begun, a cut stream. None
    of these raises here. `scope_extra` is merged into every ASGI scope, for instance
    `{"client": (peer_id, 0)}`.
    """
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
    limits = limits or ServerLimits()
    try:
        while True:
            head = await _read_head(stream, connection, limits.idle_s)
            if head is None:
                break
            exchange = _Exchange(stream, connection, head, scope_extra or {}, limits)
            if not await exchange.run(app):
                return
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                break
            connection.start_next_cycle()
        await stream.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        _log.debug("the peer left")
    finally:
        await _abandon(stream)


async def _read_head(
    stream: trio.abc.HalfCloseableStream, connection: h11.Connection, idle_s: float
) -> h11.Request | None:
    """The next request, or None when there will be none: end, silence or nonsense."""
    with trio.move_on_after(idle_s):
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as error:
                await _refuse(stream, connection, error.error_status_hint)
                return None
            if isinstance(event, h11.Request):
                if event.target.startswith(b"/"):
                    return event
                await _refuse(stream, connection, 400)
                return None
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(RECEIVE_BYTES)))
            else:
                return None
    return None


async def _refuse(
    stream: trio.abc.HalfCloseableStream, connection: h11.Connection, status: int
) -> None:
    """Answer with a bare status and no further request, if an answer can still be given."""
    if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    wire = connection.send(h11.Response(status_code=status, headers=headers)) or b""
    await send_within_stall(stream, wire + (connection.send(h11.EndOfMessage()) or b""))


class _Exchange:
    """One request and its answer on the serving side: the two ASGI callables and their state."""

    def __init__(
        self,
        stream: trio.abc.HalfCloseableStream,
        connection: h11.Connection,
        request: h11.Request,
        scope_extra: Mapping[str, Any],
        limits: ServerLimits,
    ) -> None:
        path, _, query = request.target.partition(b"?")
        self.scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.http_version.decode("ascii"),
            "method": request.method.decode("ascii").upper(),
            "scheme": "http",
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [(bytes(name), bytes(value)) for name, value in request.headers],
            "client": None,
            "server": None,
            "state": {},
            "extensions": {},
            **scope_extra,
        }
        self._stream = stream
        self._h11 = connection
        self._limits = limits
        self._start: Message | None = None
        self._is_chunked = False
        self._over = False  # the answer is complete, or nobody is left to read it
        self._refusal: int | None = None
        self._scope = trio.CancelScope()
        # Two slots hold a short body and its end, so that the peer is watched even if the
        # application never reads; a long body is read no faster than the application takes it.
        self._body_in, self._body_out = trio.open_memory_channel[Message](2)

    async def run(self, app: AsgiApp) -> bool:
        """True if the peer got a complete answer, be it a refusal; False if the stream was cut."""
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            nursery.start_soon(self._run_app, app)
            await self._read_body()
        if self._refusal is not None:
            await _refuse(self._stream, self._h11, self._refusal)
        # MUST_CLOSE follows a complete answer that is the last one of this stream.
        return self._h11.our_state in (h11.DONE, h11.MUST_CLOSE)

    async def _run_app(self, app: AsgiApp) -> None:
        try:
            await app(self.scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001 -- foreign code: what it raises ends its answer
            self._report(error)
        except BaseExceptionGroup as group:
            cancelled, rest = group.split(trio.Cancelled)
            if rest is not None and not isinstance(rest, ExceptionGroup):
                raise
            if rest is not None:
                self._report(rest)
            if cancelled is not None:
                raise cancelled from None
        if not self._over and self._refusal is None and self._h11.our_state is h11.SEND_RESPONSE:
            self._refusal = 500
        self._scope.cancel()

    def _report(self, error: Exception) -> None:
        rest = error.split(MeshnodeError)[1] if isinstance(error, ExceptionGroup) else error
        if rest is None or isinstance(rest, MeshnodeError):
            # Raised on purpose to cut the answer: the other side will ask elsewhere.
            _log.warning("answer cut: %s", _first_message(error))
        else:
            _log.error("the application failed on %s", self.scope["path"], exc_info=error)

    async def _read_body(self) -> None:
        """Feed the body to the application, then watch for the peer to leave."""
        body_bytes = 0
        while True:
            try:
                event = self._h11.next_event()
                if event is h11.NEED_DATA:
                    self._h11.receive_data(bytes(await self._stream.receive_some(RECEIVE_BYTES)))
                    continue
            except h11.RemoteProtocolError as error:
                self._end(refusal=error.error_status_hint)
                return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._end()
                return
            if isinstance(event, h11.Data):
                body_bytes += len(event.data)
                if body_bytes > self._limits.body_bytes_max:
                    self._end(refusal=413)
                    return
                await self._body_in.send(
                    {"type": "http.request", "body": bytes(event.data), "more_body": True}
                )
            elif isinstance(event, h11.EndOfMessage):
                await self._body_in.send({"type": "http.request", "body": b"", "more_body": False})
            else:
                # A second request waits for its turn (PAUSED), or the peer has only half-closed
                # and still wants its answer. A peer that is really gone fails the next write.
                await trio.sleep_forever()

    def _end(self, refusal: int | None = None) -> None:
        self._refusal = refusal
        self._over = True
        self._scope.cancel()

    async def _receive(self) -> Message:
        if self._over:
            return {"type": "http.disconnect"}
        if self._h11.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            await send_within_stall(self._stream, self._h11.send(go_on) or b"")
        return await self._body_out.receive()

    async def _send(self, message: Message) -> None:
        """One ASGI event, at most one write: head, data and framing leave in one buffer."""
        if self._over:
            await trio.lowlevel.checkpoint()
        elif message["type"] == "http.response.start":
            # Held back until the first body event, so that both travel in one packet.
            self._start = message
        elif message["type"] == "http.response.body":
            wire = self._encode(message)
            if wire:
                try:
                    await send_within_stall(self._stream, wire)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._end()
                    await trio.lowlevel.checkpoint()  # raises Cancelled: the answer is pointless
        else:
            raise LocalProtocolError(f"ASGI event {message['type']} is not supported here.")

    def _encode(self, message: Message) -> bytes:
        wire = b""
        if self._start is not None:
            head = h11.Response(status_code=self._start["status"], headers=self._start["headers"])
            self._start = None
            wire = self._h11.send(head) or b""
            self._is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in wire.lower()
        body = message.get("body", b"")
        if body and self.scope["method"] != "HEAD":
            if self._is_chunked:
                # What h11 would make of it, at a tenth of the price; a chunk changes no state.
                wire += b"%x\r\n%b\r\n" % (len(body), body)
            else:
                wire += self._h11.send(h11.Data(data=body)) or b""
        if not message.get("more_body", False):
            wire += self._h11.send(h11.EndOfMessage()) or b""
            self._over = True
        return wire


def _first_message(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


async def _abandon(stream: trio.abc.AsyncResource) -> None:
    """Close at once, without waiting, even while we are being cancelled."""
    with trio.CancelScope(shield=True):
        await trio.aclose_forcefully(stream)


async def send_within_stall(stream: trio.abc.SendStream, wire: bytes) -> None:
    """`send_all`, but a peer that takes nothing for `SEND_STALL_S` counts as gone."""
    for start in range(0, len(wire), SEND_BYTES):
        piece = wire if len(wire) <= SEND_BYTES else wire[start : start + SEND_BYTES]
        with trio.move_on_after(SEND_STALL_S) as stall:
            await stream.send_all(piece)
        if stall.cancelled_caught:
            raise trio.BrokenResourceError(f"the peer took no bytes for {SEND_STALL_S:.0f} s")
