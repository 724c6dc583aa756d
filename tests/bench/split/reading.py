"""Which bytes of a file have been read: those that the kernel has in its cache after it had none.

That counts whoever reads, and however: by read(2), through a mapping, or from file to file. What
the kernel reads ahead of whoever reads is counted too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


def forget(path: Path) -> None:
    """Have the kernel drop what it holds of a file that nobody has mapped."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def bytes_read(path: Path) -> int:
    """Bytes of a file, in whole pages, that the kernel holds. Raises `OSError`."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped,
    ):
        start = ctypes.c_char.from_buffer(mapped)
        failed = _libc.mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages
        )
        del start  # which holds the mapping open
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def read_ahead_bytes(folder: Path) -> int:
    """How much the kernel may read ahead of a reader of files there; 0 if it does not say."""
    device = folder.stat().st_dev
    told = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return 1024 * int(told.read_text()) if told.exists() else 0
