"""Build the llama-cpp-python wheel once for this machine and remember it.

There is no binary wheel to download, and a build takes minutes. The wheel is
compiled for this very CPU (GGML_NATIVE), so it is kept under a key made of
everything that changes the result: version, CMake flags, Python, platform and
CPU features. Prints the folder that holds the wheel; talks about progress on
stderr. It installs nothing.

    build_llama_wheel.py [--where]      --where prints the folder and builds nothing

Environment:
    LLAMA_CMAKE_ARGS       flags of your own, e.g. -DGGML_CUDA=on
    MESHNODE_WHEEL_CACHE   a folder to share between checkouts, default .cache/wheels
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
HOOK = ROOT / "scripts" / "llama_trimmed.cmake"
LOG = ROOT / ".cache" / "llama-build.log"

REPORT_PERIOD_S = 15.0  # without a terminal: often enough to see life, few enough to read
LOG_TAIL_LINES = 40  # holds a compiler error with its context
STEPS_MIN = 8  # earlier, the time left would be a guess from configuring alone
NINJA_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] ")


def wanted_version() -> str:
    """Return the llama-cpp-python version that requirements.lock pins."""
    found = re.search(r"^llama-cpp-python==(\S+)$", LOCK.read_text(), re.MULTILINE)
    if found is None:
        fail(f"{LOCK.name} does not pin llama-cpp-python")
    return found[1]


def cpu_features() -> list[str]:
    """Return what -march=native depends on, as far as this system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        # x86 calls the line "flags", ARM "Features".
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
        if found is not None:
            return sorted(found[1].split())
    return [platform.machine(), platform.processor()]


def wheel_folder(version: str, own_flags: str) -> Path:
    """Return where a wheel for exactly this build belongs."""
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    ingredients = {
        "version": version,
        "flags": shlex.split(own_flags),
        "hook": HOOK.read_text(),
        "python": python_tag,
        "platform": sysconfig.get_platform(),
        "cpu": cpu_features(),
    }
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    cache = Path(os.environ.get("MESHNODE_WHEEL_CACHE") or ROOT / ".cache" / "wheels")
    return cache.resolve() / f"llama-cpp-python-{version}-{python_tag}-{digest[:12]}"


class Progress:
    """One line that rewrites itself on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._reported = self._started
        self._on_terminal = sys.stderr.isatty()

    def elapsed_s(self) -> float:
        """Return seconds since the build began."""
        return time.monotonic() - self._started

    def show(self, text: str) -> None:
        """Report that the build stands at `text`."""
        now = time.monotonic()
        line = f"  llama.cpp: {text}, {clock(self.elapsed_s())} elapsed"
        if self._on_terminal:
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        elif now - self._reported >= REPORT_PERIOD_S:
            self._reported = now
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the cursor on a fresh line."""
        if self._on_terminal:
            print(file=sys.stderr)


def clock(duration_s: float) -> str:
    """Write a duration as m:ss."""
    minutes, seconds = divmod(int(duration_s), 60)
    return f"{minutes}:{seconds:02}"


def build(version: str, own_flags: str, target: Path) -> int:
    """Compile the wheel into `target`; return pip's exit code.

    The full output goes to LOG. The wheel appears in `target` in one rename,
    so an interrupted build leaves nothing that looks finished.
    """
    flags = f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={shlex.quote(str(HOOK))}"
    environment = os.environ | {"CMAKE_ARGS": f"{flags} {own_flags}".strip()}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as scratch:
        # No pip cache: it files wheels by version alone and would hand back one
        # that was compiled with other flags.
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir"]
        command += ["--no-binary=llama-cpp-python", f"--wheel-dir={scratch}"]
        command += [f"llama-cpp-python=={version}"]
        status = run_with_progress(command, environment, LOG)
        if status == 0:
            target.mkdir(exist_ok=True)
            for wheel in Path(scratch).glob("*.whl"):
                wheel.replace(target / wheel.name)
    return status


def run_with_progress(command: list[str], environment: dict[str, str], log_path: Path) -> int:
    """Run a build, log every line and turn ninja's counters into progress; its exit code."""
    progress = Progress()
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as building,
    ):
        assert building.stdout is not None
        print(f"CMAKE_ARGS={environment.get('CMAKE_ARGS', '')}", file=log)
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        compiling_since_s: float | None = None
        for line in building.stdout:
            log.write(line)
            log.flush()
            step = NINJA_STEP.match(line)
            if step is None:
                if compiling_since_s is None:
                    progress.show("fetching and configuring")
                continue
            if compiling_since_s is None:
                compiling_since_s = progress.elapsed_s()
            done, total = int(step[1]), int(step[2])
            text = f"step {done} of {total}"
            if STEPS_MIN <= done < total:
                spent_s = progress.elapsed_s() - compiling_since_s
                text += f", about {clock(spent_s * (total - done) / done)} left"
            progress.show(text)
        progress.close()
    return building.returncode


def fail(message: str) -> NoReturn:
    """Print the reason and end with exit code 1."""
    print(message, file=sys.stderr)
    sys.exit(1)


def main() -> None:
    """Print the folder of a wheel for this machine, building it if need be."""
    parser = argparse.ArgumentParser(description="Build the engine's wheel once per machine.")
    parser.add_argument("--where", action="store_true", help="print the folder, build nothing")
    only_where = parser.parse_args().where

    version = wanted_version()
    own_flags = os.environ.get("LLAMA_CMAKE_ARGS", "")
    target = wheel_folder(version, own_flags)
    if not only_where and not any(target.glob("*.whl")):
        started = time.monotonic()
        print(
            f"Compiling llama-cpp-python {version} for this CPU, once: "
            f"3 to 5 minutes on 2 cores (log: {LOG.relative_to(ROOT)})",
            file=sys.stderr,
        )
        if status := build(version, own_flags, target):
            with LOG.open() as log:
                sys.stderr.writelines(deque(log, maxlen=LOG_TAIL_LINES))
            if own_flags:
                print(
                    f"\nIt was built with {own_flags}; "
                    "`make setup LLAMA_CMAKE_ARGS=` goes back to no flags of your own.",
                    file=sys.stderr,
                )
            fail(f"Building llama-cpp-python failed (exit {status}); full log: {LOG}")
        print(f"Built in {clock(time.monotonic() - started)}.", file=sys.stderr)
    print(target)


if __name__ == "__main__":
    main()
