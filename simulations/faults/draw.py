"""A schedule of faults drawn from the seed: the chaos of a scenario.

Times are a Poisson process; kinds are drawn evenly from those that the scenario names; each fault
lasts for some seconds. What is drawn is an ordinary schedule: it can be printed, run again without
its seed, and shrunk.
"""

from __future__ import annotations

from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.scenario import Fault, Scenario

DURATIONS_S = (0.2, 1.0, 3.0, 8.0, 20.0)
"""From a hiccup that nobody notices to longer than every timeout but the longest."""
_VALUES = {
    "crash": (0.0, 1.0, 3.0, 8.0),
    "lose": (0.01, 0.05, 0.2),
    "slow": (0.05, 0.3, 1.0),
    "rate": (0.95, 0.999, 1.001, 1.05),
    "jump": (-600.0, 600.0),
}
_OTHERS = {"cut": "random", "sever": "random", "block": "random"}
_TARGETS = ("random", "random", "random:2", "leader", "voter")


def drawn(scenario: Scenario, seed: int) -> tuple[Fault, ...]:
    """The faults of the scenario's chaos under this seed, in order of time."""
    chaos, end_s = scenario.chaos, scenario.scenario.duration_s
    if chaos.heal_at_s:
        end_s = chaos.heal_at_s
    if not chaos.kinds or not chaos.per_min:
        return ()
    rng = stream(seed, "chaos")
    faults: list[Fault] = []
    at_s = chaos.start_s
    while True:
        at_s += rng.expovariate(chaos.per_min / 60.0)
        kind = rng.choice(chaos.kinds)
        target = rng.choice(_TARGETS)
        for_s = rng.choice(DURATIONS_S)
        value = rng.choice(_VALUES.get(kind, (0.0,)))
        if at_s >= end_s:
            return tuple(faults)
        # Put right before the end of all faults: nothing is wrong any more from then on.
        for_s = min(for_s, max(end_s - at_s, 0.001))
        other = _OTHERS.get(kind, "")
        faults.append(Fault(at_s=round(at_s, 3), kind=kind, target=target, other=other,
                            for_s=round(for_s, 3), value=value))  # fmt: skip
