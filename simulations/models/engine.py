"""A compute model of an engine: continuous batching, slots, a KV cache of prefix blocks.

A step decodes one token for each answer under way, and computes up to `BESIDE_TOKENS` of the
oldest prompt that is not computed yet, as the real scheduler does. So a step with b answers takes

    b / (decode rate · gain(b))  +  prompt tokens / prefill rate

where gain(b) grows from 1 to the model's `batch_gain` when all slots decode. Between two changes
of the set of answers all progress at constant rates, so only changes are events. What the model
leaves out: preemption when the KV cache is short, and the growth of attention with the context.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from meshnode_simulations.kernel.loop import NS_PER_S, Loop
from meshnode_simulations.scenario import Model

BESIDE_TOKENS = 128
"""`engine.scheduler.PREFILL_TOKENS_BESIDE_DECODE_MAX`."""
WAITING_MAX = 32
"""As many wait for a slot before an engine refuses (`engine.process.WAITING_MAX_DEFAULT`)."""


@dataclass(eq=False, slots=True)
class Job:
    """One request in an engine. `blocks` are the ids of its prompt's prefix, `block_tokens` each;
    `answer_blocks` those that its answer completes, which are kept when it is over.

    `started(cached_tokens)` is called when a slot is free, `first()` with the first token,
    `done()` with the last. Of a pipeline that broke: `stalled()` if it was answering, and `lost()`
    when nothing will go on there.
    """

    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...]
    block_tokens: int
    session: bytes
    first: Callable[[], None]
    done: Callable[[], None]
    answer_blocks: tuple[int, ...] = ()
    stalled: Callable[[], None] = lambda: None
    lost: Callable[[], None] = lambda: None
    told_tokens: int = 0
    """Of its answer, before it was stalled: part of its prompt by now."""
    cached_tokens: int = 0
    uncomputed: float = 0.0
    ends_at: float = math.inf
    """Of the engine's count of decoded tokens per answer."""
    begun_at: float = math.inf
    is_over: bool = False


