"""What the doctor finds on a machine made sick on purpose."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from fake_node import FakeNode, snapshot_of

from meshnode import doctor
from meshnode.config import load
from meshnode.doctor import Check, examine

Run = Callable[..., Result]
NAMES = {
    *("python", "engine", "memory", "data dir", "disk", "API port", "peer port udp"),
    *("peer port tcp", "UDP buffers", "open files", "clock"),
}


def checks_of(tmp_path: Path, **flags: object) -> dict[str, Check]:
    """The checks of a node without engines (no subprocess), by name."""
    given = {"data-dir": str(tmp_path), "role": "gateway", "api": "127.0.0.1:0", **flags}
    return {check.name: check for check in examine(load(given, {}, None))}


def test_json_has_one_shape_and_the_exit_code_its_meaning(meshnode: Run, tmp_path: Path) -> None:
    result = meshnode("doctor", "--model", str(tmp_path / "missing.gguf"), "--json")
    told = json.loads(result.stdout)
    assert all(set(check) == {"name", "outcome", "what", "fix"} for check in told["checks"])
    assert {check["name"] for check in told["checks"]} >= NAMES
    failed = [check for check in told["checks"] if check["outcome"] == "fail"]
    assert any("missing.gguf" in check["name"] for check in failed)
    assert all(check["fix"] for check in told["checks"] if check["outcome"] != "ok")
    assert (told["ok"], result.exit_code) == (False, 1)


def test_the_text_shows_each_check_and_what_to_do(meshnode: Run, tmp_path: Path) -> None:
    result = meshnode("doctor", "--model", str(tmp_path / "missing.gguf"))
    assert result.exit_code == 1
    assert any(line.startswith("FAIL  model ") for line in result.stdout.splitlines())
    assert "→ give the path of a GGUF file" in result.stdout


def test_a_port_in_use_fails_unless_it_is_our_own_nodes(tmp_path: Path) -> None:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        api = f"127.0.0.1:{tcp.getsockname()[1]}"
        listen = (f"/ip4/127.0.0.1/udp/{udp.getsockname()[1]}/quic-v1",)
        found = checks_of(tmp_path, api=api, listen=listen)
        assert (found["API port"].outcome, found["peer port udp"].outcome) == ("fail", "fail")
        assert "--api" in found["API port"].fix
        assert "--listen" in found["peer port udp"].fix
        ours = msgspec.structs.replace(snapshot_of(f"http://{api}"), addrs=listen)
        config = load({"data-dir": str(tmp_path), "role": "gateway", "api": api, "listen": listen},
                      {}, None)  # fmt: skip
        held = {check.name: check for check in examine(config, ours)}
        assert held["API port"].what == f"{api} is held by the running node"
        assert held["peer port udp"].outcome == "ok"


def test_free_ports_are_left_free(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        api = f"127.0.0.1:{probe.getsockname()[1]}"
    for _ in range(2):
        assert checks_of(tmp_path, api=api)["API port"].outcome == "ok"


def test_a_data_dir_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert checks_of(tmp_path / "file" / "data")["data dir"].outcome == "fail"
    (tmp_path / "node.key").write_bytes(bytes(32))
    (tmp_path / "node.key").chmod(0o644)
    assert checks_of(tmp_path)["data dir"].fix == f"chmod 600 {tmp_path / 'node.key'}"
    assert checks_of(tmp_path / "new" / "data")["data dir"].what.endswith("(will be made)")


def test_a_standby_is_looked_at_like_a_model(meshnode: Run, tmp_path: Path) -> None:
    result = meshnode("doctor", "--standby", str(tmp_path / "missing.gguf"), "--json")
    by_name = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert by_name[f"model {tmp_path / 'missing.gguf'}"]["outcome"] == "fail"
    assert "not needed" not in by_name["engine"]["what"]


def test_a_damaged_model_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(10))
    check = doctor._model(str(tmp_path / "bad.gguf"), tmp_path)
    assert check.outcome == "fail"
    assert "bad.gguf" in check.what


@pytest.mark.parametrize(("size_bytes", "outcome"), [(212992, "warn"), (4 * 1024 * 1024, "ok")])
def test_small_udp_buffers_come_with_the_line_that_enlarges_them(
    tmp_path: Path, size_bytes: int, outcome: str
) -> None:
    (tmp_path / "rmem_max").write_text(f"{size_bytes}\n")
    (tmp_path / "wmem_max").write_text("8388608\n")
    check = doctor._udp_buffers(tmp_path)
    assert check.outcome == outcome
    assert (outcome == "ok") != ("sysctl -w net.core.rmem_max=4194304" in check.fix)


@pytest.mark.parametrize(
    ("ahead_s", "outcome", "words"),
    [
        ((3.0, -2.0, 1.0), "ok", "1 s behind"),
        ((90.0, 95.0, 100.0), "warn", "95 s behind"),
        ((-700.0, -650.0, 5.0), "fail", "650 s ahead of"),
        ((0.0, 0.0, 9000.0), "ok", "0 s"),
    ],
)
def test_the_clock_is_held_against_the_peers_median(
    ahead_s: tuple[float, ...], outcome: str, words: str
) -> None:
    running = snapshot_of("http://127.0.0.1:9337")
    peers = tuple(msgspec.structs.replace(running.peers[0], clock_ahead_s=s) for s in ahead_s)
    check = doctor._clock(msgspec.structs.replace(running, peers=peers))
    assert check.outcome == outcome
    assert words in check.what


def test_the_command_asks_the_running_node(meshnode: Run, node: FakeNode) -> None:
    api = node.url.removeprefix("http://")
    told = json.loads(meshnode("doctor", "--api", api, "--json").stdout)
    by_name = {check["name"]: check for check in told["checks"]}
    assert by_name["API port"]["what"] == f"{api} is held by the running node"
    assert "7 s ahead of the peers' median" in by_name["clock"]["what"]
