"""The data directory: what is kept, what a crash or a full disk cannot destroy."""

from __future__ import annotations

import multiprocessing
import os
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest

from meshnode.credentials import MeshDescriptor
from meshnode.errors import ConfigError
from meshnode.store import FILE_BYTES_MAX, PEERS_KEPT_MAX, SEQUENCES_PER_RUN, DataDir, Membership

MESH = MeshDescriptor("lab", "ab" * 32, "invite")
OTHER = MeshDescriptor("lab", "cd" * 32, "invite")
UNIX_MS = 1_800_000_000_000


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "deep" / "data")


def files(data: DataDir) -> dict[str, bytes]:
    found = (path for path in data.path.rglob("*") if path.is_file())
    return {str(path.relative_to(data.path)): path.read_bytes() for path in found}


def test_the_directory_is_made_for_its_owner_only(data: DataDir) -> None:
    assert data.path.stat().st_mode & 0o777 == 0o700


def test_the_identity_stays(data: DataDir) -> None:
    assert data.key().peer_id == DataDir(data.path).key().peer_id


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot create the data directory"):
        DataDir(tmp_path / "file" / "data")


# --- the lock ------------------------------------------------------------------------------------


def _try_lock(path: Path, answer: Connection) -> None:
    try:
        with DataDir(path).locked():
            answer.send("locked")
    except ConfigError as error:
        answer.send(str(error))


def try_lock_elsewhere(path: Path) -> str:
    """What another process gets."""
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=_try_lock, args=(path, there))
    other.start()
    answer: str = here.recv()
    other.join(20)
    return answer


def test_one_node_at_a_time(data: DataDir) -> None:
    with data.locked():
        assert "another meshnode is running" in try_lock_elsewhere(data.path)
    assert try_lock_elsewhere(data.path) == "locked"


# --- meshes --------------------------------------------------------------------------------------


def test_a_membership_is_found_again(data: DataDir) -> None:
    assert data.membership("lab") is None
    assert data.mesh_names() == ()
    membership = Membership(MESH, (b"\x00\xff chain",))
    assert data.save_membership(membership) == "lab"
    assert DataDir(data.path).membership("lab") == membership
    assert data.mesh_names() == ("lab",)


def test_two_meshes_of_one_name_live_side_by_side(data: DataDir) -> None:
    data.save_membership(Membership(MESH, (b"one",)))
    second = data.save_membership(Membership(OTHER, (b"two",)))
    assert second == f"lab-{OTHER.mesh_id[:6]}"
    assert data.name_of(MESH) == "lab"
    assert data.name_of(OTHER) == second
    assert data.save_membership(Membership(OTHER, (b"renewed",))) == second
    assert data.mesh_names() == ("lab", second)
    kept = data.membership("lab")
    assert kept is not None
    assert kept.chain == (b"one",)


def test_the_root_key_belongs_to_the_mesh_that_was_made_here(data: DataDir) -> None:
    root = data.create_root_key("lab")
    made = MeshDescriptor("lab", root.public.hex(), "invite")
    data.save_membership(Membership(made, ()))
    joined = data.save_membership(Membership(OTHER, ()))
    found = data.root_key("lab")
    assert found is not None
    assert found.public == root.public
    assert data.root_key(joined) is None


def test_a_damaged_membership_says_what_to_do(data: DataDir) -> None:
    data.save_membership(Membership(MESH, ()))
    (data.path / "meshes" / "lab.json").write_text("{}")
    with pytest.raises(ConfigError, match="join again"):
        data.membership("lab")


def test_an_absurdly_large_file_is_not_read(data: DataDir) -> None:
    data.save_membership(Membership(MESH, ()))
    with (data.path / "meshes" / "lab.json").open("wb") as file:
        file.truncate(FILE_BYTES_MAX + 1)
    with pytest.raises(ConfigError, match="far too large"):
        data.membership("lab")


# --- invitations ---------------------------------------------------------------------------------


def test_uses_are_counted_for_good(data: DataDir) -> None:
    peers = ("ada", "bob", "cleo", "dan")
    admitted = [DataDir(data.path).count_use("aa", peer, 2) for peer in peers]
    assert admitted == [True, True, False, False]
    assert data.count_use("bb", "ada", 1), "each invitation for itself"
    assert data.count_use("aa", "bob", 2), "who was counted may ask again"


# --- sequence numbers ----------------------------------------------------------------------------


def test_every_run_has_numbers_above_all_before_it_whatever_the_clock_says(data: DataDir) -> None:
    clocks = [UNIX_MS, UNIX_MS + 1000, UNIX_MS - 86_400_000 * 365, 0, UNIX_MS + 2000]
    firsts = [DataDir(data.path).first_sequence(unix_ms) for unix_ms in clocks]
    for before, after in pairwise(firsts):
        assert after >= before + SEQUENCES_PER_RUN


def test_a_lost_counter_falls_back_on_the_clock(data: DataDir) -> None:
    data.first_sequence(UNIX_MS)
    (data.path / "sequence").unlink()
    assert data.first_sequence(UNIX_MS + 5) == UNIX_MS + 5


def test_a_damaged_counter_is_not_guessed(data: DataDir) -> None:
    data.first_sequence(UNIX_MS)
    (data.path / "sequence").write_text("12x")
    with pytest.raises(ConfigError, match="damaged"):
        data.first_sequence(UNIX_MS)


# --- known peers ---------------------------------------------------------------------------------


def test_known_peers_are_kept_by_mesh_and_not_without_end(data: DataDir) -> None:
    peers = {f"peer-{n}": (f"/ip4/10.0.0.{n}/tcp/1",) for n in range(PEERS_KEPT_MAX + 9)}
    data.save_known_peers("a" * 32, peers)
    kept = data.known_peers("a" * 32)
    assert kept == dict(list(peers.items())[:PEERS_KEPT_MAX])
    assert data.known_peers("b" * 32) == {}


def test_where_the_api_is_can_be_read_until_it_stops(data: DataDir) -> None:
    data.publish_api("http://127.0.0.1:9337")
    told = msgspec.json.decode((data.path / "api.json").read_bytes())
    assert told == {"url": "http://127.0.0.1:9337", "pid": os.getpid()}
    data.withdraw_api()
    data.withdraw_api()
    assert not (data.path / "api.json").exists()


# --- accidents -----------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_content(data: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    data.save_membership(Membership(MESH, (b"old",)))
    before = files(data)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        data.save_membership(Membership(MESH, (b"new",)))
    after = files(data)
    assert after["meshes/lab.json"] == before["meshes/lab.json"]
    monkeypatch.undo()
    data.save_membership(Membership(MESH, (b"new",)))
    kept = data.membership("lab")
    assert kept is not None
    assert kept.chain == (b"new",)
    assert set(files(data)) == set(before), "nothing half-written is left lying about"


def test_a_half_written_file_of_a_crash_is_not_read(data: DataDir) -> None:
    data.save_membership(Membership(MESH, (b"old",)))
    (data.path / "meshes" / "lab.json.new").write_bytes(b'{"me')
    assert data.mesh_names() == ("lab",)
    kept = data.membership("lab")
    assert kept is not None
    assert kept.chain == (b"old",)
