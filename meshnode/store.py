"""What a node keeps on disk: its key, meshes and certificates, known peers, sequence numbers.

Everything but the key is small JSON or bytes written atomically (new file, fsync, rename), so a
crash or a full disk leaves the old content. One node owns a data directory at a time (a lock).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from meshnode.credentials import MeshDescriptor
from meshnode.errors import ConfigError
from meshnode.identity import KeyPair, load_or_create_key

T = TypeVar("T")

SEQUENCES_PER_RUN = 1_000_000_000
"""Reserved at every start, so that no run of an identity repeats a number of an earlier one."""
FILE_BYTES_MAX = 4 * 1024 * 1024
"""No file of ours is larger; a larger one is damage."""
PEERS_KEPT_MAX = 256


class Membership(msgspec.Struct, frozen=True):
    """A mesh this node belongs to, and the chain that proves it (leaf first)."""

    mesh: MeshDescriptor
    chain: tuple[bytes, ...]


class DataDir:
    """A node's data directory. Raises `ConfigError` with what to do where the disk says no."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"cannot create the data directory {path}: {error.strerror}"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for one running node."""
        try:
            file = (self.path / "lock").open("w")
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another meshnode is running with the data directory {self.path}; "
                    "stop it, or give this one its own with --data-dir"
                ) from error
            yield

    def key(self) -> KeyPair:
        """The node's identity, made on first use."""
        try:
            return load_or_create_key(self.path / "node.key")
        except OSError as error:
            raise ConfigError(f"cannot use {self.path / 'node.key'}: {error.strerror}") from error

    # --- meshes ---------------------------------------------------------------------------------

    def mesh_names(self) -> tuple[str, ...]:
        """The meshes of this node, by the names they have here."""
        folder = self.path / "meshes"
        if not folder.is_dir():
            return ()
        return tuple(sorted(entry.stem for entry in folder.glob("*.json")))

    def membership(self, name: str) -> Membership | None:
        data = self._read(self._mesh_file(name, "json"))
        return None if data is None else _decode_json(data, Membership, name)

    def name_of(self, mesh: MeshDescriptor) -> str | None:
        """What a mesh is called here: its own name, or that with a bit of its id, because
        another mesh had the name first. None if this node is not in it.
        """
        for name in (mesh.name, f"{mesh.name}-{mesh.mesh_id[:6]}"):
            found = self.membership(name)
            if found is not None and found.mesh.mesh_id == mesh.mesh_id:
                return name
        return None

    def save_membership(self, membership: Membership) -> str:
        """Keep it, without losing another mesh of the same name; returns its name here."""
        mesh = membership.mesh
        name = self.name_of(mesh)
        if name is None:
            taken = self.membership(mesh.name) is not None
            name = f"{mesh.name}-{mesh.mesh_id[:6]}" if taken else mesh.name
        path = self._mesh_file(name, "json")
        self._write(path, msgspec.json.format(msgspec.json.encode(membership)))
        return name

    def last_used(self) -> str | None:
        """The mesh of the last run, by its name here."""
        data = self._read(self.path / "meshes" / "last-used")
        return None if data is None else data.decode("utf-8", "replace")

    def save_last_used(self, name: str) -> None:
        self._write(self.path / "meshes" / "last-used", name.encode())

    def root_key(self, name: str) -> KeyPair | None:
        """The root key of the mesh called `name` here, if this node made the mesh."""
        path = self._mesh_file(name, "root.key")
        return load_or_create_key(path) if path.exists() else None

    def create_root_key(self, name: str) -> KeyPair:
        path = self._mesh_file(name, "root.key")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return load_or_create_key(path)

    def count_use(self, invitation: str, subject: str, uses_max: int) -> bool:
        """Durably count a peer that an invitation admits; False if it was used up before.

        The same peer is counted once, so that an answer lost on the way can be asked for again.
        """
        path = self.path / "invitations" / invitation
        admitted = (self._read(path) or b"").decode("ascii", "replace").split()
        if subject in admitted:
            return True
        if len(admitted) >= uses_max:
            return False
        self._write(path, "\n".join([*admitted, subject]).encode())
        return True

    # --- what a restart starts from -------------------------------------------------------------

    def first_sequence(self, unix_ms: int) -> int:
        """A sequence number above all that this identity has ever used, clock or no clock."""
        path = self.path / "sequence"
        first = max(unix_ms, self._read_number(path) + SEQUENCES_PER_RUN)
        self._write(path, str(first).encode())
        return first

    def known_peers(self, mesh: str) -> dict[str, tuple[str, ...]]:
        """Addresses of the members that were connected when it was last saved."""
        data = self._read(self.path / "peers" / f"{mesh}.json")
        if data is None:
            return {}
        return _decode_json(data, dict[str, tuple[str, ...]], "known peers")

    def save_known_peers(self, mesh: str, peers: dict[str, tuple[str, ...]]) -> None:
        kept = dict(list(peers.items())[:PEERS_KEPT_MAX])
        self._write(self.path / "peers" / f"{mesh}.json", msgspec.json.encode(kept))

    def journals(self, mesh: str) -> dict[str, bytes]:
        """What agreement has to remember across a crash, by name."""
        folder = self.path / "agreement" / mesh
        if not folder.is_dir():
            return {}
        files = sorted(entry for entry in folder.iterdir() if not entry.name.endswith(".new"))
        found = {entry.name: self._read(entry) for entry in files}
        return {name: data for name, data in found.items() if data is not None}

    def save_journal(self, mesh: str, name: str, data: bytes) -> None:
        """Durable when it returns: what it says may then be said to others."""
        self._write(self.path / "agreement" / mesh / name, data)

    # --- where the running node is ---------------------------------------------------------------

    def publish_api(self, url: str) -> None:
        """For the other commands on this machine; removed when the node stops."""
        pointer = {"url": url, "pid": os.getpid()}
        self._write(self.path / "api.json", msgspec.json.encode(pointer))

    def withdraw_api(self) -> None:
        (self.path / "api.json").unlink(missing_ok=True)

    # --- files ----------------------------------------------------------------------------------

    def _mesh_file(self, name: str, suffix: str) -> Path:
        return self.path / "meshes" / f"{name}.{suffix}"

    def _read(self, path: Path) -> bytes | None:
        try:
            if path.stat().st_size > FILE_BYTES_MAX:
                raise ConfigError(f"{path} is damaged (far too large): move it away")
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error

    def _read_number(self, path: Path) -> int:
        """A decimal number; 0 if there is no file yet."""
        data = self._read(path)
        if data is None:
            return 0
        if not data.isdigit():
            raise ConfigError(f"{path} is damaged (not a number): restore it from a backup")
        return int(data)

    def _write(self, path: Path, data: bytes) -> None:
        """Atomic and durable: whoever reads sees the old bytes or all of the new ones."""
        temporary = path.with_name(path.name + ".new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _decode_json(data: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"the stored {what} is damaged ({error}): delete it and join again"
        ) from error
