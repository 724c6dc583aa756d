"""Which replica answers: the hash order's properties, the costs, names, a gateway's memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.errors import NoReplicaError, UnknownModelError
from meshnode.messages import Approximate, Offer
from meshnode.protocol.dispatch import (
    COOLDOWN_S,
    SESSIONS_REMEMBERED,
    Assigned,
    Dispatcher,
    Replica,
    Resolved,
    hash_order,
    holds,
    rank,
    resolve,
    session_hash,
)
from tests.protocol.cluster import an_offer

RTT_S = 0.001
SESSIONS = [f"session-{number}".encode() for number in range(3000)]


def replica(peer: str, *, slots: int = 4, **changes: object) -> Replica:
    offer_fields = {k: changes.pop(k) for k in ("slots_busy", "queue_depth") if k in changes}
    fields: dict[str, object] = {"local": False, "rtt_s": RTT_S, **changes}
    return Replica(peer, an_offer(slots=slots, **offer_fields), **fields)  # type: ignore[arg-type]


def replicas(count: int) -> tuple[Replica, ...]:
    return tuple(replica(f"peer-{number}") for number in range(count))


def first(session: bytes, among: tuple[Replica, ...]) -> str:
    return hash_order(session, among)[0].peer


# --- rendezvous hashing --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5, 9])
def test_a_replica_that_goes_moves_only_its_own_sessions(count: int) -> None:
    before = replicas(count)
    after = before[:-1]
    for session in SESSIONS:
        owner = first(session, before)
        if owner != before[-1].peer:
            assert first(session, after) == owner


@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_replica_that_comes_takes_its_share_and_nothing_else_moves(count: int) -> None:
    before, after = replicas(count), replicas(count + 1)
    moved = 0
    for session in SESSIONS:
        owner = first(session, after)
        if owner != first(session, before):
            assert owner == after[-1].peer
            moved += 1
    share = 1 / (count + 1)
    tolerance = 4 * math.sqrt(share * (1 - share) / len(SESSIONS))
    assert moved / len(SESSIONS) == pytest.approx(share, abs=tolerance)


def test_twice_the_slots_get_twice_the_sessions() -> None:
    wide = (replica("narrow", slots=2), replica("wide", slots=4))
    share = sum(first(session, wide) == "wide" for session in SESSIONS) / len(SESSIONS)
    assert share == pytest.approx(2 / 3, abs=0.04)


@given(st.permutations(range(6)), st.binary(max_size=40))
def test_the_order_does_not_depend_on_the_order_of_arrival(order: list[int], key: bytes) -> None:
    some = replicas(6)
    assert hash_order(key, tuple(some[n] for n in order)) == hash_order(key, some)


# --- costs ---------------------------------------------------------------------------------------


def test_a_fresh_session_goes_to_the_top_of_the_hash_on_every_gateway() -> None:
    """Each gateway sees itself as local and near, and still they agree."""
    peers = [f"peer-{number}" for number in range(5)]
    for session in SESSIONS[:200]:
        choices = set()
        for gateway in peers:
            seen = tuple(
                replica(peer, local=peer == gateway, rtt_s=0.0 if peer == gateway else RTT_S)
                for peer in peers
            )
            choices.add(rank(session, 200, seen)[0].peer)
        assert len(choices) == 1


def by_place(session: bytes, count: int = 6) -> list[str]:
    return [each.peer for each in hash_order(session, replicas(count))]


def ranked(session: bytes, changes: dict[str, dict[str, object]]) -> list[tuple[str, str]]:
    some = tuple(replica(peer, **changes.get(peer, {})) for peer in sorted(by_place(session)))
    return [(each.peer, each.reason) for each in rank(session, 400, some)]


def test_without_load_the_order_is_the_hashs() -> None:
    order = by_place(b"chat")
    assert [peer for peer, _ in ranked(b"chat", {})] == order
    assert [reason for _, reason in ranked(b"chat", {})] == [
        "first by hash", "less loaded", "less loaded", "less loaded", "spare", "spare",
    ]  # fmt: skip


def test_the_holder_keeps_its_session_wherever_it_stands() -> None:
    holder = by_place(b"chat")[5]
    busy: dict[str, object] = {"holds_session": True, "slots_busy": 3}
    assert ranked(b"chat", {holder: busy})[0] == (holder, "holds the session")


def test_an_overloaded_holder_loses_it() -> None:
    top, holder = by_place(b"chat")[0], by_place(b"chat")[2]
    overloaded: dict[str, object] = {"holds_session": True, "slots_busy": 4, "queue_depth": 8}
    assert ranked(b"chat", {holder: overloaded})[0] == (top, "first by hash")


def test_a_holder_that_is_as_busy_as_everybody_keeps_it() -> None:
    order = by_place(b"chat")
    everybody: dict[str, dict[str, object]] = {
        peer: {"slots_busy": 4, "queue_depth": 8} for peer in order
    }
    everybody[order[3]]["holds_session"] = True
    assert ranked(b"chat", everybody)[0][0] == order[3]


def test_a_full_top_of_the_hash_is_passed_over() -> None:
    order = by_place(b"chat")
    full: dict[str, object] = {"slots_busy": 4, "queue_depth": 4}
    assert ranked(b"chat", {order[0]: full})[0] == (order[1], "less loaded")


def test_what_is_on_its_way_counts_as_load() -> None:
    order = by_place(b"chat")
    assert ranked(b"chat", {order[0]: {"in_flight": 8}})[0][0] == order[1]


def test_who_failed_just_now_comes_last_even_if_it_holds_the_session() -> None:
    holder = by_place(b"chat")[0]
    cooling: dict[str, object] = {"holds_session": True, "cooling": True}
    last = ranked(b"chat", {holder: cooling})[-1]
    assert last == (holder, "holds the session, failed just now")


def test_nobody_is_left_out() -> None:
    order = by_place(b"chat")
    everybody = ranked(b"chat", {order[1]: {"cooling": True}, order[4]: {"queue_depth": 50}})
    assert sorted(peer for peer, _ in everybody) == sorted(order)


# --- what the group decided ----------------------------------------------------------------------


def test_who_serves_comes_first_then_who_loads_then_standbys_then_who_drains() -> None:
    order = by_place(b"chat")
    assigned = dict(zip(order, ["draining", "none", "loading", "serving", "none", "serving"],
                        strict=True))  # fmt: skip
    changes = {peer: {"assigned": state} for peer, state in assigned.items()}
    assert ranked(b"chat", changes) == [
        (order[3], "first by hash"),
        (order[5], "less loaded"),
        (order[2], "first by hash, not serving yet"),
        (order[1], "first by hash, not assigned"),
        (order[4], "less loaded, not assigned"),
        (order[0], "first by hash, draining"),
    ]


@pytest.mark.parametrize("state", ["loading", "none", "draining"])
def test_the_holder_of_a_session_loses_it_with_its_assignment(state: str) -> None:
    order = by_place(b"chat")
    changes: dict[str, dict[str, object]] = {peer: {"assigned": "serving"} for peer in order}
    changes[order[0]] = {"assigned": state, "holds_session": True}
    result = ranked(b"chat", changes)
    assert result[0] == (order[1], "first by hash")
    assert result[-1][0] == order[0]


@pytest.mark.parametrize("state", ["loading", "none", "draining"])
def test_if_nobody_else_is_ready_the_holder_keeps_its_session(state: str) -> None:
    order = by_place(b"chat")
    changes: dict[str, dict[str, object]] = {peer: {"assigned": state} for peer in order}
    changes[order[4]]["holds_session"] = True
    result = ranked(b"chat", changes)
    assert result[0][0] == order[4]
    assert result[0][1].startswith("holds the session, ")
    assert len(result) == len(order)


def test_a_load_off_the_assignment_does_not_move_requests_within_it() -> None:
    """Costs are compared among those that serve only: so all gateways agree."""
    order = by_place(b"chat")
    changes: dict[str, dict[str, object]] = {peer: {"assigned": "serving"} for peer in order[:3]}
    changes[order[3]] = {"assigned": "none", "slots_busy": 4, "queue_depth": 60}
    changes[order[4]] = {"assigned": "none", "holds_session": True}
    changes[order[5]] = {"assigned": "draining", "slots_busy": 4, "queue_depth": 60}
    assert [peer for peer, _ in ranked(b"chat", changes)][:3] == order[:3]


def test_a_standby_that_is_loaded_takes_over_from_an_owner_that_just_failed() -> None:
    order = by_place(b"chat")
    changes: dict[str, dict[str, object]] = {peer: {"assigned": "draining"} for peer in order}
    changes[order[0]] = {"assigned": "serving", "cooling": True}
    changes[order[5]] = {"assigned": "none"}
    result = ranked(b"chat", changes)
    assert result[:2] == [
        (order[5], "first by hash, not assigned"),
        (order[0], "first by hash, failed just now"),
    ]


def test_all_gateways_agree_on_who_serves_although_each_sees_itself() -> None:
    peers = [f"peer-{number}" for number in range(5)]
    states = ["serving", "none", "serving", "draining", "serving"]
    for session in SESSIONS[:100]:
        choices = set()
        for gateway in peers:
            seen = tuple(
                replica(
                    peer,
                    local=peer == gateway,
                    rtt_s=0.0 if peer == gateway else RTT_S,
                    assigned=state,
                )
                for peer, state in zip(peers, states, strict=True)
            )
            ranking = [each.peer for each in rank(session, 200, seen)]
            assert set(ranking[:3]) == {"peer-0", "peer-2", "peer-4"}
            assert ranking[3:] == ["peer-1", "peer-3"]
            choices.add(ranking[0])
        assert len(choices) == 1


def test_a_change_of_assignment_moves_only_the_sessions_it_must() -> None:
    peers = [f"peer-{number}" for number in range(5)]
    for session in SESSIONS[:300]:
        before = tuple(replica(peer, assigned="serving") for peer in peers)
        after = (*before[:-1], replica(peers[-1], assigned="draining"))
        owner = rank(session, 200, before)[0].peer
        if owner != peers[-1]:
            assert rank(session, 200, after)[0].peer == owner


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=16),
    st.lists(
        st.tuples(
            st.integers(0, 20),
            st.integers(0, 20),
            st.booleans(),
            st.booleans(),
            st.sampled_from([None, "serving", "loading", "none", "draining"]),
        ),
        min_size=1, max_size=8,
    ),
)  # fmt: skip
def test_ranking_is_total_and_repeatable(
    session: bytes, loads: list[tuple[int, int, bool, bool, str | None]]
) -> None:
    some = tuple(
        replica(
            f"p{n}",
            slots_busy=busy,
            queue_depth=queue,
            cooling=cooling,
            holds_session=held,
            assigned=assigned,
        )
        for n, (busy, queue, cooling, held, assigned) in enumerate(loads)
    )
    result = rank(session, 100, some)
    assert result == rank(session, 100, tuple(reversed(some)))
    assert {each.peer for each in result} == {each.peer for each in some}


# --- names ---------------------------------------------------------------------------------------

A, B = "a" * 64, "b" * 64
MESH_OFFERS: dict[str, tuple[Offer, ...]] = {
    "p1": (an_offer("smol", A),),
    "p2": (an_offer("smol", B), an_offer("big", "c" * 64)),
    "p3": (an_offer("smol", B),),
}


@pytest.mark.parametrize(
    ("asked", "digest", "peers"),
    [
        ("smol", B, ["p2", "p3"]),
        ("smol@aaaa", A, ["p1"]),
        ("smol@", B, ["p2", "p3"]),
        (A, A, ["p1"]),
        ("big", "c" * 64, ["p2"]),
    ],
)
def test_a_name_means_bytes(asked: str, digest: str, peers: list[str]) -> None:
    found = resolve(asked, MESH_OFFERS)
    assert found.digest == digest
    assert [peer for peer, _ in found.offers] == peers
    assert all(offer.digest == digest for _, offer in found.offers)


def test_a_tie_between_two_contents_of_a_name_is_broken_alike_everywhere() -> None:
    offers = {"p1": (an_offer("smol", B),), "p2": (an_offer("smol", A),)}
    assert resolve("smol", offers).digest == A
    assert resolve("smol", dict(reversed(offers.items()))).digest == A


def test_one_peer_with_many_offers_has_one_vote() -> None:
    offers = {
        "p1": tuple(an_offer("smol", A) for _ in range(5)),
        "p2": (an_offer("smol", B),),
        "p3": (an_offer("smol", B),),
    }
    assert resolve("smol", offers).digest == B
    assert [peer for peer, _ in resolve(A, offers).offers] == ["p1"]


def test_no_lie_takes_an_approximation_for_the_whole_nor_the_whole_for_one() -> None:
    figures = Approximate(0.024, 0.89, 1.04, 24, 32, "12D3KooW" + "A" * 44)
    shard = {"name": "smol~24of32", "approximate": figures}
    honest = {"p1": (an_offer("smol", A),), "p2": (an_offer(digest=B, **shard),)}
    for lie in (an_offer("smol", B), an_offer(digest=A, **shard)):
        for liar in ("p0", "p9"):
            offers = {**honest, liar: (lie,)}
            assert [peer for peer, _ in resolve("smol@aaaa", offers).offers] == ["p1"]
            found = resolve("smol~24of32@bbbb", offers)
            assert [peer for peer, _ in found.offers] == ["p2"]
            assert all(offer.approximate is not None for _, offer in found.offers)
            assert resolve(B, offers).offers == found.offers
    del honest["p1"]
    with pytest.raises(UnknownModelError):
        resolve("smol", honest)


def test_the_same_bytes_under_another_name_answer_as_well() -> None:
    offers = {"p1": (an_offer("smol", A),), "p2": (an_offer("my-smol", A),)}
    assert [peer for peer, _ in resolve("smol", offers).offers] == ["p1", "p2"]
    assert resolve("smol", offers).name == "smol"
    assert resolve("my-smol", offers).name == "my-smol"


@pytest.mark.parametrize("asked", ["", "nope", "smol@dddd", "@", "Smol", "d" * 64])
def test_an_unknown_model_is_said_to_be_so_with_what_there_is(asked: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        resolve(asked, MESH_OFFERS)
    assert caught.value.known == ("big", "smol")


# --- a gateway's memory --------------------------------------------------------------------------


def resolved(*peers: str, **changes: object) -> Resolved:
    return Resolved("smol", A, tuple((p, an_offer("smol", A, **changes)) for p in peers))


def rtts(*peers: str) -> dict[str, float]:
    return dict.fromkeys(peers, RTT_S)


def choose(dispatcher: Dispatcher, found: Resolved, session: bytes = b"s", now: float = 0.0) -> str:
    everybody = rtts(*(peer for peer, _ in found.offers))
    return dispatcher.rank(found, session, 400, "own", everybody, now)[0].peer


def test_a_session_stays_where_it_was_sent() -> None:
    found = resolved("p1", "p2", "p3", "p4", "p5", "p6")
    for peer, _ in found.offers:
        dispatcher = Dispatcher()
        dispatcher.routed(A, b"s", peer)
        dispatcher.finished(A, peer)
        assert choose(dispatcher, found) == peer


def test_a_session_that_another_gateway_placed_is_found_by_the_advert() -> None:
    sessions = session_hash(b"t") + session_hash(b"s")
    for holder in ("p1", "p2", "p3"):
        offers = tuple(
            (peer, an_offer("smol", A, sessions=sessions if peer == holder else b""))
            for peer in ("p1", "p2", "p3")
        )
        assert choose(Dispatcher(), Resolved("smol", A, offers)) == holder


def test_held_sessions_are_recognised_at_their_places_only() -> None:
    wanted = session_hash(b"s")
    assert holds(an_offer(sessions=b"\0\0\0\0" + wanted), b"s")
    assert not holds(an_offer(sessions=b"\0\0" + wanted + b"\0\0"), b"s")
    assert not holds(an_offer(), b"s")


def test_a_session_whose_holder_is_lost_goes_elsewhere_and_stays_there() -> None:
    dispatcher = Dispatcher()
    dispatcher.routed(A, b"s", "p1")
    dispatcher.lose("p1")
    found = resolved("p2", "p3")
    second = choose(dispatcher, found)
    assert second in ("p2", "p3")


def test_a_burst_spreads_although_no_advert_shows_it_yet() -> None:
    dispatcher, found = Dispatcher(), resolved("p1", "p2", "p3")
    counts = dict.fromkeys(("p1", "p2", "p3"), 0)
    for number in range(24):
        session = b"burst-%d" % number
        peer = choose(dispatcher, found, session)
        dispatcher.routed(A, session, peer)
        counts[peer] += 1
    assert max(counts.values()) <= 12
    assert min(counts.values()) >= 4


def test_a_finished_request_weighs_no_more() -> None:
    dispatcher, found = Dispatcher(), resolved("p1", "p2")
    top = choose(dispatcher, found)
    for number in range(30):
        dispatcher.routed(A, b"%d" % number, top)
    assert choose(dispatcher, found) != top
    for _ in range(30):
        dispatcher.finished(A, top)
    assert choose(dispatcher, found) == top


def test_who_broke_a_request_cools_down_for_a_while() -> None:
    dispatcher, found = Dispatcher(), resolved("p1", "p2")
    top = choose(dispatcher, found)
    dispatcher.failed(top, 0.0)
    assert choose(dispatcher, found, now=COOLDOWN_S - 0.1) != top
    assert choose(dispatcher, found, now=COOLDOWN_S) == top


def test_the_register_decides_before_the_hash_and_the_session() -> None:
    found = resolved("p1", "p2", "p3")
    for serving in ("p1", "p2", "p3"):
        dispatcher = Dispatcher()
        for holder in ("p1", "p2", "p3"):
            dispatcher.routed(A, b"s", holder)
            ranking = dispatcher.rank(
                found, b"s", 400, "own", rtts("p1", "p2", "p3"), 0.0, {serving: "serving"}
            )
            assert ranking[0].peer == serving
            assert all(each.reason.endswith("not assigned") for each in ranking[1:])


def test_a_session_whose_holder_drains_is_found_where_another_gateway_placed_it() -> None:
    peers = ("p1", "p2", "p3", "p4")
    assigned: dict[str, Assigned] = dict.fromkeys(peers, "serving")
    assigned["p1"] = "draining"
    for holder in ("p2", "p3", "p4"):
        offers = tuple(
            (peer, an_offer("smol", A, sessions=session_hash(b"s") if peer == holder else b""))
            for peer in peers
        )
        dispatcher = Dispatcher()
        dispatcher.routed(A, b"s", "p1")
        ranking = dispatcher.rank(
            Resolved("smol", A, offers), b"s", 400, "own", rtts(*peers), 0.0, assigned
        )
        assert (ranking[0].peer, ranking[0].reason) == (holder, "holds the session")


def test_only_ready_peers_that_can_be_reached_are_asked() -> None:
    offers = (
        ("gone", an_offer("smol", A)),
        ("loads", an_offer("smol", A, state="loading")),
        ("own", an_offer("smol", A)),
        ("p1", an_offer("smol", A)),
    )
    ranked_now = Dispatcher().rank(
        Resolved("smol", A, offers), b"s", 400, "own", rtts("loads", "p1"), 0.0
    )
    assert {(each.peer, each.local) for each in ranked_now} == {("own", True), ("p1", False)}


@pytest.mark.parametrize(
    ("offered", "reachable", "state"),
    [
        ("loading", ("p1",), "loading"),
        ("failed", ("p1",), "no replica"),
        ("ready", (), "no replica"),
    ],
)
def test_known_but_served_by_nobody_says_when_to_try_again(
    offered: str, reachable: tuple[str, ...], state: str
) -> None:
    with pytest.raises(NoReplicaError) as caught:
        Dispatcher().rank(resolved("p1", state=offered), b"s", 1, "own", rtts(*reachable), 0.0)
    assert caught.value.state == state
    assert caught.value.retry_after_s > 0


def test_only_so_many_sessions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SESSIONS_REMEMBERED >= 10_000
    monkeypatch.setattr("meshnode.protocol.dispatch.SESSIONS_REMEMBERED", 3)
    dispatcher, found = Dispatcher(), resolved(*(f"p{n}" for n in range(8)))
    top = choose(dispatcher, found, b"s0")
    other = next(peer for peer, _ in found.offers if peer != top)
    dispatcher.routed(A, b"s0", other)
    dispatcher.finished(A, other)
    assert choose(dispatcher, found, b"s0") == other
    for number in range(1, 4):
        dispatcher.routed(A, b"s%d" % number, other)
        dispatcher.finished(A, other)
    assert choose(dispatcher, found, b"s0") == top
