"""Voters for tests of agreement: cheap signatures, an application that does as told, and a name
for everything that is said.

Signatures are keyed hashes: nobody forges them by accident, and they cost a microsecond. What an
independent judge needs (`is_proven`) is written here a second time, so that a bug in the product's
check cannot hide itself.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from functools import lru_cache

import msgspec

from meshnode.errors import RemoteProtocolError
from meshnode.identity import PeerId
from meshnode.messages import (
    Ballot,
    Body,
    Claim,
    Decided,
    Genesis,
    GetDecided,
    Handover,
    Header,
    Proposal,
    QuorumCertificate,
    Vote,
)
from meshnode.protocol.consensus import Head, Register, Timing
from meshnode.protocol.quorum import (
    NO_BLOCK,
    Faults,
    VoteKind,
    body_hash,
    group_id,
    header_hash,
    vote_bytes,
)

TIMING = Timing()
NOTHING = Body()
NAMES = ("ada", "bob", "cyd", "dan", "eve", "fay", "gus")
Said = Proposal | Vote | QuorumCertificate | Decided | GetDecided
"""What registers say to each other."""


class Violation(AssertionError):
    """A promise of the design page is broken; the text says how it came to that."""


# --- who -----------------------------------------------------------------------------------------


def peer(name: str) -> PeerId:
    """A peer id that can be read."""
    return PeerId(name.ljust(44, "1"))


def peers(*names: str) -> tuple[str, ...]:
    return tuple(peer(name) for name in names)


def name_of(peer_id: str) -> str:
    return peer_id.rstrip("1")


@lru_cache(maxsize=1 << 16)
def signature_of(peer_id: str, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=peer_id.encode()).digest()


def signer(peer_id: str) -> Callable[[bytes], bytes]:
    return lambda data: signature_of(peer_id, data)


def verify(peer_id: str, signature: bytes, data: bytes) -> bool:
    return signature == signature_of(peer_id, data)


# --- one voter -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Wishes:
    """An application that wants what the test says."""

    body: Body | None = None
    voters: tuple[str, ...] | None = None
    swap: tuple[int, str] | None = None
    """Another voter for one place, whoever has it now."""
    refusal: str | None = None
    dead: set[str] = dataclasses.field(default_factory=set)

    def propose(self, head: Head, now: float) -> tuple[Body, tuple[str, ...]]:
        voters = self.voters or head.header.voters
        if self.swap is not None and self.swap[1] not in voters:
            place, newcomer = self.swap
            voters = (*voters[:place], newcomer, *voters[place + 1 :])
        return self.body or head.body, voters

    def refuses(self, head: Head, header: Header, body: Body, now: float) -> str | None:
        return self.refusal

    def is_alive(self, voter: str) -> bool:
        return voter not in self.dead


def a_genesis(count: int, faults: Faults = "crash") -> Genesis:
    return Genesis("a" * 32, faults, peers(*NAMES[:count]), bytes(16))


def open_recovery(recovery: bytes) -> Header:
    """A `Recovery` as the mesh's root signs it, with less ado."""
    header, signature = recovery[:-64], recovery[-64:]
    if not verify("root", signature, header):
        raise RemoteProtocolError("not signed by the mesh's root")
    return msgspec.msgpack.decode(header, type=Header)


def seal_recovery(header: Header) -> bytes:
    data = msgspec.msgpack.encode(header)
    return data + signature_of("root", data)


def a_register(
    name: str,
    genesis: Genesis,
    application: Wishes | None = None,
    *,
    journal: bytes | None = None,
    timing: Timing = TIMING,
    kind: type[Register] = Register,
) -> Register:
    return kind(
        peer(name),
        signer(peer(name)),
        verify,
        genesis,
        b"genesis",
        application or Wishes(),
        open_recovery=open_recovery,
        journal=journal,
        timing=timing,
    )


def twin(register: Register) -> Register:
    """A register of its own in the same state; the application and all that is frozen is shared."""
    other = copy.copy(register)
    for key, value in vars(register).items():
        setattr(other, key, _twin(value))
    return other


def _twin(value: object) -> object:
    if isinstance(value, dict):
        twins = copy.copy(value)
        twins.update((key, _twin(each)) for key, each in value.items())
        return twins
    if isinstance(value, list | set):
        return copy.copy(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Wishes):
        if value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return value
        other = copy.copy(value)
        for key, each in vars(value).items():
            setattr(other, key, _twin(each))
        return other
    return value


# --- what one may say ----------------------------------------------------------------------------


def a_body(text: str) -> Body:
    """A body that differs from others."""
    return Body(claims=(Claim(text, peer("ada"), 0),))


