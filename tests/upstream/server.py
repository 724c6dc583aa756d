"""A small OpenAI server on a real socket, whose answers a test writes byte by byte."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import h11
import trio

OWN_NAME = "org/Words-1B"
EVENTS = (
    b': a comment\n\ndata: {"choices":[{"delta":{"role":"assistant","content":"to"}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":" be"},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,'
    b'"prompt_tokens_details":null}}\n\ndata: [DONE]\n\n'
)


@dataclass(frozen=True)
class Received:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


def told(status: int, body: bytes, content_type: str = "application/json", more: str = "") -> bytes:
    """A whole answer on the wire."""
    head = f"HTTP/1.1 {status} Said\r\ncontent-type: {content_type}\r\n{more}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
STREAM = STREAM_HEAD + chunk(EVENTS) + b"0\r\n\r\n"
WHOLE_BODY = (
    b'{ "id":"x", "choices":[{"message":{"content":"to be"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":3,"completion_tokens":2,"prompt_tokens_details":null} }'
)
WHOLE = told(200, WHOLE_BODY)

Answer = Callable[[Received, trio.abc.Stream], Awaitable[None]]


@dataclass
class Server:
    """Lists `models` and `props`; every other request gets the bytes of `says`, or what `answer`
    writes. An answer that has no end is cut."""

    models: object = field(default_factory=lambda: {"data": [{"id": OWN_NAME}]})
    props: bytes = told(404, b"{}")
    says: bytes = WHOLE
    answer: Answer | None = None
    requests: list[Received] = field(default_factory=list)
    left: int = 0
    """Clients that were gone before their answer was complete."""
    port: int = 0
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
        """Until the block is left, or `stop`; a second run takes the same port."""
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            serve = partial(trio.serve_tcp, partial(self._talk, tls), self.port, host="127.0.0.1")
            (listener,) = await nursery.start(serve)
            self.port = listener.socket.getsockname()[1]
            yield self
            self.stop()

    def stop(self) -> None:
        """The process dies: its port refuses, its connections break."""
        self._scope.cancel()

    async def _talk(self, tls: ssl.SSLContext | None, accepted: trio.SocketStream) -> None:
        stream: trio.abc.Stream = accepted
        if tls is not None:
            stream = trio.SSLStream(accepted, tls, server_side=True, https_compatible=True)
        try:
            while (received := await _receive(stream)) is not None:
                await self._reply(received, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.left += 1
        finally:
            await trio.aclose_forcefully(stream)

    async def _reply(self, received: Received, stream: trio.abc.Stream) -> None:
        if received.path == "/v1/models":
            listing = self.models if isinstance(self.models, bytes) else json.dumps(self.models)
            said = listing if isinstance(listing, bytes) else listing.encode()
            await stream.send_all(told(200, said))
        elif received.path == "/props":
            await stream.send_all(self.props)
        else:
            self.requests.append(received)
            if self.answer is not None:
                await self.answer(received, stream)
                return
            await stream.send_all(self.says)
            if not _is_complete(self.says):
                raise trio.ClosedResourceError


async def until_left(stream: trio.abc.Stream) -> None:
    """Until the client is gone, as a read sees it."""
    while await stream.receive_some():
        pass
    raise trio.BrokenResourceError


def _is_complete(said: bytes) -> bool:
    if b"transfer-encoding: chunked" in said:
        return said.endswith(b"0\r\n\r\n")
    head, _, body = said.partition(b"\r\n\r\n")
    return b"content-length: %d" % len(body) in head


async def _receive(stream: trio.abc.Stream) -> Received | None:
    connection = h11.Connection(h11.SERVER)
    request: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive_some()
            if not data and request is None:
                return None
            connection.receive_data(bytes(data))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        else:
            assert isinstance(event, h11.EndOfMessage)
            assert request is not None
            headers = {name.decode(): value.decode() for name, value in request.headers}
            return Received(request.target.decode(), headers, bytes(body))
