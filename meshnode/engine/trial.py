"""Try in a copy of this process what may crash or never end, before doing it here.

Decides what a trial may cost. Does not know what is tried: llama.cpp's compiler of grammars
recurses, allocates and gives up as its input likes, and the input is a client's.

The copy is a fork without exec: it has the loaded vocabulary, and costs a millisecond or two. Only
the calling thread is in it, so what is tried must not need another.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

# An honest grammar takes milliseconds; a busy machine may make tens of that.
CPU_S_MAX = 2
# A lock that another thread held at the fork is held for ever: the copy waits and is ended.
WALL_S_MAX = 10
MEMORY_BYTES_MAX = 256 * 1024 * 1024
"""On top of what this process has."""


def survives(attempt: Callable[[], bool]) -> bool:
    """Whether `attempt` returns true, and in bounds, in a copy. Its output is thrown away."""
    pid = os.fork()
    if pid == 0:
        _attempt(attempt)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _attempt(attempt: Callable[[], bool]) -> None:
    """In the copy: it ends here, whatever happens."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(WALL_S_MAX)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_MAX, CPU_S_MAX))
        bytes_max = _virtual_bytes() + MEMORY_BYTES_MAX
        resource.setrlimit(resource.RLIMIT_AS, (bytes_max, bytes_max))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 0 if attempt() else 1
    finally:
        os._exit(code)


def _virtual_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")
