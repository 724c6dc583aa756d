"""The record book: only the newest, only the valid, each refusal counted by its reason."""

from __future__ import annotations

import pytest

from meshnode.identity import KeyPair, open_envelope, seal
from meshnode.messages import ADDRS_MAX, MODELS_MAX, NodeRecord, encode
from meshnode.protocol import records
from meshnode.protocol.records import CLOCK_SKEW_S, RECORD_BYTES_MAX, RecordBook
from tests.protocol.cluster import EPOCH_S, MESH, key_of

DOMAIN, KIND = "test", b"/record"
TTL_S = 1800
ADA, BOB = key_of("ada"), key_of("bob")


def book() -> RecordBook:
    return RecordBook(MESH.mesh_id, lambda data: open_envelope(data, DOMAIN, KIND))


def record(key: KeyPair = ADA, sequence: int = 1, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "mesh": MESH.mesh_id,
        "sequence": sequence,
        "issued_at": EPOCH_S,
        "ttl_s": TTL_S,
        "addrs": ("/ip4/10.0.0.1/udp/1/quic-v1",),
        "roles": ("node",),
        "models": (),
    }
    content = NodeRecord(**{**fields, **changes})  # type: ignore[arg-type]
    return seal(key, DOMAIN, KIND, encode(content))


def test_the_newest_record_of_each_peer_is_kept() -> None:
    kept = book()
    for key, sequence in ((ADA, 1), (BOB, 7), (ADA, 2)):
        assert kept.receive(record(key, sequence), 0.0, EPOCH_S) is not None
    assert {known.peer: known.record.sequence for known in kept} == {ADA.peer_id: 2, BOB.peer_id: 7}
    assert not kept.refused


def test_the_same_record_again_is_no_news_and_no_fault() -> None:
    kept = book()
    kept.receive(record(), 0.0, EPOCH_S)
    assert kept.receive(record(), 1.0, EPOCH_S + 1) is None
    assert not kept.refused


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (b"", "forged"),
        (b"noise", "forged"),
        (record()[:-1], "forged"),
        (record()[:-1] + bytes([record()[-1] ^ 1]), "forged"),
        (seal(ADA, "another domain", KIND, b""), "forged"),
        (seal(ADA, DOMAIN, b"/another-type", b""), "forged"),
        (seal(ADA, DOMAIN, KIND, b"\xc1"), "malformed"),
        (record(mesh="0" * 32), "foreign mesh"),
        (record(issued_at=EPOCH_S - TTL_S - CLOCK_SKEW_S), "expired"),
        (seal(ADA, DOMAIN, KIND, bytes(RECORD_BYTES_MAX)), "too large"),
    ],
)
def test_a_bad_record_is_refused_and_counted(envelope: bytes, reason: str) -> None:
    kept = book()
    assert kept.receive(envelope, 0.0, EPOCH_S) is None
    assert dict(kept.refused) == {reason: 1}
    assert len(kept) == 0


def test_an_older_record_is_refused_even_after_the_newer_has_expired() -> None:
    kept = book()
    kept.receive(record(sequence=5), 0.0, EPOCH_S)
    assert kept.receive(record(sequence=4), 1.0, EPOCH_S) is None
    assert kept.tick(TTL_S + 1.0) == [ADA.peer_id]
    assert kept.receive(record(sequence=4), TTL_S + 2.0, EPOCH_S) is None
    assert kept.refused["rolled back"] == 2


def test_an_expired_record_does_not_come_back_from_somebodys_cache() -> None:
    kept = book()
    kept.receive(record(), 0.0, EPOCH_S)
    kept.tick(TTL_S + 1.0)
    still_valid_by_its_own_clock = EPOCH_S + TTL_S + 1.0
    assert kept.receive(record(), TTL_S + 1.0, still_valid_by_its_own_clock) is None
    assert len(kept) == 0
    assert kept.receive(record(sequence=2), TTL_S + 1.0, EPOCH_S) is not None


@pytest.mark.parametrize("skew_s", [-600, 0, 600])
def test_the_receiver_counts_the_life_whatever_the_authors_clock_says(skew_s: int) -> None:
    kept = book()
    assert kept.receive(record(issued_at=EPOCH_S + skew_s), 100.0, EPOCH_S) is not None
    assert kept.deadline() == 100.0 + TTL_S
    assert kept.tick(99.0 + TTL_S) == []
    assert kept.tick(100.0 + TTL_S) == [ADA.peer_id]
    assert kept.deadline() is None


def test_checking_keeps_nothing() -> None:
    kept = book()
    assert kept.check(record(), 0.0, EPOCH_S) is not None
    assert len(kept) == 0


def test_a_full_book_lets_go_of_what_would_go_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORDS_MAX", 2)
    kept = book()
    kept.receive(record(ADA), 0.0, EPOCH_S)
    kept.receive(record(BOB), 1.0, EPOCH_S)
    kept.receive(record(key_of("cleo")), 2.0, EPOCH_S)
    assert kept.get(ADA.peer_id) is None
    assert len(kept) == 2
    assert kept.receive(record(ADA), 3.0, EPOCH_S) is not None, "it was not its fault"


def test_the_longest_legal_record_fits() -> None:
    longest = record(
        addrs=tuple("/" + "a" * 254 + f"{place:x}" for place in range(ADDRS_MAX)),
        models=tuple(f"{place:064x}" for place in range(MODELS_MAX)),
        roles=("node", "gateway", "bootstrap", "issuer"),
        sequence=2**62 - 1,
    )
    assert book().receive(longest, 0.0, EPOCH_S) is not None
