"""Say, in one line to copy, what a bare machine still needs before `make setup`.

Runs under the system's own Python, before any virtual environment exists, so
it uses the standard library only. It decides what is missing; it installs
nothing and knows nothing of what is built afterwards.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PYTHON_MIN = (3, 11)  # exception groups, tomllib

# Where a header may lie when there is no compiler yet to ask.
HEADER_FOLDERS = ("/usr/include", "/usr/include/*", "/usr/local/include", "/opt/homebrew/include")


class Need(NamedTuple):
    """One thing the build uses, why, and the Debian package that brings it."""

    what: str
    reason: str
    debian_package: str
    is_present: Callable[[], bool]


def has_header(name: str) -> bool:
    """Ask the C preprocessor; without one, look where headers usually lie."""
    if compiler := shutil.which("cc"):
        probe = subprocess.run(
            [compiler, "-E", "-x", "c", "-"],
            input=f"#include <{name}>\n",
            text=True,
            capture_output=True,
            check=False,
        )
        return probe.returncode == 0
    return any(Path("/").glob(f"{folder[1:]}/{name}") for folder in HEADER_FOLDERS)


NEEDS = (
    Need("cc", "compiles fastecdsa", "build-essential", lambda: bool(shutil.which("cc"))),
    Need("c++", "compiles llama.cpp", "build-essential", lambda: bool(shutil.which("c++"))),
    Need(
        "Python.h",
        "compiles fastecdsa",
        "python3-dev",
        lambda: Path(sysconfig.get_path("include"), "Python.h").exists(),
    ),
    Need(
        "ensurepip",
        "puts pip into the virtual environment",
        "python3-venv",
        lambda: importlib.util.find_spec("ensurepip") is not None,
    ),
    Need("gmp.h", "compiles fastecdsa", "libgmp-dev", lambda: has_header("gmp.h")),
)


def main() -> int:
    """Return 0 when all is there; else name what is missing and return 1."""
    if sys.version_info < PYTHON_MIN:
        wanted = ".".join(map(str, PYTHON_MIN))
        have = ".".join(map(str, sys.version_info[:3]))
        print(
            f"meshnode needs Python {wanted} or newer; {sys.executable} is {have}.\n"
            f"Name another one: make setup PYTHON=python{wanted}",
            file=sys.stderr,
        )
        return 1
    missing = [need for need in NEEDS if not need.is_present()]
    if not missing:
        return 0
    for need in missing:
        print(f"missing: {need.what:<10} ({need.reason})", file=sys.stderr)
    packages = dict.fromkeys(need.debian_package for need in missing)
    print(f"\napt-get install -y {' '.join(packages)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
