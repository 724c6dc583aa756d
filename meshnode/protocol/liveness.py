"""Who is alive, as far as this node can tell.

Three witnesses, the nearest first:

* the connection: while it stands its peer is alive, and its loss is a suspicion at once;
* heartbeats, from those whose work this node vouches for (`expects`): a connected peer that has
  been silent for `SUPPORT_S` is suspect;
* rumours, about peers that are too many to be connected to. Who loses a connection accuses the
  peer in a signed `Suspicion`, which spreads; the accused answers with a signed `Alive` of a
  higher incarnation, which spreads too and clears it. Only the accused can: nobody's word that
  somebody else lives is taken. Two accusers and no answer within `SUSPICION_S` mean death.

The scheme is SWIM's (Das, Gupta and Motivala, 2002) over standing connections instead of random
probes. From Lifeguard (Dadgar, Phillips and Currey, arXiv 1707.00788) comes local health: a node
that is woken late was stalled or asleep itself, and gives others more time instead of declaring
them dead. Knows no adverts, no groups and no clock; nor who is a member of the mesh beyond those
connected: a rumour's author may be anybody, and a live peer's protection is that it answers.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from meshnode.errors import RemoteProtocolError
from meshnode.identity import PeerId, Signed
from meshnode.messages import Alive, Message, Rumours, Suspicion, decode

HEARTBEAT_S = 1.0
SUPPORT_S = 3.0
"""Three beats: at 5 % loss a live peer misses all of them once in 8,000 (and QUIC resends)."""
SUSPICION_S = 1.0
"""How long an accused peer has to answer. There and back are some six hops (0.3 s across an
ocean); the transport takes 3 s to notice silence, and 4 s until nobody routes to it is the aim."""
ACCUSERS_NEEDED = 2
"""One liar, or one broken link, removes nobody."""
SMALL_MESH = 3
"""Up to so many members there may be no second witness, and one accuser must do."""
ACCUSERS_MAX = 4
"""Twice what a verdict needs, in case some get lost; a dead peer's 64 neighbours all have the same
to say, and what the first four have said the others need not."""
FANOUT = 12
"""To how many members a rumour is passed on: it misses a given node once in e¹² = 160,000."""
ACCUSATION_TTL_S = 30.0
"""A suspicion that nobody seconds is forgotten after this time."""
ANSWER_INTERVAL_S = 0.25
"""A peer that is accused again and again answers so often; in time for `SUSPICION_S`, and within
what others take from it (`_WORDS`)."""
LATE_S = 0.5
"""Woken later than this we were stalled. The loop's ordinary lateness under load is 0.05 s."""
HEALTH_MAX = 4
"""Of a node that is always late: it still notices a silent peer, in 12 s."""
HEALTH_DECAY_S = 10.0
PEERS_MAX = 4096
VERIFIED_MAX = 2048
"""A rumour comes once from each of a dozen relays; its signature is checked the first time."""
RUMOUR_BYTES_MAX = 512
"""A sealed `Suspicion` has about 270 bytes, an `Alive` 200."""
RUMOURS_MAX = 64
"""Of either kind in one message (`messages.Rumours`)."""

SUSPICION_TYPE = b"/meshnode/suspicion/1"
ALIVE_TYPE = b"/meshnode/alive/1"

