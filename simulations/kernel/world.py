"""Machines, the network between them, and everything that can be done to them.

Performs what the stacks decide, in the order they decide it: the counterpart of the node's
`driver.py`. What decides is the real thing; made up are the links, dialling, gossip and DHT
(`Pubsub`, `Dht`), disks, how long models load (`Loading`), and the time. A run is a function of
its seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol, cast

from meshnode.credentials import MeshDescriptor, issue_certificate
from meshnode.identity import PeerId
from meshnode.messages import Control, Decided, Offer, Role, decode, encode
from meshnode.protocol import (
    Connect,
    Disconnect,
    DutiesChanged,
    Effect,
    Emit,
    Event,
    Input,
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
    Stop,
)
from meshnode_simulations.kernel.keys import KEYED_HASH, Scheme
from meshnode_simulations.kernel.loop import NS_PER_S, Loop
from meshnode_simulations.kernel.machine import EPOCH_S, Link, Machine
from meshnode_simulations.kernel.network import SILENCE_S, Constant, Network
from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.kernel.trace import Trace

LATENCY_S = 0.01
"""One way, unless the network says otherwise."""
DIAL_TIMEOUT_S = 5.0
"""A dial that nobody answers fails after this long (transport/libp2p.py)."""
LOAD_S = 0.7
"""A warm standby has a small model in memory after this long (measured: 0.4 to 0.6 s)."""
SEQUENCES_PER_START = 1_000_000
"""Numbers that a node may use between two starts; in production its clock keeps them apart."""
SPIN_NS = NS_PER_S // 1000
"""A stack that spins gets on this slowly, instead of not at all."""
SILENCE_NS = int(SILENCE_S * NS_PER_S)
DIAL_TIMEOUT_NS = int(DIAL_TIMEOUT_S * NS_PER_S)


class Pubsub(Protocol):
    """How adverts spread. Gives them to `World.hear` where and when they arrive."""

    def publish(self, machine: Machine, data: bytes) -> None: ...

    def switched_on(self, machine: Machine) -> None: ...


class Dht(Protocol):
    """Where node records are kept for those who know nobody yet."""

    def publish(self, machine: Machine, record: bytes, models: tuple[str, ...]) -> None: ...

    def switched_on(self, machine: Machine) -> None: ...


Power = Literal["on", "killed", "stopped", "asleep", "awake"]

Loading = Callable[[Machine, Holding], int]
"""How many nanoseconds a machine takes to load a model."""

Fetch = Callable[[Machine, str, Callable[[], None]], None]
"""Have something happen as soon as a machine has a model's file."""


