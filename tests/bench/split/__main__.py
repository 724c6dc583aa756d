"""python -m tests.bench.split: stages, the whole model and RPC; --help tells the options."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from tests.bench.split.measure import (
    DELAYS_MS,
    PAIRS_DEFAULT,
    SESSIONS,
    STAGES,
    Plan,
    as_json,
    as_text,
    measure,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.split",
        description="A model cut by layers, whole, and half behind llama.cpp's RPC, in turns.",
    )
    add = parser.add_argument
    add("--delays", type=float, nargs="+", default=DELAYS_MS, metavar="MS", help="one way")
    add("--sessions", type=int, nargs="+", default=SESSIONS, metavar="N", help="at once")
    add("--stages", type=int, nargs="+", default=STAGES, choices=STAGES, help="how many nodes")
    add("--pairs", type=int, default=PAIRS_DEFAULT, metavar="N", help="rounds over all points")
    add("--speculate", choices=("off", "lookup", "auto"), default="off", help="of the stages")
    add("--activations", choices=("f32", "f16", "i8"), default="f32", help="between the stages")
    add("--model", type=Path, metavar="GGUF", help="instead of the small default model")
    add("--json", type=Path, metavar="FILE", help="where all runs go as well")
    options = parser.parse_args()
    # What has been measured by then is reported, and all nodes end with us. (Shells let what they
    # start in the background ignore the first of the two.)
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    plan = Plan(
        options.pairs,
        tuple(options.delays),
        tuple(options.sessions),
        tuple(options.stages),
        options.speculate,
        options.activations,
        options.model,
    )
    report = measure(plan, lambda text: print(text, file=sys.stderr))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(report), indent=1))
    print(as_text(report))


if __name__ == "__main__":
    main()
