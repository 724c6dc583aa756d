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
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from meshnode.errors import ConfigError, RemoteProtocolError
from meshnode.identity import PeerId
from meshnode.messages import (
    CLAIMS_MAX,
    GROUPS_MAX,
    ORDERS_MAX,
    PARTS_MAX,
    Consent,
    Consents,
    Decided,
    Genesis,
    GetDecided,
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
    encode,
)
from meshnode.protocol import DutiesChanged, Duty, Effect, Emit, Send
from meshnode.protocol.consensus import Head, Register
from meshnode.protocol.group import BATCH_S, Group, Peerage, Scene
from meshnode.protocol.overview import GroupView, view_of
from meshnode.protocol.placement import Plan, Problem, plan
from meshnode.protocol.quorum import Faults, Verify, group_id
from meshnode.protocol.words import (
    CONSENT_TYPE,
    GENESIS_TYPE,
    ORDER_TYPE,
    RECOVERY_TYPE,
    Open,
    Words,
)

__all__ = ["Agreement", "Assigned", "GroupView", "Holding", "Peerage"]

HEARTBEAT_S = 1.0
PLAN_EVERY_S = 0.25
"""How often a voter compares the newest block with what it would decide itself."""
HEAR_S = 0.05
"""Consents that come together are planned with together."""
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


