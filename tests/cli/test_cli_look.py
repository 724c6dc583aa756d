"""status, peers and models: what a node says, in tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from fake_node import DIGEST, GONE, OWN, PEER, FakeNode, an_item, group_of

from meshnode.console.snapshot import (
    ClaimSnapshot,
    GroupSnapshot,
    MeshModelSnapshot,
    MeshSnapshot,
    ModelSnapshot,
    OrderSnapshot,
    SpeculationSnapshot,
    TroubleSnapshot,
    VoterSnapshot,
)
from meshnode.messages import Approximate

Run = Callable[..., Result]


def test_status_shows_the_node_and_its_models(meshnode: Run, node: FakeNode) -> None:
    result = meshnode("status")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.split() == ["up", "1", "d", "2", "h"] for line in lines)
    for part in (OWN, "home (invite", f"{node.url}/v1", "1 connected, 5 in the DHT", "2 forged"):
        assert part in result.stdout
    row, item = (line.split() for line in lines if line.startswith("small"))
    assert item == ["small", "0", "this", "node", "serving", "300.0", "MiB", f"…{PEER[-8:]}"]
    assert row == ["small", "ready", "3/8", "2", "8192", "412", "38.7", "190.0", "MiB"]
    assert "failed: big.gguf is cut off" in result.stdout
    assert "90 s behind" in result.stderr


def test_status_as_json_is_what_the_node_said(meshnode: Run, node: FakeNode) -> None:
    result = meshnode("status", "--json")
    assert json.loads(result.stdout) == json.loads(msgspec.json.encode(node.snapshot))
    assert result.stderr == ""


def test_a_loading_model_shows_how_far_it_is(meshnode: Run, node: FakeNode) -> None:
    loading = ModelSnapshot("m", "", "loading", 0.42, None, 0, 0, 0, 0, 0.0, 0.0, 0)
    node.snapshot = msgspec.structs.replace(
        node.snapshot, ready=False, reason="loading", models=(loading,)
    )
    shown = meshnode("status").stdout
    assert "loading 42%" in shown
    assert "no: loading" in shown


@pytest.mark.parametrize(
    ("speculation", "shown"),
    [
        (SpeculationSnapshot(True, 50, 200, 120), "on; 60% of the guesses right, 2.4 more tokens"),
        (SpeculationSnapshot(False, 50, 200, 20), "not now; 10% of the guesses right, 0.4 more"),
        (SpeculationSnapshot(False, 0, 0, 0), "not now; no guesses yet"),
    ],
)
def test_status_tells_whether_guessing_is_on(
    meshnode: Run, node: FakeNode, speculation: SpeculationSnapshot, shown: str
) -> None:
    assert "guessing" not in meshnode("status").stdout
    small = msgspec.structs.replace(node.snapshot.models[0], speculation=speculation)
    node.snapshot = msgspec.structs.replace(node.snapshot, models=(small,))
    assert f"small: {shown}" in meshnode("status").stdout


def with_group(node: FakeNode, **changes: object) -> GroupSnapshot:
    """Change what the node's mesh has agreed on."""
    group = msgspec.structs.replace(group_of(an_item()), **changes)
    node.snapshot = msgspec.structs.replace(node.snapshot, groups=(group,))
    return group


def test_status_says_who_votes_and_what_is_wrong(meshnode: Run, node: FakeNode) -> None:
    orders = (OrderSnapshot("pin", DIGEST, "small", PEER, OWN),
              OrderSnapshot("drain", "", "", OWN, PEER))  # fmt: skip
    claims = (ClaimSnapshot("ledger", OWN, 12),)
    with_group(
        node,
        orders=orders,
        claims=claims,
        lease_s=2.41,
        deciding=True,
        view=3,
        trouble=(TroubleSnapshot("a \x1b[31mmodel is lost", "start it again"),),
    )
    result = meshnode("status")
    peer = f"…{PEER[-8:]}"
    for line in (
        "epoch    17, the next is being decided (try 3)",
        f"voters   this node, {peer} (leads), …{GONE[-8:]} (does not answer) "
        "– 2 of 3 answer, 2 must",
        f"pin      small on {peer} (ordered at this node)",
        f"drain    everything off this node (ordered at {peer})",
        "right    ledger: held by this node since epoch 12, safe for 2.4 s",
        "who owns what (epoch 17):",
    ):
        assert line in result.stdout.splitlines(), result.stdout
    assert (
        "warning: a \N{REPLACEMENT CHARACTER}[31mmodel is lost\n  → start it again" in result.stderr
    )


def test_one_voter_has_no_quorum_to_lose(meshnode: Run, node: FakeNode) -> None:
    with_group(node, voters=(VoterSnapshot(OWN, True),), quorum=1, leader=OWN, items=())
    shown = meshnode("status").stdout
    assert "voters   this node – one voter: no quorum to lose" in shown
    assert "epoch 17: nobody owns a model yet" in shown


@pytest.mark.parametrize(
    ("root_key_here", "fix"),
    [(False, "start the node that made the mesh"), (True, "founds its group")],
)
def test_a_mesh_without_a_group_says_what_that_means(
    meshnode: Run, node: FakeNode, root_key_here: bool, fix: str
) -> None:
    mesh = MeshSnapshot("home", "0" * 32, "invite", root_key_here)
    node.snapshot = msgspec.structs.replace(node.snapshot, groups=(), mesh=mesh)
    result = meshnode("status")
    assert result.exit_code == 0
    assert "agreed on nothing yet" in result.stderr
    assert fix in result.stderr


