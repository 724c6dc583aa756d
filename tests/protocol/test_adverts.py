"""When a node speaks, what it believes of others, and how demand fades."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.identity import KeyPair, open_envelope, seal
from meshnode.messages import (
    ADVERT_BYTES_MAX,
    MODELS_MAX,
    SESSION_HASH_BYTES,
    SESSIONS_MAX,
    Advert,
    decode,
    encode,
)
from meshnode.protocol.adverts import (
    ADVERT_TTL_S,
    CHANGE_MIN_INTERVAL_S,
    DEMAND_HALF_LIFE_S,
    PERIOD_S,
    AdvertBook,
    Node,
    Verdict,
)
from tests.protocol.cluster import MESH, an_offer, key_of

DOMAIN, KIND = "test", b"/advert"
ADA, BOB = key_of("ada"), key_of("bob")


def book(owner: KeyPair = ADA, seed: int = 1) -> AdvertBook:
    return AdvertBook(
        MESH.mesh_id,
        owner.peer_id,
        Node(memory_bytes=2**33, cores=2, accelerator="cpu"),
        lambda data: open_envelope(data, DOMAIN, KIND),
        random.Random(seed),
        first_sequence=100,
    )


def advert(key: KeyPair = BOB, sequence: int = 1, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "mesh": MESH.mesh_id,
        "sequence": sequence,
        "ttl_s": ADVERT_TTL_S,
        "offers": (an_offer(),),
        "demand": (),
        "memory_bytes": 0,
        "cores": 1,
        "accelerator": "cpu",
    }
    content = Advert(**{**fields, **changes})  # type: ignore[arg-type]
    return seal(key, DOMAIN, KIND, encode(content))


# --- others --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (advert()[:-1] + bytes([advert()[-1] ^ 1]), "forged"),
        (seal(BOB, DOMAIN, KIND, b"\xc1"), "malformed"),
        (advert(mesh="0" * 32), "foreign mesh"),
        (bytes(ADVERT_BYTES_MAX + 1), "too large"),
    ],
)
def test_a_bad_advert_is_refused_and_counted(envelope: bytes, reason: str) -> None:
    held = book()
    assert held.receive(envelope, 0.0) is Verdict.REFUSED
    assert dict(held.refused) == {reason: 1}
    assert held.view() == {}


def test_the_newest_counts_and_the_old_is_neither_believed_nor_a_relays_fault() -> None:
    held = book()
    verdicts = [held.receive(advert(sequence=n), 0.0) for n in (2, 2, 1, 3)]
    assert verdicts == [Verdict.NEWS, Verdict.OLD, Verdict.OLD, Verdict.NEWS]
    assert held.view()[BOB.peer_id].sequence == 3
    assert held.refused["rolled back"] == 1


def test_our_own_advert_coming_back_is_not_a_peer() -> None:
    held = book(BOB)
    assert held.receive(advert(BOB), 0.0) is Verdict.OLD
    assert held.view() == {}


def test_the_receiver_counts_the_life() -> None:
    held = book()
    held.receive(advert(ttl_s=30), 1000.0)
    assert held.deadline() == 1030.0
    held.tick(1029.9)
    assert BOB.peer_id in held.view()
    held.tick(1030.0)
    assert held.view() == {}


def test_a_relay_cannot_refresh_an_advert() -> None:
    held = book()
    held.receive(advert(ttl_s=30), 0.0)
    assert held.receive(advert(ttl_s=30), 29.0) is Verdict.OLD
    held.tick(30.0)
    assert held.view() == {}
    assert held.receive(advert(ttl_s=30), 31.0) is Verdict.OLD
    assert held.view() == {}


def test_a_lost_peer_is_not_resurrected_by_what_others_relay() -> None:
    held = book()
    held.receive(advert(sequence=1), 0.0)
    held.lose(BOB.peer_id)
    assert held.view() == {}
    assert held.receive(advert(sequence=2), 1.0) is Verdict.OLD, "others may still reach it"
    assert held.view() == {}
    held.connected(BOB.peer_id)
    assert held.receive(advert(sequence=3), 2.0) is Verdict.NEWS


# --- ourselves -----------------------------------------------------------------------------------


def spoken(held: AdvertBook, until_s: float) -> list[float]:
    """When it speaks by itself up to then."""
    times = []
    while (at := held.deadline()) is not None and at <= until_s:
        if held.tick(at) is not None:
            times.append(at)
    return times


def test_the_first_offer_is_said_at_once_and_then_every_minute_or_so() -> None:
    held = book()
    held.offer((an_offer(),), 0.0)
    times = spoken(held, 3600.0)
    assert times[0] == 0.0
    gaps = [after - before for before, after in pairwise(times)]
    assert all(0.75 * PERIOD_S <= gap <= 1.25 * PERIOD_S for gap in gaps)
    assert len(set(gaps)) > 10, "jitter, or a thousand nodes would speak at once"
    assert 48 <= len(gaps) <= 80


@pytest.mark.parametrize(
    ("change", "is_news"),
    [
        ({}, False),
        ({"state": "loading"}, True),
        ({"name": "other"}, True),
        ({"digest": "cd" * 32}, True),
        ({"slots": 5}, True),
        ({"context_tokens": 4096}, True),
        ({"slots_busy": 1}, True),  # of 4 slots: 25 %
        ({"queue_depth": 1}, True),
        ({"kv_tokens_free": 8192 - 409}, False),  # 20 % of the context
        ({"kv_tokens_free": 8192 - 411}, True),
        ({"decode_tokens_per_s": 47.9}, False),
        ({"decode_tokens_per_s": 48.1}, True),
        ({"prefill_tokens_per_s": 319.0}, True),
        ({"prefill_tokens_per_s": 321.0}, False),
    ],
)
def test_only_a_change_of_more_than_a_fifth_is_said_at_once(
    change: dict[str, object], is_news: bool
) -> None:
    held = book()
    held.offer((an_offer(),), 0.0)
    assert held.tick(0.0) is not None
    held.offer((an_offer(**change),), 10.0)  # type: ignore[arg-type]
    assert (held.tick(10.0) is not None) == is_news


def test_a_lively_node_speaks_at_most_once_a_second_and_last_says_the_last() -> None:
    held = book()
    said = []
    for step in range(500):
        now = step / 100
        held.offer((an_offer(slots_busy=step % 5),), now)
        if (told := held.tick(now)) is not None:
            said.append((now, told))
    gaps = [b[0] - a[0] for a, b in pairwise(said)]
    assert len(said) == 5
    assert min(gaps) >= CHANGE_MIN_INTERVAL_S
    final = held.tick(held.deadline() or 0.0)
    assert final is not None
    assert final.offers[0].slots_busy == 499 % 5


def test_small_changes_add_up() -> None:
    held = book()
    held.offer((an_offer(decode_tokens_per_s=40.0),), 0.0)
    held.tick(0.0)
    spoke = []
    for step in range(1, 6):
        held.offer((an_offer(decode_tokens_per_s=40.0 + 2 * step),), 2.0 * step)
        spoke.append(held.tick(2.0 * step) is not None)
    assert spoke == [False, False, False, False, True]


def test_every_advert_has_a_number_of_its_own() -> None:
    held = book()
    held.offer((an_offer(),), 0.0)
    told = [held.fresh(0.0), held.tick(0.0), held.fresh(1.0), held.fresh(1.0)]
    assert [each.sequence for each in told if each is not None] == [101, 102, 103, 104]


def test_our_fullest_advert_is_legal_and_keeps_the_newest_sessions() -> None:
    sessions = b"".join(place.to_bytes(SESSION_HASH_BYTES, "big") for place in range(SESSIONS_MAX))
    offers = tuple(
        an_offer("n" * 125 + f"{place:03}", f"{place:064x}", sessions=sessions)
        for place in range(MODELS_MAX + 5)
    )
    held = book()
    held.offer(offers, 0.0)
    for place in range(MODELS_MAX):
        held.count_demand("d" * 125 + f"{place:03}", 0.0)
    envelope = seal(ADA, DOMAIN, KIND, encode(held.fresh(0.0)))
    assert len(envelope) < 0.6 * ADVERT_BYTES_MAX
    reader = book(BOB)
    assert reader.receive(envelope, 0.0) is Verdict.NEWS
    read = reader.view()[ADA.peer_id]
    assert len(read.offers) == MODELS_MAX
    assert all(sessions.endswith(offer.sessions) and offer.sessions for offer in read.offers)

    held.offer(offers[:2], 1.0)
    assert all(offer.sessions == sessions for offer in held.fresh(1.0).offers)


# --- demand --------------------------------------------------------------------------------------


def rate(held: AdvertBook, model: str, now: float) -> float:
    return {each.model: each.requests_per_s for each in held.demand(now)}.get(model, 0.0)


def test_demand_halves_in_its_half_life() -> None:
    held = book()
    held.count_demand("smol", 0.0)
    at_first = rate(held, "smol", 0.0)
    assert at_first == pytest.approx(math.log(2) / DEMAND_HALF_LIFE_S)
    assert rate(held, "smol", DEMAND_HALF_LIFE_S) == pytest.approx(at_first / 2)
    assert held.demand(20 * DEMAND_HALF_LIFE_S) == (), "and is not told when it is gone"


def test_a_steady_stream_of_requests_shows_as_its_rate() -> None:
    held = book()
    for step in range(2000):
        held.count_demand("smol", step / 2)
    assert rate(held, "smol", 1000.0) == pytest.approx(2.0, rel=0.01)


def test_demand_of_two_gateways_adds_up_to_that_of_one_with_all_requests() -> None:
    both, one, other = book(), book(), book()
    for step in range(200):
        both.count_demand("smol", step)
        (one if step % 3 else other).count_demand("smol", step)
    total = rate(one, "smol", 200.0) + rate(other, "smol", 200.0)
    assert total == pytest.approx(rate(both, "smol", 200.0))


def test_only_so_many_models_are_counted_and_the_weakest_goes() -> None:
    held = book()
    for place in range(MODELS_MAX):
        for _ in range(1 if place == 3 else 2):
            held.count_demand(f"model-{place}", 0.0)
    held.count_demand("one-more", 1.0)
    told = {each.model for each in held.demand(1.0)}
    assert len(told) == MODELS_MAX
    assert "one-more" in told
    assert "model-3" not in told


def test_a_name_with_a_digest_is_demand_for_the_name() -> None:
    held = book()
    held.count_demand("smol@abcd", 0.0)
    assert [each.model for each in held.demand(0.0)] == ["smol"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_whatever_clients_ask_for_our_advert_stays_legal(model: str) -> None:
    held = book()
    held.count_demand(model, 0.0)
    decode(encode(held.fresh(0.0)), Advert)
