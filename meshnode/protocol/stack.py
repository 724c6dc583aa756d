"""A node's cores, wired: the one object that the Trio driver and the simulator drive.

Follows a peer through its life: `Connected` → our `Hello` → its `Hello` verified → `Welcome`
both ways → member (its records, adverts and requests count) → `Disconnected` → everything it
said about itself is forgotten. Also routes adverts and records to their books and asks the
dispatcher on behalf of the gateway.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from itertools import accumulate

from meshnode.credentials import CLOCK_SKEW_S, Membership, MeshDescriptor, verify_chain
from meshnode.errors import NotAuthorizedError, RemoteProtocolError
from meshnode.identity import (
    PeerId,
    Signed,
    Signer,
    Verify,
    open_envelope,
    seal,
    verify,
    verify_by,
)
from meshnode.messages import (
    ADDRS_MAX,
    MESSAGE_BYTES_MAX,
    Advert,
    Agreed,
    Decided,
    GetPeers,
    Heartbeat,
    Hello,
    Leaving,
    Link,
    Message,
    NodeRecord,
    Offer,
    Peers,
    Refused,
    Role,
    Rumours,
    Welcome,
    decode,
    encode,
    reason_of,
)
from meshnode.protocol import (
    Disconnect,
    Effect,
    Emit,
    Input,
    MemberJoined,
    MemberLost,
    Publish,
    PublishRecord,
    Send,
)
from meshnode.protocol.adverts import AdvertBook, Node, Verdict
from meshnode.protocol.agreement import Action, Agreement, Holding, Peerage
from meshnode.protocol.discovery import Discovery, Source
from meshnode.protocol.dispatch import Dispatcher, Ranked, Resolved, resolve
from meshnode.protocol.liveness import Liveness, Outcome
from meshnode.protocol.records import KnownRecord, RecordBook

PROTOCOL_VERSION = 1
HELLO_TIMEOUT_S = 5.0
"""A connected peer has this long to show its certificate; a handshake takes two round trips."""
RECORD_TTL_S = 30 * 60
FIRST_IN_DHT_S = 2.0
"""After the first member has come, who may bring others. What was published before that went
nowhere: without this, nobody could find us through the DHT until the first refresh."""
RECORD_REFRESH_S = 10 * 60
"""Three chances to refresh a record before anybody forgets it."""
PEERS_REPLY_BYTES_MAX = MESSAGE_BYTES_MAX // 2
"""64 ordinary records have 32 KiB; 64 of the longest legal ones would be no legal message."""
MEMBERSHIP_CHECK_S = 60.0
"""Certificates last for days: whether one has expired need not be asked with every message."""
_STAYING = frozenset[Role]({"node", "bootstrap"})
RECORD_DOMAIN = "meshnode-record"
_RECORD = b"/meshnode/node-record/1"
_ADVERT = b"/meshnode/advert/1"


# --- commands: what the node itself tells the stack, by the same inbox as the peers --------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The first connection to `sender` is up (authenticated, not yet a member)."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The last connection to `sender` is gone."""

    reason: str


@dataclass(frozen=True, slots=True)
class DialFailed:
    """`Connect(sender)` did not succeed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Learn:
    """`sender` may be reachable at `addrs`: from flags, the disk, mDNS."""

    addrs: tuple[str, ...]
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class RecordFound:
    """Somebody's node record, from the DHT."""

    envelope: bytes


@dataclass(frozen=True, slots=True)
class SetOffers:
    """What our engines have now."""

    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class SetAddrs:
    """Where we can be reached now."""

    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CountDemand:
    """A client asked this gateway for a model."""

    model: str


@dataclass(frozen=True, slots=True)
class CountRefused:
    """Every good replica of a model that a client asked for was full."""

    model: str


@dataclass(frozen=True, slots=True)
class SetHoldings:
    """Which models we have at hand, loaded or not."""

    holdings: tuple[Holding, ...]


