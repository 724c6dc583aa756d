"""python -m tests.bench.sim [--quick | --nodes N ...]"""

from __future__ import annotations

import argparse

from tests.bench.sim.measure import SIZES, SIZES_QUICK, as_text, measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sim")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="meshes of tens of nodes")
    sizes.add_argument("--nodes", type=int, nargs="+", default=SIZES, metavar="N")
    given = parser.parse_args()
    print(as_text(measure(SIZES_QUICK if given.quick else given.nodes)))


if __name__ == "__main__":
    main()
