"""Who counts as alive: connections, heartbeats, rumours, and our own lateness.

The first half asks one core rule by rule, with real signatures. The second half lets up to 200
cores talk over a sparse network in virtual time, where a signature is a keyed hash.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.errors import RemoteProtocolError
from meshnode.identity import KeyPair, PeerId, Signed, open_envelope, seal
from meshnode.messages import Alive, Message, Rumours, Suspicion, decode, encode
from meshnode.protocol.liveness import (
    ACCUSATION_TTL_S,
    ANSWER_INTERVAL_S,
    FANOUT,
    HEALTH_DECAY_S,
    HEALTH_MAX,
    HEARTBEAT_S,
    PEERS_MAX,
    RUMOUR_BYTES_MAX,
    RUMOURS_MAX,
    SUPPORT_S,
    SUSPICION_S,
    Liveness,
    Outcome,
)
from tests.protocol.cluster import MESH, key_of

MESH_ID = MESH.mesh_id
DOMAIN, SUSPICION, ALIVE = "test", b"/meshnode/suspicion/1", b"/meshnode/alive/1"
ADA, BOB, CAT, DAN, EVE, FAY = (key_of(name) for name in ("ada", "bob", "cat", "dan", "eve", "fay"))
SHORT_S = 0.01


def live(owner: KeyPair = ADA, incarnation: int = 1, seed: int = 1) -> Liveness:
    return Liveness(
        MESH_ID,
        owner.peer_id,
        lambda kind, message: seal(owner, DOMAIN, kind, encode(message)),
        lambda envelope, kind: open_envelope(envelope, DOMAIN, kind),
        incarnation,
        random.Random(seed),
    )


def accusation(
    by: KeyPair, suspect: KeyPair | str, incarnation: int = 0, mesh: str = MESH_ID
) -> bytes:
    name = suspect if isinstance(suspect, str) else suspect.peer_id
    return seal(by, DOMAIN, SUSPICION, encode(Suspicion(mesh, name, incarnation)))


def word(by: KeyPair, incarnation: int, mesh: str = MESH_ID) -> bytes:
    return seal(by, DOMAIN, ALIVE, encode(Alive(mesh, incarnation)))


def suspicions(*envelopes: bytes) -> Rumours:
    return Rumours(tuple(envelopes), ())


def refutations(*envelopes: bytes) -> Rumours:
    return Rumours((), tuple(envelopes))


def told(outcome: Outcome, peer: KeyPair) -> Rumours:
    return dict(outcome.rumours).get(peer.peer_id, Rumours((), ()))


def meet(core: Liveness, *keys: KeyPair, now: float = 0.0) -> None:
    for key in keys:
        core.connected(key.peer_id, now)
    core.tick(now)


def pass_time(
    core: Liveness, start: float, end: float, beating: tuple[KeyPair, ...] = ()
) -> Outcome:
    """Drive a core as it wants to be, with a beat of some peers at each period; what came of it."""
    rumours: list[tuple[PeerId, Rumours]] = []
    dead: list[PeerId] = []
    alive: list[PeerId] = []
    beat_at = start
    while True:
        due = core.deadline()
        now = min(beat_at if beating else end, end if due is None else due)
        if now >= end:
            return Outcome(tuple(rumours), tuple(dead), tuple(alive))
        if beating and now == beat_at:
            for key in beating:
                core.heard(key.peer_id, now)
            beat_at += HEARTBEAT_S
        outcome = core.tick(now)
        after = core.deadline()
        assert after is None or after > now, "it would spin"
        rumours += outcome.rumours
        dead += outcome.dead
        alive += outcome.alive


# --- the connection ------------------------------------------------------------------------------


def test_a_life() -> None:
    core = live()
    assert core.status(BOB.peer_id, 0.0) == "unknown"
    meet(core, BOB)
    assert core.status(BOB.peer_id, 100.0) == "alive"
    assert core.since(BOB.peer_id) == 0.0

    core.disconnected(BOB.peer_id, 100.0, left=False)
    assert core.status(BOB.peer_id, 100.0) == "suspect", "a reset acts at once"
    assert not core.is_alive(BOB.peer_id, 100.0)
    assert core.since(BOB.peer_id) is None
    gone = pass_time(core, 100.0, 100.0 + SUSPICION_S + SHORT_S)
    assert gone.dead == (BOB.peer_id,)
    assert core.status(BOB.peer_id, 102.0) == "dead"

    core.connected(BOB.peer_id, 103.0)
    back = core.tick(103.0)
    assert back.alive == (BOB.peer_id,)
    assert core.is_alive(BOB.peer_id, 103.0)
    assert core.since(BOB.peer_id) == 103.0
    assert pass_time(core, 103.0, 200.0).dead == ()


def test_who_leaves_is_not_dead() -> None:
    core = live()
    meet(core, BOB, CAT)
    core.disconnected(BOB.peer_id, 1.0, left=True)
    outcome = pass_time(core, 1.0, 100.0)
    assert core.status(BOB.peer_id, 100.0) == "left"
    assert outcome.dead == ()
    assert outcome.rumours == (), "nobody is accused"
    core.connected(BOB.peer_id, 100.0)
    assert core.tick(100.0).alive == (BOB.peer_id,)


def test_a_node_is_alive_to_itself() -> None:
    core = live()
    core.tick(7.0)
    assert core.is_alive(ADA.peer_id, 1e6)
    assert core.since(ADA.peer_id) == 7.0


def test_a_loss_is_told_with_the_proof_of_the_incarnation() -> None:
    core = live()
    meet(core, BOB, CAT)
    core.receive(BOB.peer_id, refutations(word(BOB, 5)), 0.5)
    core.disconnected(BOB.peer_id, 1.0, left=False)
    outcome = core.tick(1.0)
    assert dict(outcome.rumours).keys() == {CAT.peer_id}
    rumours = told(outcome, CAT)
    signed = open_envelope(rumours.suspicions[0], DOMAIN, SUSPICION)
    assert signed.signer == ADA.peer_id
    assert decode(signed.payload, Suspicion) == Suspicion(MESH_ID, BOB.peer_id, 5)
    assert rumours.refutations == (word(BOB, 5),)


def test_whoever_connects_hears_what_was_said_of_it_and_who_we_are() -> None:
    core = live(incarnation=3)
    meet(core, BOB)
    core.disconnected(BOB.peer_id, 1.0, left=False)
    pass_time(core, 1.0, 5.0)
    core.connected(BOB.peer_id, 5.0)
    rumours = told(core.tick(5.0), BOB)
    assert rumours == Rumours((accusation(ADA, BOB),), (word(ADA, 3),))


# --- heartbeats ----------------------------------------------------------------------------------


def test_only_those_expected_must_beat() -> None:
    core = live()
    meet(core, BOB, CAT)
    core.expects((BOB.peer_id,), 10.0)
    pass_time(core, 10.0, 10.0 + SUPPORT_S - SHORT_S)
    assert core.is_alive(BOB.peer_id, 10.0 + SUPPORT_S - SHORT_S), "it owed nothing before"
    pass_time(core, 10.0 + SUPPORT_S - SHORT_S, 10.0 + SUPPORT_S + SHORT_S)
    assert core.status(BOB.peer_id, 10.0 + SUPPORT_S + SHORT_S) == "suspect"
    assert core.since(BOB.peer_id) is None
    assert core.status(CAT.peer_id, 10.0 + SUPPORT_S + SHORT_S) == "alive"

    core.heard(BOB.peer_id, 14.0)
    assert core.is_alive(BOB.peer_id, 14.0)
    assert core.since(BOB.peer_id) == 14.0, "there was a break"
    pass_time(core, 14.0, 60.0, beating=(BOB,))
    assert core.since(BOB.peer_id) == 14.0

    core.expects((), 60.0)
    assert core.deadline() is None
    assert core.is_alive(BOB.peer_id, 1000.0)


def test_the_silence_is_noticed_when_it_is_due() -> None:
    core = live()
    meet(core, BOB)
    core.expects((BOB.peer_id,), 0.0)
    core.heard(BOB.peer_id, 0.5)
    ticks = []
    while (due := core.deadline()) is not None and due < 5.0:
        ticks.append(due)
        core.tick(due)
    assert all(b - a <= HEARTBEAT_S for a, b in pairwise(ticks))
    assert 0.5 + SUPPORT_S in ticks


def test_a_silent_peer_is_not_accused_while_its_connection_stands() -> None:
    core = live()
    meet(core, BOB, CAT)
    core.expects((BOB.peer_id,), 0.0)
    outcome = pass_time(core, 0.0, 60.0)
    assert core.status(BOB.peer_id, 60.0) == "suspect"
    assert outcome.rumours == ()
    assert outcome.dead == ()


# --- our own health ------------------------------------------------------------------------------


@pytest.mark.parametrize("away_s", [3600.0, 10.0, 2.9, 1.0])
def test_who_sleeps_does_not_blame_the_others(away_s: float) -> None:
    core = live()
    meet(core, BOB)
    core.expects((BOB.peer_id,), 0.0)
    core.heard(BOB.peer_id, 0.0)
    pass_time(core, 0.0, 2.9)
    woken_at = 2.9 + away_s
    assert core.is_alive(BOB.peer_id, woken_at), "even if asked before anything else"
    core.tick(woken_at)
    assert core.health == 2
    assert core.is_alive(BOB.peer_id, woken_at)
    pass_time(core, woken_at, woken_at + SUPPORT_S)
    assert core.is_alive(BOB.peer_id, woken_at + SUPPORT_S), "a fresh grace"
    pass_time(core, woken_at + SUPPORT_S, woken_at + 2 * SUPPORT_S + SHORT_S)
    assert core.status(BOB.peer_id, woken_at + 2 * SUPPORT_S + SHORT_S) == "suspect"


def test_a_beat_may_be_the_first_thing_after_a_suspend() -> None:
    core = live()
    meet(core, BOB, CAT)
    core.expects((BOB.peer_id, CAT.peer_id), 0.0)
    core.heard(BOB.peer_id, 3600.0)
    assert core.since(BOB.peer_id) == 0.0
    assert core.is_alive(CAT.peer_id, 3600.0)


def test_a_verdict_waits_if_we_were_asleep_when_it_was_due() -> None:
    core = live()
    meet(core, BOB, CAT)
    core.disconnected(BOB.peer_id, 0.0, left=False)
    core.tick(0.0)
    assert core.tick(2.5).dead == ()
    # The answer had been in our socket all the time.
    core.receive(CAT.peer_id, refutations(word(BOB, 1)), 2.6)
    assert pass_time(core, 2.6, 10.0).dead == ()


def test_health_heals() -> None:
    core = live()
    meet(core, BOB)
    core.expects((BOB.peer_id,), 0.0)
    now = 0.0
    for health in (2, 3, 4, 4):
        now += HEARTBEAT_S + 1.0
        core.tick(now)
        assert core.health == health
    for health in (3, 2, 1, 1):
        pass_time(core, now, now + HEALTH_DECAY_S + SHORT_S, beating=(BOB,))
        now += HEALTH_DECAY_S + SHORT_S
        assert core.health == health


def test_who_is_always_late_still_notices_in_the_end() -> None:
    core = live()
    meet(core, BOB)
    core.expects((BOB.peer_id,), 0.0)
    now = 0.0
    while core.is_alive(BOB.peer_id, now) and now < 60.0:
        now += HEARTBEAT_S + 1.0
        core.tick(now)
    assert core.health == HEALTH_MAX
    assert now <= 2 * HEALTH_MAX * (HEARTBEAT_S + 1.0) + HEALTH_MAX * SUPPORT_S
    assert not core.is_alive(BOB.peer_id, now)


def test_ordinary_lateness_is_no_stall() -> None:
    core = live()
    meet(core, BOB)
    core.expects((BOB.peer_id,), 0.0)
    for second in range(1, 60):
        core.heard(BOB.peer_id, second * 1.2)
        core.tick(second * 1.2)
    assert core.health == 1


# --- rumours: the onlooker -----------------------------------------------------------------------


def onlooker(*members: KeyPair) -> Liveness:
    core = live()
    meet(core, *members)
    return core


@pytest.mark.parametrize(
    ("members", "accusers", "dies"),
    [
        ((BOB, CAT, DAN), (CAT, DAN), True),
        ((BOB, CAT, DAN), (CAT,), False),
        ((BOB, CAT, DAN), (CAT, CAT), False),
        ((BOB, CAT, DAN), (EVE, FAY), True),
        ((BOB, CAT), (CAT,), True),
        ((BOB,), (BOB,), True),
    ],
    ids=["two", "one", "one twice", "two afar", "one of three", "one of two"],
)
def test_how_many_accusers_it_takes(
    members: tuple[KeyPair, ...], accusers: tuple[KeyPair, ...], dies: bool
) -> None:
    """Zoe is somebody that Ada was never connected to."""
    zoe = key_of("zoe")
    core = onlooker(*members)
    for by in accusers:
        core.receive(BOB.peer_id, suspicions(accusation(by, zoe)), 1.0)
    assert core.status(zoe.peer_id, 1.0) == ("suspect" if dies else "unknown")
    outcome = pass_time(core, 1.0, 1.0 + SUSPICION_S + SHORT_S)
    assert outcome.dead == ((zoe.peer_id,) if dies else ())
    assert core.status(zoe.peer_id, 2.1) == ("dead" if dies else "unknown")


def test_an_answer_in_time_clears_it() -> None:
    core = onlooker(BOB, CAT, DAN)
    both = accusation(BOB, EVE), accusation(CAT, EVE)
    core.receive(BOB.peer_id, suspicions(*both), 1.0)
    outcome = core.receive(DAN.peer_id, refutations(word(EVE, 1)), 1.5)
    assert outcome.alive == (EVE.peer_id,)
    assert told(outcome, BOB) == told(outcome, CAT) == refutations(word(EVE, 1))
    assert core.status(EVE.peer_id, 1.5) == "unknown"
    assert pass_time(core, 1.5, 60.0).dead == ()


def test_a_dead_peer_comes_back_by_a_higher_incarnation_only() -> None:
    core = onlooker(BOB, CAT, DAN)
    core.receive(BOB.peer_id, refutations(word(EVE, 4)), 0.5)
    core.receive(BOB.peer_id, suspicions(accusation(BOB, EVE, 4), accusation(CAT, EVE, 4)), 1.0)
    pass_time(core, 1.0, 3.0)
    assert core.status(EVE.peer_id, 3.0) == "dead"
    for incarnation in (3, 4):
        assert not core.receive(DAN.peer_id, refutations(word(EVE, incarnation)), 3.0).alive
        assert core.status(EVE.peer_id, 3.0) == "dead"
    assert core.receive(DAN.peer_id, refutations(word(EVE, 5)), 3.0).alive == (EVE.peer_id,)
    assert core.status(EVE.peer_id, 3.0) == "unknown"


def test_an_old_accusation_is_answered_with_what_refutes_it() -> None:
    core = onlooker(BOB, CAT, DAN)
    core.receive(BOB.peer_id, refutations(word(EVE, 4)), 0.5)
    replay = suspicions(accusation(BOB, EVE, 3), accusation(CAT, EVE, 3))
    outcome = core.receive(DAN.peer_id, replay, 1.0)
    assert dict(outcome.rumours) == {DAN.peer_id: refutations(word(EVE, 4))}
    assert pass_time(core, 1.0, 10.0).dead == ()


def test_an_incarnation_needs_its_proof() -> None:
    """Or a liar would name one that the accused can never exceed."""
    core = onlooker(BOB, CAT, DAN)
    core.receive(BOB.peer_id, refutations(word(EVE, 4)), 0.5)
    top = 2**62 - 1
    ahead = suspicions(accusation(BOB, EVE, top), accusation(CAT, EVE, top))
    assert core.receive(DAN.peer_id, ahead, 1.0) == Outcome()
    proven = Rumours((accusation(BOB, EVE, 5), accusation(CAT, EVE, 5)), (word(EVE, 5),))
    core.receive(DAN.peer_id, proven, 1.0)
    assert pass_time(core, 1.0, 3.0).dead == (EVE.peer_id,)


def test_whoever_is_connected_to_the_accused_lets_it_answer() -> None:
    core = onlooker(BOB, CAT, DAN, EVE)
    core.receive(EVE.peer_id, refutations(word(EVE, 2)), 0.5)
    both = accusation(BOB, EVE, 2), accusation(CAT, EVE, 2)
    outcome = core.receive(DAN.peer_id, suspicions(*both), 1.0)
    assert told(outcome, EVE) == suspicions(*both)
    assert pass_time(core, 1.0, 20.0).dead == ()
    assert core.is_alive(EVE.peer_id, 20.0)


def test_a_rumour_is_passed_on_once_and_not_to_all() -> None:
    crowd = tuple(key_of(f"crowd {index}") for index in range(3 * FANOUT))
    core = onlooker(*crowd)
    rumour = suspicions(accusation(crowd[1], EVE))
    first = core.receive(crowd[0].peer_id, rumour, 1.0)
    assert len(first.rumours) == FANOUT
    assert crowd[0].peer_id not in dict(first.rumours)
    assert core.receive(crowd[2].peer_id, rumour, 1.0) == Outcome()
    assert len(core.receive(crowd[0].peer_id, refutations(word(EVE, 1)), 1.0).rumours) == FANOUT


def test_a_lone_accusation_fades() -> None:
    core = onlooker(BOB, CAT, DAN)
    core.receive(BOB.peer_id, suspicions(accusation(BOB, EVE)), 0.0)
    pass_time(core, 0.0, ACCUSATION_TTL_S + SHORT_S)
    assert core.deadline() is None
    core.receive(CAT.peer_id, suspicions(accusation(CAT, EVE)), 31.0)
    assert core.status(EVE.peer_id, 31.0) == "unknown", "only one, again"


def test_our_own_loss_needs_no_second_witness_but_takes_an_answer() -> None:
    core = onlooker(BOB, CAT, DAN, EVE)
    core.disconnected(EVE.peer_id, 1.0, left=False)
    core.tick(1.0)
    core.receive(BOB.peer_id, refutations(word(EVE, 1)), 1.5)
    assert core.status(EVE.peer_id, 1.5) == "unknown", "it lives, if not for us"
    core.connected(FAY.peer_id, 2.0)
    core.disconnected(FAY.peer_id, 2.0, left=False)
    assert pass_time(core, 2.0, 4.0).dead == (FAY.peer_id,)


# --- rumours: the accused ------------------------------------------------------------------------


def test_the_accused_answers_everybody() -> None:
    core = live(incarnation=7)
    meet(core, BOB, CAT)
    outcome = core.receive(BOB.peer_id, suspicions(accusation(DAN, ADA, 7)), 1.0)
    assert outcome.refuted
    assert dict(outcome.rumours) == {
        BOB.peer_id: refutations(word(ADA, 8)),
        CAT.peer_id: refutations(word(ADA, 8)),
    }
    late = core.receive(CAT.peer_id, suspicions(accusation(EVE, ADA, 7)), 1.1)
    assert not late.refuted
    assert dict(late.rumours) == {CAT.peer_id: refutations(word(ADA, 8))}


def test_it_answers_not_without_end_but_in_time() -> None:
    core = live()
    meet(core, BOB, CAT)
    core.receive(BOB.peer_id, suspicions(accusation(DAN, ADA, 1)), 1.0)
    again = core.receive(BOB.peer_id, suspicions(accusation(DAN, ADA, 2)), 1.01)
    assert not again.refuted
    assert core.deadline() == 1.0 + ANSWER_INTERVAL_S
    assert told(core.tick(1.0 + ANSWER_INTERVAL_S), BOB) == refutations(word(ADA, 3))
    assert ANSWER_INTERVAL_S < SUSPICION_S / 2


def test_it_rises_above_what_it_said_in_a_forgotten_life() -> None:
    core = live(incarnation=2)
    meet(core, BOB)
    outcome = core.receive(BOB.peer_id, refutations(word(ADA, 40)), 1.0)
    assert told(outcome, BOB) == refutations(word(ADA, 41))


# --- hostile rumours -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rumours",
    [
        suspicions(accusation(BOB, EVE)[:-1]),
        suspicions(accusation(BOB, EVE)[:-1] + b"\0"),
        suspicions(word(BOB, 1)),
        refutations(accusation(BOB, EVE)),
        suspicions(accusation(BOB, EVE, mesh="0" * 32)),
        refutations(word(BOB, 1, mesh="0" * 32)),
        suspicions(seal(BOB, DOMAIN, SUSPICION, b"")),
        refutations(seal(BOB, "other", ALIVE, encode(Alive(MESH_ID, 1)))),
        refutations(seal(BOB, DOMAIN, ALIVE, encode(Alive(MESH_ID, 2**62)))),
        refutations(seal(BOB, DOMAIN, ALIVE, b"\0" * RUMOUR_BYTES_MAX)),
    ],
)
def test_forgeries_are_the_senders_fault(rumours: Rumours) -> None:
    core = onlooker(BOB, CAT, DAN)
    with pytest.raises(RemoteProtocolError):
        core.receive(BOB.peer_id, rumours, 1.0)
    assert core.refused["forged rumour"] == 1
    assert core.tick(1.0) == Outcome()
    assert core.status(EVE.peer_id, 1.0) == "unknown"


@given(
    st.lists(st.binary(max_size=600), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["raw", "signed", "spoilt"]),
    st.integers(min_value=0),
)
@settings(deadline=None)
def test_bytes_are_refused_or_harmless(
    payloads: list[bytes], as_words: bool, how: str, place: int
) -> None:
    core = onlooker(BOB, CAT, DAN)
    kind = ALIVE if as_words else SUSPICION
    if how == "raw":
        envelopes = payloads
    elif how == "signed":
        envelopes = [seal(BOB, DOMAIN, kind, payload) for payload in payloads]
    else:
        whole = bytearray(word(CAT, 9) if as_words else accusation(CAT, EVE))
        whole[place % len(whole)] ^= 1 + place % 255
        envelopes = [bytes(whole)]
    rumours = refutations(*envelopes) if as_words else suspicions(*envelopes)
    with pytest.raises(RemoteProtocolError):
        core.receive(BOB.peer_id, rumours, 1.0)
    assert core.tick(1.0) == Outcome()


def test_strangers_are_not_listened_to() -> None:
    core = onlooker(BOB, CAT, DAN)
    assert core.receive(EVE.peer_id, suspicions(b"junk"), 1.0) == Outcome()
    core.disconnected(BOB.peer_id, 1.0, left=True)
    assert core.receive(BOB.peer_id, suspicions(accusation(BOB, EVE)), 1.0).rumours == ()


# --- the same with cheap signatures, for many ----------------------------------------------------


def name_of(index: int) -> PeerId:
    """As long as a real one, and in its alphabet (which has no 0)."""
    return PeerId(str(index).replace("0", "z").rjust(52, "x"))


def _code(author: str, kind: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(kind + payload, key=author.encode(), digest_size=16).digest()


def cheap_seal(author: PeerId, kind: bytes, message: Message) -> bytes:
    payload = encode(message)
    return author.encode() + _code(author, kind, payload) + payload


def cheap_open(envelope: bytes, kind: bytes) -> Signed:
    author, code, payload = envelope[:52].decode("latin-1"), envelope[52:68], envelope[68:]
    if code != _code(author, kind, payload):
        raise RemoteProtocolError("forged")
    return Signed(PeerId(author), payload)


def cheap(index: int, incarnation: int = 1) -> Liveness:
    own = name_of(index)
    rng = random.Random(f"{index}/{incarnation}")
    sign: Callable[[bytes, Message], bytes] = lambda kind, message: cheap_seal(own, kind, message)  # noqa: E731
    return Liveness(MESH_ID, own, sign, cheap_open, incarnation, rng)


def test_tables_and_messages_are_bounded() -> None:
    core = cheap(0)
    members = [name_of(index) for index in range(1, 6)]
    for member in members:
        core.connected(member, 0.0)
    core.tick(0.0)
    spread = 0
    for index in range(100, 100 + PEERS_MAX + 500):
        now = index / 10  # as fast as one sender's allowance is refilled, and faster
        ghost = cheap_seal(name_of(index), ALIVE, Alive(MESH_ID, 1))
        fake = cheap_seal(members[1], SUSPICION, Suspicion(MESH_ID, name_of(10_000 + index), 0))
        outcome = core.receive(members[0], Rumours((fake,), (ghost,)), now)
        spread += sum(bool(rumours.suspicions) for _, rumours in outcome.rumours)
        if (due := core.deadline()) is not None and due <= now:
            core.tick(now)
    seconds = (PEERS_MAX + 500) / 10
    assert core.refused["too many rumours"] > 0
    assert spread <= (64 + seconds + 1) * len(members), "one accuser, one accusation a second"
    assert len(core._peers) <= PEERS_MAX
    assert len(core._accused) <= 64 + ACCUSATION_TTL_S + 1
    assert all(core.is_alive(member, now) for member in members)


def test_a_great_loss_fits_one_message() -> None:
    core = live()
    meet(core, BOB)
    crowd = [key_of(f"crowd {index}") for index in range(2 * RUMOURS_MAX)]
    for peer in crowd:
        core.connected(peer.peer_id, 0.0)
        core.receive(peer.peer_id, refutations(word(peer, 2**61)), 0.0)
        core.disconnected(peer.peer_id, 0.0, left=True)
    core.tick(0.0)
    for peer in crowd:
        core.connected(peer.peer_id, 1.0)
        core.disconnected(peer.peer_id, 1.0, left=False)
    rumours = told(core.tick(1.0), BOB)
    assert len(rumours.suspicions) == len(rumours.refutations) == RUMOURS_MAX
    assert max(map(len, rumours.suspicions)) < RUMOUR_BYTES_MAX
    assert len(encode(rumours)) < 64 * 1024


# --- a network of them ---------------------------------------------------------------------------


def regular_graph(size: int, degree: int, rng: random.Random) -> list[tuple[int, int]]:
    """`degree / 2` random rings through all nodes, without a common edge."""
    edges: dict[tuple[int, int], None] = {}
    while len(edges) < size * degree // 2:
        ring = rng.sample(range(size), size)
        pairs = [(min(a, b), max(a, b)) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)]
        if not any(pair in edges for pair in pairs):
            edges.update(dict.fromkeys(pairs))
    return list(edges)


@dataclass
class Network:
    """Cores on a sparse graph: messages take 10 to 60 ms, and one in twenty is lost."""

    size: int
    seed: int
    degree: int = 8
    loss: float = 0.05
    now: float = 0.0
    sent: int = 0
    refuted: int = 0
    log: list[tuple[float, int, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._order = count()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self.index = {name_of(index): index for index in range(self.size)}
        self.cores: dict[int, Liveness] = {}
        self.links: dict[int, dict[int, None]] = {index: {} for index in range(self.size)}
        edges = regular_graph(self.size, self.degree, self._rng)
        for index in range(self.size):
            self.cores[index] = cheap(index)
        for one, other in edges:
            self.connect(one, other)
        self.run(2.0)
        heard = {(near, far) for _, near, far in self.events("alive")}
        assert len(heard) >= self.size * (self.size - 1 - self.degree), "all have met at the start"
        assert not any(core.refused for core in self.cores.values())
        self.log.clear()
        self.sent = 0

    # what is done to it

    def connect(self, one: int, other: int) -> None:
        for near, far in ((one, other), (other, one)):
            self.links[near][far] = None
            self.cores[near].connected(name_of(far), self.now)
            self._attend_to(near)

    def lose(self, near: int, far: int) -> None:
        if near in self.cores and self.links[near].pop(far, self) is not self:
            self.log.append((self.now, near, "lost", far))
            self.cores[near].disconnected(name_of(far), self.now, left=False)
            self._attend_to(near)

    def kill(self, index: int) -> list[int]:
        """Its neighbours notice when it has been silent for 2 to 3 s; who they are."""
        del self.cores[index]
        neighbours = list(self.links[index])
        self.links[index].clear()
        for near in neighbours:
            self.later(self._rng.uniform(2.0, 3.0), lambda near=near: self.lose(near, index))  # type: ignore[misc]
        return neighbours

    def flap(self, one: int, other: int) -> None:
        """A link breaks for good although both ends live."""
        self.lose(one, other)
        self.lose(other, one)

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._order), action))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = end

    # what can be asked

    def events(self, kind: str) -> list[tuple[float, int, int]]:
        return [(at, near, far) for at, near, what, far in self.log if what == kind]

    # the network

    def _attend_to(self, index: int) -> None:
        """Wake a core when it next wants to be."""
        core = self.cores[index]
        due = core.deadline()
        if due is None:
            return

        def wake() -> None:
            again = core.deadline()
            if self.cores.get(index) is core and again is not None and again <= self.now:
                self._take(index, core.tick(self.now))

        self.later(max(0.0, due - self.now), wake)

    def _take(self, index: int, outcome: Outcome) -> None:
        self.log += ((self.now, index, "dead", self.index[peer]) for peer in outcome.dead)
        self.log += ((self.now, index, "alive", self.index[peer]) for peer in outcome.alive)
        self.refuted += outcome.refuted
        for peer, rumours in outcome.rumours:
            self.send(index, self.index[peer], rumours)
        self._attend_to(index)

    def send(self, sender: int, receiver: int, rumours: Rumours) -> None:
        self.sent += 1
        if self._rng.random() < self.loss:
            return

        def arrive() -> None:
            core = self.cores.get(receiver)
            if core is not None and sender in self.links[receiver]:
                self._take(receiver, core.receive(name_of(sender), rumours, self.now))

        self.later(self._rng.uniform(0.01, 0.06), arrive)


@pytest.mark.parametrize(("size", "seed"), [(30, 1), (30, 2), (30, 3), (200, 1)])
def test_a_death_is_known_everywhere_within_four_seconds(size: int, seed: int) -> None:
    network = Network(size, seed)
    killed_at = network.now
    victim = size // 2
    neighbours = network.kill(victim)
    network.run(10.0)
    out = {near: at - killed_at for at, near, _ in reversed(network.events("dead"))}
    assert out.keys() == network.cores.keys(), "everybody knows"
    assert {far for _, _, far in network.events("dead")} == {victim}, "and of nobody else"
    for at, near, _ in network.events("lost"):
        out[near] = at - killed_at  # a loss acts at once
    slowest = sorted(out.values())
    print(
        f"n={size} seed={seed}: median {slowest[size // 2]:.2f} s, last {slowest[-1]:.2f} s, "
        f"{network.sent / size:.1f} messages a node"
    )
    assert slowest[-1] < 4.0
    assert network.sent / size < 60
    assert network.refuted == 0

    network.log.clear()
    network.cores[victim] = cheap(victim, incarnation=2)
    back_at = network.now
    for near in neighbours:
        network.connect(victim, near)
    network.run(2.0)
    back = {near: at - back_at for at, near, far in network.events("alive") if far == victim}
    assert back.keys() == network.cores.keys() - {victim}
    assert max(back.values()) < 1.0
    assert not network.events("dead")


@pytest.mark.parametrize("seed", range(5))
def test_broken_links_kill_nobody(seed: int) -> None:
    network = Network(30, seed)
    rng = random.Random(seed)
    for one in rng.sample(range(30), 12):
        network.flap(one, rng.choice(list(network.links[one])))
        network.run(rng.uniform(0.0, 0.5))
    network.run(60.0)
    assert network.refuted > 0
    assert network.events("dead") == []


@pytest.mark.parametrize("accusers", [1, 5], ids=["one liar", "one liar of many names"])
def test_a_liar_removes_nobody(accusers: int) -> None:
    """It always knows the victim's newest incarnation, and speaks before anybody else does."""
    network = Network(30, seed=9)
    liar, victim = 3, 17
    names = [name_of(liar), *(name_of(1000 + index) for index in range(accusers - 1))]

    def lie() -> None:
        newest = network.cores[victim]._incarnation
        lies = tuple(
            cheap_seal(name, SUSPICION, Suspicion(MESH_ID, name_of(victim), newest))
            for name in names
        )
        for near in tuple(network.links[liar]):
            network.send(liar, near, suspicions(*lies))
        if network.now < 60.0:
            network.later(0.2, lie)

    network.later(0.0, lie)
    network.run(70.0)
    assert network.refuted > 10
    assert network.events("dead") == []
    # All the same a real death is noticed, the liar's own contribution included.
    network.kill(victim)
    network.run(4.0)
    known = {near for _, near, _ in network.events("dead") + network.events("lost")}
    assert known == network.cores.keys()


def test_a_run_is_a_function_of_its_seed() -> None:
    def run() -> list[tuple[float, int, str, int]]:
        network = Network(30, seed=4)
        network.kill(7)
        network.flap(1, next(iter(network.links[1])))
        network.run(10.0)
        return network.log

    assert run() == run()
