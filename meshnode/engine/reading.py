"""The engine process's other work: inputs in, vectors out, beside the answers of `child.py`.

Joins `embedding.py` (what is read next) and `embedder.py` (how it is computed), and decides which
requests the model is for. `accept` belongs to the child's reader thread, all else to its main one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshnode.engine import (
    EMBED_FLOATS_MAX,
    EMBED_INPUTS_MAX,
    EMBED_TOKENS_MAX,
    Purpose,
    wire,
)
from meshnode.engine.embedder import Embedder, EmbedError
from meshnode.engine.embedding import (
    STEP_TOKENS_BESIDE_ANSWERS_MAX,
    STEP_TOKENS_MAX,
    EmbedQueue,
)
from meshnode.engine.pace import Threads
from meshnode.errors import RequestError


@dataclass(frozen=True, slots=True)
class Reading:
    """A request that was accepted: tokenised and checked."""

    number: int
    inputs: list[list[int]]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.inputs))


class Readings:
    """All that are in progress; `send` takes what the parent is told of them."""

    def __init__(
        self,
        embedder: Embedder,
        context_tokens: int,
        threads: Threads,
        send: Callable[[wire.FromChild], None],
    ) -> None:
        self._embedder = embedder
        self._context_tokens = context_tokens
        self._threads = threads
        self._send = send
        self._queue = EmbedQueue(reads_whole=embedder.reads_whole)
        self._inputs_left: dict[int, int] = {}
        # When inputs that are read beside answers have their next turn, in monotonic seconds.
        self._turn_at_s = 0.0

    def __len__(self) -> int:
        return len(self._inputs_left)

    def accept(self, frame: wire.Embed) -> Reading:
        """Tokenise. Raises `RequestError`, naming the input that it is about."""
        refuse_unsuitable(self._embedder, "rank" if frame.query is not None else "embed")
        dimensions = self._embedder.dimensions
        if frame.dimensions not in (None, dimensions):
            raise RequestError(
                f"`dimensions`: this model's vectors have {dimensions}, and it does not say that "
                "they may be cut.",
                param="dimensions",
                code="invalid_value",
            )
        field = "input" if frame.query is None else "documents"
        inputs_max = min(EMBED_INPUTS_MAX, EMBED_FLOATS_MAX // dimensions)
        if not 1 <= len(frame.inputs) <= inputs_max:
            raise RequestError(
                f"`{field}` has 1 to {inputs_max} items with this model.",
                param=field,
                code="invalid_value",
            )
        inputs: list[list[int]] = []
        total = 0
        for index, given in enumerate(frame.inputs):
            tokens = self._tokens(given, frame.query, f"{field}[{index}]")
            total += len(tokens)
            if total > EMBED_TOKENS_MAX:
                raise RequestError(
                    f"`{field}` has over {EMBED_TOKENS_MAX} tokens; send fewer items at a time.",
                    param=field,
                    code="invalid_value",
                )
            inputs.append(tokens)
        return Reading(frame.number, inputs)

    def _tokens(self, given: str | tuple[int, ...], query: str | None, param: str) -> list[int]:
        if query is None:
            tokens = self._embedder.tokens(given, param)
        elif isinstance(given, str):
            tokens = self._embedder.pair(query, given)
        else:
            raise RequestError(f"`{param}` is ranked as text.", param=param, code="invalid_value")
        if len(tokens) > self._context_tokens:
            raise RequestError(
                f"`{param}` has {len(tokens)} tokens; this model's context is "
                f"{self._context_tokens}.",
                param=param,
                code="context_length_exceeded",
            )
        return tokens

    def begin(self, reading: Reading) -> None:
        self._inputs_left[reading.number] = len(reading.inputs)
        self._queue.submit(reading.number, reading.inputs)

    def cancel(self, number: int) -> None:
        """Nothing happens if it has come to its end already: the two have crossed."""
        if number in self._inputs_left:
            self._end(number, wire.Embedded(number))

    def step(self, *, beside_answers: bool) -> None:
        """Read a bounded number of tokens, if any are left, and tell what came of it.

        Answers get as much time as inputs do: after a step beside them, they have its length to
        themselves.
        """
        began_s = time.monotonic()
        if beside_answers and began_s < self._turn_at_s:
            return
        tokens_max = STEP_TOKENS_BESIDE_ANSWERS_MAX if beside_answers else STEP_TOKENS_MAX
        pieces = self._queue.plan(tokens_max)
        if not pieces:
            return
        threads = self._threads.policy(sum(len(piece.tokens) for piece in pieces)).threads
        try:
            read = self._embedder.compute(pieces, self._queue.capacity_tokens, threads)
        except EmbedError as error:
            for number in {piece.job: None for piece in pieces}:
                self._end(number, wire.Unable(number, str(error)))
            return
        ended_s = time.monotonic()
        self._turn_at_s = ended_s + (ended_s - began_s)
        for piece, vector in read:
            self._send(wire.Vector(piece.job, vector))
            self._inputs_left[piece.job] -= 1
            if not self._inputs_left[piece.job]:
                self._end(piece.job, wire.Embedded(piece.job))

    def _end(self, number: int, last: wire.FromChild) -> None:
        self._queue.end(number)
        del self._inputs_left[number]
        self._send(last)


_USES: Mapping[Purpose, str] = {
    "generate": "generates text, has no head for ranking, and can make embeddings",
    "embed": "makes embeddings; ask /v1/embeddings",
    "rank": "ranks documents; ask /v1/rerank",
}


def purpose_of(embedder: Embedder) -> Purpose:
    """Of the model that it embeds with."""
    return "rank" if embedder.ranks else "embed" if embedder.is_purpose else "generate"


def refuse_unsuitable(embedder: Embedder, use: Purpose) -> None:
    """Raises `RequestError`, saying what a model is for, if it is not for this `use`."""
    purpose = purpose_of(embedder)
    if use != purpose and (use, purpose) != ("embed", "generate"):
        raise RequestError(
            f"This model {_USES[purpose]}.", param="model", code="model_not_suitable"
        )
