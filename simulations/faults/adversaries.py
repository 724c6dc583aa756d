"""Who lies, and how: members, or would-be members, that do not keep to the protocol.

| kind | what the liars do |
|---|---|
| `equivocate` | as voters: sign two blocks; which one comes first depends on who hears it |
| `forge` | as voters: votes in others' names, certificates of one ballot, blocks that may not be |
| `withhold` | stay connected and tell of models, but say nothing more and answer no request |
| `replay` | after half of their messages, send an old one again, theirs or told to them |
| `stale-certificate` | answer with the oldest decision they know, and tell it unasked |
| `false-capacity` | claim a thousand times the slots, speed and memory that they have |
| `false-accusation` | accuse all that they are connected to of being dead, every second |
| `eclipse` | many new members besiege one node and tell it of nobody but themselves |
| `sybil` | so many new identities at once, each certified by nobody but itself |

`count` (or `share` of all nodes) of them begin at `start_s`. Those of all kinds but the last two
are nodes of the mesh: `target` says which, as of faults, or they are drawn from all but the
bootstraps. Those of the last two come on top. Their own stacks are the real ones; what is
tampered with is what these say. A liar signs with its own key only.

Figures: `liar_voters` and `liar_owners` (the most at any time, as the newest decision names them),
`hung_up_on_liars` (times an honest node ended its connection to one) and, of `eclipse`,
`victim_honest_members` and `victim_epochs_behind` at the end.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

from msgspec.structs import replace

from meshnode.credentials import issue_certificate
from meshnode.errors import ConfigError, RemoteProtocolError
from meshnode.identity import PeerId, Signer, open_envelope, seal
from meshnode.messages import (
    Alive,
    Ballot,
    Control,
    Decided,
    Heartbeat,
    Hello,
    Offer,
    Peers,
    Proposal,
    QuorumCertificate,
    Rumours,
    Suspicion,
    Vote,
    Welcome,
    decode,
    encode,
)
from meshnode.protocol import Disconnect, Effect
from meshnode.protocol.liveness import ALIVE_TYPE, RUMOURS_MAX, SUSPICION_TYPE
from meshnode.protocol.quorum import NO_BLOCK, header_hash, vote_bytes
from meshnode.protocol.stack import RECORD_DOMAIN, Learn
from meshnode_simulations.checks.safety import Safety
from meshnode_simulations.faults.schedule import check_target, find, newest_head
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import EPOCH_S, Machine
from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.models.gateway import Gateways
from meshnode_simulations.run import Run

BRAG = 1000
"""How many times too much the boasters claim; far beyond any two real machines."""
COUNT_END, RATE_MAX = 2**40, 1e9
"""The bounds of an offer's numbers (`messages.Count`, `messages.Rate`)."""
REPLAYED_SHARE = 0.5
OLD_KEPT = 256
"""Old messages that a replayer has at hand."""
LOOK_S = 1.0
"""How often it is looked at who votes and owns."""

KINDS = (
    "equivocate", "forge", "withhold", "replay", "stale-certificate", "false-capacity",
    "false-accusation", "eclipse", "sybil",
)  # fmt: skip
OUTSIDERS = ("eclipse", "sybil")


