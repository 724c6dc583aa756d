"""Gossipsub as production sets it up, as a model: a mesh of a few neighbours for each machine,
messages pushed through it at once, and repair by gossip.

A copy of a message that the receiver has already changes nothing but the count of bytes, so copies
are counted and not simulated: of all that are on their way to a machine only the first is an
event. When a node takes a message it computes when its copies would arrive; where another is on
its way and not later, the new one is a duplicate. That is what would happen with an event for
each, at a sixth of the events.

Meshes are looked after once in `HEARTBEAT_S`, all machines at once, and only if something is
published; between two publications nobody could tell the difference. Whoever has missed a message
(its mesh was broken, it had just come) hears of it by gossip at one of the next heartbeats from
members that it is connected to, and asks for it.

Simplified: one topic; no scores (production's peers behave); a clogged direction loses copies
instead of delaying them; a machine that restarts within seconds of a message does not get it
twice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial

from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Link, Machine
from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.kernel.world import World

DEGREE, DEGREE_LOW, DEGREE_HIGH = 6, 4, 12
HEARTBEAT_S = 1.0
"""Both as in `meshnode.transport.gossip`, which is not imported, as libp2p would be with it."""
GOSSIP_HEARTBEATS = 3
"""py-libp2p's `gossip_window`: for how many heartbeats a message is offered to others."""
GOSSIP_PEERS_MIN = 6
GOSSIP_SHARE = 0.25
"""To how many members outside the mesh: at least so many, and this share of all."""
PRUNED_FOR_S = 60.0
"""py-libp2p's `prune_back_off`: who was pruned is not taken back for so long."""
ENVELOPE_BYTES = 250
"""What strict signing adds to a message: author, number, topic, key, signature (measured: 247)."""
MESSAGE_ID_BYTES = 46
"""An author's id and a number: what an IHAVE says of a message."""

_HEARTBEAT_NS = int(HEARTBEAT_S * NS_PER_S)
_PRUNED_FOR_NS = int(PRUNED_FOR_S * NS_PER_S)


@dataclass(eq=False, slots=True)
class _Message:
    """One message on its way. `arrivals_ns` is when each machine gets or got it first."""

    author: int
    data: bytes
    size_bytes: int
    arrivals_ns: dict[int, int] = field(default_factory=dict)
    heartbeats: int = 0


@dataclass(slots=True)
class Spread:
    """What all messages together came to."""

    published: int = 0
    received: int = 0
    """Machines that a message was new to, its author not counted."""
    copies: int = 0
    """Messages pushed, first ones and duplicates."""
    spared: int = 0
    """Copies not sent, since the neighbour had said in time that it has the message (IDONTWANT)."""
    repaired: int = 0
    """Messages that came by gossip."""
    hops: int = 0
    """Summed over all that were received."""


