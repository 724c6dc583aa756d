"""Quorums and what they prove: vote signatures, certificates, and the chain of voters.

Everything here is a pure check that anybody can repeat offline with nothing but the mesh's root
key and the bytes: a gateway that never votes, an auditor with a file, the model checker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from meshnode.errors import RemoteProtocolError
from meshnode.messages import (
    HASH_BYTES,
    Body,
    Decided,
    Genesis,
    Handover,
    Header,
    QuorumCertificate,
    Vote,
)

__all__ = [
    "NO_BLOCK",
    "Faults",
    "Lineage",
    "Verify",
    "VoteKind",
    "body_hash",
    "certificate_is_valid",
    "first_block",
    "group_id",
    "header_hash",
    "may_follow",
    "quorum_of",
    "vote_bytes",
    "vote_is_valid",
]

Faults = Literal["crash", "byzantine"]
VoteKind = Literal["notarize", "nullify", "finalize"]
Verify = Callable[[str, bytes, bytes], bool]
"""(peer id, signature, signed bytes) → whether it is that peer's."""

NO_BLOCK = bytes(HASH_BYTES)
_VOTE_DOMAIN = "meshnode-vote/1"


def quorum_of(voters: int, faults: Faults) -> int:
    """How many of `voters` must agree: any two quorums then share a voter that is not faulty."""
    return voters // 2 + 1 if faults == "crash" else 2 * voters // 3 + 1


def group_id(genesis: bytes) -> str:
    """The id of the group that starts with this encoded `Genesis`."""
    return hashlib.blake2b(genesis, digest_size=16, person=b"meshnode-group").hexdigest()


def body_hash(body: Body) -> bytes:
    return _hash(msgspec.msgpack.encode(body), b"meshnode-body")


def header_hash(header: Header) -> bytes:
    """What votes name: the header's hash, which covers the body's."""
    return _hash(msgspec.msgpack.encode(header), b"meshnode-header")


def first_block(genesis: Genesis, group: str) -> Header:
    """Epoch 0: no items, and the genesis' voters decide what follows."""
    return Header(
        group=group,
        epoch=0,
        previous=NO_BLOCK,
        proposer=genesis.voters[0],
        voters=genesis.voters,
        body=body_hash(Body()),
    )


def may_follow(old: tuple[str, ...], new: tuple[str, ...], faults: Faults) -> bool:
    """Whether one block may change the voters so: one replaced, or as many come or go as keep the
    size useful (a majority of two needs both, so crash groups have odd sizes; a byzantine group
    gains a tolerated liar with every three)."""
    if len(set(new)) != len(new) or not new:
        return False
    came, left = len(set(new) - set(old)), len(set(old) - set(new))
    step = 2 if faults == "crash" else 3
    if faults == "crash" and len(new) % 2 == 0 and len(new) != len(old):
        return False
    return (came, left) in {(0, 0), (1, 1), (step, 0), (0, step)}


def vote_bytes(group: str, epoch: int, view: int, kind: VoteKind, block: bytes) -> bytes:
    """What a voter signs."""
    return msgspec.msgpack.encode((_VOTE_DOMAIN, group, epoch, view, kind, block))


def vote_is_valid(vote: Vote, voters: tuple[str, ...], verify: Verify) -> bool:
    """Whether a voter of the epoch cast this vote."""
    if vote.voter not in voters or (vote.kind == "nullify") != (vote.block == NO_BLOCK):
        return False
    signed = vote_bytes(vote.group, vote.epoch, vote.view, vote.kind, vote.block)
    return verify(vote.voter, vote.signature, signed)


def certificate_is_valid(
    certificate: QuorumCertificate, voters: tuple[str, ...], faults: Faults, verify: Verify
) -> bool:
    """Whether a quorum of distinct voters of the epoch cast these votes (S2)."""
    places = [ballot.voter for ballot in certificate.ballots]
    if sorted(set(places)) != places or places[-1] >= len(voters):
        return False
    if len(places) < quorum_of(len(voters), faults):
        return False
    if (certificate.kind == "nullify") != (certificate.block == NO_BLOCK):
        return False
    signed = vote_bytes(
        certificate.group,
        certificate.epoch,
        certificate.view,
        certificate.kind,
        certificate.block,
    )
    return all(
        verify(voters[ballot.voter], ballot.signature, signed) for ballot in certificate.ballots
    )


