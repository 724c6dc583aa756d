"""What each peer says it has and wants: merge, expiry, demand, and when to speak ourselves.

An advert is signed by its author and numbered; a receiver keeps the newest and counts its life
by its own clock. When our connections to a peer die its advert goes at once, and nothing that a
third party relays brings it back: only the peer itself does, by connecting again.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from msgspec.structs import replace

from meshnode.errors import RemoteProtocolError
from meshnode.identity import PeerId, Signed
from meshnode.messages import (
    ADVERT_BYTES_MAX,
    LINKS_MAX,
    MODELS_MAX,
    SESSION_HASH_BYTES,
    SESSIONS_MAX,
    Advert,
    Demand,
    Link,
    Offer,
    decode,
    is_model_name,
)

ADVERT_TTL_S = 150
"""Two and a half periods: one lost advert does not make a live peer vanish."""
PERIOD_S = 60.0
CHANGE_MIN_INTERVAL_S = 1.0
"""At most one advert a second and node: each costs every peer about 20 ms of CPU (measured)."""
LOAD_INTERVAL_PER_PEER_S = 0.2
"""For mere load and chats, which change all the time: hearing everybody then costs a node a tenth
of a core however large the mesh is. A model that comes or goes is told at once."""
CHANGE_RATIO = 0.2
"""A load figure that moved by less than a fifth is not news."""
DEMAND_HALF_LIFE_S = 120.0
DEMAND_STEP_PER_S = math.log(2) / DEMAND_HALF_LIFE_S
"""What one request adds to the average."""
DEMAND_FLOOR_PER_S = 1e-4
SESSIONS_TOLD_MAX = 4 * SESSIONS_MAX
"""Of all models together, 8 KiB; the fullest legal advert is then half as long as the bound."""
PEERS_MAX = 4096


class Verdict(Enum):
    """What became of a received advert; gossip passes on everything that is not REFUSED."""

    NEWS = "news"
    OLD = "old"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Node:
    """What this node is made of; it does not change while it runs."""

    memory_bytes: int
    cores: int
    accelerator: str


@dataclass(frozen=True, slots=True)
class _Held:
    advert: Advert
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Count:
    """Requests per second for one model, averaged, when last counted."""

    asked: float
    refused: float
    at: float


class AdvertBook:
    """Our own advert and the newest of everyone else; a sans-IO core."""

    def __init__(
        self,
        mesh_id: str,
        own: PeerId,
        node: Node,
        open_advert: Callable[[bytes], Signed],
        rng: random.Random,
        first_sequence: int,
    ) -> None:
        """`first_sequence` must exceed every number this identity has used before."""
        self._mesh_id = mesh_id
        self._own = own
        self._node = node
        self._open = open_advert
        self._rng = rng
        self._sequence = first_sequence
        self._held: dict[PeerId, _Held] = {}
        self._sequences: dict[PeerId, int] = {}
        self._lost: dict[PeerId, None] = {}
        self._expires_at = math.inf  # no advert that we hold expires before
        self._offers: tuple[Offer, ...] = ()
        self._links: tuple[Link, ...] = ()
        self._said: tuple[Offer, ...] | None = None
        self._spoke_at = -math.inf
        self._speak_at: float | None = None
        self._demand: dict[str, _Count] = {}
        self.refused: Counter[str] = Counter()

    # --- others ---------------------------------------------------------------------------------

    def receive(self, envelope: bytes, now: float) -> Verdict:
        """Merge somebody's advert, if it is legal and newer than what we hold."""
        if len(envelope) > ADVERT_BYTES_MAX:
            return self._refuse("too large")
        try:
            signed = self._open(envelope)
        except RemoteProtocolError:
            return self._refuse("forged")
        try:
            advert = decode(signed.payload, Advert)
        except RemoteProtocolError:
            return self._refuse("malformed")
        author = signed.signer
        if advert.mesh != self._mesh_id:
            return self._refuse("foreign mesh")
        last = self._sequences.get(author, -1)
        if author == self._own or advert.sequence == last:
            return Verdict.OLD
        if advert.sequence < last:
            # Refused and counted, but no fault of who brought it: gossip reorders.
            self.refused["rolled back"] += 1
            return Verdict.OLD
        if author in self._lost:
            # Legal, and perhaps true for others: pass it on, but do not believe it here.
            return Verdict.OLD
        if author not in self._held and len(self._held) >= PEERS_MAX:
            return self._refuse("no room")
        self._sequences[author] = advert.sequence
        self._held[author] = _Held(advert, now + advert.ttl_s)
        self._expires_at = min(self._expires_at, now + advert.ttl_s)
        return Verdict.NEWS

    def connected(self, peer: PeerId) -> None:
        """The peer itself is here: its words count again."""
        self._lost.pop(peer, None)

    def lose(self, peer: PeerId) -> None:
        """Our connections to the peer died: it can serve nothing that we could ask for."""
        self._held.pop(peer, None)
        if len(self._lost) >= PEERS_MAX:
            del self._lost[next(iter(self._lost))]
        self._lost[peer] = None

    def view(self) -> dict[PeerId, Advert]:
        """The live adverts of all other peers."""
        return {peer: held.advert for peer, held in self._held.items()}

    # --- ourselves ------------------------------------------------------------------------------

    def offer(self, offers: tuple[Offer, ...], now: float) -> None:
        """What we have now; said at once if it is news, else with the next period."""
        self._offers = _bounded(offers[:MODELS_MAX])
        if self._said is None or _is_other(self._said, self._offers):
            self._speak_by(max(now, self._spoke_at + CHANGE_MIN_INTERVAL_S))
        elif _is_news(self._said, self._offers):
            pause_s = max(CHANGE_MIN_INTERVAL_S, LOAD_INTERVAL_PER_PEER_S * len(self._held))
            self._speak_by(max(now, self._spoke_at + pause_s))

    def measure(self, links: tuple[Link, ...]) -> None:
        """How far the others are; said with whatever is said next."""
        self._links = links[:LINKS_MAX]

    def speak_again(self, now: float) -> None:
        """Say it all once more, soon: some may have let go of what we said."""
        self._speak_by(now + CHANGE_MIN_INTERVAL_S)

    def count_demand(self, model: str, now: float) -> None:
        """A client asked this gateway for `model`, whether or not anybody serves it.

        A name that no model can have is nobody's demand, and peers would refuse to hear it.
        """
        model = model.partition("@")[0]
        if not is_model_name(model):
            return
        if model not in self._demand and len(self._demand) >= MODELS_MAX:
            weakest = min(self._demand, key=lambda name: self._counted(name, now).asked)
            del self._demand[weakest]
        count = self._counted(model, now)
        self._demand[model] = _Count(count.asked + DEMAND_STEP_PER_S, count.refused, now)

    def count_refused(self, model: str, now: float) -> None:
        """A request that was counted found every replica of `model` full."""
        if model in self._demand:
            count = self._counted(model, now)
            self._demand[model] = _Count(count.asked, count.refused + DEMAND_STEP_PER_S, now)

    def demand(self, now: float) -> tuple[Demand, ...]:
        """Our own demand; EWMAs whose sums over all gateways are the mesh's."""
        counts = ((name, self._counted(name, now)) for name in self._demand)
        return tuple(
            Demand(name, count.asked, count.refused)
            for name, count in counts
            if count.asked >= DEMAND_FLOOR_PER_S
        )

    def fresh(self, now: float) -> Advert:
        """Our advert under a number of its own, for gossip or for a peer that has just come.

        Even if nothing has changed: whoever lost us has let go of the last one, and takes no
        number twice.
        """
        self._sequence += 1
        return self.own(now)

    def own(self, now: float) -> Advert:
        """What we would say of ourselves now, under the last number used: to read, not to send."""
        return Advert(
            mesh=self._mesh_id,
            sequence=self._sequence,
            ttl_s=ADVERT_TTL_S,
            offers=self._offers,
            demand=self.demand(now),
            memory_bytes=self._node.memory_bytes,
            cores=self._node.cores,
            accelerator=self._node.accelerator,
            links=self._links,
        )

    def tick(self, now: float) -> Advert | None:
        """Our advert, if it is time to gossip it; also lets expired ones go."""
        if self._expires_at <= now:
            self._expire(now)
        if self._speak_at is None or self._speak_at > now:
            return None
        self._said = self._offers
        self._spoke_at = now
        self._speak_at = now + PERIOD_S * self._rng.uniform(0.75, 1.25)
        return self.fresh(now)

    def deadline(self) -> float | None:
        at = self._expires_at if self._speak_at is None else min(self._expires_at, self._speak_at)
        return None if at == math.inf else at

    def _expire(self, now: float) -> None:
        self._held = {peer: held for peer, held in self._held.items() if held.expires_at > now}
        self._expires_at = min((held.expires_at for held in self._held.values()), default=math.inf)

    def _refuse(self, reason: str) -> Verdict:
        self.refused[reason] += 1
        return Verdict.REFUSED

    def _speak_by(self, at: float) -> None:
        self._speak_at = at if self._speak_at is None else min(self._speak_at, at)

    def _counted(self, model: str, now: float) -> _Count:
        """What has been counted of a model, as much as is left of it by now."""
        count = self._demand.get(model, _Count(0.0, 0.0, now))
        left = math.exp2(-(now - count.at) / DEMAND_HALF_LIFE_S)
        return _Count(count.asked * left, count.refused * left, now)


