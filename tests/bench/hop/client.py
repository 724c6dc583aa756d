"""A client that costs microseconds per chunk: non-blocking sockets, one epoll, parsing by hand.

Keep-alive: the sockets of a `Clients` serve request after request, so that connecting is not
measured. A chunk's arrival is when epoll told of it, not when its turn came.
"""

from __future__ import annotations

import gc
import json
import re
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.bench.hop.engine import MODEL

HANG_S = 30.0
RECEIVE_BYTES = 65_536
_TOKEN = re.compile(rb'"content":"((?:[^"\\]|\\.)+)"')
_END = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Load:
    """`clients` at once, each `requests` answers of `tokens` tokens, one request after another.

    They start evenly spread over `stagger_s`.
    """

    clients: int
    requests: int
    tokens: int
    prompt: str
    model: str
    stagger_s: float = 0.0

    @property
    def is_stamped(self) -> bool:
        """Whether a token is the nanosecond it was made in, and none is left out."""
        return self.model == MODEL

    @property
    def body(self) -> bytes:
        return json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": self.prompt}],
                "stream": True,
                "max_tokens": self.tokens,
                "temperature": 0,
            }
        ).encode()


@dataclass
class Seen:
    """What the clients saw: seconds to the first token of each answer; seconds under way of each
    later token that says when it was made; the gaps between tokens; tokens per second overall."""

    first_s: list[float] = field(default_factory=list)
    later_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    tokens: int = 0
    took_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.took_s


class Clients:
    """Connections to one server, kept between loads."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._address = (urlsplit(url).hostname, urlsplit(url).port)
        self._sockets: list[socket.socket] = []

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def run(self, load: Load) -> Seen:
        """Put `load` on the server. Raises `RuntimeError` on any answer but a whole stream."""
        while len(self._sockets) < load.clients:
            connected = socket.create_connection(self._address, HANG_S)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setblocking(False)
            self._sockets.append(connected)
        body = load.body
        request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body
        seen = Seen()
        clients = [_Client(s, load, request, seen) for s in self._sockets[: load.clients]]
        with _without_pauses(), select.epoll() as epoll:
            begun_at = time.perf_counter()
            _run(epoll, clients, load.stagger_s)
            seen.took_s = time.perf_counter() - begun_at
        expected = load.clients * load.requests * load.tokens
        if load.is_stamped and seen.tokens != expected:
            raise RuntimeError(f"{seen.tokens} tokens came, {expected} were due")
        return seen


def _run(epoll: select.epoll, clients: list[_Client], stagger_s: float) -> None:
    """Let each client ask when its time has come, and all of them read to their end."""
    begun_at = time.perf_counter()
    by_fd = {client.socket.fileno(): client for client in clients}
    due = [(begun_at + i * stagger_s / len(clients), c) for i, c in enumerate(clients)]
    due.reverse()  # the next one last
    for fd in by_fd:
        epoll.register(fd, select.EPOLLIN)
    running = len(clients)
    while running:
        wait_s = max(0.0, due[-1][0] - time.perf_counter()) if due else HANG_S
        ready = epoll.poll(wait_s)
        now_ns = time.perf_counter_ns()
        if not ready and not due:
            raise RuntimeError(f"nothing came for {HANG_S:.0f} s")
        for fd, _ in ready:
            running -= by_fd[fd].receive(now_ns)
        while due and due[-1][0] <= time.perf_counter():
            due.pop()[1].ask()


class _Client:
    """One connection: asks, reads a stream to its end, asks again."""

    def __init__(self, connected: socket.socket, load: Load, request: bytes, seen: Seen) -> None:
        self.socket = connected
        self.load = load
        self.seen = seen
        self._request = request
        self._left = load.requests
        self._chunked = b""
        self._text = b""
        self._in_head = True
        self._asked_ns = 0
        self._last_ns = 0

    def ask(self) -> None:
        self._left -= 1
        self._in_head = True
        self._last_ns = 0
        self._asked_ns = time.perf_counter_ns()
        self.socket.send(self._request)

    def receive(self, now_ns: int) -> bool:
        """Take what is here; whether this client's last answer has ended."""
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise RuntimeError("the server hung up")
        self._chunked += data
        if self._in_head:
            head, end, self._chunked = self._chunked.partition(b"\r\n\r\n")
            if not end:
                self._chunked = head
                return False
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{head!r} {self._chunked!r}")
            self._in_head = False
        ended = self._unchunk()
        position = 0
        for match in _TOKEN.finditer(self._text):
            self._count(match[1], now_ns)
            position = match.end()
        self._text = self._text[position:]
        if not ended:
            return False
        if not self._text.endswith(_END):
            raise RuntimeError(f"the stream ended with {self._text!r}")
        self._text = b""
        if self._left:
            self.ask()
            return False
        return True

    def _count(self, token: bytes, now_ns: int) -> None:
        self.seen.tokens += 1
        if not self._last_ns:
            self.seen.first_s.append((now_ns - self._asked_ns) / 1e9)
        else:
            self.seen.gap_s.append((now_ns - self._last_ns) / 1e9)
            if self.load.is_stamped:
                self.seen.later_s.append((now_ns - int(token)) / 1e9)
        self._last_ns = now_ns

    def _unchunk(self) -> bool:
        """Move whole chunks from `_chunked` to `_text`; whether the last one was among them."""
        data, start, parts = self._chunked, 0, [self._text]
        ended = False
        while (line_end := data.find(b"\r\n", start)) >= 0:
            size = int(data[start:line_end], 16)
            end = line_end + 2 + size
            if len(data) < end + 2:
                break
            parts.append(data[line_end + 2 : end])
            start = end + 2
            ended = size == 0
        self._chunked = data[start:]
        self._text = b"".join(parts)
        return ended


@contextmanager
def _without_pauses() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
