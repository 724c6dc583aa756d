"""python -m tests.bench.engine.prefix [--rounds N]

What kept KV is worth, in wall time and in CPU time, which survives a busy host:

* the first turn of a session, to its first token, behind a system prompt that nobody has asked
  before, or that other sessions have;
* the next turn of a conversation that was evicted: computed again, or restored;
* the cache as f16 and as q8_0.

One thread; the variants take turns, and the median of the rounds is shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from meshnode.config import KvType
from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.engine.memory import memory_need
from meshnode.engine.scheduler import Limits
from meshnode.models.catalog import resolve
from meshnode.models.digest import digest
from meshnode.models.gguf import read_header
from meshnode.models.quantize import requantized

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

from meshnode.engine.llama import LlamaModel
from tests.engine.stepping import Stepper

ROUNDS_DEFAULT = 5
CONTEXT_TOKENS = 2048
SYSTEM_TOKENS = 1000
QUESTION_TOKENS = 26
MEBIBYTE = 1024**2


@dataclass(frozen=True)
class Cost:
    """Of one first token, in seconds."""

    wall_s: float
    cpu_s: float


def cost_of(work: Callable[[], None]) -> Cost:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall_s, time.process_time() - cpu_s)


@contextmanager
def stepped(path: Path, kv_type: KvType = "f16", *, saved: bool = False) -> Iterator[Stepper]:
    """Two slots to run in and six to keep; all of a context may be saved, or nothing."""
    need = memory_need(read_header(path), CONTEXT_TOKENS, kv_type=kv_type)
    with LlamaModel(
        str(path),
        context_tokens=CONTEXT_TOKENS,
        slots=2,
        slots_kept=6,
        kv_type=kv_type,
        threads=1,
        on_progress=lambda _fraction: None,
    ) as model:
        limits = Limits(
            2,
            CONTEXT_TOKENS,
            CONTEXT_TOKENS,
            8,
            slots_kept=6,
            saved_tokens=2 * CONTEXT_TOKENS if saved else 0,
        )
        yield Stepper(model, limits, kv_bytes_per_token=need.kv_bytes_per_token)


class Asker:
    """Asks one question after another, each of a session and with words of its own."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._numbers = 0

    def tokens(self, count: int) -> list[int]:
        """Unlike any before."""
        self._numbers += 1
        text = f"Number {self._numbers} is what this is about, and nothing else at all. " * count
        return self._stepper.model.prompt_tokens(text)[:count]

    def first_token(self, session: bytes, prompt: list[int]) -> Cost:
        self._numbers += 1
        self._stepper.submit(self._numbers, session, prompt, 1)
        return cost_of(self._stepper.run)


def first_turns(path: Path) -> tuple[Cost, Cost]:
    """With a new system prompt, and with the same one in another session."""
    with stepped(path) as stepper:
        ask = Asker(stepper)
        system = ask.tokens(SYSTEM_TOKENS)
        return (
            ask.first_token(b"a", system + ask.tokens(QUESTION_TOKENS)),
            ask.first_token(b"b", system + ask.tokens(QUESTION_TOKENS)),
        )


def after_eviction(path: Path, *, saved: bool) -> Cost:
    """The second turn of a session whose 1,000 tokens others have driven out."""
    with stepped(path, saved=saved) as stepper:
        ask = Asker(stepper)
        history = ask.tokens(SYSTEM_TOKENS)
        ask.first_token(b"a", history)
        for other in (b"b", b"c"):
            ask.first_token(other, ask.tokens(SYSTEM_TOKENS))
        return ask.first_token(b"a", history + ask.tokens(QUESTION_TOKENS))


def prefill(path: Path, kv_type: KvType) -> tuple[Cost, Cost, float]:
    """1,000 tokens, the 26 after them, and the cache's size in MiB."""
    with stepped(path, kv_type) as stepper:
        ask = Asker(stepper)
        history = ask.tokens(SYSTEM_TOKENS)
        first = ask.first_token(b"a", history)
        second = ask.first_token(b"a", history + ask.tokens(QUESTION_TOKENS))
        need = memory_need(read_header(path), CONTEXT_TOKENS, kv_type=kv_type)
        return first, second, need.kv_bytes / MEBIBYTE


def median(costs: list[Cost]) -> str:
    wall_s = statistics.median(cost.wall_s for cost in costs)
    cpu_s = statistics.median(cost.cpu_s for cost in costs)
    return f"{wall_s:8.3f} s wall {cpu_s:8.3f} s CPU"


def measure(path: Path, rounds: int) -> None:
    rows: dict[str, list[Cost]] = {}
    kv_mib: dict[KvType, float] = {}
    for _ in range(rounds):
        new, shared = first_turns(path)
        rows.setdefault("first turn, new system prompt", []).append(new)
        rows.setdefault("first turn, known system prompt", []).append(shared)
        for how, saved in (("computed again", False), ("restored", True)):
            cost = after_eviction(path, saved=saved)
            rows.setdefault(f"evicted, then {how}", []).append(cost)
        for kv_type in ("f16", "q8_0"):
            first, second, kv_mib[kv_type] = prefill(path, kv_type)
            rows.setdefault(f"{kv_type}: {SYSTEM_TOKENS} tokens", []).append(first)
            rows.setdefault(f"{kv_type}: {QUESTION_TOKENS} after them", []).append(second)
    for name, costs in rows.items():
        print(f"{name:34}{median(costs)}")
    for kv_type, size in kv_mib.items():
        print(f"{kv_type}: {size:.0f} MiB for {CONTEXT_TOKENS} tokens")


def default_model(data_dir: Path) -> Path:
    async def make() -> Path:
        source = resolve("default", data_dir)
        return await requantized(source.path, await digest(source.path, data_dir), data_dir)

    return trio.run(make)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.engine.prefix")
    parser.add_argument("--rounds", type=int, default=ROUNDS_DEFAULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure(default_model(Path(directory)), options.rounds)


if __name__ == "__main__":
    main()
