"""Our node and llama-server in turns: the same chats, slots, context, file and libraries.

A pair is both of them on the same load, one right after the other, and who goes first alternates.
A load is `sessions` conversations that begin at once: their first turns, cold, then their second
turns. Both servers are real processes behind HTTP, and answers are streamed, greedy and of equal
length.

All figures but the throughput are costs. A ratio, ours by llama-server's, is taken within a pair;
shown are the median over pairs and, in brackets, the quartiles. CPU seconds per answer are those
of all processes of a server: they survive a busy machine, while seconds on the clock do not.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trio

from meshnode.models.catalog import resolve
from meshnode.models.digest import digest
from meshnode.models.quantize import requantized
from tests.bench.engine.build import CACHE, llama_server
from tests.bench.engine.client import Conversation, Seen, ask_all
from tests.bench.engine.servers import (
    CONTEXT_TOKENS,
    SLOTS,
    Server,
    Setting,
    end_tokens,
    neighbours,
    our_node,
)
from tests.bench.engine.servers import llama_server as running_llama_server
from tests.bench.machine import busy_s, machine, machine_lines
from tests.e2e.mesh import MODEL_NAME

PAIRS_DEFAULT = 5
SESSIONS = (1, 4, 8, 16)
PROMPTS = {"short": 32, "long": 600}
"""In words, which are about tokens."""
TURNS = ("cold", "second")
ANSWER_TOKENS = 48
ANSWERS_MIN = 8
"""A load has so many answers at least, if need be one set of sessions after the other: the one
answer of a single session takes a third of a second, too short for CPU ticks of 10 ms."""
NEVER = -100.0
"""The logit bias of what would end an answer."""
PACKAGES = ("llama_cpp_python", "trio", "hypercorn", "quart-trio")


@dataclass(frozen=True)
class Point:
    """What is asked: how many at once, of which length, for the first or the second time."""

    sessions: int
    prompt: str
    turn: str


@dataclass(frozen=True)
class Run:
    """One point on one server, once. `cpu_s` by part of the server, for all answers together;
    `foreign_cores` is what everybody else used meanwhile, the clients included."""

    point: Point
    server: str
    tokens_per_s: float
    first_s: tuple[float, ...]
    cpu_s: dict[str, float]
    prompt_tokens: int
    cached_tokens: int
    foreign_cores: float

    @property
    def cpu_per_answer_s(self) -> float:
        return sum(self.cpu_s.values()) / len(self.first_s)

    @property
    def first_p50_s(self) -> float:
        return statistics.median(self.first_s)

    @property
    def first_p95_s(self) -> float:
        return quantile(self.first_s, 0.95)


@dataclass(frozen=True)
class Ratio:
    """Ours by llama-server's, over pairs: median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        return cls(statistics.median(ratios), quantile(ratios, 0.25), quantile(ratios, 0.75))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One point: medians of both servers over pairs, and the ratios within pairs."""

    point: Point
    pairs: int
    tokens_per_s: tuple[float, float]
    cpu_per_answer_s: tuple[float, float]
    first_p50_s: tuple[float, float]
    first_p95_s: tuple[float, float]
    cached_tokens: tuple[float, float]
    prompt_tokens: float
    node_cpu_s: float
    foreign_cores: float
    speed: Ratio
    cpu: Ratio
    first_p50: Ratio
    first_p95: Ratio


