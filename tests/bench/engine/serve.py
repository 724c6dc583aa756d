"""python -m tests.bench.engine.serve THREADS serve ...: `meshnode serve`, but for its engine's
threads, which no flag fixes."""

from __future__ import annotations

import sys
from functools import partial

import meshnode.hosted
from meshnode.cli import main
from meshnode.engine.process import EngineOptions


def fix_threads() -> None:
    """To the first argument, which is taken away."""
    threads = int(sys.argv.pop(1))
    meshnode.hosted.EngineOptions = partial(EngineOptions, threads=threads)


if __name__ == "__main__":
    fix_threads()
    main()
