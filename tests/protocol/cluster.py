"""Stacks joined by a make-believe network with a clock of its own.

Everything that decides is the real thing: `Stack`s, signatures, encoded messages. Made up are the
links (reliable, in order, `LATENCY_S` each way; a lost packet is a delay), dialling, a gossip that
floods, disks, models that load in `LOAD_S`, and the time. One run is a function of its seed;
`trace` is what happened, fit to be read and compared.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import combinations, count
from typing import cast

from meshnode.credentials import MeshDescriptor, issue_certificate
from meshnode.identity import KeyPair, PeerId
from meshnode.messages import (
    Control,
    Decided,
    GetPeers,
    Handover,
    Offer,
    Peers,
    Proposal,
    Refused,
    Role,
    Vote,
    decode,
    encode,
)
from meshnode.protocol import (
    Connect,
    Disconnect,
    DutiesChanged,
    Effect,
    Emit,
    Event,
    Input,
    MemberJoined,
    MemberLost,
    Persist,
    Publish,
    PublishRecord,
    Send,
)
from meshnode.protocol.adverts import Node
from meshnode.protocol.agreement import Holding
from meshnode.protocol.stack import (
    Connected,
    DialFailed,
    Disconnected,
    Learn,
    SetAddrs,
    SetHoldings,
    SetOffers,
    Stack,
)

EPOCH_S = 1_800_000_000
"""What wall clocks show when the cluster's clock shows 0."""
LATENCY_S = 0.01
SILENCE_S = 2.5
"""A peer that died without a word is missed after this long (transport: at most 3 s)."""
LOAD_S = 0.7
"""A warm standby has a small model in memory after this long (measured: 0.4 to 0.6 s)."""
DIAL_TIMEOUT_S = 5.0
"""A dial that nobody answers fails after this long (transport/libp2p.py)."""
RESEND_S = 0.2
"""What a lost packet costs on a stream that repairs it: everything behind it waits so long."""

ROOT = KeyPair.from_seed(hashlib.sha256(b"root").digest())
MESH = MeshDescriptor(name="lab", root=ROOT.public.hex(), admission="invite")


@cache
def key_of(name: str) -> KeyPair:
    return KeyPair.from_seed(hashlib.sha256(name.encode()).digest())


def chain_of(
    name: str,
    mesh: MeshDescriptor = MESH,
    root: KeyPair = ROOT,
    roles: tuple[Role, ...] = ("node",),
) -> tuple[bytes, ...]:
    return (issue_certificate(root, mesh, key_of(name).peer_id, roles, EPOCH_S),)


def an_offer(name: str = "smol", digest: str = "ab" * 32, **changes: object) -> Offer:
    fields: dict[str, object] = {
        "state": "ready",
        "context_tokens": 2048,
        "slots": 4,
        "slots_busy": 0,
        "queue_depth": 0,
        "kv_tokens_free": 8192,
        "prefill_tokens_per_s": 400.0,
        "decode_tokens_per_s": 40.0,
    }
    return Offer(name=name, digest=digest, **{**fields, **changes})  # type: ignore[arg-type]


def a_holding(offer: Offer, *, wanted: bool = True, **changes: object) -> Holding:
    """The file of an offer's model, not loaded yet."""
    fields: dict[str, object] = {
        "state": "file",
        "bytes": 2**30,
        "weight_bytes": 2**29,
        "kv_bytes": 2**28,
        "layers": 30,
    }
    given = {**fields, **changes}
    return Holding(offer.digest, offer.name, wanted=wanted, **given)  # type: ignore[arg-type]