@dataclass
class Report:
    setting: str
    model: str
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What to measure; `model` None is the packaged one, as a node requantises it."""

    pairs: int = PAIRS_DEFAULT
    sessions: tuple[int, ...] = SESSIONS
    prompts: tuple[str, ...] = tuple(PROMPTS)
    setting: Setting = field(default_factory=Setting)
    model: Path | None = None


def measure(plan: Plan, say: Callable[[str], None] = print) -> Report:
    """Start both servers, run all pairs, end everything; `say` hears how far it is."""
    program = llama_server()
    model = plan.model or packaged_model()
    never = {str(token): NEVER for token in end_tokens(model)}
    report = Report(str(plan.setting), model.name, machine(PACKAGES))
    report.machine["load_before"] = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engine-")))
        setting = plan.setting
        ours = stack.enter_context(our_node(model, setting, folder))
        theirs = stack.enter_context(running_llama_server(program, model, setting, folder))
        for server in (ours, theirs):
            _ask_both_turns(server, 1, PROMPTS["short"], 0, never)  # neither is measured cold
        stack.enter_context(neighbours(setting.neighbours))
        stack.enter_context(suppress(KeyboardInterrupt))  # there is something to report by now
        seed = 1
        for pair in range(plan.pairs):
            for sessions, prompt in itertools.product(plan.sessions, plan.prompts):
                say(f"pair {pair + 1} of {plan.pairs}: {sessions} sessions, {prompt} prompts")
                for server in (ours, theirs) if pair % 2 == 0 else (theirs, ours):
                    turns = _ask_both_turns(server, sessions, PROMPTS[prompt], seed, never)
                    for turn, taken in zip(TURNS, turns, strict=True):
                        report.runs.append(_run(Point(sessions, prompt, turn), server, taken))
                seed += 2 * max(sessions, ANSWERS_MIN)  # no two loads have a chat in common
    report.rows = rows(report.runs)
    return report


# --- one load -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taken:
    """What one turn of a load took: of one set of sessions after the other."""

    seen: tuple[Seen, ...]
    cpu_s: dict[str, float]
    foreign_cores: float


def _ask_both_turns(
    server: Server, sessions: int, words: int, seed: int, never: dict[str, float]
) -> list[_Taken]:
    answers = sessions * -(-ANSWERS_MIN // sessions)
    chats = [Conversation.of(words, seed + 2 * i) for i in range(answers)]
    sets = [chats[first : first + sessions] for first in range(0, answers, sessions)]
    cold = _take(server, sets, never)
    all_told = itertools.chain.from_iterable(seen.told for seen in cold.seen)
    for i, (chat, told) in enumerate(zip(chats, all_told, strict=True)):
        chat.go_on(told.text, seed + 2 * i + 1)
    return [cold, _take(server, sets, never)]


def _take(
    server: Server, sets: Sequence[Sequence[Conversation]], never: dict[str, float]
) -> _Taken:
    cpu_before, busy_before, begun_at = server.cpu_s(), busy_s(), time.perf_counter()
    seen = tuple(ask_all(server.url, MODEL_NAME, each, ANSWER_TOKENS, never) for each in sets)
    took_s = time.perf_counter() - begun_at
    cpu_s = {part: used - cpu_before[part] for part, used in server.cpu_s().items()}
    foreign_s = busy_s() - busy_before - sum(cpu_s.values())
    return _Taken(seen, cpu_s, max(0.0, foreign_s / took_s))


def _run(point: Point, server: Server, taken: _Taken) -> Run:
    told = [each for seen in taken.seen for each in seen.told]
    return Run(
        point,
        server.name,
        sum(seen.tokens for seen in taken.seen) / sum(seen.took_s for seen in taken.seen),
        tuple(each.first_s for each in told),
        taken.cpu_s,
        sum(each.prompt_tokens for each in told),
        sum(each.cached_tokens for each in told),
        taken.foreign_cores,
    )


def packaged_model() -> Path:
    """The file that a node of the default configuration serves."""
    shipped = resolve("default", CACHE).path

    async def make() -> Path:
        return await requantized(shipped, await digest(shipped, CACHE), CACHE)

    return trio.run(make)


# --- figures ------------------------------------------------------------------------------------


def rows(runs: Sequence[Run]) -> list[Row]:
    """A row per point of which there are pairs, in the order in which points first came; half a
    pair, of a measurement that was ended early, is left out."""
    found = []
    for point in dict.fromkeys(run.point for run in runs):
        ours = [run for run in runs if run.point == point and run.server == "ours"]
        theirs = [run for run in runs if run.point == point and run.server != "ours"]
        if pairs := min(len(ours), len(theirs)):
            found.append(_row(point, ours[:pairs], theirs[:pairs]))
    return found


def _row(point: Point, ours: Sequence[Run], theirs: Sequence[Run]) -> Row:
    def medians(figure: Callable[[Run], float]) -> tuple[float, float]:
        return statistics.median(map(figure, ours)), statistics.median(map(figure, theirs))

    def ratio(figure: Callable[[Run], float]) -> Ratio:
        return Ratio.of([figure(run) for run in ours], [figure(run) for run in theirs])

    return Row(
        point=point,
        tokens_per_s=medians(lambda run: run.tokens_per_s),
        cpu_per_answer_s=medians(lambda run: run.cpu_per_answer_s),
        first_p50_s=medians(lambda run: run.first_p50_s),
        first_p95_s=medians(lambda run: run.first_p95_s),
        pairs=len(ours),
        cached_tokens=medians(lambda run: run.cached_tokens / len(run.first_s)),
        prompt_tokens=statistics.median(run.prompt_tokens / len(run.first_s) for run in ours),
        node_cpu_s=statistics.median(run.cpu_s["node"] / len(run.first_s) for run in ours),
        foreign_cores=statistics.median(run.foreign_cores for run in (*ours, *theirs)),
        speed=ratio(lambda run: run.tokens_per_s),
        cpu=ratio(lambda run: run.cpu_per_answer_s),
        first_p50=ratio(lambda run: run.first_p50_s),
        first_p95=ratio(lambda run: run.first_p95_s),
    )


def quantile(samples: Sequence[float], share: float) -> float:
    """The nearest rank."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# --- in words -----------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    return asdict(report)


