"""One register and a few: what went wrong once, and what a liar or a stranger may not do."""

from __future__ import annotations

import msgspec
import pytest

from meshnode.errors import ConfigError, RemoteProtocolError
from meshnode.identity import PeerId
from meshnode.messages import (
    LINEAGE_MAX,
    Body,
    Decided,
    GetDecided,
    Handover,
    Header,
    Proposal,
    Vote,
)
from meshnode.protocol import Persist, Send
from meshnode.protocol.quorum import group_id
from tests.protocol.consensus.parts import (
    NAMES,
    Said,
    a_block,
    a_body,
    a_certificate,
    a_genesis,
    a_handover,
    a_register,
    a_vote,
    peer,
    peers,
    seal_recovery,
)
from tests.protocol.consensus.room import Room

GENESIS = a_genesis(3)
ADA, BOB, CYD, DAN = peers("ada", "bob", "cyd", "dan")
FIRST = a_block(GENESIS, "ada")


def a_history(length: int) -> list[Handover]:
    """Blocks that replace the third voter again and again."""
    voters, last, history = GENESIS.voters, None, []
    for place in range(length):
        third = NAMES[2 + (place + 1) % 2]
        block = a_block(GENESIS, "ada", after=last, voters=peers("ada", "bob", third))
        history.append(a_handover(("ada", "bob"), block, voters))
        voters, last = block.voters, block
    return history


# --- alone ---------------------------------------------------------------------------------------


def test_a_single_voter_decides_at_once() -> None:
    register = a_register("ada", a_genesis(1))
    persist, *_ = register.want(True, 0.0)
    assert isinstance(persist, Persist)
    assert register.head.epoch == 1
    assert register.deadline() is None


def test_what_is_on_the_disk_is_what_was_said() -> None:
    register = a_register("ada", GENESIS)
    first, *said = register.want(True, 0.0)
    assert isinstance(first, Persist), "durable before anybody hears of it"
    assert all(isinstance(each, Send) for each in said)
    again = a_register("ada", GENESIS, journal=first.data)
    assert again.pledged() == register.pledged() != ()
    effects = [*again.want(True, 1.0), *again.tick(2.5)]
    told = [each.message for each in effects if isinstance(each, Send)]
    proposals = [each for each in told if isinstance(each, Proposal)]
    assert {each.vote.block for each in proposals} == {register._round.proposals[1].vote.block}


def test_a_damaged_journal_is_said_to_be_one() -> None:
    with pytest.raises(ConfigError, match="identity"):
        a_register("ada", GENESIS, journal=b"\x00nonsense")


def test_a_voter_that_finalized_and_came_back_does_not_spin() -> None:
    room = Room(GENESIS)
    # Ada hears the votes to notarize, and nobody hears her after that.
    room.is_lost = lambda sender, to, message: (
        isinstance(message, Vote) and (message.kind == "finalize")
    )
    room.want("ada")
    room.run(0.5)
    assert any(kind == "finalize" for _, kind in room.registers["ada"]._round.casts)
    for name in ("ada", "bob", "cyd"):
        room.kill(name)
    room.start("ada")
    room.run(30.0)  # fails if it spins


def test_a_change_of_voters_enters_the_history_once() -> None:
    (handover,) = a_history(1)
    register = a_register("cyd", GENESIS)
    register.receive(ADA, Decided(b"", (), handover, Body()), 0.0)
    assert register.lineage.handovers == (handover,)


def test_a_part_of_the_history_does_not_come_in_twice() -> None:
    """Somebody tells a voter of a change that it is just about to decide itself."""
    history = a_history(2)
    register = a_register("ada", GENESIS)
    register.want(True, 0.0)
    register.receive(BOB, Decided(b"", tuple(history), None, None), 0.0)
    register.receive(BOB, Decided(b"", (), history[0], Body()), 0.0)
    assert register.lineage.handovers == tuple(history)


# --- who is behind -------------------------------------------------------------------------------


def test_a_voter_that_is_behind_is_helped_however_long_the_history_is() -> None:
    history = a_history(LINEAGE_MAX + 6)
    newest = a_register("ada", GENESIS)
    behind = a_register("bob", GENESIS)
    for handover in history:
        newest.receive(BOB, Decided(b"", (), handover, Body()), 0.0)
        if handover is not history[-1]:
            behind.receive(ADA, Decided(b"", (), handover, Body()), 0.0)
    block = a_block(GENESIS, "bob", after=behind.head.header)
    (answer,) = newest.receive(BOB, a_vote("bob", block, 1, "nullify"), 1.0)
    assert isinstance(answer, Send)
    assert isinstance(answer.message, Decided)
    behind.receive(ADA, answer.message, 1.0)
    assert behind.head.epoch == newest.head.epoch


