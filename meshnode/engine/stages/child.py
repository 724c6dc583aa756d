"""The process that computes a stage: steps in on standard input, steps out on standard output.

Two threads, as in `child.py`: a reader, which hears at once that a run is over or the parent gone,
and the main thread, which computes. A step that is wrong, or that llama.cpp cannot compute, ends
its run and not the process. Knows nothing of Trio, peers, or the other stages.
"""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import msgspec

from meshnode.engine.cores import IdleCores, Waiting, usable_cores
from meshnode.engine.pace import Threads
from meshnode.engine.pipe import Pipe, Progress, leave
from meshnode.engine.stages import activations, steps, wire
from meshnode.engine.stages.model import StageModel
from meshnode.errors import EngineError, MeshnodeError, RemoteProtocolError

# The parent has far fewer frames in flight; if it did not, the reader would wait here.
INBOX_MAX = 64
EXIT_BUG = 1


class _Pipe(Pipe):
    """The conversation with the parent."""

    def send(self, frame: wire.FromChild) -> None:
        self.write(wire.encode(frame))

    def receive(self) -> Iterator[wire.ToChild]:
        """Frames until the parent closes the pipe or is gone."""
        return map(wire.decode_to_child, self.bodies(wire.FRAME_BYTES_MAX))


class StageChild:
    """A loaded stage and the run that it computes."""

    def __init__(self, pipe: _Pipe, model: StageModel, threads: Threads) -> None:
        self._pipe = pipe
        self._model = model
        self._threads = threads
        self._idle_cores = IdleCores()
        self._waiting = Waiting()
        self._inbox: queue.Queue[wire.ToChild] = queue.Queue(INBOX_MAX)
        # Written by the reader: steps of older runs need not be computed any more.
        self._newest_run = 0
        self._run: wire.Begin | None = None
        self._next_number = 0

    def read(self, frames: Iterator[wire.ToChild]) -> NoReturn:
        """Feed the inbox; ends the process when the parent is gone."""
        try:
            for frame in frames:
                if isinstance(frame, wire.Begin):
                    self._newest_run = frame.run
                    self._model.abort()  # what is being computed is of an older run
                self._inbox.put(frame)
            leave()
        finally:
            # Reached only by a bug. A child that computes but cannot hear must end, saying why.
            traceback.print_exc()
            leave(EXIT_BUG)

    def run(self) -> NoReturn:
        """Compute for ever; the reader ends the process."""
        while True:
            frame = self._inbox.get()
            if isinstance(frame, wire.Begin):
                self._begin(frame)
            elif isinstance(frame, wire.Compute):
                self._answer(frame)
            elif isinstance(frame, wire.Save | wire.Restore):
                self._pipe.send(self._move(frame))

    def _begin(self, run: wire.Begin) -> None:
        self._model.forget()
        self._run = run
        self._next_number = 0

    def _answer(self, frame: wire.Compute) -> None:
        run = self._run
        if run is None or not frame.run == run.run == self._newest_run:
            return  # the run is over
        try:
            computed = self._compute(frame.step, run)
        except (RemoteProtocolError, EngineError) as error:
            self._run = None
            theirs = isinstance(error, RemoteProtocolError)
            self._pipe.send(wire.RunFailed(run.run, str(error), theirs))
            return
        self._pipe.send(wire.Computed(run.run, steps.encode(computed), computed.count))

    def _compute(self, frame: bytes, run: wire.Begin) -> steps.Step:
        """The next stage's step. Raises `RemoteProtocolError` or `EngineError`."""
        step = steps.decode(frame, self._model.shape)
        steps.check_due(step, run.pipeline, run.epoch, self._next_number)
        self._next_number += 1
        threads = self._threads.policy(step.count)
        self._model.set_threads(threads.threads)
        wall_s, waited_s = time.perf_counter(), self._waiting.so_far_s()
        rows = self._model.compute(step)
        wall_s = time.perf_counter() - wall_s
        # A thread that ended takes its share with it.
        waited_s = max(0.0, self._waiting.so_far_s() - waited_s)
        if step.count:
            threads.observe(waited_s, wall_s, time.monotonic(), self._idle_cores.lately())
        try:
            codec, packed = activations.pack(rows, run.codec)
        except ValueError as error:
            raise EngineError(
                f"The stage computes no numbers ({error}); its file may be damaged."
            ) from error
        return msgspec.structs.replace(step, tokens=b"", rows=packed, codec=codec)

    def _move(self, frame: wire.Save | wire.Restore) -> wire.FromChild:
        try:
            if isinstance(frame, wire.Save):
                return wire.Saved(frame.number, self._model.save(frame.slot))
            return wire.Restored(frame.number, self._model.restore(frame.slot, frame.state))
        except EngineError as error:
            return wire.Unable(frame.number, str(error))


def serve() -> None:
    """Load what the first frame names, then compute until the parent is gone."""
    # Ctrl-C in a terminal goes to parent and child alike; the parent decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = _Pipe()
    frames = pipe.receive()
    load = next(frames, None)
    if not isinstance(load, wire.Load):
        return
    threads_max = load.threads or usable_cores()
    try:
        model = StageModel(
            load.path,
            load.first,
            load.end,
            context_tokens=load.context_tokens,
            slots=load.slots,
            kv_type=load.kv_type,
            threads=threads_max,
            on_progress=Progress(lambda progress: pipe.send(wire.Loading(progress))),
        )
    except MeshnodeError as error:
        pipe.send(wire.LoadFailed(str(error)))
        return
    child = StageChild(pipe, model, Threads(threads_max, adaptive=load.threads is None))
    threading.Thread(target=child.read, args=(frames,), daemon=True).start()
    shape = model.shape
    pipe.send(wire.Ready(shape.width, shape.slots, shape.context_tokens, shape.vocabulary))
    child.run()


if __name__ == "__main__":
    if sys.argv[1:]:
        print("This computes a stage for meshnode; it is started by the node.", file=sys.stderr)
        sys.exit(2)
    serve()
