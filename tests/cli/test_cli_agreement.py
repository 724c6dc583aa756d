"""Proofs as files, and what is said and done about a lost quorum."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from fake_node import GONE, GROUP, OWN, PEER, FakeNode

from meshnode.console.requests import Proof, Recovered
from meshnode.console.snapshot import MeshSnapshot
from meshnode.membership import create_mesh
from meshnode.protocol.stack import GiveOrder
from meshnode.store import DataDir, Membership
from tests.protocol.agreement.scenes import mesh_of
from tests.protocol.cluster import MESH, chain_of

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def proof() -> bytes:
    """Of what three voters have decided, after they became three."""
    cluster = mesh_of(3)
    cluster.tell("ada", GiveOrder("claim", "ledger", ""))
    cluster.run(5.0)
    agreement = cluster.stack("ada").agreement
    (view,) = agreement.views(cluster.now)
    data = agreement.proof(view.group)
    assert data is not None
    return data


@pytest.fixture
def file(tmp_path: Path, proof: bytes) -> Path:
    path = tmp_path / "decision.proof"
    path.write_bytes(proof)
    return path


def test_a_proof_is_written_as_bytes_or_as_text(
    meshnode: Run, node: FakeNode, tmp_path: Path, proof: bytes
) -> None:
    text = base64.b64encode(proof).decode()
    node.answers["/api/proof"] = (200, Proof(GROUP, 17, text))
    assert meshnode("mesh", "export").stdout == f"{text}\n"
    path = tmp_path / "new.proof"
    written = meshnode("mesh", "export", str(path))
    assert f"Epoch 17 of group {GROUP}" in written.stdout
    assert path.read_bytes() == proof
    told = json.loads(meshnode("mesh", "export", "--json").stdout)
    assert told == {"group": GROUP, "epoch": 17, "bytes": len(proof), "proof": text}
    nowhere = meshnode("mesh", "export", str(tmp_path / "no" / "where"))
    assert nowhere.exit_code == 2


def test_a_proof_is_verified_with_the_mesh_that_is_known_here(
    meshnode: Run, file: Path, data_dir: Path
) -> None:
    stranger = meshnode("mesh", "verify", str(file))
    assert stranger.exit_code == 2
    assert "--root" in stranger.stderr
    DataDir(data_dir).save_membership(Membership(MESH, chain_of("ada")))
    result = meshnode("mesh", "verify", str(file))
    assert result.exit_code == 0, result.output
    for part in (
        "verified    yes",
        f"lab (id {MESH.mesh_id})",
        "of 3; 2 must)",
        "changed once",
        "ledger: ",
    ):
        assert part in result.stdout
    assert any(line.split()[:1] == ["smol"] for line in result.stdout.splitlines())


def test_the_root_key_alone_is_enough(meshnode: Run, file: Path, proof: bytes) -> None:
    told = json.loads(meshnode("mesh", "verify", str(file), "--root", MESH.root, "--json").stdout)
    assert (told["mesh"], told["quorum"], len(told["voters"])) == (MESH.mesh_id, 2, 3)
    assert [item["state"] for item in told["body"]["items"]] == ["serving"]
    piped = meshnode(
        "mesh", "verify", "-", "--root", MESH.root, input=base64.b64encode(proof).decode()
    )
    assert piped.exit_code == 0, piped.output


@pytest.mark.parametrize("harm", ["cut", "changed", "empty", "text"])
def test_what_is_not_proven_ends_with_1(meshnode: Run, file: Path, proof: bytes, harm: str) -> None:
    harmed = {
        "cut": proof[:-7],
        "changed": proof[:-40] + bytes([proof[-40] ^ 1]) + proof[-39:],
        "empty": b"",
        "text": b"# notes\n",
    }
    file.write_bytes(harmed[harm])
    result = meshnode("mesh", "verify", str(file), "--root", MESH.root)
    assert result.exit_code == 1
    assert f"{file} is no proof: " in result.stderr


def test_another_mesh_has_not_decided_it(meshnode: Run, file: Path, data_dir: Path) -> None:
    data = DataDir(data_dir)
    other = create_mesh("other", data, data.key()).mesh
    result = meshnode("mesh", "verify", str(file), "--root", other.root)
    assert result.exit_code == 1
    assert "not founded by this mesh's root" in result.stderr
    for wrong in ("abc", "z" * 64, MESH.root + "00"):
        assert meshnode("mesh", "verify", str(file), "--root", wrong).exit_code == 2


# --- a lost quorum -------------------------------------------------------------------------------


def lose(node: FakeNode, *peers: str, root_key_here: bool = True) -> None:
    (group,) = node.snapshot.groups
    voters = tuple(msgspec.structs.replace(v, alive=v.peer_id not in peers) for v in group.voters)
    node.snapshot = msgspec.structs.replace(
        node.snapshot,
        mesh=MeshSnapshot("home", "0" * 32, "invite", root_key_here),
        groups=(msgspec.structs.replace(group, voters=voters),),
    )


@pytest.mark.parametrize(
    ("lost", "root_key_here", "says"),
    [
        ((PEER, GONE), True, "If that is what you want: meshnode mesh recover --force"),
        ((PEER, GONE), False, "Not on this node"),
        ((GONE,), True, "there is nothing to recover"),
    ],
)
def test_without_force_it_explains_and_does_nothing(
    meshnode: Run, node: FakeNode, lost: tuple[str, ...], root_key_here: bool, says: str
) -> None:
    lose(node, *lost, root_key_here=root_key_here)
    result = meshnode("mesh", "recover")
    assert result.exit_code == 1
    assert node.asked == []
    assert "exclusive rights included" in result.stdout
    assert says in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["answers", OWN] in rows
    assert all(["does", "not", "answer", peer] in rows for peer in lost)
    told = json.loads(meshnode("mesh", "recover", "--json").stdout)
    assert told["would_recover"] is says.startswith("If")
    assert told["groups"][0]["do_not_answer"] == list(lost)


def test_with_force_the_node_recovers(meshnode: Run, node: FakeNode) -> None:
    node.answers["/api/recover"] = (200, Recovered({GROUP: 2**32 + 17}))
    result = meshnode("mesh", "recover", "--force")
    assert result.exit_code == 0
    assert f"from epoch {2**32 + 17} on" in result.stdout
    node.answers["/api/recover"] = (409, {"error": {"message": "only the node with the root key"}})
    refused = meshnode("mesh", "recover", "--force")
    assert refused.exit_code == 1
    assert "only the node with the root key" in refused.stderr
