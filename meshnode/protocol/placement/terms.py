"""The words of placement: what a plan depends on, and what it says.

Sizes are bytes, times microseconds, all of them integers. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PPM = 1_000_000


@dataclass(frozen=True, slots=True)
class Model:
    """What a model costs. `weight_bytes` are spread evenly over `layers`.

    Where a model may be cut only at some of its layers, `layers` counts what lies between, and
    `cut_every` so many layers are one; the last has what is left of `depth`, all layers.

    `kv_bytes_per_token` over all layers; a replica keeps `context_tokens` of it, all slots
    together; `compute_bytes` is the scratch that every part of it needs once.
    """

    digest: str
    name: str
    weight_bytes: int
    layers: int
    kv_bytes_per_token: int
    context_tokens: int
    compute_bytes: int
    activation_bytes: int = 0
    """What crosses between two stages per token."""
    cut_every: int = 1
    depth: int = 0

    def layer(self, unit: int) -> int:
        """The layer that a unit begins with, or where the last ends."""
        return self.depth or unit if unit == self.layers else unit * self.cut_every


@dataclass(frozen=True, slots=True)
class Holding:
    """One model on one host. `bytes`: what a whole replica takes there, as that host estimates.

    `decode_us_per_token`: measured there, 0 if not yet. `cuts`: it can run a part of it there.
    """

    state: Literal["file", "ready", "failed"]
    wanted: bool
    bytes: int
    decode_us_per_token: int = 0
    cuts: bool = True


@dataclass(frozen=True, slots=True)
class Host:
    """One node that may own something. `us_per_gb`: its time to read 10^9 bytes of weights once,
    which is what a decoded token costs it; measured, or estimated from its measured models.

    `load_bytes_per_s`: how fast a model comes into memory. `stages`: it can run layer stages.
    """

    peer: str
    memory_bytes: int
    us_per_gb: int
    load_bytes_per_s: int
    holdings: Mapping[str, Holding]
    stages: bool = False
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Way:
    """The measured way between two hosts; `bytes_per_s` 0 if only the RTT is known."""

    rtt_us: int
    bytes_per_s: int = 0


@dataclass(frozen=True, slots=True)
class Want:
    """How much of a model is wanted: replicas by demand, and where an operator pinned it."""

    replicas: int
    """At least this many, if they fit; 1 keeps a model served that nobody asks for now. Several
    pipelines of a model that must be cut are cut for throughput, one alone for its latency."""
    pins: tuple[str, ...] = ()
    weight: int = 1
    """Its requests per 1000 s: models compete for scarce memory by it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Units `first` to `end` of a model on `owner`; the whole model if it is alone."""

    owner: str
    first: int
    end: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Replica:
    """One complete copy, in pipeline order, and who would take over which part."""

    model: str
    parts: tuple[Part, ...]
    standbys: tuple[tuple[str, ...], ...] = ()
    """For each part the peers that would take it over, best first."""
    number: int = -1
    """Which of the current replicas this is, though lost parts may have new owners; -1 for a new
    one, which the current ones outlive until it is ready."""


@dataclass(frozen=True, slots=True)
class Problem:
    """All that a plan depends on. Mappings are read in sorted order.

    A model without a `Want` is wanted once. Memory that a host spends on something that is neither
    in `current` nor to be kept must be taken off its `memory_bytes` by the caller.
    """

    models: Mapping[str, Model]
    hosts: Mapping[str, Host]
    wants: Mapping[str, Want]
    ways: Mapping[tuple[str, str], Way] = field(default_factory=dict)
    current: tuple[Replica, ...] = ()
    default_way: Way = Way(rtt_us=50_000, bytes_per_s=2_000_000)
    """For pairs that nobody has measured: a home connection; used in predictions only."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a host is in or out of a model's replicas, in words for people."""

    model: str
    peer: str
    included: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one replica would do, in microseconds a token and thousandths of tokens a second.

    The first is one request's; the second is that of many at once: the slowest stage sets it.
    """

    model: str
    owners: tuple[str, ...]
    us_per_token: int
    millitokens_per_s: int
    best_single_us_per_token: int
    """The fastest host that could hold all of it alone; 0 if none can."""
    note: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas of all models, in a stable order, and the reasons."""

    replicas: tuple[Replica, ...]
    verdicts: tuple[Verdict, ...]
    predictions: tuple[Prediction, ...]
    missing: tuple[tuple[str, str], ...]
    """Models that cannot be placed at all, each with what would fix it."""
    postponed: int = 0
    """Loads that would help but wait for a later plan; at 0 planning again changes nothing."""
