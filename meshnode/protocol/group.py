"""One group as a node lives it: the register, its leases, the words heard, and the next block.

Knows what this node would decide, since when that has differed from what is decided, and whether
it is time to ask for it. It is also what the register asks about blocks (`consensus.Application`).
Messages, other groups and what follows for this node's engines are `agreement.py`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meshnode.identity import PeerId
from meshnode.messages import (
    MODELS_MAX,
    ORDERS_MAX,
    Advert,
    Body,
    Consent,
    Header,
    Item,
    Order,
    Standing,
)
from meshnode.protocol.consensus import Head, Register
from meshnode.protocol.demand import DemandBook, Load
from meshnode.protocol.draft import (
    Candidate,
    draft_claims,
    draft_items,
    draft_orders,
    draft_voters,
    heeded,
)
from meshnode.protocol.facts import problem_of
from meshnode.protocol.lease import Grants, Lease
from meshnode.protocol.placement import Plan, Problem, plan
from meshnode.protocol.quorum import Faults
from meshnode.protocol.rules import (
    ORDER_AGE_MAX,
    ItemKey,
    Witness,
    item_key,
    refusal,
    serving_models,
)
from meshnode.protocol.words import Word, Words

__all__ = ["BATCH_S", "DRAIN_S", "Group", "Peerage", "Scene"]

BATCH_S = 0.3
"""What comes together is decided together: the deaths of one rack, the models of one node."""
EPOCH_GAP_S = 2.0
"""Between two blocks, unless a model has lost its last replica or can get its first."""
PATIENCE_S = 2.0
"""For so long a voter that would decide otherwise leaves it to a leader that is alive."""
MOVE_GAP_S = 60.0
"""No node is given something new twice within this time, unless something was lost (L3)."""
DRAIN_S = 10.0
"""What is in flight at an owner that drains has this time before the owner is let go: as long as
a node gives its own clients when it stops."""
ORDER_LIFE_S = 60.0
"""An order that nobody has heeded by then is dropped, and whoever gave it has been told."""


@dataclass(frozen=True, slots=True)
class Peerage:
    """What the rest of the stack knows of the others, asked whenever it is needed."""

    members: Callable[[], tuple[PeerId, ...]]
    """All connected members."""
    is_node: Callable[[str], bool]
    """Whether a member may own models, and not only ask."""
    may_vote: Callable[[str], bool]
    is_alive: Callable[[str, float], bool]
    since: Callable[[str], float | None]
    """Since when it has been alive without a break."""
    adverts: Callable[[], Mapping[str, Advert]]
    """Everybody's newest, our own included."""


@dataclass(slots=True, eq=False)
class Scene:
    """What all groups of a node have in common. `now` is the time of the input being handled;
    before `settled_at` the node has not been awake for long enough to call anybody dead."""

    own: PeerId
    faults: Faults
    root: str
    peerage: Peerage
    words: Words
    now: float = -math.inf
    settled_at: float = -math.inf
    refused: Counter[str] = field(default_factory=Counter)

    def is_alive(self, peer: str) -> bool:
        return peer == self.own or self.peerage.is_alive(peer, self.now)

    def may_order(self, signer: str, order: Order) -> bool:
        """In a mesh by invitation any member's operator may, a gateway's too: members are trusted
        there. In an open one only the root may move what others own, and everybody may speak for
        itself."""
        is_own_affair = order.action in ("claim", "release") or (
            order.action in ("drain", "undrain") and order.peer == signer
        )
        return self.faults == "crash" or is_own_affair or signer == self.root


@dataclass(slots=True)
class _Draft:
    """What this node would decide, and since when it has differed from what is decided."""

    body: Body
    voters: tuple[str, ...]
    differs_since: float | None
    is_urgent: bool


