"""Bugs that were put in on purpose, and the check that must catch each.

A check that has never failed shows nothing. So each entry of `PLANTED` says what is wrong, plants
it for a while in this process, never in the product, and names the check; `test_planted.py` holds
that the check catches the bug and passes without it. Bugs in other parts live beside their own
tests and are listed in `ELSEWHERE`; those of whole meshes are in `agreement/planted.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from meshnode.errors import RemoteProtocolError
from meshnode.messages import Body, Decided, Proposal, QuorumCertificate, Vote
from meshnode.protocol import Effect, Persist
from meshnode.protocol import consensus as consensus_module
from meshnode.protocol import quorum as quorum_module
from meshnode.protocol.consensus import Head, Register, _Round
from meshnode.protocol.quorum import Faults, Lineage, quorum_of
from tests.protocol.consensus.checker import Checker, Model
from tests.protocol.consensus.parts import (
    Violation,
    a_block,
    a_certificate,
    a_genesis,
    a_handover,
    a_register,
    a_vote,
    peer,
    peers,
)
from tests.protocol.consensus.swarm import swarm

Plant = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Planted:
    """One bug."""

    name: str
    wrong: str
    plant: Plant
    caught_by: Callable[[], object]
    """Raises `Violation`, if the bug is there."""


# --- checks --------------------------------------------------------------------------------------

AGREES = frozenset({"S1", "S3"})
"""Without S2: wrong quorums must show in what they lead to."""


def model_of_crashes() -> None:
    """Three voters, two views, one crash, every order."""
    Checker(Model(states_max=40_000)).run()


def model_of_agreement() -> None:
    """Four voters, one of them a liar, of whom only the heads are looked at."""
    Checker(Model("byzantine", 4, crashes=0, liar="ada", states_max=15_000, check=AGREES)).run()


def model_with_a_lying_leader() -> None:
    """Four voters; the leader of the first view signs whatever it likes."""
    Checker(Model("byzantine", 4, crashes=0, liar="ada", states_max=15_000)).run()


def bad_weather() -> None:
    """Thirty storms."""
    swarm(range(30))


def _must_refuse(register: Register, message: Decided | QuorumCertificate, what: str) -> None:
    before = register.head
    try:
        register.receive(peer("dan"), message, 0.0)
    except RemoteProtocolError:
        return
    if register.head != before or register.view > 1:
        raise Violation(f"S2: {what} counts as proof")


def one_ballot_twice() -> None:
    """One voter's ballot, again and again, is not a quorum."""
    genesis = a_genesis(3)
    block = a_block(genesis, "dan")
    for kind in ("notarize", "finalize"):
        once = a_certificate(("ada",), block, 1, kind, genesis.voters)
        twice = QuorumCertificate(
            once.group, once.epoch, once.view, once.kind, once.block, once.ballots * 2
        )
        _must_refuse(a_register("bob", genesis), twice, "one ballot twice")


def the_voters_of_yesterday() -> None:
    """Cyd was replaced by dan; bob and cyd decide nothing any more."""
    genesis = a_genesis(3)
    first = a_block(genesis, "ada", voters=peers("ada", "bob", "dan"))
    handover = a_handover(("ada", "bob"), first, genesis.voters)
    register = a_register("ada", genesis)
    register.receive(peer("bob"), Decided(b"", (), handover, Body()), 0.0)
    second = a_handover(("bob", "cyd"), a_block(genesis, "bob", after=first), genesis.voters)
    _must_refuse(register, Decided(b"", (handover,), second, Body()), "a vote of old voters")


def two_new_voters_at_once() -> None:
    """A leader that wants to replace two of three gets no vote."""
    genesis = a_genesis(3)
    register = a_register("bob", genesis)
    block = a_block(genesis, "ada", voters=peers("ada", "dan", "eve"))
    proposal = Proposal(block, Body(), 0, (), a_vote("ada", block, 1, "notarize"))
    try:
        register.receive(peer("ada"), proposal, 0.0)
    except RemoteProtocolError:
        return
    if register.pledged():
        raise Violation("S9: a block that replaces two of three voters is voted for")


def a_block_out_of_nowhere() -> None:
    """One block was notarized in the first view; the second leader proposes another."""
    genesis = a_genesis(4, "byzantine")
    register = a_register("cyd", genesis)
    block = a_block(genesis, "ada")
    shown = a_certificate(("ada", "bob", "dan"), block, 1, "notarize", genesis.voters)
    register.receive(peer("ada"), shown, 0.0)
    other = a_block(genesis, "bob")
    proposal = Proposal(other, Body(), 0, (), a_vote("bob", other, 2, "notarize"))
    register.receive(peer("bob"), proposal, 0.0)
    if register.pledged():
        raise Violation("S1: a block is voted for although another may be final")


def forged_votes() -> None:
    """Dan signs for all the others."""
    genesis = a_genesis(3)
    register = a_register("cyd", genesis)
    for name in ("ada", "bob"):
        forged = a_vote(name, a_block(genesis, "ada"), 1, "nullify", signed_by="dan")
        try:
            register.receive(peer("dan"), forged, 0.0)
        except RemoteProtocolError:
            continue
    if register.view > 1:
        raise Violation("S2: votes that their voters have not signed end a view")


