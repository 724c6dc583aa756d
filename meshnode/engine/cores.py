"""How many cores this process may really use; reads only what the operating system says."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Physical cores in this process's affinity mask, bounded by its cgroup's quota; at least 1.

    Two hyperthreads of one core share the units that matrix products use, so they count once.
    """
    threads = sorted(os.sched_getaffinity(0))
    cores = {_read(_CPUS / f"cpu{number}/topology/thread_siblings_list") or number
             for number in threads}  # fmt: skip
    return max(1, math.ceil(min(len(cores), _quota_cores())))


def _quota_cores() -> float:
    """CPU seconds per second that the cgroup grants; infinite without a limit."""
    words = (_read(_CGROUP_QUOTA) or "max").split()
    return math.inf if words[0] == "max" else int(words[0]) / int(words[1])


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # another kernel, or a sandbox without /sys
        return None