@dataclass(frozen=True, slots=True)
class Lineage:
    """Who decides in which epoch, proven from the genesis on (S9).

    `handovers` are the headers that changed the voters, each proven by the voters before it or by
    the mesh's root.
    """

    genesis: Header
    faults: Faults
    handovers: tuple[Handover, ...] = ()

    @property
    def anchor(self) -> int:
        """The epoch of the newest change of voters."""
        return self.handovers[-1].header.epoch if self.handovers else 0

    def voters_of(self, epoch: int) -> tuple[str, ...]:
        """Who decides `epoch`, as far as is known."""
        voters = self.genesis.voters
        for handover in self.handovers:
            if handover.header.epoch >= epoch:
                break
            voters = handover.header.voters
        return voters

    def after(self, anchor: int) -> tuple[Handover, ...]:
        """The changes of voters that someone who knows them up to `anchor` lacks."""
        return tuple(each for each in self.handovers if each.header.epoch > anchor)

    def prove(
        self, handover: Handover, verify: Verify, recovered: Callable[[bytes], Header]
    ) -> None:
        """Check that a block newer than the anchor was decided by its epoch's voters.

        `recovered` opens a `Recovery` signed by the mesh's root. Raises `RemoteProtocolError`.
        """
        header, certificate = handover.header, handover.certificate
        if header.group != self.genesis.group:
            raise RemoteProtocolError("a block of another group")
        if header.epoch <= self.anchor:
            raise RemoteProtocolError("a block from before the voters changed")
        if handover.recovery is not None:
            if certificate is not None or recovered(handover.recovery) != header:
                raise RemoteProtocolError("a recovery of another block")
            return
        if certificate is None:
            raise RemoteProtocolError("a block without a proof")
        if (
            certificate.kind != "finalize"
            or certificate.group != header.group
            or certificate.epoch != header.epoch
            or certificate.block != header_hash(header)
        ):
            raise RemoteProtocolError("a certificate of another block")
        voters = self.voters_of(header.epoch)
        if not certificate_is_valid(certificate, voters, self.faults, verify):
            raise RemoteProtocolError("a certificate without a quorum")
        if not may_follow(voters, header.voters, self.faults):
            raise RemoteProtocolError("too many voters changed in one block")

    def extended(self, handover: Handover) -> Lineage:
        """With a proven block, kept only if it changed the voters or was a recovery."""
        changed = handover.header.voters != self.voters_of(handover.header.epoch)
        is_known = handover.header.epoch <= self.anchor
        if is_known or (not changed and handover.recovery is None):
            return self
        return Lineage(self.genesis, self.faults, (*self.handovers, handover))

    def follow(
        self, decided: Decided, verify: Verify, recovered: Callable[[bytes], Header]
    ) -> Lineage:
        """The lineage that a `Decided` leads to, all of it checked. Raises `RemoteProtocolError`.

        Its newest block is proven too, but enters the lineage only if it changed the voters.
        """
        lineage = self
        for handover in decided.lineage:
            if handover.header.epoch > lineage.anchor:
                lineage.prove(handover, verify, recovered)
                lineage = lineage.extended(handover)
        if decided.newest is not None:
            if decided.body is None or body_hash(decided.body) != decided.newest.header.body:
                raise RemoteProtocolError("a block with another body")
            if decided.newest.header.epoch > lineage.anchor:
                lineage.prove(decided.newest, verify, recovered)
                lineage = lineage.extended(decided.newest)
            elif all(each.header != decided.newest.header for each in lineage.handovers):
                raise RemoteProtocolError("a block from before the voters changed")
        return lineage


def _hash(data: bytes, person: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES, person=person).digest()