class Adversaries:
    """Lets the adversaries of a run's scenario loose. Raises `ConfigError` for a kind that is
    none. `liars` is empty until they begin."""

    def __init__(self, run: Run, safety: Safety | None, gateways: Gateways | None) -> None:
        self._run = run
        self._world = run.world
        self._about = run.scenario.adversaries
        self._safety = safety
        self._gateways = gateways
        self._rng = stream(run.seed, "adversaries")
        self.liars: dict[int, Machine] = {}
        self._voters = self._owners = self._hung_up = 0
        kind = self._about.kind
        if kind == "none":
            return
        if kind not in KINDS:
            raise ConfigError(f"adversaries.kind: {kind!r} is none of {', '.join(KINDS)}")
        if self._about.target:
            check_target(self._about.target)
        self._count = self._about.count or round(self._about.share * run.scenario.mesh.nodes)
        self._nodes = tuple(run.world.machines)
        self._lie = self._lie_of(kind)
        newcomers = [self._newcomer(n) for n in range(self._count)] if kind in OUTSIDERS else []
        if self._lie is not None:
            run.world.tamper = self._tamper
        run.world.on_effect.append(self._on_effect)
        run.world.loop.at(int(self._about.start_s * NS_PER_S), self._begin, newcomers)
        run.closers.append(self._close)

    # --- who ------------------------------------------------------------------------------------

    def _newcomer(self, number: int) -> Machine:
        """Of an eclipse, insiders: the mesh's owner was careless. Of a Sybil burst, outsiders."""
        name = f"liar{number}"
        world, key = self._world, self._world.scheme.key_of(name)
        issuer = key if self._about.kind == "sybil" else world.root
        chain = (issue_certificate(issuer, world.mesh, key.peer_id, ("node",), EPOCH_S),)
        return world.add(name, chain=chain)

    def _begin(self, newcomers: list[Machine]) -> None:
        liars = newcomers or self._chosen()
        self.liars = {machine.index: machine for machine in liars}
        if self._safety is not None:
            self._safety.liars = frozenset(self.liars)
        bootstraps = list(self._nodes[: self._run.scenario.mesh.bootstraps])
        match self._about.kind:
            case "sybil":
                for machine in liars:
                    self._world.switch_on(machine, bootstraps)
            case "eclipse":
                for machine in liars:
                    self._world.switch_on(machine, liars[:1] if machine is not liars[0] else ())
                self._besiege()
            case "false-capacity":
                honest = self._world.offered
                self._world.offered = lambda machine, model: (
                    _bragging(honest(machine, model))
                    if machine.index in self.liars
                    else honest(machine, model)
                )
                for machine in liars:
                    machine.memory_bytes *= BRAG  # from its next start on
            case "false-accusation":
                self._accuse()
            case "withhold" if self._gateways is not None:
                self._gateways.mute.update(dict.fromkeys(self.liars))
        self._look()

    def _chosen(self) -> list[Machine]:
        """Nodes of the mesh that lie from now on."""
        if self._about.target:
            return find(self._run, self._about.target, self._rng)
        honest = self._nodes[self._run.scenario.mesh.bootstraps :]
        return self._rng.sample(honest, min(self._count, len(honest)))

    @property
    def victim(self) -> Machine:
        """Of an eclipse: the last node of the mesh."""
        return self._nodes[-1]

    # --- lies -----------------------------------------------------------------------------------

    def _lie_of(self, kind: str) -> _Lie | None:
        match kind:
            case "equivocate":
                return _Equivocation()
            case "forge":
                return _Forgery(self._nodes)
            case "withhold":
                return _Withholding()
            case "replay":
                return _Replay(self._rng)
            case "stale-certificate":
                return _Stale()
            case "false-accusation":
                return _Accusation(self._run)
            case "eclipse":
                return _Eclipse(self)
        return None

    def _tamper(self, machine: Machine, other: Machine, message: Control) -> Iterable[Control]:
        assert self._lie is not None
        self._lie.hear(machine, other, message)
        if machine.index not in self.liars:
            return (message,)
        return self._lie.say(machine, other, message)

    def _besiege(self) -> None:
        """Every liar dials the victim, again and again."""
        for liar in self.liars.values():
            if liar.is_awake and self.victim.index not in liar.links:
                self._world.tell(liar, Learn((self.victim.address,)), sender=self.victim.peer_id)
        self._world.loop.after(NS_PER_S, self._besiege)

    def _accuse(self) -> None:
        assert isinstance(self._lie, _Accusation)
        for liar in self.liars.values():
            if liar.is_awake:
                self._lie.spread(liar)
        self._world.loop.after(NS_PER_S, self._accuse)

    def now_of(self, machine: Machine) -> float:
        return self._world.now_of(machine)

    # --- what it comes to -----------------------------------------------------------------------

    def _on_effect(self, machine: Machine, effect: Effect) -> None:
        if isinstance(effect, Disconnect) and machine.index not in self.liars:
            other = self._world.by_peer.get(effect.peer)
            self._hung_up += other is not None and other.index in self.liars

    def _look(self) -> None:
        head = newest_head(self._honest())
        if head is not None:
            liars = {liar.peer_id for liar in self.liars.values()}
            self._voters = max(self._voters, len(liars & {*head.header.voters}))
            self._owners = max(self._owners, len(liars & {item.owner for item in head.body.items}))
        self._world.loop.after(int(LOOK_S * NS_PER_S), self._look)

    def _honest(self) -> list[Machine]:
        return [
            machine
            for machine in self._world.machines
            if machine.is_awake and machine.index not in self.liars
        ]

    def _close(self) -> None:
        figures = self._run.figures
        figures["liar_voters"] = float(self._voters)
        figures["liar_owners"] = float(self._owners)
        figures["hung_up_on_liars"] = float(self._hung_up)
        if self._about.kind == "eclipse" and self.victim.is_awake:
            liars = {liar.peer_id for liar in self.liars.values()}
            members = self.victim.live.members()
            figures["victim_honest_members"] = float(
                sum(member.peer not in liars for member in members)
            )
            newest = newest_head(self._honest())
            known = newest_head([self.victim])
            if newest is not None:
                behind = newest.epoch - (-1 if known is None else known.epoch)
                figures["victim_epochs_behind"] = float(behind)


