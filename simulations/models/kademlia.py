"""The mesh's Kademlia DHT as py-libp2p runs it, and what a node's driver does with it.

Every machine has a routing table of k-buckets over a 256-bit key space. It learns members when
they connect, whoever asks it, and whoever it is told of in answers; it forgets whom it cannot
reach. A look-up asks the `ALPHA` nearest it knows that have not been asked, waits for all of them,
takes their nearest into account and goes on until that brings nothing nearer; whoever is dead
holds it up for `QUERY_TIMEOUT_S`. One such round is one event.

The driver (`meshnode.driver`) publishes its node record and provides the mesh and its models; it
looks for providers of the mesh `LOOKUP_FIRST_S` after its start and every `LOOKUP_EVERY_S`, and
tells its stack what it finds. What comes out is hearsay there, so records are checked by the real
stacks: on storing, as production's validator does, and on finding.

Simplified: the asked peer's table counts as it is when a round ends; asking a stranger costs the
round trips of a handshake, but the connection is not kept; nothing is provided anew after 22 h.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from meshnode.protocol.stack import Learn, RecordFound
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.streams import number
from meshnode_simulations.kernel.world import World

# py-libp2p's `kad_dht.common`, not imported, as the whole of libp2p would be with it.
BUCKET_SIZE = 20
ALPHA = 10
BETA = 3
"""At least so many of the nearest must have been asked before a look-up ends."""
QUERY_TIMEOUT_S = 10.0
ROUNDS_MAX = 20
REFRESH_EVERY_S = 600.0
"""How often each bucket is refreshed by a look-up of a random key in it."""

# As in `meshnode.transport.dht` and `meshnode.driver`, whose constants have the reasons.
OPERATION_TIMEOUT_S = 25.0
PROVIDERS_MAX = 8
LOOKUP_FIRST_S = 5.0
LOOKUP_EVERY_S = 120.0

HANDSHAKE_RTTS = 3
"""To ask a stranger: QUIC's handshake, then `Hello` and `Welcome` until it admits us."""
KEY_BITS = 256
MESH = ""
"""What all members provide."""

_Provider = tuple[int, tuple[str, ...]]
"""A machine, and where it said that it is."""
_TIMEOUT_NS = int(QUERY_TIMEOUT_S * NS_PER_S)


def key_of(name: str) -> int:
    """The point of a peer or of a subject in the key space."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")


class RoutingTable:
    """k-buckets by the length of the prefix that a key shares with ours; the last bucket holds all
    that share more, and is split when it is full."""

    def __init__(self, own: int, bucket_size: int = BUCKET_SIZE) -> None:
        self._own = own
        self._size = bucket_size
        self._buckets: list[dict[int, int]] = [{}]
        """Of each machine known its key, the one that was heard of first being first."""

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    def __contains__(self, machine: int) -> bool:
        return any(machine in bucket for bucket in self._buckets)

    def add(self, machine: int, key: int, is_alive: Callable[[int], bool]) -> bool:
        """Take a machine up, if its bucket has room or the oldest in it does not answer."""
        if key == self._own:
            return False
        shared = KEY_BITS - (key ^ self._own).bit_length()
        while True:
            place = min(shared, len(self._buckets) - 1)
            bucket = self._buckets[place]
            if machine in bucket:
                bucket[machine] = bucket.pop(machine)
                return True
            if len(bucket) < self._size:
                bucket[machine] = key
                return True
            if place < len(self._buckets) - 1 or place == KEY_BITS - 1:
                break
            self._split(place)
        oldest = next(iter(bucket))
        if is_alive(oldest):
            return False
        del bucket[oldest]
        bucket[machine] = key
        return True

    def _split(self, place: int) -> None:
        stays: dict[int, int] = {}
        goes: dict[int, int] = {}
        for machine, key in self._buckets[place].items():
            shares_more = KEY_BITS - (key ^ self._own).bit_length() > place
            (goes if shares_more else stays)[machine] = key
        self._buckets[place:] = [stays, goes]

    def remove(self, machine: int) -> None:
        for bucket in self._buckets:
            bucket.pop(machine, None)

    def nearest(self, target: int, count: int = BUCKET_SIZE) -> list[int]:
        """The machines nearest to a key, the nearest first."""
        known = [
            (key ^ target, machine) for bucket in self._buckets for machine, key in bucket.items()
        ]
        known.sort()
        return [machine for _, machine in known[:count]]

    def prefixes(self) -> list[int]:
        """Of every bucket that is not empty, how long its shared prefix is."""
        return [place for place, bucket in enumerate(self._buckets) if bucket]


@dataclass(slots=True)
class _Node:
    """One machine's part of the DHT, from its start to its end."""

    run: int
    key: int
    table: RoutingTable
    met: dict[int, None] = field(default_factory=dict)
    """The members that it was connected to when it last looked."""
    records: dict[int, bytes] = field(default_factory=dict)
    """By the key of their author."""
    providers: dict[int, dict[int, tuple[str, ...]]] = field(default_factory=dict)
    """By the key of the subject: machines, and where they said they are."""
    to_publish: tuple[bytes, tuple[str, ...]] | None = None
    is_publishing: bool = False


