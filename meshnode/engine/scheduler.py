"""Which tokens go into the next decode: waiting and running sequences in, a batch out.

Decides: who runs, in which slot, which kept KV is reused or evicted, how much prompt goes beside
running answers, who is preempted when the KV cache is full. Does not know llama.cpp, text, time,
sockets or threads: tokens are integers and `plan()` then `commit()` is one step.

Theory of operation. A *sequence* is a list of tokens: its prompt, then what was sampled. A *slot*
is a lane of the KV cache: the list of tokens that have been computed there. A running sequence
owns one slot, and what is left to compute is simply the tokens beyond the slot's. With one token
left it is decoding, with more it is in prefill; after a preemption it is in prefill again, over
prompt and answer alike. A slot whose sequence ended keeps its tokens, so the next turn of the
conversation computes only what is new.

All slots share one pool of `kv_tokens` cells. The oldest sequence can always get room by evicting
idle slots and preempting others, and any sequence fits the pool alone, so every request ends.

A sequence may *follow* another that has the same prompt. It waits until its leader has computed
that, others passing it meanwhile, and begins with a copy of the leader's slot. The copy shares its
cells with the original; they are counted twice here, which errs on the safe side.

A decoding sequence may have *proposals* (`speculate.py`) behind its one token. They are computed
with it, and those that turn out not to be what the sequence draws are no part of its slot: once
the batch is committed, `Batch.rejected` says what to trim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from meshnode.engine import Usage
from meshnode.engine.speculate import PROPOSED_TOKENS_MAX, Ask, judge
from meshnode.errors import ContextLengthError, EngineBusyError

# One decode of 512 tokens is where the matrix products of a CPU stop getting more efficient.
PREFILL_TOKENS_MAX = 512
# Beside running answers a smaller chunk is used: their next token waits for the whole batch.
PREFILL_TOKENS_BESIDE_DECODE_MAX = 128
# A sequence is admitted only if every running one could still grow by this much; it keeps a
# nearly full cache from admitting what it must preempt a few steps later.
ADMIT_HEADROOM_TOKENS = 64
# Proposals in one batch, over all sequences: beyond it a pass is wide enough without guesses.
PROPOSED_IN_BATCH_MAX = 32
# What a refused client is told to wait: the order of one short answer.
BUSY_RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in tokens, all at least 1; `kv_tokens` is shared by all slots."""

    slots: int
    context_tokens: int
    kv_tokens: int
    waiting_max: int
    prefill_tokens: int = PREFILL_TOKENS_MAX
    prefill_tokens_beside_decode: int = PREFILL_TOKENS_BESIDE_DECODE_MAX

    def __post_init__(self) -> None:
        if self.context_tokens > self.kv_tokens:
            raise ValueError("a sequence of context_tokens must fit into kv_tokens alone")

    @property
    def sequences_max(self) -> int:
        """Running and waiting together; a request over it is refused as busy."""
        return self.slots + self.waiting_max

    def fits(self, prompt_tokens: int, max_tokens: int | None) -> bool:
        """Whether such a request can be served at all."""
        return prompt_tokens + (max_tokens or 1) <= self.context_tokens