class World:
    """See the module."""

    def __init__(
        self,
        seed: int,
        network: Network | None = None,
        *,
        scheme: Scheme = KEYED_HASH,
        open_mesh: bool = False,
        strict: bool = False,
        loop: Loop | None = None,
    ) -> None:
        """`strict`: every message is encoded and decoded again, as on the wire, and no stack may
        want to be ticked twice at one instant. `open_mesh`: peers certify themselves.
        """
        self.seed = seed
        self.loop = Loop() if loop is None else loop
        self.trace = Trace()
        if network is None:
            network = Network(Constant(int(LATENCY_S * NS_PER_S)), stream(seed, "network"))
        self.network = network
        self.scheme = scheme
        self.root = scheme.key_of("root")
        self.mesh = MeshDescriptor(
            name="lab",
            root=self.root.public.hex(),
            admission="open" if open_mesh else "invite",
        )
        self.machines: list[Machine] = []
        self.by_name: dict[str, Machine] = {}
        self.by_peer: dict[PeerId, Machine] = {}
        self.pubsub: Pubsub = _Flood(self)
        self.dht: Dht = _Shelf()
        self.loading: Loading = lambda machine, holding: int(LOAD_S * NS_PER_S)
        self.fetch: Fetch = lambda machine, model, then: then()
        self.offered: Callable[[Machine, str], Offer] = lambda machine, model: machine.models[
            model
        ][0]
        """What a machine offers of a model that it has loaded."""
        self.may_dial: Callable[[Machine, Machine], bool] = lambda dialer, other: True
        """Whether a way leads from one to the other at all: NATs and firewalls say no."""
        self.on_effect: list[Callable[[Machine, Effect], None]] = []
        """Told of every effect of every machine, before it is performed."""
        self.on_event: list[Callable[[Machine, Event], None]] = []
        """Told of everything that a stack tells the rest of its node."""
        self.on_power: list[Callable[[Machine, Power], None]] = []
        """Told when a machine is switched on or off, falls asleep or wakes."""
        self.on_running: list[Callable[[Machine], None]] = []
        """Told when a machine is to run other models than before."""
        self.on_models: list[Callable[[Machine], None]] = []
        """Told when a machine has loaded a model or let go of one."""
        self.acted: Machine | None = None
        """Who did something in the event that is happening, or happened last."""
        self.tamper: Callable[[Machine, Machine, Control], Iterable[Control]] | None = None
        """What becomes of a message on its way out: adversaries change what their own node says."""
        self.rng_of: Callable[[Machine], random.Random] = lambda machine: stream(
            seed, "stack", machine.name, machine.starts
        )
        """What a stack that is started draws from."""
        self.tick_late_ns: Callable[[Machine], int] | None = None
        """For how long after a tick a machine is too busy for the next."""
        self.write_ns: Callable[[Machine], int] | None = None
        """How long its disk takes for one write."""
        self.on_disk_lost: list[Callable[[Machine], None]] = []
        """Told when a machine has lost what it had stored."""
        self.on_spin: list[Callable[[Machine], None]] = []
        """Told of a stack that wants to be ticked again at the instant it was ticked."""
        self._strict = strict
        self._weighed: tuple[Control | None, int] = (None, 0)

    # --- machines -------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        *,
        roles: tuple[Role, ...] = ("node",),
        memory_bytes: int = 2**33,
        is_root: bool = False,
        is_sponsored: bool = False,
        chain: tuple[bytes, ...] | None = None,
    ) -> Machine:
        """A machine that is switched off. `is_root`: it made the mesh and has the root's key;
        `is_sponsored`: in an open mesh too, its certificate is the root's and not its own.
        """
        index = len(self.machines)
        key = self.scheme.key_of(name)
        if chain is None:
            is_own = self.mesh.admission == "open" and not (is_root or is_sponsored)
            issuer = key if is_own else self.root
            chain = (issue_certificate(issuer, self.mesh, key.peer_id, roles, EPOCH_S),)
        high, low = divmod(index + 1, 250)
        address = f"/ip4/10.{high // 250}.{high % 250}.{low + 1}/udp/9338/quic-v1"
        machine = Machine(
            index,
            name,
            key,
            address,
            chain,
            roles,
            memory_bytes,
            stream(self.seed, "machine", name),
            is_root=is_root,
        )
        self.machines.append(machine)
        self.by_name[name] = machine
        self.by_peer[machine.peer_id] = machine
        return machine

    def switch_on(
        self,
        machine: Machine,
        bootstrap: Iterable[Machine] = (),
        *,
        offers: tuple[Offer, ...] = (),
    ) -> None:
        """For the first time or again; `bootstrap` are the peers that its operator names.
        `offers` are what it serves whatever the mesh decides."""
        assert machine.stack is None, f"{machine.name} is running already"
        machine.starts += 1
        machine.events.clear()
        machine.loaded.clear()
        machine.parts.clear()
        machine.heads.clear()
        machine.running = ()
        machine.effects_left = None
        self._tell_power(machine, "on")
        machine.stack = Stack(
            machine.key,
            self.mesh,
            machine.chain,
            machine.roles,
            Node(memory_bytes=machine.memory_bytes, cores=2, accelerator="cpu"),
            unix_of=machine.unix_s,
            rng=self.rng_of(machine),
            first_sequence=machine.starts * SEQUENCES_PER_START,
            root=self.root if machine.is_root else None,
            journals=machine.disk,
            genuine=self.scheme.genuine,
        )
        self.pubsub.switched_on(machine)
        self.dht.switched_on(machine)
        self._begin(machine, tuple(bootstrap), offers)

    def _begin(
        self, machine: Machine, bootstrap: tuple[Machine, ...], offers: tuple[Offer, ...]
    ) -> None:
        """Tell a new stack what a node tells its own when it starts."""
        self._do_duties(machine, DutiesChanged((), is_drained=False))
        self.tell(machine, SetAddrs((machine.address,)))
        self.tell(machine, SetOffers(offers))
        if machine.models:
            self._tell_models(machine)
        for other in bootstrap:
            self.tell(machine, Learn((other.address,), permanent=True), sender=other.peer_id)

    def tell(self, machine: Machine, message: Input, *, sender: PeerId | None = None) -> None:
        """Give a stack one input now, from itself unless said otherwise."""
        sender = machine.peer_id if sender is None else sender
        self._perform(machine, machine.live.receive(sender, message, self.now_of(machine)))

    def say(self, machine: Machine, other: Machine, message: Control) -> None:
        """Send what the machine's stack has not decided to send: liars do."""
        link = machine.links.get(other.index)
        if link is not None:
            self._transmit(link, machine, other, message)

    def learn(self, machine: Machine, peer: Machine, proof: Decided) -> None:
        """Give a stack a decision that a peer has sent beside its control stream."""
        self._perform(machine, machine.live.learn(peer.peer_id, proof, self.now_of(machine)))

    def hear(self, machine: Machine, advert: bytes) -> bool:
        """Give a stack an advert; returns whether it may spread further."""
        if machine.stack is None:
            return False
        spreads = machine.stack.gossip(advert, self.now_of(machine))
        self._arm(machine)
        return spreads

    def now_of(self, machine: Machine) -> float:
        """What the machine's own clock shows."""
        return machine.clock.now_s(self.loop.now_ns)

    def running(self) -> list[Machine]:
        return [machine for machine in self.machines if machine.stack is not None]

    # --- what happens to them -------------------------------------------------------------------

    def kill(self, machine: Machine) -> None:
        """Power off, without a word; the others notice when it has been silent for too long."""
        self._tell_power(machine, "killed")
        self._switch_off(machine, SILENCE_NS)

    def stop(self, machine: Machine) -> None:
        """Shut down in good order."""
        self._tell_power(machine, "stopped")
        self.tell(machine, Stop())
        self._switch_off(machine, 2 * self.network.rtt_ns(machine.index, machine.index))

    def lose_disk(self, machine: Machine) -> None:
        """Everything that a machine which is switched off was asked to persist is gone."""
        assert machine.stack is None, f"{machine.name} is running"
        self._note("wipe", machine)
        machine.disk.clear()
        for listen in self.on_disk_lost:
            listen(machine)

    def _tell_power(self, machine: Machine, power: Power) -> None:
        self._note(power, machine)
        for listen in self.on_power:
            listen(machine, power)

    def _switch_off(self, machine: Machine, noticed_after_ns: int) -> None:
        machine.stack = None
        machine.is_asleep = False
        machine.missed.clear()
        machine.armed_ns = None
        for link in tuple(machine.links.values()):
            self._break(link, noticed_after_ns)
        machine.links.clear()

    def cut(self, one: Machine, other: Machine, after_ns: int = 0) -> None:
        """Break the link between two machines; they may dial again."""
        for machine, far in ((one, other), (other, one)):
            link = machine.links.get(far.index)
            if link is not None:
                self.loop.after(after_ns, self._lose, machine, far, link)

    def crash_within(self, machine: Machine, effects: int) -> None:
        """Power off after so many more effects: its disk may have a vote that nobody heard."""
        machine.effects_left = effects

    def sleep(self, machine: Machine) -> None:
        """Suspend a machine: nothing runs there until it wakes, but its clock goes on."""
        self._tell_power(machine, "asleep")
        machine.is_asleep = True
        run = machine.starts
        links = tuple(machine.links.values())

        def missed() -> None:
            if machine.is_asleep and machine.starts == run:
                for link in links:
                    self._break(link, 0)

        self.loop.after(SILENCE_NS, missed)

    def wake(self, machine: Machine) -> None:
        self._tell_power(machine, "awake")
        machine.is_asleep = False
        missed, machine.missed = machine.missed, []
        for action in missed:
            self.loop.after(0, action)
        if machine.stack is not None:
            self._arm(machine)

    def set_rate(self, machine: Machine, rate: float) -> None:
        """Let a machine's clock run at a wrong rate from now on."""
        self._note("rate", machine)
        machine.clock.run_at(rate, self.loop.now_ns)
        if machine.is_awake:
            machine.armed_ns = None
            self._arm(machine)

    def clog(self, source: Machine, target: Machine) -> None:
        """Let messages of one to the other pile up on their way, until `unclog`."""
        link = source.links.get(target.index)
        if link is not None:
            link.held.setdefault(target.index, [])

    def unclog(self, source: Machine, target: Machine) -> None:
        link = source.links.get(target.index)
        for arguments in link.held.pop(target.index, ()) if link is not None else ():
            self._transmit(*arguments)

    def partition(self, *islands: Iterable[Machine]) -> None:
        """Let only machines of one island reach each other, until `heal`."""
        self._note("partition")
        self.network.partition([machine.index for machine in island] for island in islands)
        self._silence()

    def block(self, source: Machine, target: Machine) -> None:
        """Nothing of one gets to the other any more, until `heal`; the other way all may."""
        self._note("block", source, target)
        self.network.block(source.index, target.index)
        self._silence()

    def sever(self, one: Machine, other: Machine) -> None:
        """No way between these two until `heal`, though each may reach everybody else."""
        self.block(one, other)
        self.block(other, one)

    def heal(self) -> None:
        self._note("heal")
        self.network.heal()

    # --- the network ----------------------------------------------------------------------------

    def _note(
        self, kind: str, source: Machine | None = None, target: Machine | None = None
    ) -> None:
        self.trace.note(
            self.loop.now_ns,
            -1 if source is None else source.index,
            -1 if target is None else target.index,
            kind,
        )

    def _arm(self, machine: Machine) -> None:
        """See to it that the machine ticks at its deadline."""
        assert machine.stack is not None
        if machine.is_asleep:
            return
        deadline = machine.stack.deadline()
        if deadline is None or (machine.armed_ns is not None and deadline > machine.armed_s):
            return  # it is never, or will be asked before
        now_ns = self.loop.now_ns
        due_ns = now_ns
        if deadline > machine.clock.now_s(now_ns):
            due_ns = machine.clock.when_ns(deadline)
        due_ns += machine.lag_ns
        if machine.spins:
            due_ns += SPIN_NS
        due_ns = max(due_ns, machine.busy_until_ns)
        if machine.armed_ns is None or due_ns < machine.armed_ns:
            machine.armed_ns, machine.armed_s = due_ns, machine.clock.now_s(due_ns)
            self.loop.at(due_ns, self._ring, machine, machine.starts)

    def _ring(self, machine: Machine, run: int) -> None:
        """It may be time for a machine to tick; its deadline may have moved since."""
        now_ns = self.loop.now_ns
        if machine.armed_ns != now_ns or machine.starts != run or machine.stack is None:
            return
        machine.armed_ns = None
        if machine.is_asleep:
            return
        deadline = machine.stack.deadline()
        now_s = machine.clock.now_s(now_ns)
        if deadline is not None and deadline <= now_s:
            if self.tick_late_ns is not None:
                machine.busy_until_ns = now_ns + self.tick_late_ns(machine)
            effects = machine.stack.tick(now_s)
            again = machine.stack.deadline()
            machine.spins = again is not None and again <= now_s
            if machine.spins:
                assert not self._strict, f"{machine.name} would spin"
                for listen in self.on_spin:
                    listen(machine)
            self._perform(machine, effects)
            return
        self._arm(machine)

    def _perform(self, machine: Machine, effects: list[Effect]) -> None:
        self.acted = machine
        written_ns = 0
        for effect in effects:
            if machine.effects_left is not None:
                if machine.effects_left == 0:
                    machine.effects_left = None
                    self.kill(machine)
                    return
                machine.effects_left -= 1
            for watch in self.on_effect:
                watch(machine, effect)
            match effect:
                case Send(peer, message):
                    self._send(machine, self.by_peer[peer], message, written_ns)
                case Connect(peer, addrs):
                    self._dial(machine, peer, addrs)
                case Disconnect(peer, _):
                    other = self.by_peer[peer]
                    self._hang_up(machine, other)
                case Publish(advert):
                    self._note("publish", machine)
                    self.pubsub.publish(machine, advert)
                case PublishRecord(record, models):
                    self.dht.publish(machine, record, models)
                case Persist(file, data):
                    machine.disk[file] = data
                    if self.write_ns is not None:
                        written_ns += self.write_ns(machine)
                case Emit(event):
                    self._emit(machine, event)
        if machine.stack is not None:
            self._arm(machine)

    def _emit(self, machine: Machine, event: Event) -> None:
        """A stack tells the rest of its node something."""
        self._note(type(event).__name__, machine)
        machine.events.append(event)
        for listen in self.on_event:
            listen(machine, event)
        if isinstance(event, DutiesChanged):
            self._do_duties(machine, event)

    def _send(self, machine: Machine, other: Machine, message: Control, written_ns: int) -> None:
        link = machine.links.get(other.index)
        if link is None:
            return
        messages = (message,) if self.tamper is None else self.tamper(machine, other, message)
        for said in messages:
            held = link.held.get(other.index)
            if held is not None:
                held.append((link, machine, other, said))
            elif written_ns:
                self.loop.after(written_ns, self._transmit, link, machine, other, said)
            else:
                self._transmit(link, machine, other, said)

    def _transmit(self, link: Link, source: Machine, target: Machine, message: Control) -> None:
        size_bytes = self._weigh(message)
        at_ns = self.arrival_ns(link, source, target, size_bytes)
        self.loop.at(at_ns, self._deliver, link, source, target, message, size_bytes)

    def arrival_ns(self, link: Link, source: Machine, target: Machine, size_bytes: int) -> int:
        """When arrives what is sent over a link now. In order, and all of it: what is lost
        arrives later, and what follows waits for it."""
        at_ns = self.loop.now_ns
        if source.up is not None:
            at_ns = source.up.pass_at(at_ns, size_bytes)
        at_ns += self.network.delay_ns(source.index, target.index)
        if target.down is not None:
            at_ns = target.down.pass_at(at_ns, size_bytes)
        at_ns = max(at_ns + target.lag_ns, link.arrivals_ns[target.index])
        link.arrivals_ns[target.index] = at_ns
        return at_ns

    def _weigh(self, message: Control) -> int:
        """Bytes on the wire. The same message often goes to many peers at once."""
        known, size_bytes = self._weighed
        if known is not message:
            size_bytes = len(encode(message))
            self._weighed = (message, size_bytes)
        return size_bytes

    def _deliver(
        self, link: Link, source: Machine, target: Machine, message: Control, size_bytes: int
    ) -> None:
        if target.is_asleep:
            target.missed.append(partial(self._deliver, link, source, target, message, size_bytes))
            return
        if target.links.get(source.index) is not link or target.stack is None:
            return
        if not self.network.reaches(source.index, target.index):
            return
        kind = type(message).__name__
        self.trace.note(self.loop.now_ns, source.index, target.index, kind)
        self.trace.messages[kind] += 1
        self.trace.bytes[kind] += size_bytes
        if self._strict:
            message = decode(encode(message), cast(type[Control], Control))
        now_s = target.clock.now_s(self.loop.now_ns)
        self._perform(target, target.stack.receive(source.peer_id, message, now_s))

    def _dial(self, machine: Machine, peer: PeerId, addrs: tuple[str, ...]) -> None:
        other = self.by_peer.get(peer)
        self._note("dial", machine, other)
        here = machine.index
        there = here if other is None else other.index
        travel_ns = self.network.delay_ns(here, there) + self.network.delay_ns(there, here)
        self.loop.after(travel_ns, self._arrive, machine, machine.starts, other, addrs)

    def _arrive(
        self, machine: Machine, run: int, other: Machine | None, addrs: tuple[str, ...]
    ) -> None:
        """The handshake is over, if anybody is there to shake hands with."""
        if machine.is_asleep:
            machine.missed.append(partial(self._arrive, machine, run, other, addrs))
            return
        if machine.stack is None or machine.starts != run:
            return
        if (
            other is None
            or not other.is_awake
            or other.address not in addrs
            or not self.network.joins(machine.index, other.index)
            or not self.may_dial(machine, other)
        ):
            peer = None if other is None else other.peer_id
            self.loop.after(DIAL_TIMEOUT_NS, self._fail, machine, run, peer)
        elif other.index not in machine.links:
            self._connect(machine, other)

    def _fail(self, machine: Machine, run: int, peer: PeerId | None) -> None:
        if machine.is_asleep:
            machine.missed.append(partial(self._fail, machine, run, peer))
        elif machine.stack is not None and machine.starts == run and peer is not None:
            self.tell(machine, DialFailed("no answer"), sender=peer)

    def _connect(self, dialer: Machine, other: Machine) -> None:
        earlier = other.links.get(dialer.index)
        if earlier is not None:  # of an earlier run of the dialer
            self._lose(other, dialer, earlier)
            if other.stack is None:
                return
        self._note("connect", dialer, other)
        link = Link(dialer, other)
        dialer.links[other.index] = other.links[dialer.index] = link
        for one, peer in ((dialer, other), (other, dialer)):
            if one.stack is not None:  # it may lose power at any moment
                self.tell(one, Connected(), sender=peer.peer_id)

    def _hang_up(self, machine: Machine, other: Machine) -> None:
        """Once what was said before has arrived."""
        self._note("hang up", machine, other)
        link = machine.links.get(other.index)
        if link is not None:
            travel_ns = self.network.rtt_ns(machine.index, other.index) // 2
            arrived_ns = link.arrivals_ns[other.index] - self.loop.now_ns
            self._break(link, max(travel_ns, arrived_ns))

    def _break(self, link: Link, after_ns: int) -> None:
        """Let both ends notice that a connection is gone, after so long."""
        self.loop.after(after_ns, self._lose, link.a, link.b, link)
        self.loop.after(after_ns, self._lose, link.b, link.a, link)

    def _lose(self, machine: Machine, peer: Machine, link: Link) -> None:
        """The machine notices that this connection is gone, if it has not yet."""
        if machine.is_asleep:
            machine.missed.append(partial(self._lose, machine, peer, link))
        elif machine.stack is not None and machine.links.get(peer.index) is link:
            del machine.links[peer.index]
            self.tell(machine, Disconnected("link cut"), sender=peer.peer_id)

    def _silence(self) -> None:
        """Break what leads nowhere now."""
        for machine in self.machines:
            for index, link in machine.links.items():
                if machine.index < index and not self.network.joins(machine.index, index):
                    self._break(link, SILENCE_NS)

    # --- models ---------------------------------------------------------------------------------

    def _do_duties(self, machine: Machine, duties: DutiesChanged) -> None:
        """Load what is to be loaded and let go of what is not. What its own operator wants here
        stays, unless the node is drained, as in `node.py`.
        """
        self._do_parts(machine, duties)
        owned = {duty.model for duty in duties.duties if duty.load}
        wanted = tuple(
            model
            for model, (_, holding) in sorted(machine.models.items())
            if model in owned or (holding.wanted and not duties.is_drained)
        )
        if wanted == machine.running:
            return
        machine.running = wanted
        for listen in self.on_running:
            listen(machine)
        for model in wanted:
            if model not in machine.loaded:
                machine.loads += 1
                self._note("load", machine)
                load_ns = self.loading(machine, machine.models[model][1])
                done = partial(self._loaded, machine, machine.starts, model)
                self.fetch(machine, model, partial(self.loop.after, load_ns, done))
        dropped = [model for model in machine.loaded if model not in wanted]
        for model in dropped:
            del machine.loaded[model]
        if dropped:
            self.loop.after(0, self._tell_models, machine)

    def _loaded(self, machine: Machine, run: int, model: str) -> None:
        if machine.is_asleep:
            machine.missed.append(partial(self._loaded, machine, run, model))
        elif machine.starts == run and machine.stack is not None and model in machine.running:
            machine.loaded[model] = None
            self._tell_models(machine)

    def _do_parts(self, machine: Machine, duties: DutiesChanged) -> None:
        """Load the layers that are to be loaded, in the time that their share of the model takes,
        and let go of the others."""
        wanted = {
            (duty.model, first, end)
            for duty in duties.duties
            for first, end in duty.parts
            if duty.model in machine.models
        }
        dropped = [part for part in machine.parts if part not in wanted]
        for part in dropped:
            del machine.parts[part]
        for part in sorted(wanted - machine.parts.keys()):
            machine.parts[part] = False
            machine.loads += 1
            self._note("load", machine)
            model, first, end = part
            holding = machine.models[model][1]
            load_ns = self.loading(machine, holding) * (end - first) // max(holding.layers, 1)
            done = partial(self._part_loaded, machine, machine.starts, part)
            self.fetch(machine, model, partial(self.loop.after, load_ns, done))
        if dropped:
            self.loop.after(0, self._tell_models, machine)

    def _part_loaded(self, machine: Machine, run: int, part: tuple[str, int, int]) -> None:
        if machine.is_asleep:
            machine.missed.append(partial(self._part_loaded, machine, run, part))
        elif machine.starts == run and machine.stack is not None and part in machine.parts:
            machine.parts[part] = True
            self._tell_models(machine)

    def tell_offers(self, machine: Machine) -> None:
        """What it serves, and how busy it is with that."""
        if machine.is_awake:
            models = (*machine.loaded, *machine.heads)
            offers = tuple(self.offered(machine, model) for model in models)
            self.tell(machine, SetOffers(offers))

    def _tell_models(self, machine: Machine) -> None:
        """What it serves and has at hand, when that has changed."""
        for listen in self.on_models:
            listen(machine)
        if not machine.is_awake:
            return
        self.tell_offers(machine)
        if machine.stack is not None:
            self.tell(machine, SetHoldings(holdings_of(machine)))


