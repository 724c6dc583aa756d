"""python -m tests.bench.split.serve THREADS ADDRESS serve ...: `meshnode serve`, but that its
engine has so many threads, and that peers are told ADDRESS, which is a link to it."""

from __future__ import annotations

import sys

import meshnode.node
from meshnode.cli import main
from tests.bench.engine.serve import fix_threads

if __name__ == "__main__":
    fix_threads()
    address = sys.argv.pop(1)
    meshnode.node.advertised = lambda _bound: (address,)
    main()
