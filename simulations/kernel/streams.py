"""Randomness: a stream of its own for every node and every purpose.

With one stream for all, a node more would change every draw after its first. Here node 7's jitter
is a function of the seed, "7" and "jitter" alone, so two runs that differ in one number can be
compared draw by draw (common random numbers).
"""

from __future__ import annotations

import hashlib
import random


def stream(seed: int, *path: str | int) -> random.Random:
    """The generator of `path` under `seed`; the same on every machine."""
    return random.Random(number(seed, *path))


def number(seed: int, *path: str | int) -> int:
    """One number of 64 bits, as a hash of where it is used."""
    name = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
