"""Quorums, who may follow whom, and what counts as proof."""

from __future__ import annotations

from itertools import combinations

import msgspec
import pytest

from meshnode.errors import RemoteProtocolError
from meshnode.messages import Ballot, Body, Decided, Handover, Header, QuorumCertificate
from meshnode.protocol.quorum import (
    NO_BLOCK,
    Faults,
    Lineage,
    body_hash,
    certificate_is_valid,
    first_block,
    group_id,
    header_hash,
    may_follow,
    quorum_of,
    vote_is_valid,
)
from tests.protocol.consensus.parts import (
    NAMES,
    a_block,
    a_body,
    a_certificate,
    a_genesis,
    a_handover,
    a_vote,
    open_recovery,
    peers,
    seal_recovery,
    verify,
)

GENESIS = a_genesis(3)
GROUP = group_id(msgspec.msgpack.encode(GENESIS))
FIRST = first_block(GENESIS, GROUP)
BLOCK = a_block(GENESIS, "ada")
VOTERS = GENESIS.voters
LINEAGE = Lineage(FIRST, "crash")


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "sizes"),
    [
        ("crash", [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]),
        ("byzantine", [1, 2, 3, 3, 4, 5, 5, 6, 7, 7]),
    ],
)
def test_how_many_must_agree(faults: Faults, sizes: list[int]) -> None:
    assert [quorum_of(voters, faults) for voters in range(1, 11)] == sizes


@pytest.mark.parametrize("voters", range(1, 8))
@pytest.mark.parametrize("faults", ["crash", "byzantine"])
def test_any_two_quorums_share_a_voter_that_is_not_faulty(voters: int, faults: Faults) -> None:
    liars = 0 if faults == "crash" else (voters - 1) // 3
    quorums = list(combinations(range(voters), quorum_of(voters, faults)))
    assert all(len(set(one) & set(other)) > liars for one in quorums for other in quorums)


@pytest.mark.parametrize("voters", range(1, 11))
def test_a_quorum_is_left_when_as_many_fail_as_are_tolerated(voters: int) -> None:
    assert quorum_of(voters, "crash") <= voters - (voters - 1) // 2
    assert quorum_of(voters, "byzantine") <= voters - (voters - 1) // 3


# --- who may follow whom -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "old", "new", "may"),
    [
        ("crash", "abc", "abc", True),
        ("crash", "abc", "cab", True),
        ("crash", "abc", "abd", True),
        ("crash", "abc", "ade", False),
        ("crash", "abc", "def", False),
        ("crash", "abc", "ab", False),
        ("crash", "abc", "abcd", False),
        ("crash", "abc", "abcde", True),
        ("crash", "abc", "abdef", False),
        ("crash", "abcde", "abc", True),
        ("crash", "abcde", "abf", False),
        ("crash", "a", "b", True),
        ("crash", "a", "abc", True),
        ("crash", "ab", "ac", True),
        ("crash", "ab", "abcd", False),
        ("crash", "abc", "", False),
        ("crash", "abc", "aab", False),
        ("byzantine", "abcd", "abce", True),
        ("byzantine", "abcd", "abef", False),
        ("byzantine", "abcd", "abcdefg", True),
        ("byzantine", "abcdefg", "abcd", True),
        ("byzantine", "abcd", "abcde", False),
        ("byzantine", "a", "abcd", True),
    ],
)
def test_one_replaced_or_as_many_more_or_less_as_are_useful(
    faults: Faults, old: str, new: str, may: bool
) -> None:
    assert may_follow(tuple(old), tuple(new), faults) is may


# --- votes and certificates ----------------------------------------------------------------------


def test_a_vote_counts_from_its_voter_only() -> None:
    vote = a_vote("ada", BLOCK, 1, "notarize")
    assert vote_is_valid(vote, VOTERS, verify)
    assert not vote_is_valid(vote, VOTERS[1:], verify)
    for change in (
        {"voter": VOTERS[1]},
        {"view": 2},
        {"epoch": 2},
        {"kind": "finalize"},
        {"group": "b" * 32},
        {"block": bytes([1]) * 32},
    ):
        assert not vote_is_valid(msgspec.structs.replace(vote, **change), VOTERS, verify)


def test_a_nullification_names_no_block_and_the_others_do() -> None:
    nullify = a_vote("ada", BLOCK, 1, "nullify")
    assert nullify.block == NO_BLOCK
    assert vote_is_valid(nullify, VOTERS, verify)
    assert not vote_is_valid(
        msgspec.structs.replace(nullify, kind="notarize"), VOTERS, lambda *signed: True
    )
    assert not vote_is_valid(
        msgspec.structs.replace(nullify, block=header_hash(BLOCK)), VOTERS, lambda *signed: True
    )


GOOD = a_certificate(("ada", "cyd"), BLOCK, 1, "finalize", VOTERS)
FIRST_BALLOT, SECOND_BALLOT = GOOD.ballots
WRONG: dict[str, dict[str, object]] = {
    "too few": {"ballots": (FIRST_BALLOT,)},
    "one twice": {"ballots": (FIRST_BALLOT, FIRST_BALLOT)},
    "out of order": {"ballots": (SECOND_BALLOT, FIRST_BALLOT)},
    "swapped places": {
        "ballots": (Ballot(0, SECOND_BALLOT.signature), Ballot(2, FIRST_BALLOT.signature))
    },
    "nobody's place": {"ballots": (FIRST_BALLOT, Ballot(3, SECOND_BALLOT.signature))},
    "forged": {"ballots": (FIRST_BALLOT, Ballot(1, bytes(64)))},
    "one forged beside a quorum": {"ballots": (FIRST_BALLOT, Ballot(1, bytes(64)), SECOND_BALLOT)},
    "another block": {"block": bytes([1]) * 32},
    "another view": {"view": 2},
    "another epoch": {"epoch": 2},
    "another kind": {"kind": "notarize"},
    "another group": {"group": "b" * 32},
    "no block": {"block": NO_BLOCK},
}