@dataclass(frozen=True, slots=True)
class Trim:
    """Forget the KV of `slot` from position `keep` on, before the batch is decoded."""

    slot: int
    keep: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Let `slot`, which is empty, begin with the first `tokens` tokens of slot `source`."""

    source: int
    slot: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence for positions `start`, `start + 1`, ... of one slot.

    The last `proposed` are guesses. With `wants_logits`, there are logits after each of them and
    after the token before them, which is the last that is known.
    """

    sequence: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    wants_logits: bool
    proposed: int = 0

    @property
    def outputs(self) -> int:
        """How many of its rows, the last ones, have logits."""
        return 1 + self.proposed if self.wants_logits else 0

    @property
    def is_decode(self) -> bool:
        """Whether it computes one known token, to draw the next: no prompt."""
        return self.wants_logits and len(self.tokens) == 1 + self.proposed

    @property
    def proposals(self) -> tuple[int, ...]:
        return self.tokens[len(self.tokens) - self.proposed :]

    @property
    def undo(self) -> Trim:
        """What takes this chunk back out of the KV cache, after an aborted decode."""
        return Trim(self.slot, self.start)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. `trims`, then `copies`, come first and stand even if the decode is aborted.

    A batch with copies has no chunks: nothing may evict a slot between its copy and its use.
    """

    trims: tuple[Trim, ...]
    chunks: tuple[Chunk, ...]
    copies: tuple[Copy, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def outputs(self) -> int:
        """The most draws that it can lead to."""
        return sum(chunk.outputs for chunk in self.chunks)

    def rows(self) -> Iterator[tuple[Chunk, int]]:
        """The chunks that want logits, each with the first row of the batch that has them."""
        end = 0
        for chunk in self.chunks:
            end += len(chunk.tokens)
            if chunk.wants_logits:
                yield chunk, end - chunk.outputs

    def rejected(self, draws: Sequence[int]) -> list[Trim]:
        """What takes the proposals that were not drawn back out of the KV cache."""
        return [
            Trim(chunk.slot, chunk.start + keep)
            for chunk, drawn in self.drawn(draws)
            if (keep := _standing(chunk, drawn)) < len(chunk.tokens)
        ]

    def drawn(self, draws: Sequence[int]) -> list[tuple[Chunk, Sequence[int]]]:
        """Each chunk with its part of the draws, which are in the order of the rows.

        A chunk has one more than proposals that stand. Raises `ValueError` if the draws are not
        those of this batch.
        """
        parts: list[tuple[Chunk, Sequence[int]]] = []
        start = 0
        for chunk in self.chunks:
            end = start
            if chunk.wants_logits:
                end += judge(chunk.proposals, draws[start:]).accepted + 1
            parts.append((chunk, draws[start:end]))
            start = end
        if start != len(draws):
            raise ValueError(f"{len(draws)} draws for a batch that leads to {start}")
        return parts


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that a sequence got; with `finish` the sequence is over.

    The token of a "stop" is an end-of-generation token and no part of the answer.
    """

    sequence: int
    token: int
    finish: Literal["stop", "length"] | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Load:
    """A snapshot for statistics. `kv_tokens_free` counts what idle slots hold as free."""

    slots_busy: int
    waiting: int
    kv_tokens_free: int
    sessions: tuple[bytes, ...]


class _Sequence:
    """A request on its way: `tokens` is the prompt, then the answer so far."""

    __slots__ = ("arrival", "cached_tokens", "follows", "id", "is_prefilled", "length_max",
                 "prompt_tokens", "session", "slot", "tokens")  # fmt: skip

    def __init__(
        self, number: int, session: bytes, prompt: Sequence[int], length_max: int, arrival: int
    ) -> None:
        self.id = number
        self.session = session
        self.tokens = list(prompt)
        self.prompt_tokens = len(self.tokens)
        self.length_max = length_max
        self.arrival = arrival
        self.cached_tokens: int | None = None
        self.slot: _Slot | None = None
        self.follows: _Sequence | None = None
        # Its followers need not wait any more: the prompt was computed once, or never will be.
        self.is_prefilled = False

    @property
    def is_ready(self) -> bool:
        return self.follows is None or self.follows.is_prefilled

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens or 0,
            completion_tokens=len(self.tokens) - self.prompt_tokens,
        )


class _Slot:
    """A lane of the KV cache: `tokens` are computed; `used` orders slots by last use."""

    __slots__ = ("number", "sequence", "session", "tokens", "used")

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: list[int] = []
        self.session = b""
        self.sequence: _Sequence | None = None
        self.used = 0


