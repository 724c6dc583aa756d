"""Layer 4 of a node, wired: its groups, what they decide, and what that means for this node.

For each group it belongs to a node keeps the `Register` (consensus.py), what it has promised and
been promised (lease.py), the signed words it has heard (consents, orders), and, to lead or to
vote, the plan it would make itself (placement, demand, draft.py) and the rules (rules.py).

The life of a change: facts differ from the newest block → the leader drafts the next → voters
check it → a quorum finalizes → the block spreads: voters push it, everybody tells the epoch on,
and whoever is behind asks → `DutiesChanged` tells the node what to load and what to let go.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import msgspec

from meshnode.errors import ConfigError, RemoteProtocolError
from meshnode.identity import PeerId, Signed
from meshnode.messages import (
    CLAIMS_MAX,
    GROUPS_MAX,
    MODELS_MAX,
    ORDERS_MAX,
    Advert,
    Body,
    Consent,
    Consents,
    Decided,
    Genesis,
    GetDecided,
    Header,
    Heartbeat,
    Item,
    Message,
    News,
    Order,
    Orders,
    Proposal,
    QuorumCertificate,
    Recovery,
    Standing,
    Support,
    Vote,
    decode,
    encode,
)
from meshnode.protocol import DutiesChanged, Duty, Effect, Emit, Send
from meshnode.protocol import placement as planner
from meshnode.protocol.consensus import Head, Register
from meshnode.protocol.demand import DemandBook, Load
from meshnode.protocol.draft import (
    Candidate,
    Word,
    current_replicas,
    draft_claims,
    draft_items,
    draft_orders,
    draft_voters,
    heeded,
)
from meshnode.protocol.lease import Grants, Lease
from meshnode.protocol.quorum import Faults, Verify, group_id
from meshnode.protocol.rules import (
    ORDER_AGE_MAX,
    ItemKey,
    Witness,
    item_key,
    refusal,
    serving_models,
)

__all__ = ["Agreement", "Assigned", "GroupView", "Holding", "Peerage"]

HEARTBEAT_S = 1.0
PLAN_EVERY_S = 0.25
"""How often a voter compares the newest block with what it would decide itself."""
BATCH_S = 0.3
"""What comes together is decided together: the deaths of one rack, the models of one node."""
HEAR_S = 0.05
"""Consents that come together are planned with together."""
EPOCH_GAP_S = 2.0
"""Between two blocks, unless a model has lost its last replica or can get its first."""
PATIENCE_S = 2.0
"""For so long a voter that would decide otherwise leaves it to a leader that is alive."""
MOVE_GAP_S = 60.0
"""No node is given something new twice within this time, unless something was lost (L3)."""
DRAIN_S = 10.0
"""What is in flight at an owner that drains has this time before the owner is let go: as long as
a node gives its own clients when it stops."""
EPOCHS_AT_ONCE_MAX = 4
"""A lone voter decides as soon as it wants to, and may want the next step at once."""
TOLD_MAX = 8
"""A block with more changes of voters behind it is not sent to all unasked: most know those."""
FOUND_AFTER_S = 1.0
"""A root that finds nobody to tell it of a group founds one after this long."""
SLEPT_S = 1.0
"""Woken so late, this node was suspended; the loop's ordinary lateness under load is 0.05 s."""
SETTLE_S = 7.0
"""Who has just started or woken knows of nobody yet whether it lives, and decides nothing for so
long, unless all owners answer sooner: a dial that fails takes 5 s, and the next comes a second
later."""
US_PER_GB_UNMEASURED = 100_000
"""A token reads all weights once; ten GB/s is what an ordinary machine's memory yields."""
LOAD_BYTES_PER_S = 500_000_000
"""From a disk of today. Used to weigh moves against each other, not to promise anything."""
OPENED_MAX = 4096
ORDER_LIFE_S = 60.0
"""An order that nobody has heeded by then is dropped, and whoever gave it has been told."""

GENESIS_TYPE = b"/meshnode/genesis/1"
RECOVERY_TYPE = b"/meshnode/recovery/1"
_CONSENT = b"/meshnode/consent/1"
_ORDER = b"/meshnode/order/1"

Seal = Callable[[bytes, Message], bytes]
Open = Callable[[bytes, bytes], Signed]
Action = Literal["pin", "unpin", "drain", "undrain", "claim", "release"]


@dataclass(frozen=True, slots=True)
class Holding:
    """What this node can say of one of its models; `Consent` has the meaning of the fields."""

    model: str
    name: str
    state: Literal["file", "ready", "failed"]
    wanted: bool
    bytes: int
    weight_bytes: int
    kv_bytes: int
    layers: int


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