@dataclass(slots=True)
class Engine:
    """One model on one machine of `speed`. Dies with its machine: then nothing more is called."""

    loop: Loop
    model: Model
    speed: float
    kv_tokens: int
    changed: Callable[[], None] = lambda: None
    """Called when what it would tell others of itself has changed."""
    decoding: list[tuple[float, int, Job]] = field(default_factory=list)
    prefilling: deque[Job] = field(default_factory=deque)
    waiting: deque[Job] = field(default_factory=deque)
    kept: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Prefix block -> its tokens, least recently used first."""
    kept_tokens: int = 0
    sessions: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    busy_s: float = 0.0
    """Time with at least one answer under way."""
    _count: float = 0.0
    _prefilled_at: int = 0
    _orders: int = 0
    _version: int = 0
    _is_dead: bool = False
    is_halted: bool = False
    since_ns: int = field(init=False)

    def __post_init__(self) -> None:
        self.since_ns = self.loop.now_ns

    # --- what a gateway asks --------------------------------------------------------------------

    @property
    def slots_busy(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def is_full(self) -> bool:
        """Whether it would refuse a request."""
        has_slot = self.slots_busy < self.model.slots and not self.is_halted
        return not has_slot and len(self.waiting) >= WAITING_MAX

    def submit(self, job: Job) -> bool:
        """Take a request; False if it is full."""
        if self.is_full:
            return False
        self._advance()
        self.waiting.append(job)
        self._admit()
        self._changed()
        return True

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more; what it has computed stays."""
        if job.is_over:
            return
        self._advance()
        job.is_over = True
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.prefilling:
            self.prefilling.remove(job)
        else:
            self.decoding = [entry for entry in self.decoding if entry[2] is not job]
            heapq.heapify(self.decoding)
        self._admit()
        self._changed()

    def decoded(self, job: Job) -> int:
        """Tokens of its answer so far."""
        self._advance()
        if job.begun_at == math.inf:
            return job.told_tokens
        now = min(int(self._count - job.begun_at) + 1, job.answer_tokens)
        return job.told_tokens + now

    def die(self) -> None:
        self._is_dead = True
        self._version += 1

    # --- as the head of a pipeline --------------------------------------------------------------

    def halt(self) -> None:
        """The pipeline broke, and the KV of its stages is gone. All wait for the next one, which
        computes again what an answer has so far."""
        self._advance()
        answering = [entry[2] for entry in sorted(self.decoding, key=lambda entry: entry[1])]
        for job in answering:
            told = min(int(self._count - job.begun_at) + 1, job.answer_tokens - 1)
            job.told_tokens += told
            job.prompt_tokens += told
            job.answer_tokens -= told
            job.begun_at = math.inf
        self.waiting.extendleft(reversed([*answering, *self.prefilling]))
        self.decoding.clear()
        self.prefilling.clear()
        self.kept.clear()
        self.kept_tokens = 0
        self.is_halted = True
        self._version += 1
        for job in answering:
            job.stalled()
        self.changed()

    def go_on(self, model: Model) -> None:
        """The next pipeline stands, as fast as `model` says."""
        self._advance()
        self.model = model
        self.is_halted = False
        self._admit()
        self._changed()

    def give_back(self) -> None:
        """No pipeline came in time: whoever waits is better off elsewhere."""
        waiting = tuple(self.waiting)
        self.waiting.clear()
        for job in waiting:
            job.is_over = True
            job.lost()

    # --- how it goes on -------------------------------------------------------------------------

    def _rates(self) -> tuple[float, float]:
        """Tokens per second of each answer, and of the prompt at the head."""
        answers, prefill = len(self.decoding), self.model.prefill_tokens_per_s * self.speed
        if not answers:
            return 0.0, prefill
        full = max(self.model.slots - 1, 1)
        gain = 1.0 + (self.model.batch_gain - 1.0) * min((answers - 1) / full, 1.0)
        step_s = answers / (self.model.decode_tokens_per_s * self.speed * gain)
        if not self.prefilling:
            return 1.0 / step_s, 0.0
        step_s += BESIDE_TOKENS / prefill
        return 1.0 / step_s, BESIDE_TOKENS / step_s

    def _advance(self) -> None:
        """Let the time since the last change count."""
        now_ns = self.loop.now_ns
        passed_s = (now_ns - self._prefilled_at) / NS_PER_S
        self._prefilled_at = now_ns
        if passed_s <= 0.0 or not self.slots_busy:
            return
        self.busy_s += passed_s
        decode, prefill = self._rates()
        self._count += decode * passed_s
        if self.prefilling:
            self.prefilling[0].uncomputed -= prefill * passed_s

    def _changed(self) -> None:
        """Schedule the next change, the only one that counts from now on."""
        self._version += 1
        decode, prefill = self._rates()
        waits = []
        if self.decoding:
            waits.append((self.decoding[0][0] - self._count) / decode)
        if self.prefilling:
            waits.append(self.prefilling[0].uncomputed / prefill)
        if waits:
            # Rounded up, so that what is to be over then is.
            wait_ns = max(0, math.ceil(min(waits) * NS_PER_S)) + 1
            self.loop.after(wait_ns, self._step, self._version)
        self.changed()

    def _step(self, version: int) -> None:
        if version != self._version or self._is_dead:
            return
        self._advance()
        finished: list[Job] = []
        while self.decoding and self.decoding[0][0] <= self._count:
            finished.append(heapq.heappop(self.decoding)[2])
        begun: list[Job] = []
        while self.prefilling and self.prefilling[0].uncomputed <= 0.0:
            begun.append(self._begin(self.prefilling.popleft()))
        for job in finished:
            job.is_over = True
            self._keep(job, job.blocks + job.answer_blocks)
        self._admit()
        self._changed()
        for job in begun:
            job.first()
        for job in finished:
            job.done()

    def _begin(self, job: Job) -> Job:
        """Its prompt is computed, which gives the first token."""
        job.begun_at = self._count
        job.ends_at = self._count + job.answer_tokens - 1
        self._orders += 1
        heapq.heappush(self.decoding, (job.ends_at, self._orders, job))
        self._keep(job, job.blocks)
        return job

    def _admit(self) -> None:
        while self.waiting and not self.is_halted and self.slots_busy < self.model.slots:
            job = self.waiting.popleft()
            job.cached_tokens = self._cached(job)
            job.uncomputed = float(job.prompt_tokens - job.cached_tokens)
            self.prefilling.append(job)

    # --- the KV cache ---------------------------------------------------------------------------

    def _cached(self, job: Job) -> int:
        """Prompt tokens whose blocks, from the first on, are kept; the last is always computed."""
        found = 0
        for block in job.blocks:
            if block not in self.kept:
                break
            self.kept.move_to_end(block)
            found += self.kept[block]
        return min(found, job.prompt_tokens - 1)

    def _keep(self, job: Job, blocks: tuple[int, ...]) -> None:
        if job.session:
            self.sessions[job.session] = None
            self.sessions.move_to_end(job.session)
        for block in blocks:
            if block not in self.kept:
                self.kept[block] = job.block_tokens
                self.kept_tokens += job.block_tokens
            self.kept.move_to_end(block)
        while self.kept_tokens > self.kv_tokens and self.kept:
            _, tokens = self.kept.popitem(last=False)
            self.kept_tokens -= tokens
        while len(self.sessions) > 1 and len(self.sessions) > 4 * self.model.slots:
            self.sessions.popitem(last=False)
