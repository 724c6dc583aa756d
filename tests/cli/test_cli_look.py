"""status, peers and models: what a node says, in tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from fake_node import OWN, PEER, FakeNode

from meshnode.console.snapshot import ModelSnapshot

Run = Callable[..., Result]


def test_status_shows_the_node_and_its_models(meshnode: Run, node: FakeNode) -> None:
    result = meshnode("status")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.split() == ["up", "1", "d", "2", "h"] for line in lines)
    for part in (OWN, "home (invite", f"{node.url}/v1", "1 connected, 5 in the DHT", "2 forged"):
        assert part in result.stdout
    (row,) = [line.split() for line in lines if line.startswith("small")]
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
    told = json.loads(meshnode("models", "--json").stdout)
    assert [model["id"] for model in told["models"]] == ["big", "small"]


def test_an_empty_mesh_says_what_to_do(meshnode: Run, node: FakeNode) -> None:
    node.snapshot = msgspec.structs.replace(node.snapshot, peers=(), mesh_models=())
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
