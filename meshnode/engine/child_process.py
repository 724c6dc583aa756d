"""A child process of the node: started, fed, listened to, stopped, and started again.

Decides when a child that died is started again, and what the operator is told of its death. What
is said through its pipes is up to who starts it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal, Self, TypeVar

import trio

from meshnode.errors import ModelLoadError

# First pause before a restart, doubled up to the bound; forgotten after a healthy while.
RESTART_AFTER_S = 0.25
RESTART_AFTER_MAX_S = 30.0
HEALTHY_AFTER_S = 60.0
# A child that dies this often before it is ready will not be ready the next time either.
LOAD_ATTEMPTS_MAX = 3
# A child gets this long to obey SIGTERM before SIGKILL, and to finish its last words.
STOP_S = 2.0
READ_BYTES = 64 * 1024
# What is kept of the child's log for the error message.
LOG_LINES_MAX = 20
LOG_LINE_CHARS_MAX = 300

# libgomp's threads spin at barriers for milliseconds by default, which burns a core between steps
# and stalls a busy machine. About 0.2 ms outlasts the barriers inside a step, where sleeping would
# cost a third of the speed; that nobody spins for a thread that cannot run is up to `pace.py`.
# ggml would start a debugger for a backtrace when it aborts.
CHILD_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "10000",
    "GGML_NO_BACKTRACE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}

State = Literal["loading", "ready", "failed", "stopped"]
Heard = TypeVar("Heard")


class ChildDiedError(Exception):
    """The child ended without being asked; the message is for the operator."""

    def __init__(self, why: str, was_ready: bool) -> None:
        super().__init__(why)
        self.was_ready = was_ready


class ChildProcess:
    """One Python process with pipes; whoever starts it must `stop` it."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._log: deque[str] = deque(maxlen=LOG_LINES_MAX)

    @classmethod
    async def start(cls, module: str) -> Self:
        """Have Python run a module of ours."""
        process = await trio.lowlevel.open_process(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # -P and our own path: the child finds the modules that we found, and does not take
            # a numpy.py in the current directory for numpy.
            env={**os.environ, **CHILD_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def converse(
        self,
        outgoing: trio.MemoryReceiveChannel[bytes],
        read: Callable[[trio.abc.ReceiveStream], Awaitable[Heard]],
    ) -> Heard:
        """Write what is outgoing and have `read` read, until it returns at the child's end."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_write, process.stdin, outgoing)
            log_read = trio.Event()
            nursery.start_soon(_read_log, process.stderr, self._log, log_read)
            heard = await read(process.stdout)
            with trio.move_on_after(STOP_S):
                await log_read.wait()
                await process.wait()
            nursery.cancel_scope.cancel()
        return heard

    async def stop(self) -> None:
        """Terminate, then kill; returns when the process is gone."""
        process = self._process
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.terminate()
                with trio.move_on_after(STOP_S):
                    await process.wait()
            if process.poll() is None:
                process.kill()
                await process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    await trio.aclose_forcefully(stream)

    def cause_of_death(self, path: str) -> str:
        """One sentence or two for the operator; the log never holds prompts or answers."""
        code = self._process.returncode
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            hint = _SIGNAL_HINTS.get(-code, "")
        else:
            how, hint = f"ended with code {code}", ""
        last = f" Its last words: {self._log[-1]}" if self._log else ""
        return f"The engine process of {path} {how}{hint}.{last}"


async def supervise(
    attempt: Callable[[], Awaitable[None]], tell: Callable[[State, str | None], None]
) -> None:
    """Keep a child going until cancelled; returns only if its model can never be loaded.

    `attempt` serves one child from its start to its end, and raises `ModelLoadError` or
    `ChildDiedError`; `tell` hears of each state but "ready", and the reason if there is one.
    """
    restart_after_s = RESTART_AFTER_S
    loads_failed = 0
    try:
        while True:
            tell("loading", None)
            started_at = trio.current_time()
            try:
                await attempt()
            except ModelLoadError as error:
                tell("failed", str(error))
                return
            except ChildDiedError as death:
                loads_failed = 0 if death.was_ready else loads_failed + 1
                if loads_failed >= LOAD_ATTEMPTS_MAX:
                    tell("failed", f"{death} It died {loads_failed} times so.")
                    return
                tell("loading", str(death))
            if trio.current_time() - started_at > HEALTHY_AFTER_S:
                restart_after_s = RESTART_AFTER_S
            await trio.sleep(restart_after_s)
            restart_after_s = min(2 * restart_after_s, RESTART_AFTER_MAX_S)
    except BaseException:
        tell("stopped", None)
        raise


async def _write(stdin: trio.abc.SendStream, outgoing: trio.MemoryReceiveChannel[bytes]) -> None:
    """One writer, never cancelled within a frame while the child lives."""
    try:
        async with stdin:
            async for data in outgoing:
                await stdin.send_all(data)
    except trio.BrokenResourceError:
        pass  # the child is gone; its standard output ends too, and that is acted upon


async def _read_log(stderr: trio.abc.ReceiveStream, log: deque[str], finished: trio.Event) -> None:
    """Keep the last lines, each of bounded length, whatever the child prints."""
    rest = ""
    while data := await stderr.receive_some(READ_BYTES):
        *lines, rest = (rest + data.decode("utf-8", "replace")).split("\n")
        log.extend(line[:LOG_LINE_CHARS_MAX] for line in lines if line.strip())
        rest = rest[:LOG_LINE_CHARS_MAX]
    log.extend([rest] if rest.strip() else [])
    finished.set()


_SIGNAL_HINTS: dict[int, str] = {
    signal.SIGBUS: ": the file was truncated while it was in use, or its disk failed",
    signal.SIGKILL: ": killed by somebody, or by the kernel because memory ran out",
    signal.SIGABRT: ": llama.cpp gave up",
    signal.SIGSEGV: ": a bug in llama.cpp, or a file that it does not understand",
}
