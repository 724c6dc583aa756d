"""python -m tests.bench.placement [--quick]"""

from __future__ import annotations

import argparse

from tests.bench.placement.measure import as_text, measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.placement")
    parser.add_argument("--quick", action="store_true", help="a tenth of the meshes")
    print(as_text(measure(quick=parser.parse_args().quick)))


if __name__ == "__main__":
    main()
