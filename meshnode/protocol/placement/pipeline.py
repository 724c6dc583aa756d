"""How a model that fits on no host is cut into stages on several: the fastest pipeline.

The least time of one token is the layers on the fastest hosts and few hops. For a given set of
hosts filling them by speed is optimal, so the search is over sets and their order: local, within a
budget of evaluations. Hosts are only seats here, with room and speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from meshnode.protocol.placement.cost import stage_us

SEATS_MAX = 48
"""The search looks at so many, and so a pipeline has no more stages."""
SEEDS_MAX = 16
"""Pipelines are grown from so many of the fastest seats."""
SEARCHES_MAX = 4
"""So many of the pipelines grown are then improved."""
EVALUATIONS_MAX = 6_000
"""Sets looked at from each start: some 50 ms in all."""
BALANCE_SLACK_PERCENT = 1
"""A pipeline may be so much slower than the fastest cut if that relieves its slowest stage."""


@dataclass(frozen=True, slots=True)
class Seat:
    """What a host offers a pipeline: `us` is what a token would cost it over all layers."""

    peer: str
    layers_max: int
    us: int


Hop = Callable[[str, str], int]
"""Microseconds between two peers, the same both ways."""
Stages = tuple[tuple[str, int], ...]
"""Peers in the order of the layers, and how many each has."""
Ring = tuple[int, ...]
"""Places in a list of seats, in pipeline order; the last is followed by the first."""


def fastest(seats: Iterable[Seat], layers: int, hop: Hop) -> Stages | None:
    """The pipeline with the least time a token that the search finds; None if the room is short."""
    usable = by_speed(seat for seat in seats if seat.layers_max > 0)
    chosen = shortlist(usable, SEATS_MAX)
    if sum(seat.layers_max for seat in chosen) < layers:
        roomy = sorted(usable, key=lambda seat: (-seat.layers_max, seat.us, seat.peer))
        chosen = by_speed(roomy[:SEATS_MAX])
    search = Search(chosen, layers, hop)
    starts = sorted(set(search.starts()), key=lambda ring: (search.cost(ring), ring))
    rings = [search.improve(ring) for ring in starts[:SEARCHES_MAX]]
    if not rings:
        return None
    best = min(rings, key=lambda ring: (search.cost(ring), len(ring), ring))
    return in_order(search.seats, best, _balanced(search.seats, best, layers))


def by_speed(seats: Iterable[Seat]) -> list[Seat]:
    return sorted(seats, key=lambda seat: (seat.us, seat.peer))


def shortlist(seats: list[Seat], count: int) -> list[Seat]:
    """So many worth looking at: two thirds the fastest, the others the largest of the rest."""
    fast = seats[: count * 2 // 3]
    rest = sorted(seats[len(fast) :], key=lambda seat: (-seat.layers_max, seat.us, seat.peer))
    return by_speed(fast + rest[: count - len(fast)])


class Search:
    """Over rings of seats that are sorted by speed, so that `sorted(ring)` is the order to fill."""

    def __init__(self, seats: list[Seat], layers: int, hop: Hop) -> None:
        self.seats = seats
        self.layers = layers
        self._hop = hop
        self._hops: dict[tuple[int, int], int] = {}

    def hop(self, one: int, other: int) -> int:
        if one == other:
            return 0
        key = (one, other) if one < other else (other, one)
        if key not in self._hops:
            self._hops[key] = self._hop(self.seats[one].peer, self.seats[other].peer)
        return self._hops[key]

    def cost(self, ring: Ring) -> int:
        """Microseconds a token; `ring` has room and no idle seat."""
        compute = self.fill_us(ring)
        assert compute is not None
        return compute + self.length(ring)

    def length(self, ring: Ring) -> int:
        return sum(self.hop(ring[i - 1], ring[i]) for i in range(len(ring)))

    def fill_us(self, members: Iterable[int]) -> int | None:
        """The layers' time if the fastest are filled first; None if short of room or one idle."""
        left, total = self.layers, 0
        for place in sorted(members):
            if left == 0:
                return None
            seat = self.seats[place]
            taken = min(seat.layers_max, left)
            total += stage_us(seat.us, taken, self.layers)
            left -= taken
        return total if left == 0 else None

    def insertion(self, ring: Ring, place: int) -> tuple[int, int]:
        """How much longer `ring` gets with `place` where it fits best, and where that is."""
        if not ring:
            return 0, 0
        return min(
            (
                self.hop(ring[i - 1], place)
                + self.hop(place, ring[i])
                - self.hop(ring[i - 1], ring[i]),
                i,
            )
            for i in range(len(ring))
        )

    # --- where to start ---------------------------------------------------------------------

    def starts(self) -> Iterator[Ring]:
        """Fastest first, largest first, and grown around each of the fastest."""
        places = range(len(self.seats))
        by_room = sorted(places, key=lambda place: (-self.seats[place].layers_max, place))
        for order in (places, by_room):
            if (ring := self._filled(order)) is not None:
                yield ring
        for seed in places[:SEEDS_MAX]:
            if (ring := self._grown(seed)) is not None:
                yield ring

    def _filled(self, order: Iterable[int]) -> Ring | None:
        ring: Ring = ()
        room = 0
        for place in order:
            if room >= self.layers:
                break
            ring = self._with(ring, place)
            room += self.seats[place].layers_max
        return self._trimmed(ring) if room >= self.layers else None

    def _grown(self, seed: int) -> Ring | None:
        """From `seed`, always by the seat whose layers cost least, the detour included."""
        ring: Ring = (seed,)
        left = self.layers - self.seats[seed].layers_max
        others = [place for place in range(len(self.seats)) if place != seed]
        while left > 0 and others:
            best = min(others, key=lambda place: (self._us_per_layer(ring, place, left), place))
            ring = self._with(ring, best)
            others.remove(best)
            left -= self.seats[best].layers_max
        return self._trimmed(ring) if left <= 0 else None

    def _us_per_layer(self, ring: Ring, place: int, left: int) -> int:
        seat = self.seats[place]
        taken = min(seat.layers_max, left)
        return (stage_us(seat.us, taken, self.layers) + self.insertion(ring, place)[0]) // taken

    def _trimmed(self, ring: Ring) -> Ring:
        """Without the slow seats that the faster ones leave nothing to."""
        while self.fill_us(ring) is None:
            slowest = max(ring)
            ring = tuple(place for place in ring if place != slowest)
        return ring

    def ring(self, places: Iterable[int]) -> Ring:
        """A short ring through `places`."""
        ring: Ring = ()
        for place in places:
            ring = self._with(ring, place)
        return self._reordered(ring)

    def _with(self, ring: Ring, place: int) -> Ring:
        where = self.insertion(ring, place)[1]
        return (*ring[:where], place, *ring[where:])

    # --- better sets, better order ----------------------------------------------------------

    def improve(self, ring: Ring) -> Ring:
        """Drop, add, exchange or reorder while that helps and the budget lasts."""
        left = EVALUATIONS_MAX
        ring = self._reordered(ring)
        cost = self.cost(ring)
        while left > 0:
            best_cost, best = cost, ring
            for without, place in self._neighbours(ring):
                left -= 1
                members = without if place is None else (*without, place)
                compute = self.fill_us(members)
                if compute is None or compute >= best_cost:
                    continue
                length = self.length(without)
                where = 0
                if place is not None:
                    more, where = self.insertion(without, place)
                    length += more
                if compute + length < best_cost:
                    best_cost = compute + length
                    best = without
                    if place is not None:
                        best = (*without[:where], place, *without[where:])
                if left <= 0:
                    break
            if best == ring:
                break
            ring = self._reordered(best)
            cost = self.cost(ring)
        return ring

    def _neighbours(self, ring: Ring) -> Iterator[tuple[Ring, int | None]]:
        """A ring with one seat less or none, and the place that then joins."""
        others = [place for place in range(len(self.seats)) if place not in ring]
        for place in others:
            yield ring, place
        for i in range(len(ring)):
            without = ring[:i] + ring[i + 1 :]
            yield without, None
            yield without, ring[i]
            for place in others:
                yield without, place

    def _reordered(self, ring: Ring) -> Ring:
        """Two-opt: turn a stretch round while that makes the ring shorter."""
        length = self.length(ring)
        found = True
        while found:
            found = False
            for i in range(1, len(ring) - 1):
                for j in range(i + 1, len(ring)):
                    turned = ring[:i] + ring[i : j + 1][::-1] + ring[j + 1 :]
                    if (shorter := self.length(turned)) < length:
                        ring, length, found = turned, shorter, True
        return ring


