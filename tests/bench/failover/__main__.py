"""python -m tests.bench.failover [--kills N] [--json]"""

from __future__ import annotations

import argparse
import json

from tests.bench.failover.measure import KILLS_DEFAULT, as_json, as_text, measure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.failover", description=measure.__doc__
    )
    parser.add_argument("--kills", type=int, default=KILLS_DEFAULT)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measure(options.kills)
    print(json.dumps(as_json(report), indent=1) if options.json else as_text(report))


if __name__ == "__main__":
    main()
