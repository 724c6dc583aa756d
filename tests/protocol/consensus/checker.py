"""A breadth-first model checker over real `Register`s: every order, every loss, every delay.

The network is the set of all that was ever said: whoever is to receive something may do so at any
time, again, or never. Time is a choice too: a voter's timers may expire whenever they run. A crash
takes everything but the last `Persist`, and may strike between the effects of one call. A liar is
not a register but a heap of signed messages that may arrive at any time.

What a register does depends on its own state and on what arrives, so each such step runs once and
is then looked up. Two reductions, argued here and proven nowhere:

* states that differ only in which quorum signed a certificate are one;
* a vote that changes nothing yet is held back until it does: a voter hears equal votes together,
  as many of those that were cast as make it act. Until then it acts as if it had none of them, so
  hearing them earlier is no other story.

The search is breadth-first, so the story of a violation is a shortest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import process_time

from meshnode.errors import RemoteProtocolError
from meshnode.messages import Decided, GetDecided, Handover, Proposal, QuorumCertificate, Vote
from meshnode.protocol import Effect, Persist, Send
from meshnode.protocol.consensus import Head, Register, Timing
from meshnode.protocol.quorum import Faults, header_hash
from tests.protocol.consensus.parts import (
    NAMES,
    Said,
    Violation,
    Wishes,
    a_block,
    a_body,
    a_genesis,
    a_register,
    a_vote,
    block_in_words,
    excludes,
    in_words,
    is_proven,
    name_of,
    peer,
    twin,
    votes_in,
)

RESEND, CARRY_ON, TIME_OUT, CRASH = -1, -2, -3, -4
VOTES = -10
"""Events from here downwards are votes heard together, by the bits of their numbers."""
TIMING = Timing(view_s=3.0, view_step_s=0.0, view_max_s=3.0, carry_on_s=2.0, resend_s=1.0)
"""Only the order matters: what a timer of 3 s does includes what those of 1 and 2 s do."""
UNTIL = {RESEND: TIMING.resend_s, CARRY_ON: TIMING.carry_on_s, TIME_OUT: TIMING.view_s}
DOES = {
    RESEND: "says everything again",
    CARRY_ON: "carries on",
    TIME_OUT: "has waited long enough",
    CRASH: "crashes and comes back",
}

NOT_BEHAVIOUR = {"refused", "equivocations", "clock_from", "resend_at", "_answered", "_is_new"}
"""What a register notes that does not change what it does, or only when."""


@dataclass(frozen=True)
class Model:
    """What is explored, and what is checked."""

    faults: Faults = "crash"
    count: int = 3
    views: int = 2
    crashes: int = 1
    liar: str | None = None
    resends: bool = False
    """Whether certificates are told, too. What they show, votes show as well."""
    last_view_ends: bool = False
    """Whether the last view may be nullified. It leads out of the model; what is left to find
    there is a voter that finalizes and nullifies it."""
    states_max: int = 10_000_000
    check: frozenset[str] = frozenset({"S1", "S2", "S3", "S10", "honest"})


@dataclass
class Explored:
    """How much was looked at."""

    states: int
    steps: int
    deepest: int
    executed: int
    cpu_s: float
    is_complete: bool

    def __str__(self) -> str:
        ended = "all" if self.is_complete else "stopped"
        return (
            f"{self.states:,} states ({ended}), {self.steps:,} steps, {self.deepest} deep, "
            f"{self.executed:,} calls of registers, {self.cpu_s:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class _Move:
    """What one event does to one voter: its next state, and what it says."""

    state: int
    said: int
    cut: tuple[int, int] | None
    """The same for a crash that strikes before the last `Persist` of this call."""


@dataclass(slots=True)
class _Node:
    """A state that a voter has been in."""

    name: str
    register: Register
    disk: bytes | None
    moves: dict[int, _Move | None] = field(default_factory=dict)
    useful: int = 0
    """The messages that may change something, as bits."""


State = tuple[tuple[int, ...], int, int]
"""Each voter's state, what has been said as bits, and the crashes that may still happen."""


