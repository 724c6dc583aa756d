"""How several pipelines of a model share the hosts: for throughput.

As many as are wanted, if they can be; then the most tokens of many requests together, each cut so
that its slowest stage is as fast as can be. Local search within a budget of evaluations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations

from meshnode.protocol.placement.cost import MICROTOKENS
from meshnode.protocol.placement.pipeline import (
    Hop,
    Search,
    Seat,
    Stages,
    by_speed,
    fill,
    in_order,
    shortlist,
)

STAGES_MAX = 8
"""Of each of several pipelines: another stage adds rate, but it is one more hop for every token
and one more host that all the others fail with."""
EVALUATIONS_MAX = 3_000
"""Exchanges looked at from each start: some 50 ms in all."""
BOTTLENECK_STEPS = 1000
"""How finely the time of the slowest stage is told: measured times are no better."""


def widest(seats: Iterable[Seat], layers: int, hop: Hop, count: int) -> list[Stages]:
    """Up to `count` pipelines, and as many as possible; then the most tokens altogether."""
    usable = by_speed(seat for seat in seats if seat.layers_max > 0)
    room = sum(seat.layers_max for seat in usable)
    for number in range(min(count, room // layers), 0, -1):
        groups = _Grouping(shortlist(usable, number * STAGES_MAX), layers).search(number)
        if groups is not None:
            return [_ordered(group, layers, hop) for group in groups]
    return []


_Merit = tuple[int, int]
"""Layers that are missing, negative, and then millionths of tokens a second."""


class _Grouping:
    """Over ways to share out seats over a number of pipelines."""

    def __init__(self, seats: list[Seat], layers: int) -> None:
        self._seats = seats
        self._layers = layers
        self._merits: dict[frozenset[Seat], _Merit] = {}

    def search(self, number: int) -> list[list[Seat]] | None:
        """The best sharing out over so many that all have room; None if none was found."""
        by_room = sorted(self._seats, key=lambda seat: (-seat.layers_max, seat.us, seat.peer))
        starts = [
            self._dealt(by_room, number),
            self._dealt(self._seats, number),
            self._in_turn(self._seats, number),
            self._in_turn(self._seats[::-1], number),
        ]
        found = [self._exchanged(groups) for groups in starts]
        best = max(found, key=self._total)
        return best if self._total(best)[0] == 0 else None

    def _total(self, groups: list[list[Seat]]) -> _Merit:
        return _sum(self._merit(group) for group in groups)

    def _merit(self, group: Sequence[Seat]) -> _Merit:
        members = frozenset(group)
        if members not in self._merits:
            bottleneck = _bottleneck_us(group, self._layers)
            if bottleneck is None:
                merit = (sum(seat.layers_max for seat in group) - self._layers, 0)
            else:
                merit = (0, MICROTOKENS // bottleneck)
            self._merits[members] = merit
        return self._merits[members]

    def _dealt(self, order: Sequence[Seat], number: int) -> list[list[Seat]]:
        """Each seat to the pipeline with the least room, or if all have enough, the least rate."""
        groups: list[list[Seat]] = [[] for _ in range(number)]
        for seat in order:
            open_ = [i for i in range(number) if len(groups[i]) < STAGES_MAX]
            least = min(open_, key=lambda i: (self._merit(groups[i]), i))
            groups[least].append(seat)
        return groups

    def _in_turn(self, order: Sequence[Seat], number: int) -> list[list[Seat]]:
        """One pipeline after the other until it has room, so that like speeds work together."""
        groups: list[list[Seat]] = [[] for _ in range(number)]
        i = 0
        for seat in order:
            full = self._merit(groups[i])[0] == 0 or len(groups[i]) == STAGES_MAX
            if full and i + 1 < number:
                i += 1
            least = min(range(number), key=lambda j: len(groups[j]))
            groups[i if len(groups[i]) < STAGES_MAX else least].append(seat)
        return groups

    def _exchanged(self, groups: list[list[Seat]]) -> list[list[Seat]]:
        """Moves and swaps of seats between two pipelines while they help and the budget lasts."""
        left = EVALUATIONS_MAX
        found = True
        while found:
            found = False
            for a, b in permutations(range(len(groups)), 2):
                now = _sum((self._merit(groups[a]), self._merit(groups[b])))
                for one, other in _exchanges(groups[a], groups[b], swaps=a < b):
                    if left == 0:
                        return groups
                    left -= 1
                    if _sum((self._merit(one), self._merit(other))) > now:
                        groups[a], groups[b] = one, other
                        found = True
                        break
        return groups


def _exchanges(
    one: list[Seat], other: list[Seat], *, swaps: bool
) -> Iterator[tuple[list[Seat], list[Seat]]]:
    """One seat of `one` goes over, or, if `swaps`, is exchanged for one of `other`."""
    for i, seat in enumerate(one):
        rest = one[:i] + one[i + 1 :]
        if len(other) < STAGES_MAX:
            yield rest, [*other, seat]
        if swaps:
            for j, back in enumerate(other):
                yield [*rest, back], [*other[:j], *other[j + 1 :], seat]


def _sum(merits: Iterable[_Merit]) -> _Merit:
    missing, rates = zip(*merits, strict=True)
    return sum(missing), sum(rates)


def _bottleneck_us(group: Sequence[Seat], layers: int) -> int | None:
    """A time in which the slowest stage can be done, within a thousandth of the least; None if
    the room is short."""
    if sum(seat.layers_max for seat in group) < layers:
        return None
    low, high = 0, max(seat.us for seat in group)
    while low + 1 + high // BOTTLENECK_STEPS < high:
        middle = (low + high) // 2
        room = 0
        for seat in group:
            room += min(seat.layers_max, middle * layers // seat.us)
        if room >= layers:
            high = middle
        else:
            low = middle
    return high


def _ordered(group: list[Seat], layers: int, hop: Hop) -> Stages:
    """Cut for its slowest stage, in the order of the shortest ring that is found."""
    members = by_speed(group)
    counts = fill(members, layers, _bottleneck_us(members, layers))
    assert counts is not None
    used = [(seat, n) for seat, n in zip(members, counts, strict=True) if n > 0]
    search = Search([seat for seat, _ in used], layers, hop)
    ring = search.ring(range(len(used)))
    return in_order(search.seats, ring, dict(enumerate(n for _, n in used)))
