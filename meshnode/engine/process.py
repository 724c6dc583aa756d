"""An engine as the node sees it: one child process, started, watched, restarted and talked to.

Decides when the child is started again and what its death means for the requests in it. Does not
know tokens or llama.cpp; it never loads a model into its own process. A damaged file, a crash in
C or the kernel's out-of-memory killer ends the child; the node goes on.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import trio

from meshnode.config import KvType
from meshnode.engine import (
    IMAGES_BYTES_MAX,
    ChatStyle,
    Delta,
    Embedded,
    EmbedRequest,
    EngineStats,
    Finish,
    ModelCard,
    Purpose,
    Request,
    Speculate,
    images_of,
    wire,
)
from meshnode.engine.child_process import (
    READ_BYTES,
    ChildDiedError,
    ChildProcess,
    State,
    supervise,
)
from meshnode.engine.memory import (
    MemoryNeed,
    available_bytes,
    check_fits,
    context_for,
    draft_context,
    head_need,
    memory_need,
)
from meshnode.engine.scheduler import BUSY_RETRY_AFTER_S, slots_kept
from meshnode.engine.stages.steps import Shape, step_bytes_max
from meshnode.errors import (
    ContextLengthError,
    EngineBusyError,
    EngineError,
    LocalProtocolError,
    MeshnodeError,
    ModelLoadError,
    NoVisionError,
    RemoteProtocolError,
    RequestError,
    StageError,
)
from meshnode.models.gguf import GgufHeader, ProjectorHeader, read_header, read_projector
from meshnode.models.stages import cut

# More machines than share a model; so many steps may be on their way.
STAGES_MAX = 64
SLOTS_DEFAULT = 8
# At this depth a request waits about as long as a client's patience; others may be free.
WAITING_MAX_DEFAULT = 32
# What waits in an engine keeps its images: those of a few requests at their largest.
IMAGES_IN_FLIGHT_BYTES_MAX = 4 * IMAGES_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Part:
    """Layers `first` to `end - 1`, the last ones of a model that several machines run as a
    pipeline. Such an engine answers while it is in one; it reads nothing for embeddings, cannot
    see, and saves no KV outside of its cache."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run a model. None: the smaller of the trained context and the default; threads as
    many as pays; no directory, so no KV is spilled to disk. `draft` is the file of the model that
    guesses, if one does, `projector` the mmproj file of a model that can see. `part`: not all of
    the model's layers."""

    context_tokens: int | None = None
    slots: int = SLOTS_DEFAULT
    waiting_max: int = WAITING_MAX_DEFAULT
    threads: int | None = None
    kv_type: KvType = "f16"
    kv_spill_bytes: int = 0
    kv_spill_dir: Path | None = None
    speculate: Speculate = "off"
    draft: Path | None = None
    projector: Path | None = None
    part: Part | None = None


