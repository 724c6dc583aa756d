"""The engine process: requests in on standard input, answers out on standard output.

Joins `scheduler.py` (who is next) and `llama.py` (how it is computed). Two threads: a reader that
turns frames into tokenised requests at once, even while a batch is computed, and the main thread
that steps. Knows nothing of Trio or the node; when the parent is gone, so is its standard input,
and the process ends. (PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the
child ends, and Trio starts processes from short-lived threads.)
"""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from meshnode.engine import TokenLogprobs, Usage, wire
from meshnode.engine.cores import IdleCores, Waiting, usable_cores
from meshnode.engine.draft import DraftModel
from meshnode.engine.llama import LlamaModel, Sampler, quantize_q4_0
from meshnode.engine.pace import Rates, Threads
from meshnode.engine.payoff import Speculation
from meshnode.engine.pipe import Pipe, Progress, leave, resident_bytes
from meshnode.engine.prepare import prepare
from meshnode.engine.reading import Reading, Readings, purpose_of, refuse_unsuitable
from meshnode.engine.scheduler import UNDRAWN, Batch, Limits, Sampled, Scheduler, Trim, slots_kept
from meshnode.engine.speculate import PromptLookup, verify
from meshnode.engine.states import StateStore
from meshnode.engine.text import AnswerText
from meshnode.engine.vision import View
from meshnode.errors import MeshnodeError, ModelLoadError, RequestError

# The parent keeps far fewer requests in flight; if it did not, the reader would wait here.
INBOX_MAX = 1024
# Fresh enough for a status page, rare enough to cost nothing.
STATUS_INTERVAL_S = 0.25
EXIT_BUG = 1


@dataclass(frozen=True, slots=True)
class _Resumed:
    """What an answer had when another engine was lost in it: tokens, now at the end of the
    prompt, bytes of their text that are held back, and characters shown beyond those that the
    tokens release by themselves."""

    tokens: int = 0
    bytes_held: int = 0
    chars_beyond: int = 0

    def usage(self, usage: Usage) -> Usage:
        """As the caller counts: what was decoded elsewhere is answer, not prompt."""
        prompt_tokens = usage.prompt_tokens - self.tokens
        return Usage(
            prompt_tokens,
            min(usage.cached_tokens, prompt_tokens),
            usage.completion_tokens + self.tokens,
        )


@dataclass(frozen=True, slots=True)
class Start:
    """A request that was accepted: tokenised, checked, with a sampler and text per choice."""

    number: int
    session: bytes
    prompt: list[int]
    max_tokens: int | None
    samplers: tuple[Sampler, ...]
    texts: tuple[AnswerText, ...]
    resumed: _Resumed
    logprobs: int | None
    views: dict[int, View]
    shown: Mapping[int, bytes]


Item = Start | Reading | wire.Cancel | wire.StartPipeline | wire.StopPipeline | wire.Rows
"""What the reader hands to the main thread; the last three only where a part is loaded."""


class _Answer:
    """What the main thread keeps of a sequence, which is one choice, besides its tokens."""

    __slots__ = ("bytes_fed", "bytes_released", "chars_beyond", "ids_unsent", "index",
                 "logprobs", "logprobs_unsent", "number", "resumed", "sampler", "shown",
                 "text", "views")  # fmt: skip

    def __init__(self, start: Start, index: int) -> None:
        self.number = start.number
        self.index = index
        self.sampler = start.samplers[index]
        self.text = start.texts[index]
        # Control tokens that are told as text.
        self.shown = start.shown
        self.resumed = start.resumed
        self.chars_beyond = start.resumed.chars_beyond
        self.ids_unsent: list[int] = []
        self.logprobs = start.logprobs
        # Each with the place in the answer's bytes where its token begins.
        self.logprobs_unsent: list[tuple[int, TokenLogprobs]] = []
        self.bytes_fed = start.resumed.bytes_held
        # Of the prompt's pictures: a preempted sequence computes them again.
        self.views = start.views
        self.bytes_released = 0

    def feed(self, token: int, piece: bytes) -> str:
        """Add a token; returns the text that is now safe."""
        self.ids_unsent.append(token)
        self.bytes_fed += len(piece)
        return self.text.feed(piece)

    def observe(self, logprobs: TokenLogprobs) -> None:
        """What the model thought of the token that will be fed next."""
        self.logprobs_unsent.append((self.bytes_fed, logprobs))

    def take_logprobs(self, text: str, *, over: bool) -> tuple[TokenLogprobs, ...]:
        """Those that go with the text now released; tokens that a stop string has eaten have
        none."""
        self.bytes_released += len(text.encode())
        if not text and not over:
            return ()
        taken, self.logprobs_unsent = self.logprobs_unsent, []
        end = self.bytes_released if self.text.stopped else self.bytes_fed
        return tuple(logprobs for start, logprobs in taken if start < end)

    def unshown(self, text: str) -> str:
        """Without what was shown already."""
        skipped = min(self.chars_beyond, len(text))
        self.chars_beyond -= skipped
        return text[skipped:]