@dataclass
class Machine:
    """One computer: its key and address stay, its stack comes and goes."""

    name: str
    address: str
    chain: tuple[bytes, ...]
    clock_ahead_s: float = 0.0
    stack: Stack | None = None
    starts: int = 0
    events: list[Event] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    disk: dict[str, bytes] = field(default_factory=dict)
    """What it was asked to persist; survives a crash."""
    models: dict[str, tuple[Offer, Holding]] = field(default_factory=dict)
    loaded: dict[str, None] = field(default_factory=dict)
    running: tuple[str, ...] = ()
    """The models that it has loaded or is loading."""
    loads: int = 0
    """How often it has begun to load one, in all its runs."""
    is_root: bool = False
    links: dict[str, int] = field(default_factory=dict)
    """The machines it is connected to, as far as it knows, and the number of the connection."""
    is_asleep: bool = False
    missed: list[Callable[[], None]] = field(default_factory=list)
    """What happened to it while it was asleep: it finds out when it wakes."""
    effects_left: int | None = None
    """It loses power after so many more effects, maybe in the middle of one step."""

    @property
    def peer_id(self) -> PeerId:
        return key_of(self.name).peer_id

    @property
    def live(self) -> Stack:
        assert self.stack is not None, f"{self.name} is not running"
        return self.stack

    @property
    def is_awake(self) -> bool:
        return self.stack is not None and not self.is_asleep

    def lost(self) -> list[PeerId]:
        return [event.peer for event in self.events if isinstance(event, MemberLost)]


