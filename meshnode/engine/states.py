"""Saved KV as bytes: in memory, or in files that nobody else can open. Checked when it comes back.

Does what `saved.py` decides. llama.cpp takes a flipped bit in a state for truth, and a disk may
flip one, so every state is hashed when it is made and again before it is used.

A spilled state is a file without a name, with mode 0600: the kernel frees it when this process
ends, however it ends, so nothing is ever left behind, and nothing has to be swept up.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import IO

# A state has a position and a few numbers for each token besides its KV: 12 bytes measured, and
# some per layer.
STATE_TOKEN_BYTES = 64
# 128 bits find any accident; nobody forges what only we can open.
_DIGEST_BYTES = 16


class StateLostError(Exception):
    """A state cannot be written, or not be read back as it was; it is gone."""


class StateStore:
    """States by key. Blocks while it writes to disk or reads; not thread-safe.

    None takes more than `bytes_per_token` for each of its tokens.
    """

    def __init__(self, directory: Path | None, kv_bytes_per_token: int) -> None:
        """`directory` is for those that are spilled; without one, none may be."""
        self.bytes_per_token = kv_bytes_per_token + STATE_TOKEN_BYTES
        self._directory = directory
        self._in_memory: dict[int, bytearray] = {}
        self._on_disk: dict[int, tuple[IO[bytes], int]] = {}
        self._digests: dict[int, bytes] = {}

    def put(self, key: int, state: bytearray) -> None:
        self._in_memory[key] = state
        self._digests[key] = _digest(state)

    def spill(self, key: int) -> None:
        """Move a state to disk. Raises `StateLostError` if there is no room, or no directory."""
        state = self._in_memory.pop(key, None)
        if state is None or self._directory is None:
            self.drop(key)
            raise StateLostError("there is no such KV state, or no directory for it")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
            self._on_disk[key] = file, len(state)
            rest = memoryview(state)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            self.drop(key)
            raise StateLostError(f"a KV state cannot be spilled: {error}") from error

    def get(self, key: int) -> bytearray:
        """A state as it was put in. Raises `StateLostError` if it is not, or never was."""
        try:
            state = self._in_memory[key] if key in self._in_memory else self._read(key)
        except OSError as error:
            raise StateLostError(f"a spilled KV state cannot be read: {error}") from error
        if _digest(state) != self._digests.get(key):
            raise StateLostError("a saved KV state has changed")
        return state

    def _read(self, key: int) -> bytearray:
        if key not in self._on_disk:
            raise StateLostError("there is no such KV state")
        file, size = self._on_disk[key]
        state = bytearray(size)
        file.seek(0)
        rest = memoryview(state)
        while rest and (count := file.readinto(rest)):  # type: ignore[attr-defined]
            rest = rest[count:]
        return state

    def drop(self, key: int) -> None:
        """Forget a state, if it is there."""
        self._in_memory.pop(key, None)
        self._digests.pop(key, None)
        file, _ = self._on_disk.pop(key, (None, 0))
        if file is not None:
            file.close()


def _digest(state: bytearray) -> bytes:
    return hashlib.blake2b(state, digest_size=_DIGEST_BYTES).digest()