def a_block(
    genesis: Genesis,
    proposer: str,
    body: Body = NOTHING,
    *,
    after: Header | None = None,
    voters: tuple[str, ...] | None = None,
) -> Header:
    """The block that follows the first one, or `after`."""
    group = group_id(msgspec.msgpack.encode(genesis))
    if after is None:
        after = Header(group, 0, NO_BLOCK, genesis.voters[0], genesis.voters, body_hash(Body()))
    return Header(
        group,
        after.epoch + 1,
        header_hash(after),
        peer(proposer),
        after.voters if voters is None else voters,
        body_hash(body),
    )


def a_vote(name: str, block: Header, view: int, kind: VoteKind, *, signed_by: str = "") -> Vote:
    """A vote on a block; of a nullification, `block` gives group and epoch only."""
    named = NO_BLOCK if kind == "nullify" else header_hash(block)
    data = vote_bytes(block.group, block.epoch, view, kind, named)
    signature = signature_of(peer(signed_by or name), data)
    return Vote(block.group, block.epoch, view, kind, named, peer(name), signature)


def a_certificate(
    names: tuple[str, ...], block: Header, view: int, kind: VoteKind, voters: tuple[str, ...]
) -> QuorumCertificate:
    votes = [a_vote(name, block, view, kind) for name in names]
    ballots = tuple(Ballot(voters.index(vote.voter), vote.signature) for vote in votes)
    return QuorumCertificate(block.group, block.epoch, view, kind, votes[0].block, ballots)


def a_handover(
    names: tuple[str, ...], block: Header, voters: tuple[str, ...], view: int = 1
) -> Handover:
    """A block with the votes of `names`, who are among `voters`, that make it final."""
    return Handover(block, a_certificate(names, block, view, "finalize", voters))


# --- an independent judge ------------------------------------------------------------------------


def is_enough(count: int, voters: int, faults: Faults) -> bool:
    return 2 * count > voters if faults == "crash" else 3 * count > 2 * voters


def is_proven(handover: Handover, voters: tuple[str, ...], faults: Faults) -> bool:
    """S2, said again: distinct voters of that epoch, enough of them, each with its signature."""
    header, certificate = handover.header, handover.certificate
    if handover.recovery is not None:
        return certificate is None and open_recovery(handover.recovery) == header
    if certificate is None or certificate.kind != "finalize":
        return False
    signed = vote_bytes(
        header.group, header.epoch, certificate.view, "finalize", header_hash(header)
    )
    who = {
        voters[ballot.voter]
        for ballot in certificate.ballots
        if ballot.voter < len(voters) and verify(voters[ballot.voter], ballot.signature, signed)
    }
    return len(who) == len(certificate.ballots) and is_enough(len(who), len(voters), faults)


def votes_in(message: Said) -> tuple[Vote, ...]:
    """The words of honour that a message from its author carries."""
    if isinstance(message, Vote):
        return (message,)
    return (message.vote,) if isinstance(message, Proposal) else ()


def excludes(one: Vote, other: Vote) -> bool:
    """S10: whether no honest voter says both."""
    if (one.voter, one.epoch, one.view) != (other.voter, other.epoch, other.view):
        return False
    kinds = {one.kind, other.kind}
    return kinds == {"finalize", "nullify"} or (len(kinds) == 1 and one.block != other.block)


# --- in words ------------------------------------------------------------------------------------


def in_words(message: Said) -> str:
    """A message as a transcript tells it."""
    match message:
        case Proposal():
            said = f"Proposal, epoch {message.header.epoch} view {message.vote.view}, "
            said += f"block {block_in_words(message.header)}"
            if message.parent_view:
                said += f", notarized in view {message.parent_view}"
            if message.justification:
                said += ", because " + " and ".join(
                    f"{each.kind} {each.view}" for each in message.justification
                )
            return said
        case Vote():
            said = f"Vote to {message.kind} epoch {message.epoch} view {message.view}"
            return said if message.kind == "nullify" else f"{said}, block {message.block.hex()[:4]}"
        case QuorumCertificate():
            return f"QuorumCertificate, {message.kind} epoch {message.epoch} view {message.view}"
        case Decided():
            if message.newest is None:
                return f"Decided, {len(message.lineage)} changes of voters and no block"
            said = "recovery" if message.newest.recovery else "block"
            header = message.newest.header
            return f"Decided, epoch {header.epoch}, {said} {block_in_words(header)}"
        case GetDecided():
            return f"GetDecided, after epoch {message.epoch}"


def block_in_words(header: Header) -> str:
    return f"{header_hash(header).hex()[:4]} by {name_of(header.proposer)}"
