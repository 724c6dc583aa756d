"""Random lives of a mesh: everything that can go wrong, in an order that a seed decides.

A run kills machines in the middle of a step, cuts links, parts islands, severs pairs, loses
packets, suspends, orders, claims and releases, with the invariants checked after every event; then
it lets everything heal and asks for what must come true (L1).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Literal

from meshnode.protocol.agreement import Action
from meshnode.protocol.stack import GiveOrder
from meshnode_simulations.checks.safety import Safety
from tests.protocol.agreement.invariants import RIGHTS, watch
from tests.protocol.agreement.scenes import (
    NAMES,
    OTHER,
    SMOL,
    awake,
    epochs,
    is_served_everywhere,
    restart,
    view,
)
from tests.protocol.cluster import Cluster, a_holding
from tests.protocol.consensus.linearizability import Operation

ANSWER_S = 20.0
"""Who has not got a right after this long gives up asking: the answer is unknown."""
HEALS_S = 75.0
"""Redialling backs off to 60 s; what a test promises counts from when all have met again."""
EXCUSES = frozenset(
    {
        "an owner that answers was dropped without draining",
        "a model lost its last serving replica",
        "a right was taken from a holder that may rely on it",
        "a new voter that does not answer",
        "a new voter that is no node",
        "proposal without justification",
    }
)
"""Why honest voters may refuse honest blocks: they do not know the same of who is alive."""


Wish = Literal["claim", "release"]
WISHES: tuple[Wish, ...] = ("claim", "claim", "release")
FAULTS = (
    *("kill", "crash", "cut", "part", "sever", "heal", "lose", "sleep", "wake"),
    *("start", "start", "order", "claim", "claim", "claim"),
)


@dataclass
class Life:
    """One run and what it came to."""

    seed: int
    count: int = 5
    cluster: Cluster = field(init=False)
    checks: Safety = field(init=False)
    history: list[Operation] = field(default_factory=list)
    asked: dict[tuple[str, str], tuple[Wish, float, int]] = field(default_factory=dict)
    """(machine, right) → kind, when, and in which run of the machine."""
    held: dict[str, str | None] = field(default_factory=dict)
    noted: int = 0
    healed_s: float = math.nan

    def __post_init__(self) -> None:
        self.rng = random.Random(f"life {self.seed}")
        cluster = self.cluster = Cluster(self.seed)
        self.checks = watch(cluster)
        cluster.world.loop.after_each.append(self._answer)
        for place, name in enumerate(NAMES[: self.count]):
            offers = [SMOL, OTHER] if self.rng.random() < 0.7 else [self.rng.choice((SMOL, OTHER))]
            models = tuple(
                (offer, a_holding(offer, wanted=self.rng.random() < 0.3)) for offer in offers
            )
            cluster.start(name, NAMES[:1] if place else (), models=models, is_root=place == 0)
        cluster.run(self.rng.uniform(0.0, 12.0))

    def run(self, steps: int) -> Life:
        """So many faults and wishes, then peace."""
        for _ in range(steps):
            self._strike()
            self.cluster.run(self.rng.choice((0.005, 0.05, 0.3, 1.0, 3.0, 8.0)))
        self._heal()
        return self

    def _strike(self) -> None:
        rng, cluster = self.rng, self.cluster
        up = awake(cluster)
        down = [name for name, each in cluster.machines.items() if each.stack is None]
        asleep = [name for name, each in cluster.machines.items() if each.is_asleep]
        name = rng.choice(up) if up else None
        what = rng.choice(FAULTS)
        match what:
            case "kill" if name and len(down) < 3:
                cluster.kill(name)
            case "crash" if name and len(down) < 3:
                cluster.crash_within(name, rng.randrange(12))
            case "cut" if len(up) > 1:
                one, other = rng.sample(up, 2)
                cluster.cut(one, other, rng.choice((0.0, 0.5)))
            case "part":
                names = rng.sample(list(cluster.machines), self.count)
                cut = rng.randrange(1, self.count)
                cluster.partition(names[:cut], names[cut:])
            case "sever":
                cluster.sever(*rng.sample(list(cluster.machines), 2))
            case "heal":
                cluster.heal()
            case "lose":
                cluster.world.network.loss = rng.choice((0.0, 0.01, 0.1))
            case "sleep" if name and len(asleep) < 2:
                cluster.sleep(name)
            case "wake" if asleep:
                cluster.wake(rng.choice(asleep))
            case "start" if down:
                restart(cluster, rng.choice(down))
            case "order" if name and self._has_group(name):
                target = cluster.machines[rng.choice(list(cluster.machines))].peer_id
                actions: tuple[Action, ...] = ("pin", "unpin", "drain", "undrain")
                action = rng.choice(actions)
                subject = rng.choice((SMOL, OTHER)).digest if "pin" in action else ""
                cluster.tell(name, GiveOrder(action, subject, target))
            case "claim":
                for claimant in rng.sample(up, min(2, len(up))):
                    if self._has_group(claimant):
                        self._ask(claimant, rng.choice(RIGHTS), rng.choice(WISHES))

    def _has_group(self, name: str) -> bool:
        return len(self.cluster.stack(name).agreement.views(self.cluster.now)) > 0

    # --- what those who claim see ---------------------------------------------------------------

    def _ask(self, name: str, right: str, kind: Wish) -> None:
        if (name, right) in self.asked:
            return
        now, machine = self.cluster.now, self.cluster.machines[name]
        if kind == "release":
            # Only a holder gives back; what it gives back is free when others have heard of it.
            if not machine.live.agreement.holds_right(right, now):
                return
        elif machine.live.agreement.holds_right(right, now):
            return
        self.asked[name, right] = (kind, now, machine.starts)
        self.cluster.tell(name, GiveOrder(kind, right, ""))

    def _answer(self) -> None:
        """Note what has been answered, and which answers will never come."""
        now = self.cluster.now
        for (name, right), (kind, at, run) in tuple(self.asked.items()):
            machine = self.cluster.machines[name]
            lives = machine.stack is not None and machine.starts == run
            claims = (
                [claim for v in machine.stack.agreement.views(now) for claim in v.claims]
                if machine.stack is not None
                else []
            )
            has = any(r == right and holder == machine.peer_id for r, holder, _ in claims)
            done = lives and (
                machine.live.agreement.holds_right(right, now) if kind == "claim" else not has
            )
            if done:
                self._note(name, right, kind, True, at, now)
            elif not lives or now > at + ANSWER_S:
                self._note(name, right, kind, None, at, math.inf)

        for at, right, holder in self.checks.handed[self.noted :]:
            before, self.held[right] = self.held.get(right), holder
            if before is not None:
                # Whoever is dead, or has lost touch, may lose it: at some time from now on, or not.
                self.history.append(Operation(before, "release", right, None, at))
        self.noted = len(self.checks.handed)

    def _note(
        self, name: str, right: str, kind: Wish, result: bool | None, at: float, until: float
    ) -> None:
        del self.asked[name, right]
        self.history.append(Operation(name, kind, right, result, at, until))

    # --- peace ----------------------------------------------------------------------------------

    def _heal(self) -> None:
        cluster = self.cluster
        cluster.heal()
        cluster.world.network.loss = 0.0
        for name, machine in cluster.machines.items():
            machine.effects_left = None
            if machine.is_asleep:
                cluster.wake(name)
            if machine.stack is None:
                restart(cluster, name)
        cluster.run_until(cluster.complete, HEALS_S)
        self.healed_s = cluster.run_until(self.is_well, 15.0)
        cluster.run(75.0)
        assert self.is_well()
        settled = epochs(cluster)
        cluster.run(30.0)
        assert epochs(cluster) == settled, "L3: nothing is left to decide"
        for name in cluster.machines:
            self._no_honest_word_was_refused(name)

    def is_well(self) -> bool:
        """Everybody knows the newest epoch, and what can be served is."""
        cluster = self.cluster
        views = [cluster.stack(name).agreement.views(cluster.now) for name in cluster.machines]
        if any(len(each) != 1 for each in views) or len({each[0].epoch for each in views}) > 1:
            return False
        drained = {peer for action, _, peer, _ in views[0][0].orders if action == "drain"}
        for offer in (SMOL, OTHER):
            able = any(
                offer.digest in each.models and each.peer_id not in drained
                for each in cluster.machines.values()
            )
            if able and not is_served_everywhere(cluster, offer.digest):
                return False
        return True

    def _no_honest_word_was_refused(self, name: str) -> None:
        stack = self.cluster.stack(name)
        assert not stack.refused, f"{name} hung up on an honest peer: {stack.refused}"
        assert view(self.cluster, name).voters
        for group in stack.agreement._groups.values():
            strange = set(group.register.refused) - EXCUSES
            assert not strange, f"{name} refused an honest block: {strange}"
            assert not group.register.equivocations
