"""One scenario on several tiers, figure by figure.

Tier 1 against tier 2 says whether the simulator's world does what the driver does: latencies may
differ by `DRIVER_SHARE`. Tier 3 adds what both leave out, above all the time that computing takes:
it must be of the same order. So that networks and engines are the same, tiers 1 and 2 take the
loopback's latency and the measured speed of the engines wherever tier 3 runs along.

What is known to differ, and why:

* `meet_*`, `join_first_p99_s`: who is dialled learns of it one way later than the dialler on tier
  2, as with QUIC; on tier 1 both at once.
* `death_seen_*` is a constant on tiers 1 and 2. Production's transport counts 2.9 s from the last
  packet, which is up to 0.8 s old when the power goes, so tier 3 scatters from 2.1 s on.
* `bytes_per_node_s`: frames have a header of 4 bytes on tier 2.
* `ttft_*`, `hit_share`: clients draw from one generator in the order of events; a millisecond's
  difference is another draw. Medians over many requests and seeds agree, single ones do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from meshnode.errors import ConfigError
from meshnode.identity import PeerId
from meshnode.protocol import Event, MemberJoined
from meshnode_simulations.kernel.keys import ED25519
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import Power, World
from meshnode_simulations.record import Result, quantile
from meshnode_simulations.run import Run
from meshnode_simulations.scenario import Scenario, changed
from meshnode_simulations.simulation import Simulation

TIERS = ("t1", "t2", "t3")
DRIVER_SHARE = 0.1
"""Tier 2's latencies are those of tier 1, this share more or less."""
DRIVER_SLACK_S = 0.02
"""Or as much as one message takes across a continent: half a round trip of a handshake."""
ORDER = 3.0
"""Tier 3's are at most so many times larger or smaller."""
ORDER_SLACK_S = 1.0
"""Or differ by what two busy cores take for the handshakes and timers of eight nodes."""
LOOPBACK_MS = 0.2
"""One way between two processes: what is measured of a QUIC packet with its event loops."""
LATENCIES = (
    "join_first_p50_s", "join_p50_s", "meet_p50_s", "meet_p99_s", "death_seen_p50_s",
    "death_seen_max_s", "promotion_p50_s", "ttft_p50_s",
)  # fmt: skip
"""What is judged; everything else is shown."""


_T1_WORLD = partial(World, scheme=ED25519)


class Measured(Simulation):
    """A simulation with real keys, as on every tier, and the figures that all tiers have:
    `meet_p50_s` and `meet_p99_s`, from when both of two nodes run to each being the other's
    member."""

    def prepare(self, make_world: Callable[..., World] = _T1_WORLD) -> Run:
        run = super().prepare(make_world)
        _Meetings(run)
        return run