# --- cutting for one set -------------------------------------------------------------------------


def fill(seats: Sequence[Seat], layers: int, stage_us_max: int | None = None) -> list[int] | None:
    """Layers for each seat, the fastest first (`seats` are sorted so); None if short of room."""
    counts = []
    left = layers
    for seat in seats:
        taken = min(seat.layers_max, left)
        if stage_us_max is not None:
            taken = min(taken, stage_us_max * layers // seat.us)
        counts.append(taken)
        left -= taken
    return counts if left == 0 else None


def _fill_us(seats: Sequence[Seat], counts: Sequence[int], layers: int) -> int:
    return sum(stage_us(seat.us, n, layers) for seat, n in zip(seats, counts, strict=True))


def _balanced(seats: Sequence[Seat], ring: Ring, layers: int) -> dict[int, int]:
    """Layers by place: nearly the least time in all, and then the fastest slowest stage."""
    places = sorted(ring)
    members = [seats[place] for place in places]
    greedy = fill(members, layers)
    assert greedy is not None
    allowed = _fill_us(members, greedy, layers) * (100 + BALANCE_SLACK_PERCENT) // 100
    low, high = (
        0,
        max(stage_us(seat.us, n, layers) for seat, n in zip(members, greedy, strict=True)),
    )
    best = greedy
    while low + 1 < high:  # a tighter bound never makes the cut faster in all
        middle = (low + high) // 2
        counts = fill(members, layers, middle)
        if counts is not None and _fill_us(members, counts, layers) <= allowed:
            best, high = counts, middle
        else:
            low = middle
    return dict(zip(places, best, strict=True))


def in_order(seats: Sequence[Seat], ring: Ring, counts: dict[int, int]) -> Stages:
    """In ring order from the fastest seat; of both directions the one by peer id."""
    used = [place for place in ring if counts[place] > 0]
    start = used.index(min(used))
    onward = used[start:] + used[:start]
    backward = onward[:1] + onward[:0:-1]
    ways = [
        tuple((seats[place].peer, counts[place]) for place in way) for way in (onward, backward)
    ]
    return min(ways)
