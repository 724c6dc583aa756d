"""One group's register: which block stands in the newest epoch, decided by signed votes.

Simplex (Chan & Pass, eprint 2023/463) for one block at a time: the leader of a view proposes,
voters *notarize*, whoever sees a quorum of that in time *finalizes*, and whoever waits too long
*nullifies* and moves to the next view. Two rules keep it safe, whatever is lost or delayed:

* who finalizes a view never nullifies it, and the other way round;
* a proposal must show that every earlier view was nullified, or carry on the block that was
  notarized in the newest one that was not.

So if a quorum finalized a block, no quorum can have nullified that view, and every later view can
only carry the same block on. The next epoch starts when this one is decided, by the voters that
its block names; the newest block with its certificate is all the state there is.

Votes are durable before they are sent (`Persist` stands before the `Send`s): a voter that comes
back from a crash knows what it has said. What a block *means* is the application's to judge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec import Struct

from meshnode.errors import ConfigError, RemoteProtocolError
from meshnode.identity import PeerId
from meshnode.messages import (
    JUSTIFICATION_MAX,
    LINEAGE_MAX,
    Ballot,
    Body,
    Decided,
    Genesis,
    GetDecided,
    Handover,
    Header,
    Proposal,
    QuorumCertificate,
    Vote,
)
from meshnode.protocol import Effect, Persist, Send
from meshnode.protocol.quorum import (
    NO_BLOCK,
    Lineage,
    Verify,
    VoteKind,
    body_hash,
    certificate_is_valid,
    first_block,
    group_id,
    header_hash,
    may_follow,
    quorum_of,
    vote_bytes,
    vote_is_valid,
)

__all__ = ["Application", "Head", "Register", "Timing"]

VIEWS_AHEAD_MAX = 16
"""Votes for views further ahead are dropped: who is that far behind is helped by a certificate."""
TOLD_MAX = 256
"""Peers whose last question is remembered: four times those one is connected to."""
ANSWER_EVERY_S = 0.2
"""A peer that is behind gets the newest block at most this often."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a view may take. Every view that fails gives the next one more time."""

    view_s: float = 1.0
    view_step_s: float = 0.5
    view_max_s: float = 8.0
    carry_on_s: float = 0.5
    """A block that is notarized but not final yet is proposed again after this long; ordinarily
    the votes that finalize it are on their way."""
    resend_s: float = 1.0
    """What a lost message costs at most; sent only while an epoch is being decided."""

    def timeout_s(self, view: int) -> float:
        return min(self.view_s + self.view_step_s * (view - 1), self.view_max_s)


@dataclass(frozen=True, slots=True)
class Head:
    """The newest decided block."""

    header: Header
    body: Body
    proof: Handover | None
    """None for epoch 0, which the group's id proves."""

    @property
    def epoch(self) -> int:
        return self.header.epoch


class Application(Protocol):
    """What blocks mean, and who is alive: asked by the register, answered at once."""

    def propose(self, head: Head, now: float) -> tuple[Body, tuple[str, ...]]:
        """The body and voters of a block after `head`; the head's own if nothing is to change."""
        ...

    def refuses(self, head: Head, header: Header, body: Body, now: float) -> str | None:
        """Why this block must not be voted for, or None."""
        ...

    def is_alive(self, voter: str) -> bool:
        """Whether a voter answers, as far as this node can tell."""
        ...


class _Cast(Struct, frozen=True):
    """A vote of our own."""

    view: int
    kind: VoteKind
    block: bytes
    signature: bytes


class _Journal(Struct, frozen=True):
    """What survives a crash: the newest block, and every word given in the epoch after it, with
    what entitled us to it."""

    genesis: bytes
    lineage: tuple[Handover, ...]
    newest: Handover | None
    body: Body
    casts: tuple[_Cast, ...]
    certificates: tuple[QuorumCertificate, ...]
    proposals: tuple[Proposal, ...]
    has_memory: bool