class ChildPipe(Pipe):
    """The conversation with the parent."""

    def send(self, *frames: wire.FromChild) -> None:
        self.write(b"".join(map(wire.encode, frames)))

    def receive(self) -> Iterator[wire.ToChild]:
        """Frames until the parent closes the pipe or is gone."""
        return map(wire.decode_to_child, self.bodies(wire.FRAME_BYTES_MAX))


class Child:
    """A loaded model being stepped."""

    def __init__(
        self,
        pipe: ChildPipe,
        model: LlamaModel,
        limits: Limits,
        threads: Threads,
        states: StateStore,
        speculation: Speculation | None,
    ):
        self._pipe = pipe
        self._model = model
        self._limits = limits
        self._scheduler = Scheduler(limits, model.end_tokens)
        self._states = states
        self._readings = Readings(model.embedder, limits.context_tokens, threads, pipe.send)
        self._inbox: queue.Queue[Item] = queue.Queue(INBOX_MAX)
        # By sequence: a request has one for each choice.
        self._answers: dict[int, _Answer] = {}
        self._sequences = 0
        # Requests of a batch that holds only prefill: if one is cancelled, it is worth aborting.
        self._abortable: frozenset[int] = frozenset()
        self._threads = threads
        self._idle_cores = IdleCores()
        self._waiting = Waiting()
        self._rates = Rates()
        self._speculation = speculation
        self._status_sent_at = 0.0

    # -- the reader thread ---------------------------------------------------------------------

    def read(self, frames: Iterator[wire.ToChild]) -> NoReturn:
        """Feed the inbox; ends the process when the parent is gone."""
        try:
            for frame in frames:
                self.hear(frame)
            leave()
        finally:
            # Reached only by a bug. A child that computes but cannot hear must end, saying why.
            traceback.print_exc()
            leave(EXIT_BUG)

    def hear(self, frame: wire.ToChild) -> None:
        if isinstance(frame, wire.Generate):
            self._receive(frame)
        elif isinstance(frame, wire.Embed):
            self._receive_inputs(frame)
        elif isinstance(frame, wire.Count):
            self._count(frame.request)
        elif isinstance(frame, wire.Cancel):
            self._inbox.put(frame)
            if frame.number in self._abortable:
                self._model.abort()

    def _receive(self, frame: wire.Generate) -> None:
        try:
            refuse_unsuitable(self._model.embedder, "generate")
            views: dict[int, View] = {}
            prompt = self._model.prompt_tokens(
                frame.prompt, views, frame.tools, frame.thinking, frame.effort
            )
            if not self._limits.fits(len(prompt), frame.max_tokens):
                self._pipe.send(wire.TooLong(frame.number, len(prompt)))
                return
            shown = self._model.shown_pieces(frame.shown)
            text, resumed = self._resume(frame, shown)
            samplers = self._samplers(frame)
        except RequestError as error:
            self._refuse(frame.number, error)
            return
        self._pipe.send(wire.Accepted(frame.number, len(prompt)))
        if frame.continuation is not None:
            prompt += frame.continuation.tokens
        max_tokens = None if frame.max_tokens is None else frame.max_tokens - resumed.tokens
        start = Start(
            frame.number,
            frame.session,
            prompt,
            max_tokens,
            samplers,
            (text, *(AnswerText(frame.stop) for _ in samplers[1:])),
            resumed,
            frame.logprobs,
            views,
            shown,
        )
        full = not self._limits.fits(len(prompt), max_tokens)
        if start.texts[0].stopped or full or (max_tokens is not None and max_tokens <= 0):
            self._end_at_once(start)
        else:
            self._inbox.put(start)

    def _receive_inputs(self, frame: wire.Embed) -> None:
        try:
            reading = self._readings.accept(frame)
        except RequestError as error:
            self._refuse(frame.number, error)
            return
        self._pipe.send(wire.Accepted(frame.number, reading.prompt_tokens))
        self._inbox.put(reading)

    def _count(self, frame: wire.Generate) -> None:
        try:
            refuse_unsuitable(self._model.embedder, "generate")
            prompt = self._model.prompt_tokens(
                frame.prompt, None, frame.tools, frame.thinking, frame.effort
            )
        except RequestError as error:
            self._refuse(frame.number, error)
            return
        self._pipe.send(wire.Counted(frame.number, len(prompt)))

    def _refuse(self, number: int, error: RequestError) -> None:
        self._pipe.send(wire.Refused(number, str(error), param=error.param, code=error.code))

    def _samplers(self, frame: wire.Generate) -> tuple[Sampler, ...]:
        """One per choice, each with a seed of its own. Raises `RequestError`."""
        come = frame.continuation
        if come is not None and frame.n > 1:
            raise RequestError("Several choices cannot be continued.", param="n")
        samplers: list[Sampler] = []
        try:
            for index in range(frame.n):
                sampling, seed = frame.sampling, frame.sampling.seed
                if seed is not None:
                    sampling = replace(sampling, seed=seed + index)
                samplers.append(self._model.sampler(sampling, frame.grammar))
            if come is not None:
                samplers[0].remember(come.tokens)
        except RequestError:
            for sampler in samplers:
                sampler.close()
            raise
        return tuple(samplers)

    def _resume(
        self, frame: wire.Generate, shown: Mapping[int, bytes]
    ) -> tuple[AnswerText, _Resumed]:
        """The answer's text as the lost engine had it: held back is what that one held back."""
        text = AnswerText(frame.stop)
        if frame.continuation is None:
            return text, _Resumed()
        tokens = frame.continuation.tokens
        if any(not 0 <= token < self._model.vocabulary_size for token in tokens):
            raise RequestError("The answer to be continued is not this model's.")
        pieces = [shown.get(token) or self._model.piece(token) for token in tokens]
        released = "".join(map(text.feed, pieces))
        chars_beyond = frame.continuation.chars - len(released)
        if chars_beyond < 0:
            raise RequestError("The answer to be continued shows less than it has.")
        bytes_held = sum(map(len, pieces)) - len(released.encode())
        return text, _Resumed(len(tokens), bytes_held, chars_beyond)

    def _end_at_once(self, start: Start) -> None:
        """The lost engine had decoded the last token, and only its end was not heard."""
        answer = _Answer(start, 0)
        answer.sampler.close()
        reason: Literal["stop", "length"] = "stop" if answer.text.stopped else "length"
        text = answer.unshown(answer.text.flush())
        if text:
            self._pipe.send(wire.Text(start.number, text, 0, ()))
        usage = start.resumed.usage(Usage(len(start.prompt), 0, 0))
        self._pipe.send(wire.Done(start.number, reason, usage, stop=answer.text.stop))

    # -- the main thread -----------------------------------------------------------------------

    def run(self) -> NoReturn:
        """Step for ever; the reader ends the process."""
        self._send_status()
        while True:
            self._take_requests()
            started_at = time.perf_counter()
            batch = self._plan()
            if batch is not None:
                self._step(batch, started_at)
            self._readings.step(beside_answers=not self._scheduler.idle)
            self._send_status()

    def _take_requests(self) -> None:
        """Handle what has arrived; waits only if there is nothing to compute."""
        wait = self._idle
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            self._handle(item)

    def _handle(self, item: Item) -> None:
        if isinstance(item, wire.Cancel):
            self._cancel(item.number)
        elif isinstance(item, Reading):
            self._readings.begin(item)
        elif isinstance(item, Start):
            self._begin(item)

    @property
    def _idle(self) -> bool:
        return self._scheduler.idle and not self._readings

    def _begin(self, start: Start) -> None:
        for index in range(len(start.samplers)):
            self._sequences += 1
            self._answers[self._sequences] = _Answer(start, index)
            self._scheduler.submit(
                self._sequences,
                start.session,
                start.prompt,
                start.max_tokens,
            )

    def _cancel(self, number: int) -> None:
        """What has come to its end already is not here any more: the two have crossed."""
        self._readings.cancel(number)
        going = [each for each, answer in self._answers.items() if answer.number == number]
        for sequence in going:
            usage = self._scheduler.end(sequence)
            assert usage is not None
            answer = self._answers.pop(sequence)
            answer.sampler.close()
            self._pipe.send(wire.Done(number, "cancelled", usage, answer.index))

    def _plan(self) -> Batch | None:
        """The next batch, with guesses in it where they pay."""
        if self._speculation is None:
            return self._scheduler.plan()
        return self._scheduler.plan(self._speculation.propose(self._scheduler.asks()))

    def _step(self, batch: Batch, started_at: float) -> None:
        """Change what the slots hold, decode, sample, send."""
        whole = prepare(batch.changes, self._model, self._states, self._scheduler)
        if not whole or not batch.chunks:
            return
        if not any(chunk.is_decode for chunk in batch.chunks):
            self._abortable = frozenset(
                self._answers[chunk.sequence].number for chunk in batch.chunks
            )
        decoded = self._timed(batch, self._compute)
        self._abortable = frozenset()
        if not decoded:
            self._rewind(batch)
            return
        for trim in self._conclude(batch, started_at):
            if not self._model.trim(trim):
                self._scheduler.forget(trim.slot)

    def _timed(self, batch: Batch, compute: Callable[[Batch], bool]) -> bool:
        """Compute a batch with as many threads as pay; False if it was aborted."""
        threads = self._threads.policy(batch.tokens)
        self._model.set_threads(threads.threads)
        self._model.allow()
        wall_s, waited_s = time.perf_counter(), self._waiting.so_far_s()
        decoded = compute(batch)
        wall_s = time.perf_counter() - wall_s
        # A thread that ended takes its share with it.
        waited_s = max(0.0, self._waiting.so_far_s() - waited_s)
        if decoded and batch.view is None:  # what a picture takes says nothing about tokens
            threads.observe(waited_s, wall_s, time.monotonic(), self._idle_cores.lately())
        return decoded

    def _conclude(self, batch: Batch, started_at: float) -> list[Trim]:
        """Sample from a computed batch, and send; returns what takes out the rejected guesses."""
        draws, logprobs = self._draw(batch)
        pass_s = time.perf_counter() - started_at
        if batch.view is None:
            decoding = [chunk for chunk in batch.chunks if chunk.is_decode]
            prefill_tokens = batch.tokens - sum(len(chunk.tokens) for chunk in decoding)
            self._rates.observe(prefill_tokens, len(draws) if decoding else 0, pass_s)
            if self._speculation is not None:
                self._speculation.observe(batch, draws, pass_s)
        frames: list[wire.FromChild] = []
        results = self._scheduler.commit(batch, draws)
        for sampled, thought in zip(results, logprobs, strict=True):
            frames += self._deliver(sampled, thought)
        if frames:
            self._pipe.send(*frames)
        return batch.rejected(draws)

    def _compute(self, batch: Batch) -> bool:
        """False if it was aborted."""
        if batch.view is None:
            return self._model.decode(batch)
        (chunk,) = batch.chunks
        return self._model.decode_view(chunk, self._answers[chunk.sequence].views[batch.view])

    def _rewind(self, batch: Batch) -> None:
        """After an aborted decode: every slot back to where the batch found it."""
        for chunk in batch.chunks:
            if not self._model.trim(chunk.undo):
                self._scheduler.forget(chunk.slot)

    def _draw(self, batch: Batch) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The batch's draws, and what the model thought of each, where that was asked for; nothing
        of a sequence that was cancelled while the batch was in flight."""
        draws: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        for chunk, row in batch.rows():
            answer = self._answers.get(chunk.sequence)
            if answer is None:
                draws.append(UNDRAWN)
                continue
            drawn = verify(chunk.proposals, partial(self._draw_from, answer, row))
            draws += drawn
            logprobs += [
                self._model.logprobs(row + place, token, answer.logprobs)
                if answer.logprobs is not None and token not in self._model.end_tokens
                else None
                for place, token in enumerate(drawn)
            ]
        return draws, logprobs

    def _draw_from(self, answer: _Answer, row: int, place: int) -> int:
        return self._model.draw(answer.sampler, row + place)

    def _deliver(
        self, sampled: Sampled, logprobs: TokenLogprobs | None
    ) -> Iterator[wire.FromChild]:
        """The frames that a new token causes; ends the sequence at a stop string."""
        answer = self._answers.get(sampled.sequence)
        if answer is None:  # a stop string came earlier among the tokens of this pass
            return
        text, finish = "", sampled.finish
        if logprobs is not None:
            answer.observe(logprobs)
        if finish != "stop":
            piece = answer.shown.get(sampled.token) or self._model.piece(sampled.token)
            text = answer.feed(sampled.token, piece)
        if answer.text.stopped:
            if finish is None:
                self._scheduler.end(sampled.sequence)
            finish = "stop"
        if finish is not None:
            text += answer.text.flush()
        shown = answer.take_logprobs(text, over=finish is not None)
        text = answer.unshown(text)
        if text or shown:
            ids, answer.ids_unsent = tuple(answer.ids_unsent), []
            yield wire.Text(answer.number, text, len(ids), ids, shown, answer.index)
        if finish is not None:
            self._answers.pop(sampled.sequence).sampler.close()
            usage = answer.resumed.usage(sampled.usage)
            yield wire.Done(answer.number, finish, usage, answer.index, answer.text.stop)

    def ready(self) -> wire.Ready:
        purpose = purpose_of(self._model.embedder)
        return wire.Ready(self._model.context_tokens, self._model.style, purpose)

    def _send_status(self) -> None:
        now = time.monotonic()
        if now - self._status_sent_at < STATUS_INTERVAL_S and not self._idle:
            return
        self._status_sent_at = now
        load = self._scheduler.load()
        self._pipe.send(
            wire.Status(
                slots_busy=load.slots_busy,
                queue_depth=load.waiting + len(self._readings),
                kv_tokens_free=load.kv_tokens_free,
                prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
                decode_tokens_per_s=self._rates.decode_tokens_per_s,
                memory_bytes=resident_bytes(),
                saved_tokens=load.saved_tokens,
                sessions=load.sessions,
                speculation=None if self._speculation is None else self._speculation.stats(),
            )
        )


def serve(
    answering: Callable[[ChildPipe, wire.Load], Child],
) -> None:
    """Load what the first frame names, then answer until the parent is gone.

    `answering` loads; it raises `MeshnodeError` if that cannot be.
    """
    # Ctrl-C in a terminal goes to parent and child alike; the parent decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = ChildPipe()
    frames = pipe.receive()
    load = next(frames, None)
    if not isinstance(load, wire.Load):
        return
    try:
        child = answering(pipe, load)
    except MeshnodeError as error:
        pipe.send(wire.LoadFailed(str(error)))
        return
    threading.Thread(target=child.read, args=(frames,), daemon=True).start()
    pipe.send(child.ready())
    child.run()


def load_whole(pipe: ChildPipe, load: wire.Load) -> Child:
    """A model with all its layers."""
    threads_max = load.threads or usable_cores()
    threads = Threads(threads_max, adaptive=load.threads is None)
    model = LlamaModel(
        load.path,
        context_tokens=load.context_tokens,
        slots=load.slots,
        slots_kept=slots_kept(load.slots),
        kv_type=load.kv_type,
        threads=threads_max,
        on_progress=Progress(lambda progress: pipe.send(wire.Loading(progress))),
        projector=load.projector,
    )
    spill_dir = None if load.spill_dir is None else Path(load.spill_dir)
    states = StateStore(spill_dir, load.kv_bytes_per_token)
    limits = Limits(
        slots=load.slots,
        context_tokens=model.context_tokens,
        kv_tokens=model.context_tokens,
        waiting_max=load.waiting_max,
        slots_kept=model.slots_kept,
        saved_tokens=load.saved_bytes // states.bytes_per_token,
        spilled_tokens=load.spilled_bytes // states.bytes_per_token,
        copies=model.can_rewind,
    )
    return Child(pipe, model, limits, threads, states, speculation_for(load, model, threads))


def speculation_for(load: wire.Load, model: LlamaModel, threads: Threads) -> Speculation | None:
    """As the node wants it. Raises `ModelLoadError` if this model or its draft model cannot."""
    adaptive = load.speculate == "auto"
    if load.speculate == "off" or (adaptive and not model.can_rewind):
        return None
    if not model.can_rewind:
        raise ModelLoadError(
            f"{load.path} is recurrent: it cannot take rejected guesses back. Use --speculate "
            "auto, which leaves it alone, or off."
        )
    if load.draft is None:
        return Speculation(PromptLookup(), adaptive=adaptive)
    draft = LlamaModel(
        load.draft.path,
        context_tokens=load.draft.context_tokens,
        slots=load.slots,
        threads=threads.policy(1).threads,
        on_progress=_ignore_progress,
    )
    proposer = DraftModel(draft, model, slots=load.slots, threads=threads)
    return Speculation(proposer, adaptive=adaptive)


def _ignore_progress(_fraction: float) -> None:
    """A draft model is small, and the bar is full already."""


def main(arguments: list[str]) -> int:
    match arguments:
        case []:
            serve(load_whole)
            return 0
        case ["quantize", source, destination]:
            try:
                quantize_q4_0(Path(source), Path(destination))
            except MeshnodeError as error:
                print(error, file=sys.stderr)
                return 1
            return 0
    print("This is meshnode's engine process; it is started by the node.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
