"""What an expert shard is worth, measured against the whole model, and signed by who measured it.

Decides when a shard may be served: its receipt lies beside it, is of these very bytes and carries
the signature it names. Believes the figures: whether their signer is to be trusted is for people,
to whom it is shown.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from meshnode.config import Ranking
from meshnode.errors import ModelLoadError
from meshnode.identity import PeerId, Signer, verify_by
from meshnode.messages import Approximate, Count, Digest, PeerIdText, Signature, UnixSeconds
from meshnode.models.gguf import ShardMark

SUFFIX = ".receipt.json"
# Figures and digests; the longest are the names of texts.
RECEIPT_BYTES_MAX = 64 * 1024
# Keeps a signature of anything else from being one of a receipt.
_DOMAIN = b"meshnode-shard-receipt\0"

_Name = Annotated[str, Meta(max_length=255)]
_Figure = Annotated[float, Meta(ge=0.0, le=1e12)]


class Text(Struct, frozen=True, forbid_unknown_fields=True):
    """A text by its file's name and SHA-256, and how many of its tokens were read."""

    name: _Name
    sha256: Digest
    tokens: Count


class Quality(Struct, frozen=True, forbid_unknown_fields=True):
    """How near a shard comes to the whole model on a text. `kl` in nats per token, whole to shard;
    `agreement` is the share of tokens for which both find the same next one likeliest."""

    kl: Annotated[float, Meta(ge=0.0, le=1e3)]
    agreement: Annotated[float, Meta(ge=0.0, le=1.0)]
    perplexity: _Figure
    perplexity_ratio: Annotated[float, Meta(gt=0.0, le=1e6)]


class Receipt(Struct, frozen=True, forbid_unknown_fields=True):
    """What was cut from what, how its experts were chosen, and what that cost.

    Digests of files are those of `digest.py`. `used`: experts that the shard asks for each token.
    """

    format: Literal[1]
    source: Digest
    source_bytes: Count
    shard: Digest
    shard_bytes: Count
    architecture: _Name
    layers: Annotated[int, Meta(ge=1, le=4096)]
    kept: Annotated[int, Meta(ge=1, le=4096)]
    of: Annotated[int, Meta(ge=1, le=4096)]
    used: Annotated[int, Meta(ge=1, le=4096)]
    ranking: Ranking
    calibration: Text
    held_out: Text
    quality: Quality
    measured_at: UnixSeconds
    meshnode: _Name
    llama_cpp_python: _Name


class SignedReceipt(Struct, frozen=True, forbid_unknown_fields=True):
    """A receipt as it lies on the disk; the signature covers the receipt's own encoding."""

    receipt: Receipt
    signer: PeerIdText
    signature: Signature

    @property
    def approximate(self) -> Approximate:
        """What the mesh is told of it."""
        quality = self.receipt.quality
        return Approximate(
            quality.kl,
            quality.agreement,
            quality.perplexity_ratio,
            self.receipt.kept,
            self.receipt.of,
            self.signer,
        )


def receipt_path(shard: Path) -> Path:
    """Where the receipt of a shard lies."""
    return shard.with_name(shard.name + SUFFIX)


def sign(receipt: Receipt, key: Signer) -> SignedReceipt:
    return SignedReceipt(receipt, key.peer_id, key.sign(_signed_bytes(receipt)))


def write_receipt(path: Path, signed: SignedReceipt) -> None:
    """All of it or nothing, and readable by people."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(signed)) + b"\n")
    os.replace(draft, path)


def read_receipt(shard: Path, digest: str, mark: ShardMark) -> SignedReceipt:
    """The receipt of the shard whose bytes have this digest.

    Raises `ModelLoadError`, saying which command makes one, if there is none that is worth it.
    """
    path = receipt_path(shard)
    try:
        with open(path, "rb") as file:
            data = file.read(RECEIPT_BYTES_MAX + 1)
    except FileNotFoundError:
        raise _worthless(shard, mark, f"it has no receipt ({path.name} beside it)") from None
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > RECEIPT_BYTES_MAX:
        raise _worthless(shard, mark, f"{path.name} is too large for a receipt")
    try:
        signed = msgspec.json.decode(data, type=SignedReceipt)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _worthless(shard, mark, f"{path.name} is no receipt: {error}") from None
    receipt = signed.receipt
    if receipt.shard != digest:
        raise _worthless(shard, mark, f"{path.name} is of other bytes")
    if (receipt.source, receipt.kept, receipt.of) != (mark.source, mark.kept, mark.of):
        raise _worthless(shard, mark, f"{path.name} says otherwise than the shard what it is")
    if not verify_by(PeerId(signed.signer), signed.signature, _signed_bytes(receipt)):
        raise _worthless(shard, mark, f"the signature of {path.name} is not by {signed.signer}")
    return signed


def _signed_bytes(receipt: Receipt) -> bytes:
    return _DOMAIN + msgspec.json.encode(receipt)


def _worthless(shard: Path, mark: ShardMark, why: str) -> ModelLoadError:
    return ModelLoadError(
        f"{shard} is an expert shard ({mark.kept} of {mark.of} experts), and {why}. Only a "
        f"measured shard is served: meshnode models shard MODEL --experts {mark.kept} makes one."
    )