@dataclass
class _Round:
    """The epoch that is being decided."""

    epoch: int
    voters: tuple[str, ...]
    view: int = 1
    is_active: bool = False
    """Somebody has proposed: this epoch must come to an end."""
    clock_from: float | None = None
    """Since when the present view has had a reason to end."""
    resend_at: float = math.inf
    proposals: dict[int, Proposal] = field(default_factory=dict)
    blocks: dict[bytes, tuple[Header, Body]] = field(default_factory=dict)
    votes: dict[tuple[int, VoteKind], dict[int, tuple[bytes, bytes]]] = field(default_factory=dict)
    """(view, kind) → a voter's place → block and signature; the first word counts."""
    certificates: dict[tuple[int, VoteKind], QuorumCertificate] = field(default_factory=dict)
    casts: dict[tuple[int, VoteKind], _Cast] = field(default_factory=dict)
    deferred: Proposal | None = None
    """A proposal that was refused for what we knew then."""
    is_missing_block: bool = False
    """It is decided, and we have not seen what: the others are asked."""

    def finalized(self) -> QuorumCertificate | None:
        found = (c for (_, kind), c in self.certificates.items() if kind == "finalize")
        return next(found, None)

    def notarized(self) -> QuorumCertificate | None:
        """The newest notarization."""
        views = [view for view, kind in self.certificates if kind == "notarize"]
        return self.certificates[max(views), "notarize"] if views else None


