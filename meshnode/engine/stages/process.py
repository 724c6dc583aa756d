"""A stage of a cut model as the node sees it: one child process that steps go through.

Decides how many steps may be in it, and what its death means for the run that it computed: the KV
is lost, so the run is over, and whoever wants another begins one. Does not know where steps come
from or go to, and looks into none of them: they come from peers, and the child judges them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from meshnode.config import KvType
from meshnode.engine import ModelCard
from meshnode.engine.child_process import (
    READ_BYTES,
    ChildDiedError,
    ChildProcess,
    State,
    supervise,
)
from meshnode.engine.memory import available_bytes, check_fits, context_for, stage_need
from meshnode.engine.pipe import resident_bytes
from meshnode.engine.stages import wire
from meshnode.engine.stages.steps import STATE_BYTES_MAX, Codec, Shape, step_bytes_max
from meshnode.engine.wire import FrameReader
from meshnode.errors import (
    EngineError,
    LocalProtocolError,
    MeshnodeError,
    ModelLoadError,
    RemoteProtocolError,
    StageError,
)
from meshnode.models.gguf import read_header
from meshnode.models.stages import cut

# Submitted and not yet received: one is computed, one is ready to be, and as many have been.
# More would wait here and be no faster.
STEPS_UNDER_WAY_MAX = 4
# What waits to be written to the child; whoever has more to say waits.
OUTBOX_MAX = STEPS_UNDER_WAY_MAX


@dataclass(frozen=True, slots=True)
class StageOptions:
    """Layers `first` to `end - 1`. `slots` are all that the head has, the kept ones included;
    `context_tokens` and `kv_type` are equal in all stages. `threads` None: as many as pays."""

    first: int
    end: int
    context_tokens: int
    slots: int
    kv_type: KvType = "f16"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class StageStats:
    """`shape` is None until it is ready; counts are of all runs together."""

    state: State
    progress: float
    error: str | None
    memory_bytes: int
    shape: Shape | None
    steps: int
    rows: int
    bytes_in: int
    bytes_out: int


class _Run:
    """The steps of one run that are in the child, or have come out of it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._under_way = 0
        self._computed: deque[bytes] = deque()
        self._error: MeshnodeError | None = None
        self._changed = trio.Event()

    # The child's side:

    def add(self, step: bytes) -> None:
        self._computed.append(step)
        self._tell_change()

    def end(self, error: MeshnodeError) -> None:
        """What has been computed can still be taken; nothing else happens in this run."""
        if self._error is None:
            self._error = error
            self._tell_change()

    # The node's side:

    async def enter(self) -> None:
        """Until there is room for one more step."""
        await trio.lowlevel.checkpoint()
        while self._error is None and self._under_way >= STEPS_UNDER_WAY_MAX:
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        self._under_way += 1

    def turn_back(self) -> None:
        """Of a step that entered, and did not come into the child."""
        self._under_way -= 1
        self._tell_change()

    async def leave(self) -> bytes:
        """The next step that has been computed."""
        await trio.lowlevel.checkpoint()
        while not self._computed:
            if self._error is not None:
                raise self._error
            await self._changed.wait()
        self._under_way -= 1
        self._tell_change()
        return self._computed.popleft()

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class _Asked:
    """A question to the child, and its answer."""

    def __init__(self) -> None:
        self._answer: wire.Saved | wire.Restored | EngineError | None = None
        self._answered = trio.Event()

    def answer(self, answer: wire.Saved | wire.Restored | EngineError) -> None:
        self._answer = answer
        self._answered.set()

    async def wait(self) -> wire.Saved | wire.Restored:
        await self._answered.wait()
        assert self._answer is not None
        if isinstance(self._answer, EngineError):
            raise self._answer
        return self._answer