class Scheduler:
    """See the module's theory of operation. Not thread-safe; one owner steps it."""

    def __init__(self, limits: Limits, end_tokens: frozenset[int]) -> None:
        self.limits = limits
        self._end_tokens = end_tokens
        self._slots = [_Slot(number) for number in range(limits.slots)]
        self._waiting: deque[_Sequence] = deque()
        self._sequences: dict[int, _Sequence] = {}
        self._arrivals = 0
        self._uses = 0

    # -- what a driver calls -------------------------------------------------------------------

    def submit(
        self,
        sequence: int,
        session: bytes,
        prompt: Sequence[int],
        max_tokens: int | None,
        *,
        follows: int | None = None,
    ) -> None:
        """Queue a prompt of at least one token under a number that is not in use.

        `follows` is the number of a sequence with the same prompt.
        Raises `ContextLengthError` if it can never fit, `EngineBusyError` if the queue is full.
        """
        if sequence in self._sequences:
            raise ValueError(f"sequence {sequence} is already scheduled")
        if not prompt or (max_tokens is not None and max_tokens < 1):
            raise ValueError("a sequence needs a prompt token and room for one answer token")
        length_max = self.limits.context_tokens
        if not self.limits.fits(len(prompt), max_tokens):
            raise ContextLengthError(len(prompt), max_tokens, length_max)
        if len(self._sequences) >= self.limits.sequences_max:
            raise EngineBusyError(
                f"All {self.limits.slots} slots are busy and {len(self._waiting)} requests wait.",
                BUSY_RETRY_AFTER_S,
            )
        if max_tokens is not None:
            length_max = len(prompt) + max_tokens
        self._arrivals += 1
        entry = _Sequence(sequence, session, prompt, length_max, self._arrivals)
        entry.follows = None if follows is None else self._sequences.get(follows)
        self._sequences[sequence] = entry
        self._waiting.append(entry)

    def end(self, sequence: int) -> Usage | None:
        """Take a sequence out, whatever it is doing; its KV stays. None if it is not here."""
        entry = self._sequences.get(sequence)
        if entry is None:
            return None
        self._release(entry)
        return entry.usage()

    def asks(self) -> list[Ask]:
        """The sequences that decode next, and how many proposals `plan` would take for each."""
        decoding = [entry for entry in self._running() if _pending(entry) == 1]
        return [
            Ask(entry.id, entry.session, entry.tokens, _proposed_max(entry, len(decoding)))
            for entry in decoding
        ]

    def plan(self, proposals: Mapping[int, Sequence[int]] | None = None) -> Batch | None:
        """The next step, or None if there is nothing to do.

        `proposals`, by sequence, are answers to `asks`; what there is no room for is left out.
        The KV counts as computed only after `commit`; without it (the decode was aborted), the
        next `plan` covers the same tokens again.
        """
        trims, copies = self._admit()
        if copies:
            return Batch(tuple(trims), (), tuple(copies))
        planned: dict[int, Chunk] = {}
        running = self._running()
        decoding = [entry for entry in running if _pending(entry) == 1]
        prefilling = [entry for entry in running if _pending(entry) > 1]
        for entry in decoding:
            self._plan_chunk(entry, 1, planned, trims)
        if proposals:
            self._add_proposals(proposals, planned)
        budget = self.limits.prefill_tokens_beside_decode if planned else self.limits.prefill_tokens
        for entry in prefilling:
            budget -= self._plan_chunk(entry, budget, planned, trims)
        if not planned:
            return None
        return Batch(tuple(trims), tuple(planned.values()))

    def commit(self, batch: Batch, sampled: Sequence[int]) -> list[Sampled]:
        """Record a decoded batch; `sampled` has one token per chunk that wanted logits, and one
        more for each proposal that stands. One result for each, in the same order."""
        results = []
        for chunk, drawn in batch.drawn(sampled):
            slot = self._slots[chunk.slot]
            entry = slot.sequence
            if entry is None or entry.id != chunk.sequence or len(slot.tokens) != chunk.start:
                raise ValueError(f"slot {chunk.slot} changed between plan and commit")
            slot.tokens.extend(chunk.tokens[: _standing(chunk, drawn)])
            self._touch(slot)
            results += [self._accept(entry, token) for token in drawn]
        return results

    def forget(self, slot: int) -> None:
        """The KV of a slot turned out not to be trimmable: it is all gone."""
        self._slots[slot].tokens.clear()
        entry = self._slots[slot].sequence
        if entry is not None and len(entry.tokens) == entry.prompt_tokens:
            entry.cached_tokens = 0

    def load(self) -> Load:
        """How full it is now; sessions with kept KV, most recently used last."""
        running = self._running()
        kept = sorted((slot for slot in self._slots if slot.tokens), key=lambda slot: slot.used)
        # A later use of the same session moves it to the end.
        sessions = {slot.session: None for slot in reversed(kept) if slot.session}
        return Load(
            slots_busy=len(running),
            waiting=len(self._waiting),
            kv_tokens_free=self.limits.kv_tokens - sum(len(entry.tokens) for entry in running),
            sessions=tuple(reversed(sessions)),
        )

    @property
    def idle(self) -> bool:
        """Whether `plan` would have nothing to do."""
        return not self._sequences

    # -- admission -----------------------------------------------------------------------------

    def _admit(self) -> tuple[list[Trim], list[Copy]]:
        """Give slots to waiting sequences, first come first served, while the KV allows it."""
        trims: list[Trim] = []
        copies: list[Copy] = []
        while ready := [entry for entry in self._waiting if entry.is_ready]:
            entry = ready[0]
            idle = [slot for slot in self._slots if slot.sequence is None]
            if not idle or not self._fits(entry):
                break
            self._waiting.remove(entry)
            source = entry.follows.slot if entry.follows is not None else None
            slot, common = _choose_slot(entry, idle)
            shared = common_prefix(source.tokens, entry.tokens) if source is not None else 0
            shared = min(shared, len(entry.tokens) - 1)
            if source is not None and shared > common:
                if slot.tokens:
                    trims.append(Trim(slot.number, 0))
                slot.tokens, common = source.tokens[:shared], shared
                copies.append(Copy(source.number, slot.number, shared))
            # The last token is always computed: its logits give the next one.
            keep = min(common, len(entry.tokens) - 1)
            if keep < len(slot.tokens):
                trims.append(Trim(slot.number, keep))
                del slot.tokens[keep:]
            slot.sequence, slot.session, entry.slot = entry, entry.session, slot
            if entry.cached_tokens is None:
                entry.cached_tokens = keep
            self._touch(slot)
        return trims, copies

    def _fits(self, entry: _Sequence) -> bool:
        running = self._running()
        if not running:
            return True
        committed = sum(len(other.tokens) for other in running) + len(entry.tokens)
        headroom = ADMIT_HEADROOM_TOKENS * (len(running) + 1)
        return committed + headroom <= self.limits.kv_tokens

    # -- room in the KV cache ------------------------------------------------------------------

    def _plan_chunk(
        self, entry: _Sequence, tokens_max: int, planned: dict[int, Chunk], trims: list[Trim]
    ) -> int:
        """Plan up to `tokens_max` tokens of a sequence; returns how many found room."""
        slot = entry.slot
        if slot is None or tokens_max < 1:  # preempted a moment ago, or the budget is spent
            return 0
        start = len(slot.tokens)
        count = min(_pending(entry), tokens_max)
        count = min(count, self._make_room(count, entry, planned, trims))
        if count < 1:
            return 0
        planned[entry.id] = Chunk(
            sequence=entry.id,
            slot=slot.number,
            start=start,
            tokens=tuple(entry.tokens[start : start + count]),
            wants_logits=start + count == len(entry.tokens),
        )
        return count

    def _add_proposals(
        self, proposals: Mapping[int, Sequence[int]], planned: dict[int, Chunk]
    ) -> None:
        """Put guesses behind the tokens of those that decode, as far as there is free room:
        nobody is evicted for a guess. The end of an answer is not guessed at."""
        decoding = len(planned)
        for number, chunk in planned.items():
            guesses = takewhile(self._is_word, proposals.get(number, ()))
            most = _proposed_max(self._sequences[number], decoding)
            taken = tuple(guesses)[: min(most, self._room(planned))]
            planned[number] = replace(chunk, tokens=chunk.tokens + taken, proposed=len(taken))

    def _is_word(self, token: int) -> bool:
        return token not in self._end_tokens

    def _make_room(
        self, tokens: int, entry: _Sequence, planned: dict[int, Chunk], trims: list[Trim]
    ) -> int:
        """Free cells after evicting idle slots and preempting who is not in this batch."""
        while (room := self._room(planned)) < tokens:
            idle = [slot for slot in self._slots if slot.sequence is None and slot.tokens]
            if idle:
                slot = min(idle, key=lambda slot: slot.used)
                # Only the eviction matters now: an earlier trim of the slot is included in it.
                trims[:] = [trim for trim in trims if trim.slot != slot.number]
                trims.append(Trim(slot.number, 0))
                slot.tokens.clear()
                continue
            others = [
                other for other in self._running() if other is not entry and other.id not in planned
            ]
            if not others:
                break
            self._preempt(max(others, key=lambda other: other.arrival))
        return room

    def _room(self, planned: dict[int, Chunk]) -> int:
        computed = sum(len(slot.tokens) for slot in self._slots)
        return self.limits.kv_tokens - computed - sum(len(c.tokens) for c in planned.values())

    def _preempt(self, entry: _Sequence) -> None:
        """Back to the head of the queue with its answer so far; it will be computed again."""
        if entry.slot is not None:
            entry.slot.sequence = None
            entry.slot = None
        self._waiting.appendleft(entry)

    # -- sequences -----------------------------------------------------------------------------

    def _accept(self, entry: _Sequence, token: int) -> Sampled:
        entry.is_prefilled = True
        finish: Literal["stop", "length"] | None = None
        if token in self._end_tokens:
            finish = "stop"
        else:
            entry.tokens.append(token)
            if len(entry.tokens) >= entry.length_max:
                finish = "length"
        if finish is not None:
            self._release(entry)
        return Sampled(entry.id, token, finish, entry.usage())

    def _release(self, entry: _Sequence) -> None:
        del self._sequences[entry.id]
        entry.is_prefilled = True
        if entry.slot is None:
            self._waiting.remove(entry)
        else:
            entry.slot.sequence = None

    def _running(self) -> list[_Sequence]:
        """Oldest first: that order decides who gets room."""
        running = [slot.sequence for slot in self._slots if slot.sequence is not None]
        return sorted(running, key=lambda entry: entry.arrival)

    def _touch(self, slot: _Slot) -> None:
        self._uses += 1
        slot.used = self._uses


