"""Bad networks on a machine whose kernel has no `netem`: delay, loss, silence and cuts.

* `UdpProxy`, `TcpProxy`  one address in front of another, on loopback, without privileges
* `Switch`                an Ethernet switch between network namespaces: everything crosses it,
                          multicast too; needs root and /dev/net/tun

What a link does to traffic is its `Weather`, which a test may change at any time. The same seed
loses the same packets of the same traffic.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

DATAGRAM_BYTES_MAX = 65_536
TCP_SEGMENT_BYTES = 1_448
TCP_RETRANSMIT_S = 0.2
"""Linux's shortest retransmission timeout: what a lost segment costs a TCP stream."""
BUFFER_BYTES = 4 * 1024 * 1024
WAKE_S = 0.05
FRAMES_PER_TURN = 64


@dataclass
class Weather:
    """Of one link, each way. `silent`: nothing crosses and nobody is told."""

    delay_s: float = 0.02
    loss: float = 0.01
    silent: bool = False


@dataclass
class Tally:
    """What crossed, for tests that must know that traffic took this way.

    `turns`: how often a proxy's traffic changed its direction, which tells round trips of whoever
    says nothing while it waits.
    """

    passed: int = 0
    lost: int = 0
    bytes: int = 0
    turns: int = 0


class _Link(threading.Thread):
    """A thread that reads from sockets, holds what it read for a while, and hands it on."""

    def __init__(self, weather: Weather, seed: int) -> None:
        super().__init__(daemon=True)
        self.weather = weather
        self.tally = Tally()
        self._random = random.Random(seed)
        # select(2) waits to the microsecond, epoll(7) to the millisecond.
        self._selector = selectors.SelectSelector()
        self._held: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._outward = False
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self.join()
        self._close()
        self._selector.close()

    def run(self) -> None:
        while not self._over.is_set():
            due_in_s = self._held[0][0] - time.monotonic() if self._held else WAKE_S
            for key, _ in self._selector.select(min(max(due_in_s, 0.0), WAKE_S)):
                key.data()
            now = time.monotonic()
            while self._held and self._held[0][0] <= now:
                heapq.heappop(self._held)[2]()

    def _is_lost(self) -> bool:
        # Drawn in any case, so that a silence does not change who is lost after it.
        lost = self._random.random() < self.weather.loss or self.weather.silent
        self.tally.lost += lost
        self.tally.passed += not lost
        return lost

    def _seen(self, data: bytes, outward: bool) -> None:
        self.tally.bytes += len(data)
        self.tally.turns += outward is not self._outward
        self._outward = outward

    def _later(self, deliver: Callable[[], None], at: float | None = None) -> None:
        self._count += 1
        due = time.monotonic() + self.weather.delay_s if at is None else at
        heapq.heappush(self._held, (due, self._count, deliver))

    def _close(self) -> None:
        raise NotImplementedError


class UdpProxy(_Link):
    """Datagrams to `port` reach `target`; each sender has a socket of its own towards it."""

    def __init__(self, target: tuple[str, int], weather: Weather, seed: int = 1) -> None:
        super().__init__(weather, seed)
        self._target = target
        self._front = _udp(("127.0.0.1", 0))
        self._backs: dict[tuple[str, int], socket.socket] = {}
        self.port = int(self._front.getsockname()[1])
        self._selector.register(self._front, selectors.EVENT_READ, self._from_senders)

    def _from_senders(self) -> None:
        for data, sender in _datagrams(self._front):
            back = self._backs.get(sender) or self._open(sender)
            self._seen(data, outward=True)
            if not self._is_lost():
                self._later(lambda data=data, back=back: _try_send(back, data, self._target))

    def _open(self, sender: tuple[str, int]) -> socket.socket:
        back = self._backs[sender] = _udp(("127.0.0.1", 0))

        def from_target() -> None:
            for data, _ in _datagrams(back):
                self._seen(data, outward=False)
                if not self._is_lost():
                    self._later(lambda data=data: _try_send(self._front, data, sender))

        self._selector.register(back, selectors.EVENT_READ, from_target)
        return back

    def _close(self) -> None:
        for each in (self._front, *self._backs.values()):
            each.close()


