"""The protocol cores: sans-IO state machines that decide, and never do.

A core takes messages and the time and returns effects, in the order they must be performed. It
imports no trio, socket, file or clock and draws no global randomness, so the Trio driver and the
simulator run the very same code. Cores do not import each other; what wires them does.

* `records.py`    who exists and where: signed, sequenced, expiring node records
* `discovery.py`  whom to dial and when
* `liveness.py`   who is alive: connections, heartbeats, refutable rumours
* `adverts.py`    what each peer says it has and wants: merge, expiry, demand, when to speak
* `dispatch.py`   which replica answers a request, and why

Deciding who owns what, from the bottom up:

* `quorum.py`     what votes and certificates prove, checked offline
* `consensus.py`  one group's register: votes, views, voters
* `lease.py`      exclusive rights: promises and how long to rely on them
* `demand.py`     how many replicas a model deserves
* `placement/`    where they should be: a pure plan with reasons
* `words.py`      the signed words that blocks stand on
* `rules.py`      what a block may say
* `draft.py`      the next step from what is towards what is planned
* `facts.py`      what a plan is made from
* `group.py`      one group as a node lives it; `overview.py` the same for people
* `agreement.py`  all groups of a node: messages in, duties out

* `stack.py`      everything behind one `receive`, `tick` and `deadline`

Rules that keep runs repeatable: commands enter by the same inbox as messages; nothing iterates a
set where the order could reach an effect; randomness is a `random.Random` argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from meshnode.identity import PeerId
from meshnode.messages import Control

__all__ = [
    "Connect",
    "Core",
    "Disconnect",
    "DutiesChanged",
    "Duty",
    "Effect",
    "Emit",
    "Event",
    "Input",
    "MemberJoined",
    "MemberLost",
    "Persist",
    "Publish",
    "PublishRecord",
    "Send",
]


# --- effects: what the driver must do ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Queue a control message to a connected peer; dropped if it is gone, never waited for."""

    peer: PeerId
    message: Control


@dataclass(frozen=True, slots=True)
class Connect:
    """Dial a peer. The driver answers with `stack.Connected` or `stack.DialFailed`."""

    peer: PeerId
    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close every connection to a peer, after what was sent to it before has left."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Gossip a signed advert to the mesh."""

    advert: bytes


@dataclass(frozen=True, slots=True)
class Persist:
    """Keep `data` under `name` so that a crash cannot lose it, before any later effect is
    performed: a vote that is sent must never be forgotten."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class PublishRecord:
    """Put our own signed node record into the DHT and announce the models it names."""

    record: bytes
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """A connected peer has shown a valid certificate: it may use member protocols now."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class MemberLost:
    """A member's last connection is gone; whatever was asked of it has failed."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Duty:
    """A model that this node owns: all of it (`load`), or the layers of `parts`, as (first, end);
    otherwise it would take it over (keep its file at hand)."""

    model: str
    load: bool
    parts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class DutiesChanged:
    """What the groups want of this node now. A model that is not named, nobody wants here, or
    nobody knows of yet. `is_drained`: an operator wants nothing to run here at all."""

    duties: tuple[Duty, ...]
    is_drained: bool


Event = MemberJoined | MemberLost | DutiesChanged


@dataclass(frozen=True, slots=True)
class Emit:
    """Tell the rest of the node."""

    event: Event


Effect = Send | Connect | Disconnect | Publish | PublishRecord | Persist | Emit


class Core(Protocol):
    """What drives and is driven alike: the Trio driver and the simulator know only this."""

    def receive(self, sender: PeerId, message: Input, now: float) -> list[Effect]:
        """Take one message or command. `now` is seconds on the caller's monotonic clock."""
        ...

    def tick(self, now: float) -> list[Effect]:
        """Do what time demands. Harmless when early."""
        ...

    def deadline(self) -> float | None:
        """When `tick` has work next, on the same clock; None for never."""
        ...


Input = object
"""A `messages.Control` from the network or one of the commands in `stack.py`."""
