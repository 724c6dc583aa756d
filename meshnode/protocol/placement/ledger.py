"""What each host owns in a plan in the making, the memory that is left, and who could take what.

Nothing is chosen here but among equals: which replicas there should be is for `replicas.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from meshnode.protocol.placement.cost import (
    holding,
    hop_us,
    layers_max,
    part_bytes,
    runs_stages,
    units,
    whole_bytes,
    whole_us,
)
from meshnode.protocol.placement.pipeline import Hop, Seat, Stages, fastest
from meshnode.protocol.placement.several import widest
from meshnode.protocol.placement.terms import Host, Model, Part, Problem, Replica

Key = tuple[str, tuple[tuple[str, int, int], ...]]


def key(replica: Replica) -> Key:
    """What makes two replicas the same: model, owners and layers."""
    return replica.model, tuple((part.owner, part.first, part.end) for part in replica.parts)


Cuts = dict[tuple[str, int, tuple[Seat, ...]], list[Stages]]


class Ledger:
    """The replicas placed so far by model, and the free bytes of every host."""

    def __init__(self, problem: Problem, cuts: Cuts) -> None:
        """`cuts` remembers what searches found, for the ledgers of further rounds."""
        self._problem = problem
        self._cuts = cuts
        self._free = {peer: host.memory_bytes for peer, host in problem.hosts.items()}
        self.placed: dict[str, list[Replica]] = {model: [] for model in sorted(problem.models)}

    def _host(self, peer: str) -> Host:
        return self._problem.hosts[peer]

    def _model(self, model: str) -> Model:
        return self._problem.models[model]

    def add(self, replica: Replica) -> None:
        for part in replica.parts:
            self._free[part.owner] -= part.bytes
        self.placed[replica.model].append(replica)

    def remove(self, replica: Replica) -> None:
        for part in replica.parts:
            self._free[part.owner] += part.bytes
        self.placed[replica.model].remove(replica)

    def _owns(self, peer: str, model: str) -> bool:
        return any(part.owner == peer for one in self.placed[model] for part in one.parts)

    def may_take(self, peer: str, model: str) -> bool:
        """Whether `peer` could own a part of `model` that it does not own yet, if it fits."""
        host = self._problem.hosts.get(peer)
        return (
            host is not None
            and not host.draining
            and holding(host, model) is not None
            and not self._owns(peer, model)
        )

    def _whole_bytes(self, model: str, peer: str) -> int:
        return whole_bytes(self._model(model), self._host(peer))

    def has_room(self, model: str, peer: str) -> bool:
        """Whether a whole replica fits beside what `peer` owns."""
        return self._whole_bytes(model, peer) <= self._free[peer]

    def whole(self, model: str, peer: str, number: int = -1) -> Replica:
        part = Part(peer, 0, units(self._model(model)), self._whole_bytes(model, peer))
        return Replica(model, (part,), number=number)

    def us(self, model: str, peer: str) -> int:
        return whole_us(self._model(model), self._host(peer))

    def hosts_for(self, model: str) -> list[str]:
        """Where a whole replica could be loaded now, fastest first, loaded ones before others."""
        fitting = [
            peer
            for peer in self._problem.hosts
            if self.may_take(peer, model) and self.has_room(model, peer)
        ]
        return sorted(
            fitting, key=lambda peer: (self.us(model, peer), self.cold(model, peer), peer)
        )

    def cold(self, model: str, peer: str) -> bool:
        held = holding(self._host(peer), model)
        return held is None or held.state != "ready"

    def refreshed(self, replica: Replica, *, draining: bool = False) -> Replica | None:
        """`replica` with its bytes of today; None if it cannot stay. `draining`: where it may."""
        parts = []
        for part in replica.parts:
            host = self._problem.hosts.get(part.owner)
            if host is None or holding(host, replica.model) is None:
                return None
            if (host.draining and not draining) or self._owns(part.owner, replica.model):
                return None
            new = self._resized(replica.model, part)
            if new is None or new.bytes > self._free[part.owner]:
                return None
            parts.append(new)
        return replace(replica, parts=tuple(parts), standbys=())

    def _resized(self, name: str, part: Part) -> Part | None:
        """`part` with its bytes of today; None for a stage on a host that runs none."""
        model, host = self._model(name), self._host(part.owner)
        layers = part.end - part.first
        if layers == units(model):
            return replace(part, bytes=whole_bytes(model, host))
        return replace(part, bytes=part_bytes(model, layers)) if runs_stages(host, name) else None

    def heir(
        self, model: str, part: Part, standbys: tuple[str, ...], others: set[str]
    ) -> Part | None:
        """`part` on another host: a standby, else one that has it loaded, else the fastest."""
        found = []
        for peer in self._problem.hosts:
            if peer in others or not self.may_take(peer, model):
                continue
            moved = self._resized(model, replace(part, owner=peer))
            if moved is not None and moved.bytes <= self._free[peer]:
                found.append(moved)
        return min(
            found,
            key=lambda part: (
                standbys.index(part.owner) if part.owner in standbys else len(standbys),
                self.cold(model, part.owner),
                self.us(model, part.owner),
                part.owner,
            ),
            default=None,
        )

    def _seats(self, name: str) -> list[Seat]:
        """What hosts that can run stages have free for it now."""
        model = self._model(name)
        return [
            Seat(peer, layers_max(model, self._free[peer]), whole_us(model, host))
            for peer, host in self._problem.hosts.items()
            if runs_stages(host, name) and self.may_take(peer, name)
        ]

    def _hop(self, name: str) -> Hop:
        return partial(hop_us, self._problem, self._model(name))

    def _pipeline(self, name: str, stages: Stages) -> Replica:
        parts = []
        first = 0
        for peer, layers in stages:
            size = part_bytes(self._model(name), layers)
            parts.append(Part(peer, first, first + layers, size))
            first += layers
        return Replica(name, tuple(parts))

    def pipelines(self, name: str, count: int) -> list[Replica]:
        """The best pipelines in what is free: several for throughput, one for its latency."""
        seats = self._seats(name)
        request = (name, count, tuple(seats))
        if request not in self._cuts:
            self._cuts[request] = self._cut(name, count, seats)
        return [self._pipeline(name, stages) for stages in self._cuts[request]]

    def _cut(self, name: str, count: int, seats: list[Seat]) -> list[Stages]:
        layers = units(self._model(name))
        found = widest(seats, layers, self._hop(name), count) if count > 1 else []
        if len(found) < 2:
            one = fastest(seats, layers, self._hop(name))
            return [] if one is None else [one]
        return found

    def to_load(self, replica: Replica) -> list[Part]:
        """Those of its parts whose layers their owners do not have yet."""
        mine = [part for one in self.placed[replica.model] for part in one.parts]
        return [
            part
            for part in replica.parts
            if not any(
                has.owner == part.owner and has.first <= part.first and part.end <= has.end
                for has in mine
            )
        ]