class TcpProxy(_Link):
    """Connections to `port` reach `target`. TCP hides loss; what is left of it is a wait.

    `segment_bytes` are lost and passed on at once; on a link without loss, large ones cost less.
    """

    def __init__(
        self,
        target: tuple[str, int],
        weather: Weather,
        seed: int = 1,
        segment_bytes: int = TCP_SEGMENT_BYTES,
    ) -> None:
        super().__init__(weather, seed)
        self._segment_bytes = segment_bytes
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        self._open: dict[socket.socket, socket.socket] = {}
        self.port = int(self._listening.getsockname()[1])
        self._selector.register(self._listening, selectors.EVENT_READ, self._accept)

    def cut(self) -> None:
        """Reset every connection, as a router that has restarted does."""
        for each in tuple(self._open):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._shut(each)

    def _accept(self) -> None:
        near, _ = self._listening.accept()
        far = socket.create_connection(self._target)
        for each in (near, far):  # what is to be late is late already
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink in ((near, far), (far, near)):
            self._open[source] = sink
            due = [0.0]

            def carry(
                source: socket.socket = source,
                sink: socket.socket = sink,
                due: list[float] = due,
                outward: bool = source is near,
            ) -> None:
                self._carry(source, sink, due, outward)

            self._selector.register(source, selectors.EVENT_READ, carry)

    def _carry(
        self, source: socket.socket, sink: socket.socket, due: list[float], outward: bool
    ) -> None:
        """Segments keep their order: one that is late holds up those behind it."""
        try:
            data = source.recv(self._segment_bytes)
        except OSError:
            data = b""
        if data:
            self._seen(data, outward)
        late_s = TCP_RETRANSMIT_S if self._is_lost() else 0.0
        if self.weather.silent:
            return
        due[0] = max(due[0], time.monotonic() + self.weather.delay_s + late_s)
        if data:
            self._later(lambda: self._pass_on(sink, data), due[0])
        else:
            self._selector.unregister(source)
            self._later(lambda: self._half_close(sink), due[0])

    def _pass_on(self, sink: socket.socket, data: bytes) -> None:
        try:
            sink.sendall(data)
        except OSError:
            self._shut(sink)

    def _half_close(self, sink: socket.socket) -> None:
        try:
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._shut(sink)

    def _shut(self, one: socket.socket) -> None:
        other = self._open.pop(one, None)
        for each in (one, other):
            if each is not None and each.fileno() >= 0:
                if each in self._selector.get_map():
                    self._selector.unregister(each)
                each.close()

    def _close(self) -> None:
        self._listening.close()
        for each in self._open:
            each.close()


# --- network namespaces -------------------------------------------------------------------------

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
NETNS = Path("/var/run/netns")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Place:
    """A network namespace with one interface, `eth0`, on a `Switch`."""

    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What runs a command there."""
        return ("ip", "netns", "exec", self.namespace)

    def reached(self) -> dict[str, Any]:
        """What starts a process there, and lets a test talk to it."""
        return {"prefix": self.prefix, "inside": self.inside}

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The sockets that this thread makes in the block belong there."""
        with open("/proc/thread-self/ns/net") as home, open(NETNS / self.namespace) as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())


class Switch(_Link):
    """Namespaces on one Ethernet, in 10.99.0.0/24. `weather` is that of every pair of them."""

    def __init__(self, weather: Weather, seed: int = 1) -> None:
        super().__init__(weather, seed)
        self._tag = f"mn{os.getpid()}"
        self._ports: list[int] = []
        self._places: list[Place] = []
        self._port_of: dict[bytes, int] = {}
        self._cut_off: set[int] = set()
        self._side_of: dict[int, int] = {}

    def place(self) -> Place:
        """A new namespace. Raises `OSError` or `CalledProcessError` where that is not allowed."""
        number = len(self._places) + 1
        place = Place(f"{self._tag}-{number}", f"10.99.0.{number}")
        _ip("netns", "add", place.namespace)
        self._places.append(place)
        with place.inside():
            port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            self._ports.append(port)
            fcntl.ioctl(port, TUNSETIFF, struct.pack("16sH", b"eth0", IFF_TAP | IFF_NO_PI))
        inside = ("-n", place.namespace)
        _ip(*inside, "address", "add", f"{place.address}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "link", "set", "eth0", "up")
        _ip(*inside, "route", "add", "default", "dev", "eth0")
        self._selector.register(port, selectors.EVENT_READ, lambda: self._frames(port))
        return place

    def silence(self, place: Place, silent: bool = True) -> None:
        """Pull one cable, or plug it in again."""
        change = self._cut_off.add if silent else self._cut_off.discard
        change(self._ports[self._places.index(place)])

    def split(self, *sides: Sequence[Place]) -> None:
        """Nothing crosses from one side to another; without sides, everything crosses again."""
        self._side_of = {
            self._ports[self._places.index(place)]: number
            for number, side in enumerate(sides)
            for place in side
        }

    def _crosses(self, port: int, out: int) -> bool:
        is_cut = {port, out} & self._cut_off
        return not is_cut and self._side_of.get(port) == self._side_of.get(out)

    def _frames(self, port: int) -> None:
        for _ in range(FRAMES_PER_TURN):
            try:
                frame = os.read(port, DATAGRAM_BYTES_MAX)
            except BlockingIOError:
                return
            self._port_of[frame[6:12]] = port
            known = self._port_of.get(frame[:6])
            to = [known] if known is not None else [p for p in self._ports if p != port]
            for out in to:
                if not self._is_lost() and self._crosses(port, out):
                    self._later(lambda out=out, frame=frame: _try_write(out, frame))

    def _close(self) -> None:
        for port in self._ports:
            os.close(port)
        for place in self._places:
            _ip("netns", "delete", place.namespace)


def _udp(address: tuple[str, int]) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    bound.bind(address)
    bound.setblocking(False)
    return bound


def _datagrams(bound: socket.socket) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """What is there now, a turn's worth at most."""
    for _ in range(FRAMES_PER_TURN):
        try:
            yield bound.recvfrom(DATAGRAM_BYTES_MAX)
        except OSError:  # nothing there, or nobody at the other end: a datagram may be lost
            return


def _try_send(bound: socket.socket, data: bytes, to: tuple[str, int]) -> None:
    try:
        bound.sendto(data, to)
    except OSError:
        return  # nobody there: a datagram may be lost


def _try_write(port: int, frame: bytes) -> None:
    try:
        os.write(port, frame)
    except OSError:
        return  # the interface is down, or its queue is full: a frame may be lost


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
