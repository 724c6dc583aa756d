"""Keys, peer ids and envelopes: equal to py-libp2p's own, and deaf to every forgery."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.envelope import consume_envelope, unmarshal_envelope
from libp2p.peer.envelope import seal_record as libp2p_seal
from libp2p.peer.id import ID
from libp2p.peer.peer_record import PeerRecord

from meshnode.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from meshnode.identity import (
    ENVELOPE_BYTES_MAX,
    KeyPair,
    load_or_create_key,
    open_envelope,
    peer_id_of,
    public_key_of,
    seal,
)

SEED = b"s" * 32
KEY = KeyPair.from_seed(SEED)
DOMAIN, KIND = "test-domain", b"/test-type"
PEER_RECORD_DOMAIN, PEER_RECORD_KIND = "libp2p-peer-record", b"\x03\x01"


# --- keys and peer ids ---------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=20, deadline=None)
def test_peer_ids_are_libp2ps(seed: bytes) -> None:
    key = KeyPair.from_seed(seed)
    theirs = create_new_key_pair(seed)
    assert key.peer_id == str(ID.from_pubkey(theirs.public_key))
    assert key.public == theirs.public_key.to_bytes()
    assert public_key_of(key.peer_id) == key.public
    assert peer_id_of(key.public) == key.peer_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3KooW",
        "not base58: 0OIl",
        "ü" * 52,
        KEY.peer_id[:-1],
        KEY.peer_id + "1",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # a hash, of an RSA key
    ],
)
def test_what_is_no_ed25519_peer_id_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        public_key_of(text)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_of_a_wrong_size_are_our_own_fault(size: int) -> None:
    with pytest.raises(LocalProtocolError):
        KeyPair.from_seed(bytes(size))
    with pytest.raises(LocalProtocolError):
        peer_id_of(bytes(size))


def test_no_text_form_of_a_key_shows_its_secret() -> None:
    for text in (repr(KEY), str(KEY), f"{KEY}"):
        assert text == f"KeyPair({KEY.peer_id})"


def test_a_key_is_made_once_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    key = load_or_create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == key.seed
    assert load_or_create_key(path).peer_id == key.peer_id


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_not_used(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "node.key"
    load_or_create_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_or_create_key(path)


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_key_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="damaged"):
        load_or_create_key(path)
    assert path.read_bytes() == content


# --- envelopes -----------------------------------------------------------------------------------


def test_our_envelopes_are_byte_for_byte_libp2ps() -> None:
    """Ed25519 signatures are deterministic, so equal means equal in every rule."""
    theirs = create_new_key_pair(SEED)
    record = PeerRecord(ID.from_pubkey(theirs.public_key), [], 7)
    envelope = libp2p_seal(record, theirs.private_key)
    mine = seal(KEY, PEER_RECORD_DOMAIN, PEER_RECORD_KIND, record.marshal_record())
    assert mine == envelope.marshal_envelope()


def test_libp2p_opens_ours_and_we_open_libp2ps() -> None:
    theirs = create_new_key_pair(SEED)
    record = PeerRecord(ID.from_pubkey(theirs.public_key), [], 7)
    mine = seal(KEY, PEER_RECORD_DOMAIN, PEER_RECORD_KIND, record.marshal_record())
    _, read = consume_envelope(mine, PEER_RECORD_DOMAIN)
    assert read.seq == 7

    packed = libp2p_seal(record, theirs.private_key).marshal_envelope()
    signed = open_envelope(packed, PEER_RECORD_DOMAIN, PEER_RECORD_KIND)
    assert signed.signer == KEY.peer_id
    assert signed.payload == record.marshal_record()


@given(st.binary(max_size=300))
@settings(max_examples=50, deadline=None)
def test_what_was_sealed_is_what_is_opened(payload: bytes) -> None:
    envelope = seal(KEY, DOMAIN, KIND, payload)
    assert open_envelope(envelope, DOMAIN, KIND).payload == payload
    assert unmarshal_envelope(envelope).raw_payload == payload


def test_an_envelope_opens_only_for_its_domain_and_type() -> None:
    envelope = seal(KEY, DOMAIN, KIND, b"payload")
    with pytest.raises(RemoteProtocolError, match="signature"):
        open_envelope(envelope, "another domain", KIND)
    with pytest.raises(RemoteProtocolError, match="holds"):
        open_envelope(envelope, DOMAIN, b"/another-type")


def test_the_border_between_domain_and_type_cannot_be_moved() -> None:
    """Each part is signed with its length, so no two readings share a signature."""
    envelope = seal(KEY, "ab", b"c", b"payload")
    moved = envelope.replace(b"\x12\x01c", b"\x12\x02bc")
    with pytest.raises(RemoteProtocolError, match="signature"):
        open_envelope(moved, "a", b"bc")


def test_every_single_changed_byte_is_noticed() -> None:
    envelope = seal(KEY, DOMAIN, KIND, b"payload")
    for place in range(len(envelope)):
        for flip in (0x01, 0x80):
            forged = bytearray(envelope)
            forged[place] ^= flip
            with pytest.raises(RemoteProtocolError):
                open_envelope(bytes(forged), DOMAIN, KIND)


@pytest.mark.parametrize("cut", [-1, 1, 0])
def test_envelopes_end_where_they_end(cut: int) -> None:
    envelope = seal(KEY, DOMAIN, KIND, b"payload")
    wrong = {-1: envelope[:-1], 1: envelope + b"\0", 0: envelope + envelope}[cut]
    with pytest.raises(RemoteProtocolError):
        open_envelope(wrong, DOMAIN, KIND)


def test_an_envelope_is_bounded() -> None:
    with pytest.raises(RemoteProtocolError, match="limit"):
        open_envelope(bytes(ENVELOPE_BYTES_MAX + 1), DOMAIN, KIND)


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_envelope(data, DOMAIN, KIND)


@given(
    st.lists(
        st.tuples(st.sampled_from([0x0A, 0x12, 0x1A, 0x2A, 0x22]), st.binary(max_size=80)),
        max_size=6,
    )
)
@settings(max_examples=300, deadline=None)
def test_no_fields_do_more_than_be_refused(fields: list[tuple[int, bytes]]) -> None:
    data = b"".join(bytes([tag, len(value)]) + value for tag, value in fields)
    with pytest.raises(RemoteProtocolError):
        open_envelope(data, DOMAIN, KIND)
