"""Hypothesis plays the network, the clock and the power supply; then it plays a liar."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from meshnode.errors import RemoteProtocolError
from meshnode.messages import (
    Ballot,
    Body,
    Control,
    Decided,
    GetDecided,
    Handover,
    Header,
    Proposal,
    QuorumCertificate,
    Vote,
    decode,
    encode,
)
from meshnode.protocol import Effect, Persist, Send
from meshnode.protocol.consensus import VIEWS_AHEAD_MAX, Register
from meshnode.protocol.quorum import NO_BLOCK, body_hash, group_id, header_hash, vote_bytes
from tests.protocol.consensus.parts import (
    NAMES,
    Said,
    Wishes,
    a_block,
    a_body,
    a_genesis,
    a_register,
    in_words,
    name_of,
    peer,
    signature_of,
)
from tests.protocol.consensus.promises import Promises

IN_FLIGHT_MAX = 400
"""What a link holds; more is lost."""


class Group(RuleBasedStateMachine):
    """Three or four honest voters, and everything that may happen to them."""

    @initialize(count=st.sampled_from([3, 4]))
    def begin(self, count: int) -> None:
        faults = "crash" if count == 3 else "byzantine"
        self.genesis = a_genesis(count, faults)  # type: ignore[arg-type]
        self.promises = Promises(self.genesis)
        self.names = NAMES[:count]
        self.now = 0.0
        self.disks: dict[str, bytes | None] = dict.fromkeys(self.names)
        self.in_flight: list[tuple[str, str, Said]] = []
        self.registers: dict[str, Register] = {}
        for name in self.names:
            self.registers[name] = a_register(name, self.genesis, Wishes(a_body(name)))
            self.do(name, self.registers[name].want(False, 0.0))

    def do(self, name: str, effects: list[Effect], steps: int | None = None) -> None:
        """Perform the effects, or the first `steps` of them."""
        for effect in effects[:steps]:
            match effect:
                case Persist():
                    self.disks[name] = effect.data
                case Send():
                    message: Said = effect.message  # type: ignore[assignment]
                    self.promises.note(message)
                    if len(self.in_flight) < IN_FLIGHT_MAX:
                        self.in_flight.append((name, name_of(effect.peer), message))

    @rule(place=st.integers(0, 3))
    def want(self, place: int) -> None:
        name = self.names[place % len(self.names)]
        self.do(name, self.registers[name].want(True, self.now))

    @precondition(lambda self: self.in_flight)
    @rule(place=st.integers(0, IN_FLIGHT_MAX), stays=st.booleans())
    def deliver(self, place: int, stays: bool) -> None:
        """Anything in flight arrives, and perhaps arrives again."""
        place %= len(self.in_flight)
        sender, to, message = self.in_flight[place]
        if not stays:
            del self.in_flight[place]
        self.do(to, self.registers[to].receive(peer(sender), message, self.now))

    @precondition(lambda self: self.in_flight)
    @rule()
    def deliver_all(self) -> None:
        """A moment in which nothing goes wrong, or no run would get far."""
        arriving, self.in_flight = self.in_flight, []
        for sender, to, message in arriving:
            self.do(to, self.registers[to].receive(peer(sender), message, self.now))

    @precondition(lambda self: self.in_flight)
    @rule(place=st.integers(0, IN_FLIGHT_MAX))
    def lose(self, place: int) -> None:
        del self.in_flight[place % len(self.in_flight)]

    @rule(place=st.integers(0, 3), seconds=st.sampled_from([0.01, 0.5, 1.0, 3.0]))
    def wait(self, place: int, seconds: float) -> None:
        name = self.names[place % len(self.names)]
        self.now += seconds
        register = self.registers[name]
        self.do(name, register.tick(self.now))
        later = register.deadline()
        assert later is None or later > self.now, f"{name} is due again at once"

    @rule(place=st.integers(0, 3))
    def crash(self, place: int) -> None:
        self.come_back(self.names[place % len(self.names)])

    @rule(place=st.integers(0, 3), steps=st.integers(0, 4))
    def crash_at_work(self, place: int, steps: int) -> None:
        """The power goes between two effects."""
        name = self.names[place % len(self.names)]
        self.do(name, self.registers[name].tick(self.now + 10.0), steps)
        self.come_back(name)

    def come_back(self, name: str) -> None:
        self.registers[name] = a_register(
            name, self.genesis, Wishes(a_body(name)), journal=self.disks[name]
        )
        self.do(name, self.registers[name].tick(self.now))

    @invariant()
    def promises_are_kept(self) -> None:
        for name, register in getattr(self, "registers", {}).items():
            self.promises.check(name, register)


TestGroup = Group.TestCase
TestGroup.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# --- hostile input -------------------------------------------------------------------------------

GENESIS = a_genesis(4, "byzantine")
GROUP = group_id(msgspec.msgpack.encode(GENESIS))
LIAR = "dan"
BLOCKS = tuple(
    a_block(GENESIS, name, a_body(text)) for name in ("ada", LIAR) for text in ("this", "that")
)
BODIES = (Body(), a_body("this"), a_body("that"))
KINDS = ("notarize", "nullify", "finalize")

signers = st.sampled_from([LIAR, "mort"])
voters = st.sampled_from([*NAMES[:4], "mort"]).map(peer)
epochs = st.sampled_from([0, 1, 1, 1, 1, 2, 3, 2**40])
views = st.one_of(st.integers(0, 4), st.sampled_from([VIEWS_AHEAD_MAX, 2**31 - 1]))
groups = st.sampled_from([GROUP, GROUP, GROUP, "b" * 32])
hashes = st.sampled_from([*(header_hash(block) for block in BLOCKS), NO_BLOCK, bytes([1]) * 32])


@st.composite
def votes(draw: st.DrawFn) -> Vote:
    """A liar's true votes, and what it would have others say."""
    group, epoch, view = draw(groups), draw(epochs), draw(views)
    kind = draw(st.sampled_from(KINDS))
    block = NO_BLOCK if kind == "nullify" and draw(st.booleans()) else draw(hashes)
    signer = peer(draw(signers))
    voter = signer if draw(st.booleans()) else draw(voters)
    signature = signature_of(signer, vote_bytes(group, epoch, view, kind, block))  # type: ignore[arg-type]
    return Vote(group, epoch, view, kind, block, voter, signature)  # type: ignore[arg-type]


