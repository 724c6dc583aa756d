"""The identity of a model's bytes: a SHA-256 tree hash, of which ranges can be verified alone.

Decides what "the same file" means. The tree is that of RFC 6962 (Certificate Transparency) over
leaves of 1 MiB: hash(0x00 | leaf) and hash(0x01 | left | right), split at the largest power of two
below the number of leaves. The prefixes keep a leaf from being passed off as a node. Knows
nothing of GGUF or of who asks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from meshnode.errors import ModelLoadError

LEAF_BYTES = 1024 * 1024
# Files whose digest is remembered; the oldest are forgotten first.
CACHED_MAX = 256
CACHE_NAME = "digests.json"

Progress = Callable[[float], None]


def _no_progress(_fraction: float) -> None:
    """The default: nobody watches."""


async def digest(path: Path, cache_dir: Path, progress: Progress = _no_progress) -> str:
    """The hex digest of a file, computed in a thread unless the file is known and unchanged.

    `progress` is called with 0..1 in that thread. Raises `ModelLoadError` if it cannot be read.
    """

    def report(fraction: float) -> None:
        trio.from_thread.check_cancelled()  # between two leaves: a large file takes minutes
        progress(fraction)

    return await trio.to_thread.run_sync(digest_blocking, path, cache_dir, report)


def digest_blocking(path: Path, cache_dir: Path, progress: Progress = _no_progress) -> str:
    """As `digest`, in the calling thread."""
    try:
        key = _cache_key(path)
        cache = _read_cache(cache_dir / CACHE_NAME)
        if key not in cache:
            root = tree_root(leaf_hashes(path, progress)).hex()
            if _cache_key(path) != key:
                raise ModelLoadError(f"{path} changed while it was being read; try again.")
            cache[key] = root
            _write_cache(cache_dir / CACHE_NAME, cache)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
    progress(1.0)
    return cache[key]


# -- the tree ----------------------------------------------------------------------------------


def leaf_hashes(path: Path, progress: Progress = _no_progress) -> list[bytes]:
    """The hash of every leaf of a file; an empty file is one empty leaf."""
    hashes: list[bytes] = []
    with open(path, "rb") as file:
        size = max(1, os.fstat(file.fileno()).st_size)
        while (leaf := file.read(LEAF_BYTES)) or not hashes:
            hashes.append(leaf_hash(leaf))
            progress(min(1.0, len(hashes) * LEAF_BYTES / size))
    return hashes


def leaf_hash(leaf: bytes) -> bytes:
    state = hashlib.sha256(b"\x00")
    state.update(leaf)
    return state.digest()


def tree_root(leaves: list[bytes]) -> bytes:
    """The root over at least one leaf hash."""
    if len(leaves) == 1:
        return leaves[0]
    middle = _split(len(leaves))
    return _node_hash(tree_root(leaves[:middle]), tree_root(leaves[middle:]))


def range_proof(leaves: list[bytes], first: int, last: int) -> list[bytes]:
    """What a peer needs besides leaves `first` to `last - 1` to compute the root.

    The roots of the largest subtrees outside the range, from left to right.
    """
    return list(_outside(leaves, 0, first, last))


def verify_range(
    root: bytes, leaf_count: int, first: int, data: list[bytes], proof: list[bytes]
) -> bool:
    """Whether `data` (whole leaves) are leaves `first`, `first + 1`, ... of the file `root`.

    `leaf_count` comes from the file's size. All arguments but `root` may be hostile.
    """
    last = first + len(data)
    if not data or not 0 <= first < last <= leaf_count:
        return False
    leaves = iter([leaf_hash(leaf) for leaf in data])
    outside = iter(proof)

    def subtree(start: int, count: int) -> bytes:
        if start >= last or start + count <= first:
            return next(outside)
        if count == 1:
            return next(leaves)
        middle = _split(count)
        return _node_hash(subtree(start, middle), subtree(start + middle, count - middle))

    try:
        computed = subtree(0, leaf_count)
    except StopIteration:  # the proof is too short
        return False
    return computed == root and next(outside, None) is None


def _outside(leaves: list[bytes], start: int, first: int, last: int) -> Iterator[bytes]:
    if start >= last or start + len(leaves) <= first:
        yield tree_root(leaves)
    elif len(leaves) > 1:
        middle = _split(len(leaves))
        yield from _outside(leaves[:middle], start, first, last)
        yield from _outside(leaves[middle:], start + middle, first, last)


def _node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(count: int) -> int:
    """The largest power of two below `count`, which is at least 2."""
    return 1 << (count - 1).bit_length() - 1


# -- the cache ---------------------------------------------------------------------------------


def _cache_key(path: Path) -> str:
    """Changes whenever the file does, as far as its directory entry tells."""
    real = path.resolve()
    status = real.stat()
    return f"{real}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def _read_cache(path: Path) -> dict[str, str]:
    """What was remembered; nothing if the file is missing or not ours any more."""
    try:
        cache = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(cache, dict):
        return {}
    return {key: value for key, value in cache.items() if isinstance(value, str)}


def _write_cache(path: Path, cache: dict[str, str]) -> None:
    """Atomically: another node on this machine may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    newest = dict(list(cache.items())[-CACHED_MAX:])
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(newest, indent=1))
    os.replace(draft, path)
