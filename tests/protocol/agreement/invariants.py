"""What must hold after every single event, whatever has happened: S1 to S5 and S7 to S10.

`watch(cluster)` installs the checks. Blocks are judged once, when a node first holds them; votes
when they are sent. Nothing here asks the code under test whether a block is valid.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import msgspec

from meshnode.identity import open_envelope, verify_by
from meshnode.messages import Body, Consent, Header, Order, Proposal, Vote
from meshnode.protocol import Effect, Send
from meshnode.protocol.consensus import Head, Register
from meshnode.protocol.quorum import certificate_is_valid, header_hash, may_follow
from tests.protocol.cluster import Cluster, Machine

RIGHTS = ("the-pen",)
"""The exclusive rights that runs claim: one, so that they contend for it."""


def registers(machine: Machine) -> list[Register]:
    assert machine.stack is not None
    return [group.register for group in machine.stack.agreement._groups.values()]


@dataclass
class Invariants:
    cluster: Cluster
    blocks: dict[tuple[str, int], bytes] = field(default_factory=dict)
    """(group, epoch) → the hash of the block that some node holds for decided."""
    headers: dict[tuple[str, int], Header] = field(default_factory=dict)
    epochs: dict[tuple[str, str], int] = field(default_factory=dict)
    """(machine, group) → the newest epoch it has shown."""
    votes: dict[tuple[str, str, int, int, str], bytes] = field(default_factory=dict)
    decided_at: dict[tuple[str, int], float] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    handed: list[tuple[float, str, str | None]] = field(default_factory=list)
    """When a right began or ceased to be held, and by whom."""

    def on_effect(self, name: str, effect: Effect) -> None:
        """S10: no honest voter says two things that exclude each other, in all its runs."""
        if not isinstance(effect, Send):
            return
        message = effect.message
        vote = message.vote if isinstance(message, Proposal) else message
        if not isinstance(vote, Vote) or vote.voter != self.cluster.machines[name].peer_id:
            return
        said = (vote.voter, vote.group, vote.epoch, vote.view)
        before = self.votes.setdefault((*said, vote.kind), vote.block)
        assert before == vote.block, f"S10: {name} votes for two blocks: {vote}"
        other = {"finalize": "nullify", "nullify": "finalize"}.get(vote.kind)
        if other is not None:
            assert (*said, other) not in self.votes, f"S10: {name} contradicts itself: {vote}"

    def check(self) -> None:
        holders: defaultdict[str, list[str]] = defaultdict(list)
        for name, machine in self.cluster.machines.items():
            if machine.stack is None:
                continue
            for register in registers(machine):
                self._check_head(name, register)
            for right in RIGHTS:
                if machine.stack.agreement.holds_right(right, self.cluster.now):
                    holders[right].append(name)
        for right in RIGHTS:
            found = holders[right]
            assert len(found) <= 1, f"S5: {right} is held by {found} at {self.cluster.now}"
            now_held = found[0] if found else None
            if now_held != self.holders.get(right):
                self.handed.append((self.cluster.now, right, now_held))
                if now_held is None:
                    del self.holders[right]
                else:
                    self.holders[right] = now_held

    def _check_head(self, name: str, register: Register) -> None:
        head, group = register.head, register.group
        newest = self.epochs.get((name, group), -1)
        assert head.epoch >= newest, f"S3: {name} fell from epoch {newest} to {head.epoch}"
        if head.epoch == newest:
            return
        self.epochs[name, group] = head.epoch
        block = header_hash(head.header)
        known = self.blocks.setdefault((group, head.epoch), block)
        assert known == block, f"S1: two blocks in epoch {head.epoch}"
        if (group, head.epoch) not in self.headers:
            self.headers[group, head.epoch] = head.header
            self.decided_at[group, head.epoch] = self.cluster.now
            self._check_proof(register, head)
            check_body(head.body, group)

    def _check_proof(self, register: Register, head: Head) -> None:
        """S2 and S9: a quorum of the voters that the block before named has decided it."""
        if head.epoch == 0:
            return
        assert head.proof is not None
        if head.proof.recovery is not None:
            return
        before = self.headers.get((register.group, head.epoch - 1))
        certificate = head.proof.certificate
        assert certificate is not None
        voters = register.lineage.voters_of(head.epoch)
        if before is not None:  # a lone voter may decide several epochs in one step
            assert head.header.previous == header_hash(before), "S9"
            assert before.voters == voters, "S9"
        assert may_follow(voters, head.header.voters, register.genesis.faults), "S9"
        assert certificate_is_valid(certificate, voters, register.genesis.faults, verify_by), "S2"
        assert certificate.block == header_hash(head.header), "S2"


def check_body(body: Body, group: str) -> None:
    """S4, S7 and S8, from nothing but the block itself."""
    said: dict[tuple[str, str], Consent] = {}
    for envelope in body.consents:
        signed = open_envelope(envelope, "meshnode-record", b"/meshnode/consent/1")
        consent = msgspec.msgpack.decode(signed.payload, type=Consent)
        assert consent.group == group
        said[signed.signer, consent.model] = consent
    owners = [(item.model, item.replica, item.shard) for item in body.items]
    assert len(set(owners)) == len(owners), "S4: two owners of one shard"
    replicas: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    committed: defaultdict[str, int] = defaultdict(int)
    for item in body.items:
        units = set(range(item.shard.first, item.shard.end))
        assert not units & replicas[item.model, item.replica], "S4: shards overlap"
        replicas[item.model, item.replica] |= units
        committed[item.owner] += item.bytes
        assert said[item.owner, item.model].state in ("file", "ready"), "an owner that cannot"
    for item in body.items:
        assert replicas[item.model, item.replica] == set(range(item.shard.of)), "S7: a gap"
    for owner, total in committed.items():
        offered = max(
            (word.sequence, word.memory_bytes) for (peer, _), word in said.items() if peer == owner
        )
        assert total <= offered[1], f"S8: {total} of {offered[1]} bytes are promised"
    rights = [claim.right for claim in body.claims]
    assert len(set(rights)) == len(rights), "S5: one right, two holders"
    for envelope in body.orders:
        signed = open_envelope(envelope, "meshnode-record", b"/meshnode/order/1")
        assert msgspec.msgpack.decode(signed.payload, type=Order).group == group


def watch(cluster: Cluster) -> Invariants:
    """Check `cluster` from now on."""
    found = Invariants(cluster)
    cluster.watch, cluster.check = found.on_effect, found.check
    return found
