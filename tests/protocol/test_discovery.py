"""Whom to dial and when: back-off, limits, and what to believe about addresses."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from meshnode.identity import PeerId
from meshnode.messages import ADDRS_MAX, GetPeers
from meshnode.protocol import Connect, Send
from meshnode.protocol.discovery import (
    BACKOFF_MAX_S,
    CONNECTIONS_TARGET,
    CONTENDED_DIAL_DELAY_S,
    DIALS_MAX,
    FORGET_AFTER_FAILURES,
    Discovery,
    Source,
)

OWN = PeerId("m")
SMALLER, LARGER = PeerId("a"), PeerId("z")
ADDRS = ("/ip4/10.0.0.1/udp/1/quic-v1",)
OTHER_ADDRS = ("/ip4/10.0.0.2/udp/2/quic-v1",)


def discovery() -> Discovery:
    return Discovery(OWN, random.Random(1))


def dialled(core: Discovery, now: float) -> list[tuple[PeerId, tuple[str, ...]]]:
    return [(e.peer, e.addrs) for e in core.tick(now) if isinstance(e, Connect)]


def test_of_two_who_learn_of_each_other_the_larger_id_waits() -> None:
    core = discovery()
    core.learn(SMALLER, ADDRS, 0.0)
    core.learn(LARGER, ADDRS, 0.0)
    assert dialled(core, 0.0) == [(LARGER, ADDRS)], "who is larger than we waits for us"
    assert core.deadline() == CONTENDED_DIAL_DELAY_S
    assert dialled(core, CONTENDED_DIAL_DELAY_S) == [(SMALLER, ADDRS)]


def test_a_bootstrap_peer_is_dialled_at_once_because_it_does_not_know_us() -> None:
    core = discovery()
    core.learn(SMALLER, ADDRS, 0.0, Source.OPERATOR)
    assert dialled(core, 0.0) == [(SMALLER, ADDRS)]


def test_we_do_not_dial_ourselves_nor_somebody_without_an_address() -> None:
    core = discovery()
    core.learn(OWN, ADDRS, 0.0)
    core.learn(LARGER, (), 0.0)
    assert dialled(core, 10.0) == []
    assert core.deadline() is None


def test_failures_back_off_and_an_ordinary_peer_is_forgotten_at_last() -> None:
    core = discovery()
    core.learn(LARGER, ADDRS, 0.0)
    now, waits = 0.0, []
    while dialled(core, now):
        core.dial_failed(LARGER, now)
        deadline = core.deadline()
        if deadline is None:
            break
        waits.append(deadline - now)
        now = deadline
    assert len(waits) == FORGET_AFTER_FAILURES
    assert waits[0] <= 1.25
    assert all(later > 1.2 * sooner for sooner, later in pairwise(waits[:5]))
    assert max(waits) <= 1.25 * BACKOFF_MAX_S


def test_a_bootstrap_peer_is_never_forgotten() -> None:
    core = discovery()
    core.learn(LARGER, ADDRS, 0.0, Source.OPERATOR)
    now = 0.0
    for _ in range(5 * FORGET_AFTER_FAILURES):
        assert dialled(core, now) == [(LARGER, ADDRS)]
        core.dial_failed(LARGER, now)
        now = core.deadline() or 0.0


def test_a_new_address_is_tried_at_once() -> None:
    core = discovery()
    core.learn(LARGER, ADDRS, 0.0, Source.RECORD)
    for now in (0.0, 2.0, 6.0):
        assert dialled(core, now)
        core.dial_failed(LARGER, now)
    core.learn(LARGER, OTHER_ADDRS, 6.1, Source.RECORD)
    assert dialled(core, 6.1) == [(LARGER, OTHER_ADDRS)]


def test_all_addresses_that_the_operator_gives_of_a_peer_are_kept() -> None:
    """They come one by one, from flags and tokens."""
    core = discovery()
    core.learn(LARGER, ADDRS, 0.0, Source.OPERATOR)
    core.learn(LARGER, OTHER_ADDRS, 0.0, Source.OPERATOR)
    assert dialled(core, 0.0) == [(LARGER, (*ADDRS, *OTHER_ADDRS))]


@pytest.mark.parametrize("source", [Source.RECORD, Source.HINT])
def test_what_others_say_does_not_replace_what_the_operator_said(source: Source) -> None:
    """A bootstrap peer behind a NAT tells its inner address."""
    core = discovery()
    core.learn(LARGER, ADDRS, 0.0, Source.OPERATOR)
    core.learn(LARGER, OTHER_ADDRS, 0.0, source)
    assert dialled(core, 0.0) == [(LARGER, (*ADDRS, *OTHER_ADDRS))]


def test_an_unsigned_hint_cannot_hide_a_signed_address() -> None:
    core = discovery()
    core.learn(LARGER, ADDRS, 0.0, Source.RECORD)
    flood = tuple(f"/ip4/192.0.2.{place}/udp/1/quic-v1" for place in range(100))
    core.learn(LARGER, flood, 0.0, Source.HINT)
    ((_, addrs),) = dialled(core, 0.0)
    assert addrs[0] == ADDRS[0]
    assert len(addrs) == ADDRS_MAX


def test_only_so_many_dials_at_once_and_no_more_connections_than_wanted() -> None:
    core = discovery()
    peers = [PeerId(f"z{place:03}") for place in range(2 * CONNECTIONS_TARGET)]
    for peer in peers:
        core.learn(peer, ADDRS, 0.0)
    total = 0
    while batch := dialled(core, 0.0):
        assert len(batch) <= DIALS_MAX
        total += len(batch)
        for peer, _ in batch:
            core.connected(peer)
            core.joined(peer, 0.0)
    assert total == CONNECTIONS_TARGET
    core.disconnected(peers[0], 0.0)
    assert len(dialled(core, 0.0)) == 1, "another takes the place"


def test_members_are_asked_for_others_often_while_young() -> None:
    core = discovery()
    core.learn(LARGER, ADDRS, 0.0)
    core.connected(LARGER)
    core.joined(LARGER, 0.0)
    asked = []
    now: float | None = 0.0
    while now is not None and now < 600.0:
        asked += [now for e in core.tick(now) if isinstance(e, Send) and e.peer == LARGER
                  and isinstance(e.message, GetPeers)]  # fmt: skip
        now = core.deadline()
    assert asked[0] == 0.0
    assert sum(at < 30.0 for at in asked) >= 5
    assert 18 <= len(asked) <= 32


def test_who_left_in_good_order_is_not_called() -> None:
    core = discovery()
    core.learn(LARGER, ADDRS, 0.0)
    dialled(core, 0.0)
    core.connected(LARGER)
    core.joined(LARGER, 0.0)
    core.left(LARGER)
    core.disconnected(LARGER, 1.0)
    assert dialled(core, 1000.0) == []
    assert core.addresses() == {}


def test_a_lost_member_is_called_again() -> None:
    core = discovery()
    core.learn(LARGER, ADDRS, 0.0)
    dialled(core, 0.0)
    core.connected(LARGER)
    core.joined(LARGER, 0.0)
    assert core.addresses() == {LARGER: ADDRS}
    core.disconnected(LARGER, 100.0)
    assert dialled(core, 102.0) == [(LARGER, ADDRS)]
