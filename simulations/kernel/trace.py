"""What happened: a digest that is equal for equal runs, and counts.

Every delivery, dial, loss and fault goes into the digest with its time and its two ends. Two runs
of one scenario and seed must end with one digest on any machine and under any PYTHONHASHSEED;
when they do not, something depends on what it must not.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import Counter

_RECORD = struct.Struct("<qiiI")
_FLUSH_BYTES = 64 * 1024
"""One hash of 64 KiB costs less than 3,000 of 20 bytes."""


class Trace:
    """See the module. A machine is told apart by its index; -1 is nobody."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        """What was delivered, by kind."""
        self.bytes: Counter[str] = Counter()
        self._hash = hashlib.blake2b(digest_size=16)
        self._pending = bytearray()
        self._kinds: dict[str, int] = {}

    def note(self, time_ns: int, source: int, target: int, kind: str) -> None:
        code = self._kinds.get(kind)
        if code is None:
            code = self._kinds[kind] = zlib.crc32(kind.encode())
        self._pending += _RECORD.pack(time_ns, source, target, code)
        if len(self._pending) >= _FLUSH_BYTES:
            self._flush()

    def digest(self) -> str:
        """Of everything so far, in hex."""
        self._flush()
        return self._hash.copy().hexdigest()

    def _flush(self) -> None:
        self._hash.update(self._pending)
        self._pending.clear()
