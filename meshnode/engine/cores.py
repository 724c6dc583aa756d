"""How many cores this process may really use, and how many are idle; reads only what the operating
system says."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

# Long enough for the kernel's ticks of 10 ms to add up, short enough to see a lull.
IDLE_OVER_S = 0.25
# Three numbers of 64 bits.
_SCHEDSTAT_BYTES = 80

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_STAT = Path("/proc/stat")
_TASKS = Path("/proc/self/task")


def usable_cores() -> int:
    """Physical cores in this process's affinity mask, bounded by its cgroup's quota; at least 1.

    Two hyperthreads of one core share the units that matrix products use, so they count once.
    """
    threads = sorted(os.sched_getaffinity(0))
    cores = {_read(_CPUS / f"cpu{number}/topology/thread_siblings_list") or number
             for number in threads}  # fmt: skip
    return max(1, math.ceil(min(len(cores), _quota_cores())))


class IdleCores:
    """How many of the machine's cores nobody used lately; 0.0 where the kernel does not tell."""

    def __init__(self) -> None:
        self._idle_s = _idle_s()
        self._at = time.monotonic()
        self._cores = 0.0

    def lately(self) -> float:
        """The average over the latest `IDLE_OVER_S` or more; cheap enough for every step."""
        now = time.monotonic()
        if now - self._at >= IDLE_OVER_S:
            idle_s = _idle_s()
            self._cores = (idle_s - self._idle_s) / (now - self._at)
            self._idle_s, self._at = idle_s, now
        return self._cores


class Waiting:
    """How long the threads of this process were ready to run and had no CPU.

    Read between steps, so it is cheap (10 us): each thread's file stays open.
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def so_far_s(self) -> float:
        """Of all threads that exist now, together; never grows where the kernel does not tell."""
        waited_ns = 0
        try:
            threads = os.listdir(_TASKS)
        except OSError:
            return 0.0
        for ended in self._files.keys() - threads:
            os.close(self._files.pop(ended))
        for thread in threads:
            waited_ns += self._of(thread)
        return waited_ns / 1e9

    def _of(self, thread: str) -> int:
        try:
            if thread not in self._files:
                self._files[thread] = os.open(_TASKS / thread / "schedstat", os.O_RDONLY)
            # Nanoseconds on a CPU, nanoseconds waiting for one, time slices.
            return int(os.pread(self._files[thread], _SCHEDSTAT_BYTES, 0).split()[1])
        except (OSError, IndexError):  # it ended meanwhile, or another kernel
            return 0


def _idle_s() -> float:
    """Seconds that all cores together have been idle since the start of the machine."""
    # cpu user nice system idle iowait ...
    words = (_read(_STAT) or "").split(maxsplit=5)
    return int(words[4]) / os.sysconf("SC_CLK_TCK") if words[:1] == ["cpu"] else 0.0


def _quota_cores() -> float:
    """CPU seconds per second that the cgroup grants; infinite without a limit."""
    words = (_read(_CGROUP_QUOTA) or "max").split()
    return math.inf if words[0] == "max" else int(words[0]) / int(words[1])


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # another kernel, or a sandbox without /sys
        return None
