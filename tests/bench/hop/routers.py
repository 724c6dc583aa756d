"""A router of others in front of a bare app: what a hop costs in Rust over plain HTTP.

Installed from PyPI into an environment of its own under `.cache/bench`, once.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.mesh import ROOT

ROUTER = "vllm-router==0.1.17"
ENVIRONMENT = ROOT / ".cache" / "bench" / ROUTER.replace("==", "-")
INSTALL_S_MAX = 120.0
START_S_MAX = 20.0


def installed_router() -> Path | None:
    """The router's program; None if it cannot be had, which is said on standard error."""
    program = ENVIRONMENT / "bin" / "vllm-router"
    if program.exists():
        return program
    print(f"installing {ROUTER} under {ENVIRONMENT.relative_to(ROOT)}", file=sys.stderr)
    try:
        _call(sys.executable, "-m", "venv", str(ENVIRONMENT))
        _call(str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", ROUTER)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"no comparison with {ROUTER}: it cannot be installed ({error})", file=sys.stderr)
        return None
    return program


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_S_MAX)


@contextmanager
def running_router(program: Path, backend: str, log: Path) -> Iterator[tuple[str, int]]:
    """Its URL and process id, once it passes requests on to `backend`."""
    port, metrics_port = _free_port(), _free_port()
    command = [
        str(program),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-port", str(metrics_port), "--log-level", "error"),
        *("--worker-urls", backend, "--policy", "round_robin"),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_answering(f"{url}/v1/models", process)
        yield url, process.pid
    finally:
        process.kill()
        process.wait()


def _wait_answering(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S_MAX
    while True:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(url, timeout=START_S_MAX),
        ):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{ROUTER} does not pass requests on")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
