"""The child's end of the pipe to the node: bodies of frames in, frames out.

What they say is up to `wire.py` and `stages/wire.py`. When the parent is gone, so is standard
input, and the process ends.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from meshnode.engine.wire import FrameReader

READ_BYTES = 64 * 1024
PROGRESS_STEP = 0.01


class Pipe:
    """Both directions, on private file descriptors. Writing is safe from any thread."""

    def __init__(self) -> None:
        self._in = os.dup(0)
        self._out = os.dup(1)
        # Whatever a library prints belongs into the log, not between our frames.
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def write(self, frames: bytes) -> None:
        """All of it; ends the process if the parent is gone."""
        data = memoryview(frames)
        with self._lock:
            while data:
                try:
                    data = data[os.write(self._out, data) :]
                except BrokenPipeError:
                    leave()

    def bodies(self, frame_bytes_max: int) -> Iterator[bytes]:
        """Of the frames that come, until the parent closes the pipe or is gone."""
        frames = FrameReader(frame_bytes_max)
        while data := os.read(self._in, READ_BYTES):
            yield from frames.feed(data)


class Progress:
    """Of loading, 0..1: passes on each further percent."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._told = 0.0

    def __call__(self, progress: float) -> None:
        if progress >= self._told + PROGRESS_STEP or progress >= 1.0:
            self._told = progress
            self._tell(min(progress, 1.0))


def leave(code: int = 0) -> NoReturn:
    """End at once, from any thread: nothing here outlives the parent or needs saving."""
    sys.stderr.flush()
    os._exit(code)


def resident_bytes(process: int | str = "self") -> int:
    """The memory that a process has; raises `OSError` if there is no such process any more."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
