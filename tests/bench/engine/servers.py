"""The two that are compared, on the same file with the same slots and context.

`Setting` says what may differ: as they come, or with equal threads that spin alike.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import llama_cpp.llama_cpp as llama

from meshnode.engine.child_process import CHILD_ENVIRONMENT
from tests.bench.engine.build import libraries
from tests.bench.machine import cpu_used_s
from tests.e2e.mesh import MODEL_NAME, Mesh, Models, NodeProcess

SLOTS = 8
CONTEXT_TOKENS = 8192
FLAGS = f"""--context {CONTEXT_TOKENS} --slots {SLOTS}
    --api 127.0.0.1:0 --listen /ip4/127.0.0.1/udp/0/quic-v1 --no-mdns""".split()
START_S = 120.0
NEIGHBOUR = "while True: pass"


@dataclass(frozen=True)
class Setting:
    """`threads` None: each chooses by itself, and spins as it comes. `neighbours`: so many
    processes want a core each all the time."""

    threads: int | None = None
    neighbours: int = 0

    def __str__(self) -> str:
        how = (
            "both with their defaults"
            if self.threads is None
            else f"both with {self.threads} threads and GOMP_SPINCOUNT=0"
        )
        beside = f", beside {self.neighbours} busy neighbours" if self.neighbours else ""
        return how + beside


@dataclass(frozen=True)
class Server:
    """One of the two, answering; `pids` by part."""

    name: str
    url: str
    pids: Mapping[str, int]

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds that each part has used so far."""
        return {part: cpu_used_s(pid) for part, pid in self.pids.items()}


@contextmanager
def our_node(model: Path, setting: Setting, folder: Path) -> Iterator[Server]:
    """`meshnode serve` and its engine process."""
    with Mesh(folder, Models(model, model)) as mesh:
        command = (*_program(setting), "serve", *mesh.models.flags(MODEL_NAME), *FLAGS)
        node = mesh.run("node", command)
        node.wait_ready()
        yield Server("ours", node.url, {"node": node.process.pid, "engine": _engine_of(node)})


def _program(setting: Setting) -> tuple[str, ...]:
    if setting.threads is None:
        return ("-m", "meshnode")
    return ("-m", "tests.bench.engine.serve", str(setting.threads))


def _engine_of(node: NodeProcess) -> int:
    (engine,) = node.children()
    return engine.pid


@contextmanager
def llama_server(
    program: Path,
    model: Path,
    setting: Setting,
    folder: Path,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """llama-server as it comes, but for what is to be equal, and for more `flags`."""
    port = free_port()
    command = [program, "--model", model, "--alias", MODEL_NAME, "--port", str(port)]
    command += ["--parallel", str(SLOTS), "--ctx-size", str(CONTEXT_TOKENS), "--kv-unified"]
    place = native_environment(spins=setting.threads is None) | dict(environment or {})
    if setting.threads is not None:
        threads = str(setting.threads)
        command += ["--threads", threads, "--threads-batch", threads]
    command += flags
    log_path = folder / "llama-server.log"
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=place
        ) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_healthy(url, process, log_path)
            yield Server("llama-server", url, {"server": process.pid})
        finally:
            process.kill()


def native_environment(spins: bool) -> dict[str, str]:
    """Of a program that runs on the installed libraries."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries())}
    environment.pop("GOMP_SPINCOUNT", None)
    if not spins:
        environment["GOMP_SPINCOUNT"] = CHILD_ENVIRONMENT["GOMP_SPINCOUNT"]
    return environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=START_S)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, HTTPException):
            pass  # not yet
        finally:
            connection.close()
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"llama-server did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


@contextmanager
def neighbours(count: int) -> Iterator[list[int]]:
    """So many processes that never sleep, in sessions of their own: to the kernel's scheduler
    they are other users' programs."""
    processes = [
        subprocess.Popen([sys.executable, "-c", NEIGHBOUR], start_new_session=True)
        for _ in range(count)
    ]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def end_tokens(model: Path) -> list[int]:
    """The tokens that would end an answer."""
    llama.llama_log_set(_silent, None)
    params = llama.llama_model_default_params()
    params.vocab_only = True
    loaded = llama.llama_model_load_from_file(os.fsencode(model), params)
    if not loaded:
        raise SystemExit(f"{model} cannot be loaded")
    try:
        vocabulary = llama.llama_model_get_vocab(loaded)
        return [
            token
            for token in range(llama.llama_vocab_n_tokens(vocabulary))
            if llama.llama_vocab_is_eog(vocabulary, token)
        ]
    finally:
        llama.llama_model_free(loaded)


@llama.llama_log_callback
def _silent(_level: int, _text: bytes, _data: object) -> None:
    pass
