"""The rounds: every way to the same tokens once per round, so that a busy machine slows all alike.

    direct   HTTP to the serving node's own API
    tunnel   HTTP to another node's API, one QUIC tunnel to the serving node
    bare     HTTP to a bare hypercorn and quart-trio app that streams the same bytes
    router   HTTP to a Rust router in front of the bare app

A figure is the median over rounds. "Added" and "ratio" compare within each round: the tunnel with
direct, the router with bare, and bare with direct.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.hop.client import Clients, Load, Seen
from tests.bench.hop.engine import MODEL
from tests.bench.hop.routers import ROUTER, installed_router, running_router
from tests.bench.machine import cpu_used_s, machine, machine_lines
from tests.e2e.mesh import Mesh, Models, NodeProcess, serves

ROUNDS_DEFAULT = 5
REAL_MODEL = "smollm2-135m-instruct"
QUESTION = "Write two sentences about the sea."


def _paced(clients: int, requests: int, tokens: int, step_ms: int) -> Load:
    answer_s = tokens * step_ms / 1e3
    return Load(clients, requests, tokens, str(step_ms), MODEL, answer_s if clients > 1 else 0.0)


# One client at 50 tokens/s is a quick model; 8 and 32 share 320 tokens/s, what a batching engine
# on two cores makes of a small one.
PACED = (_paced(1, 16, 5, 20), _paced(8, 4, 16, 25), _paced(32, 2, 8, 100))
SATURATED = tuple(Load(n, 1, max(400 // n, 20), "0", MODEL) for n in (1, 8, 32))
REAL = Load(1, 1, 32, QUESTION, REAL_MODEL)
WARM_UP = Load(32, 1, 5, "5", MODEL)


@dataclass(frozen=True)
class Way:
    """One row: where to ask, what to compare it with, and whose CPU time it costs."""

    name: str
    base: str
    clients: Clients
    pids: dict[str, int]

    @property
    def has_real_model(self) -> bool:
        return "S" in self.pids


@dataclass(frozen=True)
class Row:
    """One way under one load. Times in milliseconds, CPU in seconds per 1000 tokens."""

    load: str
    clients: int
    way: str
    first_p50: float
    first_p95: float
    later_p50: float
    later_p99: float
    first_added: float
    later_added: float
    tokens_per_s: float
    ratio: float
    cpu_s: dict[str, float]


@dataclass(frozen=True)
class Report:
    machine: dict[str, Any]
    rtt_ms: float
    rows: tuple[Row, ...]


def measure(rounds: int = ROUNDS_DEFAULT) -> Report:
    """Start everything, run all rounds, end everything."""
    load_before = os.getloadavg()
    with running() as (gateway, ways):
        for way in ways:
            way.clients.run(WARM_UP)
        taken: dict[tuple[str, int, str], list[_Round]] = defaultdict(list)
        for number in range(rounds):
            for kind, loads in (("paced", PACED), ("saturated", SATURATED), ("real", (REAL,))):
                for load in loads:
                    # The order turns, so that no way always follows the same other.
                    for turn in range(len(ways)):
                        way = ways[(number + turn) % len(ways)]
                        if kind != "real" or way.has_real_model:
                            taken[kind, load.clients, way.name].append(_Round.of(way, load))
        rtt_ms = float(gateway.status()["peers"][0]["rtt_ms"])
    bases = {way.name: way.base for way in ways}
    rows = tuple(
        _row(kind, clients, name, rounds_, taken[kind, clients, bases[name]])
        for (kind, clients, name), rounds_ in taken.items()
    )
    return Report(_machine(rounds, load_before), rtt_ms, rows)


@contextmanager
def running() -> Iterator[tuple[NodeProcess, list[Way]]]:
    """The gateway and all ways, ready to be measured."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hop-")))
        mesh = stack.enter_context(Mesh(folder, Models(folder, folder)))
        bare = mesh.run("bare", ("-m", "tests.bench.hop.serve", "bare"))
        server = mesh.run("server", ("-m", "tests.bench.hop.serve", "node")).wait_started()
        gateway = mesh.gateway("gateway", "--join", server.invite(role="gateway")).wait_started()
        bare.wait_started()
        for model in (MODEL, REAL_MODEL):
            gateway.wait_until(lambda status, model=model: server.peer_id in serves(status, model))
        s, g, b = (each.process.pid for each in (server, gateway, bare))
        ways = [
            Way("direct", "direct", Clients(server.url), {"S": s}),
            Way("tunnel", "direct", Clients(gateway.url), {"S": s, "G": g}),
            Way("bare", "direct", Clients(bare.url), {"B": b}),
        ]
        if (program := installed_router()) is not None:
            router = running_router(program, bare.url, folder / "router.log")
            url, r = stack.enter_context(router)
            ways.append(Way("router", "bare", Clients(url), {"B": b, "R": r}))
        for way in ways:
            stack.callback(way.clients.close)
        yield gateway, ways


