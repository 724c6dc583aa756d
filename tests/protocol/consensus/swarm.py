"""Seeded runs of registers on a bad network, with every promise checked after every event.

Real time passes here, unlike in the model checker: messages are lost, late, doubled and out of
order, links are cut and mended, voters crash and come back with what they had stored. Then all is
well again, and what is wanted must be decided soon. One run is a function of its seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from meshnode.errors import RemoteProtocolError
from meshnode.messages import Control, GetDecided, decode, encode
from meshnode.protocol import Effect, Persist, Send
from meshnode.protocol.consensus import Register
from meshnode.protocol.quorum import Faults
from tests.protocol.consensus.parts import (
    NAMES,
    Said,
    Violation,
    Wishes,
    a_body,
    a_genesis,
    a_register,
    in_words,
    name_of,
    peer,
)
from tests.protocol.consensus.promises import Promises

LATENCY_S = (0.005, 0.08)
STORM_S = 12.0
"""How long everything goes wrong."""
DECIDED_WITHIN_S = 5.0
"""L1: after the storm, this long for what is wanted."""
EPOCHS = 3
"""How many blocks must be decided in good weather."""
ASK_EVERY_S = 1.0
SPINS_MAX = 50
"""A voter whose timer is due again and again in one instant would burn a core."""


@dataclass(frozen=True)
class Weather:
    """How bad it is."""

    loss: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    """How often a message takes up to two seconds: then it is out of order, too."""
    crash: float = 0.0
    """How often an event is followed by a crash of the voter that it happened to."""


FAIR = Weather()


@dataclass
class Machine:
    """One computer: what is on its disk stays."""

    name: str
    application: Wishes
    register: Register | None
    disk: bytes | None = None
    starts_at: float = 0.0


@dataclass
class Swarm:
    """One run."""

    seed: int
    size: int = 3
    faults: Faults = "crash"
    kind: type[Register] = Register
    members: int = 5
    """So many know the group; those that do not vote may be called to replace one that does."""
    weather: Weather = FAIR
    now: float = 0.0
    trace: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.genesis = a_genesis(self.size, self.faults)
        self.promises = Promises(self.genesis)
        self._order = count()
        self._asks_at = 0.0
        self._queue: list[tuple[float, int, str, str, Said]] = []
        self._island: dict[str, int] = {}
        self._spins: dict[str, tuple[float, int]] = {}
        self.machines: dict[str, Machine] = {}
        for name in NAMES[: max(self.members, self.size)]:
            application = Wishes()
            register = a_register(name, self.genesis, application, kind=self.kind)
            self.machines[name] = Machine(name, application, register)
            self._do(name, register.want(False, 0.0))

    # --- the story ------------------------------------------------------------------------------

    def run(self) -> None:
        """A storm, and then the calm."""
        chance = self.random
        storm = Weather(
            loss=chance.choice((0.0, 0.1, 0.3)),
            doubled=chance.choice((0.0, 0.1)),
            late=chance.choice((0.0, 0.1, 0.3)),
            crash=chance.choice((0.0, 0.01, 0.05)),
        )
        self.weather = storm
        while self.now < STORM_S:
            if chance.random() < 0.3:
                self._island = {name: chance.randrange(2) for name in self.machines}
            elif chance.random() < 0.5:
                self._island = {}
            self._wish()
            self.go(self.now + chance.uniform(0.2, 2.0))
        self._calm()
        for _ in range(EPOCHS):
            epoch = max(self.promises.blocks, default=0) + 1
            self._wish()
            began = self.now
            while self.now < began + DECIDED_WITHIN_S and not self._is_decided(epoch):
                self.go(self.now + 0.1)
                for machine in self.machines.values():
                    if machine.register is not None:
                        is_wanted = machine.register.head.epoch < epoch
                        effects = machine.register.want(is_wanted, self.now)
                        self._do(machine.name, effects)
            if not self._is_decided(epoch):
                raise Violation(f"L1: epoch {epoch} is not decided after {DECIDED_WITHIN_S} s")

    def _calm(self) -> None:
        self.weather, self._island = FAIR, {}
        for machine in self.machines.values():
            machine.application.dead.clear()
            if machine.register is None:
                self._start(machine)

    def _ask_around(self, machine: Machine) -> None:
        """The rest of the node: whoever hears of news asks for it."""
        register = machine.register
        if register is not None:
            question = GetDecided(register.group, register.head.epoch, register.lineage.anchor)
            for other in self.machines:
                if other != machine.name and self.random.random() >= self.weather.loss:
                    self._post(machine.name, other, question)

    def _is_decided(self, epoch: int) -> bool:
        return all(
            machine.register is not None and machine.register.head.epoch >= epoch
            for machine in self.machines.values()
            if peer(machine.name) in self.promises.voters()
        )

    def _wish(self) -> None:
        """Everybody wants something: mostly another body, at times another voter."""
        chance = self.random
        for machine in self.machines.values():
            machine.application.body = a_body(f"{machine.name}-{chance.randrange(1000)}")
            machine.application.dead = {
                peer(name) for name in self.machines if chance.random() < self.weather.crash * 4
            }
            newcomer, place = peer(chance.choice(tuple(self.machines))), chance.randrange(self.size)
            machine.application.swap = (place, newcomer) if chance.random() < 0.5 else None
            if machine.register is not None:
                self._do(machine.name, machine.register.want(True, self.now))

    # --- one event after the other --------------------------------------------------------------

    def go(self, until: float) -> None:
        for machine in self.machines.values():
            if self.now >= self._asks_at:
                self._ask_around(machine)
        if self.now >= self._asks_at:
            self._asks_at = self.now + ASK_EVERY_S
        while True:
            due = [
                (deadline, name)
                for name, machine in self.machines.items()
                if (deadline := self._deadline(machine)) is not None
            ]
            timer = min(due, default=(until, ""))
            if self._queue and self._queue[0][0] <= min(timer[0], until):
                self.now, _, sender, to, message = heapq.heappop(self._queue)
                self._deliver(sender, to, message)
            elif timer[0] < until:
                self.now = max(self.now, timer[0])
                self._tick(timer[1])
            else:
                self.now = until
                return

    def _deadline(self, machine: Machine) -> float | None:
        return machine.starts_at if machine.register is None else machine.register.deadline()

    def _tick(self, name: str) -> None:
        machine = self.machines[name]
        if machine.register is None:
            self._start(machine)
            return
        at, spins = self._spins.get(name, (-1.0, 0))
        self._spins[name] = (self.now, spins + 1 if at == self.now else 0)
        if spins > SPINS_MAX:
            raise Violation(f"{name} spins at {self.now:.3f}")
        self._do(name, machine.register.tick(self.now))

    def _deliver(self, sender: str, to: str, message: Said) -> None:
        machine = self.machines[to]
        if machine.register is None or self._island.get(sender) != self._island.get(to):
            return
        if not isinstance(message, GetDecided):
            self.trace.append(f"{self.now:9.3f}  {sender} → {to}: {in_words(message)}")
        heard: Said = decode(encode(message), Control)  # type: ignore[arg-type]
        try:
            effects = machine.register.receive(peer(sender), heard, self.now)
        except RemoteProtocolError as error:
            raise Violation(
                f"{to} takes an honest {in_words(message)} for a lie: {error}"
            ) from error
        self._do(to, effects)

    def _do(self, name: str, effects: Iterable[Effect]) -> None:
        """Perform effects in order, perhaps not all."""
        machine, chance, weather = self.machines[name], self.random, self.weather
        for effect in effects:
            if chance.random() < weather.crash / 4:
                self._crash(machine)
                return
            match effect:
                case Persist():
                    machine.disk = effect.data
                case Send():
                    self.promises.note(effect.message)  # type: ignore[arg-type]
                    copies = 2 if chance.random() < weather.doubled else 1
                    for _ in range(copies):
                        if chance.random() >= weather.loss:
                            self._post(name, name_of(effect.peer), effect.message)  # type: ignore[arg-type]
        assert machine.register is not None
        self.promises.check(name, machine.register)
        if chance.random() < weather.crash / 4:
            self._crash(machine)

    def _post(self, sender: str, to: str, message: Said) -> None:
        late = self.random.random() < self.weather.late
        delay = self.random.uniform(0.1, 2.0) if late else self.random.uniform(*LATENCY_S)
        heapq.heappush(self._queue, (self.now + delay, next(self._order), sender, to, message))

    def _crash(self, machine: Machine) -> None:
        self.trace.append(f"{self.now:9.3f}  {machine.name} crashes")
        machine.register = None
        machine.starts_at = self.now + self.random.uniform(0.1, 3.0)

    def _start(self, machine: Machine) -> None:
        self.trace.append(f"{self.now:9.3f}  {machine.name} comes back")
        machine.register = a_register(
            machine.name, self.genesis, machine.application, journal=machine.disk, kind=self.kind
        )
        self._do(machine.name, machine.register.want(True, self.now))


def swarm(
    seeds: Iterable[int],
    *,
    size: int = 3,
    faults: Faults = "crash",
    kind: type[Register] = Register,
) -> int:
    """Run the seeds; how many epochs were decided. Raises `Violation`, naming the seed."""
    decided = 0
    for seed in seeds:
        run = Swarm(seed, size, faults, kind)
        try:
            run.run()
        except Violation as violation:
            story = "\n".join(run.trace[-40:])
            raise Violation(f"seed {seed}: {violation}\n{story}") from violation
        decided += len(run.promises.blocks)
    return decided
