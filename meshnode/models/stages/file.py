"""A stage as a file without a name, which llama.cpp loads; in memory, or on the source's disk.

Copies a stage's pieces from the whole file, within the kernel, and reads nothing else of it. Its
holes take no memory, but for the while in which llama.cpp maps all of it. What is in memory stays
there, what is on disk the kernel can drop and read again. Decides nothing; the file is gone when
nobody has it open or mapped any more, however the process ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import ModelLoadError
from meshnode.models.stages.stage import Stage

_LIBC = ctypes.CDLL(None)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
# Of one call; the kernel takes no more than 2 GiB at once.
_COPY_BYTES_MAX = 1 << 30


@dataclass(frozen=True, slots=True)
class StageFile:
    """`path` is good in this process while the file is open; `copied_bytes` came of the source."""

    path: str
    copied_bytes: int


@contextmanager
def open_stage(stage: Stage, source: str | Path, *, on_disk: bool = False) -> Iterator[StageFile]:
    """The stage's file; `source` is the whole model's, of which only `stage.ranges` need exist.

    `on_disk` is a wish: in a folder that cannot be written to, it is in memory all the same.
    Once llama.cpp has loaded it, it can be closed: what is mapped stays.
    Raises `ModelLoadError` if the source cannot be read, or memory does not suffice.
    """
    target = _unnamed_file(Path(source).parent) if on_disk else None
    if target is None:
        name = f"{stage.architecture}-{stage.first}-{stage.end}"
        target = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        try:
            copied_bytes = _fill(target, stage, source)
        except OSError as error:
            raise ModelLoadError(f"{source} cannot be copied: {error.strerror}.") from error
        yield StageFile(f"/proc/self/fd/{target}", copied_bytes)
        _punch_holes(target, stage)
    finally:
        os.close(target)


def _unnamed_file(folder: Path) -> int | None:
    """None if nothing can be written there, or its file system has no such files."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _fill(target: int, stage: Stage, source: str | Path) -> int:
    os.truncate(target, stage.bytes_total)
    os.pwrite(target, stage.header, 0)
    copied_bytes = 0
    with open(source, "rb", buffering=0) as file:
        for piece in stage.pieces:
            os.lseek(target, piece.offset, os.SEEK_SET)
            copied_bytes += copy_range(target, file.fileno(), piece.source_offset, piece.size_bytes)
    return copied_bytes


def _punch_holes(target: int, stage: Stage) -> None:
    """Give back what mapping the file has filled with zeros."""
    position = len(stage.header)
    for piece in sorted(stage.pieces, key=lambda piece: piece.offset):
        if piece.offset - position >= mmap.PAGESIZE:
            _free(target, position, piece.offset - position)
        position = piece.offset + piece.size_bytes


def _free(target: int, offset: int, size_bytes: int) -> None:
    """Only whole pages within are freed; all read as zeros. A kernel that cannot do it keeps
    them, which costs memory and nothing else: so what it returns is not looked at."""
    mode = _PUNCH_HOLE | _KEEP_SIZE
    _LIBC.fallocate(target, mode, ctypes.c_int64(offset), ctypes.c_int64(size_bytes))


def copy_range(target: int, source: int, offset: int, size_bytes: int) -> int:
    """Bytes of one open file to where another stands; returns how many: all.

    Raises `OSError`, and `ModelLoadError` if the source ends before.
    """
    end = offset + size_bytes
    while offset < end:
        count = os.sendfile(target, source, offset, min(end - offset, _COPY_BYTES_MAX))
        if count == 0:
            raise ModelLoadError("The model's file became shorter while it was copied.")
        offset += count
    return size_bytes