class _Pending:
    """What has arrived for one request and was not taken yet."""

    def __init__(self, choices: int, images_bytes: int = 0) -> None:
        self.choices = choices
        self.images_bytes = images_bytes
        self.choices_left = choices
        self.prompt_tokens: int | None = None
        self._error: EngineError | None = None
        self._arrived = trio.Event()

    def accept(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        self._error = error
        self._arrived.set()

    async def wait_accepted(self) -> int:
        """The prompt's tokens."""
        while self.prompt_tokens is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self.prompt_tokens

    async def _wait(self) -> None:
        self._arrived = trio.Event()
        await self._arrived.wait()


class _Vectors(_Pending):
    """The vectors for one request; the engine's bounds are those of what waits here."""

    def __init__(self) -> None:
        super().__init__(choices=1)
        self._vectors: deque[bytes] = deque()

    def add(self, vector: bytes) -> None:
        self._vectors.append(vector)
        self._arrived.set()

    def finish(self) -> None:
        self.choices = 0
        self._arrived.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._vectors:
            if self._error is not None:
                raise self._error
            if not self.choices:
                raise StopAsyncIteration
            await self._wait()
        return self._vectors.popleft()


class _Answer(_Pending):
    """A generated answer.

    Deltas of a choice that wait are joined into one, so a slow consumer costs one string each, at
    most as long as the context can hold.
    """

    def __init__(self, choices: int, images_bytes: int) -> None:
        super().__init__(choices, images_bytes)
        self._texts: dict[int, list[wire.Text]] = {}
        self._finishes: deque[Finish] = deque()

    # The engine puts in:

    def add(self, text: wire.Text) -> None:
        self._texts.setdefault(text.index, []).append(text)
        self._arrived.set()

    def finish(self, finish: Finish) -> None:
        self._finishes.append(finish)
        self._arrived.set()

    # The consumer takes out:

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta | Finish:
        await trio.lowlevel.checkpoint()
        while True:
            if self._texts:
                index = next(iter(self._texts))
                return _joined(index, self._texts.pop(index))
            if self._error is not None:
                raise self._error
            if self._finishes:
                self.choices -= 1
                return self._finishes.popleft()
            if not self.choices:  # all finishes have been taken
                raise StopAsyncIteration
            await self._wait()


def _joined(index: int, texts: list[wire.Text]) -> Delta:
    return Delta(
        "".join(text.text for text in texts),
        sum(text.tokens for text in texts),
        tuple(token for text in texts for token in text.ids),
        tuple(logprobs for text in texts for logprobs in text.logprobs),
        index,
    )


class EngineProcess:
    """One model that answers requests, in its own process. Implements `Engine`.

    Resource handling: `run` owns the child, so cancel it to stop the engine; the child is
    terminated, then killed. Nothing else needs closing.
    """

    def __init__(self, card: ModelCard, options: EngineOptions | None = None) -> None:
        self._card = card
        self._options = options or EngineOptions()
        self._state: State = "loading"
        self._progress = 0.0
        self._error: str | None = None
        self._context_tokens = 0
        self._style = ChatStyle()
        self._purpose: Purpose = "generate"
        self._draft: wire.Draft | None = None
        self._status: wire.Status | None = None
        self._changed = trio.Event()
        self._numbers = 0
        # Every request that is in the child, also those whose consumer has left.
        self._answers: dict[int, _Pending] = {}
        self._outbox: trio.MemorySendChannel[bytes] | None = None
        self._pid: int | None = None
        self._width = 0
        self._pipeline = _Pipeline(b"", over=EngineError("No pipeline has begun."))

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return self._pid

    @property
    def in_flight(self) -> int:
        """Requests whose answers have not come to their end, waiting ones included."""
        return len(self._answers)

    # -- the Engine interface ------------------------------------------------------------------

    def stats(self) -> EngineStats:
        stats = EngineStats(
            card=self._card,
            state=self._state,
            progress=self._progress,
            error=self._error,
            context_tokens=self._context_tokens,
            slots=self._options.slots,
            slots_busy=0,
            queue_depth=0,
            kv_tokens_free=0,
            prefill_tokens_per_s=0.0,
            decode_tokens_per_s=0.0,
            memory_bytes=0,
            sessions=(),
            style=self._style,
            purpose=self._purpose,
            sees=self._options.projector is not None,
        )
        status = self._status
        if status is None:
            return stats
        return replace(
            stats,
            slots_busy=status.slots_busy,
            queue_depth=status.queue_depth,
            kv_tokens_free=status.kv_tokens_free,
            prefill_tokens_per_s=status.prefill_tokens_per_s,
            decode_tokens_per_s=status.decode_tokens_per_s,
            memory_bytes=status.memory_bytes,
            sessions=status.sessions,
            saved_tokens=status.saved_tokens,
            speculation=status.speculation,
        )

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[AsyncIterator[Delta | Finish]]:
        """See `Engine.generate`."""
        if not 1 <= request.n <= self._options.slots:
            raise RequestError(
                f"`n` is from 1 to {self._options.slots}, the slots of this engine.",
                param="n",
                code="invalid_value",
            )
        answer = _Answer(request.n, self._images_bytes(request))
        async with self._asking(answer, lambda number: wire.Generate.of(number, request)):
            try:
                await answer.wait_accepted()
            except _TooLongError as error:
                raise ContextLengthError(
                    error.prompt_tokens, request.max_tokens, self._context_tokens
                ) from None
            yield answer

    @asynccontextmanager
    async def embed(self, request: EmbedRequest) -> AsyncIterator[Embedded]:
        """See `Engine.embed`."""
        answer = _Vectors()
        async with self._asking(answer, lambda number: wire.Embed.of(number, request)):
            yield Embedded(await answer.wait_accepted(), answer)

    async def count(self, request: Request) -> int:
        """See `Engine.count`."""
        answer = _Pending(choices=1, images_bytes=self._images_bytes(request))
        async with self._asking(answer, lambda n: wire.Count(wire.Generate.of(n, request))):
            return await answer.wait_accepted()

    def _images_bytes(self, request: Request) -> int:
        """Of its pictures. Raises `NoVisionError` if it has some and the model cannot see."""
        images = images_of(request.prompt)
        if images and self._options.projector is None:
            raise NoVisionError(self._card.name)
        return sum(len(image.data) for image in images)

    @asynccontextmanager
    async def _asking(
        self, answer: _Pending, frame: Callable[[int], wire.ToChild]
    ) -> AsyncIterator[None]:
        """Have the child work on a request under a number of its own, until this is left."""
        outbox = self._require_ready(answer.choices, answer.images_bytes)
        self._numbers += 1
        number = self._numbers
        outbox.send_nowait(_encode_request(frame(number), answer.images_bytes))
        self._answers[number] = answer
        try:
            yield
        finally:
            # Not in there any more: it has ended, or the child it was in has.
            if self._answers.get(number) is answer:
                outbox.send_nowait(wire.encode(wire.Cancel(number)))

    async def wait_ready(self) -> None:
        """Until requests can be made. Raises `ModelLoadError` if that will never be."""
        while self._state != "ready":
            if self._state in ("failed", "stopped"):
                raise ModelLoadError(self._error or f"The engine of {self._card.name} has stopped.")
            await self._changed.wait()

    async def wait_idle(self) -> None:
        """Until no request is in flight; who must not be disturbed makes no new ones."""
        while self._answers:
            await self._changed.wait()

    def _require_ready(self, choices: int, images_bytes: int) -> trio.MemorySendChannel[bytes]:
        if self._state != "ready" or self._outbox is None:
            why = f": {self._error}" if self._error else f" ({self._progress:.0%} loaded)."
            raise EngineError(f"The engine of {self._card.name} is {self._state}{why}")
        in_flight_max = self._options.slots + self._options.waiting_max
        in_flight = sum(answer.choices_left for answer in self._answers.values())
        images_bytes += sum(answer.images_bytes for answer in self._answers.values())
        if in_flight + choices > in_flight_max or images_bytes > IMAGES_IN_FLIGHT_BYTES_MAX:
            raise EngineBusyError(
                f"{self._card.name} has {len(self._answers)} requests already; try again soon.",
                BUSY_RETRY_AFTER_S,
            )
        return self._outbox

    # -- a part in its pipeline ----------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        """What a part takes from the stage before it; and `slots` are all that it uses."""
        slots = self._options.slots + slots_kept(self._options.slots)
        return Shape(self._width, slots, self._context_tokens, vocabulary=0)

    def start_pipeline(self, pipeline: bytes, epoch: int, stages: int) -> None:
        """From now on steps of this pipeline come out; `stages` at most are in flight at once.

        All stages must have forgotten what they knew, as this one does now.
        """
        if not 1 < stages <= STAGES_MAX:
            raise ValueError(f"a pipeline of {stages} stages")
        self.stop_pipeline("Another pipeline has begun.")
        self._pipeline = _Pipeline(pipeline)
        self._tell(wire.StartPipeline(pipeline, epoch, stages))

    def stop_pipeline(self, reason: str) -> None:
        """What is in flight is lost, and all KV. Sequences stay: in the next pipeline they are
        computed again, and their answers go on. Their clients wait, for a bounded time.

        Whoever waits in `next_step` or `feed` gets an `EngineError` with this reason.
        """
        if self._pipeline.over is None:
            self._pipeline.end(EngineError(reason))
            self._tell(wire.StopPipeline(reason))

    async def next_step(self) -> bytes:
        """The frame that is next to be sent to the first stage; one task at a time waits here.

        Raises `EngineError` if the pipeline is over, `RemoteProtocolError` if because what came
        from the stage before was not what it should be.
        """
        return await self._pipeline.take()

    async def feed(self, frame: bytes) -> None:
        """Rows from the stage before. Raises as `next_step` does, and `RemoteProtocolError` for
        more than was sent."""
        await trio.lowlevel.checkpoint()
        pipeline = self._pipeline
        if pipeline.over is not None:
            raise pipeline.over
        if len(frame) > step_bytes_max(self._width) or not pipeline.in_flight:
            raise RemoteProtocolError("rows of a step that was not sent")
        pipeline.in_flight -= 1
        self._tell(wire.Rows(pipeline.name, frame))

    def _tell(self, frame: wire.ToChild) -> None:
        """Of a pipeline; to nobody if there is no child. One that does not listen is ended."""
        if self._outbox is None or self._pid is None:
            self._pipeline.end(EngineError(f"The engine of {self._card.name} is {self._state}."))
        elif self._outbox.statistics().current_buffer_used < self._queued_max + STAGES_MAX:
            self._outbox.send_nowait(wire.encode(frame))
        else:
            os.kill(self._pid, signal.SIGKILL)

    # -- supervision ---------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the engine going until cancelled; returns only if the model can never be loaded.

        Started at once, while the model loads; `wait_ready` waits for the rest.
        """
        task_status.started()
        await supervise(self._attempt, self._set_state)

    async def _attempt(self) -> None:
        await self._run_child(await self._check_file())

    def _set_state(self, state: State, error: str | None = None) -> None:
        self._state = state
        if error is not None or state == "ready":
            self._error = error
        self._tell_change()

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _check_file(self) -> MemoryNeed:
        """What loading takes. Raises `ModelLoadError` for what can be known without it."""
        self._progress = 0.0
        header = await trio.to_thread.run_sync(read_header, self._card.path)
        context_tokens = context_for(self._card.path, header, self._options.context_tokens)
        draft = await read_draft_header(self._options)
        eyes = await read_eyes(self._options)
        need = memory_need(header, context_tokens, draft, eyes, kv_type=self._options.kv_type)
        if self._options.part is not None:
            need = await self._check_part(self._options.part, need)
            self._width = header.embedding_length
        check_fits(self._card.path, need, available_bytes())
        self._context_tokens = context_tokens
        if draft is not None:
            draft_tokens = draft_context(draft, context_tokens)
            self._draft = wire.Draft(str(self._options.draft), draft_tokens)
        return need

    async def _check_part(self, part: Part, whole: MemoryNeed) -> MemoryNeed:
        if self._options.projector is not None:
            raise ModelLoadError(f"{self._card.path} cannot see where it is cut into parts.")
        try:
            stage = await trio.to_thread.run_sync(cut, self._card.path, part.first, part.end)
        except StageError as error:
            raise ModelLoadError(str(error)) from error
        return head_need(whole, stage)

    async def _run_child(self, need: MemoryNeed) -> None:
        """Start a child and serve it to its end. Raises `ModelLoadError` or `ChildDiedError`."""
        is_part = self._options.part is not None
        child = await ChildProcess.start(f"meshnode.engine.{'stages.head' if is_part else 'child'}")
        load_error: str | None = None
        try:
            self._pid = child.pid
            # What a pipeline says comes on top, and never takes the room of the requests.
            buffer_max = 2 * self._queued_max + STAGES_MAX
            self._outbox, outgoing = trio.open_memory_channel[bytes](buffer_max)
            self._outbox.send_nowait(wire.encode(self._load_frame(need)))
            load_error = await child.converse(outgoing, self._read)
        finally:
            was_ready = self._state == "ready"
            self._state = "loading"
            self._status = None
            self._outbox = self._pid = None
            await child.stop()
            why = child.cause_of_death(self._card.path)
            self._fail_answers(why)
            self._pipeline.end(EngineError(why))
        if load_error is not None:
            raise ModelLoadError(load_error)
        raise ChildDiedError(why, was_ready)

    @property
    def _queued_max(self) -> int:
        """Each request in flight puts a Generate and a Cancel into the outbox, and a Cancel of
        the request before may still be there, having crossed with its Done."""
        return 3 * (self._options.slots + self._options.waiting_max) + 1

    def _load_frame(self, need: MemoryNeed) -> wire.Load:
        part, spill_dir = self._options.part, self._options.kv_spill_dir
        return wire.Load(
            path=self._card.path,
            context_tokens=self._context_tokens,
            slots=self._options.slots,
            waiting_max=self._options.waiting_max,
            threads=self._options.threads,
            projector=None if self._options.projector is None else str(self._options.projector),
            kv_type=self._options.kv_type,
            kv_bytes_per_token=need.kv_bytes_per_token,
            saved_bytes=need.saved_bytes,
            spilled_bytes=self._options.kv_spill_bytes if spill_dir is not None else 0,
            spill_dir=None if spill_dir is None else str(spill_dir),
            speculate=self._options.speculate,
            draft=self._draft,
            part=None if part is None else (part.first, part.end),
        )

    async def _read(self, stdout: trio.abc.ReceiveStream) -> str | None:
        """Handle frames until the child closes its end; returns why it could not load, if so."""
        frames = wire.FrameReader()
        load_error = None
        try:
            while data := await stdout.receive_some(READ_BYTES):
                for frame in wire.decode_from_child(frames.feed(data)):
                    if isinstance(frame, wire.LoadFailed):
                        load_error = frame.message
                    else:
                        self._handle(frame)
        except (LocalProtocolError, trio.BrokenResourceError):
            pass  # a broken child; it is stopped, and its log says more than the frame would
        return load_error

    def _handle(self, frame: wire.FromChild) -> None:
        match frame:
            case wire.Loading(progress=progress):
                self._progress = progress
            case wire.Ready(context_tokens=context_tokens, style=style, purpose=purpose):
                self._context_tokens = context_tokens
                self._style = style
                self._purpose = purpose
                self._progress = 1.0
                self._set_state("ready")
            case wire.Status():
                self._status = frame
            case wire.Accepted(number=number, prompt_tokens=prompt_tokens):
                self._answers[number].accept(prompt_tokens)
            case wire.Counted(number=number, prompt_tokens=prompt_tokens):
                self._ended(number).accept(prompt_tokens)
            case wire.Refused(number=number):
                self._ended(number).fail(
                    RequestError(frame.message, param=frame.param, code=frame.code)
                )
            case wire.Unable(number=number, message=message):
                self._ended(number).fail(EngineError(message))
            case wire.TooLong(number=number, prompt_tokens=prompt_tokens):
                self._ended(number).fail(_TooLongError(prompt_tokens))
            case wire.Text() | wire.Done():
                self._handle_answer(frame)
            case wire.Vector() | wire.Embedded():
                self._handle_vectors(frame)
            case wire.Planned(pipeline=name, step=step):
                if name == self._pipeline.name:
                    self._pipeline.add(step)
            case wire.PipelineFailed(pipeline=name, message=message, theirs=theirs):
                if name == self._pipeline.name:
                    self._pipeline.end((RemoteProtocolError if theirs else EngineError)(message))

    def _handle_answer(self, frame: wire.Text | wire.Done) -> None:
        answer = self._answers[frame.number]
        assert isinstance(answer, _Answer)
        if isinstance(frame, wire.Text):
            answer.add(frame)
            return
        answer.choices_left -= 1
        if not answer.choices_left:
            self._ended(frame.number)
        if frame.reason != "cancelled":
            answer.finish(Finish(frame.reason, frame.usage, frame.index, frame.stop))

    def _handle_vectors(self, frame: wire.Vector | wire.Embedded) -> None:
        vectors = self._answers[frame.number]
        assert isinstance(vectors, _Vectors)
        if isinstance(frame, wire.Vector):
            vectors.add(frame.floats)
        else:
            self._ended(frame.number)
            vectors.finish()

    def _ended(self, number: int) -> _Pending:
        """The child has done with this request; what its consumer has not taken yet stays."""
        answer = self._answers.pop(number)
        if not self._answers:
            self._tell_change()
        return answer

    def _fail_answers(self, why: str) -> None:
        answers, self._answers = self._answers, {}
        self._tell_change()
        for answer in answers.values():
            answer.fail(EngineError(why))


class _Pipeline:
    """The steps of one run of a pipeline; `over` says why there are no more."""

    def __init__(self, name: bytes, over: MeshnodeError | None = None) -> None:
        self.name = name
        self.in_flight = 0
        self.over = over
        self._steps: deque[bytes] = deque()
        self._changed = trio.Event()

    def add(self, step: bytes) -> None:
        self._steps.append(step)
        self._tell_change()

    def end(self, error: MeshnodeError) -> None:
        if self.over is None:
            self.over = error
            self._tell_change()

    async def take(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while self.over is None and not self._steps:
            await self._changed.wait()
        if self.over is not None:
            raise self.over
        self.in_flight += 1
        return self._steps.popleft()

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class _TooLongError(EngineError):
    """The child counted this many prompt tokens; the request knows the rest of the message."""

    def __init__(self, prompt_tokens: int) -> None:
        super().__init__(f"{prompt_tokens} prompt tokens are too many")
        self.prompt_tokens = prompt_tokens


async def read_draft_header(options: EngineOptions) -> GgufHeader | None:
    """Of the draft model, if there is one. Raises `ModelLoadError`."""
    if options.draft is None:
        return None
    return await trio.to_thread.run_sync(read_header, options.draft)


async def read_eyes(options: EngineOptions) -> ProjectorHeader | None:
    """The header of the projector, if there is one. Raises `ModelLoadError`."""
    if options.projector is None:
        return None
    return await trio.to_thread.run_sync(read_projector, options.projector)


def _encode_request(frame: wire.ToChild, images_bytes: int) -> bytes:
    try:
        encoded = wire.encode(frame)
        if len(encoded) - images_bytes > wire.PROMPT_BYTES_MAX:
            raise LocalProtocolError(f"it has over {wire.PROMPT_BYTES_MAX} bytes of text")
        return encoded
    except LocalProtocolError as error:
        raise RequestError(f"The request is too large: {error}.") from error
