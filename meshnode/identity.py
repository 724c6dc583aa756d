"""Who signed this: Ed25519 node keys, libp2p PeerIds and libp2p signed envelopes.

Knows bytes and signatures only: no networks, no meshes, no time. Formats are libp2p's, written
out here because layer 1 does not import libp2p: the peer-id spec (identity multihash of the
protobuf public key, base58btc) and RFC 0002 signed envelopes. `tests/test_identity.py` holds
them equal to py-libp2p's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NewType, Protocol

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meshnode.errors import ConfigError, LocalProtocolError, RemoteProtocolError

PeerId = NewType("PeerId", str)
"""A libp2p peer id in its base58btc text form, `12D3KooW…` for Ed25519 keys."""

KEY_BYTES = 32
PEER_IDS_KEPT = 8192
"""Base58 costs 10 us in Python, and a node meets the same peers again and again."""
ENVELOPE_BYTES_MAX = 64 * 1024
"""No record of ours comes near; py-libp2p's gossip stops working at 64 KiB (measured)."""
PAYLOAD_TYPES_KEPT = 64
"""More than there are kinds of messages that are signed."""

# PublicKey{Type=Ed25519(1), Data=32 bytes} in protobuf, and the multihash code "identity" (0x00)
# with that length: libp2p peer-id spec, "Keys" and "Peer Ids".
_PUBLIC_KEY_PREFIX = bytes([0x08, 0x01, 0x12, KEY_BYTES])
_MULTIHASH_PREFIX = bytes([0x00, len(_PUBLIC_KEY_PREFIX) + KEY_BYTES])


@lru_cache(PEER_IDS_KEPT)
def peer_id_of(public_key: bytes) -> PeerId:
    """The PeerId of a raw 32-byte Ed25519 public key."""
    if len(public_key) != KEY_BYTES:
        raise LocalProtocolError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    raw = _MULTIHASH_PREFIX + _PUBLIC_KEY_PREFIX + public_key
    return PeerId(base58.b58encode(raw).decode())


@lru_cache(PEER_IDS_KEPT)
def public_key_of(peer_id: str) -> bytes:
    """The raw Ed25519 public key that a PeerId carries. Raises `RemoteProtocolError`."""
    try:
        raw = base58.b58decode(peer_id)
    except ValueError as error:
        raise RemoteProtocolError(f"not a peer id: {peer_id[:64]!r}") from error
    prefix = _MULTIHASH_PREFIX + _PUBLIC_KEY_PREFIX
    if len(raw) != len(prefix) + KEY_BYTES or not raw.startswith(prefix):
        raise RemoteProtocolError(f"not an Ed25519 peer id: {peer_id[:64]!r}")
    return raw[len(prefix) :]


class Signer(Protocol):
    """What can speak for a peer. `KeyPair` is the only one that a node uses; a simulation of
    thousands of nodes has a cheaper one, with a `Verify` of its own."""

    @property
    def public(self) -> bytes: ...

    @property
    def peer_id(self) -> PeerId: ...

    def sign(self, data: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An Ed25519 key. `repr` shows the public half only."""

    _private: Ed25519PrivateKey
    public: bytes
    peer_id: PeerId

    def __repr__(self) -> str:
        return f"KeyPair({self.peer_id})"

    @classmethod
    def generate(cls) -> KeyPair:
        return cls.from_seed(os.urandom(KEY_BYTES))

    @classmethod
    def from_seed(cls, seed: bytes) -> KeyPair:
        """From the 32-byte private seed (RFC 8032)."""
        if len(seed) != KEY_BYTES:
            raise LocalProtocolError(f"an Ed25519 seed has 32 bytes, not {len(seed)}")
        private = Ed25519PrivateKey.from_private_bytes(seed)
        public = private.public_key().public_bytes_raw()
        return cls(private, public, peer_id_of(public))

    @property
    def seed(self) -> bytes:
        return self._private.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        return self._private.sign(data)


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `signature` (64 bytes) over `data` is by `public_key` (32 bytes)."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


Verify = Callable[[bytes, bytes, bytes], bool]
"""(public key, signature, data) -> whether it is genuine: `verify`, or what fits a `Signer`."""


def verify_by(peer_id: str, signature: bytes, data: bytes, genuine: Verify = verify) -> bool:
    """Whether `signature` over `data` is by the key that `peer_id` carries."""
    try:
        return genuine(public_key_of(peer_id), signature, data)
    except RemoteProtocolError:
        return False


def load_or_create_key(path: Path) -> KeyPair:
    """The key stored at `path` as 32 raw bytes, made on first use with mode 0600.

    Raises `ConfigError` if the file is damaged or others can read it.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _load_key(path)
    key = KeyPair.generate()
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.seed)
        file.flush()
        os.fsync(file.fileno())
    return key


