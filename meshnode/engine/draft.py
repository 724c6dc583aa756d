"""A small model that guesses for a large one: greedy drafts, a few tokens ahead.

Decides nothing about answers: its guesses are judged like any others (`speculate.py`), so a bad
draft model costs time and never changes a text. It follows the sequences it is asked about in a
KV cache of its own, with a scheduler of its own: a sequence's turns find their cache again, and a
full cache evicts. Runs in the child process, in the thread that decodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshnode.engine import Sampling
from meshnode.engine.llama import DecodeError, LlamaModel
from meshnode.engine.pace import Threads
from meshnode.engine.scheduler import (
    PREFILL_TOKENS_BESIDE_DECODE_MAX,
    Batch,
    Limits,
    Scheduler,
)
from meshnode.engine.speculate import PROPOSED_TOKENS_MAX, Ask
from meshnode.errors import ModelLoadError

# One pass to read what is new, one for each further token. A sequence that has more to read (a
# new prompt) goes on in the next call: others wait for a few passes of the draft, not for all.
PASSES_MAX = PROPOSED_TOKENS_MAX


class DraftModel:
    """Implements `Proposer`."""

    def __init__(
        self, model: LlamaModel, target: LlamaModel, *, slots: int, threads: Threads
    ) -> None:
        """Takes over a loaded model. Raises `ModelLoadError` if it cannot draft for `target`."""
        if not model.can_rewind:
            raise ModelLoadError(
                "The draft model is recurrent: it cannot take a rejected guess back. Use another."
            )
        if model.vocabulary_digest() != target.vocabulary_digest():
            raise ModelLoadError(
                f"The draft model has another vocabulary ({model.vocabulary_size} tokens) than the "
                f"model ({target.vocabulary_size} tokens): its guesses would mean other words. Use "
                "a small model of the same family."
            )
        self._model = model
        self._threads = threads
        tokens = model.context_tokens
        # Somebody's next token waits for whatever is read here.
        chunk = PREFILL_TOKENS_BESIDE_DECODE_MAX
        limits = Limits(slots, tokens, tokens, 0, chunk, chunk)
        self._scheduler = Scheduler(limits, model.end_tokens)
        self._sampler = model.sampler(Sampling(temperature=0))

    def propose(self, asks: Sequence[Ask]) -> dict[int, tuple[int, ...]]:
        proposals: dict[int, list[int]] = {}
        for ask in asks:
            if ask.tokens_max and self._scheduler.limits.fits(len(ask.tokens), ask.tokens_max):
                # Without a session, the sequence is one by itself: it finds its own KV again.
                session = ask.session or ask.sequence.to_bytes(8, "big")
                self._scheduler.submit(ask.sequence, session, ask.tokens, ask.tokens_max)
                proposals[ask.sequence] = []
        for _ in range(PASSES_MAX):
            batch = self._scheduler.plan()
            if batch is None:
                break
            draws = self._decode(batch)
            for sampled in self._scheduler.commit(batch, draws):
                if sampled.finish != "stop":
                    proposals[sampled.sequence].append(sampled.token)
        for sequence in proposals:
            self._scheduler.end(sequence)
        return {sequence: tuple(tokens) for sequence, tokens in proposals.items() if tokens}

    def _decode(self, batch: Batch) -> list[int]:
        trimmed = all(self._model.trim(trim) for trim in batch.trims)
        copied = all(self._model.copy(copy) for copy in batch.copies)
        if not (trimmed and copied):
            raise DecodeError("the draft model lost its KV cache")
        if not batch.chunks:
            return []
        self._model.set_threads(self._threads.policy(batch.tokens).threads)
        if not self._model.decode(batch):
            raise DecodeError("the draft model was stopped by nobody")
        return [self._model.draw(self._sampler, row) for _, row in batch.rows()]
