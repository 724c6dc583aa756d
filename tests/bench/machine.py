"""What every measurement says of the machine it ran on, and how it counts a process's work."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from meshnode import __version__


def cpu_used_s(pid: int) -> float:
    """CPU seconds a process has used, user and system, to the nanosecond: its clock
    (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def busy_s() -> float:
    """CPU seconds that this machine has worked, on all cores."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Hardware, system and versions; `packages` are those that matter to the figures."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {"meshnode": __version__} | {name: version(name) for name in packages},
    }


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The head of a report."""
    return [
        f"{machine['platform']}, {machine['cpus']} × {machine['cpu']}, Python {machine['python']}",
        ", ".join(f"{name} {number}" for name, number in machine["packages"].items()),
    ]
