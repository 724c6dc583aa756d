"""Which replica answers a request, and why.

Weighted rendezvous hashing gives every gateway the same order of the same replicas for a session
(minimal movement on any join or leave); a cost in seconds then lets load, a known KV cache and
the network override it where that pays. What the group decided comes before both: a request goes
to a peer without the model's assignment only while no peer with it can take it. `rank` is pure;
`Dispatcher` holds the little memory a gateway needs: where its sessions went, what it has sent
that no advert shows yet, who just failed.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from meshnode.errors import NoReplicaError, UnknownModelError
from meshnode.messages import SESSION_HASH_BYTES, Offer

CANDIDATES_SCORED = 4
"""The top of the hash order; scoring everybody would let gateways drift apart (routing.md)."""
SESSIONS_REMEMBERED = 65_536
COOLDOWN_S = 5.0
"""A peer that broke a request is tried last for this long; by then its connection is known to be
dead (transport: <= 3 s) or it has answered somebody else."""
PREFILL_TOKENS_PER_S_UNMEASURED = 100.0
DECODE_TOKENS_PER_S_UNMEASURED = 10.0
ANSWER_TOKENS_EXPECTED = 128
"""Length of a typical answer, only used to turn queue depth into seconds."""
BYTES_PER_TOKEN = 4
OVERLOAD = 1.25
"""The holder of a session keeps it below this multiple of the mean load (bounded-load hashing,
Mirrokni et al. 2016, with the factor measured best on the Mooncake trace)."""
MISPLACED_S = 1.0
"""At least this much a placement off the hash must save: else the noise in measured rates and the
round-trip times, which differ between gateways, would decide where short prompts go."""
RETRY_AFTER_LOADING_S = 2.0
RETRY_AFTER_NOBODY_S = 10.0

Assigned = Literal["serving", "loading", "draining", "none"]
"""What the newest decision says of a peer and a model: `messages.Item.state`, or nothing at all."""
_PREFERENCE: Mapping[Assigned | None, int] = {
    None: 0, "serving": 0, "loading": 1, "none": 2, "draining": 3,
}  # fmt: skip
"""A ready peer that is not `serving` answers as well, whole answers being idempotent, but the
group counts on others: `loading` is about to serve, `none` is a standby that loaded early."""
_REMARK: Mapping[Assigned | None, str] = {
    "loading": ", not serving yet",
    "none": ", not assigned",
    "draining": ", draining",
}


@dataclass(frozen=True, slots=True)
class Replica:
    """One peer's offer of the wanted model, with what this gateway adds to it."""

    peer: str
    offer: Offer
    local: bool
    rtt_s: float
    in_flight: int = 0
    """Requests this gateway sent there that its advert cannot show yet."""
    cooling: bool = False
    holds_session: bool = False
    assigned: Assigned | None = None
    """None: no group decides about this model, so every ready peer is as good as another."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with the reason for its place, in words for headers and logs."""

    peer: str
    local: bool
    cost_s: float
    reason: str


def session_hash(session: bytes) -> bytes:
    """What adverts say of a held session: enough to recognise, too little to guess."""
    return hashlib.blake2b(session, digest_size=SESSION_HASH_BYTES, person=b"meshnode-kv").digest()


def holds(offer: Offer, session: bytes) -> bool:
    """Whether the advert lists the session among those whose KV cache is kept."""
    wanted, held = session_hash(session), offer.sessions
    step = SESSION_HASH_BYTES
    return any(held[i : i + step] == wanted for i in range(0, len(held), step))


def hash_order(session: bytes, replicas: tuple[Replica, ...]) -> tuple[Replica, ...]:
    """Weighted rendezvous order: score -w / ln u, largest first (Schindelhauer & Schomaker 2005).

    The weight is the number of slots, so a machine twice as wide gets twice the sessions.
    """

    def score(replica: Replica) -> float:
        seed = session + replica.peer.encode()
        # 52 bits, because a float holds them and the half exactly: u is never 0 or 1.
        drawn = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big") >> 12
        return -max(replica.offer.slots, 1) / math.log((drawn + 0.5) / 2.0**52)

    return tuple(sorted(replicas, key=lambda replica: (-score(replica), replica.peer)))