def _pending(entry: _Sequence) -> int:
    """Tokens still to compute before the next one can be sampled; at least 1 while running."""
    computed = len(entry.slot.tokens) if entry.slot is not None else 0
    return len(entry.tokens) - computed


def _proposed_max(entry: _Sequence, decoding: int) -> int:
    """How many proposals a sequence may have beside `decoding - 1` others: were all of them
    right, the answer would have one token more, and may not become too long."""
    room = entry.length_max - len(entry.tokens) - 1
    return max(0, min(PROPOSED_TOKENS_MAX, PROPOSED_IN_BATCH_MAX // decoding, room))


def _standing(chunk: Chunk, drawn: Sequence[int]) -> int:
    """How many of a chunk's tokens are text, its draws having judged the proposals."""
    return len(chunk.tokens) - chunk.proposed + max(0, len(drawn) - 1)


def _choose_slot(entry: _Sequence, idle: list[_Slot]) -> tuple[_Slot, int]:
    """The idle slot to run in, and how many of its tokens begin the sequence's.

    The session's own slot first; else one that the sequence continues word for word; else an
    empty one. Only when none is empty does a conversation lose its history: the longest common
    prefix, provided that it is at least half of what the slot keeps (a shared system prompt is
    not worth a history); else the least recently used.
    """
    common = {slot.number: common_prefix(slot.tokens, entry.tokens) for slot in idle}
    own = [slot for slot in idle if slot.session == entry.session and entry.session]
    continued = [slot for slot in idle if common[slot.number] == len(slot.tokens) > 0]
    empty = [slot for slot in idle if not slot.tokens]
    similar = [slot for slot in idle if 2 * common[slot.number] >= len(slot.tokens)]
    candidates = own or continued or empty or similar
    if candidates:
        best = max(candidates, key=lambda slot: (common[slot.number], slot.used))
    else:
        best = min(idle, key=lambda slot: slot.used)
    return best, common[best.number]


def common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    """With how many equal items both begin."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