class Cluster:
    """Machines, links between them, and the one clock that moves them."""

    def __init__(self, seed: int = 1, mesh: MeshDescriptor = MESH) -> None:
        self.now = 0.0
        self.trace: list[str] = []
        self.machines: dict[str, Machine] = {}
        self.dht: dict[PeerId, bytes] = {}
        self.delivered: Counter[str] = Counter()
        """Messages that arrived, by kind."""
        self.loss = 0.0
        """The share of messages whose packet is lost and sent again."""
        self.watch: Callable[[str, Effect], None] | None = None
        """Called with every effect of every machine, before it is performed."""
        self.check: Callable[[], None] | None = None
        """Called after everything that happens."""
        self._mesh = mesh
        self._seed = seed
        self._rng = random.Random(f"{seed}/network")
        self._arrival: dict[tuple[str, str], float] = {}
        self._severed: set[frozenset[str]] = set()
        self._order = count()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._island: dict[str, int] = {}
        self._names: dict[PeerId, str] = {}

    # --- what a test does to it -----------------------------------------------------------------

    def start(
        self,
        name: str,
        bootstrap: Iterable[str] = (),
        *,
        offers: tuple[Offer, ...] = (),
        clock_ahead_s: float = 0.0,
        chain: tuple[bytes, ...] | None = None,
        models: tuple[tuple[Offer, Holding], ...] = (),
        is_root: bool = False,
        memory_bytes: int = 2**33,
        roles: tuple[Role, ...] = ("node",),
    ) -> Machine:
        """Switch a machine on, for the first time or again. `is_root`: it made the mesh; of
        `models` it has the files, and it does what its duties say about them.
        """
        machine = self.machines.get(name)
        if machine is None:
            address = f"/ip4/10.0.0.{len(self.machines) + 1}/udp/9338/quic-v1"
            proof = chain_of(name, self._mesh, roles=roles) if chain is None else chain
            machine = Machine(name, address, proof, clock_ahead_s)
            self.machines[name] = machine
            self._names[machine.peer_id] = name
        assert machine.stack is None, f"{name} is running already"
        machine.starts += 1
        machine.events.clear()
        machine.seen.clear()
        machine.loaded.clear()
        machine.running = ()
        machine.effects_left = None
        machine.is_root = machine.is_root or is_root
        machine.models.update({holding.model: (offer, holding) for offer, holding in models})
        machine.stack = Stack(
            key_of(name),
            self._mesh,
            machine.chain,
            roles,
            Node(memory_bytes=memory_bytes, cores=2, accelerator="cpu"),
            unix_of=lambda now: EPOCH_S + now + machine.clock_ahead_s,
            rng=random.Random(f"{self._seed}/{name}/{machine.starts}"),
            first_sequence=machine.starts * 1_000_000,
            root=ROOT if machine.is_root else None,
            journals=machine.disk,
        )
        self._do_duties(machine, DutiesChanged((), is_drained=False))
        self.tell(name, SetAddrs((machine.address,)))
        self.tell(name, SetOffers(offers))
        if machine.models:
            self._tell_models(machine)
        for other in bootstrap:
            known = self.machines[other]
            self.tell(name, Learn((known.address,), permanent=True), sender=known.peer_id)
        return machine

    def tell(self, name: str, message: Input, *, sender: PeerId | None = None) -> None:
        """Give a stack one input now, from itself unless said otherwise."""
        machine = self.machines[name]
        sender = machine.peer_id if sender is None else sender
        self._perform(machine, machine.live.receive(sender, message, self.now))

    def kill(self, name: str) -> None:
        """Power off, without a word; the others notice when it has been silent for too long."""
        self._note(f"{name} is killed")
        machine = self.machines[name]
        machine.stack = None
        machine.is_asleep = False
        machine.missed.clear()
        for other in tuple(machine.links):
            self.cut(name, other, SILENCE_S)
        machine.links.clear()

    def cut(self, one: str, other: str, after_s: float = 0.0) -> None:
        """Break the link between two machines; they may dial again."""
        for near, far in ((self.machines[one], other), (self.machines[other], one)):
            if far in near.links:
                self._later(after_s, self._loss(near, far, near.links[far]))

    def crash_within(self, name: str, effects: int) -> None:
        """Power off after so many more effects: its disk may have a vote that nobody heard."""
        self.machines[name].effects_left = effects

    def sleep(self, name: str) -> None:
        """Suspend a machine: nothing runs there until it wakes, but its clock goes on."""
        self._note(f"{name} falls asleep")
        machine = self.machines[name]
        machine.is_asleep = True
        run = machine.starts
        lost = dict(machine.links)

        def missed() -> None:
            if machine.is_asleep and machine.starts == run:
                for other, link in lost.items():
                    if machine.links.get(other) == link:
                        self.cut(name, other)

        self._later(SILENCE_S, missed)

    def wake(self, name: str) -> None:
        self._note(f"{name} wakes")
        machine = self.machines[name]
        machine.is_asleep = False
        missed, machine.missed = machine.missed, []
        for action in missed:
            self._later(0.0, action)

    def sever(self, one: str, other: str) -> None:
        """No way between these two until `heal`, though each may reach everybody else."""
        self._severed.add(frozenset((one, other)))
        self.cut(one, other, SILENCE_S)

    def partition(self, *islands: Iterable[str]) -> None:
        """Let only machines of one island reach each other, until `heal`."""
        self._island = {name: place for place, names in enumerate(islands) for name in names}
        for one, other in combinations(self.machines.values(), 2):
            if not self._reachable(one, other):
                self.cut(one.name, other.name, SILENCE_S)

    def heal(self) -> None:
        self._island = {}
        self._severed.clear()

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self._step(end):
            pass
        self.now = end

    def run_until(self, holds: Callable[[], bool], within_s: float) -> float:
        """Let time pass until `holds`; the seconds it took."""
        start = self.now
        while not holds():
            assert self._step(start + within_s), f"not within {within_s:g} s: {self.members()}"
        return self.now - start

    # --- what a test asks -----------------------------------------------------------------------

    def stack(self, name: str) -> Stack:
        return self.machines[name].live

    def members(self) -> dict[str, str]:
        """Whom each running machine counts as members, by name."""
        return {
            name: " ".join(sorted(self._names[member.peer] for member in machine.stack.members()))
            for name, machine in self.machines.items()
            if machine.stack is not None
        }

    def complete(self) -> bool:
        """Whether every running machine has every other as a member."""
        running = sorted(name for name, each in self.machines.items() if each.stack is not None)
        wanted = {name: " ".join(n for n in running if n != name) for name in running}
        return self.members() == wanted

    def offers_seen_by(self, name: str) -> list[str]:
        return sorted(self._names[PeerId(peer)] for peer in self.stack(name).offers())

    # --- the network ----------------------------------------------------------------------------

    def _step(self, end: float) -> bool:
        """The next thing that happens, if it happens by `end`."""
        waits = [
            (deadline, machine)
            for machine in self.machines.values()
            if machine.is_awake and (deadline := machine.live.deadline()) is not None
        ]
        due, machine = min(waits, key=lambda wait: wait[0], default=(float("inf"), None))
        if self._queue and self._queue[0][0] <= min(due, end):
            self.now, _, action = heapq.heappop(self._queue)
            action()
            self._checked()
            return True
        if machine is None or due > end:
            return False
        self.now = max(self.now, due)
        self._perform(machine, machine.live.tick(self.now))
        if machine.stack is not None:
            after = machine.stack.deadline()
            assert after is None or after > self.now, f"{machine.name} would spin"
        self._checked()
        return True

    def _checked(self) -> None:
        if self.check is not None:
            self.check()

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._order), action))

    def _perform(self, machine: Machine, effects: list[Effect]) -> None:
        name = machine.name
        for effect in effects:
            if machine.effects_left is not None:
                if machine.effects_left == 0:
                    machine.effects_left = None
                    self.kill(name)
                    return
                machine.effects_left -= 1
            if self.watch is not None:
                self.watch(name, effect)
            match effect:
                case Send(peer, message):
                    other = self._names[peer]
                    self._note(f"{name} → {other}: {self._shown(message)}")
                    self._transmit(machine, other, message)
                case Connect(peer, addrs):
                    self._note(f"{name} dials {self._named(peer)}")
                    self._dial(machine, peer, addrs)
                case Disconnect(peer, reason):
                    self._note(f"{name} hangs up on {self._names[peer]}: {reason}")
                    self.cut(name, self._names[peer], LATENCY_S)
                case Publish(advert):
                    self._note(f"{name} gossips its advert")
                    machine.seen.add(advert)
                    self._flood(machine, advert)
                case PublishRecord(record, _):
                    self._note(f"{name} publishes its record")
                    self.dht[machine.peer_id] = record
                case Persist(file, data):
                    machine.disk[file] = data
                case Emit(DutiesChanged() as event):
                    machine.events.append(event)
                    self._do_duties(machine, event)
                case Emit(MemberJoined() | MemberLost() as event):
                    what = f"lost ({event.reason})" if isinstance(event, MemberLost) else "joined"
                    self._note(f"{name}: member {self._names[event.peer]} {what}")
                    machine.events.append(event)

    def _do_duties(self, machine: Machine, duties: DutiesChanged) -> None:
        """Load what is to be loaded, in `LOAD_S`, and let go of what is not. What its own operator
        wants here stays, unless the node is drained, as in `node.py`.
        """
        run = machine.starts
        owned = {duty.model for duty in duties.duties if duty.load}
        wanted = [
            model
            for model, (_, holding) in sorted(machine.models.items())
            if model in owned or (holding.wanted and not duties.is_drained)
        ]
        if wanted == list(machine.running):
            return
        machine.running = tuple(wanted)
        shown = [machine.models[model][0].name for model in wanted]
        self._note(f"{machine.name} is to run {' '.join(shown) or 'nothing'}")

        def loaded(model: str) -> Callable[[], None]:
            def action() -> None:
                if machine.is_asleep:
                    machine.missed.append(action)
                elif machine.starts == run and model in machine.running:
                    machine.loaded[model] = None
                    self._tell_models(machine)

            return action

        for model in wanted:
            if model not in machine.loaded:
                machine.loads += 1
                self._later(LOAD_S, loaded(model))
        dropped = [model for model in machine.loaded if model not in wanted]
        for model in dropped:
            del machine.loaded[model]
        if dropped:
            self._later(0.0, partial(self._tell_models, machine))

    def _tell_models(self, machine: Machine) -> None:
        if not machine.is_awake:
            return
        self.tell(machine.name, SetOffers(tuple(machine.models[m][0] for m in machine.loaded)))
        holdings = tuple(
            replace(holding, state="ready" if model in machine.loaded else holding.state)
            for model, (_, holding) in machine.models.items()
        )
        if machine.stack is not None:
            self.tell(machine.name, SetHoldings(holdings))

    def _transmit(self, sender: Machine, receiver: str, message: Control) -> None:
        """In order, and all of it: what is lost arrives later, and what follows waits for it."""
        at = self.now + LATENCY_S
        while self.loss and self._rng.random() < self.loss:
            at += RESEND_S
        at = max(at, self._arrival.get((sender.name, receiver), 0.0))
        self._arrival[sender.name, receiver] = at
        self._later(at - self.now, self._delivery(sender, receiver, encode(message)))

    def _delivery(self, sender: Machine, receiver_name: str, data: bytes) -> Callable[[], None]:
        receiver = self.machines[receiver_name]
        link = sender.links.get(receiver_name)

        def deliver() -> None:
            if receiver.is_asleep:
                receiver.missed.append(deliver)
            elif (
                link is not None
                and receiver.links.get(sender.name) == link
                and (self._reachable(sender, receiver))
            ):
                message = decode(data, cast(type[Control], Control))
                self.delivered[type(message).__name__] += 1
                self.tell(receiver.name, message, sender=sender.peer_id)

        return deliver

    def _dial(self, machine: Machine, peer: PeerId, addrs: tuple[str, ...]) -> None:
        run = machine.starts
        other = self.machines.get(self._names.get(peer, ""))

        def arrive() -> None:
            if machine.is_asleep:
                machine.missed.append(arrive)
                return
            if machine.stack is None or machine.starts != run:
                return
            answers = other is not None and other.is_awake and other.address in addrs
            if other is None or not answers or not self._reachable(machine, other):
                self._later(DIAL_TIMEOUT_S, fail)
            elif other.name not in machine.links:
                self._connect(machine, other)

        def fail() -> None:
            if machine.is_asleep:
                machine.missed.append(fail)
            elif machine.stack is not None and machine.starts == run:
                self.tell(machine.name, DialFailed("no answer"), sender=peer)

        self._later(2 * LATENCY_S, arrive)

    def _connect(self, dialer: Machine, other: Machine) -> None:
        if dialer.name in other.links:  # of an earlier run of the dialer
            self._loss(other, dialer.name, other.links[dialer.name])()
            if other.stack is None:
                return
        dialer.links[other.name] = other.links[dialer.name] = next(self._order)
        for one, peer in ((dialer, other), (other, dialer)):
            if one.stack is not None:  # it may lose power at any moment
                self.tell(one.name, Connected(), sender=peer.peer_id)

    def _loss(self, machine: Machine, peer: str, link: int) -> Callable[[], None]:
        """The machine notices that this connection is gone, if it has not yet."""

        def notice() -> None:
            if machine.is_asleep:
                machine.missed.append(notice)
            elif machine.stack is not None and machine.links.get(peer) == link:
                del machine.links[peer]
                self.tell(
                    machine.name, Disconnected("link cut"), sender=self.machines[peer].peer_id
                )

        return notice

    def _flood(self, machine: Machine, advert: bytes) -> None:
        for member in machine.live.members():
            other = self.machines[self._names[member.peer]]
            self._later(LATENCY_S, self._gossip(machine, other, advert))

    def _gossip(self, sender: Machine, receiver: Machine, advert: bytes) -> Callable[[], None]:

        def arrive() -> None:
            there = receiver.is_awake and sender.name in receiver.links
            if there and advert not in receiver.seen and self._reachable(sender, receiver):
                receiver.seen.add(advert)
                if receiver.live.gossip(advert, self.now):
                    self._flood(receiver, advert)

        return arrive

    def _reachable(self, one: Machine, other: Machine) -> bool:
        together = self._island.get(one.name) == self._island.get(other.name)
        return together and frozenset((one.name, other.name)) not in self._severed

    def _note(self, line: str) -> None:
        self.trace.append(f"{self.now:9.3f}  {line}")

    def _named(self, peer: str) -> str:
        return self._names.get(PeerId(peer), "a stranger")

    def _shown(self, message: Control) -> str:
        match message:
            case GetPeers(wanted):
                return f"GetPeers, up to {wanted}"
            case Peers(records):
                return f"Peers, {len(records)} records"
            case Refused(reason):
                return f"Refused: {reason}"
            case Proposal(header, body, _, _, vote):
                items = [
                    f"{item.name} {item.replica} {item.state} on {self._named(item.owner)}"
                    for item in body.items
                ]
                voters = " ".join(map(self._named, header.voters))
                shown = ", ".join(items) or "nothing"
                return f"Proposal {header.epoch}.{vote.view}: {shown}; voters {voters}"
            case Vote():
                return f"Vote {message.epoch}.{message.view}: {message.kind}"
            case Decided(_, _, Handover(header)):
                return f"Decided {header.epoch}"
        return type(message).__name__
