"""How a model that fits on no host is cut into stages on several.

Two aims. `fastest`: the least time of one token, which is the layers on the fastest hosts and few
hops; for a given set of hosts filling them by speed is optimal, so the search is over sets and
their order. `widest`: the most tokens of many requests together, from several pipelines that share
no host, each cut so that its slowest stage is as fast as can be.

Local search with a budget of evaluations. It does not know hosts, only seats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from meshnode.protocol.placement.cost import MICROTOKENS, stage_us, up

SEATS_MAX = 48
"""`fastest` looks at so many: two thirds the fastest, the rest the largest of the others."""
SEEDS_MAX = 16
"""Pipelines are grown from so many of the fastest seats."""
SEARCHES_MAX = 4
"""So many of the pipelines grown are then improved."""
FAST_EVALUATIONS_MAX = 6_000
"""Sets looked at in one search of `fastest`: about 50 ms."""
WIDE_EVALUATIONS_MAX = 3_000
"""Exchanges looked at in one search of `widest`: about 0.1 s."""
BALANCE_SLACK_PERCENT = 1
"""A pipeline may be so much slower than the fastest cut if its slowest stage gains by that."""


@dataclass(frozen=True, slots=True)
class Seat:
    """What a host offers a pipeline: `us` is what a token would cost it over all layers."""

    peer: str
    layers_max: int
    us: int


type Hop = Callable[[str, str], int]
"""Microseconds between two peers, the same both ways."""
type Stages = tuple[tuple[str, int], ...]
"""Peers in the order of the layers, and how many each has."""
