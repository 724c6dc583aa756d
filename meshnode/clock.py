"""The clock of promises: seconds that go on while the machine sleeps.

Linux stops CLOCK_MONOTONIC in suspend, and with it Trio's and Python's clocks: a laptop would wake
believing a lease that others have long seen end. CLOCK_BOOTTIME goes on. macOS has the same trap
in `time.monotonic` and a way out under another name; Windows counts sleep in `time.monotonic`.

What no clock here can know: a virtual machine that its host pauses sees no time pass at all.
Nothing is said about wall time or other machines; only rates compare (`protocol/lease.py`).
"""

from __future__ import annotations

import sys
import time

if sys.platform == "darwin":
    # Unlike Linux's clock of this name it goes on in sleep (clock_gettime(3) of macOS).
    _CLOCK: int | None = time.CLOCK_MONOTONIC_RAW
else:
    _CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Seconds since some moment before this process began; never falls, sleep included."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)
