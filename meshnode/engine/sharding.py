"""Making an expert shard and measuring it, in a child process: what is ordered, what comes back.

Decides how the child is watched: its progress is passed on, its death is a `ShardError`. Does not
know llama.cpp, nor sign anything; the child has no key.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from meshnode.config import Ranking
from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.errors import ShardError
from meshnode.models.receipt import Quality

# Of each text: enough that the figures' noise is well below what they tell apart (an eighth of a
# nat moves by a hundredth), few enough that a large model reads them in minutes.
TEXT_TOKENS_MAX = 16_384
# Long enough for experts of grammar and topic to show, short enough for any trained context.
WINDOW_TOKENS = 256
# What is told of the log of a child that died.
_LOG_CHARS_MAX = 500


class Order(Struct, frozen=True, forbid_unknown_fields=True):
    """Keep `kept` experts of each layer of `source` and write the shard to `destination`.

    `source_digest` is what the shard says it was cut from.
    """

    source: str
    source_digest: str
    destination: str
    kept: int
    ranking: Ranking
    calibration: str
    held_out: str
    threads: int


class Progress(Struct, frozen=True, forbid_unknown_fields=True, tag="progress"):
    """`fraction` of all the work is done."""

    doing: Literal["ranking", "cutting", "measuring"]
    fraction: float


class Made(Struct, frozen=True, forbid_unknown_fields=True, tag="made"):
    """The shard is written, and this good."""

    architecture: str
    layers: int
    of: int
    used: int
    calibration_tokens: int
    held_out_tokens: int
    quality: Quality
    llama_cpp_python: str


class Failed(Struct, frozen=True, forbid_unknown_fields=True, tag="failed"):
    """It cannot be done."""

    message: str


Told = Progress | Made | Failed


def make_shard(order: Order, on_progress: Callable[[Progress], None]) -> Made:
    """Let a child do it; blocks for minutes with a large model.

    Raises `ShardError`. Whatever ends this ends the child.
    """
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "meshnode.engine.sharding_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **CHILD_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(msgspec.json.encode(order))
            child.stdin.close()
            for line in child.stdout:
                match msgspec.json.decode(line, type=Told):
                    case Progress() as progress:
                        on_progress(progress)
                    case Made() as made:
                        return made
                    case Failed(message):
                        raise ShardError(message)
        except BrokenPipeError:
            pass  # it has ended already; its log says why
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        log.seek(0)
        said = log.read().decode("utf-8", "replace").strip()
    raise ShardError(f"The process that makes the shard ended: {said[-_LOG_CHARS_MAX:]}")