Seal = Callable[[bytes, Message], bytes]
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
    activation_bytes: int = 0
    edge_bytes: int = 0
    cut_every: int = 1
    parts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Assigned:
    """What the register says of one model: peer → the state of what it owns of it."""

    group: str
    epoch: int
    items: tuple[Item, ...]

    def states(self) -> dict[str, Literal["serving", "loading", "draining", "none"]]:
        return {item.owner: item.state for item in self.items}


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
        self._scene = Scene(own, faults, root, peerage, Words(open_, mesh_id, root))
        self._mesh_id = mesh_id
        self._sign = sign
        self._verify = verify
        self._seal = seal
        self._memory_bytes = memory_bytes
        self._sequence = first_sequence
        self._seal_as_root = seal_as_root
        self._groups: dict[str, Group] = {}
        self._journals = dict(journals or {})
        self._holdings: tuple[Holding, ...] | None = None
        self._duties = DutiesChanged((), is_drained=False)
        self._claimed: dict[str, None] = {}
        self._beat_at = -math.inf
        self._plan_at = -math.inf
        self._found_at: float | None = None
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
            votes = any(group.register.votes for group in self._groups.values())
            # Who does not vote drafts nothing, and lets old orders go with its next heartbeat.
            self._plan_at = now + PLAN_EVERY_S if votes else self._beat_at
        for group in self._groups.values():
            if is_planning:
                group.expire_orders()
                self._redraft(group)
            effects += self._run(group, lambda group: group.register.tick(now), now)
        effects += self._tell_duties()
        return effects

    def deadline(self) -> float | None:
        if not self._has_started:
            return -math.inf
        soonest = math.inf if self._found_at is None else self._found_at
        if self._groups:
            soonest = min(soonest, self._beat_at, self._plan_at)
        for group in self._groups.values():
            at = group.register.deadline()
            if at is not None and at < soonest:
                soonest = at
        return None if soonest == math.inf else soonest

    def _attend(self, now: float) -> None:
        """We are awake; and if we were not for a while, or are for the first time, what we think
        of others is out of date."""
        self._scene.now = now
        if now > self._plan_at + SLEPT_S:
            self._plan_at = now
            self._scene.settled_at = now + SETTLE_S

    @property
    def refused(self) -> Counter[str]:
        """What was heard and not heeded, by reason."""
        return self._scene.refused

    # --- what the node says ---------------------------------------------------------------------

    def hold(self, holdings: tuple[Holding, ...], now: float) -> list[Effect]:
        """What this node has now; told to everybody if it is news."""
        self._scene.now = now
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
        self._scene.now = now
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
            epoch = group.head.epoch
            order = Order(name, self._sequence, epoch, action, subject, peer)
            seal = self._seal
            if not self._scene.may_order(self.own, order) and self._seal_as_root is not None:
                seal = self._seal_as_root
            envelope = seal(ORDER_TYPE, order)
            group.keep_order(envelope)
            effects += [
                Send(member, Orders((envelope,)))
                for member in self._scene.peerage.members()
                if member in group.register.voters
            ]
        self._plan_at = now
        return [*effects, *self.tick(now)]

    def recover(self, now: float) -> list[Effect]:
        """Go on without the voters that are lost, by the root's word, in every group.

        Raises `ConfigError` if this node does not have the root's key.
        """
        self._scene.now = now
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
            if signer in (self.own, self._scene.root) and peer in group.register.voters
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
            group.lose(peer)
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
        return None if found is None else found.head.epoch

    def overtakes(self, model: str, stood_on: tuple[str, int] | None) -> bytes | None:
        """Proof that we know better than a request for `model` (S6); None if it may be served.

        It stands on (group, epoch), or on nothing, if its sender knows no group that decides about
        the model. One that is ahead of us may be served: a whole answer harms nobody, and its
        sender's heartbeat tells us of what we lack.
        """
        if stood_on is None:
            assigned = self.assigned(model)
            return None if assigned is None else self.proof(assigned.group)
        group, epoch = stood_on
        known = self.epoch(group)
        return self.proof(group) if known is not None and epoch < known else None

    def proof(self, group: str) -> bytes | None:
        """An encoded `Decided` that proves our epoch to anybody."""
        found = self._groups.get(group)
        return None if found is None else encode(found.register.decided(0))

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

    def registers(self) -> tuple[Register, ...]:
        """One for each group: what a checker of invariants looks at."""
        return tuple(group.register for group in self._groups.values())

    def watched(self) -> tuple[PeerId, ...]:
        """Whose heartbeats this node, as a voter, waits for."""
        peers: dict[str, None] = {}
        for group in self._groups.values():
            if group.register.votes:
                peers.update(dict.fromkeys(group.register.voters))
                for item in group.head.body.items:
                    peers.update(dict.fromkeys((item.owner, *item.standbys)))
        peers.pop(self.own, None)
        return tuple(PeerId(peer) for peer in peers)

    def engaged(self) -> tuple[PeerId, ...]:
        """Who votes or owns anything: whom this node should be connected to, however many members
        the mesh has."""
        peers: dict[str, None] = {}
        for group in self._groups.values():
            peers.update(dict.fromkeys(group.register.voters))
            peers.update(dict.fromkeys(item.owner for item in group.head.body.items))
        peers.pop(self.own, None)
        return tuple(PeerId(peer) for peer in peers)

    def views(self, now: float) -> tuple[GroupView, ...]:
        self._scene.now = now
        return tuple(view_of(group, self._scene) for group in self._groups.values())

    def preview(self, change: Callable[[Problem], Problem], now: float) -> Plan | None:
        """The plan that this node would make, after `change` to the facts; None without a group."""
        self._scene.now = now
        for group in self._groups.values():
            return plan(change(group.problem()))
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
        if self._groups or self._seal_as_root is None or not self._scene.peerage.may_vote(self.own):
            return []
        # The sequence makes it unlike any that this node has founded before.
        seed = f"{self._mesh_id}/{self.own}/{self._sequence}".encode()
        nonce = hashlib.blake2b(seed, digest_size=16).digest()
        genesis = Genesis(self._mesh_id, self._scene.faults, (self.own,), nonce)
        self._open_group(self._seal_as_root(GENESIS_TYPE, genesis), now, None)
        return [Send(peer, News(self._standings())) for peer in self._scene.peerage.members()]

    def _open_group(self, envelope: bytes, now: float, journal: bytes | None) -> Group:
        """Raises `RemoteProtocolError` if the genesis is not of this mesh's root."""
        payload, genesis = self._scene.words.genesis(envelope)
        name = group_id(payload)
        known = self._groups.get(name)
        if known is not None:
            return known
        if len(self._groups) >= GROUPS_MAX:
            raise RemoteProtocolError("too many groups")
        group = self._groups[name] = Group(self._scene)
        group.register = Register(
            self.own,
            self._sign,
            self._verify,
            genesis,
            envelope,
            group,
            open_recovery=self._scene.words.recovery,
            journal=journal,
        )
        group.recall()
        self._consent(group)
        self._plan_at = min(max(self._plan_at, now), now + BATCH_S)
        return group

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
        if isinstance(message, GetDecided) and group.head.proof is None:
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
                effects.append(Send(sender, News((group.standing,))))
        return effects

    def _on_heartbeat(self, sender: PeerId, beat: Heartbeat, now: float) -> list[Effect]:
        effects = self._ask_for(sender, beat.standings)
        supported: list[Standing] = []
        for standing in beat.standings:
            group = self._groups.get(standing.group)
            if group is not None and group.register.votes:
                group.withhold()
                if group.grants.support(sender, now):
                    supported.append(group.standing)
        if supported:
            effects.append(Send(sender, Support(beat.sequence, tuple(supported))))
        return effects

    def _on_support(self, sender: PeerId, support: Support, now: float) -> list[Effect]:
        for standing in support.standings:
            group = self._groups.get(standing.group)
            # A voter that knows a newer epoch may know that we have lost our rights.
            if group is not None and standing.epoch <= group.head.epoch:
                group.lease.supported(sender, support.sequence)
        return self._ask_for(sender, support.standings)

    def _on_consents(self, sender: PeerId, envelopes: tuple[bytes, ...]) -> None:
        for envelope in envelopes:
            signer, consent = self._scene.words.consent(envelope)
            if signer != sender:
                raise RemoteProtocolError("a consent in another's name")
            group = self._groups.get(consent.group)
            if group is not None and self._scene.peerage.is_node(sender):
                group.hear(signer, consent, envelope)
        self._plan_at = min(self._plan_at, self._scene.now + HEAR_S)

    def _on_orders(self, envelopes: tuple[bytes, ...], now: float) -> None:
        for envelope in envelopes:
            _, order = self._scene.words.order(envelope)
            group = self._groups.get(order.group)
            if group is not None:
                group.keep_order(envelope)
        self._plan_at = min(self._plan_at, now)

    # --- our own words --------------------------------------------------------------------------

    def _consent_all(self) -> None:
        for group in self._groups.values():
            self._consent(group)

    def _consent(self, group: Group) -> None:
        """Sign what has changed of our holdings, for this group; until we know them, what an
        earlier run has signed stands."""
        if self._holdings is None:
            return
        said = {model: word for (peer, model), word in group.words.items() if peer == self.own}
        for holding in self._holdings:
            consent = self._consent_to(group, holding)
            known = said.pop(holding.model, None)
            if known is None or msgspec.structs.replace(known.consent, sequence=0) != consent:
                self._say(group, consent)
        for word in said.values():
            if word.consent.state != "gone":
                self._say(group, msgspec.structs.replace(word.consent, state="gone", sequence=0))

    def _consent_to(self, group: Group, holding: Holding) -> Consent:
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
            activation_bytes=holding.activation_bytes,
            edge_bytes=holding.edge_bytes,
            cut_every=holding.cut_every,
            parts=holding.parts,
        )

    def _say(self, group: Group, consent: Consent) -> None:
        self._sequence += 1
        consent = msgspec.structs.replace(consent, sequence=self._sequence)
        envelope = self._seal(CONSENT_TYPE, consent)
        group.hear(self.own, consent, envelope)

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
        return [Send(peer, told) for peer in self._scene.peerage.members()] if told.consents else []

    def _beat(self, now: float) -> list[Effect]:
        """To all voters, and to ourselves if we are one. Who has nothing to own need not beat."""
        if not self._scene.peerage.is_node(self.own):
            return []
        self._sequence += 1
        voters: dict[str, None] = {}
        for group in self._groups.values():
            group.lease.asked(self._sequence, now)
            voters.update(dict.fromkeys(group.register.voters))
            if group.register.votes:
                group.withhold()
                if group.grants.support(self.own, now):
                    group.lease.supported(self.own, self._sequence)
        beat = Heartbeat(self._sequence, self._standings())
        return [Send(peer, beat) for peer in self._scene.peerage.members() if peer in voters]

    def _standings(self) -> tuple[Standing, ...]:
        return tuple(group.standing for group in self._groups.values())

    # --- deciding -------------------------------------------------------------------------------

    def _run(
        self,
        group: Group,
        step: Callable[[Group], list[Effect]],
        now: float,
        sender: str | None = None,
    ) -> list[Effect]:
        """Let the register do something, and see to what follows from a new block."""
        before = group.register.head
        effects = step(group)
        for _ in range(EPOCHS_AT_ONCE_MAX):
            if group.head.epoch > before.epoch:
                effects += self._on_epoch(group, before, sender)
                before = group.register.head
                self._redraft(group)
            effects += group.register.want(group.wants(), now)
            if group.head.epoch == before.epoch:
                return effects
        return [*effects, *self._on_epoch(group, before, sender)]

    def _on_epoch(self, group: Group, before: Head, sender: str | None) -> list[Effect]:
        """A new block stands: it is told on, and this node's duties follow it."""
        group.entered(before)
        register = group.register
        news: Decided | News = News((group.standing,))
        if self.own == group.head.header.proposer and len(register.lineage.handovers) <= TOLD_MAX:
            news = register.decided(0)
        told = [Send(peer, news) for peer in self._scene.peerage.members() if peer != sender]
        return [*told, *self._tell_duties()]

    def _redraft(self, group: Group) -> None:
        again_at = group.redraft()
        if again_at is not None:
            self._plan_at = min(self._plan_at, again_at)

    def _reconsider(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for group in self._groups.values():
            self._redraft(group)
            effects += self._run(group, lambda g: g.register.reconsider(now), now)
        return [*effects, *self._tell_duties()]

    # --- what it means for this node ------------------------------------------------------------

    def _tell_duties(self) -> list[Effect]:
        """What this node has to load, or to keep at hand, if that has changed."""
        whole: dict[str, bool] = {}
        parts: dict[str, set[tuple[int, int]]] = {}
        for group in self._groups.values():
            for item in group.head.body.items:
                if not group.has_to_load(item):
                    if self.own in item.standbys:
                        whole.setdefault(item.model, False)
                elif item.shard.kind == "whole":
                    whole[item.model] = True
                else:
                    whole.setdefault(item.model, False)
                    parts.setdefault(item.model, set()).add((item.shard.first, item.shard.end))
        duties = DutiesChanged(
            tuple(
                Duty(model, whole[model], tuple(sorted(parts.get(model, ()))[:PARTS_MAX]))
                for model in sorted(whole)
            ),
            any(group.is_drained() for group in self._groups.values()),
        )
        if duties == self._duties:
            return []
        self._duties = duties
        return [Emit(duties)]


def _received(
    sender: str,
    message: Proposal | Vote | QuorumCertificate | Decided | GetDecided,
    now: float,
    group: Group,
) -> list[Effect]:
    return group.register.receive(sender, message, now)


def _recovered(recovery: bytes, now: float, group: Group) -> list[Effect]:
    return group.register.recover(recovery, now)
