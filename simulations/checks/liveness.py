"""L1 to L4, and the figures of agreement: what must come true, and how soon it did.

* L1  once nothing is wrong any more, everybody knows one newest epoch, and every model that some
      running node has the file of is served, within `WELL_S`
* L2  a model whose owner was killed is served again (figures `promotion_p50_s`, `_p99_s`)
* L3  without faults nothing moves: at most one load per node and minute (`loads_per_node_min`);
      once all is well nobody has loaded what is not its own
* L4  a new epoch is known by everybody who is connected (`epoch_known_p50_s`, `_p99_s`)

L1 is judged from the scenario's `heal_at_s` on and counts from when all are connected again, since
redialling backs off. The others are figures: their bounds stand in the scenario's `expect`.
"""

from __future__ import annotations

from meshnode_simulations.checks.safety import Safety
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import Power
from meshnode_simulations.record import quantile
from meshnode_simulations.run import Run

WELL_S = 10.0
"""L1's bound at 1 % of loss."""
SETTLED_S = 15.0
"""By then after the last fault whoever has loaded too much has let go of it."""
RECONNECT_S = 75.0
"""Redialling backs off to 60 s, and a quarter more."""


class Service:
    """Which models are served, and for how long they were not."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._down_since: dict[str, float] = {}
        self._promotions_s: list[float] = []
        self._digests = sorted({d for m in run.world.machines for d in m.models})
        self._warm_loads: int | None = None
        run.world.on_power.append(self._on_power)
        run.world.on_models.append(self._on_models)
        run.recorder.gauge("replicas", self._replicas)
        run.recorder.gauge("models_served", lambda: sum(map(self._is_served, self._digests)))
        run.closers.append(self._close)
        warm_ns = int(run.scenario.scenario.warmup_s * NS_PER_S)
        run.world.loop.at(warm_ns, self._on_warm)

    def _is_served(self, digest: str) -> bool:
        return any(machine.serves(digest) for machine in self._run.world.machines)

    def _replicas(self) -> float:
        """Of all models together."""
        return float(sum(len(m.loaded) for m in self._run.world.machines if m.is_awake))

    def _on_warm(self) -> None:
        self._warm_loads = self._loads()

    def _loads(self) -> int:
        return sum(machine.loads for machine in self._run.world.machines)

    def _on_power(self, machine: Machine, power: Power) -> None:
        if power not in ("killed", "stopped"):
            return
        for digest in machine.loaded:
            others = (m for m in self._run.world.machines if m is not machine and m.is_awake)
            if not any(digest in other.loaded for other in others):
                self._down_since.setdefault(digest, self._run.now_s)

    def _on_models(self, machine: Machine) -> None:
        for digest in machine.loaded:
            since_s = self._down_since.pop(digest, None)
            if since_s is not None:
                waited_s = self._run.now_s - since_s
                self._promotions_s.append(waited_s)
                name = machine.models[digest][0].name
                self._run.recorder.row(
                    "outages", model=name, from_s=since_s, to_s=self._run.now_s, by=machine.name
                )

    def _close(self) -> None:
        figures = self._run.figures
        if self._promotions_s:
            figures["promotion_p50_s"] = quantile(self._promotions_s, 0.5)
            figures["promotion_p99_s"] = quantile(self._promotions_s, 0.99)
        figures["unserved_at_end"] = float(len(self._down_since))
        minutes = (self._run.now_s - self._run.scenario.scenario.warmup_s) / 60.0
        if self._warm_loads is not None and minutes > 0.0 and self._digests:
            loads = self._loads() - self._warm_loads
            figures["loads_per_node_min"] = loads / minutes / len(self._run.world.machines)


class Epochs:
    """How new epochs spread: one row of `epochs` for each node and epoch. What a node learns that
    was decided while it was off counts for no figure."""

    def __init__(self, run: Run, safety: Safety) -> None:
        self._run = run
        self._behind_s: list[float] = []
        safety.on_epoch.append(self._on_epoch)
        self._safety = safety
        self._awake_since_s: dict[int, float] = {}
        run.world.on_power.append(self._on_power)
        run.closers.append(self._close)

    def _on_power(self, machine: Machine, power: Power) -> None:
        self._awake_since_s[machine.index] = self._run.now_s

    def _on_epoch(self, machine: Machine, group: str, epoch: int, behind_s: float) -> None:
        self._run.recorder.row(
            "epochs", time_s=self._run.now_s, node=machine.name, epoch=epoch, behind_s=behind_s
        )
        decided_s = self._run.now_s - behind_s
        if self._run.is_warm and self._awake_since_s[machine.index] <= decided_s:
            self._behind_s.append(behind_s)

    def _close(self) -> None:
        self._run.figures["epochs_decided"] = float(len(self._safety.headers))
        if self._behind_s:
            self._run.figures["epoch_known_p50_s"] = quantile(self._behind_s, 0.5)
            self._run.figures["epoch_known_p99_s"] = quantile(self._behind_s, 0.99)


class Healing:
    """L1: after the last fault, all is well soon."""

    def __init__(self, run: Run, heal_at_s: float) -> None:
        self._run = run
        self._heal_s = heal_at_s
        self._whole_s: float | None = None
        run.world.loop.at(int(heal_at_s * NS_PER_S), self._heal)

    def _heal(self) -> None:
        """Put right what is still wrong; faults that were listed may have no end."""
        world = self._run.world
        world.heal()
        world.network.loss = self._run.scenario.network.loss
        bootstraps = world.machines[: self._run.scenario.mesh.bootstraps]
        for machine in world.machines:
            machine.effects_left = None
            machine.lag_ns = 0
            machine.unix_ahead_s = 0.0
            if machine.is_asleep:
                world.wake(machine)
            if machine.stack is None and machine.starts:
                world.switch_on(machine, [other for other in bootstraps if other is not machine])
        world.loop.after(NS_PER_S // 10, self._look)

    def _look(self) -> None:
        run = self._run
        if self._whole_s is None:
            if self._is_connected():
                self._whole_s = run.now_s
            elif run.now_s > self._heal_s + RECONNECT_S:
                run.recorder.violate("L1", run.now_s, "not all are connected again")
                return
        elif self._is_well():
            run.figures["healed_s"] = run.now_s - self._whole_s
            run.closers.append(self._close)
            return
        elif run.now_s > self._whole_s + WELL_S:
            run.recorder.violate("L1", run.now_s, self._what_is_wrong())
            return
        run.world.loop.after(NS_PER_S // 10, self._look)

    def _close(self) -> None:
        """L3: in the end nobody has loaded what it neither owns nor was told to by its operator."""
        run = self._run
        if run.now_s < self._heal_s + SETTLED_S:
            return
        for machine in run.world.running():
            for digest in machine.loaded:
                assigned = machine.live.agreement.assigned(digest)
                states = {} if assigned is None else assigned.states()
                if machine.peer_id not in states and not machine.models[digest][1].wanted:
                    name = machine.models[digest][0].name
                    run.recorder.violate("L3", run.now_s, f"{machine.name} has loaded {name}")

    def _is_connected(self) -> bool:
        """Whether everybody is a member of enough others, and of all voters."""
        running = self._run.world.running()
        enough = min(len(running) - 1, 16)
        return all(len(machine.live.members()) >= enough for machine in running)

    def _epochs(self) -> set[tuple[str, int]]:
        return {
            (register.group, register.head.epoch)
            for machine in self._run.world.running()
            for register in machine.live.agreement.registers()
        }

    def _is_well(self) -> bool:
        return len(self._epochs()) <= 1 and not self._unserved()

    def _unserved(self) -> list[str]:
        running = self._run.world.running()
        names = {d: m.models[d][0].name for m in running for d in m.models}
        return [
            name
            for digest, name in sorted(names.items())
            if not any(machine.serves(digest) for machine in running)
        ]

    def _what_is_wrong(self) -> str:
        epochs = sorted(epoch for _, epoch in self._epochs())
        return f"epochs {epochs}, not served: {self._unserved() or 'none'}"