def as_text(report: Report) -> str:
    return "\n".join(
        [
            *machine_lines(report.machine),
            f"{report.model}, {SLOTS} slots, {CONTEXT_TOKENS} tokens of context, "
            f"{ANSWER_TOKENS} tokens per answer; {report.setting}",
            f"load {report.machine['load_before']:.1f} before; others used "
            "so many cores meanwhile: last column",
            "ratios are ours by llama-server's, median (quartiles); CPU seconds per answer: all "
            "of ours, of these the node without its engine, llama-server",
            "",
            _HEADER,
            *(_line(row) for row in report.rows),
        ]
    )


_HEADER = (
    f"{'N':>2} {'pairs':5} {'prompt':6} {'turn':6} {'in':>4} {'cached':>9}  {'tokens/s':>11} "
    f"{'ratio':>17}  {'CPU s: all, node, theirs':>24} {'ratio':>17}  "
    f"{'first s p50':>11} {'ratio':>17}  {'p95':>11} {'ratio':>17}  others"
)


def _line(row: Row) -> str:
    def both(figures: tuple[float, float], digits: int) -> str:
        return f"{figures[0]:.{digits}f} {figures[1]:.{digits}f}"

    ours_s, theirs_s = row.cpu_per_answer_s
    return (
        f"{row.point.sessions:2} {row.pairs:5} {row.point.prompt:6} "
        f"{row.point.turn:6} {row.prompt_tokens:4.0f} "
        f"{both(row.cached_tokens, 0):>9}  {both(row.tokens_per_s, 1):>11} {row.speed!s:>17}  "
        f"{f'{ours_s:.2f} {row.node_cpu_s:.3f} {theirs_s:.2f}':>24} {row.cpu!s:>17}  "
        f"{both(row.first_p50_s, 2):>11} {row.first_p50!s:>17}  "
        f"{both(row.first_p95_s, 2):>11} {row.first_p95!s:>17}  {row.foreign_cores:6.2f}"
    )
