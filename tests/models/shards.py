"""A receipt as the command makes one, for tests that need no measurement."""

from __future__ import annotations

from pathlib import Path

from meshnode.identity import KeyPair
from meshnode.models.receipt import Quality, Receipt, Text, receipt_path, sign, write_receipt

KEY = KeyPair.from_seed(bytes(range(32)))
SOURCE = "5e" * 32


def a_receipt(digest: str, kept: int = 24, of: int = 32) -> Receipt:
    text = Text("some.txt", "ab" * 32, 4096)
    return Receipt(
        format=1,
        source=SOURCE,
        source_bytes=100,
        shard=digest,
        shard_bytes=80,
        architecture="qwen3moe",
        layers=6,
        kept=kept,
        of=of,
        used=4,
        ranking="output-norm",
        calibration=text,
        held_out=text,
        quality=Quality(0.024, 0.89, 30.8, 1.04),
        measured_at=1_800_000_000,
        meshnode="0.1.0",
        llama_cpp_python="0.3.36",
    )


def put_receipt(shard: Path, receipt: Receipt) -> Path:
    """Beside the shard, signed by `KEY`."""
    path = receipt_path(shard)
    write_receipt(path, sign(receipt, KEY))
    return path