def test_whoever_knows_nothing_catches_up_in_pieces() -> None:
    history = a_history(2 * LINEAGE_MAX + 6)
    newest = a_register("ada", GENESIS)
    for handover in history:
        newest.receive(BOB, Decided(b"", (), handover, Body()), 0.0)
    learner = a_register("eve", GENESIS)
    questions: list[Said] = [GetDecided(learner.group, 0, 0)]
    asked = 0
    while questions:
        asked += 1
        (answer,) = newest.receive(peer("eve"), questions.pop(), 0.0)
        assert isinstance(answer, Send)
        effects = learner.receive(ADA, answer.message, 0.0)  # type: ignore[arg-type]
        questions += [each.message for each in effects if isinstance(each, Send)]  # type: ignore[misc]
    assert learner.head.epoch == newest.head.epoch
    assert asked == 3


def test_a_voter_that_lost_its_disk_abstains_until_it_is_replaced() -> None:
    history = a_history(2)
    register = a_register("bob", GENESIS)
    register.receive(ADA, Decided(b"", (), history[0], Body()), 0.0)
    assert not register.has_memory
    assert not register.votes
    replaced = a_block(GENESIS, "ada", after=history[0].header, voters=peers("ada", "eve", "dan"))
    handover = a_handover(("ada", "dan"), replaced, history[0].header.voters)
    register.receive(ADA, Decided(b"", (history[0],), handover, Body()), 0.0)
    assert register.has_memory


def test_a_voter_that_lost_its_disk_abstains_though_the_history_comes_in_pieces() -> None:
    history = a_history(LINEAGE_MAX + 2)
    register = a_register("bob", GENESIS)
    register.receive(ADA, Decided(b"", tuple(history[:LINEAGE_MAX]), None, None), 0.0)
    register.want(True, 0.0)
    assert not register.votes, "it may have voted in the first epoch before"
    rest = Decided(b"", tuple(history[LINEAGE_MAX:]), history[-1], Body())
    register.receive(ADA, rest, 0.0)
    assert register.head.epoch == len(history)
    assert not register.has_memory


# --- crashes that must not hold up the rest ------------------------------------------------------


def test_a_quorum_that_restarts_one_by_one_can_still_show_why_it_came_so_far() -> None:
    """Dan and eve are gone for good, the views of all five have failed one after the other, and
    then ada, bob and cyd each come back with what they had stored."""
    room = Room(a_genesis(5))
    room.kill("dan")
    room.kill("eve")
    room.is_lost = lambda sender, to, message: isinstance(message, Proposal)
    alive = ("ada", "bob", "cyd")
    room.want(*alive)
    room.run_until(lambda: min(each.view for each in room.registers.values()) >= 5, 30.0)
    for name in alive:
        room.kill(name)
        room.start(name)
        room.run(0.9)
    room.is_lost = lambda sender, to, message: False
    room.run(30.0)
    assert set(room.heads().values()) == {1}


def test_a_voter_that_finalized_and_crashed_can_still_show_why() -> None:
    """Ada and cyd notarized, ada finalized; cyd dies, ada restarts; bob will not have the block
    and has given the view up. What was notarized must be carried on, whatever bob thinks of it."""
    room = Room(GENESIS)
    room.applications["bob"].refusal = "not to my taste"
    cut = {"bob"}
    room.is_lost = lambda sender, to, message: (
        bool({sender, to} & cut) or (isinstance(message, Vote) and message.kind == "finalize")
    )
    room.want("ada", "bob")
    room.run(0.5)
    assert any(kind == "finalize" for _, kind in room.registers["ada"]._round.casts)
    room.kill("cyd")
    room.run(0.1)
    room.kill("ada")
    room.run(2.0)
    room.start("ada")
    room.is_lost = lambda sender, to, message: False
    room.want("ada")
    room.run(20.0)
    assert room.heads() == {"ada": 1, "bob": 1}


def test_everybody_restarts_at_once() -> None:
    room = Room(GENESIS)
    room.is_lost = lambda sender, to, message: isinstance(message, Proposal)
    room.want(*room.registers)
    room.run_until(lambda: room.registers["ada"].view >= 4, 30.0)
    for name in ("ada", "bob", "cyd"):
        room.kill(name)
        room.start(name)
    room.is_lost = lambda sender, to, message: False
    room.run(5.0)
    assert set(room.heads().values()) == {1}


def test_views_do_not_fly_past_while_each_takes_all_others_for_dead() -> None:
    room = Room(GENESIS)
    for name, application in room.applications.items():
        application.dead = {peer(other) for other in room.registers if other != name}
    room.is_lost = lambda sender, to, message: isinstance(message, Proposal)
    room.want(*room.registers)
    room.run(10.0)
    assert max(register.view for register in room.registers.values()) < 20


# --- liars and strangers -------------------------------------------------------------------------


def test_a_vote_of_another_group_does_not_count() -> None:
    other = msgspec.structs.replace(GENESIS, nonce=b"another group...")
    assert group_id(msgspec.msgpack.encode(other)) != a_register("ada", GENESIS).group
    register = a_register("ada", GENESIS)
    block = a_block(other, "ada")
    with pytest.raises(RemoteProtocolError):
        register.receive(BOB, a_vote("bob", block, 1, "finalize"), 0.0)