class _Lie:
    """What liars make of their messages, and what they overhear; by default nothing."""

    def hear(self, machine: Machine, other: Machine, message: Control) -> None:
        """Anybody's message to anybody: a liar may remember what concerns it."""

    def say(self, liar: Machine, other: Machine, message: Control) -> list[Control]:
        """What a liar sends in the place of its stack's message."""
        return [message]


class _Equivocation(_Lie):
    """Machines with odd indices hear of the other block first."""

    def __init__(self) -> None:
        self._twins: dict[bytes, bytes] = {}
        """A block -> the other one of that view."""

    def say(self, liar: Machine, other: Machine, message: Control) -> list[Control]:
        said: list[Control] = [message]
        match message:
            case Proposal(vote=vote) if vote.voter == liar.peer_id:
                header = message.header
                twin = replace(header, voters=(*header.voters[1:], *header.voters[:1]))
                self._twins[vote.block] = header_hash(twin)
                vote = _signed(replace(vote, block=header_hash(twin)), liar.key)
                said.append(replace(message, header=twin, vote=vote))
            case Vote(voter=voter, kind="notarize" | "finalize") if voter == liar.peer_id:
                twin_block = self._twins.get(message.block, message.block[::-1])
                said.append(_signed(replace(message, block=twin_block), liar.key))
                against = replace(message, kind="nullify", block=NO_BLOCK)
                said.append(_signed(against, liar.key))
        return said[::-1] if other.index % 2 else said


class _Forgery(_Lie):
    def __init__(self, nodes: tuple[Machine, ...]) -> None:
        self._nodes = nodes

    def say(self, liar: Machine, other: Machine, message: Control) -> list[Control]:
        """A block of its own choice with voters of its own choice, and everybody's consent."""
        registers = liar.live.agreement.registers()
        if not isinstance(message, Vote | Proposal) or not registers:
            return [message]
        voters = registers[0].voters
        match message:
            case Proposal(vote=vote) if vote.voter == liar.peer_id:
                strangers = [m.peer_id for m in self._nodes if m.peer_id not in voters][:2]
                named = (*message.header.voters[: len(voters) - len(strangers)], *strangers)
                header = replace(message.header, voters=named)
                vote = _signed(replace(vote, block=header_hash(header)), liar.key)
                forged = replace(message, header=header, vote=vote, parent_view=0, justification=())
                return [forged, *self._consent(vote, liar, voters), message]
            case Vote(voter=voter, kind="notarize") if voter == liar.peer_id:
                twin = _signed(replace(message, block=message.block[::-1]), liar.key)
                return [*self._consent(twin, liar, voters), message]
        return [message]

    def _consent(self, vote: Vote, liar: Machine, voters: tuple[str, ...]) -> list[Control]:
        """Everybody's votes for it, signed by the liar, and its own vote counted for all."""
        forged: list[Control] = []
        for kind in ("notarize", "finalize"):
            own = _signed(replace(vote, kind=kind), liar.key)
            forged += [replace(own, voter=voter) for voter in voters]
            place = voters.index(liar.peer_id) if liar.peer_id in voters else 0
            ballots = (Ballot(place, own.signature),) * len(voters)
            forged.append(
                QuorumCertificate(vote.group, vote.epoch, vote.view, kind, vote.block, ballots)
            )
        return forged


