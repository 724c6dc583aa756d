"""python -m tests.bench.moe [--model FILE] [--calibration FILE] [--held-out FILE] [--json]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.bench.moe.measure import MODEL, TEXTS, as_json, as_text, measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.moe")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=TEXTS / "calibration.txt")
    parser.add_argument("--held-out", type=Path, default=TEXTS / "held-out.txt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measure(options.model, options.calibration, options.held_out, options.threads)
    print(json.dumps(as_json(report), indent=1) if options.json else as_text(report))


if __name__ == "__main__":
    main()