@st.composite
def certificates(draw: st.DrawFn) -> QuorumCertificate:
    """Made of a liar's own ballots, in whatever places."""
    vote = draw(votes())
    places = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    ballots = tuple(Ballot(place, vote.signature) for place in places)
    return QuorumCertificate(vote.group, vote.epoch, vote.view, vote.kind, vote.block, ballots)


headers = st.builds(
    msgspec.structs.replace,
    st.sampled_from(BLOCKS),
    epoch=epochs,
    group=groups,
    previous=st.sampled_from([BLOCKS[0].previous, NO_BLOCK]),
    proposer=voters,
    voters=st.lists(voters, min_size=1, max_size=5).map(tuple),
    body=st.sampled_from([body_hash(body) for body in BODIES]),
)
some_headers = st.one_of(st.sampled_from(BLOCKS), headers)
handovers = st.builds(
    Handover,
    some_headers,
    st.none() | certificates(),
    st.none() | st.binary(max_size=80) | st.just(bytes(64)),
)


@st.composite
def proposals(draw: st.DrawFn) -> Proposal:
    header: Header = draw(some_headers)
    vote = draw(votes())
    if draw(st.booleans()):
        named = header_hash(header)
        data = vote_bytes(GROUP, 1, vote.view, "notarize", named)
        vote = Vote(GROUP, 1, vote.view, "notarize", named, peer(LIAR),
                    signature_of(peer(LIAR), data))  # fmt: skip
    return Proposal(
        header,
        draw(st.sampled_from(BODIES)),
        draw(views),
        tuple(draw(st.lists(certificates(), max_size=3))),
        vote,
    )


decided = st.builds(
    Decided,
    st.binary(max_size=8),
    st.lists(handovers, max_size=3).map(tuple),
    st.none() | handovers,
    st.none() | st.sampled_from(BODIES),
)
questions = st.builds(GetDecided, groups, epochs, epochs)
lies = st.one_of(votes(), certificates(), proposals(), decided, questions)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    said=st.lists(st.tuples(st.sampled_from([LIAR, "mort"]), lies), max_size=30),
    is_at_work=st.booleans(),
)
def test_a_liar_and_a_stranger_achieve_nothing(
    said: list[tuple[str, Any]], is_at_work: bool
) -> None:
    register = a_register("bob", GENESIS)
    register.want(is_at_work, 0.0)
    promises = Promises(GENESIS, liars=frozenset({LIAR}))
    for now, (sender, lie) in enumerate(said):
        heard: Any = decode(encode(lie), Control)  # type: ignore[arg-type]
        try:
            effects = register.receive(peer(sender), heard, float(now))
        except RemoteProtocolError:
            effects = []
        for effect in effects:
            if isinstance(effect, Send):
                promises.note(effect.message)  # type: ignore[arg-type]
        assert register.head.epoch == 0, in_words(lie)
        assert not register.lineage.handovers
    for _, kind in register._round.casts:
        assert kind != "finalize", "that takes a notarization, and that takes honest voters"
    assert_bounded(register)


def assert_bounded(register: Register) -> None:
    """What one liar can make a register keep."""
    this = register._round
    assert max((view for view, _ in this.votes), default=0) <= this.view + VIEWS_AHEAD_MAX
    assert len(this.votes) <= 3 * (this.view + VIEWS_AHEAD_MAX + 1)
    assert len(this.proposals) <= this.view + VIEWS_AHEAD_MAX
    assert len(this.blocks) <= len(this.proposals)
    assert not this.certificates
    assert len(register._answered) <= 2 * len(register.voters)
    assert set(register.equivocations) <= {peer(LIAR)}
