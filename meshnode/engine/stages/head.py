"""The engine process of a model's last layers: it plans for all stages of a pipeline.

Answers requests as `child.py` does, whose `Child` it is. But a batch is computed by others first:
its tokens go out to the first stage, and what comes back as rows goes through the last layers here.
Several batches are on their way at once, and while they are, requests, cancels and whatever else
the node says are heard.

Every stage keeps the KV of its own layers, and all of them must hold the same tokens. So what a
batch wants changed goes with it, and is done by each stage, here too, when the batch reaches it.
What takes rejected guesses back goes with the next batch: it is planned after they were rejected,
and nothing that was planned before touches their slot, since it was in flight.

Without a pipeline requests wait, since the next one usually forms within seconds, and then their
answers go on from the token they had reached.
"""

from __future__ import annotations

import queue
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
from msgspec import structs

from meshnode.engine import wire
from meshnode.engine.child import Child, ChildPipe, Item, serve, speculation_for
from meshnode.engine.cores import usable_cores
from meshnode.engine.llama import DecodeError
from meshnode.engine.pace import Threads
from meshnode.engine.payoff import Speculation
from meshnode.engine.pipe import Progress
from meshnode.engine.prepare import prepare
from meshnode.engine.scheduler import (
    PREFILL_TOKENS_IN_FLIGHT_MAX,
    Batch,
    Change,
    Copy,
    Limits,
    Trim,
    slots_kept,
)
from meshnode.engine.stages import steps
from meshnode.engine.stages.activations import Rows, unpack
from meshnode.engine.stages.head_model import HeadModel
from meshnode.engine.states import StateStore
from meshnode.errors import RemoteProtocolError, StageError

# How long requests wait for a pipeline. Whoever takes a dead stage's place has its layers in a few
# seconds, or in a minute if they are tens of GB; who would wait longer asks another replica.
PIPELINE_WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class _Sent:
    """A batch in flight, what every stage changes first, and when it was planned."""

    batch: Batch
    changes: tuple[Change, ...]
    planned_at: float


@dataclass(slots=True)
class _Pipeline:
    """One run of a pipeline. `owed` are changes that go out with the next batch."""

    name: bytes
    epoch: int
    sent: int = 0
    in_flight: deque[_Sent] = field(default_factory=deque)
    owed: list[Change] = field(default_factory=list)
    concluded_at: float = 0.0

    def step(self, batch: Batch) -> steps.Step:
        """The next step for the first stage."""
        slots = [chunk.slot for chunk in batch.chunks for _ in chunk.tokens]
        positions = [chunk.start + i for chunk in batch.chunks for i in range(len(chunk.tokens))]
        tokens = [token for chunk in batch.chunks for token in chunk.tokens]
        changes, self.owed = (*self.owed, *batch.changes), []
        self.in_flight.append(_Sent(batch, changes, time.perf_counter()))
        self.sent += 1
        return steps.Step(
            self.name,
            self.epoch,
            self.sent - 1,
            _as_steps(changes),
            np.array(slots, "<u2").tobytes(),
            np.array(positions, "<i4").tobytes(),
            np.array(tokens, "<i4").tobytes(),
        )

    def rows(self, frame: bytes, shape: steps.Shape) -> Rows:
        """Those of the oldest batch in flight. Raises `RemoteProtocolError` if they are not."""
        step = steps.decode(frame, shape)
        if not self.in_flight:
            raise RemoteProtocolError("rows of a step that was not sent")
        steps.check_due(step, self.name, self.epoch, self.sent - len(self.in_flight))
        if step.count != self.in_flight[0].batch.tokens:
            raise RemoteProtocolError(f"{step.count} rows for a batch of another size")
        return unpack(step.rows, step.codec, shape.width)