@dataclass(frozen=True, slots=True)
class SetLinks:
    """How far our peers are, as measured."""

    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class GiveOrder:
    """The operator of this node asks the mesh's groups for something (`messages.Order`)."""

    action: Action
    subject: str
    peer: str


@dataclass(frozen=True, slots=True)
class RecoverQuorum:
    """The operator gives up on voters that are lost for ever."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Shut down in good order: say goodbye."""


# --- the stack -----------------------------------------------------------------------------------


class _Stage(Enum):
    """How far a connected peer has come. Only MEMBERs are listened to."""

    GREETED = auto()
    ACCEPTED = auto()
    MEMBER = auto()


@dataclass(slots=True)
class _Link:
    stage: _Stage
    hello_by: float
    membership: Membership | None = None
    clock_ahead_s: float = 0.0
    is_dismissed: bool = False
    """We have hung up on it: that is no reason to call it dead."""


@dataclass(frozen=True, slots=True)
class Member:
    """A connected member, as `status` shows it."""

    peer: PeerId
    roles: tuple[Role, ...]
    addrs: tuple[str, ...]
    clock_ahead_s: float
    advert: Advert | None


class Stack:
    """All cores of one node. See `protocol.Core` for the contract."""

    def __init__(
        self,
        key: Signer,
        mesh: MeshDescriptor,
        chain: tuple[bytes, ...],
        roles: tuple[Role, ...],
        node: Node,
        *,
        unix_of: Callable[[float], float],
        rng: random.Random,
        first_sequence: int,
        root: Signer | None = None,
        journals: Mapping[str, bytes] | None = None,
        genuine: Verify = verify,
    ) -> None:
        """`chain` proves our own membership; `unix_of` maps the node's clock to wall time;
        `first_sequence` exceeds all numbers this identity has used. `root` is the mesh's root
        key, on the node that has it; `journals` are what earlier runs asked to `Persist`;
        `genuine` judges signatures as `key` makes them.
        """
        self.own = key.peer_id
        self._mesh = mesh
        self._chain = chain
        self._roles = roles
        self._unix_of = unix_of
        self._genuine = genuine
        self._sequence = first_sequence
        self._key = key
        self.records = RecordBook(mesh.mesh_id, partial(self._open, kind=_RECORD))
        self.adverts = AdvertBook(
            mesh.mesh_id,
            self.own,
            node,
            partial(self._open, kind=_ADVERT),
            rng,
            first_sequence,
        )
        self.discovery = Discovery(self.own, rng)
        self.liveness = Liveness(
            mesh.mesh_id, self.own, self._seal, self._open, max(first_sequence, 1), rng
        )
        self.agreement = Agreement(
            self.own,
            mesh.mesh_id,
            "byzantine" if mesh.admission == "open" else "crash",
            mesh.root_peer_id,
            sign=key.sign,
            verify=partial(verify_by, genuine=genuine),
            seal=self._seal,
            open_=self._open,
            peerage=Peerage(
                lambda: tuple(self._members),
                self._is_node,
                self._may_vote,
                self.liveness.is_alive,
                self.liveness.since,
                self._adverts,
            ),
            memory_bytes=node.memory_bytes,
            first_sequence=first_sequence,
            seal_as_root=None if root is None else partial(_seal_as, root),
            journals=journals,
        )
        self._now = -math.inf
        self._is_sponsored = mesh.admission != "open" or root is not None or len(chain) > 1
        self.dispatcher = Dispatcher()
        self.refused: Counter[str] = Counter()
        self._links: dict[PeerId, _Link] = {}
        self._unproven: dict[PeerId, _Link] = {}
        """Those of `_links` that are not members."""
        self._members: dict[PeerId, None] = {}
        """Those that are, in the order in which they became it."""
        self._memberships_checked_at = -math.inf
        self._addrs: tuple[str, ...] = ()
        self._offers: tuple[Offer, ...] = ()
        self._models: tuple[str, ...] = ()
        self._record: bytes | None = None
        self._recorded: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._refresh_at: float | None = None
        # When our record goes into the DHT for the first time; None before anybody is there who
        # could take it, infinity from then on.
        self._in_dht_at: float | None = None
        self._rng = rng

    # --- the contract ---------------------------------------------------------------------------

    def receive(self, sender: PeerId, message: Input, now: float) -> list[Effect]:
        self._now = now
        match message:
            case Connected():
                return self._on_connected(sender, now)
            case Disconnected(reason):
                return self._on_disconnected(sender, reason, now)
            case DialFailed():
                self.discovery.dial_failed(sender, now)
            case Learn(addrs, permanent):
                source = Source.OPERATOR if permanent else Source.HINT
                self.discovery.learn(sender, addrs, now, source)
            case RecordFound(envelope):
                self._on_record(envelope, now)
            case SetOffers(offers):
                return self._on_offers(offers, now)
            case SetAddrs(addrs):
                return self._on_addrs(addrs, now)
            case CountDemand(model):
                self.adverts.count_demand(model, now)
            case CountRefused(model):
                self.adverts.count_refused(model, now)
            case SetHoldings(holdings):
                return self.agreement.hold(holdings, now)
            case SetLinks(links):
                self.adverts.measure(links)
            case GiveOrder(action, subject, peer):
                return self.agreement.order(action, subject, peer, now)
            case RecoverQuorum():
                return self.agreement.recover(now)
            case Stop():
                return [Send(peer, Leaving()) for peer in self._members]
            case Message():
                return self._on_message(sender, message, now)
        return self.tick(now) if isinstance(message, Learn | DialFailed | RecordFound) else []

    def tick(self, now: float) -> list[Effect]:
        self._now = now
        self.liveness.expects(self.agreement.watched(), now)
        self.discovery.prefer(self.agreement.engaged())
        effects = self._apply(self.liveness.tick(now), now)
        for peer, link in self._unproven.items():
            if link.hello_by <= now:
                effects.append(Disconnect(peer, "no valid hello in time"))
                link.hello_by = now + HELLO_TIMEOUT_S
        if self._memberships_checked_at + MEMBERSHIP_CHECK_S <= now:
            self._memberships_checked_at = now
            for peer, link in self._links.items():
                if link.membership is not None and self._has_ended(link.membership, now):
                    effects.append(Disconnect(peer, "its membership certificate has expired"))
        self.records.tick(now)
        if self._refresh_at is not None and self._refresh_at <= now:
            effects.extend(self._publish_record(now))
        elif self._in_dht_at is not None and self._in_dht_at <= now:
            self._in_dht_at = math.inf
            effects.append(PublishRecord(self._own_record(now), self._models))
        advert = self.adverts.tick(now)
        if advert is not None:
            effects.append(Publish(self._seal(_ADVERT, advert)))
        effects.extend(self.discovery.tick(now))
        effects.extend(self.agreement.tick(now))
        return effects

    def deadline(self) -> float | None:
        soonest = math.inf
        for link in self._unproven.values():
            soonest = min(soonest, link.hello_by)
        # Asked after every input, so that no list is made of it.
        for core in (self.records, self.adverts, self.discovery, self.liveness, self.agreement):
            at = core.deadline()
            if at is not None and at < soonest:
                soonest = at
        for at in (self._refresh_at, self._in_dht_at):
            if at is not None and at < soonest:
                soonest = at
        return None if soonest == math.inf else soonest

    def learn(self, peer: PeerId, decided: Decided, now: float) -> list[Effect]:
        """Take a proof that a peer sent beside its control stream.

        Raises `RemoteProtocolError` if it proves nothing.
        """
        self._now = now
        return self.agreement.receive(peer, decided, now)

    # --- what the node asks ---------------------------------------------------------------------

    def gossip(self, envelope: bytes, now: float) -> bool:
        """Take an advert from pubsub; returns whether it may spread further."""
        return self.adverts.receive(envelope, now) is not Verdict.REFUSED

    def check_record(self, envelope: bytes, now: float) -> PeerId | None:
        """The author of a valid node record of this mesh; None (and counted) for any other."""
        known = self.records.check(envelope, now, self._unix_of(now))
        return None if known is None else known.peer

    def newest_record(self, envelopes: list[bytes]) -> int:
        """Index of the newest of several valid records of one author."""

        def sequence(index: int) -> int:
            signed = self._open(envelopes[index], _RECORD)
            return decode(signed.payload, NodeRecord).sequence

        return max(range(len(envelopes)), key=sequence)

    def is_member(self, peer: str) -> bool:
        link = self._links.get(PeerId(peer))
        return link is not None and link.stage is _Stage.MEMBER

    def members(self) -> tuple[Member, ...]:
        view = self.adverts.view()
        return tuple(
            Member(
                peer,
                known.record.roles if (known := self.records.get(peer)) else link.membership.roles,
                known.record.addrs if known else (),
                link.clock_ahead_s,
                view.get(peer),
            )
            for peer, link in self._links.items()
            if link.stage is _Stage.MEMBER and link.membership is not None
        )

    def offers(self) -> dict[str, tuple[Offer, ...]]:
        """Every live offer of the mesh by peer, our own included."""
        view = {str(peer): advert.offers for peer, advert in self.adverts.view().items()}
        if self._offers:
            view[self.own] = self._offers
        return view

    def route(
        self,
        model: str,
        session: bytes,
        prompt_bytes: int,
        rtts_s: Mapping[str, float],
        now: float,
    ) -> tuple[Resolved, tuple[Ranked, ...]]:
        """Rank the replicas of `model`. Raises `UnknownModelError` or `NoReplicaError`."""
        resolved = resolve(model, self.offers())
        assigned = self.agreement.assigned(resolved.digest)
        return resolved, self.dispatcher.rank(
            resolved,
            session,
            prompt_bytes,
            self.own,
            rtts_s,
            now,
            None if assigned is None else assigned.states(),
        )

    # --- a peer's life --------------------------------------------------------------------------

    def _on_connected(self, peer: PeerId, now: float) -> list[Effect]:
        self.discovery.connected(peer)
        self._members.pop(peer, None)
        self._links[peer] = self._unproven[peer] = _Link(_Stage.GREETED, now + HELLO_TIMEOUT_S)
        return [Send(peer, self._hello(now))]

    def _on_disconnected(self, peer: PeerId, reason: str, now: float) -> list[Effect]:
        link = self._links.pop(peer, None)
        self._members.pop(peer, None)
        self._unproven.pop(peer, None)
        self.discovery.disconnected(peer, now)
        if link is None or link.stage is not _Stage.MEMBER:
            return self.tick(now)
        return self._lose(peer, reason, now, left=link.is_dismissed)

    def _on_message(self, peer: PeerId, message: Message, now: float) -> list[Effect]:
        link = self._links.get(peer)
        if link is None:
            return []  # a last frame of a connection that is already gone
        match message:
            case Hello() if link.membership is None:
                return self._on_hello(peer, link, message, now)
            case Welcome() if link.stage is _Stage.ACCEPTED:
                return self._on_welcome(peer, link, message, now)
            case Refused(reason):
                self.refused["by a peer"] += 1
                return [Disconnect(peer, f"the peer refused us: {reason}")]
        if link.stage is not _Stage.MEMBER:
            return [Disconnect(peer, f"{type(message).__name__} before the handshake was over")]
        try:
            return self._on_member_message(peer, link, message, now)
        except RemoteProtocolError as error:
            self.refused[str(error).partition(":")[0]] += 1
            link.is_dismissed = True
            return [Disconnect(peer, reason_of(error))]

    def _on_member_message(
        self, peer: PeerId, link: _Link, message: Message, now: float
    ) -> list[Effect]:
        """Raises `RemoteProtocolError` for what only a liar sends."""
        match message:
            case GetPeers(count):
                return [Send(peer, Peers(self._records_for(peer, count)))]
            case Peers(records):
                for envelope in records:
                    self._on_record(envelope, now)
                return self.tick(now)
            case Rumours():
                return self._apply(self.liveness.receive(peer, message, now), now)
            case Leaving():
                self.discovery.left(peer)
                link.stage = _Stage.GREETED
                self._unproven[peer] = link
                del self._members[peer]
                link.hello_by = now + HELLO_TIMEOUT_S
                lost = self._lose(peer, "it left", now, left=True)
                return [*lost, Disconnect(peer, "it left")]
            case Heartbeat():
                self.liveness.heard(peer, now)
        if isinstance(message, Agreed):
            return self.agreement.receive(peer, message, now)
        return [Disconnect(peer, f"unexpected {type(message).__name__}")]

    def _on_hello(self, peer: PeerId, link: _Link, hello: Hello, now: float) -> list[Effect]:
        unix_s = self._unix_of(now)
        link.clock_ahead_s = hello.unix_ms / 1000 - unix_s
        try:
            if hello.mesh != self._mesh.mesh_id:
                raise NotAuthorizedError("this node is of another mesh")
            link.membership = verify_chain(
                self._mesh, peer, hello.chain, int(unix_s), self._genuine
            )
        except NotAuthorizedError as error:
            # Without what the peer wrote, or strangers could make up names to count for ever.
            self.refused[str(error).partition(":")[0]] += 1
            reason = reason_of(error)
            return [Send(peer, Refused(reason)), Disconnect(peer, reason)]
        link.stage = _Stage.ACCEPTED
        advert = self._seal(_ADVERT, self.adverts.fresh(now))
        return [Send(peer, Welcome(self._own_record(now), advert))]

    def _on_welcome(self, peer: PeerId, link: _Link, welcome: Welcome, now: float) -> list[Effect]:
        link.stage = _Stage.MEMBER
        self._members[peer] = None
        if self._record is not None and self._in_dht_at is None:
            self._in_dht_at = now + FIRST_IN_DHT_S
        del self._unproven[peer]
        self.adverts.connected(peer)
        self._on_record(welcome.record, now)
        self.adverts.receive(welcome.advert, now)
        self.discovery.joined(peer, now)
        self.liveness.connected(peer, now)
        told = self.agreement.connected(peer, now)
        return [Emit(MemberJoined(peer)), *told, *self.tick(now)]

    def _lose(self, peer: PeerId, reason: str, now: float, *, left: bool) -> list[Effect]:
        """A member's connection is gone: it can serve nothing that we could ask for."""
        self.adverts.lose(peer)
        self.dispatcher.lose(peer)
        self.liveness.disconnected(peer, now, left=left)
        lost = self.agreement.lost(peer, now)
        return [Emit(MemberLost(peer, reason)), *lost, *self.tick(now)]

    def _apply(self, outcome: Outcome, now: float) -> list[Effect]:
        """What the rumours mean for everybody else."""
        effects: list[Effect] = []
        for peer in outcome.alive:
            self.adverts.connected(peer)
        for peer in outcome.dead:
            self.adverts.lose(peer)
            self.dispatcher.lose(peer)
            effects.extend(self.agreement.lost(peer, now))
        if outcome.refuted:
            self.adverts.speak_again(now)
        return [*effects, *(Send(peer, rumours) for peer, rumours in outcome.rumours)]

    def _adverts(self) -> dict[str, Advert]:
        """Everybody's newest, our own included."""
        view = {str(peer): advert for peer, advert in self.adverts.view().items()}
        view[self.own] = self.adverts.own(self._now)
        return view

    def _is_node(self, peer: str) -> bool:
        """Whether a connected member is here to stay: a gateway comes and goes with its user."""
        if peer == self.own:
            return not _STAYING.isdisjoint(self._roles)
        link = self._links.get(PeerId(peer))
        if link is None or link.membership is None:
            return False
        known = self.records.get(PeerId(peer))
        certified = link.membership.roles
        told = certified if known is None else known.record.roles
        shared = certified if told == certified else {*certified} & {*told}
        return not _STAYING.isdisjoint(shared)

    def _may_vote(self, peer: str) -> bool:
        """In an open mesh identities are free: whoever decides there is named by its root."""
        if not self._is_node(peer):
            return False
        if peer == self.own:
            return self._is_sponsored
        link = self._links[PeerId(peer)]
        return link.membership is not None and link.membership.sponsored

    # --- records and adverts --------------------------------------------------------------------

    def _on_record(self, envelope: bytes, now: float) -> None:
        known = self.records.receive(envelope, now, self._unix_of(now))
        if known is not None:
            self.discovery.learn(known.peer, known.record.addrs, now, Source.RECORD)

    def _records_for(self, asker: PeerId, count: int) -> tuple[bytes, ...]:
        others = [known.envelope for known in self.records if known.peer != asker]
        chosen = self._rng.sample(others, min(count, len(others)))
        ends = accumulate(len(envelope) for envelope in chosen)
        return tuple(
            envelope
            for envelope, end in zip(chosen, ends, strict=True)
            if end <= PEERS_REPLY_BYTES_MAX
        )

    def _on_offers(self, offers: tuple[Offer, ...], now: float) -> list[Effect]:
        self._offers = offers
        self.adverts.offer(offers, now)
        models = tuple(sorted({offer.digest for offer in offers if offer.state == "ready"}))
        if models != self._models:
            self._models = models
            self._refresh_at = now
        return self.tick(now)

    def _on_addrs(self, addrs: tuple[str, ...], now: float) -> list[Effect]:
        self._addrs = addrs[:ADDRS_MAX]
        self._refresh_at = now
        self.adverts.offer(self._offers, now)
        return self.tick(now)

    def _hello(self, now: float) -> Hello:
        return Hello(
            version=PROTOCOL_VERSION,
            mesh=self._mesh.mesh_id,
            chain=self._chain,
            unix_ms=int(self._unix_of(now) * 1000),
        )

    def _own_record(self, now: float) -> bytes:
        """Our newest record; made anew when it says something else, or by `_publish_record`."""
        content = (self._addrs, self._models)
        if self._record is None or self._recorded != content:
            self._sequence += 1
            self._recorded = content
            record = NodeRecord(
                mesh=self._mesh.mesh_id,
                sequence=self._sequence,
                issued_at=int(self._unix_of(now)),
                ttl_s=RECORD_TTL_S,
                addrs=self._addrs,
                roles=self._roles,
                models=self._models,
            )
            self._record = self._seal(_RECORD, record)
        return self._record

    def _publish_record(self, now: float) -> list[Effect]:
        """Refresh our record everywhere: in the DHT, and with the members before theirs expires."""
        self._refresh_at = now + RECORD_REFRESH_S * self._rng.uniform(0.75, 1.25)
        if self._members:
            self._in_dht_at = math.inf
        self._record = None
        record = self._own_record(now)
        told = [Send(peer, Peers((record,))) for peer in self._members]
        return [PublishRecord(record, self._models), *told]

    def _has_ended(self, membership: Membership, now: float) -> bool:
        return self._unix_of(now) > membership.not_after + CLOCK_SKEW_S

    def _seal(self, kind: bytes, message: Message) -> bytes:
        return _seal_as(self._key, kind, message)

    def _open(self, envelope: bytes, kind: bytes) -> Signed:
        return open_envelope(envelope, RECORD_DOMAIN, kind, self._genuine)


def _seal_as(key: Signer, kind: bytes, message: Message) -> bytes:
    return seal(key, RECORD_DOMAIN, kind, encode(message))


__all__ = [
    "Connected",
    "CountDemand",
    "CountRefused",
    "DialFailed",
    "Disconnected",
    "GiveOrder",
    "KnownRecord",
    "Learn",
    "Member",
    "RecordFound",
    "RecoverQuorum",
    "SetAddrs",
    "SetHoldings",
    "SetLinks",
    "SetOffers",
    "Stack",
    "Stop",
]
