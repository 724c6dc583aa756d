"""Which inputs are read next for embeddings: jobs in, steps of bounded size out.

Decides how the inputs of all jobs share the steps between those of running answers. Does not know
llama.cpp, text or time: tokens are integers.

Theory of operation. A *job* is a request with several inputs; jobs take turns, one input each, so
that a short one does not wait for the end of a long one. A causal model reads an input in pieces:
what does not fit into a step is continued at the head of the next one, and only the last input of
a step is ever in pieces. An encoder sees all of an input at once, so it reads inputs whole, and a
step may then be as long as the longest.

The memory that a step needs goes by the longest input: `capacity_tokens` grows with what comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# Where a CPU's matrix products stop getting much better; each token also costs a row of logits,
# which llama.cpp computes whether they are wanted or not.
STEP_TOKENS_MAX = 256
# Beside running answers, whose next tokens wait for the step: 0.2 s on a busy core with a model
# of 135 M parameters, which people take for a hesitation.
STEP_TOKENS_BESIDE_ANSWERS_MAX = 32
# Inputs in one step; each is a sequence of its own.
LANES = 32
# Contexts of the first size are large enough for most texts; more is doubled.
CAPACITY_TOKENS_MIN = 512


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of input `index` of a job, for positions `start`, `start + 1`, ... of one lane."""

    job: int
    index: int
    lane: int
    start: int
    tokens: tuple[int, ...]
    is_last: bool


class _Job:
    __slots__ = ("inputs", "next", "number")

    def __init__(self, number: int, inputs: Sequence[Sequence[int]]) -> None:
        self.number = number
        self.inputs = inputs
        self.next = 0


class EmbedQueue:
    """See the module's theory of operation. Not thread-safe; one owner steps it."""

    def __init__(self, *, reads_whole: bool) -> None:
        self.capacity_tokens = CAPACITY_TOKENS_MIN
        """No input of a planned step is longer. It grows only before a step that continues none."""
        self._reads_whole = reads_whole
        # Those with inputs that have not begun, in the order of their turns.
        self._jobs: deque[_Job] = deque()
        self._begun: Piece | None = None
        self._rest: Sequence[int] = ()

    def submit(self, job: int, inputs: Sequence[Sequence[int]]) -> None:
        """Queue at least one input, none empty, under a number that is not in use."""
        if not inputs or not all(inputs):
            raise ValueError("a job has inputs, and none of them is empty")
        self._jobs.append(_Job(job, inputs))

    def end(self, job: int) -> None:
        """Take a job out, if it is here; what of it was read is lost."""
        self._jobs = deque(each for each in self._jobs if each.number != job)
        if self._begun is not None and self._begun.job == job:
            self._begun = None

    def plan(self, tokens_max: int) -> list[Piece]:
        """The next step, which has been taken when this is called again; empty if nothing is left.

        Of at most `tokens_max` tokens, unless a whole input alone has more. Only the first piece
        may continue an input.
        """
        pieces: list[Piece] = []
        if self._begun is not None:
            before, self._begun = self._begun, None
            start = before.start + len(before.tokens)
            rest = self._rest
            pieces.append(
                self._piece(before.job, before.index, before.lane, start, rest, tokens_max)
            )
        while self._jobs and self._begun is None and len(pieces) < LANES:
            job = self._jobs[0]
            tokens = job.inputs[job.next]
            left = tokens_max - sum(len(piece.tokens) for piece in pieces)
            if pieces and (left < 1 or len(tokens) > self._room(left)):
                break
            self._grow(len(tokens))
            # The lanes after that of the input which goes on, round about.
            lane = (pieces[0].lane + len(pieces)) % LANES if pieces else 0
            pieces.append(self._piece(job.number, job.next, lane, 0, tokens, left))
            job.next += 1
            self._jobs.rotate(-1)
            if job.next == len(job.inputs):
                self._jobs.remove(job)
        return pieces

    def _room(self, left: int) -> int:
        return left if self._reads_whole else self.capacity_tokens

    def _grow(self, tokens: int) -> None:
        while self.capacity_tokens < tokens:
            self.capacity_tokens *= 2

    def _piece(
        self, job: int, index: int, lane: int, start: int, tokens: Sequence[int], tokens_max: int
    ) -> Piece:
        count = len(tokens) if self._reads_whole else min(len(tokens), tokens_max)
        piece = Piece(job, index, lane, start, tuple(tokens[:count]), count == len(tokens))
        if not piece.is_last:
            self._begun, self._rest = piece, tokens[count:]
        return piece
