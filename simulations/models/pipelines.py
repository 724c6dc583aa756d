"""Models that fit on no host: cut by layers, run as a ring of hosts, answered by the last of them.

Who owns which layers, and who takes over from whom, the production cores decide. Here is what
becomes of it: as soon as all owners of one replica have their layers and reach each other, the
owner of the last ones, the head, answers at the speed of the ring:

    one token           every stage's share of the layers at its host's speed, and one way to the
                        next host, all around
    many at once        at most as fast as the slowest stage
    a prompt            the same share by share, one chunk at a time

When an owner is gone, nothing comes out any more; answers wait for the next ring and are computed
again there, up to `PIPELINE_WAIT_S`.

Not known here: chunks of a long prompt that follow each other through the stages (production's are
sooner there), what rows take to pass through access links, what it takes to open a ring, and the
ways that production measures and places stages by: planners take all of them for the same.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from msgspec.structs import replace

from meshnode.identity import PeerId
from meshnode.messages import Item
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import Power
from meshnode_simulations.models.engine import Engine
from meshnode_simulations.models.hosting import Hosting, digest_of
from meshnode_simulations.record import quantile
from meshnode_simulations.run import Run
from meshnode_simulations.scenario import Model

# As in `meshnode.engine.head` and `meshnode.pipeline.ring`, which are not imported, as engines
# and Trio would be with them.
PIPELINE_WAIT_S = 120.0
LOOK_S = 0.25

Ring = tuple[tuple[Machine, int], ...]
"""Hosts in the order of the layers, and how many each has."""


@dataclass(eq=False, slots=True)
class _Head:
    """The last layers of one replica, on one machine."""

    machine: Machine
    model: Model
    engine: Engine | None = None
    ring: Ring = ()
    """Empty while it has none."""
    broken_s: float = 0.0


@dataclass(slots=True)
class Pipelines:
    """All rings of a run.

    Figures: `pipelines` formed, `pipeline_stages` and `pipeline_tokens_per_s` (of one answer
    alone; both medians over them), `pipeline_down_p50_s` and `pipeline_down_max_s` (from a ring's
    end until a ring of that model stands again).
    """

    _run: Run
    _hosting: Hosting
    _heads: dict[tuple[int, str], _Head] = field(default_factory=dict)
    _down_s: dict[str, float] = field(default_factory=dict)
    """Model -> since when it has no ring, after it had one."""
    _gaps_s: list[float] = field(default_factory=list)
    _formed: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._run.world.on_models.append(self._on_models)
        self._run.world.on_power.append(self._on_power)
        self._run.closers.append(self._close)

    # --- who is a head --------------------------------------------------------------------------

    def _on_models(self, machine: Machine) -> None:
        """A machine has loaded layers, or let go of some."""
        for model in self._run.scenario.models:
            digest = digest_of(model)
            is_head = any(
                of == digest and end == model.layers and is_loaded
                for (of, _, end), is_loaded in machine.parts.items()
            )
            known = self._heads.get((machine.index, digest))
            if is_head and known is None:
                head = _Head(machine, model)
                self._heads[machine.index, digest] = head
                self._look(head)
            elif known is not None and not is_head:
                self._drop(known)

    def _on_power(self, machine: Machine, power: Power) -> None:
        if power in ("on", "awake"):
            return
        for head in tuple(self._heads.values()):
            if head.machine is machine and power != "asleep":
                self._break(head)
                del self._heads[machine.index, digest_of(head.model)]  # its engine dies with it
            elif any(owner is machine for owner, _ in head.ring):
                self._break(head)

    def _drop(self, head: _Head) -> None:
        digest = digest_of(head.model)
        self._break(head)
        del self._heads[head.machine.index, digest]
        if head.engine is not None:
            self._hosting.depose(head.machine, digest)

    # --- rings ----------------------------------------------------------------------------------

    def _look(self, head: _Head) -> None:
        """Form a ring if there is none and one can be; leave one that is decided no more."""
        if self._heads.get((head.machine.index, digest_of(head.model))) is not head:
            return
        if head.machine.is_awake:
            ring = self._ring(head)
            if head.ring and ring != head.ring:
                self._break(head)
            if ring and not head.ring:
                self._form(head, ring)
        waited_s = self._run.now_s - head.broken_s
        if head.engine is not None and not head.ring and waited_s > PIPELINE_WAIT_S:
            head.engine.give_back()
        self._run.world.loop.after(int(LOOK_S * NS_PER_S), self._look, head)

    def _ring(self, head: _Head) -> Ring:
        """What its register says, if all of that is there; else nothing."""
        world, digest = self._run.world, digest_of(head.model)
        assigned = head.machine.live.agreement.assigned(digest)
        replicas: defaultdict[int, list[Item]] = defaultdict(list)
        for item in () if assigned is None else assigned.items:
            if item.shard.kind == "layers":
                replicas[item.replica].append(item)
        for items in replicas.values():
            items.sort(key=lambda item: item.shard)
            owners = [world.by_peer[PeerId(item.owner)] for item in items]
            if owners[-1] is not head.machine or items[-1].shard.end != head.model.layers:
                continue
            has_all = items[0].shard.first == 0 and all(
                one.shard.end == other.shard.first for one, other in pairwise(items)
            )
            are_loaded = all(
                owner.is_awake and owner.parts.get((digest, item.shard.first, item.shard.end))
                for owner, item in zip(owners, items, strict=True)
            )
            if has_all and are_loaded and self._are_joined(owners):
                return tuple(
                    (owner, item.shard.end - item.shard.first)
                    for owner, item in zip(owners, items, strict=True)
                )
        return ()

    def _are_joined(self, owners: list[Machine]) -> bool:
        network = self._run.world.network
        return all(
            network.joins(one.index, other.index) for one, other in pairwise([*owners, owners[0]])
        )

    def _form(self, head: _Head, ring: Ring) -> None:
        head.ring = ring
        digest, paced = digest_of(head.model), self.paced(head.model, ring)
        if head.engine is None:
            head.engine = self._hosting.lead(head.machine, digest, paced)
        else:
            head.engine.go_on(paced)
        since_s = self._down_s.pop(digest, None)
        if since_s is not None:
            self._gaps_s.append(self._run.now_s - since_s)
        self._formed.append((len(ring), paced.decode_tokens_per_s))

    def _break(self, head: _Head) -> None:
        if not head.ring:
            return
        head.ring = ()
        head.broken_s = self._run.now_s
        self._down_s.setdefault(digest_of(head.model), self._run.now_s)
        assert head.engine is not None
        head.engine.halt()

    def paced(self, model: Model, ring: Ring) -> Model:
        """The model with the speeds of a ring in the place of a host's; see the module."""
        shares = [count / model.layers / self._hosting.speed(owner) for owner, count in ring]
        ways_ns = (
            self._run.world.network.latency.one_way_ns(one.index, other.index)
            for (one, _), (other, _) in pairwise([*ring, ring[0]])
        )
        token_s = sum(shares) / model.decode_tokens_per_s + sum(ways_ns) / NS_PER_S
        slowest_s = max(shares) / model.decode_tokens_per_s
        return replace(
            model,
            decode_tokens_per_s=1.0 / token_s,
            prefill_tokens_per_s=model.prefill_tokens_per_s / sum(shares),
            batch_gain=max(1.0, min(model.slots, model.batch_gain * token_s / slowest_s)),
        )

    # --- figures --------------------------------------------------------------------------------

    def _close(self) -> None:
        figures = self._run.figures
        figures["pipelines"] = float(len(self._formed))
        if self._formed:
            figures["pipeline_stages"] = quantile([float(n) for n, _ in self._formed], 0.5)
            figures["pipeline_tokens_per_s"] = quantile([rate for _, rate in self._formed], 0.5)
        if self._gaps_s:
            figures["pipeline_down_p50_s"] = quantile(self._gaps_s, 0.5)
            figures["pipeline_down_max_s"] = max(self._gaps_s)


__all__ = ["PIPELINE_WAIT_S", "Pipelines"]