def _signed(vote: Vote, key: Signer) -> Vote:
    words = vote_bytes(vote.group, vote.epoch, vote.view, vote.kind, vote.block)
    return replace(vote, signature=key.sign(words))


class _Withholding(_Lie):
    def say(self, liar: Machine, other: Machine, message: Control) -> list[Control]:
        """Nothing but what keeps the connection."""
        return [message] if isinstance(message, Hello | Welcome) else []


class _Eclipse(_Lie):
    def __init__(self, adversaries: Adversaries) -> None:
        self._adversaries = adversaries

    def say(self, liar: Machine, other: Machine, message: Control) -> list[Control]:
        """Of all peers it knows, only those that are in on it."""
        if not isinstance(message, Peers):
            return [message]
        own = [each.peer_id for each in self._adversaries.liars.values()]
        now_s = self._adversaries.now_of(liar)
        return [
            Peers(
                tuple(
                    envelope
                    for envelope in message.records
                    if liar.live.check_record(envelope, now_s) in own
                )
            )
        ]


class _Replay(_Lie):
    """What was said to the liar or by it comes again, later."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._old: dict[int, deque[Control]] = {}

    def hear(self, machine: Machine, other: Machine, message: Control) -> None:
        for one in (machine, other):
            self._old.setdefault(one.index, deque(maxlen=OLD_KEPT)).append(message)

    def say(self, liar: Machine, other: Machine, message: Control) -> list[Control]:
        if self._rng.random() >= REPLAYED_SHARE:
            return [message]
        return [message, self._rng.choice(self._old[liar.index])]


class _Stale(_Lie):
    """The oldest decision and the oldest certificate that a liar has come across."""

    def __init__(self) -> None:
        self._decided: dict[int, Decided] = {}
        self._certificates: dict[int, QuorumCertificate] = {}

    def hear(self, machine: Machine, other: Machine, message: Control) -> None:
        for one in (machine, other):
            if isinstance(message, Decided) and message.newest is not None:
                self._decided.setdefault(one.index, message)
            elif isinstance(message, QuorumCertificate):
                self._certificates.setdefault(one.index, message)

    def say(self, liar: Machine, other: Machine, message: Control) -> list[Control]:
        decided = self._decided.get(liar.index)
        certificate = self._certificates.get(liar.index)
        match message:
            case Decided() if decided is not None:
                return [decided]
            case QuorumCertificate() if certificate is not None:
                return [certificate]
            case Heartbeat():
                return [message, *(old for old in (decided, certificate) if old is not None)]
        return [message]


class _Accusation(_Lie):
    """Suspicions of the living, each with the incarnation that its victim was last heard with:
    others are not believed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._incarnations: dict[str, int] = {}

    def hear(self, machine: Machine, other: Machine, message: Control) -> None:
        if not isinstance(message, Rumours):
            return
        genuine = self._run.world.scheme.genuine
        for envelope in message.refutations:
            try:
                signed = open_envelope(envelope, RECORD_DOMAIN, ALIVE_TYPE, genuine)
                word = decode(signed.payload, Alive)
            except RemoteProtocolError:
                continue
            before = self._incarnations.get(signed.signer, 0)
            self._incarnations[signed.signer] = max(before, word.incarnation)

    def spread(self, liar: Machine) -> None:
        world = self._run.world
        others = [member.peer for member in liar.live.members()][:RUMOURS_MAX]
        accusations = tuple(self._envelope(liar, peer) for peer in others)
        for peer in others:
            world.say(liar, world.by_peer[peer], Rumours(accusations, ()))

    def _envelope(self, liar: Machine, peer: PeerId) -> bytes:
        accused = Suspicion(self._run.world.mesh.mesh_id, peer, self._incarnations.get(peer, 0))
        return seal(liar.key, RECORD_DOMAIN, SUSPICION_TYPE, encode(accused))


def _bragging(offer: Offer) -> Offer:
    return replace(
        offer,
        slots=min(offer.slots * BRAG, COUNT_END - 1),
        slots_busy=0,
        queue_depth=0,
        kv_tokens_free=min(offer.context_tokens * BRAG, COUNT_END - 1),
        prefill_tokens_per_s=min(offer.prefill_tokens_per_s * BRAG, RATE_MAX),
        decode_tokens_per_s=min(offer.decode_tokens_per_s * BRAG, RATE_MAX),
    )
