"""A stage as a file in memory, which llama.cpp loads by name; nothing is written to a disk.

Copies a stage's pieces from the whole file, within the kernel, and reads nothing else of it.
Decides nothing. What is copied stays in memory until the file is closed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import ModelLoadError
from meshnode.models.stages.cut import Stage

# Of one call; the kernel takes no more than 2 GiB at once.
_COPY_BYTES_MAX = 1 << 30


@dataclass(frozen=True, slots=True)
class StageFile:
    """`path` is good in this process while the file is open; `copied_bytes` came of the source."""

    path: str
    copied_bytes: int


@contextmanager
def open_stage(stage: Stage, source: str | Path) -> Iterator[StageFile]:
    """The stage's file; `source` is the whole model's, of which only `stage.ranges` need exist.

    Raises `ModelLoadError` if the source cannot be read, or memory does not suffice.
    """
    name = f"{stage.architecture}-{stage.first}-{stage.end}"
    target = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        try:
            copied_bytes = _fill(target, stage, source)
        except OSError as error:
            raise ModelLoadError(f"{source} cannot be copied: {error.strerror}.") from error
        yield StageFile(f"/proc/self/fd/{target}", copied_bytes)
    finally:
        os.close(target)


def _fill(target: int, stage: Stage, source: str | Path) -> int:
    os.truncate(target, stage.bytes_total)
    os.pwrite(target, stage.header, 0)
    copied_bytes = 0
    with open(source, "rb", buffering=0) as file:
        for piece in stage.pieces:
            os.lseek(target, piece.offset, os.SEEK_SET)
            copied_bytes += copy_range(target, file.fileno(), piece.source_offset, piece.size_bytes)
    return copied_bytes


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
