"""Making, listing and revoking API keys, and serving and chatting with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from fake_node import FakeNode

from meshnode.gateway.keys import find_key, load, parse

Run = Callable[..., Result]


def keys_in(path: Path):
    text = load(path)
    assert text is not None
    return parse(text, path)


def test_a_key_is_printed_once_and_only_its_hash_is_kept(meshnode: Run, data_dir: Path) -> None:
    result = meshnode("key", "create", "alice")
    assert result.exit_code == 0, result.output
    token = result.stdout.strip()  # alone, so that it can be piped
    path = data_dir / "api-keys.toml"
    assert token.startswith("mesh-sk-")
    assert token not in path.read_text()
    assert token not in result.stderr
    assert "asks everybody for a key" in result.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    found = find_key(keys_in(path), token)
    assert found is not None
    assert found.name == "alice"
    assert "asks everybody" not in meshnode("key", "create", "bob").stderr  # it does already


def test_limits_and_json(meshnode: Run, data_dir: Path) -> None:
    assert json.loads(meshnode("key", "list", "--json").stdout) == []
    arguments = ("build", "--per-minute", "60", "--concurrent", "4")
    told = json.loads(meshnode("key", "create", *arguments, "--json").stdout)
    token = told.pop("key")
    assert told == {
        "name": "build",
        "per_minute": 60,
        "concurrent": 4,
        "file": str(data_dir / "api-keys.toml"),
    }
    (kept,) = keys_in(data_dir / "api-keys.toml")
    assert (kept.per_minute, kept.concurrent) == (60, 4)
    listed = meshnode("key", "list", "--json").stdout
    assert json.loads(listed) == [{"name": "build", "per_minute": 60, "concurrent": 4}]
    assert token not in listed
    meshnode("key", "create", "free")
    rows = meshnode("key", "list").stdout.splitlines()[1:]
    assert [row.split() for row in rows] == [["build", "60", "4"], ["free", "–", "–"]]


def test_revoking_takes_one_key_and_leaves_the_rest(meshnode: Run, data_dir: Path) -> None:
    for name in ("alice", "al", "bob"):
        meshnode("key", "create", name)
    path = data_dir / "api-keys.toml"
    path.write_text("# our own words\n" + path.read_text())
    told = json.loads(meshnode("key", "revoke", "al", "--json").stdout)
    assert (told["revoked"], told["left"]) == ("al", 2)
    assert [key.name for key in keys_in(path)] == ["alice", "bob"]
    assert path.read_text().startswith("# our own words\n")
    meshnode("key", "revoke", "alice")
    last = meshnode("key", "revoke", "bob")
    assert f"delete {path} and restart the node" in last.stdout
    assert "No key is left" in meshnode("key", "list").stdout
    again = meshnode("key", "revoke", "bob")
    assert again.exit_code == 2
    assert "no key called 'bob'" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("a b",), "cannot be a name"),
        (("",), "cannot be a name"),
        (("x" * 65,), "cannot be a name"),
        (("a", "--per-minute", "0"), "--per-minute"),
        (("a", "--concurrent", "1000000"), "concurrent must be a number from 1 to 10000"),
        (("taken",), "there is a key called taken already"),
    ],
)
def test_what_cannot_be_a_key_is_refused_and_nothing_changes(
    meshnode: Run, data_dir: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    meshnode("key", "create", "taken")
    before = (data_dir / "api-keys.toml").read_bytes()
    result = meshnode("key", "create", *arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert "mesh-sk-" not in result.stdout
    assert (data_dir / "api-keys.toml").read_bytes() == before


def test_another_file_by_flag_or_environment(
    meshnode: Run, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "new folder/two.toml"
    assert meshnode("key", "create", "alice", "--file", str(one)).exit_code == 0
    monkeypatch.setenv("MESHNODE_API_KEY_FILE", str(two))
    assert meshnode("key", "create", "bob").exit_code == 0
    assert [key.name for path in (one, two) for key in keys_in(path)] == ["alice", "bob"]
    assert not (data_dir / "api-keys.toml").exists()


def test_a_file_keeps_its_mode_its_link_and_its_guard(meshnode: Run, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    meshnode("key", "create", "alice", "--file", str(path))
    path.chmod(0o640)
    meshnode("key", "create", "bob", "--file", str(link))
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(keys_in(path)) == 2
    path.chmod(0o660)
    result = meshnode("key", "create", "carol", "--file", str(path))
    assert result.exit_code == 2
    assert "chmod 600" in result.stderr


def test_two_at_once_lose_nothing(data_dir: Path) -> None:
    names = {f"k{i}" for i in range(4)}
    command = [sys.executable, "-m", "meshnode", "key", "create"]
    running = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in names
    ]
    for process in running:
        process.communicate(timeout=60)
    assert [process.returncode for process in running] == [0] * 4
    assert {key.name for key in keys_in(data_dir / "api-keys.toml")} == names


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_used_is_named(meshnode: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = meshnode("key", "create", "alice", "--file", str(tmp_path / "x/keys.toml"))
    tmp_path.chmod(0o700)
    assert result.exit_code == 2
    assert str(tmp_path / "x") in result.stderr


@pytest.mark.parametrize("command", ["serve", "client"])
def test_serving_other_machines_without_a_key_is_refused(data_dir: Path, command: str) -> None:
    arguments = [command, "--api", "0.0.0.0:0", "--no-mdns", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "meshnode", *arguments], capture_output=True, text=True, timeout=60
    )
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["type"]) == (2, "ConfigError")
    for way_out in ("meshnode key create NAME", "127.0.0.1:9337", "--no-api-key"):
        assert way_out in error["message"]
    assert not (data_dir / "meshes").exists()


def test_chat_shows_its_key_and_says_where_one_comes_from(
    meshnode: Run, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.key = "mesh-sk-right"
    without = meshnode("chat", "--once", "Hi")
    assert without.exit_code == 1
    for hint in ("asks for a key", "MESHNODE_API_KEY", "--api-key", "meshnode key create NAME"):
        assert hint in without.stderr
    wrong = meshnode("chat", "--once", "Hi", "--api-key", "mesh-sk-wrong")
    assert wrong.exit_code == 1
    assert "not known here" in wrong.stderr
    assert "mesh-sk-wrong" not in wrong.output
    assert meshnode("chat", "--once", "Hi", "--api-key", "mesh-sk-right").exit_code == 0
    monkeypatch.setenv("MESHNODE_API_KEY", "mesh-sk-right\n")
    assert meshnode("chat", "--once", "Hi").exit_code == 0
    talk = meshnode("chat", "--api-key", "", input="Hi\n")
    assert talk.exit_code == 0
    assert "asks for a key" in talk.stderr
    odd = meshnode("chat", "--once", "Hi", "--api-key", "mesh\r\nx: y")
    assert odd.exit_code == 2
    assert meshnode("status").exit_code == 0  # management asks for none
