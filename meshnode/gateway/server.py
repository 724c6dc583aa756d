"""The API app on a TCP socket: hypercorn's connection server on Trio.

Decides which address is bound, who may call from a browser, when a client counts as stalled, and
how a shutdown ends. Does not know routes.

Hypercorn shields its writes from cancellation, so a client that stops reading could hold a task,
an engine slot and the shutdown for ever. `_ClientStream` bounds that. And of a request that is
answered before all of its body has come, it ends the task that is just closing the connection, so
that this stays open and dead. `_EarlyAnswers` sees to that.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import wrap_app
from quart_trio import QuartTrio

from meshnode.config import is_loopback
from meshnode.errors import ConfigError
from meshnode.gateway.openai import encode_error
from meshnode.transport.http import HEAD_BYTES_MAX, AsgiApp, Message, send_within_stall

__all__ = ["serve_api"]

# Longer than the 60 s after which most proxies and client pools drop an idle connection.
KEEP_ALIVE_S = 75.0
# Answers in progress get this long to end when the node stops; service managers kill after 30 s.
GRACE_S = 10.0
# A body that is on its way while its request is refused is worth taking off, so that the connection
# can go on: one of a few packets is here by then.
DRAIN_S = 0.05
# After an early answer, whoever still sends must be read, or a reset overtakes the answer. Whoever
# sends longer has had the time to read that nobody listens.
LINGER_S = 2.0
# As many as the kernel holds by default on older Linux; more would only queue.
BACKLOG = 128

_log = logging.getLogger(__name__)


async def serve_api(
    app: QuartTrio,
    bind: tuple[str, int],
    *,
    shutdown: Callable[[], Awaitable[object]],
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `shutdown` returns, then let answers end for `GRACE_S` at most.

    `task_status` gets the address that is really bound (port 0 takes a free one), once clients
    can connect. Raises `ConfigError` if the address cannot be bound.
    """
    listening = _bind(*bind)
    host, port = listening.getsockname()[:2]
    config = Config()
    config.errorlog = _log
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.h11_max_incomplete_size = HEAD_BYTES_MAX
    guarded: AsgiApp = _EarlyAnswers(_LoopbackGuard(app) if is_loopback(host) else app)
    wrapped = wrap_app(guarded, config.wsgi_max_body_size, "asgi")
    with listening:
        async with trio.open_nursery() as lifespan_nursery:
            lifespan = Lifespan(wrapped, config, {})
            await lifespan_nursery.start(lifespan.handle_lifespan)
            await lifespan.wait_for_startup()
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
            task_status.started((host, port))
            await _serve_connections(wrapped, config, listener, shutdown)
            await lifespan.wait_for_shutdown()
            lifespan_nursery.cancel_scope.cancel()


async def _serve_connections(
    app: AppWrapper,
    config: Config,
    listener: trio.SocketListener,
    shutdown: Callable[[], Awaitable[object]],
) -> None:
    context = WorkerContext(None)
    open_streams: set[_ClientStream] = set()
    closed = trio.lowlevel.ParkingLot()

    async def handle(accepted: trio.SocketStream) -> None:
        stream = _ClientStream(accepted)
        open_streams.add(stream)
        try:
            # Hypercorn's annotation asks for TLS; without it, it runs on any stream.
            await TCPServer(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 -- a slip of hypercorn's on one connection ends only that
            _log.exception("a client connection failed")
        finally:
            stream.abandon()
            open_streams.discard(stream)
            closed.unpark_all()

    async with trio.open_nursery() as connections:
        try:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(
                    partial(trio.serve_listeners, handle, [listener], handler_nursery=connections)
                )
                await shutdown()
                accepting.cancel_scope.cancel()
            # Idle connections close at once, busy ones after their answer.
            await context.terminated.set()
            with trio.move_on_after(GRACE_S):
                while open_streams:
                    await closed.park()
        finally:
            # Also when we are cancelled: a shielded write ends only with its socket.
            for stream in open_streams:
                stream.abandon()
            connections.cancel_scope.cancel()


class _ClientStream(trio.abc.HalfCloseableStream):
    """A client's socket whose writes end: when it stalls, and when we abandon it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket  # hypercorn asks it for the addresses

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await send_within_stall(self._stream, bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abandon(self) -> None:
        """Close without waiting; whoever is writing or reading is told so."""
        self.socket.close()


# ---------------------------------------------------------------------------------------------
# The address, and who may use it
# ---------------------------------------------------------------------------------------------


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError`, which says what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"The API address {host!r} is not known: {error}. Use an address of this machine."
        ) from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        advice = _BIND_ADVICE.get(error.errno or 0, f"{error.strerror}. Choose another address.")
        raise ConfigError(f"The API cannot listen on {host} port {port}: {advice}") from error
    return listening


_BIND_ADVICE = {
    errno.EADDRINUSE: "the port is in use. Stop the program that has it (`ss -ltnp` shows it), "
    "or choose another port; 0 takes a free one.",
    errno.EACCES: "ports below 1024 need root. Choose a higher one.",
    errno.EADDRNOTAVAIL: "this machine has no such address. Use 127.0.0.1 for this machine only, "
    "or 0.0.0.0 for all its networks.",
}


class _LoopbackGuard:
    """Refuses what a web page could send to a service on this machine (DNS rebinding, CSRF).

    A rebound name arrives in `Host`, a foreign page in `Origin`; programs send neither of them
    wrongly.
    """

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            if not _is_loopback_authority(headers.get(b"host", b"")):
                await _refuse(send, 421, "host_not_allowed", "Host")
                return
            origin = headers.get(b"origin")
            if origin is not None and not _is_loopback_authority(origin.partition(b"://")[2]):
                await _refuse(send, 403, "origin_not_allowed", "Origin")
                return
        await self._app(scope, receive, send)


class _EarlyAnswers:
    """Lets every answer arrive, also one to a request whose body nobody has read."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        await self._app(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer. Bodies are bounded by those who want them; drained, by time."""

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive = receive
        self._send = send
        self._is_read = False
        self._is_early = False
        self._draining = trio.CancelScope()

    async def receive(self) -> Message:
        """Of the app and of `drain`, which may both be waiting."""
        message: Message = await self._receive()
        if not message.get("more_body", False):  # the end of the body, or of the client
            self._is_read = True
            self._draining.cancel()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._is_read:
            await self.drain(DRAIN_S)
            self._is_early = not self._is_read
            if self._is_early:
                # The client is told that there will be no other answer on this connection.
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
        elif self._is_early and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self.drain(LINGER_S)
            # Hypercorn closes the connection within this call, which takes no time: all is sent.
            with trio.CancelScope(shield=True):
                await self._send({**message, "body": b""})
            return
        await self._send(message)

    async def drain(self, seconds: float) -> None:
        """Throw away what is left of the body, for so long at most."""
        with trio.move_on_after(seconds) as self._draining:
            while not self._is_read:
                await self.receive()


async def _refuse(send: Any, status: int, code: str, header: str) -> None:
    message = f"This API listens on loopback only and does not answer to this {header}."
    body = encode_error(message, "invalid_request_error", param=header, code=code)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_loopback_authority(authority: bytes) -> bool:
    """Whether `host`, `host:port`, `[v6]` or `[v6]:port` names this machine's loopback."""
    try:
        host = urlsplit(f"//{authority.decode('ascii')}").hostname
    except ValueError:  # not ASCII, or brackets that do not match
        return False
    return host is not None and is_loopback(host)