class Register:
    """One group as one node sees it, as a voter or as one who only follows. A sans-IO core."""

    def __init__(
        self,
        own: str,
        sign: Callable[[bytes], bytes],
        verify: Verify,
        genesis: Genesis,
        envelope: bytes,
        application: Application,
        *,
        open_recovery: Callable[[bytes], Header],
        journal: bytes | None = None,
        timing: Timing = Timing(),
    ) -> None:
        """`envelope` is the signed genesis, as peers are shown it. `journal` is what was persisted
        last; raises `ConfigError` if it is damaged.
        """
        self.own = own
        self.group = group_id(msgspec.msgpack.encode(genesis))
        self.genesis = genesis
        self.equivocations: dict[str, tuple[Vote, Vote]] = {}
        """Two signed votes of one voter that exclude each other: evidence for anybody."""
        self.refused: Counter[str] = Counter()
        self._sign = sign
        self._verify = verify
        self._envelope = envelope
        self._application = application
        self._open_recovery = open_recovery
        self._timing = timing
        first = first_block(genesis, self.group)
        self.lineage = Lineage(first, genesis.faults)
        self.head = Head(first, Body(), None)
        self._is_new = self._dirty = journal is None
        self._has_memory = True
        self._is_wanted = False
        self._answered: dict[str, float] = {}
        self._told: dict[str, tuple[GetDecided, float]] = {}
        self._entered_at = -math.inf
        self._round = _Round(1, genesis.voters)
        if journal is not None:
            self._restore(journal)

    @staticmethod
    def genesis_in(journal: bytes) -> bytes:
        """The signed genesis that a journal begins with. Raises `ConfigError` if it is damaged."""
        return _read(journal).genesis

    # --- what others ask ------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What its journal is called."""
        return f"register-{self.group}"

    @property
    def voters(self) -> tuple[str, ...]:
        """Who decides the next epoch."""
        return self._round.voters

    @property
    def quorum(self) -> int:
        return quorum_of(len(self.voters), self.genesis.faults)

    @property
    def votes(self) -> bool:
        """Whether this node decides the next epoch."""
        return self.own in self._round.voters and self._has_memory

    @property
    def has_memory(self) -> bool:
        """False if this node may have lost what it said as a voter: it abstains, and should not be
        named one before a block stands that does not name it."""
        return self._has_memory

    @property
    def view(self) -> int:
        return self._round.view

    @property
    def is_deciding(self) -> bool:
        return self._round.is_active

    def leader(self, view: int | None = None) -> str:
        """Who proposes in a view; the proposer of the newest block goes on while it can."""
        voters, last = self._round.voters, self.head.header.proposer
        start = voters.index(last) if last in voters else 0
        return voters[(start + (self._round.view if view is None else view) - 1) % len(voters)]

    def pledged(self) -> tuple[tuple[Header, Body], ...]:
        """The blocks that this voter has notarized in the epoch that is being decided."""
        return tuple(
            self._round.blocks[cast.block]
            for (_, kind), cast in self._round.casts.items()
            if kind == "notarize"
        )

    def decided(self, anchor: int) -> Decided:
        """All that one needs who knows the changes of voters up to `anchor`."""
        lineage = self.lineage.after(anchor)
        if len(lineage) > LINEAGE_MAX:
            return Decided(self._envelope, lineage[:LINEAGE_MAX], None, None)
        return Decided(self._envelope, lineage, self.head.proof, self.head.body)

    # --- inputs ---------------------------------------------------------------------------------

    def want(self, is_wanted: bool, now: float) -> list[Effect]:
        """Say whether the application would change something; asked for until it is decided."""
        self._is_wanted = is_wanted
        return self._advance([], now)

    def reconsider(self, now: float) -> list[Effect]:
        """Judge the proposal again that was refused last: we know more now, say of a death."""
        deferred, self._round.deferred = self._round.deferred, None
        if deferred is None or not self.votes:
            return []
        self._on_proposal(deferred, now)
        return self._advance([], now)

    def receive(
        self,
        sender: str,
        message: Proposal | Vote | QuorumCertificate | Decided | GetDecided,
        now: float,
    ) -> list[Effect]:
        """Take a message about this group. Raises `RemoteProtocolError` if only a liar sends it."""
        effects: list[Effect] = []
        match message:
            case GetDecided():
                if message.epoch >= self.head.epoch or self._has_told(sender, message, now):
                    return []
                return [Send(PeerId(sender), self.decided(message.anchor))]
            case Decided():
                return self._on_decided(sender, message, now)
        epoch = message.header.epoch if isinstance(message, Proposal) else message.epoch
        if epoch > self._round.epoch:
            return self._answer(sender, self._question(), now)
        if epoch < self._round.epoch:
            # It does not know that this is over, unless it has only just come to an end.
            is_late = epoch == self.head.epoch and now < self._entered_at + ANSWER_EVERY_S
            if is_late or isinstance(message, QuorumCertificate) or self.head.proof is None:
                return []
            return self._answer(sender, self.decided(epoch - 1), now)
        if not self.votes:
            return []
        match message:
            case Proposal():
                self._on_proposal(message, now)
            case Vote():
                self._on_vote(message)
            case QuorumCertificate():
                self._on_certificate(message)
        return self._advance(effects, now)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self.votes and self._round.resend_at <= now:
            effects.extend(self._resend(now))
        return self._advance(effects, now)

    def deadline(self) -> float | None:
        this = self._round
        if not self.votes:
            return None
        soonest = this.resend_at
        if this.clock_from is not None and not this.is_missing_block:
            # Whoever came back from a crash may have finalized the view that it is in again.
            has_ended = {(this.view, "nullify"), (this.view, "finalize")} & this.casts.keys()
            if not has_ended:
                soonest = min(soonest, this.clock_from + self._timing.timeout_s(this.view))
                if self._may_carry_on():
                    soonest = min(soonest, this.clock_from + self._timing.carry_on_s)
        return None if soonest == math.inf else soonest

    def recovery_header(self, voters: tuple[str, ...]) -> Header:
        """The block by which the mesh's root goes on after a quorum is lost for ever.

        Its epoch is 2³² further on, beyond whatever the lost voters may still decide among
        themselves (as etcd's --force-new-cluster starts a new cluster).
        """
        return Header(
            group=self.group,
            epoch=self.head.epoch + 2**32,
            previous=header_hash(self.head.header),
            proposer=voters[0],
            voters=voters,
            body=body_hash(self.head.body),
        )

    def recover(self, recovery: bytes, now: float) -> list[Effect]:
        """Go on from a `Recovery` of the mesh's root. Raises `RemoteProtocolError`."""
        handover = Handover(self._open_recovery(recovery), None, recovery)
        effects = self._on_decided(
            self.own, Decided(self._envelope, (), handover, self.head.body), now
        )
        if self.head.proof == handover:
            # Whatever we said and forgot, it was not about the epoch that begins now.
            self._has_memory = self._dirty = True
        return self._advance(effects, now)

    # --- the three kinds of message of an open epoch --------------------------------------------

    def _on_proposal(self, proposal: Proposal, now: float) -> None:
        this, header, vote = self._round, proposal.header, proposal.vote
        block = header_hash(header)
        view = vote.view
        if not 1 <= view <= this.view + VIEWS_AHEAD_MAX:
            return
        known = this.proposals.get(view)
        if known is not None and known.vote.block == block:
            return
        if (
            (vote.group, vote.epoch, vote.kind) != (self.group, this.epoch, "notarize")
            or vote.block != block
            or vote.voter != self.leader(view)
            or not vote_is_valid(vote, this.voters, self._verify)
        ):
            raise RemoteProtocolError("a proposal that its leader did not vote for")
        if known is not None:
            self._count(vote)  # a second block for one view convicts its leader
            return
        if (
            header.group != self.group
            or header.previous != header_hash(self.head.header)
            or header.body != body_hash(proposal.body)
            or header.proposer not in this.voters
            or not may_follow(this.voters, header.voters, self.genesis.faults)
        ):
            raise RemoteProtocolError("a proposal that does not follow from the newest block")
        for certificate in proposal.justification:
            self._on_certificate(certificate)
        if not self._is_justified(proposal, block):
            self.refused["proposal without justification"] += 1
            return
        if proposal.parent_view == 0:
            if header.proposer != vote.voter:
                raise RemoteProtocolError("a proposal in another's name")
            reason = self._application.refuses(self.head, header, proposal.body, now)
            if reason is not None:
                self.refused[reason] += 1
                this.deferred = proposal
                return
        this.proposals[view] = proposal
        this.blocks[block] = (header, proposal.body)
        this.is_active = True
        self._count(vote)

    def _is_justified(self, proposal: Proposal, block: bytes) -> bool:
        """Whether every view between its parent and its own is known to be nullified."""
        certificates, parent = self._round.certificates, proposal.parent_view
        if parent >= proposal.vote.view:
            return False
        if parent > 0:
            notarization = certificates.get((parent, "notarize"))
            if notarization is None or notarization.block != block:
                return False
        between = range(parent + 1, proposal.vote.view)
        return all((view, "nullify") in certificates for view in between)

    def _on_vote(self, vote: Vote) -> None:
        if vote.view > self._round.view + VIEWS_AHEAD_MAX:
            return
        is_ours = vote.group == self.group
        if not is_ours or not vote_is_valid(vote, self._round.voters, self._verify):
            raise RemoteProtocolError("a vote that nobody entitled has cast")
        self._count(vote)

    def _on_certificate(self, certificate: QuorumCertificate) -> None:
        this = self._round
        key = (certificate.view, certificate.kind)
        if key in this.certificates or certificate.view < 1:
            return
        if (certificate.group, certificate.epoch) != (
            self.group,
            this.epoch,
        ) or not certificate_is_valid(certificate, this.voters, self.genesis.faults, self._verify):
            raise RemoteProtocolError("a certificate without a quorum")
        this.certificates[key] = certificate

    def _count(self, vote: Vote) -> None:
        """Add a verified vote; the first word of a voter counts, a second one convicts it."""
        this = self._round
        place = this.voters.index(vote.voter)
        said = this.votes.setdefault((vote.view, vote.kind), {})
        before = said.setdefault(place, (vote.block, vote.signature))
        if before[0] != vote.block:
            self._convict(vote, vote.kind, before)
        other: VoteKind = "nullify" if vote.kind == "finalize" else "finalize"
        excluded = this.votes.get((vote.view, other), {}).get(place)
        if vote.kind != "notarize" and excluded is not None:
            self._convict(vote, other, excluded)

    def _convict(self, vote: Vote, kind: VoteKind, said: tuple[bytes, bytes]) -> None:
        block, signature = said
        first = msgspec.structs.replace(vote, kind=kind, block=block, signature=signature)
        self.equivocations.setdefault(vote.voter, (first, vote))

    # --- what follows from all that has been said -----------------------------------------------

    def _advance(self, effects: list[Effect], now: float) -> list[Effect]:
        """Do everything that can be done now. Votes go out after they are durable."""
        said: list[Effect] = []
        while self.votes and self._step(said, now):
            pass
        this = self._round
        wanted = self._is_wanted or this.is_active
        if not wanted or not self.votes:
            this.clock_from, this.resend_at = None, math.inf
        elif this.clock_from is None:
            this.clock_from, this.resend_at = now, now + self._timing.resend_s
        self._is_new = False
        if self._dirty:
            self._dirty = False
            effects.append(Persist(self.name, self._journal()))
        return [*effects, *said]

    def _step(self, said: list[Effect], now: float) -> bool:
        """One thing, if there is one to do; whether there may be more."""
        this = self._round
        if self._collect(said):
            return True
        final = this.finalized()
        if final is not None:
            block = this.blocks.get(final.block)
            if block is None:
                if not this.is_missing_block:
                    this.is_missing_block = this.is_active = True
                    said.extend(self._to_voters(self._question()))
                return False
            header, body = block
            self._enter_epoch(Head(header, body, Handover(header, final)), now)
            return True
        if any(view >= this.view and kind != "finalize" for view, kind in this.certificates):
            passed = max(v for v, kind in this.certificates if kind != "finalize")
            this.view = passed + 1
            this.is_active = True  # a quorum wants an end of it
            this.clock_from, this.resend_at = now, now + self._timing.resend_s
            return True
        for view, kind in tuple(this.certificates):
            if kind == "notarize" and not {(view, "nullify"), (view, "finalize")} & set(this.casts):
                self._cast(said, view, "finalize", this.certificates[view, kind].block)
                return True
        proposal = this.proposals.get(this.view)
        if proposal is not None:
            if (this.view, "notarize") not in this.casts:
                self._cast(said, this.view, "notarize", header_hash(proposal.header))
                return True
        elif self._should_propose(now):
            return self._propose(said, now)
        if self._should_give_up(now):
            self._cast(said, this.view, "nullify", NO_BLOCK)
            return True
        return False

    def _collect(self, said: list[Effect]) -> bool:
        """Turn votes into a certificate, if there is a new quorum."""
        this = self._round
        for key, votes in this.votes.items():
            if key in this.certificates or len(votes) < self.quorum:
                continue
            block, count = Counter(block for block, _ in votes.values()).most_common(1)[0]
            if count < self.quorum:
                continue
            ballots = tuple(
                Ballot(place, signature)
                for place, (voted, signature) in sorted(votes.items())
                if voted == block
            )
            view, kind = key
            this.certificates[key] = QuorumCertificate(
                self.group, this.epoch, view, kind, block, ballots
            )
            return True
        return False

    def _should_propose(self, now: float) -> bool:
        this = self._round
        if self.leader() != self.own or self._has_given_up():
            return False
        if (this.view, "notarize") in this.casts or not (self._is_wanted or this.is_active):
            return False
        if this.notarized() is None:
            return self._justification() is not None
        since = now if this.clock_from is None else this.clock_from
        return self._may_carry_on() and now >= since + self._timing.carry_on_s

    def _may_carry_on(self) -> bool:
        """Whether we lead a view that has to carry on a notarized block, and can."""
        this = self._round
        notarized = this.notarized()
        return (
            self.leader() == self.own
            and this.view not in this.proposals
            and notarized is not None
            and notarized.block in this.blocks
            and self._justification() is not None
        )

    def _justification(self) -> tuple[QuorumCertificate, ...] | None:
        """What a proposal in this view must show; None if we came here by a certificate of a
        later view and lack some. Then the next leader has them."""
        this = self._round
        notarized = this.notarized()
        parent = 0 if notarized is None else notarized.view
        found = [this.certificates.get((v, "nullify")) for v in range(parent + 1, this.view)]
        proofs = [certificate for certificate in found if certificate is not None]
        if len(proofs) < len(found):
            return None
        return tuple(proofs if notarized is None else [notarized, *proofs])

    def _propose(self, said: list[Effect], now: float) -> bool:
        this = self._round
        notarized, proofs = this.notarized(), self._justification()
        assert proofs is not None
        if notarized is None:
            parent = 0
            body, voters = self._application.propose(self.head, now)
            header = Header(
                group=self.group,
                epoch=this.epoch,
                previous=header_hash(self.head.header),
                proposer=self.own,
                voters=voters,
                body=body_hash(body),
            )
        else:
            parent = notarized.view
            header, body = this.blocks[notarized.block]
        block = header_hash(header)
        this.blocks[block] = (header, body)
        vote = self._cast(said, this.view, "notarize", block, tell=False)
        proposal = Proposal(header, body, parent, proofs[-JUSTIFICATION_MAX:], vote)
        this.proposals[this.view] = proposal
        this.is_active = True
        said.extend(self._to_voters(proposal))
        return True

    def _has_given_up(self) -> bool:
        return (self._round.view, "nullify") in self._round.casts

    def _should_give_up(self, now: float) -> bool:
        """Whether to nullify the present view.

        After its time; or at once when its leader is dead, for one round of leaders: whoever takes
        all of them for dead is wrong about somebody, and views must not fly past. Or when so many
        others have given up that it cannot be finalized any more.
        """
        this = self._round
        if self._has_given_up() or (this.view, "finalize") in this.casts:
            return False
        others = len(this.votes.get((this.view, "nullify"), {}))
        if others > len(this.voters) - self.quorum:
            return True
        if not (self._is_wanted or this.is_active):
            return False
        leader = self.leader()
        has_proposed = this.view in this.proposals or leader == self.own
        is_first_round = this.view <= len(this.voters)
        if is_first_round and not has_proposed and not self._application.is_alive(leader):
            return True
        since = now if this.clock_from is None else this.clock_from
        return now >= since + self._timing.timeout_s(this.view)

    def _cast(
        self, said: list[Effect], view: int, kind: VoteKind, block: bytes, *, tell: bool = True
    ) -> Vote:
        """Vote: durable before anybody hears of it."""
        this = self._round
        signature = self._sign(vote_bytes(self.group, this.epoch, view, kind, block))
        this.casts[view, kind] = _Cast(view, kind, block, signature)
        self._dirty = True
        vote = Vote(self.group, this.epoch, view, kind, block, self.own, signature)
        self._count(vote)
        if tell:
            said.extend(self._to_voters(vote))
        return vote

    def _resend(self, now: float) -> list[Effect]:
        """Everything of this epoch that a voter may have missed, to all of them."""
        this = self._round
        this.resend_at = now + self._timing.resend_s
        notarized = this.notarized()
        parent = 0 if notarized is None else notarized.view
        # Whoever leads next must show the nullifications of every view since the parent.
        since = max(parent, this.view - JUSTIFICATION_MAX)
        recent = max(parent, this.view - 1)
        messages: list[Proposal | Vote | QuorumCertificate | GetDecided] = [
            certificate
            for (view, kind), certificate in this.certificates.items()
            if view >= since or kind == "finalize"
        ]
        if this.is_missing_block:
            messages.append(self._question())
        messages.extend(
            proposal
            for view, proposal in sorted(this.proposals.items())
            if view >= recent or view == parent
        )
        messages.extend(
            Vote(self.group, this.epoch, cast.view, cast.kind, cast.block, self.own, cast.signature)
            for cast in this.casts.values()
            if cast.view >= since and (cast.view, cast.kind) not in this.certificates
        )
        return [effect for message in messages for effect in self._to_voters(message)]

    def _to_voters(
        self, message: Proposal | Vote | QuorumCertificate | GetDecided
    ) -> Iterator[Effect]:
        return (Send(PeerId(each), message) for each in self._round.voters if each != self.own)

    # --- decided --------------------------------------------------------------------------------

    def _on_decided(self, sender: str, decided: Decided, now: float) -> list[Effect]:
        if decided.newest is not None and decided.newest.header.epoch <= self.head.epoch:
            return []
        before = self.lineage.anchor
        self.lineage = self.lineage.follow(decided, self._verify, self._open_recovery)
        if self._is_new:
            # Nobody is named a voter who has not known the group before. If we are, our disk has
            # lost it, with what we have said: until others have replaced us we say nothing. But
            # if its only founder tells us of no block, there is none, and nothing to have said.
            is_empty = decided.newest is None and self.lineage.anchor == before
            self._has_memory = is_empty and self.genesis.voters == (sender,)
        if decided.newest is None or decided.body is None:
            # Only a part of the voters' history: ask for the rest, if it was news.
            more = self.lineage.anchor > before
            return self._advance([Send(PeerId(sender), self._question())] if more else [], now)
        self._enter_epoch(Head(decided.newest.header, decided.body, decided.newest), now)
        return self._advance([], now)

    def _enter_epoch(self, head: Head, now: float) -> None:
        """Take a proven block as the newest, and open the epoch after it."""
        assert head.epoch > self.head.epoch
        assert head.proof is not None
        self.head = head
        self.lineage = self.lineage.extended(head.proof)
        self._round = _Round(head.epoch + 1, head.header.voters)
        if self.own not in head.header.voters:
            self._has_memory = True
        self._entered_at = now
        self._is_wanted = False
        self._dirty = True

    def _question(self) -> GetDecided:
        return GetDecided(self.group, self.head.epoch, self.lineage.anchor)

    def _answer(self, sender: str, message: Decided | GetDecided, now: float) -> list[Effect]:
        if self._answered.get(sender, -math.inf) > now - ANSWER_EVERY_S:
            return []
        if sender not in self._answered and len(self._answered) >= 2 * len(self._round.voters):
            self._answered.clear()
        self._answered[sender] = now
        return [Send(PeerId(sender), message)]

    def _has_told(self, sender: str, question: GetDecided, now: float) -> bool:
        """Whether the same question has just been answered, with up to a whole message."""
        known, at = self._told.get(sender, (None, -math.inf))
        if known == question and at > now - ANSWER_EVERY_S:
            return True
        if sender not in self._told and len(self._told) >= TOLD_MAX:
            del self._told[next(iter(self._told))]
        self._told[sender] = (question, now)
        return False

    # --- the journal ----------------------------------------------------------------------------

    def _journal(self) -> bytes:
        this = self._round
        return msgspec.msgpack.encode(
            _Journal(
                genesis=self._envelope,
                lineage=self.lineage.handovers,
                newest=self.head.proof,
                body=self.head.body,
                casts=tuple(this.casts.values()),
                certificates=tuple(this.certificates.values()),
                proposals=tuple(
                    this.proposals[view]
                    for view, kind in this.casts
                    if kind == "notarize" and view in this.proposals
                ),
                has_memory=self._has_memory,
            )
        )

    def _restore(self, data: bytes) -> None:
        journal = _read(data)
        self._has_memory = journal.has_memory
        first = self.lineage.genesis
        self.lineage = Lineage(first, self.genesis.faults, journal.lineage)
        if journal.newest is not None:
            self.head = Head(journal.newest.header, journal.body, journal.newest)
        this = self._round = _Round(self.head.epoch + 1, self.head.header.voters)
        for proposal in journal.proposals:
            this.proposals[proposal.vote.view] = proposal
            this.blocks[header_hash(proposal.header)] = (proposal.header, proposal.body)
        for certificate in journal.certificates:
            this.certificates[certificate.view, certificate.kind] = certificate
        for cast in journal.casts:
            this.casts[cast.view, cast.kind] = cast
            self._count(
                Vote(self.group, this.epoch, cast.view, cast.kind, cast.block, self.own,
                     cast.signature)
            )  # fmt: skip
        this.is_active = bool(this.casts)


def _read(data: bytes) -> _Journal:
    try:
        return msgspec.msgpack.decode(data, type=_Journal)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"the stored votes of a group are damaged ({error}): a node that forgot its votes "
            "must come back under a new identity (delete node.key and join again)"
        ) from error