class Head(Child):
    """The last layers of a model, being stepped by a pipeline."""

    _model: HeadModel

    def __init__(
        self,
        pipe: ChildPipe,
        model: HeadModel,
        limits: Limits,
        threads: Threads,
        speculation: Speculation | None,
    ) -> None:
        # A part saves no KV: the other stages would have to save theirs, and to restore it.
        super().__init__(pipe, model, limits, threads, StateStore(None, 0), speculation)
        self._shape = steps.Shape(
            model.width, limits.slots + limits.slots_kept, limits.context_tokens, vocabulary=0
        )
        self._pipeline: _Pipeline | None = None
        self._no_pipeline = "none has been formed yet"
        self._waits_until = time.monotonic() + PIPELINE_WAIT_S

    # -- the reader thread ---------------------------------------------------------------------

    def hear(self, frame: wire.ToChild) -> None:
        if isinstance(frame, wire.StartPipeline | wire.StopPipeline | wire.Rows):
            self._inbox.put(frame)
        elif isinstance(frame, wire.Embed):
            why = "Only the last layers of this model are here: it cannot read for embeddings."
            self._pipe.send(wire.Unable(frame.number, why))
        else:
            super().hear(frame)

    # -- the main thread -----------------------------------------------------------------------

    def run(self) -> NoReturn:
        self._send_status()
        while True:
            self.turn()

    def turn(self) -> None:
        """Wait for the next thing that happens, and do what follows from it."""
        try:
            self._handle(self._inbox.get(timeout=self._patience_s()))
        except queue.Empty:
            self._give_up()
        self._fill()
        self._send_status()

    def _patience_s(self) -> float | None:
        """How long requests may still wait for a pipeline; None if there is one, or none waits."""
        if self._pipeline is not None or self._scheduler.idle:
            return None
        return max(0.0, self._waits_until - time.monotonic())

    def _handle(self, item: Item) -> None:
        match item:
            case wire.StartPipeline():
                self._stop("another has begun")
                limits = replace(self._scheduler.limits, in_flight_max=item.stages)
                self._scheduler.limits = limits
                self._pipeline = _Pipeline(item.pipeline, item.epoch)
            case wire.StopPipeline():
                self._stop(item.reason)
            case wire.Rows():
                self._take(item)
            case _:
                super()._handle(item)

    def _stop(self, reason: str) -> None:
        """What is in flight is lost, and so is all KV."""
        if self._pipeline is None:
            return
        self._pipeline = None
        self._no_pipeline = reason
        self._waits_until = time.monotonic() + PIPELINE_WAIT_S
        self._scheduler.forget_all()
        for slot in range(self._shape.slots):
            self._model.trim(Trim(slot, 0))

    def _fill(self) -> None:
        """Send out as many batches as may be in flight."""
        pipeline = self._pipeline
        while pipeline is not None and not self._scheduler.is_full:
            batch = self._plan()
            if batch is None:
                return
            if batch.chunks:
                step = steps.encode(pipeline.step(batch))
                self._pipe.send(wire.Planned(pipeline.name, step))
            else:
                pipeline.owed += batch.changes

    def _take(self, frame: wire.Rows) -> None:
        """Compute the last layers of the oldest batch in flight, and draw."""
        pipeline = self._pipeline
        if pipeline is None or frame.pipeline != pipeline.name:
            return  # of one that is over
        try:
            rows = pipeline.rows(frame.step, self._shape)
            sent = pipeline.in_flight.popleft()
            if not prepare(sent.changes, self._model, self._states, self._scheduler):
                raise DecodeError("the head lost its KV cache")
            self._timed(sent.batch, lambda batch: self._model.decode_rows(batch, rows))
        except (RemoteProtocolError, StageError) as error:
            theirs = isinstance(error, RemoteProtocolError)
            self._stop(str(error))
            self._pipe.send(wire.PipelineFailed(pipeline.name, str(error), theirs))
            return
        # Beside others in flight, a batch took only what came after the one before it.
        started_at = max(sent.planned_at, pipeline.concluded_at)
        pipeline.owed += self._conclude(sent.batch, started_at)
        pipeline.concluded_at = time.perf_counter()

    def _give_up(self) -> None:
        """No pipeline has come: whoever waits is better off elsewhere."""
        why = f"The model's other layers are out of reach: {self._no_pipeline}."
        for sequence, answer in self._answers.items():
            self._scheduler.end(sequence)
            answer.sampler.close()
        numbers = {answer.number for answer in self._answers.values()}
        self._answers.clear()
        self._pipe.send(*(wire.Unable(number, why) for number in sorted(numbers)))


def _as_steps(changes: Sequence[Change]) -> tuple[steps.Keep | steps.Share, ...]:
    """As every stage understands them."""
    found: list[steps.Keep | steps.Share] = []
    for change in changes:
        match change:
            case Trim(slot, keep):
                found.append(steps.Keep(slot, keep))
            case Copy(source, slot, tokens):
                found.append(steps.Share(source, slot, tokens))
            case _:
                raise AssertionError(f"{change} in a part, which saves nothing")
    return tuple(found)


def load_head(pipe: ChildPipe, load: wire.Load) -> Head:
    """The last layers of a model. Raises `StageError` or `ModelLoadError`."""
    if load.part is None:
        raise StageError("a head needs to know its layers")
    threads_max = load.threads or usable_cores()
    threads = Threads(threads_max, adaptive=load.threads is None)
    model = HeadModel(
        load.path,
        *load.part,
        context_tokens=load.context_tokens,
        slots=load.slots,
        slots_kept=slots_kept(load.slots),
        kv_type=load.kv_type,
        threads=threads_max,
        on_progress=Progress(lambda progress: pipe.send(wire.Loading(progress))),
    )
    limits = Limits(
        slots=load.slots,
        context_tokens=model.context_tokens,
        kv_tokens=model.context_tokens,
        waiting_max=load.waiting_max,
        prefill_tokens=PREFILL_TOKENS_IN_FLIGHT_MAX,
        slots_kept=model.slots_kept,
    )
    if load.speculate == "auto":
        # A pass takes its way through the network whatever its width: guesses pay, and trials,
        # which compare one pass after the other, would judge by what else is in flight.
        load = structs.replace(load, speculate="lookup" if load.draft is None else "draft")
    return Head(pipe, model, limits, threads, speculation_for(load, model, threads))


if __name__ == "__main__":
    if sys.argv[1:]:
        print("This is a part of meshnode's engine; it is started by the node.", file=sys.stderr)
        sys.exit(2)
    serve(load_head)
