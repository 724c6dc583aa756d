"""A proof stands by itself; whatever is changed in it, it proves nothing any more."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from meshnode.console.proof import Proven, mesh_of, verify_proof
from meshnode.errors import RemoteProtocolError
from meshnode.messages import Decided, decode
from meshnode.protocol.stack import GiveOrder, RecoverQuorum
from tests.protocol.agreement import scenes
from tests.protocol.agreement.scenes import NAMES
from tests.protocol.cluster import MESH, Cluster, key_of

ROOT = MESH.root_peer_id


def decided(cluster: Cluster, name: str = "ada") -> Decided:
    agreement = cluster.stack(name).agreement
    (view,) = agreement.views(cluster.now)
    data = agreement.proof(view.group)
    assert data is not None
    return decode(data, Decided)


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """Three voters, so that the proof has a change of voters in it."""
    cluster = scenes.mesh_of(3)
    cluster.tell("ada", GiveOrder("claim", "ledger", ""))
    cluster.run(5.0)
    return cluster


@pytest.fixture
def proof(cluster: Cluster) -> Decided:
    return decided(cluster)


def test_it_names_the_voters_the_signers_and_the_owners(cluster: Cluster, proof: Decided) -> None:
    proven = verify_proof(proof, ROOT)
    (view,) = cluster.stack("ada").agreement.views(cluster.now)
    assert (proven.mesh, proven.group, proven.epoch) == (MESH.mesh_id, view.group, view.epoch)
    assert mesh_of(proof) == MESH.mesh_id
    assert sorted(proven.voters) == sorted(str(key_of(name).peer_id) for name in NAMES[:3])
    assert proven.quorum == 2
    assert len(proven.signed_by) >= 2
    assert set(proven.signed_by) <= set(proven.decided_by)
    assert proven.handovers >= 1
    assert not proven.is_recovery
    assert proven.body.items == view.items
    assert [claim.right for claim in proven.body.claims] == ["ledger"]


def test_any_member_proves_the_same(cluster: Cluster, proof: Decided) -> None:
    others: list[Proven] = [verify_proof(decided(cluster, name), ROOT) for name in NAMES[1:3]]
    assert {other.epoch for other in others} == {verify_proof(proof, ROOT).epoch}


def test_another_root_founded_nothing_here(proof: Decided) -> None:
    with pytest.raises(RemoteProtocolError, match="not founded by this mesh's root"):
        verify_proof(proof, str(key_of("eve").peer_id))


def test_each_link_of_the_chain_is_needed(proof: Decided) -> None:
    assert proof.newest is not None
    assert proof.newest.certificate is not None
    assert proof.body is not None
    certificate = proof.newest.certificate
    fewer = replace(certificate, ballots=certificate.ballots[:1])
    forged = tuple(replace(ballot, signature=bytes(64)) for ballot in certificate.ballots)
    header = replace(proof.newest.header, epoch=proof.newest.header.epoch + 1)
    for broken in (
        replace(proof, body=replace(proof.body, items=())),
        replace(proof, body=None),
        replace(proof, lineage=()),
        replace(proof, newest=None),
        replace(proof, newest=replace(proof.newest, header=header)),
        replace(proof, newest=replace(proof.newest, certificate=None)),
        replace(proof, newest=replace(proof.newest, certificate=fewer)),
        replace(
            proof,
            newest=replace(proof.newest, certificate=replace(certificate, ballots=forged)),
        ),
        replace(proof, genesis=proof.genesis[:-1] + bytes([proof.genesis[-1] ^ 1])),
    ):
        with pytest.raises(RemoteProtocolError):
            verify_proof(broken, ROOT)


def test_a_group_that_has_decided_nothing_is_proven_too() -> None:
    cluster = Cluster()
    cluster.start("ada", is_root=True)
    cluster.run_until(lambda: bool(cluster.stack("ada").agreement.views(cluster.now)), 5.0)
    proven = verify_proof(decided(cluster), ROOT)
    assert (proven.epoch, proven.signed_by) == (0, ())
    assert proven.voters == (str(key_of("ada").peer_id),)


def test_a_recovery_is_proven_by_the_root_and_says_so() -> None:
    cluster = scenes.mesh_of(3)
    for name in NAMES[1:3]:
        cluster.kill(name)
    cluster.tell("ada", RecoverQuorum())
    proven = verify_proof(decided(cluster), ROOT)
    assert proven.epoch > 2**32
    assert proven.voters == (str(key_of("ada").peer_id),)