def test_a_certificate_of_a_quorum_is_valid() -> None:
    assert certificate_is_valid(GOOD, VOTERS, "crash", verify)
    assert not certificate_is_valid(GOOD, VOTERS, "byzantine", verify)
    assert not certificate_is_valid(GOOD, VOTERS[::-1], "crash", verify)


@pytest.mark.parametrize("change", WRONG)
def test_a_certificate_that_is_not_quite_right_is_not(change: str) -> None:
    wrong: QuorumCertificate = msgspec.structs.replace(GOOD, **WRONG[change])
    assert not certificate_is_valid(wrong, VOTERS, "crash", verify)


# --- who decided which epoch ---------------------------------------------------------------------


def a_history(length: int) -> tuple[Handover, ...]:
    """Blocks that replace the third voter, each decided by the first two."""
    voters, last, history = VOTERS, None, []
    for place in range(length):
        third = NAMES[3 + place % 2]
        block = a_block(GENESIS, "ada", after=last, voters=peers("ada", "bob", third))
        history.append(a_handover(("ada", "bob"), block, voters))
        voters, last = block.voters, block
    return tuple(history)


def followed(lineage: Lineage, *handovers: Handover) -> Lineage:
    return lineage.follow(Decided(b"", handovers, None, None), verify, open_recovery)


def test_each_epoch_is_decided_by_the_voters_that_the_one_before_names() -> None:
    history = a_history(3)
    lineage = followed(LINEAGE, *history)
    assert lineage.anchor == 3
    assert [lineage.voters_of(epoch) for epoch in (1, 2, 3, 4, 99)] == [
        VOTERS,
        *(each.header.voters for each in history),
        history[-1].header.voters,
    ]
    assert lineage.after(1) == history[1:]


def test_a_history_may_come_in_pieces_and_overlap() -> None:
    history = a_history(4)
    pieces = followed(followed(LINEAGE, *history[:2]), *history[1:])
    assert pieces == followed(LINEAGE, *history)
    assert followed(pieces, *history) == pieces


def test_a_history_with_a_gap_proves_nothing() -> None:
    history = a_history(3)
    with pytest.raises(RemoteProtocolError, match="quorum"):
        followed(LINEAGE, a_handover(("ada", "dan"), history[1].header, history[0].header.voters))


def test_a_newest_block_that_changes_nobody_stays_out_of_the_history() -> None:
    decided = Decided(b"", (), a_handover(("ada", "bob"), BLOCK, VOTERS), Body())
    assert LINEAGE.follow(decided, verify, open_recovery) == LINEAGE


def test_the_newest_block_needs_its_body() -> None:
    handover = a_handover(("ada", "bob"), BLOCK, VOTERS)
    for body in (None, a_body("another")):
        with pytest.raises(RemoteProtocolError, match="body"):
            LINEAGE.follow(Decided(b"", (), handover, body), verify, open_recovery)


PROVEN = a_handover(("ada", "bob"), BLOCK, VOTERS)
assert PROVEN.certificate is not None
UNPROVEN: dict[str, Handover] = {
    "no proof": Handover(BLOCK, None),
    "only notarized": Handover(BLOCK, a_certificate(("ada", "bob"), BLOCK, 1, "notarize", VOTERS)),
    "another block's": Handover(a_block(GENESIS, "bob"), PROVEN.certificate),
    "another epoch's": Handover(msgspec.structs.replace(BLOCK, epoch=2), PROVEN.certificate),
    "another group's": Handover(msgspec.structs.replace(BLOCK, group="b" * 32), PROVEN.certificate),
    "a minority's": a_handover(("ada",), BLOCK, VOTERS),
    "two replaced": a_handover(
        ("ada", "bob"), a_block(GENESIS, "ada", voters=peers("ada", "dan", "eve")), VOTERS
    ),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_a_block_is_not_taken_without_proof(name: str) -> None:
    with pytest.raises(RemoteProtocolError):
        followed(LINEAGE, UNPROVEN[name])


def test_a_block_from_before_the_last_change_is_not_news() -> None:
    history = a_history(2)
    lineage = followed(LINEAGE, *history)
    with pytest.raises(RemoteProtocolError, match="before"):
        lineage.prove(history[0], verify, open_recovery)
    assert lineage.extended(history[0]) == lineage


# --- the root's word -----------------------------------------------------------------------------


def a_recovery() -> Header:
    voters = peers("eve")
    return Header(GROUP, 2**32, header_hash(FIRST), voters[0], voters, body_hash(Body()))


def test_the_root_may_name_whom_it_likes() -> None:
    header = a_recovery()
    lineage = followed(LINEAGE, Handover(header, None, seal_recovery(header)))
    assert lineage.voters_of(2**32 + 1) == header.voters
    assert lineage.voters_of(2**32) == VOTERS


def test_a_recovery_that_changes_nobody_is_remembered_all_the_same() -> None:
    header = msgspec.structs.replace(a_recovery(), voters=VOTERS)
    handover = Handover(header, None, seal_recovery(header))
    assert followed(LINEAGE, handover).handovers == (handover,)


def test_a_recovery_is_of_one_block_and_by_the_root() -> None:
    header = a_recovery()
    other = msgspec.structs.replace(header, voters=peers("dan"))
    for handover in (
        Handover(other, None, seal_recovery(header)),
        Handover(header, PROVEN.certificate, seal_recovery(header)),
        Handover(header, None, seal_recovery(header)[:-1] + b"\0"),
    ):
        with pytest.raises(RemoteProtocolError):
            followed(LINEAGE, handover)