def lost_disk() -> None:
    """Bob is named a voter by the first block it ever hears of: it has lost its disk."""
    genesis = a_genesis(3)
    register = a_register("bob", genesis)
    block = a_block(genesis, "ada")
    handover = a_handover(("ada", "bob"), block, genesis.voters)
    register.receive(peer("ada"), Decided(b"", (), handover, Body()), 0.0)
    register.want(True, 0.0)
    register.tick(60.0)
    if register._round.casts:
        raise Violation("S10: a voter that has lost what it said says more")


# --- bugs ----------------------------------------------------------------------------------------


def _one_less(voters: int, faults: Faults) -> int:
    return quorum_of(voters, faults) - 1


@contextmanager
def quorum_minus_one() -> Iterator[None]:
    with (
        patch.object(consensus_module, "quorum_of", _one_less),
        patch.object(quorum_module, "quorum_of", _one_less),
    ):
        yield


def _effects_become(change: Callable[[list[Effect]], list[Effect]]) -> Plant:
    """A bug in what a register hands to its driver."""

    def plant() -> AbstractContextManager[object]:
        advance = Register._advance

        def changed(self: Register, effects: list[Effect], now: float) -> list[Effect]:
            return change(advance(self, effects, now))

        return patch.object(Register, "_advance", changed)

    return plant


def _without_persist(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if not isinstance(effect, Persist)]


def _persist_last(effects: list[Effect]) -> list[Effect]:
    return sorted(effects, key=lambda effect: isinstance(effect, Persist))


def restart_without_votes() -> AbstractContextManager[object]:
    restore = Register._restore

    def forget(self: Register, data: bytes) -> None:
        restore(self, data)
        self._round = _Round(self._round.epoch, self._round.voters)

    return patch.object(Register, "_restore", forget)


def nullify_lock_forgotten() -> AbstractContextManager[object]:
    step = Register._step

    def forgetful(self: Register, said: list[Effect], now: float) -> bool:
        this = self._round
        for view, kind in tuple(this.casts):
            if kind == "nullify" and view < this.view:
                del this.casts[view, kind]
        return step(self, said, now)

    return patch.object(Register, "_step", forgetful)


def nullify_after_finalize() -> AbstractContextManager[object]:
    """Never leaves a view on a notarization alone, and gives it up in the end all the same."""
    should = Register._should_give_up

    def gives_up(self: Register, now: float) -> bool:
        finalize = self._round.casts.pop((self._round.view - 1, "finalize"), None)
        if finalize is not None and (finalize.view, "nullify") not in self._round.casts:
            self._cast(self._late, finalize.view, "nullify", quorum_module.NO_BLOCK)  # type: ignore[attr-defined]
        return should(self, now)

    step = Register._step

    def noting(self: Register, said: list[Effect], now: float) -> bool:
        self._late = said  # type: ignore[attr-defined]
        try:
            return step(self, said, now)
        finally:
            del self._late  # type: ignore[attr-defined]

    @contextmanager
    def both() -> Iterator[None]:
        with (
            patch.object(Register, "_should_give_up", gives_up),
            patch.object(Register, "_step", noting),
        ):
            yield

    return both()


def no_justification_needed() -> AbstractContextManager[object]:
    return patch.object(Register, "_is_justified", lambda self, proposal, block: True)


@contextmanager
def fresh_block_instead_of_carrying_on() -> Iterator[None]:
    propose = Register._propose

    def afresh(self: Register, said: list[Effect], now: float) -> bool:
        with (
            patch.object(_Round, "notarized", lambda self: None),
            patch.object(Register, "_justification", lambda self: ()),
        ):
            return propose(self, said, now)

    with patch.object(Register, "_propose", afresh):
        yield


def second_vote_in_a_view() -> AbstractContextManager[object]:
    on_proposal = Register._on_proposal

    def obliging(self: Register, proposal: Proposal, now: float) -> None:
        known = self._round.proposals.get(proposal.vote.view)
        if known is not None and known.vote.block != proposal.vote.block:
            del self._round.proposals[proposal.vote.view]
            self._round.casts.pop((proposal.vote.view, "notarize"), None)
        on_proposal(self, proposal, now)

    return patch.object(Register, "_on_proposal", obliging)


@contextmanager
def duplicate_ballots() -> Iterator[None]:
    check = quorum_module.certificate_is_valid

    def lax(
        certificate: QuorumCertificate,
        voters: tuple[str, ...],
        faults: Faults,
        verify: quorum_module.Verify,
    ) -> bool:
        if len(certificate.ballots) < quorum_of(len(voters), faults):
            return False
        return all(
            check(
                QuorumCertificate(
                    certificate.group,
                    certificate.epoch,
                    certificate.view,
                    certificate.kind,
                    certificate.block,
                    (type(ballot)(0, ballot.signature),),
                ),
                (voters[ballot.voter],),
                faults,
                verify,
            )
            for ballot in certificate.ballots
        )

    with (
        patch.object(consensus_module, "certificate_is_valid", lax),
        patch.object(quorum_module, "certificate_is_valid", lax),
    ):
        yield