def holdings_of(machine: Machine) -> tuple[Holding, ...]:
    """Its model files and how far they are loaded."""
    return tuple(
        replace(
            holding,
            state="ready" if model in machine.loaded else holding.state,
            parts=tuple(
                (first, end)
                for (of, first, end), is_loaded in sorted(machine.parts.items())
                if of == model and is_loaded
            ),
        )
        for model, (_, holding) in machine.models.items()
    )


class _Flood:
    """A pubsub for small meshes: everybody passes on what is new to all members."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._seen: dict[int, set[bytes]] = {}

    def switched_on(self, machine: Machine) -> None:
        self._seen[machine.index] = set()

    def publish(self, machine: Machine, data: bytes) -> None:
        self._seen[machine.index].add(data)
        self._pass_on(machine, data)

    def _pass_on(self, machine: Machine, data: bytes) -> None:
        world = self._world
        for member in machine.live.members():
            other = world.by_peer[member.peer]
            delay_ns = world.network.delay_ns(machine.index, other.index)
            world.loop.after(delay_ns, self._arrive, machine, other, data)

    def _arrive(self, source: Machine, target: Machine, data: bytes) -> None:
        there = target.is_awake and source.index in target.links
        if not there or data in self._seen[target.index]:
            return
        if self._world.network.reaches(source.index, target.index):
            self._seen[target.index].add(data)
            if self._world.hear(target, data):
                self._pass_on(target, data)


class _Shelf:
    """A DHT that keeps all and that nobody asks."""

    def __init__(self) -> None:
        self.records: dict[int, bytes] = {}

    def switched_on(self, machine: Machine) -> None:
        pass

    def publish(self, machine: Machine, record: bytes, models: tuple[str, ...]) -> None:
        self.records[machine.index] = record


__all__ = ["SILENCE_NS", "Dht", "Fetch", "Loading", "Power", "Pubsub", "World", "holdings_of"]