class _Meetings:
    def __init__(self, run: Run) -> None:
        self._run = run
        self._since_s: dict[PeerId, float] = {}
        self._met_s: list[float] = []
        run.world.on_power.append(self._on_power)
        run.world.on_event.append(self._on_event)
        run.closers.append(self._close)

    def _on_power(self, machine: Machine, power: Power) -> None:
        if power == "on":
            self._since_s[machine.peer_id] = self._run.now_s

    def _on_event(self, machine: Machine, event: Event) -> None:
        if isinstance(event, MemberJoined):
            both_s = max(self._since_s[machine.peer_id], self._since_s[event.peer])
            self._met_s.append(self._run.now_s - both_s)

    def _close(self) -> None:
        self._run.figures["meet_p50_s"] = quantile(self._met_s, 0.5)
        self._run.figures["meet_p99_s"] = quantile(self._met_s, 0.99)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`figures` by tier, the median over the seeds; `changes` is what tiers 1 and 2 took over
    from tier 3."""

    scenario: str
    nodes: int
    seeds: tuple[int, ...]
    figures: dict[str, dict[str, float]]
    changes: dict[str, float | str]
    runs: dict[str, tuple[Result, ...]]

    def rows(self) -> list[Row]:
        """Every figure that at least two tiers have."""
        names = sorted({name for found in self.figures.values() for name in found})
        rows = (
            Row(name, {t: f[name] for t, f in self.figures.items() if name in f}) for name in names
        )
        return [row for row in rows if len(row.values) > 1]

    def far(self) -> list[str]:
        """Latencies that differ by more than they may."""
        return [row.name for row in self.rows() if not row.is_near]

    def markdown(self) -> str:
        """A table, and what was done to make the tiers comparable."""
        tiers = list(self.figures)
        others = tiers[1:]
        heads = ["figure", *tiers, *(f"{tier}/{tiers[0]}" for tier in others), "near"]
        lines = [
            f"### {self.scenario}: {self.nodes} nodes, seeds {', '.join(map(str, self.seeds))}",
            "",
            "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|",
        ]
        for row in self.rows():
            cells = [row.name, *(_shown(row.values.get(tier, math.nan)) for tier in tiers)]
            cells += [_shown(row.ratio(tiers[0], tier)) for tier in others]
            lines.append("| " + " | ".join([*cells, row.verdict]) + " |")
        if self.changes:
            taken = ", ".join(f"{key} = {value}" for key, value in self.changes.items())
            lines += ["", f"For comparison with real nodes: {taken}."]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure on those tiers that have it."""

    name: str
    values: dict[str, float]

    def ratio(self, base: str, tier: str) -> float:
        under = self.values.get(base, math.nan)
        return self.values.get(tier, math.nan) / under if under else math.nan

    @property
    def is_near(self) -> bool:
        """Whether it differs no more than it may; only latencies are judged."""
        if self.name not in LATENCIES:
            return True
        base = self.values.get("t1", self.values.get("t2", math.nan))
        return all(_is_near(tier, base, value) for tier, value in self.values.items())

    @property
    def verdict(self) -> str:
        return "" if self.name not in LATENCIES else "yes" if self.is_near else "no"


def compare(
    scenario: Scenario,
    seeds: tuple[int, ...],
    tiers: Iterable[str] = TIERS,
    tell: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Run a scenario on each tier. Real time passes on tier 3, which runs the first seed only.
    Raises `ConfigError` if a tier cannot."""
    # Only here: with them come Trio and all of a node, which simulating does not need.
    from meshnode_simulations.tiers import t2, t3

    wanted = [tier for tier in TIERS if tier in set(tiers)]
    if unknown := sorted(set(tiers) - set(TIERS)):
        raise ConfigError(f"tiers are {', '.join(TIERS)}, not {', '.join(unknown)}")
    runs: dict[str, tuple[Result, ...]] = {}
    changes: dict[str, float | str] = {}
    if "t3" in wanted:
        tell("t3: real nodes, in real time")
        runs["t3"] = (t3.run(scenario, seeds[0]),)
        changes = as_real(scenario, runs["t3"][0].figures)
        scenario = changed(scenario, changes)
    runners: dict[str, Callable[[Simulation], Result]] = {"t1": Simulation.run, "t2": t2.run}
    for tier in wanted:
        if tier in runners:
            tell(f"{tier}: {len(seeds)} seeds")
            runs[tier] = tuple(runners[tier](Measured(scenario, seed=s)) for s in seeds)
    ordered = {tier: runs[tier] for tier in wanted}
    figures = {tier: _medians(found) for tier, found in ordered.items()}
    return Comparison(scenario.name, scenario.mesh.nodes, seeds, figures, changes, ordered)


def as_real(scenario: Scenario, found: dict[str, float]) -> dict[str, float | str]:
    """What to change so that a simulated run has the network and the engines that tier 3 had."""
    changes: dict[str, float | str] = {
        "network.latency": "constant",
        "network.one_way_ms": LOOPBACK_MS,
        "network.jitter": 0.0,
        "network.loss": 0.0,
        "network.access": "none",
    }
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        if scenario.models and f"engine_{name}" in found:
            changes[f"models.0.{name}"] = found[f"engine_{name}"]
    return changes


def _medians(results: Iterable[Result]) -> dict[str, float]:
    found = [result.figures for result in results]
    names = sorted({name for figures in found for name in figures})
    return {name: quantile([f[name] for f in found if name in f], 0.5) for name in names}


def _is_near(tier: str, base: float, value: float) -> bool:
    apart = abs(value - base)
    if tier == "t3":
        return apart <= ORDER_SLACK_S or base / ORDER <= value <= base * ORDER
    return apart <= DRIVER_SLACK_S or apart <= base * DRIVER_SHARE


def _shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
