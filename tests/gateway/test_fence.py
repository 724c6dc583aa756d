"""The fence's one spelling: what is written is read back, and nothing else is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import RemoteProtocolError
from meshnode.fence import FENCE_CHARS_MAX, Fence, parse_fence, shard_text
from meshnode.messages import Item, Shard

GROUP = "0123456789abcdef" * 2


def item(replica: int, shard: Shard) -> Item:
    return Item("ab" * 32, "words", replica, shard, "1" * 46, (), "serving", 1)


@pytest.mark.parametrize(
    ("replica", "shard", "text"),
    [
        (0, Shard("whole", 0, 30, 30), "0.whole"),
        (2, Shard("layers", 0, 12, 30), "2.layers.0-12.30"),
        (65535, Shard("experts", 4095, 4096, 4096), "65535.experts.4095-4096.4096"),
    ],
)
def test_shards_are_named_by_replica_and_part(replica: int, shard: Shard, text: str) -> None:
    assert shard_text(item(replica, shard)) == text
    fence = Fence(GROUP, 2**53 - 1, text)
    assert parse_fence(str(fence)) == fence
    assert len(str(fence)) <= FENCE_CHARS_MAX


@given(
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.integers(0, 2**53 - 1),
    st.integers(0, 65535),
    st.sampled_from(["whole", "layers", "experts"]),
    st.tuples(st.integers(0, 4095), st.integers(1, 4096), st.integers(1, 4096)),
)
def test_what_is_written_is_read_back(
    group: str, epoch: int, replica: int, kind: str, units: tuple[int, int, int]
) -> None:
    first, end, of = sorted(units)
    whole = item(replica, Shard(kind, first, end + 1, of + 1))  # type: ignore[arg-type]
    fence = Fence(group, epoch, shard_text(whole))
    if kind == "whole" or (end + 1 <= 4096 and of + 1 <= 4096):
        assert parse_fence(str(fence)) == fence


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        f"{GROUP}/1/0.whole ",
        f"{GROUP}/1/0.whole\n",
        f"{GROUP.upper()}/1/0.whole",
        f"{GROUP[1:]}/1/0.whole",
        f"{GROUP}/01/0.whole",
        f"{GROUP}/+1/0.whole",
        f"{GROUP}/\u0661/0.whole",
        f"{GROUP}/{2**53}/0.whole",
        f"{GROUP}/{10**40}/0.whole",
        f"{GROUP}/1/65536.whole",
        f"{GROUP}/1/0.whole.0-1.1",
        f"{GROUP}/1/0.layers",
        f"{GROUP}/1/0.layers.1-1.4",
        f"{GROUP}/1/0.layers.2-1.4",
        f"{GROUP}/1/0.layers.0-5.4",
        f"{GROUP}/1/0.layers.0-5.4097",
        f"{GROUP}/1/0.heads.0-4.4",
        f"{GROUP}/1/0.whole/2",
        "x" * 100_000,
    ],
)
def test_nothing_else_is_a_fence(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_fence(text)