class StageProcess:
    """One stage, in its own process; never the last one, which is an `EngineProcess`.

    `run` owns the child: cancel it to stop the stage. One task at a time submits, and one
    receives.
    """

    def __init__(self, card: ModelCard, options: StageOptions) -> None:
        self._card = card
        self._options = options
        self._state: State = "loading"
        self._progress = 0.0
        self._error: str | None = None
        self._shape: Shape | None = None
        self._changed = trio.Event()
        self._runs = 0
        self._run: _Run | None = None
        self._questions = 0
        self._asked: dict[int, _Asked] = {}
        self._outbox: trio.MemorySendChannel[bytes] | None = None
        self._pid: int | None = None
        self._steps = self._rows = self._bytes_in = self._bytes_out = 0

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return self._pid

    def stats(self) -> StageStats:
        try:
            memory_bytes = 0 if self._pid is None else resident_bytes(self._pid)
        except OSError:  # it has just died
            memory_bytes = 0
        return StageStats(
            state=self._state,
            progress=self._progress,
            error=self._error,
            memory_bytes=memory_bytes,
            shape=self._shape,
            steps=self._steps,
            rows=self._rows,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
        )

    async def wait_ready(self) -> None:
        """Until a run can begin. Raises `ModelLoadError` if that will never be."""
        while self._state != "ready":
            if self._state in ("failed", "stopped"):
                raise ModelLoadError(self._error or f"{self._name} has stopped.")
            await self._changed.wait()

    # -- steps ---------------------------------------------------------------------------------

    async def begin(self, pipeline: bytes, epoch: int, codec: Codec) -> None:
        """Forget all KV, and compute the steps of this run from number 0 on, into `codec`.

        The run before is over: whoever still waits in it gets an `EngineError`. Raises one itself
        if the stage is not ready.
        """
        self._runs += 1
        run = _Run(self._runs)
        if self._run is not None:
            self._run.end(EngineError(f"Another run of {self._name} has begun."))
        self._run = run
        try:
            await self._send(wire.Begin(run.number, pipeline, epoch, codec))
        except BaseException:
            run.end(EngineError(f"A run of {self._name} could not begin."))
            raise

    async def submit(self, frame: bytes) -> None:
        """A step of this run, as it came; waits while `STEPS_UNDER_WAY_MAX` are under way.

        Raises `EngineError` if the run is over, `RemoteProtocolError` if because of a wrong step.
        """
        run = self._the_run()
        if self._shape is not None and len(frame) > step_bytes_max(self._shape.width):
            raise RemoteProtocolError(f"a step of {len(frame)} bytes")
        await run.enter()
        try:
            await self._send(wire.Compute(run.number, frame))
        except BaseException:
            run.turn_back()
            raise
        self._bytes_in += len(frame)

    async def receive(self) -> bytes:
        """The step for the next stage, in the order in which they were submitted.

        Raises as `submit` does, after the last step that was computed.
        """
        return await self._the_run().leave()

    def _the_run(self) -> _Run:
        if self._run is None:
            raise EngineError(f"No run of {self._name} has begun.")
        return self._run

    # -- moving --------------------------------------------------------------------------------

    async def save(self, slot: int) -> bytes:
        """The KV of a slot after all steps that were submitted. Raises `EngineError`."""
        answer = await self._ask(lambda number: wire.Save(number, slot))
        assert isinstance(answer, wire.Saved)
        return answer.state

    async def restore(self, slot: int, state: bytes) -> int:
        """Fill an empty slot with what a peer's `save` has given; returns how many tokens it holds.

        Raises `EngineError` if it does not fit.
        """
        if len(state) > STATE_BYTES_MAX:
            raise EngineError(f"The KV of a slot takes {len(state)} bytes, too many to be moved.")
        answer = await self._ask(lambda number: wire.Restore(number, slot, state))
        assert isinstance(answer, wire.Restored)
        return answer.tokens

    async def _ask(
        self, question: Callable[[int], wire.Save | wire.Restore]
    ) -> wire.Saved | wire.Restored:
        self._questions += 1
        number = self._questions
        asked = self._asked[number] = _Asked()
        try:
            await self._send(question(number))
            return await asked.wait()
        finally:
            self._asked.pop(number, None)

    async def _send(self, frame: wire.ToChild) -> None:
        if self._state != "ready" or self._outbox is None:
            why = f": {self._error}" if self._error else f" ({self._progress:.0%} loaded)."
            raise EngineError(f"{self._name} is {self._state}{why}")
        try:
            await self._outbox.send(wire.encode(frame))
        except trio.BrokenResourceError:
            raise EngineError(f"The process of {self._name} has died.") from None

    @property
    def _name(self) -> str:
        return f"the stage of layers {self._options.first} to {self._options.end - 1} of " + (
            self._card.name
        )

    # -- supervision ---------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the stage going until cancelled; returns only if it can never be loaded.

        Started at once, while it loads; `wait_ready` waits for the rest.
        """
        task_status.started()
        await supervise(self._attempt, self._set_state)

    def _set_state(self, state: State, error: str | None = None) -> None:
        self._state = state
        if error is not None or state == "ready":
            self._error = error
        self._changed.set()
        self._changed = trio.Event()

    async def _attempt(self) -> None:
        """Start a child and serve it to its end. Raises `ModelLoadError` or `ChildDiedError`."""
        self._progress = 0.0
        load = await trio.to_thread.run_sync(self._check_file)
        child = await ChildProcess.start("meshnode.engine.stages.child")
        load_error: str | None = None
        self._outbox, outgoing = trio.open_memory_channel[bytes](OUTBOX_MAX)
        try:
            self._pid = child.pid
            self._outbox.send_nowait(wire.encode(load))
            load_error = await child.converse(outgoing, self._read)
        finally:
            was_ready = self._state == "ready"
            self._state = "loading"
            self._outbox = self._pid = self._shape = None
            outgoing.close()  # whoever waits to say something need not
            await child.stop()
            why = child.cause_of_death(self._card.path)
            self._lose(why)
        if load_error is not None:
            raise ModelLoadError(load_error)
        raise ChildDiedError(why, was_ready)

    def _lose(self, why: str) -> None:
        """The run, and all that was asked, is lost with the child."""
        if self._run is not None:
            self._run.end(EngineError(why))
        for asked in self._asked.values():
            asked.answer(EngineError(why))

    def _check_file(self) -> wire.Load:
        """What to load; blocks. Raises `ModelLoadError` for what can be known without loading."""
        path, options = self._card.path, self._options
        header = read_header(path)
        try:
            stage = cut(path, options.first, options.end)
        except StageError as error:
            raise ModelLoadError(str(error)) from error
        context_tokens = context_for(path, header, options.context_tokens)
        need = stage_need(header, stage, context_tokens, kv_type=options.kv_type)
        check_fits(path, need, available_bytes())
        return wire.Load(
            path=path,
            first=options.first,
            end=options.end,
            context_tokens=context_tokens,
            slots=options.slots,
            kv_type=options.kv_type,
            threads=options.threads,
        )

    async def _read(self, stdout: trio.abc.ReceiveStream) -> str | None:
        """Handle frames until the child closes its end; returns why it could not load, if so."""
        frames = FrameReader(wire.FRAME_BYTES_MAX)
        load_error = None
        try:
            while data := await stdout.receive_some(READ_BYTES):
                for body in frames.feed(data):
                    frame = wire.decode_from_child(body)
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
            case wire.Ready():
                self._shape = Shape(
                    frame.width, frame.slots, frame.context_tokens, frame.vocabulary
                )
                self._progress = 1.0
                self._set_state("ready")
            case wire.Computed():
                self._steps += 1
                self._rows += frame.rows
                self._bytes_out += len(frame.step)
                if self._run is not None and self._run.number == frame.run:
                    self._run.add(frame.step)
            case wire.RunFailed():
                if self._run is not None and self._run.number == frame.run:
                    kind = RemoteProtocolError if frame.theirs else EngineError
                    self._run.end(kind(frame.message))
            case wire.Saved() | wire.Restored():
                self._answered(frame.number, frame)
            case wire.Unable():
                self._answered(frame.number, EngineError(frame.message))

    def _answered(self, number: int, answer: wire.Saved | wire.Restored | EngineError) -> None:
        if asked := self._asked.get(number):  # else whoever asked has left
            asked.answer(answer)
