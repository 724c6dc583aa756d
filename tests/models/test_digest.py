"""The tree hash: known values, proofs of ranges, and the memory of unchanged files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import ModelLoadError
from meshnode.models.digest import (
    CACHE_NAME,
    LEAF_BYTES,
    LEAVES_FOLDER,
    HashTree,
    corners,
    digest,
    digest_blocking,
    leaf_hash,
    leaf_hashes,
    tree_of,
    tree_root,
    verify_range,
)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_the_tree_is_that_of_rfc_6962() -> None:
    # The roots of the RFC's reference data (its tests of 1, 2 and 3 leaves).
    entries = [b"", b"\x00", b"\x10"]
    leaves = [leaf_hash(entry) for entry in entries]
    assert tree_root(leaves[:1]).hex().startswith("6e340b9cffb37a989ca544e6bb780a2c")
    assert tree_root(leaves[:2]).hex().startswith("fac54203e7cc696cf0dfcb42c92a1d9d")
    assert tree_root(leaves[:3]).hex().startswith("aeb6bcfe274b70a14fb067a5e5578264")


def test_files_are_cut_into_leaves(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert leaf_hashes(path) == [sha(b"\0")]
    data = bytes(range(256)) * (LEAF_BYTES // 128) + b"tail"
    path.write_bytes(data)
    first, second, tail = (leaf_hash(data[i : i + LEAF_BYTES]) for i in
                           (0, LEAF_BYTES, 2 * LEAF_BYTES))  # fmt: skip
    root = sha(b"\1" + sha(b"\1" + first + second) + tail)
    assert tree_root(leaf_hashes(path)) == root


@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), st.data()
)
def test_a_range_verifies_alone_and_any_change_shows(
    size: tuple[int, int], data: st.DataObject
) -> None:
    count, first = size
    last = data.draw(st.integers(first + 1, count))
    contents = [bytes([i]) * 3 for i in range(count)]
    leaves = [leaf_hash(content) for content in contents]
    root, proof = tree_root(leaves), HashTree(leaves).range_proof(first, last)
    chosen = contents[first:last]
    assert len(proof) <= 2 * count.bit_length()
    assert verify_range(root, count, first, chosen, proof)
    changed = [*chosen[:-1], chosen[-1] + b"!"]
    assert not verify_range(root, count, first, changed, proof)
    assert not verify_range(root, count, first, chosen, [*proof, b"extra"])
    assert not verify_range(sha(root), count, first, chosen, proof)
    assert not verify_range(root, count, first + 1, chosen, proof)
    assert not verify_range(root, count, first, [], proof)
    if proof:
        assert not verify_range(root, count, first, chosen, proof[:-1])


def test_hostile_claims_are_refused() -> None:
    root = tree_root([leaf_hash(b"a")])
    assert not verify_range(root, 2**62, 0, [b"a"], [])
    assert not verify_range(root, 1, -1, [b"a"], [])
    assert not verify_range(root, 0, 0, [b"a"], [])
    # A node passed off as a leaf: the prefix prevents it.
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert not verify_range(tree_root([left, right]), 1, 0, [left + right], [])


async def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, cache_dir = tmp_path / "file", tmp_path / "cache"
    path.write_bytes(b"one")
    fractions: list[float] = []
    first = await digest(path, cache_dir, fractions.append)
    assert first == tree_root([leaf_hash(b"one")]).hex()
    assert fractions[-1] == 1.0
    cache = cache_dir / CACHE_NAME
    cache.write_text(cache.read_text().replace(first, "remembered"))
    assert await digest(path, cache_dir) == "remembered"
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert await digest(path, cache_dir) == tree_root([leaf_hash(b"two")]).hex()


@pytest.mark.parametrize("content", ["", "not json", "[1]", '{"a": 1}'])
async def test_a_damaged_cache_is_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    (tmp_path / CACHE_NAME).write_text(content)
    assert await digest(path, tmp_path) == tree_root([leaf_hash(b"one")]).hex()


async def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="gone cannot be read"):
        await digest(tmp_path / "gone", tmp_path)


def depths(count: int) -> list[str]:
    """The way from the root to each leaf, as turns."""
    if count == 1:
        return [""]
    middle = 1 << (count - 1).bit_length() - 1
    ways = [("L", each) for each in depths(middle)] + [
        ("R", each) for each in depths(count - middle)
    ]
    return [turn + rest for turn, rest in ways]


def test_corners_tell_how_many_leaves_there_are() -> None:
    """No two sizes have leaves in all the places where the corners of one of them are."""
    ways = {count: depths(count) for count in range(1, 130)}
    for count, own in ways.items():
        places = {own[at] for at in corners(count)}
        assert len(places) <= count.bit_length() + 1
        assert [n for n, other in ways.items() if places <= set(other)] == [count]


def test_leaves_are_remembered_and_checked(tmp_path: Path) -> None:
    path, cache_dir = tmp_path / "file", tmp_path / "cache"
    path.write_bytes(b"a" * LEAF_BYTES + b"b")
    root = digest_blocking(path, cache_dir)
    kept = cache_dir / LEAVES_FOLDER / root
    assert kept.read_bytes() == b"".join(leaf_hashes(path))
    path.write_bytes(b"other")
    assert tree_of(path, root, cache_dir).root.hex() == root, "without reading the file"
    kept.write_bytes(b"damage")
    with pytest.raises(ModelLoadError, match="has changed"):
        tree_of(path, root, cache_dir)
    path.write_bytes(b"a" * LEAF_BYTES + b"b")
    assert len(tree_of(path, root, cache_dir).leaves) == 2
    assert kept.read_bytes() == b"".join(leaf_hashes(path))