@dataclass(slots=True)
class Lookups:
    """What all look-ups together came to."""

    count: int = 0
    rounds: int = 0
    queries: int = 0
    timeouts: int = 0


@dataclass(eq=False, slots=True)
class _Search:
    """A look-up on its way. `then` gets the nearest machines, the nearest first."""

    machine: Machine
    node: _Node
    target: int
    until_ns: int
    then: Callable[[list[int]], None]
    nearest: list[int] = field(default_factory=list)
    asked: dict[int, None] = field(default_factory=dict)
    rounds: int = 0


class Kademlia:
    """See the module; a `kernel.world.Dht`."""

    def __init__(self, world: World) -> None:
        self.lookups = Lookups()
        self._world = world
        self._nodes: dict[int, _Node] = {}
        self._keys: dict[int, int] = {}

    # --- what the driver does -------------------------------------------------------------------

    def switched_on(self, machine: Machine) -> None:
        key = self._key(machine.index)
        node = _Node(machine.starts, key, RoutingTable(key))
        self._nodes[machine.index] = node
        self._later(machine, node, LOOKUP_FIRST_S, self._look_up_peers)
        self._later(machine, node, REFRESH_EVERY_S, self._refresh)

    def publish(self, machine: Machine, record: bytes, models: tuple[str, ...]) -> None:
        """Store a machine's record and make it a provider of the mesh and of its models; one such
        at a time, and not at all while it knows nobody, as the driver does."""
        node = self._nodes[machine.index]
        node.to_publish = (record, models)
        if not node.is_publishing:
            node.is_publishing = True
            self._publish_next(machine, node)

    def _publish_next(self, machine: Machine, node: _Node) -> None:
        if node.to_publish is None or not self._size(machine, node):
            node.is_publishing, node.to_publish = False, None
            return
        (record, models), node.to_publish = node.to_publish, None
        node.records[node.key] = record

        def provide(subjects: tuple[str, ...]) -> None:
            if subjects:
                then = partial(provide, subjects[1:])
                self._provide(machine, node, key_of(f"provider/{subjects[0]}"), then)
            else:
                self._publish_next(machine, node)

        store = partial(self._store_record, node.key, record)
        self._put(machine, node, node.key, store, partial(provide, (MESH, *models)))

    def _look_up_peers(self, machine: Machine, node: _Node) -> None:
        """Ask for providers of the mesh, and for the records of those that are unknown."""
        again = partial(self._later, machine, node, LOOKUP_EVERY_S, self._look_up_peers)
        if self._size(machine, node):
            learn = partial(self._learn, machine, node, again)
            self._find_providers(machine, node, key_of(f"provider/{MESH}"), learn)
        else:
            again()

    def _learn(
        self, machine: Machine, node: _Node, then: Callable[[], None], found: list[_Provider]
    ) -> None:
        """Tell the stack of providers that it does not know, one after the other."""
        unknown = [
            (index, addrs)
            for index, addrs in found
            if index != machine.index
            and machine.live.records.get(self._world.machines[index].peer_id) is None
        ]
        if not unknown or not self._is_there(machine, node):
            then()
            return
        (index, addrs), *rest = unknown

        def told(record: bytes | None) -> None:
            message = Learn(addrs) if record is None else RecordFound(record)
            self._world.tell(machine, message, sender=self._world.machines[index].peer_id)
            if self._is_there(machine, node):
                self._learn(machine, node, then, rest)

        self._find_record(machine, node, index, told)

    def _refresh(self, machine: Machine, node: _Node) -> None:
        """Look up ourselves, and a random key in each bucket, one after the other."""
        targets = [node.key]
        for shared in node.table.prefixes():
            # As our own key up to there, then another bit, then anything.
            low = KEY_BITS - 1 - shared
            drawn = number(
                self._world.seed, "refresh", machine.index, self._world.loop.now_ns, shared
            )
            targets.append((node.key >> low ^ 1) << low | drawn % (1 << min(low, 64)))

        def next_one(nearest: list[int]) -> None:
            for index in nearest:
                self._add(machine, node, index)
            if targets:
                self._search(machine, node, targets.pop(0), next_one)
            else:
                self._later(machine, node, REFRESH_EVERY_S, self._refresh)

        next_one([])

    # --- operations -----------------------------------------------------------------------------

    def _provide(
        self, machine: Machine, node: _Node, subject: int, then: Callable[[], None]
    ) -> None:
        addrs = (machine.address,)
        node.providers.setdefault(subject, {})[machine.index] = addrs

        def store(other: Machine, holder: _Node) -> None:
            holder.providers.setdefault(subject, {})[machine.index] = addrs

        self._put(machine, node, subject, store, then)

    def _store_record(self, key: int, record: bytes, other: Machine, holder: _Node) -> None:
        if other.live.check_record(record, self._world.now_of(other)) is not None:
            holder.records[key] = record

    def _put(
        self,
        machine: Machine,
        node: _Node,
        target: int,
        store: Callable[[Machine, _Node], None],
        then: Callable[[], None],
    ) -> None:
        """Have something stored at those nearest to a key."""

        def at_nearest(nearest: list[int]) -> None:
            last_ns = 0
            for index in nearest:
                takes_ns = self._asking_ns(machine, node, index)
                if takes_ns is not None:
                    self._world.loop.after(takes_ns, self._on_stored, index, store)
                last_ns = max(last_ns, takes_ns or _TIMEOUT_NS)
            self._world.loop.after(last_ns, self._when_there, machine, node, then)

        self._search(machine, node, target, at_nearest)

    def _on_stored(self, index: int, store: Callable[[Machine, _Node], None]) -> None:
        other, holder = self._world.machines[index], self._nodes[index]
        if other.is_awake and holder.run == other.starts:
            store(other, holder)

    def _find_record(
        self, machine: Machine, node: _Node, author: int, then: Callable[[bytes | None], None]
    ) -> None:
        """The first record of somebody that is found; none in time is none."""
        target = self._key(author)

        def ask(nearest: list[int]) -> None:
            answers = [
                (takes_ns, holder.records[target])
                for index in nearest[:ALPHA]
                if (takes_ns := self._asking_ns(machine, node, index)) is not None
                and target in (holder := self._nodes[index]).records
            ]
            if answers:
                takes_ns, record = min(answers, key=lambda answer: answer[0])
                self._world.loop.after(
                    takes_ns, self._when_there, machine, node, partial(then, record)
                )
            elif nearest[ALPHA:]:
                takes = [self._asking_ns(machine, node, index) for index in nearest[:ALPHA]]
                slowest_ns = max(_TIMEOUT_NS if ns is None else ns for ns in takes)
                again = partial(ask, nearest[ALPHA:])
                self._world.loop.after(slowest_ns, self._when_there, machine, node, again)
            else:
                then(None)

        if target in node.records:
            then(node.records[target])
        else:
            self._search(machine, node, target, ask)

    def _find_providers(
        self,
        machine: Machine,
        node: _Node,
        subject: int,
        then: Callable[[list[_Provider]], None],
    ) -> None:
        """Up to `PROVIDERS_MAX` of others, as others have them stored."""
        found: dict[int, tuple[str, ...]] = {}

        def ask(nearest: list[int]) -> None:
            slowest_ns = 0
            for index in nearest[:ALPHA]:
                takes_ns = self._asking_ns(machine, node, index)
                slowest_ns = max(slowest_ns, _TIMEOUT_NS if takes_ns is None else takes_ns)
                if takes_ns is not None:
                    found.update(self._nodes[index].providers.get(subject, {}))
            rest = nearest[ALPHA:]
            if rest and len(found) < PROVIDERS_MAX:
                self._world.loop.after(
                    slowest_ns, self._when_there, machine, node, partial(ask, rest)
                )
                return
            node.providers.setdefault(subject, {}).update(found)
            others = [each for each in found.items() if each[0] != machine.index]
            told = partial(then, others[:PROVIDERS_MAX])
            self._world.loop.after(slowest_ns, self._when_there, machine, node, told)

        self._search(machine, node, subject, ask)

    # --- look-ups -------------------------------------------------------------------------------

    def _search(
        self, machine: Machine, node: _Node, target: int, then: Callable[[list[int]], None]
    ) -> None:
        """Find the machines nearest to a key, as `find_closest_peers_network` does."""
        self.lookups.count += 1
        self._meet_members(machine, node)
        until_ns = self._world.loop.now_ns + int(OPERATION_TIMEOUT_S * NS_PER_S)
        search = _Search(machine, node, target, until_ns, then)
        search.nearest = node.table.nearest(target)
        self._ask_next(search)

    def _ask_next(self, search: _Search) -> None:
        machine, node = search.machine, search.node
        asking = [index for index in search.nearest if index not in search.asked][:ALPHA]
        if not asking or search.rounds >= ROUNDS_MAX:
            search.then(search.nearest)
            return
        search.rounds += 1
        self.lookups.rounds += 1
        self.lookups.queries += len(asking)
        slowest_ns = 0
        answering: list[int] = []
        for index in asking:
            search.asked[index] = None
            takes_ns = self._asking_ns(machine, node, index)
            if takes_ns is None:
                self.lookups.timeouts += 1
                node.table.remove(index)
                slowest_ns = _TIMEOUT_NS
            else:
                answering.append(index)
                slowest_ns = max(slowest_ns, takes_ns)
        self._world.trace.note(self._world.loop.now_ns, machine.index, len(asking), "FindNode")
        if self._world.loop.now_ns + slowest_ns > search.until_ns:
            # The operation as a whole is given up, with nothing.
            self._world.loop.at(
                search.until_ns, self._when_there, machine, node, partial(search.then, [])
            )
            return
        self._world.loop.after(
            slowest_ns, self._when_there, machine, node, partial(self._answered, search, answering)
        )

    def _answered(self, search: _Search, answering: Iterable[int]) -> None:
        machine, node = search.machine, search.node
        new: dict[int, None] = {}
        for index in answering:
            other, holder = self._world.machines[index], self._nodes[index]
            if not other.is_awake or holder.run != other.starts:
                continue
            self._meet_members(other, holder)
            self._add(other, holder, machine.index)
            self._add(machine, node, index)
            for each in holder.table.nearest(search.target):
                if each != machine.index:
                    new[each] = None
        before = search.nearest
        known = sorted(
            {**dict.fromkeys(before), **new}, key=lambda index: self._key(index) ^ search.target
        )
        search.nearest = known[:BUCKET_SIZE]
        for index in new:
            self._add(machine, node, index)
        asked = sum(index in search.asked for index in search.nearest)
        if new and search.nearest == before and asked >= min(BETA, len(before)):
            search.then(search.nearest)
        else:
            self._ask_next(search)

    # --- who is there ---------------------------------------------------------------------------

    def _asking_ns(self, machine: Machine, node: _Node, index: int) -> int | None:
        """How long a question and its answer take now; None if there will be none."""
        world, other = self._world, self._world.machines[index]
        if not other.is_awake or not world.network.joins(machine.index, index):
            return None
        trips = 1
        if index not in machine.links:
            if not world.may_dial(machine, other):
                return None
            trips += HANDSHAKE_RTTS
        return (
            sum(
                world.network.delay_ns(machine.index, index)
                + world.network.delay_ns(index, machine.index)
                for _ in range(trips)
            )
            + other.lag_ns
        )

    def _size(self, machine: Machine, node: _Node) -> int:
        self._meet_members(machine, node)
        return len(node.table)

    def _meet_members(self, machine: Machine, node: _Node) -> None:
        """Take up the members that it is connected to, and let go of those that it was connected
        to; production does as they come and go."""
        for index in [index for index in node.met if index not in machine.links]:
            del node.met[index]
            node.table.remove(index)
        for index in machine.links:
            if machine.live.is_member(self._world.machines[index].peer_id):
                node.met[index] = None
                self._add(machine, node, index)

    def _add(self, machine: Machine, node: _Node, index: int) -> None:
        if index != machine.index:
            node.table.add(index, self._key(index), self._answers)

    def _answers(self, index: int) -> bool:
        return self._world.machines[index].is_awake

    def _key(self, index: int) -> int:
        key = self._keys.get(index)
        if key is None:
            key = self._keys[index] = key_of(self._world.machines[index].peer_id)
        return key

    def _is_there(self, machine: Machine, node: _Node) -> bool:
        return machine.stack is not None and machine.starts == node.run

    def _when_there(self, machine: Machine, node: _Node, action: Callable[[], None]) -> None:
        """Go on, unless the machine has been switched off or asleep meanwhile."""
        if not self._is_there(machine, node):
            return
        if machine.is_asleep:
            machine.missed.append(partial(self._when_there, machine, node, action))
        else:
            action()

    def _later(
        self,
        machine: Machine,
        node: _Node,
        after_s: float,
        action: Callable[[Machine, _Node], None],
    ) -> None:
        self._world.loop.after(
            int(after_s * NS_PER_S),
            self._when_there,
            machine,
            node,
            partial(action, machine, node),
        )


__all__ = ["ALPHA", "BUCKET_SIZE", "Kademlia", "Lookups", "RoutingTable", "key_of"]