# --- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Round:
    """One load on one way, once."""

    seen: Seen
    cpu_s: dict[str, float]

    @classmethod
    def of(cls, way: Way, load: Load) -> _Round:
        before = {name: cpu_used_s(pid) for name, pid in way.pids.items()}
        seen = way.clients.run(load)
        cpu_s = {name: cpu_used_s(pid) - before[name] for name, pid in way.pids.items()}
        return cls(seen, cpu_s)

    @property
    def later_s(self) -> list[float]:
        return self.seen.later_s or self.seen.gap_s


def _row(kind: str, clients: int, way: str, rounds: list[_Round], base: list[_Round]) -> Row:
    def median(figure: Callable[[_Round], float]) -> float:
        return statistics.median(map(figure, rounds))

    def added(samples: Callable[[_Round], list[float]]) -> float:
        pairs = zip(rounds, base, strict=True)
        middle = statistics.median
        return 1e3 * middle(middle(samples(a)) - middle(samples(b)) for a, b in pairs)

    first = sorted(s for each in rounds for s in each.seen.first_s)
    later = sorted(s for each in rounds for s in each.later_s)
    return Row(
        load=kind,
        clients=clients,
        way=way,
        first_p50=1e3 * _quantile(first, 0.5),
        first_p95=1e3 * _quantile(first, 0.95),
        later_p50=1e3 * _quantile(later, 0.5),
        later_p99=1e3 * _quantile(later, 0.99),
        first_added=added(lambda each: each.seen.first_s),
        later_added=added(lambda each: each.later_s),
        tokens_per_s=median(lambda each: each.seen.tokens_per_s),
        ratio=statistics.median(
            a.seen.tokens_per_s / b.seen.tokens_per_s for a, b in zip(rounds, base, strict=True)
        ),
        cpu_s={
            name: median(lambda each, name=name: 1e3 * each.cpu_s[name] / each.seen.tokens)
            for name in rounds[0].cpu_s
        },
    )


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# --- in words -----------------------------------------------------------------------------------


def _machine(rounds: int, load_before: tuple[float, float, float]) -> dict[str, Any]:
    described = machine(("libp2p", "aioquic", "trio", "hypercorn", "quart-trio", "h11"))
    described["packages"] |= dict([ROUTER.split("==")])
    return described | {
        "load_before": load_before[0],
        "load_after": os.getloadavg()[0],
        "rounds": rounds,
    }


def as_json(report: Report) -> dict[str, Any]:
    return asdict(report)


def as_text(report: Report) -> str:
    where = report.machine
    lines = [
        *machine_lines(where),
        f"load {where['load_before']:.1f} before, {where['load_after']:.1f} after; "
        f"{where['rounds']} rounds; smoothed RTT of the tunnel {report.rtt_ms:.2f} ms",
        "times in ms; CPU in seconds per 1000 tokens: S serving node, G gateway, R router, B bare",
    ]
    for kind, title in (
        ("paced", "paced tokens (later: from the engine to the client)"),
        ("saturated", "as many tokens as go through"),
        ("real", "SmolLM2-135M-Instruct Q4_0, greedy (later: from token to token)"),
    ):
        lines += ["", title, _HEADER]
        lines += [_line(row) for row in report.rows if row.load == kind]
    return "\n".join(lines)


_HEADER = (
    f"{'N':>3} {'way':7} {'first p50':>9} {'p95':>6} {'added':>6}  "
    f"{'later p50':>9} {'p99':>6} {'added':>6}  {'tokens/s':>8} {'ratio':>5}  CPU"
)


def _line(row: Row) -> str:
    cpu = " ".join(f"{name} {seconds:.2f}" for name, seconds in row.cpu_s.items())
    return (
        f"{row.clients:3} {row.way:7} {row.first_p50:9.2f} {row.first_p95:6.1f} "
        f"{row.first_added:+6.2f}  {row.later_p50:9.2f} {row.later_p99:6.1f} "
        f"{row.later_added:+6.2f}  {row.tokens_per_s:8.0f} {row.ratio:5.2f}  {cpu}"
    )