def rank(session: bytes, prompt_tokens: int, replicas: tuple[Replica, ...]) -> tuple[Ranked, ...]:
    """All ready replicas, best first. Pure; equal inputs give equal orders on every gateway.

    Those that the group has serving come first, then those that load, then those without an
    assignment, each ranked among themselves; behind them in the same order those that just
    failed; last, whoever drains: it should take nothing new.
    """
    ranked: list[tuple[bool, bool, int, int, Ranked]] = []
    for preference in sorted({_preference(replica) for replica in replicas}):
        alike = tuple(replica for replica in replicas if _preference(replica) == preference)
        for place, (replica, entry) in enumerate(_rank_alike(session, prompt_tokens, alike)):
            drains = replica.assigned == "draining"
            ranked.append((drains, replica.cooling, preference, place, entry))
    ranked.sort(key=lambda item: item[:4])
    return tuple(entry for *_, entry in ranked)


def _preference(replica: Replica) -> int:
    return _PREFERENCE[replica.assigned]


def _rank_alike(
    session: bytes, prompt_tokens: int, replicas: tuple[Replica, ...]
) -> list[tuple[Replica, Ranked]]:
    """Replicas with equal claim to a request, best first.

    cost = queue + uncached prefill + RTT, for the holder of the session, the top of the hash
    order, and no one else; the rest follow in hash order.
    A placement off the hash pays one prefill extra (`MISPLACED_S` at least): the next turn through
    another gateway would look for the session at the top of the order and compute it again.
    """
    ordered = hash_order(session, replicas)
    loads = [_load(replica) for replica in ordered]
    mean_load = sum(loads) / max(len(loads), 1)
    scored: list[tuple[float, int, Replica, Ranked]] = []
    for place, replica in enumerate(ordered):
        load = loads[place]
        keeps = replica.holds_session and load <= OVERLOAD * mean_load + 1.0
        prefill_s = prompt_tokens / (
            replica.offer.prefill_tokens_per_s or PREFILL_TOKENS_PER_S_UNMEASURED
        )
        queue_s = _queue_s(replica, prefill_s)
        if keeps:
            cost_s, reason = 0.0, "holds the session"
        elif place == 0:
            cost_s, reason = queue_s + prefill_s + replica.rtt_s, "first by hash"
        elif place < CANDIDATES_SCORED:
            misplaced_s = max(prefill_s, MISPLACED_S)
            cost_s, reason = queue_s + prefill_s + misplaced_s + replica.rtt_s, "less loaded"
        else:
            cost_s, reason = math.inf, "spare"
        reason += _REMARK.get(replica.assigned, "")
        if replica.cooling:
            reason += ", failed just now"
        entry = Ranked(replica.peer, replica.local, cost_s, reason)
        scored.append((cost_s, place, replica, entry))
    scored.sort(key=lambda item: item[:2])
    return [(replica, entry) for *_, replica, entry in scored]


def _load(replica: Replica) -> float:
    """Requests per slot, those on their way included."""
    offer = replica.offer
    busy = offer.slots_busy + offer.queue_depth + replica.in_flight
    return busy / max(offer.slots, 1)


