"""Whether a file proves what a mesh has decided: offline, from the mesh's root key alone.

The chain: the root signed the genesis, which names the first voters; each change of voters was
finalized by a quorum of the voters before it (or signed by the root, after a lost quorum); the
newest block by a quorum of its own. No node has to be asked, or trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.errors import RemoteProtocolError
from meshnode.identity import open_envelope, verify_by
from meshnode.messages import Body, Decided, Genesis, Handover, Header, Recovery, decode
from meshnode.protocol.quorum import Lineage, first_block, group_id, quorum_of
from meshnode.protocol.stack import RECORD_DOMAIN
from meshnode.protocol.words import GENESIS_TYPE, RECOVERY_TYPE


@dataclass(frozen=True, slots=True)
class Proven:
    """What a proof proves. `decided_by` are the voters of `epoch` and `signed_by` those of them
    whose votes are in the certificate; a recovery is signed by the mesh's root alone.
    """

    mesh: str
    group: str
    faults: str
    epoch: int
    decided_by: tuple[str, ...]
    quorum: int
    signed_by: tuple[str, ...]
    is_recovery: bool
    handovers: int
    """How often the voters have changed since the genesis."""
    voters: tuple[str, ...]
    """Who decides what comes next."""
    body: Body


def mesh_of(decided: Decided) -> str:
    """The mesh that a proof says it is of; not verified. Raises `RemoteProtocolError`."""
    return decode(open_envelope(decided.genesis, RECORD_DOMAIN, GENESIS_TYPE).payload, Genesis).mesh


def verify_proof(decided: Decided, root: str) -> Proven:
    """`root` is the peer id of the mesh's root key. Raises `RemoteProtocolError` with the reason if
    anything in it is not proven.
    """
    signed = open_envelope(decided.genesis, RECORD_DOMAIN, GENESIS_TYPE)
    if signed.signer != root:
        raise RemoteProtocolError("the group was not founded by this mesh's root")
    genesis = decode(signed.payload, Genesis)
    group = group_id(signed.payload)
    start = Lineage(first_block(genesis, group), genesis.faults)

    def recovered(envelope: bytes) -> Header:
        opened = open_envelope(envelope, RECORD_DOMAIN, RECOVERY_TYPE)
        if opened.signer != root:
            raise RemoteProtocolError("a recovery that this mesh's root has not signed")
        return decode(opened.payload, Recovery).header

    lineage = start.follow(decided, verify_by, recovered)
    if decided.newest is None:
        if lineage.handovers:
            raise RemoteProtocolError("the newest block is missing")
        header, body = start.genesis, Body()
    else:
        assert decided.body is not None  # `follow` has compared it with the header
        header, body = decided.newest.header, decided.body
    voters = lineage.voters_of(header.epoch)
    return Proven(
        mesh=genesis.mesh,
        group=group,
        faults=genesis.faults,
        epoch=header.epoch,
        decided_by=voters,
        quorum=quorum_of(len(voters), genesis.faults),
        signed_by=_signers(decided.newest, voters),
        is_recovery=decided.newest is not None and decided.newest.recovery is not None,
        handovers=len(lineage.handovers),
        voters=header.voters,
        body=body,
    )


def _signers(newest: Handover | None, voters: tuple[str, ...]) -> tuple[str, ...]:
    if newest is None or newest.certificate is None:
        return ()
    return tuple(voters[ballot.voter] for ballot in newest.certificate.ballots)
