"""Links with a delay, in a process of their own: clients and links share no interpreter lock.

`python -m tests.bench.split.links` obeys lines of JSON, each with an answer: `Links` writes them.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Self

from tests.e2e.lossy import BUFFER_BYTES, TcpProxy, UdpProxy, Weather
from tests.e2e.mesh import HANG_S, ROOT

Kind = Literal["udp", "tcp"]
HOST = "127.0.0.1"
TRIPS = 20


@dataclass(frozen=True)
class Link:
    """In front of one port: whoever uses `port` is delayed, each way."""

    number: int
    port: int


@dataclass(frozen=True)
class Crossed:
    """So far, both ways together. `turns`: changes of direction."""

    bytes: int = 0
    turns: int = 0

    def __add__(self, other: Crossed) -> Crossed:
        return Crossed(self.bytes + other.bytes, self.turns + other.turns)

    def __sub__(self, other: Crossed) -> Crossed:
        return Crossed(self.bytes - other.bytes, self.turns - other.turns)


class Links:
    """All links of a measurement, which have the same delay at any time; 0 to begin with."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.split.links"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # Whoever interrupts the measurement still needs links to end it.
            start_new_session=True,
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()

    def open(self, kind: Kind, port: int) -> Link:
        """A new link to `port`."""
        return Link(*self._tell({"open": kind, "port": port}))

    def delay(self, delay_s: float) -> None:
        """Of all links from now on, one way."""
        self._tell({"delay_s": delay_s})

    def crossed(self, *links: Link) -> Crossed:
        counted = self._tell({"crossed": [link.number for link in links]})
        return sum((Crossed(*each) for each in counted), Crossed())

    def _tell(self, what: dict[str, Any]) -> list[Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return list(json.loads(self._process.stdout.readline()))


def round_trip_s(links: Links) -> float:
    """What a link takes there and back now: the median of some datagrams that are sent back."""
    took_s = []
    with _udp() as far, _udp() as near:
        link = links.open("udp", far.getsockname()[1])
        for _ in range(TRIPS):
            sent_at = time.perf_counter()
            near.sendto(b"ping", (HOST, link.port))
            far.sendto(*far.recvfrom(4))
            near.recv(4)
            took_s.append(time.perf_counter() - sent_at)
    return statistics.median(took_s)


def _udp() -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.settimeout(HANG_S)
    bound.bind((HOST, 0))
    return bound


def main() -> None:
    weather = Weather(delay_s=0.0, loss=0.0)
    opened: list[UdpProxy | TcpProxy] = []
    with ExitStack() as stack:
        for line in sys.stdin:
            answer: list[Any] = []
            match json.loads(line):
                case {"open": "udp", "port": int(port)}:
                    opened.append(stack.enter_context(UdpProxy((HOST, port), weather)))
                    answer = [len(opened) - 1, opened[-1].port]
                case {"open": "tcp", "port": int(port)}:
                    link = TcpProxy((HOST, port), weather, segment_bytes=BUFFER_BYTES)
                    opened.append(stack.enter_context(link))
                    answer = [len(opened) - 1, opened[-1].port]
                case {"delay_s": delay_s}:
                    weather.delay_s = delay_s
                case {"crossed": numbers}:
                    tallies = [opened[number].tally for number in numbers]
                    answer = [[tally.bytes, tally.turns] for tally in tallies]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
