"""Who owns what: replicas that stay, replicas that are new, and what is worth moving.

In this order, so that what matters more gets the memory: what operators asked for; a first replica
of every model, where it is now if it can be; further replicas, shared out by demand; moves that
gain enough. Rounds of that until nothing changes any more, so that planning from a plan gives it
again. A load that nobody has to wait for counts against a bound; the rest is for a later plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from meshnode.protocol.placement.cost import (
    MICROSECONDS,
    MICROTOKENS,
    bottleneck_us,
    by_demand,
    fits_one,
    load_us,
    replica_us,
    units,
    want,
    weight,
)
from meshnode.protocol.placement.ledger import Cuts, Key, Ledger, key
from meshnode.protocol.placement.terms import Part, Problem, Replica

MOVES_MAX = 4
"""Replicas that one plan loads without need: each takes disk and network from who is served."""
GAIN_PERCENT = 15
"""What must be gained before something that works is moved: measured speeds vary by a tenth."""
PAYBACK_S = 600
"""A move must save as much time as it takes to load if the model is busy for so long."""
ROUNDS_MAX = 8
"""Two are common: one that places and one that finds nothing to do."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """The replicas, by model and then by owners, without standbys, and what is left for later."""

    replicas: tuple[Replica, ...]
    postponed: int


def assign(problem: Problem) -> Assigned:
    """All replicas that should be, as close to the current ones as is good."""
    budget = _Budget()
    cuts: Cuts = {}
    current = tuple(_sound(problem))
    before = frozenset(key(one) for one in current)
    for _ in range(ROUNDS_MAX):
        budget.postponed = 0
        draft = _Draft(problem, current, before, budget, cuts)
        draft.fill()
        settled = draft.replicas()
        if {key(one) for one in settled} == {key(one) for one in current}:
            return Assigned(settled, budget.postponed)
        current = settled
    return Assigned(current, budget.postponed + 1)


def _sound(problem: Problem) -> Iterator[Replica]:
    """The current replicas that cover a model that is still there; repeated ones once."""
    seen = set()
    for replica in problem.current:
        model = problem.models.get(replica.model)
        if model is None or not replica.parts or key(replica) in seen:
            continue
        owners = {part.owner for part in replica.parts}
        ends = [0, *(part.end for part in replica.parts)]
        firsts = [*(part.first for part in replica.parts), units(model)]
        if (
            ends == firsts
            and len(owners) == len(replica.parts)
            and all(part.first < part.end for part in replica.parts)
        ):
            seen.add(key(replica))
            yield replica


@dataclass
class _Budget:
    """Loads that nobody waits for: so many a plan, and one a host."""

    left: int = MOVES_MAX
    loading: set[str] = field(default_factory=set)
    postponed: int = 0

    def take(self, peers: Iterable[str], replicas: int = 1) -> bool:
        """Whether these hosts may load so many replicas now; if not it is put off.

        More than fit the bound are allowed if nothing else moves, or they would wait for ever.
        """
        peers = set(peers)
        if (replicas > self.left and self.left < MOVES_MAX) or peers & self.loading:
            self.postponed += 1
            return False
        self.left = max(0, self.left - replicas)
        self.loading |= peers
        return True


class _Draft:
    """One round: an assignment in the making, and the memory it leaves."""

    def __init__(
        self,
        problem: Problem,
        current: tuple[Replica, ...],
        before: frozenset[Key],
        budget: _Budget,
        cuts: Cuts,
    ) -> None:
        """`current` is what the last round made of the replicas `before`."""
        self._problem = problem
        self._before = before
        self._budget = budget
        self._ledger = Ledger(problem, cuts)
        self._current: dict[str, list[Replica]] = {model: [] for model in problem.models}
        for replica in current:
            self._current[replica.model].append(replica)
        self._operators: set[tuple[str, str]] = set()
        self._by_demand = by_demand(problem)
        self._cut = {name: not fits_one(problem, model) for name, model in problem.models.items()}

    def replicas(self) -> tuple[Replica, ...]:
        """What was placed, in an order that depends on nothing else."""
        return tuple(
            one for every in self._ledger.placed.values() for one in sorted(every, key=key)
        )

    def fill(self) -> None:
        self._place_what_operators_want()
        wanted = [model for model in self._by_demand if want(self._problem, model).replicas > 0]
        for model in wanted:
            if not self._ledger.placed[model]:
                self._keep_one(model)
        for model in wanted:
            if not self._ledger.placed[model]:
                self._cover(model)
        self._add_by_demand(wanted)
        for model in self._by_demand:
            self._improve(model)

    # --- what operators want ----------------------------------------------------------------

    def _place_what_operators_want(self) -> None:
        """Whole replicas where a node's operator serves the model, or the mesh's pinned it."""
        asked = {
            (model, peer)
            for peer, host in self._problem.hosts.items()
            for model, held in host.holdings.items()
            if held.wanted and model in self._problem.models
        }
        asked |= {
            (model, peer)
            for model in self._problem.models
            for peer in want(self._problem, model).pins
        }
        numbers = {
            (model, one.parts[0].owner): one.number
            for model, every in self._current.items()
            for one in every
            if len(one.parts) == 1
        }
        order = sorted(
            asked,
            key=lambda ask: (ask not in numbers, -weight(self._problem, ask[0]), ask),
        )
        for model, peer in order:
            if self._ledger.may_take(peer, model) and self._ledger.has_room(model, peer):
                self._ledger.add(self._ledger.whole(model, peer, numbers.get((model, peer), -1)))
                self._operators.add((model, peer))

    # --- what stays -------------------------------------------------------------------------

    def _keepable(self, model: str) -> list[Replica]:
        """Current replicas that can stay as they are and are not placed yet, fastest first."""
        fresh = [self._ledger.refreshed(one) for one in self._current[model]]
        kept = [one for one in fresh if one is not None]
        return sorted(
            kept,
            key=lambda one: (len(one.parts), replica_us(self._problem, one), one.number, key(one)),
        )

    def _keep_one(self, model: str) -> bool:
        """The fastest replica that can stay is placed; false if there is none."""
        for replica in self._keepable(model)[:1]:
            self._ledger.add(replica)
            return True
        return False

    # --- a first replica --------------------------------------------------------------------

    def _cover(self, model: str) -> None:
        """A first replica at any price but another model's only one."""
        replica = self._repaired(model) or self._first_whole(model)
        if replica is None:
            replica = self._whole_after_making_room(model)
        if replica is None:
            replica = next(iter(self._ledger.pipelines(model, 1)), None)
        if replica is None:
            leaving = [self._ledger.refreshed(one, draining=True) for one in self._current[model]]
            replica = next((one for one in leaving if one is not None), None)
        if replica is not None:
            self._ledger.add(replica)

    def _first_whole(self, model: str) -> Replica | None:
        hosts = sorted(
            self._ledger.hosts_for(model), key=lambda peer: self._ledger.cold(model, peer)
        )
        return self._ledger.whole(model, hosts[0]) if hosts else None

    def _repaired(self, model: str) -> Replica | None:
        """A current replica with new owners for the parts that lost theirs, standbys first."""
        for replica in sorted(self._current[model], key=lambda one: (one.number, key(one))):
            parts: list[Part] = []
            leaving = False
            for i, part in enumerate(replica.parts):
                host = self._problem.hosts.get(part.owner)
                stays = self._ledger.refreshed(replace(replica, parts=(part,)))
                if stays is not None:
                    parts += stays.parts
                    continue
                leaving = leaving or (host is not None and host.draining)
                standbys = replica.standbys[i] if i < len(replica.standbys) else ()
                others = {one.owner for one in replica.parts} | {one.owner for one in parts}
                heir = self._ledger.heir(model, part, standbys, others)
                if heir is None:
                    break
                parts.append(heir)
            if len(parts) == len(replica.parts):
                number = -1 if leaving else replica.number
                return Replica(model, tuple(parts), number=number)
        return None

    def _whole_after_making_room(self, model: str) -> Replica | None:
        """A whole replica where others can go elsewhere for it, each by one move."""
        hosts = [peer for peer in self._problem.hosts if self._ledger.may_take(peer, model)]
        for peer in sorted(hosts, key=lambda peer: (self._ledger.us(model, peer), peer)):
            moved: list[tuple[Replica, Replica]] = []
            here = [
                one
                for every in self._ledger.placed.values()
                for one in every
                if len(one.parts) == 1
                and one.parts[0].owner == peer
                and (one.model, peer) not in self._operators
            ]
            for one in sorted(here, key=lambda one: (-one.parts[0].bytes, one.model)):
                if self._ledger.has_room(model, peer):
                    break
                elsewhere = self._ledger.hosts_for(one.model)
                if elsewhere:
                    other = self._ledger.whole(one.model, elsewhere[0])
                    self._ledger.remove(one)
                    self._ledger.add(other)
                    moved.append((one, other))
            if self._ledger.has_room(model, peer):
                return self._ledger.whole(model, peer)
            for one, other in reversed(moved):
                self._ledger.remove(other)
                self._ledger.add(one)
        return None

    # --- further replicas -------------------------------------------------------------------

    def _add_by_demand(self, wanted: list[str]) -> None:
        """Turn by turn to the model with most demand per replica; who only keeps counts more."""
        open_ = {model for model in wanted if self._ledger.placed[model]}
        while True:
            open_ = {
                model
                for model in open_
                if len(self._ledger.placed[model]) < want(self._problem, model).replicas
            }
            if not open_:
                return
            model = min(open_, key=lambda model: (-self._urgency(model), model))
            if not self._keep_one(model) and not self._add_one(model):
                open_.remove(model)

    def _urgency(self, model: str) -> int:
        """Demand per replica that there is, in thousandths; more if the next is there already."""
        percent = 100 + GAIN_PERCENT if self._keepable(model) else 100
        placed = len(self._ledger.placed[model])
        return weight(self._problem, model) * percent * 10 // placed

    def _add_one(self, model: str) -> bool:
        """One more replica, if there is room and a load to spend."""
        if not self._cut[model]:
            hosts = self._ledger.hosts_for(model)
            if hosts and self._budget.take(hosts[:1]):
                self._ledger.add(self._ledger.whole(model, hosts[0]))
                return True
            return False
        present = list(self._ledger.placed[model])
        if all(key(one) not in self._before for one in present):
            return self._widened(model, present)
        more = self._ledger.pipelines(model, 1)
        if more and self._budget.take(part.owner for part in more[0].parts):
            self._ledger.add(more[0])
            return True
        return False

    def _widened(self, model: str, present: list[Replica]) -> bool:
        """New pipelines of a model give way to as many as are wanted, cut for many requests."""
        for one in present:
            self._ledger.remove(one)
        new = self._ledger.pipelines(model, want(self._problem, model).replicas)
        owners = [part.owner for one in new for part in one.parts]
        more = len(new) > len(present) and self._budget.take(owners, len(new) - len(present))
        for one in new if more else present:
            self._ledger.add(one)
        return more

    # --- moves that pay ---------------------------------------------------------------------

    def _improve(self, model: str) -> None:
        if self._cut[model]:
            self._recut(model)
            return
        for replica in list(self._ledger.placed[model]):
            if (model, replica.parts[0].owner) in self._operators:
                continue
            hosts = self._ledger.hosts_for(model)
            if not hosts:
                return
            other = self._ledger.whole(model, hosts[0])
            if len(replica.parts) > 1:
                # A model that fits on one host is not cut: no gain is asked for, only no loss.
                better = replica_us(self._problem, other) <= replica_us(self._problem, replica)
            else:
                better = self._pays(
                    replica_us(self._problem, replica), replica_us(self._problem, other), [other]
                )
            if better:
                self._exchange([replica], [other])

    def _recut(self, model: str) -> None:
        """Other pipelines, if they are more, or better by enough."""
        old = list(self._ledger.placed[model])
        if not old:
            return
        for one in old:
            self._ledger.remove(one)
        count = max(1, want(self._problem, model).replicas)
        new = self._ledger.pipelines(model, count)
        for one in old:
            self._ledger.add(one)
        if len(new) < len(old):
            return
        if len(new) == 1:
            before, after = (replica_us(self._problem, some[0]) for some in (old, new))
        else:
            before, after = self._ps_for_many(old), self._ps_for_many(new)
        if len(new) > len(old) or self._pays(before, after, new):
            self._exchange(old, new)

    def _ps_for_many(self, replicas: list[Replica]) -> int:
        """Picoseconds a token, all of them together and with many requests."""
        rate = sum(MICROTOKENS // bottleneck_us(self._problem, one) for one in replicas)
        return MICROTOKENS * MICROSECONDS // max(1, rate)

    def _pays(self, before: int, after: int, new: list[Replica]) -> bool:
        """Whether `after` is enough less time than `before` for what has to be loaded."""
        loading = max(load_us(self._problem, self._ledger.to_load(one), one.model) for one in new)
        gain = before - after
        return (
            gain * 100 > before * GAIN_PERCENT
            and loading * before <= PAYBACK_S * MICROSECONDS * gain
        )

    def _exchange(self, old: list[Replica], new: list[Replica]) -> None:
        """`new` for `old`, unless one of them is a plan's own or there is no load left."""
        if any(key(one) not in self._before for one in old):
            self._budget.postponed += 1
            return
        loading = [part.owner for one in new for part in self._ledger.to_load(one)]
        if self._budget.take(loading, len(new)):
            for one in old:
                self._ledger.remove(one)
            for one in new:
                self._ledger.add(one)
