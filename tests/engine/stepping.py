"""A real model stepped by a scheduler in this process, greedy, as the child does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from meshnode.engine import Sampling, Usage
from meshnode.engine.llama import LlamaModel
from meshnode.engine.prepare import prepare
from meshnode.engine.scheduler import Change, Limits, Scheduler, Trim
from meshnode.engine.states import StateStore


class Stepper:
    """Keeps what was done: `answers` and `usages` by sequence, `computed` tokens, `changes`."""

    def __init__(
        self,
        model: LlamaModel,
        limits: Limits,
        *,
        spill_dir: Path | None = None,
        kv_bytes_per_token: int,
    ) -> None:
        for slot in range(limits.slots + limits.slots_kept):
            model.trim(Trim(slot, 0))
        self.model = model
        self.scheduler = Scheduler(limits, model.end_tokens)
        self.states = StateStore(spill_dir, kv_bytes_per_token)
        self.answers: dict[int, list[int]] = {}
        self.usages: dict[int, Usage] = {}
        self.computed: Counter[int] = Counter()
        self.changes: list[Change] = []
        self._sampler = model.sampler(Sampling(temperature=0))

    def submit(self, number: int, session: bytes, prompt: Sequence[int], max_tokens: int) -> None:
        self.scheduler.submit(number, session, prompt, max_tokens)
        self.answers[number] = []

    def step(self) -> bool:
        """False if there was nothing to do."""
        batch = self.scheduler.plan()
        if batch is None:
            return False
        self.changes += batch.changes
        if not prepare(batch.changes, self.model, self.states, self.scheduler):
            return True
        if not batch.chunks:
            return True
        assert self.model.decode(batch)
        draws, row = [], -1
        for chunk in batch.chunks:
            row += len(chunk.tokens)
            self.computed[chunk.sequence] += len(chunk.tokens)
            if chunk.wants_logits:
                draws.append(self.model.draw(self._sampler, row))
        for sampled in self.scheduler.commit(batch, draws):
            self.answers[sampled.sequence].append(sampled.token)
            self.usages[sampled.sequence] = sampled.usage
        return True

    def run(self) -> None:
        while self.step():
            pass

    def of(self, kind: type) -> list[Change]:
        """What was changed in this way."""
        return [change for change in self.changes if isinstance(change, kind)]