class Checker:
    """One exploration. `run` raises `Violation`."""

    def __init__(self, model: Model, kind: type[Register] = Register) -> None:
        self.model = model
        self._kind = kind
        self._genesis = a_genesis(model.count, model.faults)
        self._honest = tuple(n for n in NAMES[: model.count] if n != model.liar)
        self._nodes: list[_Node] = []
        self._node_ids: dict[object, int] = {}
        self._messages: list[Said] = []
        self._message_ids: dict[object, int] = {}
        self._ballots: dict[object, int] = {}
        """Equal votes of different voters, as bits."""
        self._single = -1
        """The messages that are heard one by one, as bits."""
        self._conflicts: list[int] = []
        """For each message, the messages that no honest voter says beside it."""
        self._disks: dict[bytes | None, object] = {}
        self._lied = 0
        self._executed = 0

    def run(self) -> Explored:
        model, began = self.model, process_time()
        start, said = [], self._said(self._lies())
        self._lied = said
        for name in self._honest:
            register = a_register(name, self._genesis, timing=TIMING, kind=self._kind)
            node, _, sent, _ = self._after(name, register, register.want(True, 0.0), None)
            start.append(node)
            said |= sent
        first: State = (tuple(start), said, model.crashes)
        came: dict[State, tuple[State, int, int] | None] = {first: None}
        frontier, steps, deepest = [first], 0, 0
        while frontier and len(came) < model.states_max:
            deepest += 1
            ahead: list[State] = []
            for state in frontier:
                for next_state, place, event in self._steps(state):
                    steps += 1
                    if next_state in came:
                        continue
                    came[next_state] = (state, place, event)
                    broken = self._broken(state, next_state, place, event)
                    if broken:
                        raise Violation(self._story(came, next_state, broken))
                    ahead.append(next_state)
            frontier = ahead
        return Explored(
            len(came), steps, deepest, self._executed, process_time() - began, not frontier
        )

    # --- the steps of a state -------------------------------------------------------------------

    def _steps(self, state: State) -> Iterator[tuple[State, int, int]]:
        places, said, crashes = state
        for place, at in enumerate(places):
            node = self._nodes[at]
            for alike in self._ballots.values():
                if said & alike:
                    yield from self._step(state, place, node, VOTES - (said & alike))
            for number in _bits(said & node.useful & self._single):
                yield from self._step(state, place, node, number)
            for event in (RESEND, CARRY_ON, TIME_OUT) if self.model.resends else (
                CARRY_ON, TIME_OUT,
            ):  # fmt: skip
                yield from self._step(state, place, node, event)
            if crashes:
                yield from self._step(state, place, node, CRASH)

    def _step(
        self, state: State, place: int, node: _Node, event: int
    ) -> Iterator[tuple[State, int, int]]:
        places, said, crashes = state
        if event not in node.moves:
            node.moves[event] = self._move(places[place], node, event)
        move = node.moves[event]
        if move is None:
            return
        before, after = places[:place], places[place + 1 :]
        left = crashes - 1 if event == CRASH else crashes
        yield ((*before, move.state, *after), said | move.said, left), place, event
        if move.cut is not None and crashes:
            at, heard = move.cut
            yield ((*before, at, *after), said | heard, crashes - 1), place, event

    def _move(self, at: int, node: _Node, event: int) -> _Move | None:
        """Run a real register; None if nothing changes."""
        if event == CRASH:
            back, _, said, _ = self._restarted(node.name, node.disk)
            return None if back == at else _Move(back, said, None)
        self._executed += 1
        register = twin(node.register)
        if event <= VOTES:
            return self._hear_votes(at, node, register, VOTES - event)
        if event < 0:
            last = self.model.views - (event == TIME_OUT and not self.model.last_view_ends)
            if register.view > last or register.deadline() is None:
                return None
            effects = register.tick(UNTIL[event])
        else:
            message = self._messages[event]
            try:
                effects = register.receive(peer(NAMES[0]), message, 0.0)
            except RemoteProtocolError as error:
                if self.model.liar is None and "honest" in self.model.check:
                    raise Violation(
                        f"{node.name} takes an honest {in_words(message)} for a lie: {error}"
                    ) from error
                effects = []
        after, _, said, cut = self._after(node.name, register, effects, node.disk)
        if after != at or said:
            return _Move(after, said, cut)
        if event >= 0:
            node.useful &= ~(1 << event)
        return None

    def _hear_votes(self, at: int, node: _Node, register: Register, votes: int) -> _Move | None:
        """Hear equal votes until they make a difference."""
        silent = _behaviour(register)
        for number in _bits(votes):
            effects = register.receive(peer(NAMES[0]), self._messages[number], 0.0)
            if effects or _behaviour(register) != silent:
                after, _, said, cut = self._after(node.name, register, effects, node.disk)
                return None if after == at and not said else _Move(after, said, cut)
        return None

    def _after(
        self,
        name: str,
        register: Register,
        effects: list[Effect],
        disk: bytes | None,
        may_crash: bool = True,
    ) -> tuple[int, bytes | None, int, tuple[int, int] | None]:
        """Perform the effects, in their order."""
        said, cut, may_crash = 0, None, may_crash and self.model.crashes > 0
        for effect in effects:
            match effect:
                case Persist():
                    if said and may_crash:
                        back, _, more, _ = self._restarted(name, disk)
                        cut = (back, said | more)
                    disk = effect.data
                case Send():
                    said |= self._said([effect.message])  # type: ignore[list-item]
        return self._intern(name, register, disk), disk, said, cut

    def _restarted(
        self, name: str, disk: bytes | None
    ) -> tuple[int, bytes | None, int, tuple[int, int] | None]:
        register = a_register(name, self._genesis, journal=disk, timing=TIMING, kind=self._kind)
        effects = register.want(True, 0.0) if register.head.epoch == 0 else []
        return self._after(name, register, effects, disk, may_crash=False)

    # --- equal states are one -------------------------------------------------------------------

    def _intern(self, name: str, register: Register, disk: bytes | None) -> int:
        this = register._round
        if this.clock_from is not None:
            this.clock_from, this.resend_at = 0.0, TIMING.resend_s
        register._answered.clear()
        # A vote adds nothing to a certificate.
        votes = frozenset(
            (key, _content(votes))
            for key, votes in this.votes.items()
            if key not in this.certificates
        )
        identity = (name, self._kept(name, disk), _behaviour(register), votes)
        known = self._node_ids.get(identity)
        if known is None:
            known = self._node_ids[identity] = len(self._nodes)
            self._nodes.append(_Node(name, register, disk, useful=-1))
            proof = register.head.proof
            if "S2" in self.model.check and proof is not None:
                self._check_proof(name, proof)
        return known

    def _kept(self, name: str, disk: bytes | None) -> object:
        """What a disk is good for."""
        if not self.model.crashes:
            return None
        if disk not in self._disks:
            back = a_register(name, self._genesis, journal=disk, kind=self._kind)
            self._disks[disk] = _behaviour(back)
        return self._disks[disk]

    def _check_proof(self, name: str, proof: Handover) -> None:
        if not is_proven(proof, self._genesis.voters, self._genesis.faults):
            assert proof.certificate is not None
            raise Violation(
                f"S2: {name} took block {block_in_words(proof.header)} for decided by "
                f"{len(proof.certificate.ballots)} of {self.model.count} voters"
            )

    def _said(self, messages: list[Said]) -> int:
        """Messages as bits; those beyond the bounds of the model are lost."""
        bits = 0
        for message in messages:
            if not self._is_within(message):
                continue
            content = _content(message)
            known = self._message_ids.get(content)
            if known is None:
                known = self._message_ids[content] = len(self._messages)
                self._messages.append(message)
                self._conflicts.append(self._note_conflicts(known, message))
                if isinstance(message, Vote):
                    alike = (message.view, message.kind, message.block)
                    self._ballots[alike] = self._ballots.get(alike, 0) | 1 << known
                    self._single &= ~(1 << known)
            bits |= 1 << known
        return bits

    def _is_within(self, message: Said) -> bool:
        match message:
            case Proposal():
                return message.header.epoch == 1 and message.vote.view <= self.model.views
            case Vote() | QuorumCertificate():
                return message.epoch == 1 and message.view <= self.model.views
        return True

    def _note_conflicts(self, number: int, message: Said) -> int:
        conflicts = 0
        for vote in votes_in(message):
            if name_of(vote.voter) == self.model.liar:
                continue
            for other, said in enumerate(self._messages[:number]):
                if any(excludes(vote, each) for each in votes_in(said)):
                    conflicts |= 1 << other
                    self._conflicts[other] |= 1 << number
        return conflicts

    def _lies(self) -> list[Said]:
        """All that a liar might usefully say: both votes of everything, two blocks for its view,
        and in the second view a block that nothing justifies."""
        liar = self.model.liar
        if liar is None:
            return []
        genesis = self._genesis
        bodies = [a_body("this"), a_body("that")]
        own = [a_block(genesis, liar, body) for body in bodies]
        honest = [a_block(genesis, name) for name in NAMES[: self.model.views] if name != liar]
        lies: list[Said] = []
        for view in range(1, self.model.views + 1):
            lies.append(a_vote(liar, own[0], view, "nullify"))
            for block in (*own, *honest):
                lies.append(a_vote(liar, block, view, "notarize"))
                lies.append(a_vote(liar, block, view, "finalize"))
            if NAMES[view - 1] == liar:
                lies += [
                    Proposal(block, body, 0, (), a_vote(liar, block, view, "notarize"))
                    for block, body in zip(own, bodies, strict=True)
                ]
        return lies

    # --- the promises ---------------------------------------------------------------------------

    def _broken(self, before: State, after: State, place: int, event: int) -> str | None:
        check = self.model.check
        if "S10" in check:
            for number in _bits(after[1] & ~before[1]):
                if self._conflicts[number] & after[1]:
                    vote = votes_in(self._messages[number])[0]
                    return f"S10: {name_of(vote.voter)} has said two things that exclude each other"
        was, now = before[0][place], after[0][place]
        if was == now:
            return None
        head = self._nodes[now].register.head
        if "S3" in check and head.epoch < self._nodes[was].register.head.epoch:
            return f"S3: {self._honest[place]} went back to epoch {head.epoch}"
        if "S1" in check and head.epoch:
            for at in after[0]:
                other = self._nodes[at].register.head
                if other.epoch == head.epoch and other.header != head.header:
                    return (
                        f"S1: epoch {head.epoch} is block {block_in_words(head.header)} and "
                        f"block {block_in_words(other.header)}"
                    )
        return None

    def _story(
        self, came: dict[State, tuple[State, int, int] | None], state: State, broken: str
    ) -> str:
        lines: list[str] = []
        step = came[state]
        while step is not None:
            before, place, event = step
            lines.append(self._told(before, state, place, event))
            state, step = before, came[before]
        told = [f"{number:3}. {line}" for number, line in enumerate(reversed(lines), 1)]
        begun = [f"  0. all want a block{self._told_said(state[1] & ~self._lied)}"]
        return "\n".join([broken, *begun, *told])

    def _told(self, before: State, after: State, place: int, event: int) -> str:
        if event <= VOTES:
            heard = [self._messages[number] for number in _bits(VOTES - event)]
            who = " and ".join(name_of(vote.voter) for vote in heard if isinstance(vote, Vote))
            what = f"hears {who}: {in_words(heard[0])}"
        else:
            what = DOES[event] if event < 0 else f"hears {in_words(self._messages[event])}"
        if event != CRASH and before[2] != after[2]:
            what += ", and crashes before that is durable"
        line = f"{self._honest[place]} {what}{self._told_said(after[1] & ~before[1])}"
        head = self._nodes[after[0][place]].register.head
        if head.epoch > self._nodes[before[0][place]].register.head.epoch:
            line += f"\n       = epoch {head.epoch} is block {block_in_words(head.header)}"
        return line

    def _told_said(self, said: int) -> str:
        return "".join(f"\n       → {in_words(self._messages[number])}" for number in _bits(said))


