"""How far machines are from each other.

Three models, from the most real to the most regular: round-trip times measured between 490
PlanetLab sites, a table of six regions, and points on a plane. Each places a machine by a stream
of its own, so a machine more moves nobody. Percentiles of round-trip times are given where they
are a property of the model; `tests/simulations/test_latency.py` holds the models to them.
"""

from __future__ import annotations

import lzma
import math
from array import array
from collections.abc import Iterable
from importlib.resources import files

from meshnode_simulations.kernel.network import Latency
from meshnode_simulations.kernel.streams import stream

NS_PER_MS = 1_000_000
LOCAL_RTT_MS = 0.5
"""Two machines of one site or place: a switch, a router and two busy kernels between them."""


class PlanetLab:
    """Measured: 490 sites of universities and institutes the world over, all pairs.

    Round trips between sites, p5/p50/p95: 19.3/135/325 ms. Several machines may share a site.
    """

    SITES = 490
    _UNIT_NS = 50_000

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._one_way_ns = _planetlab_one_way_ns(self.SITES, self._UNIT_NS)
        self._sites: list[int] = []

    def site(self, machine: int) -> int:
        """Where a machine stands, 0 to 489."""
        while machine >= len(self._sites):
            placing = stream(self._seed, "site", len(self._sites))
            self._sites.append(placing.randrange(self.SITES))
        return self._sites[machine]

    def one_way_ns(self, a: int, b: int) -> int:
        sites = self._sites
        if a >= len(sites) or b >= len(sites):
            self.site(max(a, b))
        return self._one_way_ns[sites[a] * self.SITES + sites[b]]


def _planetlab_one_way_ns(sites: int, unit_ns: int) -> array[int]:
    """The whole matrix, row by row: symmetric, with `LOCAL_RTT_MS` on its diagonal."""
    packed = files("meshnode_simulations").joinpath("data/planetlab_490.xz").read_bytes()
    data = lzma.decompress(packed)
    pairs = len(data) // 2
    flat = array("q", [int(LOCAL_RTT_MS * NS_PER_MS) // 2]) * (sites * sites)
    pair = 0
    for row in range(sites):
        for column in range(row + 1, sites):
            one_way_ns = (data[pair] << 8 | data[pairs + pair]) * unit_ns // 2
            flat[row * sites + column] = flat[column * sites + row] = one_way_ns
            pair += 1
    return flat


class Regions:
    """Six regions, and between them one figure each; small, and known from other simulators.

    The table and the shares of machines are SimBlock's for 2019 (Banno and Shudo, "Simulating a
    blockchain network with SimBlock", 2019; github dsg-titech/simblock,
    `NetworkConfiguration.java`, Apache-2.0), the shares being those of Bitcoin nodes. SimBlock
    takes the figures for one way. Here they are round trips: 124 ms is what a ping from North
    America to Europe takes. With these shares, p5/p50/p95 are 11/124/237 ms.
    """

    NAMES = ("north-america", "europe", "south-america", "asia-pacific", "japan", "australia")
    SHARES = (0.3316, 0.4998, 0.0090, 0.1177, 0.0224, 0.0195)
    RTTS_MS = (
        (32, 124, 184, 198, 151, 189),
        (124, 11, 227, 237, 252, 294),
        (184, 227, 88, 325, 301, 322),
        (198, 237, 325, 85, 58, 198),
        (151, 252, 301, 58, 12, 126),
        (189, 294, 322, 198, 126, 16),
    )

    def __init__(self, seed: int, shares: tuple[float, ...] = SHARES) -> None:
        """`shares` of the machines are in each region, in the order of `NAMES`."""
        self._seed = seed
        self._shares = shares
        self._one_way_ns = [rtt_ms * NS_PER_MS // 2 for row in self.RTTS_MS for rtt_ms in row]
        self._regions: list[int] = []

    def region(self, machine: int) -> int:
        """Where a machine stands, as a place in `NAMES`."""
        while machine >= len(self._regions):
            placing = stream(self._seed, "region", len(self._regions))
            self._regions += placing.choices(range(len(self.NAMES)), self._shares)
        return self._regions[machine]

    def one_way_ns(self, a: int, b: int) -> int:
        regions = self._regions
        if a >= len(regions) or b >= len(regions):
            self.region(max(a, b))
        return self._one_way_ns[regions[a] * len(self.NAMES) + regions[b]]


class Plane:
    """Points in a square, each behind an access link of its own: the textbook's network.

    One way is the way between two points, plus what each adds at its end: a lognormal delay, most
    of a few milliseconds and some of tens. It obeys the triangle inequality, unlike the Internet.
    With the defaults the round trips' p5/p50/p95 are 46/126/215 ms.
    """

    def __init__(
        self,
        seed: int,
        *,
        side_ms: float = 100.0,
        access_ms: float = 4.0,
        access_sigma: float = 0.8,
    ) -> None:
        """`side_ms` is the one-way time along a side; `access_ms` the median of the access delay,
        and `access_sigma` the deviation of its logarithm.
        """
        self._seed = seed
        self._side_ns = side_ms * NS_PER_MS
        self._access = (math.log(access_ms * NS_PER_MS), access_sigma)
        self._places: list[tuple[float, float, int]] = []

    def place(self, machine: int) -> tuple[float, float, int]:
        """Two coordinates and the access delay of a machine, all in nanoseconds."""
        while machine >= len(self._places):
            placing = stream(self._seed, "place", len(self._places))
            x_ns, y_ns = placing.random() * self._side_ns, placing.random() * self._side_ns
            self._places.append((x_ns, y_ns, int(placing.lognormvariate(*self._access))))
        return self._places[machine]

    def one_way_ns(self, a: int, b: int) -> int:
        if a == b:
            return int(LOCAL_RTT_MS * NS_PER_MS) // 2
        places = self._places
        if a >= len(places) or b >= len(places):
            self.place(max(a, b))
        ax, ay, a_access_ns = places[a]
        bx, by, b_access_ns = places[b]
        return int(math.hypot(ax - bx, ay - by)) + a_access_ns + b_access_ns


def rtt_percentiles_ms(
    latency: Latency, machines: int, percentiles: Iterable[int] = (5, 50, 95)
) -> tuple[float, ...]:
    """Of the round-trip times of all pairs among that many machines."""
    rtts_ns = sorted(
        2 * latency.one_way_ns(a, b) for a in range(machines) for b in range(a + 1, machines)
    )
    last = len(rtts_ns) - 1
    return tuple(rtts_ns[round(last * percent / 100)] / NS_PER_MS for percent in percentiles)


__all__ = ["NS_PER_MS", "Plane", "PlanetLab", "Regions", "rtt_percentiles_ms"]
