"""Every message that crosses the wire, frozen, with its bounds beside each field.

Encoding is msgpack by msgspec: decoding checks types, lengths and ranges and refuses unknown
fields, so a decoded message is legal. Whether it is *true* is not decided here: signatures are
`identity`'s, membership is `credentials`', freshness is the protocol cores'.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from meshnode.errors import LocalProtocolError, RemoteProtocolError

MESSAGE_BYTES_MAX = 256 * 1024
"""The largest control message: a `Peers` reply with `PEERS_MAX` full records."""
ADVERT_BYTES_MAX = 48 * 1024
"""Under the 64 KiB at which py-libp2p's gossip over QUIC collapses (measured)."""
PEERS_MAX = 64
ADDRS_MAX = 16
MODELS_MAX = 32
SESSIONS_MAX = 512
SESSION_HASH_BYTES = 4
"""512 four-byte hashes are 2 KiB an offer; with 512 held sessions a foreign session is taken for
held once in 8 million, and then costs one prefill on a peer that could serve it anyway."""
CHAIN_MAX = 3

# Patterns end in \Z: a $ would let a line break through, into logs, headers and terminals.
_MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]*\Z"
_PRINTABLE = r"^[ -~]*\Z"

MeshId = Annotated[str, Meta(min_length=32, max_length=32, pattern=r"^[0-9a-f]{32}\Z")]
PeerIdText = Annotated[str, Meta(min_length=40, max_length=64, pattern=r"^[1-9A-HJ-NP-Za-km-z]+\Z")]
Address = Annotated[str, Meta(max_length=256, pattern=r"^/[!-~]*\Z")]
Digest = Annotated[str, Meta(min_length=64, max_length=64, pattern=r"^[0-9a-f]{64}\Z")]
ModelName = Annotated[str, Meta(min_length=1, max_length=128, pattern=_MODEL_NAME)]
"""Without `@`, which stands between a name and a digest when a client asks."""
Reason = Annotated[str, Meta(max_length=256, pattern=_PRINTABLE)]
Sequence = Annotated[int, Meta(ge=0, lt=2**62)]
Count = Annotated[int, Meta(ge=0, lt=2**40)]
UnixSeconds = Annotated[int, Meta(ge=0, lt=2**40)]
Rate = Annotated[float, Meta(ge=0.0, le=1e9)]
Envelope = Annotated[bytes, Meta(max_length=64 * 1024)]
Role = Literal["node", "gateway", "bootstrap", "issuer"]


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag=True, tag_field="t"):
    """Base of all messages; the tag tells them apart inside one stream."""


# --- records that travel by themselves, each inside an envelope of its author ---------------------


class Certificate(Message, frozen=True):
    """`subject` is a member of `mesh` with `roles`, says whoever signed the envelope."""

    mesh: MeshId
    subject: PeerIdText
    roles: Annotated[tuple[Role, ...], Meta(min_length=1, max_length=4)]
    not_before: UnixSeconds
    not_after: UnixSeconds


class Invitation(Message, frozen=True):
    """Whoever holds the private half of `key` may become a member, `uses_max` times.

    Only `issuer` honours it, so that uses are counted in one place.
    """

    mesh: MeshId
    issuer: PeerIdText
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    roles: Annotated[tuple[Role, ...], Meta(min_length=1, max_length=4)]
    uses_max: Annotated[int, Meta(ge=1, le=10_000)]
    not_after: UnixSeconds


class NodeRecord(Message, frozen=True):
    """Where a node is and what it is; refreshed well before `ttl_s` runs out."""

    mesh: MeshId
    sequence: Sequence
    issued_at: UnixSeconds
    ttl_s: Annotated[int, Meta(ge=1, le=3600)]
    addrs: Annotated[tuple[Address, ...], Meta(max_length=ADDRS_MAX)]
    roles: Annotated[tuple[Role, ...], Meta(min_length=1, max_length=4)]
    models: Annotated[tuple[Digest, ...], Meta(max_length=MODELS_MAX)]


class Offer(Struct, frozen=True, forbid_unknown_fields=True):
    """One model on one node, as measured by that node. Rates are tokens per second."""

    name: ModelName
    digest: Digest
    state: Literal["loading", "ready", "failed"]
    context_tokens: Count
    slots: Count
    slots_busy: Count
    queue_depth: Count
    kv_tokens_free: Count
    prefill_tokens_per_s: Rate
    decode_tokens_per_s: Rate
    sessions: Annotated[bytes, Meta(max_length=SESSIONS_MAX * SESSION_HASH_BYTES)] = b""