def _queue_s(replica: Replica, prefill_s: float) -> float:
    """Seconds until a slot frees: requests beyond the slots, each an expected answer long.

    Answers are computed side by side, but prompts one after the other; `prefill_s` is what this
    one takes, and the best guess at the others'.
    """
    offer = replica.offer
    waiting = offer.slots_busy + offer.queue_depth + replica.in_flight - offer.slots + 1
    if waiting <= 0:
        return 0.0
    answer_s = ANSWER_TOKENS_EXPECTED / (
        offer.decode_tokens_per_s or DECODE_TOKENS_PER_S_UNMEASURED
    )
    return waiting * (prefill_s + answer_s / max(offer.slots, 1))


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model name resolved to bytes, with every offer of exactly those bytes."""

    name: str
    digest: str
    offers: tuple[tuple[str, Offer], ...]


def resolve(model: str, offers: Mapping[str, tuple[Offer, ...]]) -> Resolved:
    """Which bytes a name means: `name`, `name@digest-prefix` or a full digest.

    If peers offer different bytes under one name, the bytes offered by most of them win (then
    the smaller digest), so that every gateway resolves alike. What some offer as an approximation
    and others as whole is two models, whoever lies: a plain name never reaches the first, and a
    digest alone prefers it, so that its answers say what they are. Raises `UnknownModelError`.
    """
    name, _, prefix = model.partition("@")
    all_offers = [(peer, offer) for peer in sorted(offers) for offer in offers[peer]]
    meant = [
        (peer, offer)
        for peer, offer in all_offers
        if model == offer.digest or (name == offer.name and offer.digest.startswith(prefix))
    ]
    if not meant:
        raise UnknownModelError(model, tuple(sorted({offer.name for _, offer in all_offers})))
    peers: dict[str, set[str]] = {}
    for peer, offer in meant:
        peers.setdefault(offer.digest, set()).add(peer)
    digest = min(peers, key=lambda found: (-len(peers[found]), found))
    named = [offer for _, offer in meant if offer.digest == digest]
    called = min(named, key=lambda offer: offer.approximate is None)
    # The same bytes under another name answer just as well; one offer a peer is enough.
    chosen = {
        peer: offer
        for peer, offer in reversed(all_offers)
        if offer.digest == digest and (offer.approximate is None) is (called.approximate is None)
    }
    return Resolved(called.name, digest, tuple(sorted(chosen.items())))


class Dispatcher:
    """A gateway's memory between requests; a sans-IO core."""

    def __init__(self) -> None:
        self._holders: OrderedDict[tuple[str, bytes], str] = OrderedDict()
        self._in_flight: dict[tuple[str, str], int] = {}
        self._cooling_until: dict[str, float] = {}

    def rank(
        self,
        resolved: Resolved,
        session: bytes,
        prompt_bytes: int,
        own: str,
        rtts_s: Mapping[str, float],
        now: float,
        assigned: Mapping[str, Assigned] | None = None,
    ) -> tuple[Ranked, ...]:
        """Candidates for one request; raises `NoReplicaError` if nobody is ready.

        `assigned` is what the newest decision says of each peer and this model, peers that it
        does not name being "none"; None if no group decides about the model.
        """
        holder = self._holders.get((resolved.digest, session))
        replicas = tuple(
            Replica(
                peer,
                offer,
                local=peer == own,
                rtt_s=0.0 if peer == own else rtts_s.get(peer, 0.0),
                in_flight=0 if peer == own else self._in_flight.get((resolved.digest, peer), 0),
                cooling=self._cooling_until.get(peer, 0.0) > now,
                holds_session=peer == holder if holder is not None else holds(offer, session),
                assigned=None if assigned is None else assigned.get(peer, "none"),
            )
            for peer, offer in resolved.offers
            if offer.state == "ready" and (peer == own or peer in rtts_s)
        )
        if not replicas:
            states = {offer.state for _, offer in resolved.offers}
            if "loading" in states:
                raise NoReplicaError(resolved.name, "loading", RETRY_AFTER_LOADING_S)
            raise NoReplicaError(resolved.name, "no replica", RETRY_AFTER_NOBODY_S)
        best = min(map(_preference, replicas))
        if holder is not None and not any(
            replica.holds_session and _preference(replica) == best for replica in replicas
        ):
            # Its holder is gone, or should get nothing new: others may have got it meanwhile
            # through another gateway.
            replicas = tuple(
                replace(replica, holds_session=holds(replica.offer, session))
                for replica in replicas
            )
        return rank(session, prompt_bytes // BYTES_PER_TOKEN, replicas)

    def routed(self, digest: str, session: bytes, peer: str) -> None:
        """The request went to `peer`, which now holds the session; count it until `finished`."""
        self._holders[digest, session] = peer
        self._holders.move_to_end((digest, session))
        if len(self._holders) > SESSIONS_REMEMBERED:
            self._holders.popitem(last=False)
        self._in_flight[digest, peer] = self._in_flight.get((digest, peer), 0) + 1

    def finished(self, digest: str, peer: str) -> None:
        left = self._in_flight.get((digest, peer), 0) - 1
        if left > 0:
            self._in_flight[digest, peer] = left
        else:
            self._in_flight.pop((digest, peer), None)

    def failed(self, peer: str, now: float) -> None:
        """The peer broke a request."""
        self._cooling_until[peer] = now + COOLDOWN_S

    def lose(self, peer: str) -> None:
        """The peer is gone: nothing is in flight there, and its sessions have no holder."""
        self._cooling_until.pop(peer, None)
        for key in [key for key in self._in_flight if key[1] == peer]:
            del self._in_flight[key]
        for session in [key for key, holder in self._holders.items() if holder == peer]:
            del self._holders[session]