Status = Literal["alive", "suspect", "dead", "left", "unknown"]
_R = TypeVar("_R", Suspicion, Alive)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call came to. `rumours` are to be sent, at most one message for each peer.

    `dead`: peers that have just been given up. `alive`: peers that were suspect, dead, gone or
    never heard of, and have connected or spoken up: their words count again. `refuted`: we were
    accused and have answered, but some may have let go of what we said before.
    """

    rumours: tuple[tuple[PeerId, Rumours], ...] = ()
    dead: tuple[PeerId, ...] = ()
    alive: tuple[PeerId, ...] = ()
    refuted: bool = False


@dataclass(frozen=True, slots=True)
class _Allowance:
    """How much of something is taken from one peer: `burst` at once, then `per_s`."""

    burst: float
    per_s: float


_CHECKS = _Allowance(burst=256, per_s=16)
"""New envelopes from one sender. A signature costs 0.15 ms: a flood costs 0.3 % of a core, and
a mesh of 200 that starts at once fits the burst."""
_ACCUSATIONS = _Allowance(burst=64, per_s=1)
"""By one accuser: a node that loses all its 64 connections may say so."""
_WORDS = _Allowance(burst=16, per_s=5)
"""`Alive`s of one peer; more than `ANSWER_INTERVAL_S` lets it say, so that nobody can silence a
peer by accusing it until it has used up its allowance."""


@dataclass(slots=True)
class _Meter:
    """What is left of an allowance."""

    allowance: _Allowance
    left: float = field(init=False)
    at: float = -math.inf

    def __post_init__(self) -> None:
        self.left = self.allowance.burst

    def take(self, now: float) -> bool:
        earned = (now - self.at) * self.allowance.per_s
        self.left = min(self.allowance.burst, self.left + earned)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class _Opened(Generic[_R]):
    """Envelopes of one kind, each verified once."""

    def __init__(
        self,
        mesh_id: str,
        open_: Callable[[bytes, bytes], Signed],
        payload_type: bytes,
        kind: type[_R],
    ) -> None:
        self._mesh_id = mesh_id
        self._open = open_
        self._payload_type = payload_type
        self._kind: type[_R] = kind
        self._verified: dict[bytes, tuple[PeerId, _R]] = {}

    def known(self, envelope: bytes) -> tuple[PeerId, _R] | None:
        return self._verified.get(envelope)

    def verify(self, envelope: bytes) -> tuple[PeerId, _R]:
        """The author and its message. Raises `RemoteProtocolError` for any that is not legal."""
        if len(envelope) > RUMOUR_BYTES_MAX:
            raise RemoteProtocolError(f"rumour of {len(envelope)} bytes")
        signed = self._open(envelope, self._payload_type)
        message = decode(signed.payload, self._kind)
        if message.mesh != self._mesh_id:
            raise RemoteProtocolError("rumour from another mesh")
        if len(self._verified) >= VERIFIED_MAX:
            del self._verified[next(iter(self._verified))]
        self._verified[envelope] = (signed.signer, message)
        return signed.signer, message


@dataclass(frozen=True, slots=True)
class _Accusation:
    envelope: bytes
    heard_at: float


@dataclass(slots=True)
class _Peer:
    """What is known of one peer. Connected while `since` is set; `incarnation` 0 is unheard of.

    `doubted_at` is when there was enough against it to suspect it.
    """

    since: float | None = None
    heard_at: float = -math.inf
    left: bool = False
    dead: bool = False
    doubted_at: float | None = None
    incarnation: int = 0
    word: bytes | None = None
    accusations: dict[PeerId, _Accusation] = field(default_factory=dict)
    checks: _Meter = field(default_factory=lambda: _Meter(_CHECKS))
    words: _Meter = field(default_factory=lambda: _Meter(_WORDS))

    @property
    def away(self) -> bool:
        return self.left or self.dead or self.doubted_at is not None

    def acquit(self) -> None:
        """Nothing stands against it any more."""
        self.left = self.dead = False
        self.doubted_at = None


@dataclass(slots=True)
class _Letter:
    """Rumours waiting for one peer, each once."""

    suspicions: dict[bytes, None] = field(default_factory=dict)
    refutations: dict[bytes, None] = field(default_factory=dict)

    def rumours(self) -> Rumours:
        """As many as one message holds; the rest comes by other ways."""
        return Rumours(
            tuple(self.suspicions)[:RUMOURS_MAX],
            tuple(self.refutations)[:RUMOURS_MAX],
        )


class Liveness:
    """A sans-IO core: connections, heartbeats and rumours in, a verdict on every peer out.

    What an input leaves to be said goes out with the next `tick` (due at once) or `receive`.
    Whoever drives it must tick at `deadline`: being late is taken for having been stalled.
    """

    def __init__(
        self,
        mesh_id: str,
        own: PeerId,
        seal: Callable[[bytes, Message], bytes],
        open_: Callable[[bytes, bytes], Signed],
        incarnation: int,
        rng: random.Random,
    ) -> None:
        """`seal(payload_type, message)` signs as `own`; `open_(envelope, payload_type)` verifies
        or raises `RemoteProtocolError`. `incarnation` is at least 1 and above every number that
        this identity has used.
        """
        self.health = 1
        """Times as long as usual is what others get: 1 to `HEALTH_MAX`."""
        self.refused: Counter[str] = Counter()
        self._mesh_id = mesh_id
        self._own = own
        self._seal = seal
        self._rng = rng
        self._incarnation = incarnation
        self._word = self._seal(ALIVE_TYPE, Alive(mesh_id, incarnation))
        self._opened_words = _Opened(mesh_id, open_, ALIVE_TYPE, Alive)
        self._opened_accusations = _Opened(mesh_id, open_, SUSPICION_TYPE, Suspicion)
        self._peers: dict[PeerId, _Peer] = {}
        self._connected: dict[PeerId, None] = {}
        self._expected: dict[str, None] = {}
        self._accused: dict[PeerId, None] = {}
        self._accusers: dict[PeerId, _Meter] = {}
        self._letters: dict[PeerId, _Letter] = {}
        self._newly_dead: dict[PeerId, None] = {}
        self._newly_alive: dict[PeerId, None] = {}
        self._refuted = False
        self._answer_at: float | None = None
        self._answered_at = -math.inf
        self._began_at: float | None = None
        self._attended_at = -math.inf
        self._excused_at = -math.inf
        self._tick_at = math.inf
        self._health_falls_at = math.inf

    # --- what happens ---------------------------------------------------------------------------

    def connected(self, peer: PeerId, now: float) -> None:
        """A member's first connection is up: it is alive, whatever was said of it."""
        self._attend(now)
        if peer in self._connected:
            return
        state = self._know(peer)
        if state.away:
            self._newly_alive[peer] = None
        # Others may still believe what was said against it; only its own answer convinces them.
        for accusation in state.accusations.values():
            self._write(peer, suspicion=accusation.envelope)
        state.accusations.pop(self._own, None)
        state.acquit()
        state.since = state.heard_at = now
        self._connected[peer] = None
        self._write(peer, refutation=self._word)

    def disconnected(self, peer: PeerId, now: float, *, left: bool) -> None:
        """A member's last connection is gone; `left` if that was meant: it said goodbye, or we
        hung up. If not, it is suspect at once, and others hear that we think so.
        """
        self._attend(now)
        if self._connected.pop(peer, self) is self:
            return
        self._letters.pop(peer, None)
        state = self._peers[peer]
        state.since = None
        if left:
            state.left = True
            self._drop_accusations(peer, state)
            return
        state.doubted_at = now
        accusation = Suspicion(self._mesh_id, peer, state.incarnation)
        envelope = self._seal(SUSPICION_TYPE, accusation)
        if len(state.accusations) < ACCUSERS_MAX:
            self._spread((peer,), suspicion=envelope, proof=state.word)
        state.accusations[self._own] = _Accusation(envelope, now)
        self._accused[peer] = None

    def heard(self, peer: PeerId, now: float) -> None:
        """A heartbeat came from a connected member."""
        self._attend(now)
        state = self._peers.get(peer)
        if state is None or state.since is None:
            return
        if self._is_silent(peer, state, now):
            state.since = now
        state.heard_at = now

    def expects(self, peers: tuple[str, ...], now: float) -> None:
        """From now on these, and no others, owe us a heartbeat every `HEARTBEAT_S`."""
        self._attend(now)
        if not self._expected:
            self._tick_at = now + HEARTBEAT_S
        for name in peers:
            state = self._peers.get(PeerId(name))
            if name not in self._expected and state is not None:
                state.heard_at = now  # it owed us nothing until now
        self._expected = dict.fromkeys(peers)

    def receive(self, sender: PeerId, rumours: Rumours, now: float) -> Outcome:
        """Take rumours from a connected member.

        Raises `RemoteProtocolError` for one that is forged, malformed or of another mesh: members
        verify what they pass on, so that is `sender`'s own doing, and a reason to hang up. What
        came before it in the message counts, and goes out with the next `tick`.
        """
        self._attend(now)
        state = self._peers.get(sender)
        if state is None or state.since is None:
            return self._outcome()
        # Words first: they prove the incarnations that the suspicions name.
        for envelope in rumours.refutations:
            word = self._read(state, self._opened_words, envelope, now)
            if word is not None:
                self._on_word(sender, *word, envelope, now)
        for envelope in rumours.suspicions:
            accusation = self._read(state, self._opened_accusations, envelope, now)
            if accusation is not None:
                self._on_accusation(sender, *accusation, envelope, now)
        self._answer(now)
        return self._outcome()

    def tick(self, now: float) -> Outcome:
        self._attend(now)
        self._tick_at = now + HEARTBEAT_S
        for peer in tuple(self._accused):
            state = self._peers[peer]
            if self._verdict_at(state) <= now:
                state.dead = True
                state.doubted_at = None
                self._newly_dead[peer] = None
            self._expire(peer, state, now)
        self._answer(now)
        return self._outcome()

    def deadline(self) -> float | None:
        due = math.inf if self._answer_at is None else self._answer_at
        if self._letters or self._newly_alive:
            due = min(due, self._attended_at)
        if self._expected:
            due = min(due, self._tick_at)
        for name in self._expected:
            state = self._peers.get(PeerId(name))
            if state is not None and state.since is not None:
                silent_at = self._silent_at(state)
                if self._attended_at < silent_at < due:
                    due = silent_at
        for peer in self._accused:
            state = self._peers[peer]
            due = min(due, self._verdict_at(state))
            for accusation in state.accusations.values():
                ends_at = accusation.heard_at + ACCUSATION_TTL_S
                if ends_at < due:
                    due = ends_at
        return None if due == math.inf else due

    # --- what it comes to -----------------------------------------------------------------------

    def status(self, peer: str, now: float) -> Status:
        """`unknown` is a peer that we are not connected to and know nothing bad of.

        A peer that is silent but still connected remains `suspect`: `dead` needs a broken
        connection or accusers.
        """
        if peer == self._own:
            return "alive"
        state = self._peers.get(PeerId(peer))
        if state is None:
            return "unknown"
        if state.since is not None:
            return "suspect" if self._is_silent(peer, state, now) else "alive"
        if state.left:
            return "left"
        if state.dead:
            return "dead"
        return "unknown" if state.doubted_at is None else "suspect"

    def is_alive(self, peer: str, now: float) -> bool:
        """Whether it is connected to us and, if expected, heard in time; or is this very node."""
        return self.status(peer, now) == "alive"

    def since(self, peer: str) -> float | None:
        """Since when it has been alive without a break; None if it is not."""
        if peer == self._own:
            return self._began_at
        state = self._peers.get(PeerId(peer))
        if state is None or self._is_silent(peer, state, self._attended_at):
            return None
        return state.since

    # --- our own health -------------------------------------------------------------------------

    def _attend(self, now: float) -> None:
        """We are awake; and if we ought to have been before, it is not for others to pay."""
        if self._began_at is None:
            self._began_at = now
        lateness_s = self._lateness_s(now)
        while self.health > 1 and self._health_falls_at <= now:
            self.health -= 1
            self._health_falls_at += HEALTH_DECAY_S
        if lateness_s >= LATE_S:
            # A node that is late all the time runs out of excuses, or it would notice no death.
            if self.health < HEALTH_MAX or lateness_s >= SUPPORT_S:
                self._excused_at = now
            self.health = min(self.health + 1, HEALTH_MAX)
            self._health_falls_at = now + HEALTH_DECAY_S
        self._attended_at = now

    def _lateness_s(self, now: float) -> float:
        """For how long there has been work for us, and nobody woke us."""
        if now - self._attended_at < LATE_S:
            return 0.0
        due = self.deadline()
        return 0.0 if due is None else now - max(due, self._attended_at)

    def _silent_at(self, state: _Peer) -> float:
        return max(state.heard_at, self._excused_at) + SUPPORT_S * self.health

    def _is_silent(self, peer: str, state: _Peer, now: float) -> bool:
        if peer not in self._expected:
            return False
        # If we have just woken, what happened meanwhile is still unread: judge as of before.
        seen_at = now if self._lateness_s(now) < LATE_S else self._attended_at
        return self._silent_at(state) <= seen_at

    def _verdict_at(self, state: _Peer) -> float:
        if state.doubted_at is None:
            return math.inf
        return max(state.doubted_at, self._excused_at) + SUSPICION_S * self.health

    # --- rumours --------------------------------------------------------------------------------

    def _read(
        self, sender: _Peer, opened: _Opened[_R], envelope: bytes, now: float
    ) -> tuple[PeerId, _R] | None:
        """The author and its message; None if the sender has used up its allowance."""
        known = opened.known(envelope)
        if known is not None:
            return known
        if not sender.checks.take(now):
            self.refused["too many rumours"] += 1
            return None
        try:
            return opened.verify(envelope)
        except RemoteProtocolError:
            self.refused["forged rumour"] += 1
            raise

    def _on_word(
        self, sender: PeerId, author: PeerId, word: Alive, envelope: bytes, now: float
    ) -> None:
        if author == self._own:
            if word.incarnation > self._incarnation:
                # Of an earlier run, which our disk has forgotten: rise above it.
                self._incarnation = word.incarnation
                self._must_answer(now)
            return
        state = self._peers.get(author)
        if state is not None and word.incarnation <= state.incarnation:
            return
        state = self._know(author)
        if not state.words.take(now):
            self.refused["too many words"] += 1
            return
        state.incarnation, state.word = word.incarnation, envelope
        self._drop_accusations(author, state)
        if state.since is None:
            state.acquit()
            self._newly_alive[author] = None
        self._spread((sender, author), refutation=envelope)

    def _on_accusation(
        self, sender: PeerId, by: PeerId, accusation: Suspicion, envelope: bytes, now: float
    ) -> None:
        suspect = PeerId(accusation.suspect)
        if suspect == self._own:
            if accusation.incarnation == self._incarnation:
                self._must_answer(now)
            elif accusation.incarnation < self._incarnation:
                self._write(sender, refutation=self._word)
            return
        state = self._peers.get(suspect)
        if state is not None and accusation.incarnation < state.incarnation:
            # It has been answered, which the sender has not heard.
            self._write(sender, refutation=state.word)
            return
        if accusation.incarnation > (0 if state is None else state.incarnation):
            return  # unproven: whoever could name numbers to come could not be answered
        accusations = {} if state is None else state.accusations
        if by in (self._own, suspect, *accusations) or len(accusations) >= ACCUSERS_MAX:
            return
        if not self._meter(by).take(now):
            self.refused["too many accusations"] += 1
            return
        state = self._know(suspect)
        state.accusations[by] = _Accusation(envelope, now)
        self._accused[suspect] = None
        if state.since is None and not state.away:
            enough = 1 if self._members_count() <= SMALL_MESH else ACCUSERS_NEEDED
            if len(state.accusations) >= enough:
                state.doubted_at = now
        if state.since is not None:
            self._write(suspect, suspicion=envelope)
        self._spread((sender, by, suspect), suspicion=envelope, proof=state.word)

    def _must_answer(self, now: float) -> None:
        if self._answer_at is None:
            self._answer_at = max(now, self._answered_at + ANSWER_INTERVAL_S)

    def _answer(self, now: float) -> None:
        """If we are accused: a word that refutes all accusations so far, to everyone."""
        if self._answer_at is None or self._answer_at > now:
            return
        self._answer_at, self._answered_at = None, now
        self._incarnation += 1
        self._word = self._seal(ALIVE_TYPE, Alive(self._mesh_id, self._incarnation))
        for peer in self._connected:
            self._write(peer, refutation=self._word)
        self._refuted = True

    def _expire(self, peer: PeerId, state: _Peer, now: float) -> None:
        """Let old accusations go, and with the last of them a peer that never said a word."""
        for by, accusation in tuple(state.accusations.items()):
            if accusation.heard_at + ACCUSATION_TTL_S <= now:
                del state.accusations[by]
        if not state.accusations:
            del self._accused[peer]
            if state.word is None and state.since is None:
                del self._peers[peer]

    def _drop_accusations(self, peer: PeerId, state: _Peer) -> None:
        state.accusations.clear()
        self._accused.pop(peer, None)

    def _members_count(self) -> int:
        """This node, and those that it has heard from and does not think gone."""
        heard = sum(
            state.since is not None or (state.word is not None and not (state.left or state.dead))
            for state in self._peers.values()
        )
        return 1 + heard

    # --- bookkeeping ----------------------------------------------------------------------------

    def _know(self, peer: PeerId) -> _Peer:
        """What is known of a peer, from now on at least that there is one."""
        state = self._peers.get(peer)
        if state is None:
            if len(self._peers) >= PEERS_MAX:
                self._forget_one()
            state = self._peers[peer] = _Peer()
        return state

    def _forget_one(self) -> None:
        """The one that was heard of first, among those not connected."""
        for peer in self._peers:
            if peer not in self._connected:
                del self._peers[peer]
                self._accused.pop(peer, None)
                return

    def _meter(self, accuser: PeerId) -> _Meter:
        meter = self._accusers.get(accuser)
        if meter is None:
            if len(self._accusers) >= PEERS_MAX:
                del self._accusers[next(iter(self._accusers))]
            meter = self._accusers[accuser] = _Meter(_ACCUSATIONS)
        return meter

    def _write(
        self, peer: PeerId, *, suspicion: bytes | None = None, refutation: bytes | None = None
    ) -> None:
        letter = self._letters.setdefault(peer, _Letter())
        if suspicion is not None:
            letter.suspicions[suspicion] = None
        if refutation is not None:
            letter.refutations[refutation] = None

    def _spread(
        self,
        besides: tuple[PeerId, ...],
        *,
        suspicion: bytes | None = None,
        proof: bytes | None = None,
        refutation: bytes | None = None,
    ) -> None:
        """To `FANOUT` members; a suspicion with the `proof` that its incarnation exists."""
        others = [peer for peer in self._connected if peer not in besides]
        if len(others) > FANOUT:
            others = self._rng.sample(others, FANOUT)
        for peer in others:
            self._write(peer, suspicion=suspicion, refutation=refutation or proof)

    def _outcome(self) -> Outcome:
        outcome = Outcome(
            tuple((peer, letter.rumours()) for peer, letter in self._letters.items()),
            tuple(self._newly_dead),
            tuple(self._newly_alive),
            self._refuted,
        )
        self._letters.clear()
        self._newly_dead.clear()
        self._newly_alive.clear()
        self._refuted = False
        return outcome
