"""One run: a scenario and a seed in, a result out.

    Simulation("cold-join", seed=7).run()

Builds the world that the scenario describes, lets its time pass, and measures. Everything that
surrounds the nodes' own cores is put together here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshnode_simulations.checks.liveness import Epochs, Healing, Service
from meshnode_simulations.checks.safety import Safety
from meshnode_simulations.faults.adversaries import Adversaries
from meshnode_simulations.faults.buggify import buggify
from meshnode_simulations.faults.draw import drawn
from meshnode_simulations.faults.schedule import RIGHTS, Faults
from meshnode_simulations.figures import MeshFigures
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import World
from meshnode_simulations.models.demand import Clients
from meshnode_simulations.models.fetching import Fetching
from meshnode_simulations.models.gateway import Gateways
from meshnode_simulations.models.hosting import Hosting
from meshnode_simulations.models.pipelines import Pipelines
from meshnode_simulations.record import Recorder, Result
from meshnode_simulations.run import Run
from meshnode_simulations.scenario import Fault, Scenario, load
from meshnode_simulations.surroundings import let_come_and_go, network, surround

ANY = "any"
"""Promise: whichever breaks first."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    virtual_s: float
    duration_s: float
    cpu_s: float
    events: int


class Simulation:
    """A scenario with a seed. A run can be repeated; each is the same."""

    def __init__(
        self,
        scenario: Scenario | str | Path,
        *,
        seed: int = 1,
        check: bool = False,
        schedule: tuple[Fault, ...] | None = None,
        changes: dict[str, object] | None = None,
    ) -> None:
        """`scenario` may be a file or the name of a shipped one, with `changes` to it by dotted
        name. `check`: every promise is checked after every event. `schedule` takes the place of
        the scenario's faults and of its chaos. Raises `ConfigError`.
        """
        if not isinstance(scenario, Scenario):
            scenario = load(scenario, changes)
        self.scenario = scenario
        self.seed = seed
        self.check = check
        self.schedule = schedule

    def run(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        until_broken: str | None = None,
        on_ready: Callable[[Run], None] = lambda run: None,
    ) -> Result:
        """Let all its time pass. `on_ready` is given the run before anything has happened, and
        `on_progress` is called once for each interval; the run ends with the interval in which
        the promise `until_broken`, or `ANY`, breaks.
        """
        run = self.prepare()
        on_ready(run)
        loop, about = run.world.loop, self.scenario.scenario
        started_s = time.process_time()
        interval_ns = int(about.interval_s * NS_PER_S)
        end_ns = int(about.duration_s * NS_PER_S)
        while loop.now_ns < end_ns:
            before_s = loop.now_s
            loop.run(min(loop.now_ns + interval_ns, end_ns))
            for finish in run.intervals:
                finish(loop.now_s - before_s)
            run.recorder.close_interval(loop.now_s)
            if on_progress is not None:
                spent_s = time.process_time() - started_s
                on_progress(Progress(loop.now_s, about.duration_s, spent_s, loop.events))
            broken = {violation.promise for violation in run.recorder.violations}
            if until_broken in broken or (until_broken == ANY and broken):
                break
        return self.finish(run, time.process_time() - started_s)

    def finish(self, run: Run, cpu_s: float) -> Result:
        """What a run, now over, has come to."""
        for close in run.closers:
            close()
        return Result(
            scenario=self.scenario,
            seed=self.seed,
            checked=self.check,
            digest=run.world.trace.digest(),
            virtual_s=run.now_s,
            cpu_s=cpu_s,
            events=run.world.loop.events,
            series=run.recorder.series(),
            tables=dict(run.recorder.tables),
            figures=run.figures,
            violations=tuple(run.recorder.violations),
        )

    def faults(self) -> tuple[Fault, ...]:
        """What will go wrong: what was given, or what the scenario lists and its chaos draws."""
        if self.schedule is not None:
            return self.schedule
        return (*self.scenario.faults, *drawn(self.scenario, self.seed))

    def _claims(self) -> bool:
        """Whether anybody will ask for a right."""
        return any(fault.kind == "claim" for fault in self.faults())

    def prepare(self, make_world: Callable[..., World] = World) -> Run:
        """The world at time 0, with everything scheduled that is to happen in it. `make_world`
        takes what `World` does.
        """
        scenario, seed = self.scenario, self.seed
        is_open = scenario.mesh.admission == "open"
        world = make_world(seed, network(scenario, seed), open_mesh=is_open)
        if scenario.chaos.buggify:
            buggify(world, scenario.chaos.buggify)
        run = Run(scenario, seed, world, Recorder())
        MeshFigures(run)
        hosting = Hosting(run)
        machines = _machines(run)
        hosting.place(machines)
        if any(model.activation_bytes for model in scenario.models):
            Pipelines(run, hosting)
        surround(world, scenario, machines)
        if any(model.fetched for model in scenario.models):
            Fetching(run, machines)

        def broken(promise: str, what: str) -> None:
            run.recorder.violate(promise, run.now_s, what)

        safety = None
        if self.check:
            safety = Safety(world, broken, rights=RIGHTS if self._claims() else ())
            Epochs(run, safety)
        gateways = None
        if scenario.demand.kind != "none":
            gateways = Gateways(run, hosting, broken if self.check else None)
            Clients(run, gateways)
        if scenario.models:
            Service(run)
        Adversaries(run, safety, gateways)
        Faults(run, self.faults())
        if scenario.chaos.heal_at_s:
            Healing(run, scenario.chaos.heal_at_s)
        _switch_on_all(run, machines)
        let_come_and_go(run, machines)
        return run


def _machines(run: Run) -> list[Machine]:
    memory_bytes = int(run.scenario.hosts.memory_gib * 2**30)
    mesh, world = run.scenario.mesh, run.world
    return [
        world.add(
            f"n{index}",
            is_root=index == 0,
            memory_bytes=memory_bytes,
            is_sponsored=index < mesh.sponsored,
        )
        for index in range(mesh.nodes)
    ]


def _switch_on_all(run: Run, machines: list[Machine]) -> None:
    """The bootstraps at once, the others evenly over the time to join."""
    mesh, world = run.scenario.mesh, run.world
    bootstraps = machines[: mesh.bootstraps]
    later = machines[len(bootstraps) :]
    for machine in bootstraps:
        world.loop.at(0, world.switch_on, machine, [m for m in bootstraps if m is not machine])
    for place, machine in enumerate(later, start=1):
        at_ns = int(mesh.join_over_s * NS_PER_S * place / len(later))
        world.loop.at(at_ns, world.switch_on, machine, bootstraps)
