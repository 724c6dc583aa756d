"""Which tokens go into the next decode: waiting and running sequences in, a batch out.

Decides: who runs, in which slot, which kept KV is reused or evicted, how much prompt goes beside
running answers, who is preempted when the KV cache is full. Does not know llama.cpp, text, time,
sockets or threads: tokens are integers and `plan()` then `commit()` is one step.

Theory of operation. A *sequence* is a list of tokens: its prompt, then what was sampled. A *slot*
is a lane of the KV cache: the list of tokens that have been computed there. A running sequence
owns one slot, and what is left to compute is simply the tokens beyond the slot's. With one token
left it is decoding, with more it is in prefill; after a preemption it is in prefill again, over
prompt and answer alike. A slot whose sequence ended keeps its tokens, so the next turn of the
conversation computes only what is new. There are more slots than sequences may run, because
conversations pause.

A sequence begins with the longest prefix that any slot has (`prefix.py`). If an older one is just
computing a longer one, it waits for that and then copies it, others passing it meanwhile: the
prompt that `n` choices or many sessions have in common is computed once.

Where a sequence shows a picture, it has cells instead of tokens (`cells.py`). A view is computed
whole and alone, so it is a batch of its own; what others have to compute comes between two views.

All slots share one pool of `kv_tokens` cells, and a copy shares the cells of its original.
`kv.py` counts each once, exactly as llama.cpp does, so a batch that is planned has room. The
oldest sequence can always get room by evicting idle slots and preempting others, and any sequence
fits the pool alone, so every request ends. What is evicted may be saved outside (`saved.py`), and
is restored rather than computed again.

A decoding sequence may have *proposals* (`speculate.py`) behind its one token. They are computed
with it, and those that turn out not to be what the sequence draws are no part of its slot: once
the batch is committed, `Batch.rejected` says what to trim.

Where a batch goes through a pipeline of machines, several are *in flight*: planned, and not yet
committed; commits come in the order of the plans. Chunks of one prompt follow each other closely,
but a token is drawn before the next of its sequence can be planned, so those that decode are
dealt out evenly to the batches in flight. A slot with tokens in flight is nobody else's and stays
as it is, and their cells are reserved. If their sequence ends meanwhile, they are history of the
slot all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from meshnode.config import SLOTS_MAX
from meshnode.engine import Usage, prefix, saved
from meshnode.engine.cells import stretch, view_at
from meshnode.engine.kv import KvPool, Slot, common_prefix
from meshnode.engine.speculate import PROPOSED_TOKENS_MAX, Ask, judge
from meshnode.errors import ContextLengthError, EngineBusyError

# One decode of 512 tokens is where the matrix products of a CPU stop getting more efficient.
PREFILL_TOKENS_MAX = 512
# Through a pipeline a prompt goes in smaller chunks, so that each stage has one to work on: in one
# chunk it would keep all stages but one idle, which costs more than narrower matrix products.
PREFILL_TOKENS_IN_FLIGHT_MAX = 128
# Beside running answers a smaller chunk is used: their next token waits for the whole batch.
PREFILL_TOKENS_BESIDE_DECODE_MAX = 128
# Prompts of so many tokens are computed faster if idle sessions are put aside first: beside 5600
# idle tokens, 512 cost 2.3 times the CPU time, 0.6 µs for each token of theirs and each of those.
PUT_ASIDE_FOR_TOKENS_MIN = 128
# Decoding scans idle tokens too: beside 6500, a step of one answer took 13.5 instead of 8 CPU ms.
IDLE_TOKENS_MAX = 256
# A sequence is admitted only if every running one could still grow by this much; it keeps a
# nearly full cache from admitting what it must preempt a few steps later.
ADMIT_HEADROOM_TOKENS = 64
# Proposals in one batch, over all sequences: beyond it a pass is wide enough without guesses.
PROPOSED_IN_BATCH_MAX = 32
# What a refused client is told to wait: the order of one short answer.
BUSY_RETRY_AFTER_S = 2.0
# A sequence waits for another's prefill if that spares it so many tokens. A step for itself costs
# as much as three of them.
AWAITED_TOKENS_MIN = 8
# A state is restored if it has so many tokens more than a slot: it takes cells of its own.
RESTORED_TOKENS_MIN = 64
# Slots that only keep: sessions outlive their requests. 32 in all took 6 MB more than 4.
SLOTS_KEPT = 24
# Instead of a draw, for a sequence that ended while its batch was in flight: no token is this one.
UNDRAWN = -1


def slots_kept(slots: int) -> int:
    """How many slots only keep histories, beside so many in which sequences run."""
    return min(SLOTS_KEPT, SLOTS_MAX - slots)


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in tokens; `kv_tokens` is shared by all slots.

    `slots` sequences run at once, and `slots_kept` more slots only keep histories. States of
    `saved_tokens` in memory and `spilled_tokens` on disk may be outside of the cache. `copies`
    False: the model's memory has no beginnings that could be kept, copied or saved. So many
    batches may be in flight as `in_flight_max` says.
    """

    slots: int
    context_tokens: int
    kv_tokens: int
    waiting_max: int
    prefill_tokens: int = PREFILL_TOKENS_MAX
    prefill_tokens_beside_decode: int = PREFILL_TOKENS_BESIDE_DECODE_MAX
    slots_kept: int = 0
    saved_tokens: int = 0
    spilled_tokens: int = 0
    copies: bool = True
    in_flight_max: int = 1

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


