"""What expert shards of the small MoE lose: shares kept × ways to choose, and one as a draft.

Every figure is over the held-out text that comes along, read in windows of 256 tokens; experts are
ranked on the calibration text. `random` is the mean of three draws. `draft` lets a shard guess for
the whole model while it answers greedily: how many of its guesses are right, how many tokens a pass
of the whole model then brings, and the speed here, as a ratio to the same engine without guesses.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import trio

import meshnode.models
from meshnode.config import Ranking
from meshnode.engine import Request, Sampling
from meshnode.engine.card import load_card
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.engine.sharding_child import compare, observe
from meshnode.models.catalog import ModelSource
from meshnode.models.digest import leaf_hashes, tree_root
from meshnode.models.experts import Experts, read_experts, write_shard
from meshnode.models.gguf import ShardMark
from meshnode.models.ranking import Seen, choose
from meshnode.models.receipt import Quality
from tests.bench.engine.speculation import Sample, sample
from tests.bench.machine import machine, machine_lines

MODEL = Path(__file__).parents[2] / "data" / "tiny-moe.Q8_0.gguf"
TEXTS = Path(meshnode.models.__path__[0]) / "texts"
SHARES = (0.75, 0.5, 0.25)
DRAWS = 3
# One after the other, as a gateway's pipeline would ask.
DRAFT_ROUNDS, DRAFT_TOKENS, DRAFT_PROMPT_CHARS = 5, 96, 400
CONTEXT_TOKENS = 512


@dataclass(frozen=True)
class Row:
    """A shard, and how near it comes."""

    kept: int
    ranking: Ranking
    shard_bytes: int
    kl: float
    agreement: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Draft:
    """A shard that guesses. `right` is the share of its guesses, `tokens_per_pass` what a pass of
    the whole model brings, `speed` a ratio to none."""

    kept: int
    right: float
    tokens_per_pass: float
    speed: float


@dataclass(frozen=True)
class Report:
    machine: dict[str, Any]
    experts: int
    perplexity: float
    tokens: int
    source_bytes: int
    rows: tuple[Row, ...]
    drafts: tuple[Draft, ...]
    seconds: float


def measure(
    model: Path = MODEL,
    calibration: Path = TEXTS / "calibration.txt",
    held_out: Path = TEXTS / "held-out.txt",
    threads: int = 1,
) -> Report:
    """Rank, cut and compare all of them, and let them draft."""
    begun = time.monotonic()
    experts = read_experts(model)
    seen, _ = observe(model, experts, calibration.read_text(), threads, _nobody)
    text = held_out.read_text()
    rows: list[Row] = []
    drafts: list[Draft] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(model, experts, seen, text, threads, Path(folder))
        whole, tokens = compare(model, model, text, threads, _nobody)
        for share in SHARES:
            kept = round(share * experts.count)
            rows += [bench.row(kept, ranking) for ranking in get_args(Ranking)]
            bench.cut(kept, "output-norm", 0)
            drafts.append(trio.run(bench.draft, kept))
    return Report(
        machine=machine(("llama-cpp-python",)),
        experts=experts.count,
        perplexity=whole.perplexity,
        tokens=tokens,
        source_bytes=model.stat().st_size,
        rows=tuple(rows),
        drafts=tuple(drafts),
        seconds=time.monotonic() - begun,
    )


@dataclass(frozen=True)
class _Bench:
    model: Path
    experts: Experts
    seen: Seen
    text: str
    threads: int
    folder: Path

    @property
    def shard(self) -> Path:
        return self.folder / "shard.gguf"

    def cut(self, kept: int, ranking: Ranking, seed: int) -> int:
        chosen = choose(ranking, self.seen, kept, seed=seed)
        mark = ShardMark(tree_root(leaf_hashes(self.model)).hex(), kept, self.experts.count)
        return write_shard(self.model, self.shard, chosen, mark)

    def row(self, kept: int, ranking: Ranking) -> Row:
        found: list[Quality] = []
        size = 0
        for seed in range(DRAWS if ranking == "random" else 1):
            size = self.cut(kept, ranking, seed)
            found.append(compare(self.model, self.shard, self.text, self.threads, _nobody)[0])
        return Row(
            kept,
            ranking,
            size,
            statistics.mean(quality.kl for quality in found),
            statistics.mean(quality.agreement for quality in found),
            statistics.mean(quality.perplexity_ratio for quality in found),
        )

    async def draft(self, kept: int) -> Draft:
        """The whole model with the shard's guesses against itself without, taking turns."""
        card = await load_card(ModelSource("whole", self.model), self.folder, lambda _: None)
        plain = EngineOptions(CONTEXT_TOKENS, slots=1, threads=self.threads)
        guessed = replace(plain, speculate="draft", draft=self.shard)
        step = len(self.text) // DRAFT_ROUNDS
        prompts = [self.text[at * step :][:DRAFT_PROMPT_CHARS] for at in range(DRAFT_ROUNDS)]
        async with trio.open_nursery() as nursery:
            engines = [EngineProcess(card, options) for options in (plain, guessed)]
            for engine in engines:
                await nursery.start(engine.run)
                await engine.wait_ready()
            runs = [
                [await sample(engine, _request(prompt), sessions=1) for engine in engines]
                for prompt in prompts
            ]
            nursery.cancel_scope.cancel()
        return _judged(kept, runs)


def _judged(kept: int, runs: Sequence[Sequence[Sample]]) -> Draft:
    guessed = [run for _, run in runs]
    tokens, accepted = sum(run.tokens for run in guessed), sum(run.accepted for run in guessed)
    return Draft(
        kept,
        right=accepted / sum(run.proposed for run in guessed),
        tokens_per_pass=tokens / (tokens - accepted),
        speed=statistics.median(
            (run.tokens / run.wall_s) / (base.tokens / base.wall_s) for base, run in runs
        ),
    )


def _request(prompt: str) -> Request:
    return Request("r", b"", prompt, Sampling(temperature=0), DRAFT_TOKENS)


def _nobody(_told: object) -> None:
    """Progress that nobody watches."""


def as_text(report: Report) -> str:
    head = f"{'kept':10}{'ranking':12}{'MB':>7}{'KL':>8}{'agree':>7}{'ppl ×':>7}"
    lines = [
        *machine_lines(report.machine),
        f"{report.tokens} held-out tokens, perplexity {report.perplexity:.2f}, "
        f"{report.source_bytes / 1e6:.1f} MB; {report.seconds:.0f} s",
        head,
    ]
    for row in report.rows:
        lines.append(
            f"{row.kept:>3} of {report.experts:<3}{row.ranking:12}{row.shard_bytes / 1e6:7.1f}"
            f"{row.kl:8.4f}{row.agreement:7.3f}{row.perplexity_ratio:7.3f}"
        )
    lines.append("as a draft for the whole model:")
    for draft in report.drafts:
        lines.append(
            f"{draft.kept:>3} of {report.experts:<3}{draft.right:.0%} of the guesses right, "
            f"{draft.tokens_per_pass:.2f} tokens a pass, speed ×{draft.speed:.2f}"
        )
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    return asdict(report)
