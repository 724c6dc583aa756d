"""What guessing ahead brings and costs; `python -m tests.bench.engine.speculation` measures it.

The same engine four times: without guesses, with prompt lookup, with a draft model (the target
itself in another quantization: it guesses well and costs as much as the target, so it shows the
passes saved and never a gain in time), and with the switch that turns itself off. They take turns
on two tasks, one that repeats its prompt and one that does not. Each figure is the median over
the rounds of the ratio to the round's run without guesses; CPU seconds survive a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import psutil
import trio

from meshnode.config import Speculate
from meshnode.engine import Finish, ModelCard, Request, Sampling
from meshnode.engine.card import load_card
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.models.catalog import DEFAULT_ALIAS, ModelSource, resolve
from meshnode.models.digest import digest
from meshnode.models.quantize import requantized

ROUNDS_DEFAULT = 5
TOKENS = 96
CONTEXT_TOKENS = 2048
SLOTS = 4
NAMES = "Ada, Bob, Cleo, Dan, Eve, Finn, Gus, Hal, Ida, Jon, Kim, Leo, Mia, Ned, Ola, Pia"
TASKS = {
    "copy": f"A list of names: {NAMES}.\nThe same list again: {NAMES}.\nThe same list again:",
    "story": "Once upon a time, a llama came down from the mountains to see the sea. It",
}


@dataclass(frozen=True)
class Sample:
    """One run of one task by one engine; `passes` were taken by each sequence."""

    tokens: int
    wall_s: float
    cpu_s: float
    proposed: int
    accepted: int

    @property
    def passes_per_token(self) -> float:
        return (self.tokens - self.accepted) / self.tokens


def request_for(task: str, seed: int) -> Request:
    """A copy is greedy; a story is not, for this small model's greedy stories go in circles."""
    sampling = Sampling(temperature=0 if task == "copy" else 1.0, seed=seed)
    return Request("r", b"", TASKS[task], sampling, TOKENS)


async def sample(engine: EngineProcess, request: Request, sessions: int) -> Sample:
    """`sessions` equal requests at once, after a first one that has computed the prompt."""
    await answer(engine, replace(request, max_tokens=1))
    assert engine.pid is not None
    process = psutil.Process(engine.pid)
    before, cpu_s, wall_s = engine.stats(), cpu_seconds(process), time.perf_counter()
    counts: list[int] = []

    async def one() -> None:
        counts.append(await answer(engine, request))

    async with trio.open_nursery() as nursery:
        for _ in range(sessions):
            nursery.start_soon(one)
    wall_s, cpu_s = time.perf_counter() - wall_s, cpu_seconds(process) - cpu_s
    while engine.stats().slots_busy:
        await trio.sleep(0.01)
    proposed = accepted = 0
    after = engine.stats()
    if after.speculation is not None:
        old = before.speculation
        proposed = after.speculation.proposed - (old.proposed if old else 0)
        accepted = after.speculation.accepted - (old.accepted if old else 0)
    return Sample(sum(counts), wall_s, cpu_s, proposed, accepted)


async def answer(engine: EngineProcess, request: Request) -> int:
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Finish):
                return event.usage.completion_tokens
    raise AssertionError("the answer has no finish")


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(rounds: int, sessions: int, threads: int) -> str:
    """Run it all; returns the table."""
    with tempfile.TemporaryDirectory() as directory:
        card, shipped = await prepare(Path(directory))
        async with trio.open_nursery() as nursery:
            engines = {}
            for mode in get_args(Speculate):
                options = EngineOptions(
                    CONTEXT_TOKENS,
                    SLOTS,
                    SLOTS,
                    threads,
                    mode,
                    shipped if mode == "draft" else None,
                )
                engines[mode] = EngineProcess(card, options)
                await nursery.start(engines[mode].run)
                await engines[mode].wait_ready()
            head = f"{'tok/s':>7}{'x':>6}{'CPU x':>7}{'right':>7}{'passes/token':>14}"
            lines = [
                f"{rounds} rounds, {sessions} at once, {TOKENS} tokens each, {threads} threads",
                f"{'task':7}{'guesses':9}{head}",
            ]
            for task in TASKS:
                runs: dict[str, list[Sample]] = {mode: [] for mode in engines}
                for number in range(rounds):
                    request = request_for(task, seed=number)
                    for mode, engine in engines.items():
                        runs[mode].append(await sample(engine, request, sessions))
                lines += [row(task, mode, runs[mode], runs["off"]) for mode in engines]
            stats = engines["auto"].stats().speculation
            lines.append(f"auto is {'on' if stats and stats.on else 'off'} in the end")
            nursery.cancel_scope.cancel()
    return "\n".join(lines)


async def prepare(directory: Path) -> tuple[ModelCard, Path]:
    """The default model as Q4_0, and the file it was made from."""
    source = resolve(DEFAULT_ALIAS, directory)
    path = await requantized(source.path, await digest(source.path, directory), directory)
    card = await load_card(ModelSource(source.name, path), directory, lambda _fraction: None)
    return card, source.path


def row(task: str, mode: str, runs: list[Sample], plain: list[Sample]) -> str:
    pairs = list(zip(runs, plain, strict=True))
    speed = statistics.median(run.tokens / run.wall_s for run in runs)
    faster = statistics.median(
        (run.tokens / run.wall_s) / (base.tokens / base.wall_s) for run, base in pairs
    )
    cpu = statistics.median(
        (run.cpu_s / run.tokens) / (base.cpu_s / base.tokens) for run, base in pairs
    )
    proposed = sum(run.proposed for run in runs)
    right = f"{sum(run.accepted for run in runs) / proposed:.0%}" if proposed else "–"
    passes = statistics.median(run.passes_per_token for run in runs)
    return f"{task:7}{mode:9}{speed:7.1f}{faster:6.2f}{cpu:7.2f}{right:>7}{passes:14.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.engine.speculation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS_DEFAULT)
    parser.add_argument("--sessions", type=int, default=1, help=f"at once, up to {SLOTS}")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(trio.run(measure, options.rounds, options.sessions, options.threads))


if __name__ == "__main__":
    main()