Change = Trim | Copy | saved.Change | saved.Restore


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens, or the cells of a view, of one sequence for places `start`, `start + 1`, ... of one
    slot.

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
    """One step. `changes` come first, in this order, and stand even if the decode is aborted.

    A batch that copies or restores has no chunks: nothing is built on what may yet fail.
    """

    changes: tuple[Change, ...]
    chunks: tuple[Chunk, ...]

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

    @property
    def view(self) -> int | None:
        """The digest of the view that this batch consists of; None if it is of tokens."""
        return view_at(self.chunks[0].tokens, 0) if self.chunks else None


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
    saved_tokens: int
    sessions: tuple[bytes, ...]


class _Sequence:
    """A request on its way: `tokens` is the prompt, then the answer so far."""

    __slots__ = ("arrival", "cached_tokens", "id", "length_max", "prompt_tokens", "session",
                 "shows_pictures", "slot", "tokens")  # fmt: skip

    def __init__(
        self, number: int, session: bytes, prompt: Sequence[int], length_max: int, arrival: int
    ) -> None:
        self.id = number
        self.session = session
        self.tokens = list(prompt)
        self.prompt_tokens = len(self.tokens)
        self.shows_pictures = min(self.tokens) < 0
        self.length_max = length_max
        self.arrival = arrival
        self.cached_tokens: int | None = None
        self.slot: Slot | None = None

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens or 0,
            completion_tokens=len(self.tokens) - self.prompt_tokens,
        )