def test_votes_without_a_signature_do_not_count() -> None:
    register = a_register("cyd", GENESIS)
    for name in ("ada", "bob"):
        with pytest.raises(RemoteProtocolError):
            register.receive(DAN, a_vote(name, FIRST, 1, "finalize", signed_by="dan"), 0.0)
    assert not register._round.votes


def test_a_second_block_for_one_view_convicts_its_leader_and_gets_no_vote() -> None:
    register = a_register("bob", GENESIS)
    for text in ("this", "that"):
        body = a_body(text)
        block = a_block(GENESIS, "ada", body)
        vote = a_vote("ada", block, 1, "notarize")
        register.receive(ADA, Proposal(block, body, 0, (), vote), 0.0)
    assert list(register.equivocations) == [ADA]
    (pledged,) = register.pledged()
    assert pledged[1] == a_body("this")


def test_a_block_that_replaces_two_voters_is_a_lie() -> None:
    register = a_register("bob", GENESIS)
    block = a_block(GENESIS, "ada", voters=peers("ada", "dan", "eve"))
    proposal = Proposal(block, Body(), 0, (), a_vote("ada", block, 1, "notarize"))
    with pytest.raises(RemoteProtocolError):
        register.receive(ADA, proposal, 0.0)
    assert not register.pledged()


def test_a_fresh_block_in_a_later_view_needs_a_reason() -> None:
    register = a_register("cyd", GENESIS)
    register.receive(BOB, a_certificate(("ada", "bob"), FIRST, 1, "notarize", GENESIS.voters), 0.0)
    assert register.view == 2
    block = a_block(GENESIS, "bob")
    proposal = Proposal(block, Body(), 0, (), a_vote("bob", block, 2, "notarize"))
    register.receive(BOB, proposal, 0.0)
    assert not register.pledged()
    assert register.refused["proposal without justification"] == 1


def test_an_old_block_does_not_bring_the_head_back() -> None:
    history = a_history(3)
    register = a_register("ada", GENESIS)
    for handover in history:
        register.receive(BOB, Decided(b"", (), handover, Body()), 0.0)
    register.receive(BOB, Decided(b"", (), history[0], Body()), 0.0)
    assert register.head.epoch == 3


def test_the_voters_of_yesterday_decide_nothing_today() -> None:
    (handover,) = a_history(1)
    register = a_register("ada", GENESIS)
    register.receive(BOB, Decided(b"", (), handover, Body()), 0.0)
    block = a_block(GENESIS, "bob", after=handover.header)
    old = a_handover(("bob", "cyd"), block, GENESIS.voters)
    with pytest.raises(RemoteProtocolError):
        register.receive(BOB, Decided(b"", (handover,), old, Body()), 0.0)
    assert register.head.epoch == 1


def test_one_liar_cannot_fill_the_memory() -> None:
    genesis = a_genesis(4, "byzantine")
    register = a_register("ada", genesis)
    block = a_block(genesis, "dan")
    for view in range(2000):
        for kind in ("notarize", "nullify", "finalize"):
            register.receive(DAN, a_vote("dan", block, view, kind), 0.0)
    assert len(register._round.votes) < 100
    assert sum(len(said) for said in register._round.votes.values()) < 100


def test_a_peer_that_keeps_asking_by_old_votes_is_answered_now_and_then() -> None:
    (handover,) = a_history(1)
    register = a_register("ada", GENESIS)
    register.receive(BOB, Decided(b"", (), handover, Body()), 0.0)
    answers = [
        register.receive(PeerId(CYD), a_vote("cyd", FIRST, 1, "nullify"), 0.004 * number)
        for number in range(100)
    ]
    # Not while the vote may only be late; then once, and again after a while.
    assert sum(len(each) for each in answers[:50]) == 0
    assert sum(len(each) for each in answers) == 1


# --- the root's word -----------------------------------------------------------------------------


def test_the_root_brings_a_group_back_that_has_lost_its_quorum() -> None:
    register = a_register("ada", GENESIS)
    register.want(False, 0.0)
    header: Header = register.recovery_header((ADA,))
    register.recover(seal_recovery(header), 0.0)
    assert register.head.epoch == 2**32
    register.want(True, 0.0)
    assert register.head.epoch == 2**32 + 1
    other = a_register("bob", GENESIS)
    other.want(False, 0.0)
    other.receive(ADA, register.decided(0), 0.0)
    assert other.head == register.head


def test_nobody_else_does() -> None:
    register = a_register("ada", GENESIS)
    header = register.recovery_header((ADA,))
    forged = msgspec.msgpack.encode(header) + bytes(64)
    with pytest.raises(RemoteProtocolError):
        register.recover(forged, 0.0)
    assert register.head.epoch == 0
