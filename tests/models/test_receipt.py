"""A receipt is worth something if it is of these bytes and by who it says; else it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshnode.errors import ModelLoadError
from meshnode.identity import KeyPair
from meshnode.messages import Approximate
from meshnode.models.gguf import ShardMark
from meshnode.models.receipt import RECEIPT_BYTES_MAX, read_receipt, receipt_path, sign
from tests.models.shards import KEY, SOURCE, a_receipt, put_receipt

DIGEST = "d1" * 32
MARK = ShardMark(SOURCE, 24, 32)
COMMAND = r"meshnode models shard MODEL --experts 24"


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tmp_path / "big~24of32.gguf"


def test_what_is_written_is_read_and_says_by_whom(shard: Path) -> None:
    put_receipt(shard, a_receipt(DIGEST))
    signed = read_receipt(shard, DIGEST, MARK)
    assert signed.receipt == a_receipt(DIGEST)
    assert signed.approximate == Approximate(0.024, 0.89, 1.04, 24, 32, KEY.peer_id)
    assert sorted(path.name for path in shard.parent.iterdir()) == [receipt_path(shard).name]


def test_without_a_receipt_the_command_that_makes_one_is_told(shard: Path) -> None:
    with pytest.raises(ModelLoadError, match=COMMAND):
        read_receipt(shard, DIGEST, MARK)


@pytest.mark.parametrize(
    ("digest", "mark"),
    [
        ("d2" * 32, MARK),
        (DIGEST, ShardMark("5f" * 32, 24, 32)),
        (DIGEST, ShardMark(SOURCE, 16, 32)),
        (DIGEST, ShardMark(SOURCE, 24, 64)),
    ],
)
def test_a_receipt_of_something_else_is_worth_nothing(
    digest: str, mark: ShardMark, shard: Path
) -> None:
    put_receipt(shard, a_receipt(DIGEST))
    with pytest.raises(ModelLoadError, match=r"of other bytes|says otherwise"):
        read_receipt(shard, digest, mark)


def embellished(told: dict[str, Any]) -> None:
    told["receipt"]["quality"]["kl"] = 0.001


def usurped(told: dict[str, Any]) -> None:
    told["signer"] = KeyPair.generate().peer_id


def talkative(told: dict[str, Any]) -> None:
    told["receipt"]["more"] = 1


def shameless(told: dict[str, Any]) -> None:
    told["receipt"]["quality"]["agreement"] = 1.5


def silent(told: dict[str, Any]) -> None:
    del told["signature"]


@pytest.mark.parametrize("change", [embellished, usurped, talkative, shameless, silent])
def test_nothing_in_a_receipt_can_be_changed(change: Any, shard: Path) -> None:
    path = put_receipt(shard, a_receipt(DIGEST))
    told = json.loads(path.read_bytes())
    change(told)
    path.write_text(json.dumps(told))
    with pytest.raises(ModelLoadError, match=COMMAND):
        read_receipt(shard, DIGEST, MARK)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 50_000, b" " * (RECEIPT_BYTES_MAX + 1)], ids=len
)
def test_nonsense_is_no_receipt(data: bytes, shard: Path) -> None:
    receipt_path(shard).write_bytes(data)
    with pytest.raises(ModelLoadError, match=COMMAND):
        read_receipt(shard, DIGEST, MARK)


def test_a_signature_of_the_bare_receipt_does_not_count(shard: Path) -> None:
    receipt = a_receipt(DIGEST)
    bare = KEY.sign(msgspec.json.encode(receipt))
    forged = msgspec.structs.replace(sign(receipt, KEY), signature=bare)
    receipt_path(shard).write_bytes(msgspec.json.encode(forged))
    with pytest.raises(ModelLoadError, match="signature"):
        read_receipt(shard, DIGEST, MARK)