def test_a_cut_model_shows_its_layers(meshnode: Run, node: FakeNode) -> None:
    with_group(node, items=(an_item(layers="0–11 of 30"), an_item(PEER, layers="12–29 of 30")))
    assert "0–11 of 30" in meshnode("status").stdout
    assert f"this node [0–11 of 30], …{PEER[-8:]} [12–29 of 30]" in meshnode("models").stdout


def test_a_model_on_standby_counts_nothing(meshnode: Run, node: FakeNode) -> None:
    standby = ModelSnapshot("kept", DIGEST, "standby", 0.4, None, 0, 0, 0, 0, 0.0, 0.0, 0)
    leaving = ModelSnapshot("old", DIGEST, "unloading", 1.0, None, 8, 1, 0, 512, 9.0, 9.0, 1024)
    node.snapshot = msgspec.structs.replace(node.snapshot, models=(standby, leaving))
    lines = [line.split() for line in meshnode("status").stdout.splitlines()]
    assert ["kept", "standby", *("–",) * 6] in lines
    assert ["old", "unloading", "1/8", "0", "512", "9", "9.0", "1.0", "KiB"] in lines


def test_peers_are_shown_and_cannot_command_the_terminal(meshnode: Run, node: FakeNode) -> None:
    result = meshnode("peers")
    (row,) = [line for line in result.stdout.splitlines() if PEER[-8:] in line]
    for part in ("1.2 ms", "-7 s", "small (loading)", "16.0 GiB", "/ip4/192.0.2.2/udp"):
        assert part in row
    assert "\x1b" not in result.stdout
    assert "red[bold]" in row
    told = json.loads(meshnode("peers", "--json").stdout)
    assert [peer["peer_id"] for peer in told["peers"]] == [PEER]


def test_models_say_who_serves_them(meshnode: Run, node: FakeNode) -> None:
    lines = meshnode("models").stdout.splitlines()
    (small,) = [line for line in lines if line.startswith("small")]
    (big,) = [line for line in lines if line.startswith("big")]
    assert f"this node, …{PEER[-8:]}" in small
    assert "nobody now" in big
    assert small.split()[-3:] == ["this", "node", f"…{PEER[-8:]}"]
    told = json.loads(meshnode("models", "--json").stdout)
    assert [model["id"] for model in told["models"]] == ["big", "small"]
    owner = {"peer_id": OWN, "state": "serving", "replica": 0, "layers": ""}
    assert (told["models"][1]["owners"], told["models"][1]["standbys"]) == ([owner], [PEER])
    assert told["models"][0]["owners"] == []


def test_an_approximation_is_shown_as_one_with_who_measured_it(
    meshnode: Run, node: FakeNode
) -> None:
    approximate = Approximate(0.024, 0.89, 1.04, 24, 32, PEER)
    shard = msgspec.structs.replace(
        node.snapshot.models[0], name="small~24of32", approximate=approximate
    )
    row = MeshModelSnapshot("small~24of32", GONE, "ready", 512, (OWN,), approximate)
    node.snapshot = msgspec.structs.replace(
        node.snapshot, models=(shard,), mesh_models=(row,), groups=()
    )
    (line,) = [x for x in meshnode("status").stdout.splitlines() if x.startswith("approximate")]
    for part in ("small~24of32: kl=0.024; agree=0.89; experts=24/32", f"by …{PEER[-8:]}"):
        assert part in line
    (told,) = json.loads(meshnode("models", "--json").stdout)["models"]
    assert (told["approximate"]["kl"], told["approximate"]["measured_by"]) == (0.024, PEER)


def test_a_model_that_only_the_register_knows_is_listed(meshnode: Run, node: FakeNode) -> None:
    node.snapshot = msgspec.structs.replace(node.snapshot, mesh_models=())
    with_group(node, items=(an_item(GONE, "loading"),))
    (row,) = [line for line in meshnode("models").stdout.splitlines() if line.startswith("small")]
    assert "unserved" in row
    assert f"…{GONE[-8:]} (loading)" in row


def test_an_empty_mesh_says_what_to_do(meshnode: Run, node: FakeNode) -> None:
    node.snapshot = msgspec.structs.replace(node.snapshot, peers=(), mesh_models=(), groups=())
    assert "meshnode invite" in meshnode("peers").stdout
    assert "meshnode serve --model" in meshnode("models").stdout


@pytest.mark.parametrize("command", ["status", "peers", "models"])
def test_no_node_is_a_clear_error(meshnode: Run, data_dir: Path, command: str) -> None:
    never = meshnode(command)
    assert never.exit_code == 1
    assert f"no node runs with the data directory {data_dir}" in never.stderr
    data_dir.mkdir()
    (data_dir / "api.json").write_text('{"url": "http://127.0.0.1:1", "pid": 4711}')
    died = meshnode(command)
    assert died.exit_code == 1
    assert "process 4711" in died.stderr
    elsewhere = meshnode(command, "--api", "127.0.0.1:1", "--json")
    assert (
        "nothing answers at http://127.0.0.1:1" in json.loads(elsewhere.stdout)["error"]["message"]
    )


def test_an_explicit_address_wins(meshnode: Run, node: FakeNode, data_dir: Path) -> None:
    (data_dir / "api.json").unlink()
    address = node.url.removeprefix("http://")
    assert meshnode("status", "--api", address).exit_code == 0


def test_a_proxy_in_the_environment_is_not_asked(
    meshnode: Run, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert meshnode("status").exit_code == 0


def test_something_else_at_that_address_is_told_apart(meshnode: Run, node: FakeNode) -> None:
    node.snapshot = "not a status"  # type: ignore[assignment]
    result = meshnode("status")
    assert result.exit_code == 1
    assert "is not a meshnode" in result.stderr
