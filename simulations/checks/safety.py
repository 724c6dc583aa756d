"""S1 to S5 and S7 to S10: what holds after every single event, whatever has happened.

* S1  one finalized block per group and epoch
* S2  every applied block has a quorum of distinct valid voters of that epoch
* S3  a node's applied epoch never falls, restarts included, unless its disk is lost
* S4  one owner per group, epoch, shard and replica
* S5  no instant of true time with two holders of an exclusive right
* S7  an assignment covers all layers of every replica
* S8  committed bytes are at most those advertised
* S9  the voters of the next epoch are certified by those of this one
* S10 no honest node contradicts itself, crash and restart included
* `spin` no stack wants to be ticked again at the instant it was ticked

(S6, that nobody takes work under an older epoch than it knows, is checked where work is taken:
`models/gateway.py`.) A block is judged once, when the first node holds it; votes when they are
sent. Nothing here asks the code under test whether a block is valid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from meshnode.identity import Verify, open_envelope, verify_by
from meshnode.messages import Body, Consent, Header, Order, Proposal, QuorumCertificate, Shard, Vote
from meshnode.protocol import Effect, Send
from meshnode.protocol.consensus import Head, Register
from meshnode.protocol.quorum import Faults, header_hash, may_follow, vote_bytes
from meshnode.protocol.stack import RECORD_DOMAIN
from meshnode.protocol.words import CONSENT_TYPE, ORDER_TYPE
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import World

Broken = Callable[[str, str], None]
"""Told of a broken promise: which, and how."""


def stop(promise: str, what: str) -> None:
    """A `Broken` for tests: raises."""
    raise AssertionError(f"{promise}: {what}")


@dataclass
class Safety:
    """Watches a world from its construction on. `liars` are excused from S10 and S3."""

    world: World
    broken: Broken = stop
    rights: tuple[str, ...] = ()
    """The exclusive rights that S5 is checked for; each costs a look at every node and event."""
    liars: frozenset[int] = frozenset()
    blocks: dict[tuple[str, int], bytes] = field(default_factory=dict)
    """(group, epoch) -> the hash of the block that some node holds for decided."""
    headers: dict[tuple[str, int], Header] = field(default_factory=dict)
    epochs: dict[tuple[int, str], int] = field(default_factory=dict)
    """(machine, group) -> the newest epoch it has shown."""
    votes: dict[tuple[str, str, int, int, str], bytes] = field(default_factory=dict)
    decided_s: dict[tuple[str, int], float] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    handed: list[tuple[float, str, str | None]] = field(default_factory=list)
    """When a right began or ceased to be held, and by whom."""
    on_epoch: list[Callable[[Machine, str, int, float], None]] = field(default_factory=list)
    """Told when a machine learns of an epoch: which group and epoch, how long after the first."""

    def __post_init__(self) -> None:
        self.world.on_effect.append(self._on_effect)
        self.world.on_disk_lost.append(self._on_disk_lost)
        self.world.on_spin.append(lambda machine: self.broken("spin", f"{machine.name} would spin"))
        self.world.loop.after_each.append(self._check)

    def _on_disk_lost(self, machine: Machine) -> None:
        for key in [key for key in self.epochs if key[0] == machine.index]:
            del self.epochs[key]

    def _on_effect(self, machine: Machine, effect: Effect) -> None:
        if not isinstance(effect, Send) or machine.index in self.liars:
            return
        message = effect.message
        vote = message.vote if isinstance(message, Proposal) else message
        if not isinstance(vote, Vote) or vote.voter != machine.peer_id:
            return
        said = (vote.voter, vote.group, vote.epoch, vote.view)
        before = self.votes.setdefault((*said, vote.kind), vote.block)
        if before != vote.block:
            self.broken("S10", f"{machine.name} votes for two blocks: {vote}")
        other = {"finalize": "nullify", "nullify": "finalize"}.get(vote.kind)
        if other is not None and (*said, other) in self.votes:
            self.broken("S10", f"{machine.name} contradicts itself: {vote}")

    def _check(self) -> None:
        machine = self.world.acted
        if machine is not None and machine.stack is not None:
            for register in machine.stack.agreement.registers():
                self._check_head(machine, register)
        if self.rights:
            self._check_rights()

    def _check_rights(self) -> None:
        holders: defaultdict[str, list[str]] = defaultdict(list)
        for machine in self.world.machines:
            if machine.stack is not None:
                for right in self.rights:
                    now_s = self.world.now_of(machine)
                    if machine.stack.agreement.holds_right(right, now_s):
                        holders[right].append(machine.name)
        for right in self.rights:
            found = holders[right]
            if len(found) > 1:
                self.broken("S5", f"{right} is held by {found}")
            now_held = found[0] if found else None
            if now_held != self.holders.get(right):
                self.handed.append((self.world.loop.now_s, right, now_held))
                if now_held is None:
                    del self.holders[right]
                else:
                    self.holders[right] = now_held

    def _check_head(self, machine: Machine, register: Register) -> None:
        head, group = register.head, register.group
        newest = self.epochs.get((machine.index, group), -1)
        if head.epoch == newest:
            return
        if head.epoch < newest and machine.index not in self.liars:
            self.broken("S3", f"{machine.name} fell from epoch {newest} to {head.epoch}")
        self.epochs[machine.index, group] = head.epoch
        block = header_hash(head.header)
        known = self.blocks.setdefault((group, head.epoch), block)
        if known != block:
            self.broken("S1", f"two blocks in epoch {head.epoch}")
        now_s = self.world.loop.now_s
        if (group, head.epoch) not in self.headers:
            self.headers[group, head.epoch] = head.header
            self.decided_s[group, head.epoch] = now_s
            self._check_proof(register, head)
            self._check_body(head.body, group)
        for listen in self.on_epoch:
            listen(machine, group, head.epoch, now_s - self.decided_s[group, head.epoch])

    def _check_proof(self, register: Register, head: Head) -> None:
        if head.epoch == 0:
            return
        proof = head.proof
        if proof is None:
            self.broken("S2", f"epoch {head.epoch} has no proof")
            return
        if proof.recovery is not None:
            return
        faults = register.genesis.faults
        before = self.headers.get((register.group, head.epoch - 1))
        voters = register.lineage.voters_of(head.epoch)
        if before is not None:  # a lone voter may decide several epochs in one step
            if head.header.previous != header_hash(before):
                self.broken("S9", f"epoch {head.epoch} does not follow the one before")
            if before.voters != voters:
                self.broken("S9", f"the voters of epoch {head.epoch} are not those named before")
        if not may_follow(voters, head.header.voters, faults):
            self.broken("S9", f"epoch {head.epoch} replaces too many voters at once")
        certificate = proof.certificate
        genuine = self.world.scheme.genuine
        if certificate is None or not _is_decided(certificate, voters, faults, genuine):
            self.broken("S2", f"the certificate of epoch {head.epoch} is void")
        elif certificate.block != header_hash(head.header):
            self.broken("S2", f"the certificate of epoch {head.epoch} is another block's")

    def _check_body(self, body: Body, group: str) -> None:
        check_body(body, group, self.world.scheme.genuine, self.broken)


def _is_decided(
    certificate: QuorumCertificate, voters: tuple[str, ...], faults: Faults, genuine: Verify
) -> bool:
    """Whether enough distinct voters of the epoch have signed that this block is final."""
    places = {ballot.voter for ballot in certificate.ballots}
    count, of = len(places), len(voters)
    are_enough = 2 * count > of if faults == "crash" else 3 * count > 2 * of
    signed = vote_bytes(
        certificate.group,
        certificate.epoch,
        certificate.view,
        certificate.kind,
        certificate.block,
    )
    return (
        certificate.kind == "finalize"
        and are_enough
        and max(places) < of
        and all(
            verify_by(voters[ballot.voter], ballot.signature, signed, genuine=genuine)
            for ballot in certificate.ballots
        )
    )


def check_body(body: Body, group: str, genuine: Verify, broken: Broken = stop) -> None:
    """S4, S7 and S8, from nothing but the block itself."""
    said: dict[tuple[str, str], Consent] = {}
    for envelope in body.consents:
        signed = open_envelope(envelope, RECORD_DOMAIN, CONSENT_TYPE, genuine)
        consent = msgspec.msgpack.decode(signed.payload, type=Consent)
        if consent.group != group:
            broken("S8", "a consent to another group")
        said[signed.signer, consent.model] = consent
    owners = [(item.model, item.replica, item.shard) for item in body.items]
    if len(set(owners)) != len(owners):
        broken("S4", "two owners of one shard")
    replicas: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    committed: defaultdict[str, int] = defaultdict(int)
    counted: dict[tuple[str, str, Shard], int] = {}
    for item in body.items:
        units = set(range(item.shard.first, item.shard.end))
        if units & replicas[item.model, item.replica]:
            broken("S4", "shards overlap")
        replicas[item.model, item.replica] |= units
        # The same layers in an old and a new replica are in memory once.
        held = (item.owner, item.model, item.shard)
        committed[item.owner] += max(item.bytes - counted.get(held, 0), 0)
        counted[held] = max(item.bytes, counted.get(held, 0))
        if said[item.owner, item.model].state not in ("file", "ready"):
            broken("S7", f"{item.owner} owns what it cannot serve")
    for item in body.items:
        if replicas[item.model, item.replica] != set(range(item.shard.of)):
            broken("S7", f"a gap in replica {item.replica} of {item.name}")
    for owner, total in committed.items():
        offered = max(
            (word.sequence, word.memory_bytes) for (peer, _), word in said.items() if peer == owner
        )
        if total > offered[1]:
            broken("S8", f"{total} of {offered[1]} bytes are promised")
    rights = [claim.right for claim in body.claims]
    if len(set(rights)) != len(rights):
        broken("S5", "one right, two holders")
    for envelope in body.orders:
        signed = open_envelope(envelope, RECORD_DOMAIN, ORDER_TYPE, genuine)
        if msgspec.msgpack.decode(signed.payload, type=Order).group != group:
            broken("S8", "an order to another group")