def _bounded(offers: tuple[Offer, ...]) -> tuple[Offer, ...]:
    """With the most recent sessions of each, as many as one advert can tell."""
    share = SESSION_HASH_BYTES * min(SESSIONS_MAX, SESSIONS_TOLD_MAX // max(len(offers), 1))
    return tuple(replace(offer, sessions=offer.sessions[-share:]) for offer in offers)


def _is_other(said: tuple[Offer, ...], offers: tuple[Offer, ...]) -> bool:
    """Whether there is another model, or one in another state."""

    def identity(offer: Offer) -> tuple[object, ...]:
        return (offer.digest, offer.name, offer.state, offer.context_tokens, offer.slots)

    return [identity(offer) for offer in said] != [identity(offer) for offer in offers]


def _is_news(said: tuple[Offer, ...], offers: tuple[Offer, ...]) -> bool:
    """Whether a listener would decide differently: another chat held, or > 20 % of load."""
    return any(_offer_is_news(old, new) for old, new in zip(said, offers, strict=True))


def _offer_is_news(old: Offer, new: Offer) -> bool:
    if old.sessions != new.sessions:
        return True  # the next turn of that chat may come through any gateway
    load_old = old.slots_busy + old.queue_depth
    load_new = new.slots_busy + new.queue_depth
    pairs = (
        (load_old, load_new, max(old.slots, 1)),
        (old.kv_tokens_free, new.kv_tokens_free, max(old.context_tokens, 1)),
        (old.prefill_tokens_per_s, new.prefill_tokens_per_s, max(old.prefill_tokens_per_s, 1.0)),
        (old.decode_tokens_per_s, new.decode_tokens_per_s, max(old.decode_tokens_per_s, 1.0)),
    )
    return any(abs(b - a) > CHANGE_RATIO * whole for a, b, whole in pairs)
