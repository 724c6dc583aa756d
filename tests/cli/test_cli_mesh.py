"""Making a mesh and inviting to it, with and without a running node."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from fake_node import FakeNode

from meshnode.cli.mesh import seconds_of
from meshnode.credentials import check_join, parse_invite, verify_chain
from meshnode.errors import ConfigError
from meshnode.identity import KeyPair
from meshnode.store import DataDir

Run = Callable[..., Result]
ADDR = "/ip4/203.0.113.5/udp/9338/quic-v1"


def test_a_new_mesh_has_its_founder_as_member_and_issuer(meshnode: Run, data_dir: Path) -> None:
    result = meshnode("mesh", "create", "home")
    assert result.exit_code == 0, result.output
    assert "meshnode serve --mesh home" in result.stdout
    data = DataDir(data_dir)
    membership = data.membership("home")
    assert membership is not None
    right = verify_chain(membership.mesh, data.key().peer_id, membership.chain, int(time.time()))
    assert right.roles == ("node", "issuer")
    assert (data_dir / "meshes/home.root.key").stat().st_mode & 0o077 == 0


def test_list_and_show_say_the_same_in_words_and_json(meshnode: Run) -> None:
    assert "mesh create" in meshnode("mesh", "list").stdout
    assert json.loads(meshnode("mesh", "list", "--json").stdout) == []
    created = json.loads(meshnode("mesh", "create", "home", "--json").stdout)
    assert json.loads(meshnode("mesh", "list", "--json").stdout) == [created]
    assert json.loads(meshnode("mesh", "show", "--json").stdout) == created
    shown = meshnode("mesh", "show", "home").stdout
    for part in (created["id"], created["root"], created["peer_id"], "node, issuer", "here"):
        assert part in shown


@pytest.mark.parametrize("name", ["../evil", "a b", "", "x" * 65, "public"])
def test_what_cannot_be_a_mesh_name_is_refused(meshnode: Run, data_dir: Path, name: str) -> None:
    result = meshnode("mesh", "create", name)
    assert result.exit_code == 2
    assert "name" in result.stderr
    assert not (data_dir / "meshes").exists()


def test_a_mesh_is_not_made_twice(meshnode: Run) -> None:
    first = json.loads(meshnode("mesh", "create", "home", "--json").stdout)
    assert meshnode("mesh", "create", "home").exit_code == 2
    assert json.loads(meshnode("mesh", "show", "--json").stdout)["id"] == first["id"]


def test_an_invitation_made_offline_admits_exactly_its_bearer(
    meshnode: Run, data_dir: Path
) -> None:
    meshnode("mesh", "create", "home")
    before = int(time.time())
    result = meshnode("invite", "--addr", ADDR, "--uses", "3", "--expires", "7d", "--json")
    told = json.loads(result.stdout)
    invite = parse_invite(told["token"])
    own = DataDir(data_dir).key().peer_id
    assert invite.mesh.name == "home"
    assert invite.mesh.bootstrap == (f"{ADDR}/p2p/{own}",)
    assert invite.invitation.issuer == own
    assert (invite.invitation.uses_max, invite.invitation.roles) == (3, ("node",))
    assert 0 <= told["expires_at"] - before - 7 * 86400 < 60
    assert invite.invitation.not_after == told["expires_at"]
    guest = KeyPair.generate().peer_id
    request = invite.request_for(guest)
    assert check_join(invite.mesh, own, guest, request, int(time.time())).subject == guest


def test_the_token_alone_is_on_stdout(meshnode: Run) -> None:
    meshnode("mesh", "create", "home")
    result = meshnode("invite", "--addr", ADDR)
    assert parse_invite(result.stdout).mesh.name == "home"
    assert "meshnode serve --join" in result.stderr


def test_several_meshes_have_to_be_told_apart(meshnode: Run) -> None:
    meshnode("mesh", "create", "home")
    meshnode("mesh", "create", "lab")
    result = meshnode("invite", "--addr", ADDR)
    assert result.exit_code == 2
    assert "home, lab" in result.stderr
    lab = meshnode("invite", "--addr", ADDR, "--mesh", "lab").stdout
    assert parse_invite(lab).mesh.name == "lab"


def test_without_node_and_address_it_says_what_to_do(meshnode: Run) -> None:
    meshnode("mesh", "create", "home")
    result = meshnode("invite")
    assert result.exit_code == 1
    assert "meshnode serve" in result.stderr
    assert "--addr" in result.stderr


def test_a_running_node_makes_the_invitation(meshnode: Run, node: FakeNode) -> None:
    result = meshnode("invite", "--uses", "2", "--expires", "30m", "--role", "gateway")
    assert (result.exit_code, result.stdout) == (0, "mesh1.abc\n")
    assert node.asked == [{"uses": 2, "expires_s": 1800, "role": "gateway"}]
    other = meshnode("invite", "--mesh", "lab")
    assert other.exit_code == 2
    assert "in the mesh home, not lab" in other.stderr


def test_how_long_an_invitation_may_last() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "24h", "7d")] == [90, 1800, 86400, 604800]
    for wrong in ("", "24", "h", "1w", "0h", "59s", "366d", "-1h", "1.5h"):
        with pytest.raises(ConfigError, match="--expires"):
            seconds_of(wrong)