class Scheduler:
    """See the module's theory of operation. Not thread-safe; one owner steps it."""

    def __init__(self, limits: Limits, end_tokens: frozenset[int]) -> None:
        self.limits = limits
        self._end_tokens = end_tokens
        self._pool = KvPool(limits.kv_tokens, limits.slots + limits.slots_kept)
        self._slots = self._pool.slots
        self._saved = saved.SavedStates(limits.saved_tokens, limits.spilled_tokens)
        self._waiting: deque[_Sequence] = deque()
        self._sequences: dict[int, _Sequence] = {}
        self._arrivals = 0
        self._uses = 0
        self._viewed = False  # the latest batch was a view
        # Without a pipeline none is: a batch that is not committed was aborted.
        self._in_flight: deque[Batch] = deque()

    # -- what a driver calls -------------------------------------------------------------------

    def submit(
        self,
        sequence: int,
        session: bytes,
        prompt: Sequence[int],
        max_tokens: int | None,
    ) -> None:
        """Queue a prompt under a number that is not in use. It ends in a token, not in a picture.

        Raises `ContextLengthError` if it can never fit, `EngineBusyError` if the queue is full.
        """
        if sequence in self._sequences:
            raise ValueError(f"sequence {sequence} is already scheduled")
        if not prompt or prompt[-1] < 0 or (max_tokens is not None and max_tokens < 1):
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
        """The sequences that decode, and how many proposals `plan` would take for each: none for
        those that are not in the next batch."""
        chosen = self._decoding()
        return [
            Ask(
                entry.id,
                entry.session,
                entry.tokens,
                _proposed_max(entry, len(chosen)) if entry in chosen else 0,
            )
            for entry in self._running()
            if _pending(entry) == 1 and not entry.shows_pictures  # who guesses cannot see them
        ]

    def plan(self, proposals: Mapping[int, Sequence[int]] | None = None) -> Batch | None:
        """The next step, or None if there is nothing to do before a `commit`, or at all.

        `proposals`, by sequence, are answers to `asks`; what there is no room for is left out.
        The KV counts as computed only after `commit`. With `in_flight_max` 1, a plan without it
        (the decode was aborted) covers the same tokens again; with more, it covers what comes
        after them.
        """
        if self.is_full:
            return None
        batch = self._plan(proposals)
        if not batch.chunks:
            return batch if batch.changes else None
        if self._is_pipelined:
            self._in_flight.append(batch)
            for chunk in batch.chunks:
                self._slots[chunk.slot].in_flight += len(chunk.tokens)
        return batch

    def _plan(self, proposals: Mapping[int, Sequence[int]] | None) -> Batch:
        changes = self._admit()
        if any(isinstance(change, Copy | saved.Restore) for change in changes):
            return Batch(tuple(changes), ())
        planned: dict[int, Chunk] = {}
        running = self._plannable()
        viewing = [entry for entry in running if _is_at_view(entry)]
        if viewing and not (self._viewed and len(viewing) < len(running)):
            for entry in viewing:
                if self._plan_chunk(entry, _left(entry), planned, changes):
                    self._viewed = True
                    return Batch(tuple(changes), tuple(planned.values()))
        self._viewed = False
        prefilling = [
            entry for entry in self._plannable() if _pending(entry) > 1 and not _is_at_view(entry)
        ]
        is_long = sum(map(_left, prefilling)) >= PUT_ASIDE_FOR_TOKENS_MIN
        changes += self._put_aside(0 if is_long else IDLE_TOKENS_MAX)
        for entry in self._decoding():
            self._plan_chunk(entry, 1, planned, changes)
        if proposals:
            self._add_proposals(proposals, planned)
        budget = self.limits.prefill_tokens_beside_decode if planned else self.limits.prefill_tokens
        for entry in prefilling:
            budget -= self._plan_chunk(entry, budget, planned, changes)
        return Batch(tuple(changes), tuple(planned.values()))

    def commit(self, batch: Batch, sampled: Sequence[int]) -> list[Sampled]:
        """Record a decoded batch; `sampled` has one token per chunk that wanted logits, and one
        more for each proposal that stands. One result for each, in the same order; none for a
        sequence that has ended since, whose one token is `UNDRAWN`. Raises `ValueError` if the
        batch is not the oldest in flight."""
        if self._is_pipelined:
            if not self._in_flight or self._in_flight.popleft() is not batch:
                raise ValueError("only the oldest batch in flight can be committed")
            for chunk in batch.chunks:
                self._slots[chunk.slot].in_flight -= len(chunk.tokens)
        results = []
        for chunk, drawn in batch.drawn(sampled):
            slot = self._slots[chunk.slot]
            if len(slot.tokens) != chunk.start:
                raise ValueError(f"slot {chunk.slot} changed between plan and commit")
            self._pool.extend(slot, chunk.tokens[: _standing(chunk, drawn)])
            self._touch(slot)
            if slot.owner == chunk.sequence:
                entry = self._sequences[chunk.sequence]
                results += [self._accept(entry, token) for token in drawn]
        return results

    def forget_all(self) -> None:
        """The pipeline broke: what was in flight is lost, and so is all KV. Sequences keep their
        tokens, and compute them again."""
        self._in_flight.clear()
        for slot in self._slots:
            slot.in_flight = 0
            self.forget(slot.number)
        for entry in reversed(self._running()):
            self._preempt(entry)

    def forget(self, slot: int) -> None:
        """The KV of a slot could not be trimmed, or not be restored: it is all gone."""
        lost = self._slots[slot]
        self._pool.trim(lost, 0)
        lost.is_pinned = False
        if lost.owner is not None:
            entry = self._sequences[lost.owner]
            if len(entry.tokens) == entry.prompt_tokens:
                entry.cached_tokens = 0

    def lose(self, key: int) -> None:
        """State `key` could not be saved or spilled."""
        self._saved.lose(key)

    def load(self) -> Load:
        """How full it is now; sessions with kept KV, most recently used last."""
        running = self._running()
        kept = sorted((slot for slot in self._slots if slot.tokens), key=lambda slot: slot.used)
        names = self._saved.sessions() + [slot.session for slot in kept]
        # A later use of the same session moves it to the end.
        sessions = {session: None for session in reversed(names) if session}
        return Load(
            slots_busy=len(running),
            waiting=len(self._waiting),
            kv_tokens_free=self.limits.kv_tokens - self._claimed(),
            saved_tokens=self._saved.tokens,
            sessions=tuple(reversed(sessions)),
        )

    @property
    def idle(self) -> bool:
        """Whether `plan` would have nothing to do."""
        return not self._sequences

    @property
    def is_full(self) -> bool:
        """Whether `plan` has to wait for a `commit`: no more batches may be in flight."""
        return self._is_pipelined and len(self._in_flight) >= self.limits.in_flight_max

    # -- admission -----------------------------------------------------------------------------

    def _admit(self) -> list[Change]:
        """Give slots to waiting sequences, first come first served, while the KV allows it."""
        changes: list[Change] = []
        idle = sum(slot.is_idle for slot in self._slots)
        places = min(self.limits.slots - len(self._running()), idle)
        for entry in list(self._waiting)[:places]:
            start = prefix.beginning(
                self._slots, entry.tokens, entry.session, copies=self.limits.copies
            )
            state, common = self._saved.best(entry.tokens[:-1])
            if common < start.keep + RESTORED_TOKENS_MIN:
                state = None
            if self._may_wait(entry, start.keep if state is None else common):
                continue
            if not self._fits(entry, start, state):
                break
            self._waiting.remove(entry)
            if state is not None:
                changes += self._restore(entry, start.slot, state, common)
                break
            changes += self._begin(entry, start)
            if any(isinstance(change, Copy) for change in changes):
                break
        return changes

    def _may_wait(self, entry: _Sequence, known: int) -> bool:
        """Whether an older sequence in prefill will have more of its prefix than is `known`.

        Prefill goes by age, so that one's is done before this one's would begin.
        """
        return self.limits.copies and any(
            _pending(other) > 1
            and other.arrival < entry.arrival
            and common_prefix(other.tokens, entry.tokens[:-1]) >= known + AWAITED_TOKENS_MIN
            for other in self._running()
        )

    def _begin(self, entry: _Sequence, start: prefix.Beginning) -> list[Change]:
        slot, changes = start.slot, list[Change]()
        if start.source is slot:
            if start.keep < len(slot.tokens):
                changes.append(self._trim(slot, start.keep))
        else:
            changes += self._evict(slot)
            if start.source is not None:
                self._pool.copy(start.source, slot, start.keep)
                changes.append(Copy(start.source.number, slot.number, start.keep))
        self._occupy(entry, slot)
        return changes + self._pin(entry)

    def _restore(self, entry: _Sequence, slot: Slot, state: saved.State, keep: int) -> list[Change]:
        """Begin with the first `keep` tokens of a state; idle slots give way to it."""
        changes = self._evict(slot, state)
        for other in self._evictable():
            if self._pool.free >= len(state.tokens):
                break
            changes += self._evict(other, state)
        self._pool.extend(slot, state.tokens)
        changes.append(saved.Restore(state.key, slot.number))
        if keep < len(state.tokens):
            changes.append(self._trim(slot, keep))
        # Another session's may be needed again; its own has come back.
        if keep == len(state.tokens) or state.session == entry.session:
            changes += self._saved.drop(state)
        self._occupy(entry, slot)
        return changes

    def _occupy(self, entry: _Sequence, slot: Slot) -> None:
        if entry.cached_tokens is None:
            entry.cached_tokens = len(slot.tokens)
        slot.owner, slot.session, entry.slot = entry.id, entry.session, slot
        slot.is_pinned = False
        self._settle(entry)
        self._touch(slot)

    def _pin(self, entry: _Sequence) -> list[Change]:
        """Keep what this and other sessions begin with, if it deserves that."""
        if not self.limits.copies:
            return []
        for slot in self._slots:
            if slot.is_pinned and prefix.serves(slot, entry.tokens):
                self._touch(slot)
        pin = prefix.pin(self._slots, entry.tokens, entry.session, self.limits.kv_tokens)
        if pin is None:
            return []
        changes = self._evict(pin.slot)
        self._pool.copy(pin.source, pin.slot, pin.tokens)
        pin.slot.is_pinned = True
        self._touch(pin.slot)
        return [*changes, Copy(pin.source.number, pin.slot.number, pin.tokens)]

    def _fits(self, entry: _Sequence, start: prefix.Beginning, state: saved.State | None) -> bool:
        """Whether there is room without preempting anybody, and some more for each to grow."""
        running = len(self._running())
        if all(slot.is_idle for slot in self._slots):
            return True
        shared: list[int] = []
        if state is not None:
            needed = max(len(state.tokens), len(entry.tokens))
        else:
            needed = len(entry.tokens) - start.keep
            shared = start.source.cells[: start.keep] if start.source is not None else []
        headroom = ADMIT_HEADROOM_TOKENS * (running + 1)
        return self._claimed(shared) + needed + headroom <= self.limits.kv_tokens

    def _claimed(self, shared: Sequence[int] = ()) -> int:
        """Cells of slots in use, those of `shared`, and what is left to be computed."""
        used = [slot for slot in self._slots if not slot.is_idle]
        pending = {slot.number: slot.in_flight for slot in used}
        for entry in self._running():
            assert entry.slot is not None
            pending[entry.slot.number] = max(_pending(entry), entry.slot.in_flight)
        return self._pool.held(used, shared) + sum(pending.values())

    # -- room in the KV cache ------------------------------------------------------------------

    def _plan_chunk(
        self, entry: _Sequence, tokens_max: int, planned: dict[int, Chunk], changes: list[Change]
    ) -> int:
        """Plan up to `tokens_max` tokens of a sequence, or a whole view; returns how many found
        room."""
        slot = entry.slot
        if slot is None or tokens_max < 1:  # preempted a moment ago, or the budget is spent
            return 0
        start = slot.end
        wanted = stretch(entry.tokens, start, tokens_max)
        count = min(wanted, self._make_room(wanted, entry, planned, changes))
        if count < 1 or (_is_at_view(entry) and count < wanted):
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
        self, tokens: int, entry: _Sequence, planned: dict[int, Chunk], changes: list[Change]
    ) -> int:
        """Free cells after evicting idle slots and preempting who is not in this batch."""
        while (room := self._room(planned)) < tokens:
            idle = self._evictable()
            if idle:
                changes += self._evict(idle[0])
                continue
            others = [
                other
                for other in self._running()
                if other is not entry and other.id not in planned and not _is_in_flight(other)
            ]
            if _is_at_view(entry):  # it comes before those that are older
                others = [other for other in others if other.arrival > entry.arrival]
            if not others:
                break
            self._preempt(max(others, key=lambda other: other.arrival))
        return room

    def _room(self, planned: dict[int, Chunk]) -> int:
        return self._pool.free - sum(len(chunk.tokens) for chunk in planned.values())

    def _evictable(self) -> list[Slot]:
        """Idle slots in the order in which they go, but for those whose cells are in use."""
        used = [slot for slot in self._slots if not slot.is_idle]
        return [
            slot
            for slot in prefix.evicted_first(self._slots)
            if slot.tokens and not self._pool.is_within(slot, used)
        ]

    def _put_aside(self, tokens_max: int) -> list[Change]:
        """Save idle sessions, if they have more than `tokens_max` tokens and while there is room
        for them: attention is computed over all cells of the cache, whoever's they are."""
        changes: list[Change] = []
        # Pinned beginnings stay, and pictures: not every one can be saved.
        idle = [slot for slot in self._evictable() if not slot.is_pinned and min(slot.tokens) >= 0]
        if self.limits.copies and sum(len(slot.tokens) for slot in idle) > tokens_max:
            for slot in idle:
                has_room = self._saved.has_room(len(slot.tokens))
                if has_room and self._pool.own(slot) >= saved.SAVED_TOKENS_MIN:
                    changes += self._evict(slot)
        return changes

    def _evict(self, slot: Slot, spare: saved.State | None = None) -> list[Change]:
        """Empty an idle slot; what it holds may be saved, but not instead of `spare`."""
        changes: list[Change] = []
        if slot.tokens:
            if self.limits.copies:
                changes += self._saved.save(slot, self._pool.own(slot), spare)
            changes.append(self._trim(slot, 0))
        slot.session, slot.awaited_by, slot.is_pinned = b"", None, False
        return changes

    def _trim(self, slot: Slot, keep: int) -> Trim:
        self._pool.trim(slot, keep)
        return Trim(slot.number, keep)

    def _preempt(self, entry: _Sequence) -> None:
        """Back to the head of the queue with its answer so far, to be restored or computed."""
        if entry.slot is not None:
            entry.slot.owner = None
            entry.slot.awaited_by = entry.id
            entry.slot = None
        self._waiting.appendleft(entry)

    # -- sequences -----------------------------------------------------------------------------

    def _accept(self, entry: _Sequence, token: int) -> Sampled:
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
        self._settle(entry)
        if entry.slot is None:
            self._waiting.remove(entry)
        else:
            entry.slot.owner = None

    def _settle(self, entry: _Sequence) -> None:
        """It runs again, or never will: nothing is kept for it any more."""
        self._saved.settle(entry.id)
        for slot in self._slots:
            if slot.awaited_by == entry.id:
                slot.awaited_by = None

    def _running(self) -> list[_Sequence]:
        """Oldest first: that order decides who gets room."""
        owners = [slot.owner for slot in self._slots if slot.owner is not None]
        return sorted(map(self._sequences.__getitem__, owners), key=lambda entry: entry.arrival)

    def _plannable(self) -> list[_Sequence]:
        """Those of the running that do not wait for a draw of what is in flight."""
        return [entry for entry in self._running() if _left(entry) > 0]

    def _decoding(self) -> list[_Sequence]:
        """Those that decode in the next batch: the oldest that can, and no more than leave each
        of the other batches in flight as many."""
        decoding = [entry for entry in self._running() if _pending(entry) == 1]
        share = -(-len(decoding) // self.limits.in_flight_max)
        return [entry for entry in decoding if _left(entry) > 0][:share]

    @property
    def _is_pipelined(self) -> bool:
        return self.limits.in_flight_max > 1

    def _touch(self, slot: Slot) -> None:
        self._uses += 1
        slot.used = self._uses


def _pending(entry: _Sequence) -> int:
    """Tokens still to compute before the next one can be sampled; at least 1 while running."""
    computed = len(entry.slot.tokens) if entry.slot is not None else 0
    return len(entry.tokens) - computed


def _left(entry: _Sequence) -> int:
    """Tokens of a running sequence that are neither computed nor in flight; below 1 while its
    next one is drawn."""
    assert entry.slot is not None
    return len(entry.tokens) - entry.slot.end


def _is_in_flight(entry: _Sequence) -> bool:
    return entry.slot is not None and entry.slot.in_flight > 0


def _is_at_view(entry: _Sequence) -> bool:
    """Whether a running sequence goes on with a view."""
    assert entry.slot is not None
    return view_at(entry.tokens, entry.slot.end) is not None


def _proposed_max(entry: _Sequence, decoding: int) -> int:
    """How many proposals a sequence may have beside `decoding - 1` others: were all of them
    right, the answer would have one token more, and may not become too long."""
    room = entry.length_max - len(entry.tokens) - 1
    return max(0, min(PROPOSED_TOKENS_MAX, PROPOSED_IN_BATCH_MAX // decoding, room))


def _standing(chunk: Chunk, drawn: Sequence[int]) -> int:
    """How many of a chunk's tokens are text, its draws having judged the proposals."""
    return len(chunk.tokens) - chunk.proposed + max(0, len(drawn) - 1)
