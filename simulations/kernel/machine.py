"""One computer: its key, address, disk and clock stay, its stack comes and goes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from meshnode.identity import PeerId, Signer
from meshnode.messages import Offer, Role
from meshnode.protocol import Event, MemberLost
from meshnode.protocol.agreement import Holding
from meshnode.protocol.stack import Stack
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.network import Access

EPOCH_S = 1_800_000_000
"""What wall clocks show when the simulation starts."""
EVENTS_KEPT = 4096
"""More than any check looks back on."""


class Clock:
    """A machine's clock that goes on in suspend; it may go wrong in rate, but not jump."""

    __slots__ = ("_rate", "_since_ns", "_since_s")

    def __init__(self) -> None:
        self._rate = 1.0
        self._since_ns = 0
        self._since_s = 0.0

    def now_s(self, time_ns: int) -> float:
        return self._since_s + (time_ns - self._since_ns) / NS_PER_S * self._rate

    def when_ns(self, now_s: float) -> int:
        """The first instant at which this clock shows `now_s` or later."""
        time_ns = self._since_ns + int((now_s - self._since_s) / self._rate * NS_PER_S)
        while self.now_s(time_ns) < now_s:
            time_ns += 1
        return time_ns

    def run_at(self, rate: float, time_ns: int) -> None:
        """From now on, show `rate` seconds for each that passes."""
        self._since_s, self._since_ns, self._rate = self.now_s(time_ns), time_ns, rate


class Link:
    """A connection of two machines: messages arrive in order, each way."""

    __slots__ = ("a", "arrivals_ns", "b", "held")

    def __init__(self, a: Machine, b: Machine) -> None:
        self.a = a
        self.b = b
        self.arrivals_ns = {a.index: 0, b.index: 0}
        """When the last message to a machine arrives: the next does not before."""
        self.held: dict[int, list[tuple[Any, ...]]] = {}
        """While a direction is clogged: what waits for a machine."""


@dataclass(eq=False, slots=True)
class Machine:
    """See the module. Machines are told apart by `index`, and by `name` for people."""

    index: int
    name: str
    key: Signer
    address: str
    chain: tuple[bytes, ...]
    roles: tuple[Role, ...]
    memory_bytes: int
    rng: random.Random
    """For what its surroundings draw; the stack has its own."""
    unix_ahead_s: float = 0.0
    """How wrong its wall clock is; that may jump."""
    clock: Clock = field(default_factory=Clock)
    stack: Stack | None = None
    starts: int = 0
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    """What its stack has emitted since it was switched on."""
    disk: dict[str, bytes] = field(default_factory=dict)
    """What it was asked to persist; survives a crash."""
    models: dict[str, tuple[Offer, Holding]] = field(default_factory=dict)
    """The model files it has, by digest: what it offers once loaded, and what that takes."""
    loaded: dict[str, None] = field(default_factory=dict)
    running: tuple[str, ...] = ()
    """The models that it has loaded or is loading."""
    parts: dict[tuple[str, int, int], bool] = field(default_factory=dict)
    """Layers (model, first, end) that it was told to load; True once it has."""
    unfetched: dict[str, None] = field(default_factory=dict)
    """Of `models`: those whose file it does not have yet."""
    heads: dict[str, None] = field(default_factory=dict)
    """Cut models that it answers for: it has their last layers, in a pipeline."""
    loads: int = 0
    """How often it has begun to load one, in all its runs."""
    is_root: bool = False
    links: dict[int, Link] = field(default_factory=dict)
    """By the other machine's index; as far as this one knows."""
    is_asleep: bool = False
    missed: list[Callable[[], None]] = field(default_factory=list)
    """What happened to it while it was asleep: it finds out when it wakes."""
    effects_left: int | None = None
    """It loses power after so many more effects, maybe in the middle of one step."""
    up: Access | None = None
    down: Access | None = None
    lag_ns: int = 0
    """A grey failure: it takes everything so much later than it arrives."""
    spins: bool = False
    """Its stack wants to be ticked for ever: a bug."""
    busy_until_ns: int = 0
    """It does not tick before."""
    armed_ns: int | None = None
    """When it will be asked next whether it is time to tick; not after its deadline."""
    armed_s: float = 0.0
    """What its own clock shows then."""

    @property
    def peer_id(self) -> PeerId:
        return self.key.peer_id

    @property
    def live(self) -> Stack:
        """Its stack. An `AssertionError` while it is switched off."""
        assert self.stack is not None, f"{self.name} is not running"
        return self.stack

    @property
    def is_awake(self) -> bool:
        return self.stack is not None and not self.is_asleep

    def serves(self, model: str) -> bool:
        """Whether it answers for a model, given by digest: all of it, or the head of a pipeline."""
        return self.is_awake and (model in self.loaded or model in self.heads)

    def unix_s(self, now_s: float) -> float:
        """What its wall clock shows when its own clock shows `now_s`."""
        return EPOCH_S + now_s + self.unix_ahead_s

    def lost(self) -> list[PeerId]:
        return [event.peer for event in self.events if isinstance(event, MemberLost)]