@dataclass(frozen=True, slots=True)
class Assigned:
    """What the register says of one model: peer → the state of what it owns of it."""

    group: str
    epoch: int
    items: tuple[Item, ...]

    def states(self) -> dict[str, Literal["serving", "loading", "draining", "none"]]:
        return {item.owner: item.state for item in self.items}


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group as `status` shows it."""

    group: str
    epoch: int
    faults: Faults
    voters: tuple[tuple[str, bool], ...]
    """Each with whether it is alive, as far as this node can tell."""
    quorum: int
    leader: str
    votes: bool
    abstains: bool
    is_deciding: bool
    view: int
    items: tuple[Item, ...]
    claims: tuple[tuple[str, str, int], ...]
    orders: tuple[tuple[str, str, str, str], ...]
    """(action, subject, peer, who gave it)."""
    lease_s: float
    """How much longer our own exclusive rights are safe; 0 for not at all."""
    trouble: tuple[tuple[str, str], ...]
    """What is degraded, each with what would fix it."""


@dataclass(slots=True)
class _Draft:
    """What this node would decide, and since when it has differed from what is decided."""

    body: Body
    voters: tuple[str, ...]
    differs_since: float | None = None
    is_urgent: bool = False


@dataclass(slots=True, eq=False)
class _Group:
    register: Register
    grants: Grants
    lease: Lease
    demand: DemandBook
    words: dict[tuple[str, str], Word] = field(default_factory=dict)
    """(peer, model) → its newest consent."""
    orders: dict[bytes, tuple[str, Order, float]] = field(default_factory=dict)
    """Orders not heeded yet, with when they came."""
    heeded: dict[str, int] = field(default_factory=dict)
    """Signer → its newest order that a block has heeded: nobody brings an older one again."""
    standings: dict[str, Standing] = field(default_factory=dict)
    draining_since: dict[tuple[ItemKey, str], float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    """When a node was last given something."""
    absent_since: dict[str, float] = field(default_factory=dict)
    needed: dict[str, int] = field(default_factory=dict)
    """Model → the replicas that its demand calls for."""
    draft: _Draft | None = None
    decided_at: float = -math.inf
    problem: planner.Problem | None = None
    plan: planner.Plan | None = None


class Agreement:
    """All groups of one node. A sans-IO core made of cores."""

    def __init__(
        self,
        own: PeerId,
        mesh_id: str,
        faults: Faults,
        root: str,
        *,
        sign: Callable[[bytes], bytes],
        verify: Verify,
        seal: Seal,
        open_: Open,
        peerage: Peerage,
        memory_bytes: int,
        first_sequence: int,
        seal_as_root: Seal | None = None,
        journals: Mapping[str, bytes] | None = None,
    ) -> None:
        """`root` is the peer id whose word founds and recovers groups; `seal_as_root` is given to
        the node that has its key. `journals` are those of an earlier run, by name. Raises
        `ConfigError` if one is damaged.
        """
        self.own = own
        self.refused: Counter[str] = Counter()
        self._mesh_id = mesh_id
        self._faults = faults
        self._root = root
        self._sign = sign
        self._verify = verify
        self._seal = seal
        self._open = open_
        self._peerage = peerage
        self._memory_bytes = memory_bytes
        self._sequence = first_sequence
        self._seal_as_root = seal_as_root
        self._groups: dict[str, _Group] = {}
        self._journals = dict(journals or {})
        self._holdings: tuple[Holding, ...] = ()
        self._duties = DutiesChanged((), is_drained=False)
        self._claimed: dict[str, None] = {}
        self._opened: dict[tuple[bytes, bytes], Signed] = {}
        self._beat_at = -math.inf
        self._plan_at = -math.inf
        self._settled_at = -math.inf
        self._found_at: float | None = None
        self._now = -math.inf
        self._has_started = False

    # --- the contract ---------------------------------------------------------------------------

    def receive(self, sender: PeerId, message: Message, now: float) -> list[Effect]:
        """Take a member's message. Raises `RemoteProtocolError` if only a liar would send it."""
        self._attend(now)
        effects = self._start(now)
        match message:
            case Heartbeat():
                effects += self._on_heartbeat(sender, message, now)
            case Support():
                effects += self._on_support(sender, message, now)
            case News(standings):
                effects += self._ask_for(sender, standings)
            case Consents(consents):
                self._on_consents(sender, consents)
            case Orders(orders):
                self._on_orders(orders, now)
            case Decided():
                effects += self._on_decided(sender, message, now)
            case Proposal():
                effects += self._on_voting(sender, message.header.group, message, now)
            case Vote() | QuorumCertificate() | GetDecided():
                effects += self._on_voting(sender, message.group, message, now)
        return effects

    def tick(self, now: float) -> list[Effect]:
        self._attend(now)
        effects = self._start(now)
        effects += self._found(now)
        if self._beat_at <= now:
            self._beat_at = now + HEARTBEAT_S
            effects += self._beat(now)
        is_planning = self._plan_at <= now
        if is_planning:
            self._plan_at = now + PLAN_EVERY_S
        for group in self._groups.values():
            if is_planning:
                self._expire_orders(group, now)
                self._redraft(group, now)
            effects += self._run(group, lambda group: group.register.tick(now), now)
        effects += self._tell_duties(now)
        return effects

    def deadline(self) -> float | None:
        times = [self._found_at]
        if self._groups:
            times += [self._beat_at, self._plan_at]
        times += [group.register.deadline() for group in self._groups.values()]
        if not self._has_started:
            times.append(-math.inf)
        return min((at for at in times if at is not None), default=None)

    def _attend(self, now: float) -> None:
        """We are awake; and if we were not for a while, or are for the first time, what we think
        of others is out of date."""
        self._now = now
        if now > self._plan_at + SLEPT_S:
            self._plan_at = now
            self._settled_at = now + SETTLE_S

    def _is_settled(self, group: _Group, now: float) -> bool:
        """Whether who does not answer is dead, and not just not back in touch with us."""
        return now >= self._settled_at or all(
            self.is_alive(item.owner) for item in group.register.head.body.items
        )

    # --- what the node says ---------------------------------------------------------------------

    def hold(self, holdings: tuple[Holding, ...], now: float) -> list[Effect]:
        """What this node has now; told to everybody if it is news."""
        self._now = now
        if holdings == self._holdings:
            return []
        self._holdings = holdings
        self._consent_all()
        self._plan_at = min(self._plan_at, now + HEAR_S)
        return self._tell_consents()

    def order(self, action: Action, subject: str, peer: str, now: float) -> list[Effect]:
        """Ask for a pin, a drain, a right, or that one is taken back.

        Raises `ConfigError` if there is no group to ask.
        """
        self._now = now
        if not self._groups:
            raise ConfigError("this mesh has agreed on nothing yet: try again in a moment")
        if action == "claim" and len(self._claimed) >= CLAIMS_MAX:
            raise ConfigError(f"this node claims {CLAIMS_MAX} rights already")
        if action == "release":
            self._claimed.pop(subject, None)  # from now on, whenever the others hear of it
        elif action == "claim":
            self._claimed[subject] = None
        effects: list[Effect] = []
        for name, group in self._groups.items():
            self._sequence += 1
            epoch = group.register.head.epoch
            order = Order(name, self._sequence, epoch, action, subject, peer)
            seal = self._seal
            if not self._may_order(self.own, order) and self._seal_as_root is not None:
                seal = self._seal_as_root
            envelope = seal(_ORDER, order)
            self._keep_order(group, envelope, now)
            effects += [
                Send(member, Orders((envelope,)))
                for member in self._peerage.members()
                if member in group.register.voters
            ]
        self._plan_at = now
        return [*effects, *self.tick(now)]

    def recover(self, now: float) -> list[Effect]:
        """Go on without the voters that are lost, by the root's word, in every group.

        Raises `ConfigError` if this node does not have the root's key.
        """
        self._now = now
        if self._seal_as_root is None:
            raise ConfigError("only the node with the mesh's root key can recover a lost quorum")
        effects: list[Effect] = []
        for group in self._groups.values():
            header = group.register.recovery_header((self.own,))
            recovery = self._seal_as_root(RECOVERY_TYPE, Recovery(header))
            effects += self._run(group, partial(_recovered, recovery, now), now)
        return effects

    def connected(self, peer: PeerId, now: float) -> list[Effect]:
        """A member has come: tell it what we have, what we ask for and how far we are."""
        self._attend(now)
        effects: list[Effect] = []
        told = self._own_consents()
        if told.consents:
            effects.append(Send(peer, told))
        pending = tuple(
            envelope
            for group in self._groups.values()
            for envelope, (signer, _, _) in group.orders.items()
            if signer in (self.own, self._root) and peer in group.register.voters
        )
        if pending:
            effects.append(Send(peer, Orders(pending[:ORDERS_MAX])))
        if self._groups:
            effects.append(Send(peer, News(self._standings())))
        return [*effects, *self._reconsider(now)]

    def lost(self, peer: PeerId, now: float) -> list[Effect]:
        """A peer does not answer any more, or has left."""
        self._attend(now)
        for group in self._groups.values():
            group.standings.pop(peer, None)
            if peer not in group.register.voters:
                group.absent_since.pop(peer, None)
            # It says them again when it is back; until then only its own items need them.
            kept = {item.model for item in group.register.head.body.items if item.owner == peer}
            for key in [key for key in group.words if key[0] == peer and key[1] not in kept]:
                del group.words[key]
        self._plan_at = min(self._plan_at, now + BATCH_S)
        return self._reconsider(now)

    # --- what the node asks ---------------------------------------------------------------------

    def assigned(self, model: str) -> Assigned | None:
        """Who owns what of a model, by the newest block that names it; None if no group does."""
        for name, group in self._groups.items():
            head = group.register.head
            items = tuple(item for item in head.body.items if item.model == model)
            if items:
                return Assigned(name, head.epoch, items)
        return None

    def epoch(self, group: str) -> int | None:
        found = self._groups.get(group)
        return None if found is None else found.register.head.epoch

    def proof(self, group: str) -> bytes | None:
        """An encoded `Decided` that proves our epoch to anybody."""
        found = self._groups.get(group)
        return None if found is None else encode(found.register.decided(0))

    def question(self, peer: PeerId, group: str) -> list[Effect]:
        """Ask a peer that knows more than we do."""
        found = self._groups.get(group)
        if found is None:
            return [Send(peer, GetDecided(group, 0, 0))]
        register = found.register
        return [Send(peer, GetDecided(group, register.head.epoch, register.lineage.anchor))]

    def holds_right(self, right: str, now: float) -> bool:
        """Whether an exclusive right is ours at this instant: claimed in this run of the node and
        not given back, named ours in the newest block we know, and backed by a quorum's promises.

        What an earlier run held must be claimed again: that run may have given it back.
        """
        if right not in self._claimed:
            return False
        for group in self._groups.values():
            register = group.register
            for claim in register.head.body.claims:
                if claim.right == right and claim.holder == self.own:
                    return group.lease.holds(register.voters, register.quorum, now)
        return False

    def watched(self) -> tuple[PeerId, ...]:
        """Whose heartbeats this node, as a voter, waits for."""
        peers: dict[str, None] = {}
        for group in self._groups.values():
            if group.register.votes:
                peers.update(dict.fromkeys(group.register.voters))
                for item in group.register.head.body.items:
                    peers.update(dict.fromkeys((item.owner, *item.standbys)))
        peers.pop(self.own, None)
        return tuple(PeerId(peer) for peer in peers)

    def engaged(self) -> tuple[PeerId, ...]:
        """Who votes or owns anything: whom this node should be connected to, however many members
        the mesh has."""
        peers: dict[str, None] = {}
        for group in self._groups.values():
            peers.update(dict.fromkeys(group.register.voters))
            peers.update(dict.fromkeys(item.owner for item in group.register.head.body.items))
        peers.pop(self.own, None)
        return tuple(PeerId(peer) for peer in peers)

    def views(self, now: float) -> tuple[GroupView, ...]:
        return tuple(self._view(group, now) for group in self._groups.values())

    def preview(
        self, change: Callable[[planner.Problem], planner.Problem], now: float
    ) -> planner.Plan | None:
        """The plan that this node would make, after `change` to the facts; None without a group."""
        for group in self._groups.values():
            return planner.plan(change(self._problem(group, now)))
        return None

    # --- groups ---------------------------------------------------------------------------------

    def _start(self, now: float) -> list[Effect]:
        if self._has_started:
            return []
        self._has_started = True
        for name, journal in sorted(self._journals.items()):
            if name.startswith("register-") and len(self._groups) < GROUPS_MAX:
                self._open_group(Register.genesis_in(journal), now, journal)
        if self._seal_as_root is not None and not self._groups:
            self._found_at = now + FOUND_AFTER_S
        return []

    def _found(self, now: float) -> list[Effect]:
        """Found the mesh's group, if we are its root and nobody has told us of one."""
        if self._found_at is None or self._found_at > now:
            return []
        self._found_at = None
        if self._groups or self._seal_as_root is None or not self._peerage.may_vote(self.own):
            return []
        # The sequence makes it unlike any that this node has founded before.
        seed = f"{self._mesh_id}/{self.own}/{self._sequence}".encode()
        nonce = hashlib.blake2b(seed, digest_size=16).digest()
        genesis = Genesis(self._mesh_id, self._faults, (self.own,), nonce)
        self._open_group(self._seal_as_root(GENESIS_TYPE, genesis), now, None)
        return [Send(peer, News(self._standings())) for peer in self._peerage.members()]

    def _open_group(self, envelope: bytes, now: float, journal: bytes | None) -> _Group:
        """Raises `RemoteProtocolError` if the genesis is not of this mesh's root."""
        signed = self._opened_envelope(GENESIS_TYPE, envelope)
        genesis = decode(signed.payload, Genesis)
        if signed.signer != self._root or genesis.mesh != self._mesh_id:
            raise RemoteProtocolError("a group that this mesh's root has not founded")
        name = group_id(signed.payload)
        known = self._groups.get(name)
        if known is not None:
            return known
        if len(self._groups) >= GROUPS_MAX:
            raise RemoteProtocolError("too many groups")
        register = Register(
            self.own,
            self._sign,
            self._verify,
            genesis,
            envelope,
            _Application(self, name),
            open_recovery=self._open_recovery,
            journal=journal,
        )
        group = _Group(register, Grants(now), Lease(), DemandBook())
        self._groups[name] = group
        self._consent(group)
        self._plan_at = min(max(self._plan_at, now), now + BATCH_S)
        return group

    def _open_recovery(self, envelope: bytes) -> Header:
        signed = self._opened_envelope(RECOVERY_TYPE, envelope)
        if signed.signer != self._root:
            raise RemoteProtocolError("a recovery that the mesh's root has not signed")
        return decode(signed.payload, Recovery).header

    def _opened_envelope(self, kind: bytes, envelope: bytes) -> Signed:
        """Verified, once: the same consents stand in block after block."""
        known = self._opened.get((kind, envelope))
        if known is None:
            known = self._open(envelope, kind)
            if len(self._opened) >= OPENED_MAX:
                del self._opened[next(iter(self._opened))]
            self._opened[kind, envelope] = known
        return known

    def _open_consent(self, envelope: bytes) -> tuple[str, Consent]:
        signed = self._opened_envelope(_CONSENT, envelope)
        return signed.signer, decode(signed.payload, Consent)

    def _open_order(self, envelope: bytes) -> tuple[str, Order]:
        signed = self._opened_envelope(_ORDER, envelope)
        return signed.signer, decode(signed.payload, Order)

    # --- messages -------------------------------------------------------------------------------

    def _on_decided(self, sender: PeerId, decided: Decided, now: float) -> list[Effect]:
        known = len(self._groups)
        group = self._open_group(decided.genesis, now, None)
        told = self._tell_consents() if len(self._groups) > known else []
        receive = partial(_received, sender, decided, now)
        return [*told, *self._run(group, receive, now, sender)]

    def _on_voting(
        self,
        sender: PeerId,
        name: str,
        message: Proposal | Vote | QuorumCertificate | GetDecided,
        now: float,
    ) -> list[Effect]:
        group = self._groups.get(name)
        if group is None:
            return [] if isinstance(message, GetDecided) else [Send(sender, GetDecided(name, 0, 0))]
        if isinstance(message, GetDecided) and group.register.head.proof is None:
            return [Send(sender, group.register.decided(0))]  # the genesis itself is news
        return self._run(group, partial(_received, sender, message, now), now, sender)

    def _ask_for(self, sender: PeerId, standings: tuple[Standing, ...]) -> list[Effect]:
        """Ask whoever knows more, and tell whoever knows less."""
        effects: list[Effect] = []
        for standing in standings:
            group = self._groups.get(standing.group)
            if group is None:
                effects.append(Send(sender, GetDecided(standing.group, 0, 0)))
                continue
            group.standings[sender] = standing
            register = group.register
            if standing.epoch > register.head.epoch:
                effects.append(
                    Send(
                        sender,
                        GetDecided(standing.group, register.head.epoch, register.lineage.anchor),
                    )
                )
            elif standing.epoch < register.head.epoch:
                effects.append(Send(sender, News((self._standing(group),))))
        return effects

    def _on_heartbeat(self, sender: PeerId, beat: Heartbeat, now: float) -> list[Effect]:
        effects = self._ask_for(sender, beat.standings)
        supported: list[Standing] = []
        for standing in beat.standings:
            group = self._groups.get(standing.group)
            if group is not None and group.register.votes:
                self._withhold(group)
                if group.grants.support(sender, now):
                    supported.append(self._standing(group))
        if supported:
            effects.append(Send(sender, Support(beat.sequence, tuple(supported))))
        return effects

    def _on_support(self, sender: PeerId, support: Support, now: float) -> list[Effect]:
        for standing in support.standings:
            group = self._groups.get(standing.group)
            # A voter that knows a newer epoch may know that we have lost our rights.
            if group is not None and standing.epoch <= group.register.head.epoch:
                group.lease.supported(sender, support.sequence)
        return self._ask_for(sender, support.standings)

    def _on_consents(self, sender: PeerId, envelopes: tuple[bytes, ...]) -> None:
        for envelope in envelopes:
            signer, consent = self._open_consent(envelope)
            if signer != sender:
                raise RemoteProtocolError("a consent in another's name")
            group = self._groups.get(consent.group)
            if group is not None and self._peerage.is_node(sender):
                self._hear(group, signer, consent, envelope)
        self._plan_at = min(self._plan_at, self._now + HEAR_S)

    def _hear(self, group: _Group, peer: str, consent: Consent, envelope: bytes) -> None:
        known = group.words.get((peer, consent.model))
        if known is None and sum(other == peer for other, _ in group.words) >= MODELS_MAX:
            self.refused["too many models"] += 1
        elif known is None or known.consent.sequence < consent.sequence:
            group.words[peer, consent.model] = Word(consent, envelope)

    def _on_orders(self, envelopes: tuple[bytes, ...], now: float) -> None:
        for envelope in envelopes:
            _, order = self._open_order(envelope)
            group = self._groups.get(order.group)
            if group is not None:
                self._keep_order(group, envelope, now)
        self._plan_at = min(self._plan_at, now)

    def _keep_order(self, group: _Group, envelope: bytes, now: float) -> None:
        signer, order = self._open_order(envelope)
        if not self._may_order(signer, order):
            self.refused["an order by someone who may not"] += 1
        elif order.sequence <= group.heeded.get(signer, -1):
            self.refused["an order of long ago"] += 1
        elif len(group.orders) < ORDERS_MAX:
            group.orders[envelope] = (signer, order, now)
        else:
            self.refused["too many orders"] += 1

    def _may_order(self, signer: str, order: Order) -> bool:
        """In a mesh by invitation any member's operator may, a gateway's too: members are trusted
        there. In an open one only the root may move what others own, and everybody may speak for
        itself."""
        is_own_affair = order.action in ("claim", "release") or (
            order.action in ("drain", "undrain") and order.peer == signer
        )
        return self._faults == "crash" or is_own_affair or signer == self._root

    # --- our own words --------------------------------------------------------------------------

    def _consent_all(self) -> None:
        for group in self._groups.values():
            self._consent(group)

    def _consent(self, group: _Group) -> None:
        """Sign what has changed of our holdings, for this group."""
        said = {model: word for (peer, model), word in group.words.items() if peer == self.own}
        for holding in self._holdings:
            consent = self._consent_to(group, holding)
            known = said.pop(holding.model, None)
            if known is None or msgspec.structs.replace(known.consent, sequence=0) != consent:
                self._say(group, consent)
        for word in said.values():
            if word.consent.state != "gone":
                self._say(group, msgspec.structs.replace(word.consent, state="gone", sequence=0))

    def _consent_to(self, group: _Group, holding: Holding) -> Consent:
        return Consent(
            group=group.register.group,
            sequence=0,
            model=holding.model,
            name=holding.name,
            state=holding.state,
            wanted=holding.wanted,
            bytes=holding.bytes,
            memory_bytes=self._memory_bytes,
            weight_bytes=holding.weight_bytes,
            kv_bytes=holding.kv_bytes,
            layers=holding.layers,
        )

    def _say(self, group: _Group, consent: Consent) -> None:
        self._sequence += 1
        consent = msgspec.structs.replace(consent, sequence=self._sequence)
        envelope = self._seal(_CONSENT, consent)
        self._hear(group, self.own, consent, envelope)

    def _own_consents(self) -> Consents:
        return Consents(
            tuple(
                word.envelope
                for group in self._groups.values()
                for (peer, _), word in group.words.items()
                if peer == self.own
            )
        )

    def _tell_consents(self) -> list[Effect]:
        told = self._own_consents()
        return [Send(peer, told) for peer in self._peerage.members()] if told.consents else []

    def _beat(self, now: float) -> list[Effect]:
        """To all voters, and to ourselves if we are one. Who has nothing to own need not beat."""
        if not self._peerage.is_node(self.own):
            return []
        self._sequence += 1
        voters: dict[str, None] = {}
        for group in self._groups.values():
            group.lease.asked(self._sequence, now)
            voters.update(dict.fromkeys(group.register.voters))
            if group.register.votes:
                self._withhold(group)
                if group.grants.support(self.own, now):
                    group.lease.supported(self.own, self._sequence)
        beat = Heartbeat(self._sequence, self._standings())
        return [Send(peer, beat) for peer in self._peerage.members() if peer in voters]

    def _standing(self, group: _Group) -> Standing:
        register = group.register
        return Standing(register.group, register.head.epoch, not register.has_memory)

    def _standings(self) -> tuple[Standing, ...]:
        return tuple(self._standing(group) for group in self._groups.values())

    # --- deciding -------------------------------------------------------------------------------

    def _run(
        self,
        group: _Group,
        step: Callable[[_Group], list[Effect]],
        now: float,
        sender: str | None = None,
    ) -> list[Effect]:
        """Let the register do something, and see to what follows from a new block."""
        before = group.register.head
        effects = step(group)
        for _ in range(EPOCHS_AT_ONCE_MAX):
            if group.register.head.epoch > before.epoch:
                effects += self._on_epoch(group, before, sender, now)
                before = group.register.head
                self._redraft(group, now)
            effects += group.register.want(self._wants(group, now), now)
            if group.register.head.epoch == before.epoch:
                return effects
        return [*effects, *self._on_epoch(group, before, sender, now)]

    def _on_epoch(
        self, group: _Group, before: Head, sender: str | None, now: float
    ) -> list[Effect]:
        """A new block stands: promises, orders and duties follow it; and it is told on."""
        register, head = group.register, group.register.head
        group.decided_at = now
        owned = {(item_key(item), item.owner) for item in before.body.items}
        for item in head.body.items:
            if (item_key(item), item.owner) not in owned:
                group.moved[item.owner] = now
        group.moved = {p: at for p, at in group.moved.items() if now < at + MOVE_GAP_S}
        group.grants.resume()
        if head.header.voters != before.header.voters or head.epoch > before.epoch + 1:
            group.grants.restart(now)
        draining = {
            (item_key(item), item.owner) for item in head.body.items if item.state == "draining"
        }
        group.draining_since = {key: group.draining_since.get(key, now) for key in sorted(draining)}
        for signer, order in self._orders_of(head):
            newest = group.heeded.get(signer, -1)
            group.heeded[signer] = max(newest, order.sequence)
        for envelope in head.body.orders:
            group.orders.pop(envelope, None)
        for envelope in head.body.consents:
            signer, consent = self._open_consent(envelope)
            if signer != self.own:
                self._hear(group, signer, consent, envelope)
        news: Decided | News = News((self._standing(group),))
        if self.own == head.header.proposer and len(register.lineage.handovers) <= TOLD_MAX:
            news = register.decided(0)
        told = [Send(peer, news) for peer in self._peerage.members() if peer != sender]
        return [*told, *self._tell_duties(now)]

    def _orders_of(self, head: Head) -> list[tuple[str, Order]]:
        return [self._open_order(envelope) for envelope in head.body.orders]

    def _wants(self, group: _Group, now: float) -> bool:
        """Whether this voter asks for the next block now."""
        draft, register = group.draft, group.register
        if draft is None or draft.differs_since is None or not register.votes:
            return False
        is_led = register.leader(1) == self.own
        if not is_led and self.is_alive(register.leader(1)):
            return now >= draft.differs_since + PATIENCE_S
        if now < draft.differs_since + BATCH_S:
            return False
        if draft.is_urgent:
            return True
        owned = {(item_key(item), item.owner) for item in register.head.body.items}
        moves = {i.owner for i in draft.body.items if (item_key(i), i.owner) not in owned}
        has_rest = all(now >= group.moved.get(peer, -math.inf) + MOVE_GAP_S for peer in moves)
        return has_rest and now >= group.decided_at + EPOCH_GAP_S

    def _redraft(self, group: _Group, now: float) -> None:
        """What would this node decide now?"""
        register, head = group.register, group.register.head
        if not register.votes or not self._is_settled(group, now):
            group.draft = None
            return
        body, voters = self._drafted(group, now)
        differs = (
            body.items != head.body.items
            or body.claims != head.body.claims
            or any(envelope not in head.body.orders for envelope in body.orders)
            or voters != head.header.voters
        )
        known = group.draft.differs_since if group.draft is not None else None
        since = (now if known is None else known) if differs else None
        if since is not None and now < since + BATCH_S:
            self._plan_at = min(self._plan_at, since + BATCH_S)
        served, was = serving_models(body).keys(), serving_models(head.body).keys()
        has_lost = any(
            not all(self.is_alive(item.owner) for item in head.body.items if item.model == model)
            for model in was
        )
        has_asked = any(envelope not in head.body.orders for envelope in body.orders)
        is_first = not {item.model for item in body.items} <= {i.model for i in head.body.items}
        is_urgent = bool(served - was) or has_lost or has_asked or is_first
        group.draft = _Draft(body, voters, since, is_urgent)

    def _drafted(self, group: _Group, now: float) -> tuple[Body, tuple[str, ...]]:
        head = group.register.head
        problem = self._problem(group, now)
        if problem != group.problem or group.plan is None:
            group.problem, group.plan = problem, planner.plan(problem)
        plan = group.plan
        items = draft_items(
            head.body.items,
            plan,
            group.words,
            self.is_alive,
            lambda key, owner: now >= group.draining_since.get((key, owner), now) + DRAIN_S,
        )
        old = [(*self._open_order(e), e) for e in head.body.orders]
        fresh = self._fresh_orders(group)
        orders = draft_orders(old, fresh)
        claims = draft_claims(
            head.body.claims,
            [(signer, order) for signer, order, _ in orders],
            head.epoch + 1,
            lambda holder: not self.is_alive(holder) and not group.grants.is_promised(holder, now),
        )
        orders = heeded(orders, head.body.claims, claims)
        named = sorted({(i.owner, i.model) for i in items}
                       | {(s, i.model) for i in items for s in i.standbys})  # fmt: skip
        consents = tuple(group.words[key].envelope for key in named)
        body = Body(items, claims, tuple(envelope for *_, envelope in orders), consents)
        return body, self._voters_after(group, now)

    def _voters_after(self, group: _Group, now: float) -> tuple[str, ...]:
        register = group.register
        candidates = []
        nodes = [p for p in self._peerage.members() if self._peerage.may_vote(p)]
        for peer in sorted({*nodes, *register.voters, self.own}):
            alive = self.is_alive(peer)
            if alive:
                group.absent_since.pop(peer, None)
            absent_since = now if alive else group.absent_since.setdefault(peer, now)
            since = now - 3600.0 if peer == self.own else self._peerage.since(peer)
            standing = group.standings.get(peer)
            candidates.append(
                Candidate(
                    peer,
                    max(now - since, 1e-3) if alive and since is not None else 0.0,
                    now - absent_since,
                    peer == self.own
                    or (standing is not None and standing.epoch == register.head.epoch),
                    standing is not None and standing.abstains,
                )
            )
        return draft_voters(register.voters, candidates, self._faults)

    def _problem(self, group: _Group, now: float) -> planner.Problem:
        """The facts as this node knows them."""
        head, adverts = group.register.head, self._peerage.adverts()
        for peer, advert in adverts.items():
            group.demand.observe(peer, advert.demand, advert.ttl_s, now)
        rates = {
            (peer, offer.digest): offer.decode_tokens_per_s
            for peer, advert in adverts.items()
            for offer in advert.offers
        }
        orders = [
            order
            for _, order, _ in draft_orders(
                [(*self._open_order(e), e) for e in head.body.orders],
                self._fresh_orders(group),
            )
        ]
        drained = {order.peer for order in orders if order.action == "drain"}
        pins: dict[str, tuple[str, ...]] = {}
        for order in orders:
            if order.action == "pin":
                pins[order.subject] = (*pins.get(order.subject, ()), order.peer)
        words = {
            key: word.consent for key, word in sorted(group.words.items()) if self.is_alive(key[0])
        }
        models: dict[str, planner.Model] = {}
        holdings: dict[str, dict[str, planner.Holding]] = {}
        memory: dict[str, tuple[int, int]] = {}
        us_per_gb: dict[str, int] = {}
        for (peer, model), consent in words.items():
            if consent.state == "gone":
                continue
            models[model] = planner.Model(
                digest=model,
                name=consent.name,
                weight_bytes=consent.weight_bytes,
                layers=max(consent.layers, 1),
                kv_bytes_per_token=consent.kv_bytes,
                context_tokens=1,
                compute_bytes=max(consent.bytes - consent.weight_bytes - consent.kv_bytes, 0),
            )
            rate = rates.get((peer, model), 0.0)
            decode_us = _rounded(round(1e6 / rate)) if rate > 0 else 0
            if decode_us and consent.weight_bytes:
                us_per_gb[peer] = max(1, decode_us * 10**9 // consent.weight_bytes)
            holdings.setdefault(peer, {})[model] = planner.Holding(
                consent.state,
                consent.wanted,
                consent.bytes,
                decode_us,
            )
            memory[peer] = max(memory.get(peer, (-1, 0)), (consent.sequence, consent.memory_bytes))
        leaving: Counter[str] = Counter()
        for item in head.body.items:
            if item.state == "draining":
                leaving[item.owner] += item.bytes
        hosts = {
            peer: planner.Host(
                peer=peer,
                memory_bytes=max(memory[peer][1] - leaving[peer], 0),
                us_per_gb=us_per_gb.get(peer, US_PER_GB_UNMEASURED),
                load_bytes_per_s=LOAD_BYTES_PER_S,
                holdings=held,
                draining=peer in drained,
            )
            for peer, held in holdings.items()
        }
        current = current_replicas(head.body.items)
        return planner.Problem(
            models=models,
            hosts=hosts,
            wants={
                model: planner.Want(
                    replicas=self._replicas_wanted(group, fact.name, model, now),
                    pins=pins.get(model, ()),
                    weight=_rounded(group.demand.weight(fact.name, now)),
                )
                for model, fact in models.items()
            },
            ways={
                (peer, link.peer): planner.Way(link.rtt_us, link.bytes_per_s)
                for peer, advert in adverts.items()
                for link in advert.links
            },
            current=current,
        )

    def _replicas_wanted(self, group: _Group, name: str, model: str, now: float) -> int:
        """Replicas that demand calls for. What operators want on their nodes comes on top, and is
        not missed when such a node goes."""
        adverts = self._peerage.adverts()
        serving = [
            items
            for items in serving_models(group.register.head.body).get(model, ())
            if all(self.is_alive(item.owner) for item in items)
        ]
        owners = {items[0].owner for items in serving}
        loads = tuple(
            Load(offer.slots, offer.slots_busy + offer.queue_depth)
            for peer, advert in adverts.items()
            if peer in owners
            for offer in advert.offers
            if offer.digest == model and offer.state == "ready"
        )
        group.demand.loads(name, loads, now)
        there = max(len(serving), 1)
        wanted = group.demand.wanted(name, there, now)
        needed = group.needed.get(model)
        if needed is None:
            # A voter that is new takes it that whatever no operator asked for, demand did.
            needed = there if owners - self._asked_for(group, model) else 1
        if wanted != there:
            needed = wanted if wanted > there else max(min(needed, wanted), 1)
        group.needed[model] = needed
        return needed

    def _fresh_orders(self, group: _Group) -> list[tuple[str, Order, bytes]]:
        """Those that the next block may heed: one from an epoch to come has to wait for it."""
        epoch = group.register.head.epoch + 1
        return [
            (signer, order, envelope)
            for envelope, (signer, order, _) in group.orders.items()
            if order.epoch <= epoch <= order.epoch + ORDER_AGE_MAX
        ]

    def _asked_for(self, group: _Group, model: str) -> set[str]:
        """Where operators want a model: on their own nodes, or by a pin."""
        pinned = {
            order.peer
            for _, order in self._orders_of(group.register.head)
            if order.action == "pin" and order.subject == model
        }
        return pinned | {
            peer
            for (peer, name), word in group.words.items()
            if name == model and word.consent.wanted
        }

    def _expire_orders(self, group: _Group, now: float) -> None:
        epoch = group.register.head.epoch
        for envelope, (_, order, since) in tuple(group.orders.items()):
            if now > since + ORDER_LIFE_S or epoch > order.epoch + ORDER_AGE_MAX:
                del group.orders[envelope]

    def _withhold(self, group: _Group) -> None:
        """Promise nothing to whom a block takes a right that we have voted for."""
        head = group.register.head
        for header, body in group.register.pledged():
            if header.voters != head.header.voters:
                group.grants.withhold(None)
            after = {(claim.right, claim.holder) for claim in body.claims}
            losers = tuple(
                claim.holder
                for claim in head.body.claims
                if (claim.right, claim.holder) not in after
            )
            group.grants.withhold(losers)

    def _reconsider(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for group in self._groups.values():
            self._redraft(group, now)
            effects += self._run(group, lambda g: g.register.reconsider(now), now)
        return [*effects, *self._tell_duties(now)]

    # --- asked by the registers (`consensus.Application`) ---------------------------------------

    def is_alive(self, peer: str) -> bool:
        return peer == self.own or self._peerage.is_alive(peer, self._now)

    def proposal(self, name: str, now: float) -> tuple[Body, tuple[str, ...]]:
        group = self._groups[name]
        if not self._is_settled(group, now):
            return group.register.head.body, group.register.voters
        return self._drafted(group, now)

    def refusal(self, name: str, head: Head, header: Header, body: Body, now: float) -> str | None:
        group = self._groups[name]
        came = [voter for voter in header.voters if voter not in head.header.voters]
        if any(not self.is_alive(voter) for voter in came):
            return "a new voter that does not answer"
        if any(not self._peerage.is_node(voter) for voter in came):
            return "a new voter that is no node"
        witness = Witness(
            name,
            self._open_consent,
            self._open_order,
            self._may_order,
            self.is_alive,
            lambda peer: group.grants.is_promised(peer, now),
        )
        return refusal(head.body, header.epoch, body, witness)

    # --- what it means for this node ------------------------------------------------------------

    def _tell_duties(self, now: float) -> list[Effect]:
        """Load what we own; and what we are the first living heir of, at once (idempotent work
        needs no leave): its owner does not answer, and the next block will say the same."""
        wanted: dict[str, bool] = {}
        is_drained = False
        for group in self._groups.values():
            head = group.register.head
            is_drained = is_drained or any(
                order.action == "drain" and order.peer == self.own
                for _, order in self._orders_of(head)
            )
            for item in head.body.items:
                heirs = [peer for peer in item.standbys if self.is_alive(peer)]
                is_orphan = not self.is_alive(item.owner) and self._is_settled(group, self._now)
                is_heir = is_orphan and heirs[:1] == [self.own]
                if item.owner == self.own or is_heir:
                    wanted[item.model] = True
                elif self.own in item.standbys:
                    wanted.setdefault(item.model, False)
        duties = DutiesChanged(
            tuple(Duty(model, wanted[model]) for model in sorted(wanted)), is_drained
        )
        if duties == self._duties:
            return []
        self._duties = duties
        return [Emit(duties)]

    # --- what people see ------------------------------------------------------------------------

    def _view(self, group: _Group, now: float) -> GroupView:
        register, head = group.register, group.register.head
        until = group.lease.until(register.voters, register.quorum)
        return GroupView(
            group=register.group,
            epoch=head.epoch,
            faults=register.genesis.faults,
            voters=tuple((voter, self.is_alive(voter)) for voter in register.voters),
            quorum=register.quorum,
            leader=register.leader(),
            votes=register.votes,
            abstains=not register.has_memory,
            is_deciding=register.is_deciding,
            view=register.view,
            items=head.body.items,
            claims=tuple((c.right, c.holder, c.since) for c in head.body.claims),
            orders=tuple(
                (order.action, order.subject, order.peer, signer)
                for signer, order in self._orders_of(head)
            ),
            lease_s=max(until - now, 0.0) if math.isfinite(until) else 0.0,
            trouble=self._trouble(group),
        )

    def _trouble(self, group: _Group) -> tuple[tuple[str, str], ...]:
        """What is degraded, in words, with what would fix it."""
        register, body = group.register, group.register.head.body
        found: list[tuple[str, str]] = []
        dead = [voter for voter in register.voters if not self.is_alive(voter)]
        if len(register.voters) - len(dead) < register.quorum:
            found.append(
                (
                    f"no quorum: {len(dead)} of {len(register.voters)} voters do not answer, so "
                    "nothing can be decided; what is loaded goes on answering",
                    "start them again, or run `meshnode mesh recover --force` on the node that "
                    "made the mesh",
                )
            )
        elif dead:
            found.append(
                (
                    f"{len(dead)} of {len(register.voters)} voters do not answer",
                    "nothing to do: another node takes its place in half a minute, if there is one",
                )
            )
        elif len(register.voters) == 1 and len(self._peerage.members()) > 0:
            found.append(
                (
                    "one voter decides alone: while it is away nobody takes over",
                    "nothing to do for two nodes; a third makes three voters, of whom one may fail",
                )
            )
        served = serving_models(body)
        for model in sorted({item.model for item in body.items}):
            items = [item for item in body.items if item.model == model]
            living = [
                replica
                for replica in served.get(model, [])
                if all(self.is_alive(item.owner) for item in replica)
            ]
            if not living:
                found.append((f"{items[0].name} is served by nobody at the moment",
                              "it is being loaded, or its owner starts again"))  # fmt: skip
            elif len(living) == 1 and not any(item.standbys for item in items):
                found.append(
                    (
                        f"{items[0].name} has one replica and no standby",
                        f"give another node the file: meshnode serve --standby {items[0].name}",
                    )
                )
        if group.plan is not None:
            found.extend(group.plan.missing)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class _Application:
    """One group's `consensus.Application`."""

    agreement: Agreement
    group: str

    def propose(self, head: Head, now: float) -> tuple[Body, tuple[str, ...]]:
        return self.agreement.proposal(self.group, now)

    def refuses(self, head: Head, header: Header, body: Body, now: float) -> str | None:
        return self.agreement.refusal(self.group, head, header, body, now)

    def is_alive(self, voter: str) -> bool:
        return self.agreement.is_alive(voter)


def _received(
    sender: str,
    message: Proposal | Vote | QuorumCertificate | Decided | GetDecided,
    now: float,
    group: _Group,
) -> list[Effect]:
    return group.register.receive(sender, message, now)


def _recovered(recovery: bytes, now: float, group: _Group) -> list[Effect]:
    return group.register.recover(recovery, now)


def _rounded(value: int) -> int:
    """To within a quarter: a plan is not made anew for the noise in a measurement."""
    step = 1 << max(value.bit_length() - 3, 0)
    return value // step * step