class Gossipsub:
    """See the module; a `kernel.world.Pubsub`."""

    def __init__(
        self,
        world: World,
        *,
        degree: int = DEGREE,
        degree_low: int = DEGREE_LOW,
        degree_high: int = DEGREE_HIGH,
    ) -> None:
        self.spread = Spread()
        self._world = world
        self._degree, self._low, self._high = degree, degree_low, degree_high
        self._rng: random.Random = stream(world.seed, "gossipsub")
        self._mesh: dict[int, dict[int, Link]] = {}
        """Each machine's neighbours, and the connection that they are neighbours over."""
        self._pruned_until_ns: dict[tuple[int, int], int] = {}
        self._heartbeat_ns = 0

    def switched_on(self, machine: Machine) -> None:
        self._mesh[machine.index] = {}

    def neighbours(self, machine: Machine) -> tuple[int, ...]:
        """Whom a machine pushes messages to, as of the last heartbeat."""
        return tuple(self._mesh[machine.index])

    def publish(self, machine: Machine, data: bytes) -> None:
        world = self._world
        self._look_after_meshes()
        mesh = self._mesh[machine.index]
        if len(mesh) < self._low:
            # Production grafts whoever subscribes at once while there are fewer.
            self._drop_broken(machine, mesh)
            self._graft(machine, mesh, self._low - len(mesh))
        message = _Message(machine.index, data, len(data) + ENVELOPE_BYTES)
        message.arrivals_ns[machine.index] = world.loop.now_ns
        self.spread.published += 1
        self._push(machine, message, None, 0)
        heartbeat_ns = self._heartbeat_ns + _HEARTBEAT_NS
        world.loop.at(heartbeat_ns, self._gossip, message)

    # --- the mesh -------------------------------------------------------------------------------

    def _look_after_meshes(self) -> None:
        """What the heartbeats since the last message came to."""
        now_ns = self._world.loop.now_ns
        if now_ns < self._heartbeat_ns + _HEARTBEAT_NS:
            return
        self._heartbeat_ns = now_ns - now_ns % _HEARTBEAT_NS
        for machine in self._world.machines:
            mesh = self._mesh.get(machine.index)
            if mesh is None or not machine.is_awake:
                continue
            self._drop_broken(machine, mesh)
            if len(mesh) < self._low:
                self._graft(machine, mesh, self._degree - len(mesh))
            elif len(mesh) > self._high:
                self._prune(machine, mesh)

    def _drop_broken(self, machine: Machine, mesh: dict[int, Link]) -> None:
        links = machine.links
        broken = [index for index, link in mesh.items() if links.get(index) is not link]
        for index in broken:
            del mesh[index]

    def _graft(self, machine: Machine, mesh: dict[int, Link], wanted: int) -> None:
        """Take up to so many members more; nobody refuses, but whoever has pruned us lately."""
        now_ns, here, pruned = self._world.loop.now_ns, machine.index, self._pruned_until_ns
        others = [
            index
            for index in machine.links
            if index not in mesh and pruned.get(_pair(here, index), now_ns) <= now_ns
        ]
        while wanted > 0 and (other := self._one_member(machine, others)) is not None:
            mesh[other.index] = self._mesh[other.index][here] = machine.links[other.index]
            wanted -= 1

    def _prune(self, machine: Machine, mesh: dict[int, Link]) -> None:
        """Let go of as many neighbours as are too many, and do not take them back for a while."""
        until_ns = self._world.loop.now_ns + _PRUNED_FOR_NS
        for index in self._rng.sample(tuple(mesh), len(mesh) - self._degree):
            del mesh[index]
            self._mesh[index].pop(machine.index, None)
            self._pruned_until_ns[_pair(machine.index, index)] = until_ns

    def _are_members(self, machine: Machine, index: int) -> bool:
        """Whether these may exchange messages: connected, and members to each other."""
        other = self._world.machines[index]
        link = machine.links.get(index)
        return (
            link is not None
            and other.is_awake
            and other.links.get(machine.index) is link
            and machine.live.is_member(other.peer_id)
            and other.live.is_member(machine.peer_id)
        )

    def _one_member(self, machine: Machine, others: list[int]) -> Machine | None:
        """One of them, by chance, that the machine exchanges messages with."""
        while others:
            index = others.pop(self._rng.randrange(len(others)))
            if self._are_members(machine, index):
                return self._world.machines[index]
        return None

    # --- messages -------------------------------------------------------------------------------

    def _push(self, machine: Machine, message: _Message, sender: int | None, hops: int) -> None:
        """Send it to all neighbours but those that it is from."""
        world, spread = self._world, self.spread
        network, now_ns, machines = world.network, world.loop.now_ns, world.machines
        here, links, arrivals_ns = machine.index, machine.links, message.arrivals_ns
        for index, link in self._mesh[here].items():
            if index in (sender, message.author) or links.get(index) is not link:
                continue
            if link.held and index in link.held:
                continue
            first_ns = arrivals_ns.get(index)
            if first_ns is not None and (
                first_ns + network.latency.one_way_ns(index, here) <= now_ns
            ):
                spread.spared += 1
                continue
            spread.copies += 1
            target = machines[index]
            at_ns = now_ns
            if machine.up is not None:
                at_ns = machine.up.pass_at(at_ns, message.size_bytes)
            at_ns += network.delay_ns(here, index)
            if target.down is not None:
                at_ns = target.down.pass_at(at_ns, message.size_bytes)
            at_ns += target.lag_ns
            world.trace.bytes["Advert"] += message.size_bytes
            if first_ns is None or at_ns < first_ns:
                arrivals_ns[index] = at_ns
                world.loop.at(at_ns, self._arrive, message, machine, target, link, hops + 1)

    def _arrive(
        self, message: _Message, source: Machine, target: Machine, link: Link, hops: int
    ) -> None:
        world = self._world
        now_ns = world.loop.now_ns
        if target.is_asleep:
            target.missed.append(partial(self._wake_to, message, source, target, link, hops))
            return
        if message.arrivals_ns.get(target.index) != now_ns:
            return  # another copy was faster
        if target.links.get(source.index) is not link or not world.network.reaches(
            source.index, target.index
        ):
            del message.arrivals_ns[target.index]
            return
        world.trace.note(now_ns, source.index, target.index, "Advert")
        world.trace.messages["Advert"] += 1
        self.spread.received += 1
        self.spread.hops += hops
        if world.hear(target, message.data):
            self._push(target, message, source.index, hops)

    def _wake_to(
        self, message: _Message, source: Machine, target: Machine, link: Link, hops: int
    ) -> None:
        """What has lain in its buffers while it was asleep; but once, however many copies."""
        first_ns = message.arrivals_ns.get(target.index)
        if first_ns is not None and first_ns < self._world.loop.now_ns:
            message.arrivals_ns[target.index] = self._world.loop.now_ns
            self._arrive(message, source, target, link, hops)

    # --- repair ---------------------------------------------------------------------------------

    def _gossip(self, message: _Message) -> None:
        """A heartbeat: whoever has it tells some members outside its mesh; who lacks it asks."""
        world = self._world
        now_ns = world.loop.now_ns
        lacking = [
            machine
            for machine in world.machines
            if machine.is_awake and machine.index not in message.arrivals_ns
        ]
        for machine in lacking:
            offers = [
                index
                for index in machine.links
                if message.arrivals_ns.get(index, now_ns) < now_ns and self._offers(index)
            ]
            source = self._one_member(machine, offers)
            if source is None:
                continue
            # There with the offer, back with the question, there with the message.
            at_ns = now_ns + world.network.delay_ns(source.index, machine.index)
            at_ns += world.network.delay_ns(machine.index, source.index)
            at_ns += world.network.delay_ns(source.index, machine.index) + machine.lag_ns
            message.arrivals_ns[machine.index] = at_ns
            self.spread.repaired += 1
            self.spread.copies += 1
            world.trace.bytes["Advert"] += message.size_bytes
            link = machine.links[source.index]
            world.loop.at(at_ns, self._arrive, message, source, machine, link, 1)
        world.trace.bytes["IHave"] += self._offers_count(message) * MESSAGE_ID_BYTES
        message.heartbeats += 1
        if message.heartbeats < GOSSIP_HEARTBEATS:
            world.loop.after(_HEARTBEAT_NS, self._gossip, message)

    def _offers(self, index: int) -> bool:
        """Whether this heartbeat's offer of a machine goes to a given member outside its mesh."""
        outside = len(self._world.machines[index].links) - len(self._mesh[index])
        return self._rng.random() * outside < _gossip_peers(outside)

    def _offers_count(self, message: _Message) -> int:
        """How many members are told of a message in one heartbeat."""
        machines, meshes = self._world.machines, self._mesh
        outside = (len(machines[index].links) - len(meshes[index]) for index in message.arrivals_ns)
        return sum(min(_gossip_peers(each), each) for each in outside if each > 0)


def _gossip_peers(outside: int) -> int:
    return max(GOSSIP_PEERS_MIN, int(outside * GOSSIP_SHARE))


def _pair(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


__all__ = ["DEGREE", "DEGREE_HIGH", "DEGREE_LOW", "HEARTBEAT_S", "Gossipsub", "Spread"]
