"""Stages, the whole model and llama.cpp's RPC in turns: the same chats over the same delays.

A round is one load on each of them at each point, and who goes first changes from round to round.
A load is `sessions` conversations that begin at once, answered greedily and at equal length. Ratios
are taken within a round; shown are medians over the rounds and, in brackets, the quartiles.

What crosses the links is counted once, over links without delay, as the difference between long and
short answers: so it is that of a generated token. Bytes are payloads of UDP and TCP, both ways,
acknowledgements of QUIC included, less what the same links carry while nobody asks. Round trips are
told twice: a link is crossed twice in one, and one costs twice the delay, at one session.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.engine.client import Conversation, Seen, ask_all
from tests.bench.engine.measure import NEVER, Ratio, packaged_model
from tests.bench.engine.servers import SLOTS, end_tokens
from tests.bench.machine import busy_s, machine, machine_lines
from tests.bench.split.links import Crossed, Links, round_trip_s
from tests.bench.split.reading import read_ahead_bytes
from tests.bench.split.systems import (
    CONTEXT_TOKENS,
    RPC,
    WHOLE,
    Load,
    System,
    crossed,
    rpc,
    split,
    whole,
)
from tests.e2e.mesh import MODEL_NAME

PAIRS_DEFAULT = 5
DELAYS_MS = (0.0, 5.0, 10.0, 20.0)
SESSIONS = (1, 8)
STAGES = (2, 3)
PROMPT_WORDS = 32
"""Which are about as many tokens."""
ANSWER_TOKENS = 48
SHORT_TOKENS, LONG_TOKENS = 8, 40
"""Of answers between which only the number of generated tokens differs."""
WARM_TOKENS = 8
IDLE_S = 3.0
"""Some heartbeats."""
IDLE_BYTES_MAX = 50_000
"""In this time. New members try their links first, with more."""
SETTLE_S = 90.0
NUMBER_BYTES = {"f32": 4, "f16": 2, "i8": 1}
"""At least, in an activation on its way."""
WIRES = 3
"""How often it is counted; shown is the median."""
OTHERS = (WHOLE, *RPC.values())
"""What all are compared with."""
PACKAGES = ("llama_cpp_python", "trio", "libp2p", "aioquic")
MB = 1e6


@dataclass(frozen=True)
class Point:
    """One way, and how many at once."""

    delay_ms: float
    sessions: int


@dataclass(frozen=True)
class Run:
    """One point on one system, once. `token_s`: from one token of a session to its next. CPU
    is per token, of what computes and of the nodes besides.
    `foreign_cores` is what everybody else used meanwhile, clients and links included."""

    point: Point
    system: str
    tokens_per_s: float
    token_s: float
    first_s: float
    nodes_cpu_s: float
    engines_cpu_s: float
    foreign_cores: float


@dataclass(frozen=True)
class Wire:
    """What crosses the links for one generated token, and in a second without any."""

    system: str
    sessions: int
    bytes: float
    crossings: float
    idle_bytes_per_s: float

    @property
    def round_trips(self) -> float:
        return self.crossings / 2


@dataclass(frozen=True)
class Row:
    """One point on one system: medians over rounds. Ratios are to `OTHERS` in the same round;
    those of speed are the higher the better, those of first tokens the lower."""

    point: Point
    system: str
    rounds: int
    tokens_per_s: float
    token_s: float
    first_s: float
    nodes_cpu_s: float
    engines_cpu_s: float
    foreign_cores: float
    speed_by: dict[str, Ratio]
    first_by: dict[str, Ratio]


@dataclass
class Report:
    """`link_ms`: round trips of the links as measured, by delay. `round_trips`: of a token, by
    what delays cost. `ended`: why it was measured no further, if something failed."""

    model: str
    flags: str
    machine: dict[str, Any]
    link_ms: dict[float, float] = field(default_factory=dict)
    loads: dict[str, Load] = field(default_factory=dict)
    wires: list[Wire] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    round_trips: dict[str, float] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    ended: str = ""


@dataclass(frozen=True)
class Plan:
    """What to measure; `model` None is the packaged one, as a node requantises it. `speculate`
    and `activations` are flags of the nodes that are stages."""

    pairs: int = PAIRS_DEFAULT
    delays_ms: tuple[float, ...] = DELAYS_MS
    sessions: tuple[int, ...] = SESSIONS
    stages: tuple[int, ...] = STAGES
    speculate: str = "off"
    activations: str = "f32"
    model: Path | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the stages."""
        return ("--speculate", self.speculate, "--activations", self.activations)


