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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import trio

from meshnode.errors import ModelLoadError

LEAF_BYTES = 1024 * 1024
# Files whose digest is remembered; the oldest are forgotten first.
CACHED_MAX = 256
CACHE_NAME = "digests.json"
LEAVES_FOLDER = "leaves"
HASH_BYTES = 32

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
            tree = HashTree(leaf_hashes(path, progress))
            if _cache_key(path) != key:
                raise ModelLoadError(f"{path} changed while it was being read; try again.")
            cache[key] = tree.root.hex()
            _write_leaves(cache_dir, tree)
            _write_cache(cache_dir / CACHE_NAME, cache)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
    progress(1.0)
    return cache[key]


def tree_of(path: Path, root: str, cache_dir: Path) -> HashTree:
    """The tree of a file that is known to have the digest `root`: as remembered, else read anew.

    So that whoever proves ranges of a file to others does not read all of it each time. Raises
    `ModelLoadError` if it cannot be read or is another file by now.
    """
    kept = _read_leaves(cache_dir / LEAVES_FOLDER / root)
    if kept and (tree := HashTree(kept)).root.hex() == root:
        return tree
    try:
        tree = HashTree(leaf_hashes(path))
        if tree.root.hex() != root:
            raise ModelLoadError(f"{path} has changed since it was verified; start again.")
        _write_leaves(cache_dir, tree)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
    return tree


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


class HashTree:
    """The tree over the leaf hashes of one file, at least one; proves ranges of it."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        level = list(leaves)
        self._levels = [level]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            # The last of an odd number goes up as it is: that is the RFC's split, seen from below.
            level = [_node_hash(*pair) for pair in pairs] + level[len(level) & ~1 :]
            self._levels.append(level)

    @property
    def leaves(self) -> Sequence[bytes]:
        return self._levels[0]

    @property
    def root(self) -> bytes:
        return self._levels[-1][0]

    def range_proof(self, first: int, last: int) -> list[bytes]:
        """What a peer needs besides leaves `first` to `last - 1` to compute the root.

        The roots of the largest subtrees outside the range, from left to right.
        """
        return list(self._outside(0, len(self.leaves), first, last))

    def _outside(self, start: int, count: int, first: int, last: int) -> Iterator[bytes]:
        if start >= last or start + count <= first:
            level = (count - 1).bit_length()
            yield self._levels[level][start >> level]
        elif count > 1:
            middle = _split(count)
            yield from self._outside(start, middle, first, last)
            yield from self._outside(start + middle, count - middle, first, last)


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The root over at least one leaf hash."""
    return HashTree(leaves).root


def leaf_count(size_bytes: int) -> int:
    return max(1, -(-size_bytes // LEAF_BYTES))


def corners(count: int) -> list[int]:
    """Leaves that, verified, prove that there are `count`: one in each complete subtree and the
    last. A range alone does not: some places look alike in trees of different sizes.

    In the true tree each lies as deep as its subtree is high, and on the way to the last one turns
    right as often as there are subtrees; so all heights are as claimed, and so is their sum. The
    length of the last leaf then is the rest of the file's.
    """
    found, start = [], 0
    while count > 1:
        found.append(start)
        middle = _split(count)
        start, count = start + middle, count - middle
    return [*found, start]


def verify_range(
    root: bytes, count: int, first: int, data: list[bytes], proof: list[bytes]
) -> bool:
    """Whether `data` (whole leaves) are leaves `first`, `first + 1`, ... of the file `root`.

    `count`, of all leaves, comes from the file's size. All arguments but `root` may be hostile.
    """
    last = first + len(data)
    if not data or not 0 <= first < last <= count:
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
        computed = subtree(0, count)
    except StopIteration:  # the proof is too short
        return False
    return computed == root and next(outside, None) is None


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
    for key in cache.keys() - newest.keys():
        if cache[key] not in newest.values():
            (path.parent / LEAVES_FOLDER / cache[key]).unlink(missing_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(newest, indent=1))
    os.replace(draft, path)


def _read_leaves(path: Path) -> list[bytes]:
    """The leaf hashes that were remembered; none if the file is missing. Whether they are right
    shows in their root."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]


def _write_leaves(cache_dir: Path, tree: HashTree) -> None:
    folder = cache_dir / LEAVES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{tree.root.hex()}.{os.getpid()}.tmp"
    draft.write_bytes(b"".join(tree.leaves))
    os.replace(draft, folder / tree.root.hex())
