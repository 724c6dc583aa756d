"""python -m tests.bench.engine: our node against llama-server; --help tells the options."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from tests.bench.engine.measure import (
    PAIRS_DEFAULT,
    PROMPTS,
    SESSIONS,
    Plan,
    as_json,
    as_text,
    measure,
)
from tests.bench.engine.servers import Setting


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.engine", description="Our node against llama-server, in turns."
    )
    add = parser.add_argument
    add("--pairs", type=int, default=PAIRS_DEFAULT, help="how often each load is put on both")
    add("--sessions", type=int, nargs="+", default=SESSIONS, metavar="N", help="at once")
    add("--prompts", nargs="+", choices=PROMPTS, default=tuple(PROMPTS), help="which lengths")
    add("--model", type=Path, metavar="GGUF", help="instead of the small default model")
    add("--threads", type=int, metavar="N", help="of both engines, and neither spins")
    add("--neighbour", type=int, default=0, metavar="N", help="processes that want a core each")
    add("--json", type=Path, metavar="FILE", help="where all runs go as well")
    options = parser.parse_args()
    # What has been measured by then is reported, and both servers end with us. (Shells let what
    # they start in the background ignore the first of the two.)
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    plan = Plan(
        options.pairs,
        tuple(options.sessions),
        tuple(options.prompts),
        Setting(options.threads, options.neighbour),
        options.model,
    )
    report = measure(plan, lambda text: print(text, file=sys.stderr))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(report), indent=1))
    print(as_text(report))


if __name__ == "__main__":
    main()