def old_voters_decide() -> AbstractContextManager[object]:
    return patch.object(Lineage, "voters_of", lambda self, epoch: self.genesis.voters)


@contextmanager
def head_goes_back() -> Iterator[None]:
    def follow(self: Register, sender: str, decided: Decided, now: float) -> list[Effect]:
        if decided.newest is None or decided.body is None:
            return []
        newest = decided.newest
        if newest.header.epoch != self.head.epoch:
            self.head = Head(newest.header, decided.body, newest)
            self._round = _Round(newest.header.epoch + 1, newest.header.voters)
            self._dirty = True
        return self._advance([], now)

    with patch.object(Register, "_on_decided", follow):
        yield


def any_change_of_voters() -> AbstractContextManager[object]:
    return patch.object(consensus_module, "may_follow", lambda old, new, faults: True)


def unsigned_votes() -> AbstractContextManager[object]:
    def trusting(vote: Vote, voters: tuple[str, ...], verify: quorum_module.Verify) -> bool:
        return vote.voter in voters

    return patch.object(consensus_module, "vote_is_valid", trusting)


def speaks_without_memory() -> AbstractContextManager[object]:
    return patch.object(Register, "votes", property(lambda self: self.own in self._round.voters))


def never_says_it_again() -> AbstractContextManager[object]:
    resend = Register._resend

    def silent(self: Register, now: float) -> list[Effect]:
        resend(self, now)
        return []

    return patch.object(Register, "_resend", silent)


def spins_after_finalizing() -> AbstractContextManager[object]:
    """`resend_at` is not moved on: `tick` is due again at once, for ever."""
    resend = Register._resend

    def stuck(self: Register, now: float) -> list[Effect]:
        effects = resend(self, now)
        self._round.resend_at = now
        return effects

    return patch.object(Register, "_resend", stuck)


# --- the table -----------------------------------------------------------------------------------

PLANTED: tuple[Planted, ...] = (
    Planted("quorum-1", "a quorum is one voter too small",
            quorum_minus_one, model_of_agreement),
    Planted("no persist", "votes are sent and never stored",
            _effects_become(_without_persist), model_of_crashes),
    Planted("persist after send", "votes are stored after they are sent",
            _effects_become(_persist_last), model_of_crashes),
    Planted("votes not restored", "a voter comes back without what it has stored",
            restart_without_votes, model_of_crashes),
    Planted("nullify lock forgotten", "a view is finalized after it was nullified",
            nullify_lock_forgotten, model_of_crashes),
    Planted("finalize lock forgotten", "a view is nullified after it was finalized",
            nullify_after_finalize, model_of_crashes),
    Planted("no justification", "a proposal need not show why earlier views do not count",
            no_justification_needed, a_block_out_of_nowhere),
    Planted("fresh block", "a leader proposes its own block although one is notarized",
            fresh_block_instead_of_carrying_on, bad_weather),
    Planted("second vote", "two blocks of one view get a vote",
            second_vote_in_a_view, model_with_a_lying_leader),
    Planted("duplicate ballots", "one voter's ballot counts as often as it is shown",
            duplicate_ballots, one_ballot_twice),
    Planted("old voters", "voters that were replaced go on deciding",
            old_voters_decide, the_voters_of_yesterday),
    Planted("head goes back", "an old block replaces a newer one",
            head_goes_back, bad_weather),
    Planted("two voters at once", "one block may replace any number of voters",
            any_change_of_voters, two_new_voters_at_once),
    Planted("unsigned votes", "nobody looks at a vote's signature",
            unsigned_votes, forged_votes),
    Planted("no memory", "a voter that has lost its disk votes again",
            speaks_without_memory, lost_disk),
    Planted("said once", "nothing is said again, so what is lost is lost",
            never_says_it_again, bad_weather),
    Planted("spin", "a timer is due again at once",
            spins_after_finalizing, bad_weather),
)  # fmt: skip

ELSEWHERE: dict[str, str] = {
    "CountsFromReceipt": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "CountsFromTheLastHeartbeat": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "ForgetsDrift": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "NeedsOneLess": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "DoesNotWaitAfterStart": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "DoesNotWaitWithNewVoters": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "ForgetsToWithhold": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "WithholdsFromTheLastOnly": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "WithholdsNothingForNewVoters": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "ForgetsItsPromises": "tests/protocol/test_lease.py::test_a_bug_in_a_core_is_found",
    "CountsPromisesOfAnyEpoch": "tests/protocol/test_lease.py::test_a_bug_in_a_caller_is_found",
    "ForgetsItsVotesInACrash": "tests/protocol/test_lease.py::test_a_bug_in_a_caller_is_found",
}  # fmt: skip
"""Planted bugs of other parts, and the test that catches each."""