def _load_key(path: Path) -> KeyPair:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(f"{path} holds a private key but has mode {mode:o}: chmod 600 it")
    seed = path.read_bytes()
    if len(seed) != KEY_BYTES:
        raise ConfigError(
            f"{path} is damaged ({len(seed)} bytes instead of {KEY_BYTES}): restore it from a "
            "backup, or delete it to start under a new identity"
        )
    return KeyPair.from_seed(seed)


# --- signed envelopes (libp2p RFC 0002) ----------------------------------------------------------
# message Envelope { PublicKey public_key = 1; bytes payload_type = 2; bytes payload = 3;
#                    bytes signature = 5; }
# The signature covers domain, payload_type and payload, each preceded by its length as a varint.

_TAG_PUBLIC_KEY, _TAG_TYPE, _TAG_PAYLOAD, _TAG_SIGNATURE = 0x0A, 0x12, 0x1A, 0x2A
_ENVELOPE_TAGS = (_TAG_PUBLIC_KEY, _TAG_TYPE, _TAG_PAYLOAD, _TAG_SIGNATURE)


@dataclass(frozen=True, slots=True)
class Signed:
    """A verified envelope: `payload` is what `signer` signed, for this domain and type only."""

    signer: PeerId
    payload: bytes


def seal(key: Signer, domain: str, payload_type: bytes, payload: bytes) -> bytes:
    """Sign `payload` into an envelope that verifies only under the same domain and type."""
    signature = key.sign(_signed_bytes(domain, payload_type, payload))
    fields = (_PUBLIC_KEY_PREFIX + key.public, payload_type, payload, signature)
    return b"".join(
        bytes([tag]) + _varint(len(field)) + field
        for tag, field in zip(_ENVELOPE_TAGS, fields, strict=True)
    )


def open_envelope(
    data: bytes, domain: str, payload_type: bytes, genuine: Verify = verify
) -> Signed:
    """Verify an envelope. Raises `RemoteProtocolError` on any deviation, forged ones included."""
    if len(data) > ENVELOPE_BYTES_MAX:
        raise RemoteProtocolError(f"envelope of {len(data)} bytes (limit {ENVELOPE_BYTES_MAX})")
    fields: list[bytes] = []
    offset = 0
    for tag in _ENVELOPE_TAGS:
        if offset >= len(data) or data[offset] != tag:
            raise RemoteProtocolError("envelope fields are missing or out of order")
        length, offset = _read_varint(data, offset + 1)
        if length > len(data) - offset:
            raise RemoteProtocolError("envelope is truncated")
        fields.append(data[offset : offset + length])
        offset += length
    if offset != len(data):
        raise RemoteProtocolError("envelope has trailing bytes")
    public_key, found_type, payload, signature = fields
    if not public_key.startswith(_PUBLIC_KEY_PREFIX) or len(public_key) != 4 + KEY_BYTES:
        raise RemoteProtocolError("envelope is not signed by an Ed25519 key")
    if found_type != payload_type:
        raise RemoteProtocolError(f"envelope holds {found_type[:64]!r}, not {payload_type!r}")
    signer = public_key[4:]
    if not genuine(signer, signature, _signed_bytes(domain, payload_type, payload)):
        raise RemoteProtocolError("envelope signature does not verify")
    return Signed(peer_id_of(signer), payload)


def _signed_bytes(domain: str, payload_type: bytes, payload: bytes) -> bytes:
    return _signed_prefix(domain, payload_type) + _varint(len(payload)) + payload


@lru_cache(maxsize=PAYLOAD_TYPES_KEPT)
def _signed_prefix(domain: str, payload_type: bytes) -> bytes:
    parts = (domain.encode(), payload_type)
    return b"".join(_varint(len(part)) + part for part in parts)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    # Lengths here are below 2**21, so a fourth byte is already illegal.
    for byte in data[offset : offset + 3]:
        value |= (byte & 0x7F) << shift
        shift += 7
        offset += 1
        if byte < 0x80:
            return value, offset
    raise RemoteProtocolError("envelope has an overlong or truncated length")