def measure(plan: Plan, say: Callable[[str], None] = print) -> Report:
    """Start all, run all rounds, end everything; `say` hears how far it is."""
    model = plan.model or packaged_model()
    never = {str(token): NEVER for token in end_tokens(model)}
    report = Report(model.name, " ".join(plan.flags), machine(PACKAGES))
    report.machine["load_before"] = os.getloadavg()[0]
    seeds = itertools.count(1)

    def ask(system: System, sessions: int, tokens: int, seed: int | None = None) -> Seen:
        seed = next(seeds) if seed is None else seed
        chats = [
            Conversation.of(PROMPT_WORDS, seed * max(plan.sessions) + i) for i in range(sessions)
        ]
        return ask_all(system.url, MODEL_NAME, chats, tokens, never)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="split-")))
        report.machine["read_ahead_bytes"] = read_ahead_bytes(folder)
        links = stack.enter_context(Links())
        systems: list[System] = []
        for starting in _starting(plan, model, links, folder):
            system = stack.enter_context(starting)
            say(f"{system.name} answers after {system.load.start_s:.1f} s")
            report.loads[system.name] = system.load
            systems.append(system)
        for system in systems:
            ask(system, 1, WARM_TOKENS)
        stack.enter_context(suppress(KeyboardInterrupt))  # there is something to report by now
        idle = _idle(systems, links)
        for system, sessions in itertools.product(systems[1:], plan.sessions):
            say(f"what crosses the links of {system.name} at {sessions} sessions")
            idle_bytes = idle[system.name]
            counted = [_wire(system, sessions, links, ask, idle_bytes) for _ in range(WIRES)]
            report.wires.append(sorted(counted, key=lambda each: each.bytes)[WIRES // 2])
            if report.wires[-1].bytes < system.token_numbers * NUMBER_BYTES[plan.activations]:
                raise SystemExit(f"{system.name} found a way around its links: {counted}")
        report.link_ms = {delay: 1e3 * _measured(links, delay / 1e3) for delay in plan.delays_ms}
        try:
            for pair in range(plan.pairs):
                first = pair % len(systems)
                in_turn = (*systems[first:], *systems[:first])
                for delay_ms, sessions in itertools.product(plan.delays_ms, plan.sessions):
                    say(f"round {pair + 1} of {plan.pairs}: {delay_ms:g} ms, {sessions} sessions")
                    links.delay(delay_ms / 1e3)
                    point, seed = Point(delay_ms, sessions), next(seeds)
                    for system in in_turn:
                        at = _Meter(system)
                        seen = ask(system, sessions, ANSWER_TOKENS, seed)
                        report.runs.append(at.run(point, seen))
                        crossed(system, links)  # it is still whole
        except RuntimeError as error:  # an answer that is none, after an hour: tell the others
            report.ended = str(error)
    report.rows = rows(report.runs)
    report.round_trips = round_trips(report.runs)
    return report


def _starting(plan: Plan, model: Path, links: Links, folder: Path) -> Iterator[Any]:
    """The whole model first, which has no links."""

    def place(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    yield whole(model, place("whole"))
    for stages in plan.stages:
        yield split(stages, model, links, place(str(stages)), plan.flags)
    for servers in RPC:
        yield rpc(servers, model, links, place(f"rpc-{servers}"))


def _idle(systems: Sequence[System], links: Links) -> dict[str, float]:
    """Bytes a second that cross the links of each while nobody asks, once they have settled."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        before = {system.name: links.crossed(*system.links) for system in systems}
        time.sleep(IDLE_S)
        idle = {
            system.name: (links.crossed(*system.links) - before[system.name]).bytes
            for system in systems
        }
        if max(idle.values()) < IDLE_BYTES_MAX or time.monotonic() > deadline:
            return {name: crossed_bytes / IDLE_S for name, crossed_bytes in idle.items()}


def _measured(links: Links, delay_s: float) -> float:
    links.delay(delay_s)
    return round_trip_s(links)


def _wire(
    system: System,
    sessions: int,
    links: Links,
    ask: Callable[[System, int, int], Seen],
    idle_bytes_per_s: float,
) -> Wire:
    spent = []
    for tokens in (SHORT_TOKENS, LONG_TOKENS):
        before, began_at = crossed(system, links), time.monotonic()
        ask(system, sessions, tokens)
        spent.append((crossed(system, links) - before, time.monotonic() - began_at))
    return wire(system.name, sessions, spent, idle_bytes_per_s)


class _Meter:
    """Of one load on one system, from its making on."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._cpu_s = system.cpu_s()
        self._busy_s = busy_s()

    def run(self, point: Point, seen: Seen) -> Run:
        used_s = self._system.cpu_s()
        nodes_s, engines_s = (b - a for a, b in zip(self._cpu_s, used_s, strict=True))
        others_s = busy_s() - self._busy_s - nodes_s - engines_s
        first_s = statistics.median(told.first_s for told in seen.told)
        return Run(
            point,
            self._system.name,
            seen.tokens / seen.took_s,
            (seen.took_s - first_s) / (ANSWER_TOKENS - 1),
            first_s,
            nodes_s / seen.tokens,
            engines_s / seen.tokens,
            max(0.0, others_s / seen.took_s),
        )


# --- figures ------------------------------------------------------------------------------------


def wire(
    system: str,
    sessions: int,
    spent: Sequence[tuple[Crossed, float]],
    idle_bytes_per_s: float,
) -> Wire:
    """From short and long answers: what crossed, and in how many seconds."""
    (short, short_s), (long, long_s) = spent
    more = long - short
    tokens = sessions * (LONG_TOKENS - SHORT_TOKENS)
    idle_bytes = idle_bytes_per_s * (long_s - short_s)
    return Wire(
        system, sessions, (more.bytes - idle_bytes) / tokens, more.turns / tokens, idle_bytes_per_s
    )


def rows(runs: Sequence[Run]) -> list[Row]:
    """A row per point and system, in the order in which they first came; an unfinished round, of a
    measurement that was ended early, is left out."""
    systems = list(dict.fromkeys(run.system for run in runs))
    found = []
    for point in dict.fromkeys(run.point for run in runs):
        of = {name: [r for r in runs if (r.point, r.system) == (point, name)] for name in systems}
        rounds = min(map(len, of.values()))
        if rounds:
            whole_rounds = {name: each[:rounds] for name, each in of.items()}
            found += [_row(point, name, whole_rounds) for name in systems]
    return found


def _row(point: Point, system: str, of: dict[str, list[Run]]) -> Row:
    runs = of[system]

    def median(figure: Callable[[Run], float]) -> float:
        return statistics.median(map(figure, runs))

    def by(figure: Callable[[Run], float]) -> dict[str, Ratio]:
        return {
            other: Ratio.of(list(map(figure, runs)), list(map(figure, of[other])))
            for other in OTHERS
            if other in of and other != system
        }

    return Row(
        point=point,
        system=system,
        rounds=len(runs),
        tokens_per_s=median(lambda run: run.tokens_per_s),
        token_s=median(lambda run: run.token_s),
        first_s=median(lambda run: run.first_s),
        nodes_cpu_s=median(lambda run: run.nodes_cpu_s),
        engines_cpu_s=median(lambda run: run.engines_cpu_s),
        foreign_cores=median(lambda run: run.foreign_cores),
        speed_by=by(lambda run: run.tokens_per_s),
        first_by=by(lambda run: run.first_s),
    )


def round_trips(runs: Sequence[Run]) -> dict[str, float]:
    """Of a token at one session: how its time grows with the round trip of the links. Nothing
    without at least two delays."""
    alone = [run for run in runs if run.point.sessions == 1]
    if len({run.point.delay_ms for run in alone}) < 2:
        return {}
    found = {}
    for name in dict.fromkeys(run.system for run in alone):
        of = [run for run in alone if run.system == name]
        trips_s = [2e-3 * run.point.delay_ms for run in of]
        found[name] = statistics.linear_regression(trips_s, [run.token_s for run in of]).slope
    return found


# --- in words -----------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    return asdict(report)


def as_text(report: Report) -> str:
    trips = ", ".join(f"{delay:g} → {trip:.1f}" for delay, trip in report.link_ms.items())
    return "\n".join(
        [
            *machine_lines(report.machine),
            f"{report.model}, {SLOTS} slots, {CONTEXT_TOKENS} tokens of context, prompts of about "
            f"{PROMPT_WORDS} tokens, {ANSWER_TOKENS} tokens per answer",
            f"one thread per stage, and per half with RPC; stages with {report.flags}; "
            f"load {report.machine['load_before']:.1f} before",
            f"delays one way, and measured round trips of the links, ms: {trips}",
            "",
            "loading: s until it answers, s of these with layers being loaded, MB that crossed",
            "links until then; per process its layers' MB of the file, and MB read of the file",
            f"(the kernel reads {report.machine['read_ahead_bytes'] / MB:.1f} ahead, and headers)",
            *(_load_line(name, load) for name, load in report.loads.items()),
            "",
            "per generated token: bytes, crossings of a link, round trips; bytes a second if idle",
            *(_wire_line(wire) for wire in report.wires),
            "",
            "round trips per token at one session, by what delays cost:",
            "  " + ", ".join(f"{name} {trips:.2f}" for name, trips in report.round_trips.items()),
            "",
            "ratios of tokens/s and of seconds to the first token: median (quartiles); CPU of the",
            "nodes and of what computes; others used so many cores meanwhile: last column",
            _HEADER,
            *(_line(row) for row in report.rows),
            *([f"ended early: {report.ended}"] if report.ended else []),
        ]
    )


def _load_line(name: str, load: Load) -> str:
    parts = ", ".join(
        f"{part.first}-{part.end - 1}: {part.own_bytes / MB:.1f} {part.read_bytes / MB:.1f}"
        for part in load.parts
    )
    crossed_mb = load.crossed_bytes / MB
    return f"  {name:9} {load.start_s:6.1f} {load.load_s:6.1f} {crossed_mb:7.1f}   {parts}"


def _wire_line(wire: Wire) -> str:
    return (
        f"  {wire.system:9} N={wire.sessions:<2} {wire.bytes:9.0f} {wire.crossings:6.2f} "
        f"{wire.round_trips:6.2f} {wire.idle_bytes_per_s:8.0f}"
    )


_HEADER = (
    f"{'ms':>4} {'N':>2} {'system':9} {'rounds':>6} {'tokens/s':>8} "
    + " ".join(f"{'by ' + other:>17}" for other in OTHERS)
    + f"  {'ms/token':>8}  {'first s':>7} {'by RPC':>17}  {'CPU ms/token':12}  others"
)


def _line(row: Row) -> str:
    speeds = " ".join(f"{row.speed_by.get(other, '')!s:>17}" for other in OTHERS)
    return (
        f"{row.point.delay_ms:4g} {row.point.sessions:2} {row.system:9} {row.rounds:6} "
        f"{row.tokens_per_s:8.1f} {speeds}  {1e3 * row.token_s:8.1f}  "
        f"{row.first_s:7.2f} {row.first_by.get(RPC[1], '')!s:>17}  "
        f"{1e3 * row.nodes_cpu_s:5.1f} {1e3 * row.engines_cpu_s:6.1f}  {row.foreign_cores:6.2f}"
    )