def _bits(mask: int) -> Iterator[int]:
    """The places of the ones."""
    while mask:
        lowest = mask & -mask
        mask ^= lowest
        yield lowest.bit_length() - 1


def _behaviour(register: Register) -> object:
    """All that decides what a register does next, but for votes that are not enough yet."""
    return frozenset(
        (key, _content(value))
        for key, value in (*vars(register).items(), *vars(register._round).items())
        if key not in NOT_BEHAVIOUR and key not in ("votes", "_round")
    )


def _content(value: object) -> object:
    """What a value says, without who signed it, fit to be compared."""
    match value:
        case QuorumCertificate():
            return ("certificate", value.epoch, value.view, value.kind, value.block)
        case Proposal():
            shown = tuple(_content(each) for each in value.justification)
            return ("proposal", header_hash(value.header), _content(value.vote), shown,
                    value.parent_view)  # fmt: skip
        case Handover():
            return ("handover", header_hash(value.header))
        case Decided():
            return ("decided", value.newest and _content(value.newest))
        case Vote():
            return ("vote", value.epoch, value.view, value.kind, value.block, value.voter)
        case GetDecided():
            return ("question", value.epoch)
        case dict():
            return frozenset((key, _content(each)) for key, each in value.items())
        case tuple():
            return tuple(_content(each) for each in value)
        case Head():
            return ("head", header_hash(value.header))
        case _ if callable(value) or isinstance(value, Wishes):
            return None
    return value