class Group:
    """One group. `register` is to be set once, right after: each asks the other."""

    register: Register

    def __init__(self, scene: Scene) -> None:
        self.grants = Grants(scene.now)
        self.lease = Lease()
        self.words: dict[tuple[str, str], Word] = {}
        """(peer, model) → its newest consent."""
        self.orders: dict[bytes, tuple[str, Order, float]] = {}
        """Orders not heeded yet, with when they came."""
        self.standings: dict[str, Standing] = {}
        self.plan: Plan | None = None
        """The newest that this node has made, as a voter."""
        self._scene = scene
        self._demand = DemandBook()
        self._heeded: dict[str, int] = {}
        self._draining_since: dict[tuple[ItemKey, str], float] = {}
        self._moved: dict[str, float] = {}
        self._absent_since: dict[str, float] = {}
        self._needed: dict[str, int] = {}
        self._draft: _Draft | None = None
        self._decided_at = -math.inf
        self._problem: Problem | None = None

    @property
    def head(self) -> Head:
        return self.register.head

    @property
    def standing(self) -> Standing:
        return Standing(self.register.group, self.head.epoch, not self.register.has_memory)

    def orders_in_force(self) -> list[tuple[str, Order]]:
        return [self._scene.words.order(envelope) for envelope in self.head.body.orders]

    def is_settled(self) -> bool:
        """Whether who does not answer is dead, and not just not back in touch with us."""
        return self._scene.now >= self._scene.settled_at or all(
            self._scene.is_alive(item.owner) for item in self.head.body.items
        )

    # --- what is heard --------------------------------------------------------------------------

    def hear(self, peer: str, consent: Consent, envelope: bytes) -> None:
        """A peer's word on one of its models; the newest counts."""
        known = self.words.get((peer, consent.model))
        if known is None and sum(other == peer for other, _ in self.words) >= MODELS_MAX:
            self._scene.refused["too many models"] += 1
        elif known is None or known.consent.sequence < consent.sequence:
            self.words[peer, consent.model] = Word(consent, envelope)

    def keep_order(self, envelope: bytes) -> None:
        """Somebody asks for something; kept until a block heeds it, or for `ORDER_LIFE_S`."""
        scene = self._scene
        signer, order = scene.words.order(envelope)
        if not scene.may_order(signer, order):
            scene.refused["an order by someone who may not"] += 1
        elif order.sequence <= self._heeded.get(signer, -1):
            scene.refused["an order of long ago"] += 1
        elif len(self.orders) < ORDERS_MAX:
            self.orders[envelope] = (signer, order, scene.now)
        else:
            scene.refused["too many orders"] += 1

    def lose(self, peer: str) -> None:
        """It says its words again when it is back; until then only its own items need them."""
        self.standings.pop(peer, None)
        if peer not in self.register.voters:
            self._absent_since.pop(peer, None)
        kept = {item.model for item in self.head.body.items if item.owner == peer}
        for key in [key for key in self.words if key[0] == peer and key[1] not in kept]:
            del self.words[key]

    def withhold(self) -> None:
        """Promise nothing to whom a block takes a right that we have voted for."""
        for header, body in self.register.pledged():
            if header.voters != self.head.header.voters:
                self.grants.withhold(None)
            after = {(claim.right, claim.holder) for claim in body.claims}
            before = [(claim.right, claim.holder) for claim in self.head.body.claims]
            self.grants.withhold(tuple(held[1] for held in before if held not in after))

    def entered(self, before: Head) -> None:
        """A new block stands: promises, orders and clocks follow it."""
        head, now = self.head, self._scene.now
        self._decided_at = now
        owned = {(item_key(item), item.owner) for item in before.body.items}
        for item in head.body.items:
            if (item_key(item), item.owner) not in owned:
                self._moved[item.owner] = now
        self._moved = {peer: at for peer, at in self._moved.items() if now < at + MOVE_GAP_S}
        self.grants.resume()
        if head.header.voters != before.header.voters or head.epoch > before.epoch + 1:
            self.grants.restart(now)
        draining = [(item_key(i), i.owner) for i in head.body.items if i.state == "draining"]
        self._draining_since = {key: self._draining_since.get(key, now) for key in draining}
        for signer, order in self.orders_in_force():
            self._heeded[signer] = max(self._heeded.get(signer, -1), order.sequence)
        for envelope in head.body.orders:
            self.orders.pop(envelope, None)
        self._hear_all(besides=self._scene.own)

    def recall(self) -> None:
        """After a restart: what everybody had said when the newest block was decided."""
        self._hear_all()

    def _hear_all(self, besides: str | None = None) -> None:
        for envelope in self.head.body.consents:
            signer, consent = self._scene.words.consent(envelope)
            if signer != besides:
                self.hear(signer, consent, envelope)

    # --- the next block -------------------------------------------------------------------------

    def redraft(self) -> float | None:
        """What would this node decide now? Returns when to look again, if that is soon."""
        scene, head = self._scene, self.head
        if not self.register.votes or not self.is_settled():
            self._draft = None
            return None
        body, voters = self._drafted()
        asked = any(envelope not in head.body.orders for envelope in body.orders)
        differs = (
            body.items != head.body.items
            or body.claims != head.body.claims
            or voters != head.header.voters
            or asked
        )
        known = None if self._draft is None else self._draft.differs_since
        since = (scene.now if known is None else known) if differs else None
        served, was = serving_models(body).keys(), serving_models(head.body).keys()
        has_lost = any(
            item.model in was and not scene.is_alive(item.owner) for item in head.body.items
        )
        is_first = not {item.model for item in body.items} <= {i.model for i in head.body.items}
        is_urgent = bool(served - was) or has_lost or asked or is_first
        self._draft = _Draft(body, voters, since, is_urgent)
        return None if since is None or scene.now >= since + BATCH_S else since + BATCH_S

    def wants(self) -> bool:
        """Whether this voter asks for the next block now."""
        draft, register, now = self._draft, self.register, self._scene.now
        if draft is None or draft.differs_since is None or not register.votes:
            return False
        leader = register.leader(1)
        if leader != self._scene.own and self._scene.is_alive(leader):
            return now >= draft.differs_since + PATIENCE_S
        if now < draft.differs_since + BATCH_S:
            return False
        if draft.is_urgent:
            return True
        owned = {(item_key(item), item.owner) for item in self.head.body.items}
        moves = {i.owner for i in draft.body.items if (item_key(i), i.owner) not in owned}
        has_rest = all(now >= self._moved.get(peer, -math.inf) + MOVE_GAP_S for peer in moves)
        return has_rest and now >= self._decided_at + EPOCH_GAP_S

    def problem(self) -> Problem:
        """The facts as this node knows them."""
        scene, adverts = self._scene, self._scene.peerage.adverts()
        for peer, advert in adverts.items():
            self._demand.observe(peer, advert.demand, advert.ttl_s, scene.now)
        words = {key: word for key, word in self.words.items() if scene.is_alive(key[0])}
        orders = [order for _, order, _ in self._all_orders()]
        return problem_of(self.head.body, words, orders, adverts, self._replicas_wanted)

    def expire_orders(self) -> None:
        epoch = self.head.epoch
        for envelope, (_, order, since) in tuple(self.orders.items()):
            if self._scene.now > since + ORDER_LIFE_S or epoch > order.epoch + ORDER_AGE_MAX:
                del self.orders[envelope]

    def _drafted(self) -> tuple[Body, tuple[str, ...]]:
        head, now, is_alive = self.head, self._scene.now, self._scene.is_alive
        problem = self.problem()
        if problem != self._problem or self.plan is None:
            self._problem, self.plan = problem, plan(problem)
        items = draft_items(
            head.body.items,
            self.plan,
            self.words,
            is_alive,
            lambda key, owner: now >= self._draining_since.get((key, owner), now) + DRAIN_S,
        )
        orders = self._all_orders()
        claims = draft_claims(
            head.body.claims,
            [(signer, order) for signer, order, _ in orders],
            head.epoch + 1,
            lambda holder: not is_alive(holder) and not self.grants.is_promised(holder, now),
        )
        named = {(i.owner, i.model) for i in items} | {
            (s, i.model) for i in items for s in i.standbys
        }
        body = Body(
            items,
            claims,
            tuple(envelope for *_, envelope in heeded(orders, head.body.claims, claims)),
            tuple(self.words[key].envelope for key in sorted(named)),
        )
        return body, self._voters_after()

    def _voters_after(self) -> tuple[str, ...]:
        scene, register = self._scene, self.register
        nodes = [peer for peer in scene.peerage.members() if scene.peerage.may_vote(peer)]
        peers = sorted({*nodes, *register.voters, scene.own})
        return draft_voters(register.voters, map(self._candidate, peers), scene.faults)

    def _candidate(self, peer: str) -> Candidate:
        scene, now = self._scene, self._scene.now
        is_alive = scene.is_alive(peer)
        if is_alive:
            self._absent_since.pop(peer, None)
        absent_since = now if is_alive else self._absent_since.setdefault(peer, now)
        if peer == scene.own:
            return Candidate(peer, math.inf, 0.0, True)
        since, standing = scene.peerage.since(peer), self.standings.get(peer)
        return Candidate(
            peer,
            age_s=max(now - since, 1e-3) if is_alive and since is not None else 0.0,
            absent_s=now - absent_since,
            is_caught_up=standing is not None and standing.epoch == self.head.epoch,
            abstains=standing is not None and standing.abstains,
        )

    def _all_orders(self) -> tuple[tuple[str, Order, bytes], ...]:
        """Those in force, and those that the next block may heed: one from an epoch to come has
        to wait for it."""
        epoch = self.head.epoch + 1
        old = [(*self._scene.words.order(e), e) for e in self.head.body.orders]
        fresh = [
            (signer, order, envelope)
            for envelope, (signer, order, _) in self.orders.items()
            if order.epoch <= epoch <= order.epoch + ORDER_AGE_MAX
        ]
        return draft_orders(old, fresh)

    def _replicas_wanted(self, model: str, name: str) -> tuple[int, int]:
        """Replicas that demand calls for, and its weight. What operators want on their nodes comes
        on top, and is not missed when such a node goes."""
        scene, now = self._scene, self._scene.now
        owners = {
            items[0].owner
            for items in serving_models(self.head.body).get(model, ())
            if all(scene.is_alive(item.owner) for item in items)
        }
        loads = tuple(
            Load(offer.slots, offer.slots_busy + offer.queue_depth)
            for peer, advert in scene.peerage.adverts().items()
            if peer in owners
            for offer in advert.offers
            if offer.digest == model and offer.state == "ready"
        )
        self._demand.loads(name, loads, now)
        there = max(len(owners), 1)
        wanted = self._demand.wanted(name, there, now)
        needed = self._needed.get(model)
        if needed is None:
            # A voter that is new takes it that whatever no operator asked for, demand did.
            needed = there if owners - self._asked_for(model) else 1
        if wanted != there:
            needed = wanted if wanted > there else max(min(needed, wanted), 1)
        self._needed[model] = needed
        return needed, self._demand.weight(name, now)

    def _asked_for(self, model: str) -> set[str]:
        """Where operators want a model: on their own nodes, or by a pin."""
        pinned = {
            order.peer
            for _, order in self.orders_in_force()
            if order.action == "pin" and order.subject == model
        }
        wanted = (key for key, word in self.words.items() if word.consent.wanted)
        return pinned | {peer for peer, wanted_model in wanted if wanted_model == model}

    # --- consensus.Application ------------------------------------------------------------------

    def propose(self, head: Head, now: float) -> tuple[Body, tuple[str, ...]]:
        return self._drafted() if self.is_settled() else (head.body, self.register.voters)

    def refuses(self, head: Head, header: Header, body: Body, now: float) -> str | None:
        scene = self._scene
        came = [voter for voter in header.voters if voter not in head.header.voters]
        if any(not scene.is_alive(voter) for voter in came):
            return "a new voter that does not answer"
        if any(not scene.peerage.is_node(voter) for voter in came):
            return "a new voter that is no node"
        witness = Witness(
            self.register.group,
            scene.words.consent,
            scene.words.order,
            scene.may_order,
            scene.is_alive,
            lambda peer: self.grants.is_promised(peer, now),
        )
        return refusal(head.body, header.epoch, body, witness)

    def is_alive(self, voter: str) -> bool:
        return self._scene.is_alive(voter)

    # --- what it means for this node ------------------------------------------------------------

    def is_drained(self) -> bool:
        own = self._scene.own
        return any(o.action == "drain" and o.peer == own for _, o in self.orders_in_force())

    def has_to_load(self, item: Item) -> bool:
        """What we own; and what we are the first living heir of, at once (idempotent work needs
        no leave): its owner does not answer, and the next block will say the same."""
        scene = self._scene
        if item.owner == scene.own:
            return True
        heirs = [peer for peer in item.standbys if scene.is_alive(peer)]
        return heirs[:1] == [scene.own] and not scene.is_alive(item.owner) and self.is_settled()
