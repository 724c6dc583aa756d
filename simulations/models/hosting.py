"""The engines of all machines: loaded as the mesh decides, at the speed of their disks.

Puts a compute model (`engine.py`) behind every model that a machine has loaded, keeps what the
machine's stack offers of it up to date, and lets it die with the machine.
"""

from __future__ import annotations

import hashlib

from msgspec.structs import replace

from meshnode.messages import SESSIONS_MAX, Offer
from meshnode.protocol.agreement import Holding
from meshnode.protocol.dispatch import session_hash
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.streams import number, stream
from meshnode_simulations.kernel.world import Power
from meshnode_simulations.models.engine import Engine
from meshnode_simulations.run import Run
from meshnode_simulations.scenario import Model

TELL_EVERY_NS = NS_PER_S // 4
"""How often a node looks at its engines' figures (`engine.child.STATUS_INTERVAL_S`)."""
RUNTIME_BYTES = 2**28
"""Buffers and runtime of an engine beside weights and KV cache."""


def digest_of(model: Model) -> str:
    """What stands for the content of its file."""
    return hashlib.sha256(model.name.encode()).hexdigest()


class Hosting:
    """Every engine of a run, by machine and model digest."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._world = run.world
        self._engines: dict[tuple[int, str], Engine] = {}
        self._models = {digest_of(model): model for model in run.scenario.models}
        self._telling: dict[int, None] = {}
        self._speeds: dict[int, float] = {}
        run.world.loading = self._load_ns
        run.world.offered = self._offer
        run.world.on_power.append(self._on_power)

    def place(self, machines: list[Machine]) -> None:
        """Give the model files to nodes, each model's to the next ones in a drawn order, so that
        few hold two. Call it before they are switched on."""
        rng = stream(self._run.seed, "files")
        order = list(machines)
        rng.shuffle(order)
        next_place = 0
        for digest, model in self._models.items():
            kv_bytes = model.kv_bytes_per_token * model.context_tokens
            for copy in range(min(model.files, len(order))):
                machine = order[next_place % len(order)]
                next_place += 1
                offer = Offer(
                    name=model.name,
                    digest=digest,
                    state="ready",
                    context_tokens=model.context_tokens,
                    slots=model.slots,
                    slots_busy=0,
                    queue_depth=0,
                    kv_tokens_free=model.context_tokens,
                    prefill_tokens_per_s=model.prefill_tokens_per_s * self.speed(machine),
                    decode_tokens_per_s=model.decode_tokens_per_s * self.speed(machine),
                )
                holding = Holding(
                    digest,
                    model.name,
                    state="file",
                    wanted=copy < model.wanted,
                    bytes=model.weight_bytes + kv_bytes + RUNTIME_BYTES,
                    weight_bytes=model.weight_bytes,
                    kv_bytes=kv_bytes,
                    layers=model.layers,
                    activation_bytes=model.activation_bytes,
                )
                machine.models[digest] = (offer, holding)
                if copy >= model.files - model.fetched:
                    machine.unfetched[digest] = None

    def speed(self, machine: Machine) -> float:
        """Of a host, relative to that of the scenario's figures."""
        known = self._speeds.get(machine.index)
        if known is None:
            hosts = self._run.scenario.hosts
            rng = stream(self._run.seed, "speed", machine.index)
            known = hosts.speed * rng.lognormvariate(0.0, hosts.speed_spread)
            self._speeds[machine.index] = known
        return known

    def engine(self, machine: Machine, digest: str) -> Engine | None:
        """The engine that answers there now; None if there is none."""
        if not machine.serves(digest):
            return None
        found = self._engines.get((machine.index, digest))
        if found is None:
            assert digest in machine.loaded, "a head's engine comes from `lead`"
            model = self._models[digest]
            found = Engine(
                self._world.loop,
                model,
                self.speed(machine),
                model.context_tokens,
                lambda: self._on_change(machine),
            )
            self._engines[machine.index, digest] = found
        return found

    def lead(self, machine: Machine, digest: str, model: Model) -> Engine:
        """The engine of a new head, at a pipeline's speeds."""
        engine = Engine(
            self._world.loop, model, 1.0, model.context_tokens, lambda: self._on_change(machine)
        )
        self._engines[machine.index, digest] = engine
        machine.heads[digest] = None
        self._world.tell_offers(machine)
        return engine

    def depose(self, machine: Machine, digest: str) -> None:
        """It has the last layers no more: whoever waits there has to go elsewhere."""
        engine = self._engines.pop((machine.index, digest))
        engine.die()
        machine.heads.pop(digest, None)
        self._world.tell_offers(machine)
        engine.give_back()

    def utilisation(self) -> float:
        """The mean share of its life that an engine has had an answer under way."""
        now_ns = self._world.loop.now_ns
        lives_s = sum((now_ns - engine.since_ns) / NS_PER_S for engine in self._engines.values())
        return sum(engine.busy_s for engine in self._engines.values()) / max(lives_s, 1e-9)

    def _load_ns(self, machine: Machine, holding: Holding) -> int:
        hosts = self._run.scenario.hosts
        return int(holding.weight_bytes / (hosts.disk_mb_per_s * 1e6) * NS_PER_S)

    def _offer(self, machine: Machine, digest: str) -> Offer:
        offer = machine.models[digest][0]
        engine = self._engines.get((machine.index, digest))
        if engine is None:
            return offer
        held = tuple(engine.sessions)[-SESSIONS_MAX:]
        model = engine.model
        return replace(
            offer,
            prefill_tokens_per_s=model.prefill_tokens_per_s * engine.speed,
            decode_tokens_per_s=model.decode_tokens_per_s * engine.speed,
            slots_busy=engine.slots_busy,
            queue_depth=len(engine.waiting),
            kv_tokens_free=max(engine.kv_tokens - engine.kept_tokens, 0),
            sessions=b"".join(map(session_hash, held)),
        )

    def _on_power(self, machine: Machine, power: Power) -> None:
        if power in ("asleep", "awake"):
            return
        for key in [key for key in self._engines if key[0] == machine.index]:
            self._engines.pop(key).die()
        self._telling.pop(machine.index, None)

    def _on_change(self, machine: Machine) -> None:
        """Tell its stack soon; a node looks at its engines a few times a second."""
        if machine.index not in self._telling:
            self._telling[machine.index] = None
            # Nodes do not look all at once.
            phase_ns = number(self._run.seed, "tell", machine.index) % TELL_EVERY_NS
            now_ns = self._world.loop.now_ns
            wait_ns = TELL_EVERY_NS - (now_ns - phase_ns) % TELL_EVERY_NS
            self._world.loop.after(wait_ns, self._tell, machine)

    def _tell(self, machine: Machine) -> None:
        if self._telling.pop(machine.index, machine) is None:
            self._world.tell_offers(machine)