class Demand(Struct, frozen=True, forbid_unknown_fields=True):
    """Requests per second for one model name at one gateway (an EWMA)."""

    model: ModelName
    requests_per_s: Rate


class Advert(Message, frozen=True):
    """What a node has and wants right now. Its life is counted by the receiver's clock."""

    mesh: MeshId
    sequence: Sequence
    ttl_s: Annotated[int, Meta(ge=1, le=3600)]
    offers: Annotated[tuple[Offer, ...], Meta(max_length=MODELS_MAX)]
    demand: Annotated[tuple[Demand, ...], Meta(max_length=MODELS_MAX)]
    memory_bytes: Count
    cores: Count
    accelerator: Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)]


# --- the control stream between two connected peers ----------------------------------------------


class Hello(Message, frozen=True):
    """First frame both ways: by what right I am here; all that a stranger gets to read.

    `chain` is leaf certificate first; `unix_ms` shows a wrong clock, nothing is decided by it.
    """

    version: Annotated[int, Meta(ge=1, le=1_000)]
    mesh: MeshId
    chain: Annotated[tuple[Envelope, ...], Meta(max_length=CHAIN_MAX)]
    unix_ms: Annotated[int, Meta(ge=0, lt=2**53)]


class Welcome(Message, frozen=True):
    """Second frame both ways: your Hello was accepted; here is where I am and what I have."""

    record: Envelope
    advert: Envelope


class Refused(Message, frozen=True):
    """Instead of `Welcome`: why not. The stream ends after it."""

    reason: Reason


class GetPeers(Message, frozen=True):
    """Ask for node records of up to `count` other members."""

    count: Annotated[int, Meta(ge=1, le=PEERS_MAX)]


class Peers(Message, frozen=True):
    """Node records as their authors signed them; the sender can omit, not forge."""

    records: Annotated[tuple[Envelope, ...], Meta(max_length=PEERS_MAX)]


class Leaving(Message, frozen=True):
    """The sender is shutting down in good order."""


# --- joining a mesh with an invitation -----------------------------------------------------------


class JoinProof(Message, frozen=True):
    """Signed with the invitation's key: this peer, and no other, is to be admitted."""

    mesh: MeshId
    subject: PeerIdText


class JoinRequest(Message, frozen=True):
    """`invitation` is the issuer-side envelope from the token, `proof` a `JoinProof`'s."""

    invitation: Envelope
    proof: Envelope


class JoinGranted(Message, frozen=True):
    """The new member's certificate chain, leaf first."""

    chain: Annotated[tuple[Envelope, ...], Meta(min_length=1, max_length=CHAIN_MAX)]


class JoinDenied(Message, frozen=True):
    """Why the issuer refused; nothing about the mesh is told beside it."""

    reason: Reason


Control = Hello | Welcome | Refused | GetPeers | Peers | Leaving
Join = JoinRequest | JoinGranted | JoinDenied
Record = Certificate | Invitation | NodeRecord | Advert | JoinProof

M = TypeVar("M")


def is_model_name(text: str) -> bool:
    """Whether a message may hold `text` as a model's name; clients may ask for anything."""
    return len(text) <= 128 and re.search(_MODEL_NAME, text) is not None


def reason_of(error: Exception) -> str:
    """The error's text as a `Refused` or `JoinDenied` may hold it."""
    return "".join(char if " " <= char <= "~" else "?" for char in str(error))[:256]


def encode(message: Message) -> bytes:
    """Message to bytes. Raises `LocalProtocolError` if it is larger than peers would accept."""
    data = msgspec.msgpack.encode(message)
    if len(data) > MESSAGE_BYTES_MAX:
        raise LocalProtocolError(f"{type(message).__name__} of {len(data)} bytes is too large")
    return data


def decode(data: bytes, kind: type[M], bytes_max: int = MESSAGE_BYTES_MAX) -> M:
    """Bytes to a legal message of `kind` (a class or a union such as `Control`).

    Raises `RemoteProtocolError`, which quotes the broken field and never the bytes.
    """
    if len(data) > bytes_max:
        raise RemoteProtocolError(f"message of {len(data)} bytes (limit {bytes_max})")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed message: {error}") from error
