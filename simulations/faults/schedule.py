"""Faults at given times: what each kind does, whom it strikes, how it is put right.

| kind | what happens | put right after `for_s` |
|---|---|---|
| `kill` | power off, without a word | switched on again |
| `stop` | shut down in good order | switched on again |
| `crash` | power off in the middle of a step, `value` effects later | switched on again |
| `wipe` | power off, and its disk is lost with all that it had voted | switched on again |
| `freeze` | nothing runs, the clock goes on: SIGSTOP, suspend, a stalled host | goes on |
| `cut` | the connection to `other` breaks; they may dial again | |
| `sever` | no way between the targets and `other` | healed |
| `block` | nothing of the targets reaches `other`; the other way all does | healed |
| `part` | the targets are an island | healed |
| `clog` | what the targets say to anybody piles up on its way | let through |
| `lose` | the share `value` of messages loses a packet | as it was |
| `slow` | a grey failure: everything reaches the targets `value` seconds later | as it was |
| `rate` | the targets' clocks run at `value` seconds a second | at 1 |
| `jump` | the targets' wall clocks are wrong by `value` seconds | right again |
| `drain` | the operator of the target drains it | undone |
| `claim` | the targets ask for an exclusive right | given back |

A target is `n7` (a node by name), `random`, `random:3`, `share:0.2`, `leader` (of the newest
block), `voter`, `owner:MODEL` (of its first layers), `head:MODEL` (of its last), `standby:MODEL`,
`bootstrap`; the set is worked out when the fault strikes. Nodes that are switched off are struck by
nothing but `jump` and `rate`; the mesh's root is never wiped, since its key is on that disk.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from meshnode.errors import ConfigError
from meshnode.identity import PeerId
from meshnode.messages import Item
from meshnode.protocol.agreement import Action
from meshnode.protocol.consensus import Head
from meshnode.protocol.stack import GiveOrder
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.run import Run
from meshnode_simulations.scenario import Fault

Undo = Callable[[], None]

KINDS = (
    "kill", "stop", "crash", "wipe", "freeze", "cut", "sever", "block", "part", "clog", "lose",
    "slow", "rate", "jump", "drain", "claim",
)  # fmt: skip

RIGHTS = ("the-pen",)
"""What is claimed."""


class Faults:
    """Lets the faults of a schedule happen to a run's world. Raises `ConfigError` for one that
    cannot be read."""

    def __init__(self, run: Run, schedule: tuple[Fault, ...]) -> None:
        self._run = run
        self._world = run.world
        self.schedule = schedule
        for place, fault in enumerate(schedule):
            if fault.kind not in KINDS:
                raise ConfigError(
                    f"faults.{place}.kind: {fault.kind!r} is none of {', '.join(KINDS)}"
                )
            # Of its own number in the unshrunk schedule, so that leaving others out changes no
            # draw, its draws are a function of what it is.
            rng = stream(run.seed, "fault", fault.kind, int(fault.at_s * NS_PER_S), fault.target)
            check_target(fault.target)
            run.world.loop.at(int(fault.at_s * NS_PER_S), self._strike, fault, rng)

    def _strike(self, fault: Fault, rng: random.Random) -> None:
        targets = find(self._run, fault.target, rng)
        others = find(self._run, fault.other, rng) if fault.other else []
        self._run.recorder.row(
            "faults",
            time_s=self._run.now_s,
            kind=fault.kind,
            nodes=" ".join(machine.name for machine in targets),
        )
        undo = self._do(fault, targets, [other for other in others if other not in targets])
        if fault.for_s and undo is not None:
            self._world.loop.after(int(fault.for_s * NS_PER_S), undo)

    def _do(self, fault: Fault, targets: list[Machine], others: list[Machine]) -> Undo | None:
        world = self._world
        up = [machine for machine in targets if machine.stack is not None]
        match fault.kind:
            case "kill" | "stop":
                end = world.kill if fault.kind == "kill" else world.stop
                for machine in up:
                    end(machine)
                return partial(self._switch_on, up)
            case "wipe":
                wiped = [machine for machine in up if not machine.is_root]
                for machine in wiped:
                    world.kill(machine)
                    world.lose_disk(machine)
                return partial(self._switch_on, wiped)
            case "crash":
                for machine in up:
                    world.crash_within(machine, int(fault.value))
                return partial(self._switch_on, up)
            case "freeze":
                awake = [machine for machine in up if not machine.is_asleep]
                for machine in awake:
                    world.sleep(machine)
                return partial(self._wake, awake)
            case "cut":
                for machine in up:
                    for other in others:
                        world.cut(machine, other)
            case "sever" | "block":
                bar = world.sever if fault.kind == "sever" else world.block
                for machine in targets:
                    for other in others:
                        bar(machine, other)
                return world.heal
            case "part":
                world.partition(targets)
                return world.heal
            case "clog":
                for machine in up:
                    for index in machine.links:
                        world.clog(machine, world.machines[index])
                return partial(self._unclog, up)
            case "lose":
                before = world.network.loss
                world.network.loss = fault.value
                return partial(self._lose, before)
            case "slow":
                self._set_lags(targets, int(fault.value * NS_PER_S))
                return partial(self._set_lags, targets, 0)
            case "rate":
                self._set_rates(targets, fault.value)
                return partial(self._set_rates, targets, 1.0)
            case "jump":
                self._set_wall_clocks(targets, fault.value)
                return partial(self._set_wall_clocks, targets, 0.0)
            case "drain":
                self._order(up, "drain")
                return partial(self._order, up, "undrain")
            case "claim":
                for machine in up:
                    self._ask(machine, "claim")
                return partial(self._release, up)
        return None

    def _switch_on(self, machines: list[Machine]) -> None:
        for machine in machines:
            machine.effects_left = None
            if machine.stack is None:
                known = self._world.machines[: self._run.scenario.mesh.bootstraps]
                self._world.switch_on(machine, [other for other in known if other is not machine])

    def _wake(self, machines: list[Machine]) -> None:
        for machine in machines:
            if machine.is_asleep:
                self._world.wake(machine)

    def _unclog(self, machines: list[Machine]) -> None:
        for machine in machines:
            for index in tuple(machine.links):
                self._world.unclog(machine, self._world.machines[index])

    def _lose(self, loss: float) -> None:
        self._world.network.loss = loss

    def _set_lags(self, machines: list[Machine], lag_ns: int) -> None:
        for machine in machines:
            machine.lag_ns = lag_ns

    def _set_rates(self, machines: list[Machine], rate: float) -> None:
        for machine in machines:
            self._world.set_rate(machine, rate)

    def _set_wall_clocks(self, machines: list[Machine], ahead_s: float) -> None:
        for machine in machines:
            machine.unix_ahead_s = ahead_s

    def _order(self, machines: list[Machine], action: Action) -> None:
        for machine in machines:
            if machine.is_awake and machine.live.agreement.registers():
                self._world.tell(machine, GiveOrder(action, "", machine.peer_id))

    def _ask(self, machine: Machine, action: Action) -> None:
        if machine.is_awake and machine.live.agreement.registers():
            self._world.tell(machine, GiveOrder(action, RIGHTS[0], ""))

    def _release(self, machines: list[Machine]) -> None:
        for machine in machines:
            now_s = self._world.now_of(machine)
            if machine.is_awake and machine.live.agreement.holds_right(RIGHTS[0], now_s):
                self._ask(machine, "release")


def check_target(target: str) -> None:
    """Raises `ConfigError` for one that no mesh could have."""
    word, _, rest = target.partition(":")
    fine = (
        (word in ("random", "leader", "voter", "bootstrap") and not rest)
        or (word == "random" and rest.isdecimal())
        or (word == "share" and _is_share(rest))
        or (word in ("owner", "head", "standby") and rest)
        or (word[:1] == "n" and word[1:].isdecimal() and not rest)
    )
    if not fine:
        raise ConfigError(f"a fault's target cannot be {target!r}: n7, random:3, owner:MODEL, ...")


def find(run: Run, target: str, rng: random.Random) -> list[Machine]:
    """The machines that a target means now; none if there is no such."""
    world = run.world
    word, _, rest = target.partition(":")
    running = [machine for machine in world.machines if machine.is_awake]
    match word:
        case "random":
            return rng.sample(running, min(int(rest or 1), len(running)))
        case "share":
            return rng.sample(running, round(float(rest) * len(running)))
        case "bootstrap":
            return world.machines[: run.scenario.mesh.bootstraps]
        case "leader":
            return _by_peers(run, [leader] if (leader := _leader(running)) else [])
        case "voter":
            found = _by_peers(run, _voters(running))
            return [rng.choice(found)] if found else []
        case "owner":
            return _by_peers(run, [item.owner for item in _items(running, rest)][:1])
        case "head":
            return _by_peers(run, [item.owner for item in _items(running, rest)][-1:])
        case "standby":
            standbys = [peer for item in _items(running, rest) for peer in item.standbys]
            return _by_peers(run, standbys[:1])
    return [world.by_name[target]] if target in world.by_name else []


def _by_peers(run: Run, peers: list[str]) -> list[Machine]:
    return [run.world.by_peer[PeerId(peer)] for peer in peers]


def newest_head(machines: list[Machine]) -> Head | None:
    """The newest decision that any of these running machines knows."""
    registers = [
        register for machine in machines for register in machine.live.agreement.registers()[:1]
    ]
    return max(registers, key=lambda register: register.head.epoch).head if registers else None


def _leader(running: list[Machine]) -> str | None:
    head = newest_head(running)
    return None if head is None else head.header.proposer or None


def _voters(running: list[Machine]) -> list[str]:
    head = newest_head(running)
    return [] if head is None else list(head.header.voters)


def _items(running: list[Machine], model: str) -> list[Item]:
    head = newest_head(running)
    return [] if head is None else [item for item in head.body.items if item.name == model]


def _is_share(text: str) -> bool:
    try:
        return 0.0 <= float(text) <= 1.0
    except ValueError:
        return False
