"""What is compared: two and three stages, the whole model, and llama.cpp's RPC: a head that has one
half and a server for the other, and a head that has nothing and two servers.

All have as many slots and as much context. Each stage, and each half, has one thread, as if on a
machine of its own with one core; the whole model has all cores of this one, and as many threads as
its node finds to pay. Each process has a file of its own, as each machine has its own disk.
Requests go to whoever has the last layers, straight: only what crosses between the parts is
delayed.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from meshnode.models.digest import digest_blocking
from meshnode.models.gguf import read_header
from meshnode.models.stages import cut
from tests.bench.engine.build import compiled, llama_server
from tests.bench.engine.servers import SLOTS, Setting, free_port, native_environment
from tests.bench.engine.servers import llama_server as running_llama_server
from tests.bench.machine import cpu_used_s
from tests.bench.split.links import Crossed, Link, Links
from tests.bench.split.reading import bytes_read, forget
from tests.e2e.mesh import HANG_S, MODEL_NAME, POLL_S, Json, Mesh, Models, NodeProcess

CONTEXT_TOKENS = 2048
"""Eight sessions of a short prompt and a short answer take a third of it."""
SIZES = ("--context", str(CONTEXT_TOKENS), "--slots", str(SLOTS))
MEMORY = {2: "300MiB", 3: "260MiB"}
"""Of each node. With this context the whole model takes 322 MiB, all that a process needs for
itself included: so the mesh has to cut it into so many parts."""
WHOLE = "whole"
RPC = {1: "RPC", 2: "RPC x2"}
RPC_PROJECT = Path(__file__).parent / "rpc"


@dataclass(frozen=True)
class Part:
    """What one process had to load: bytes of its layers in the file, and bytes read of the file."""

    first: int
    end: int
    own_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class Load:
    """`start_s`: from no process to answers; `load_s` of them with layers being loaded.
    `crossed_bytes` is what crossed links until then."""

    start_s: float
    load_s: float
    parts: tuple[Part, ...]
    crossed_bytes: int = 0


@dataclass(frozen=True)
class System:
    """One of them, answering. `engines` compute, and `nodes` do all else. `crossings` counts how
    often the work of a step has crossed a link so far, and raises `RuntimeError` if none can any
    more; it is None where only the link itself can tell.
    Of activations, `token_numbers` cross all links together for a token."""

    name: str
    url: str
    nodes: tuple[int, ...]
    engines: tuple[int, ...]
    links: tuple[Link, ...]
    load: Load
    crossings: Callable[[], int] | None = None
    token_numbers: int = 0

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds that its nodes and its engines have used so far."""
        return sum(map(cpu_used_s, self.nodes)), sum(map(cpu_used_s, self.engines))


# --- our nodes ----------------------------------------------------------------------------------


@contextmanager
def whole(model: Path, folder: Path) -> Iterator[System]:
    """One node that has all of it."""
    with Mesh(folder, Models(model, model)) as mesh:
        file = _own_file(model, folder, "whole")
        began_at = time.monotonic()
        listen = "/ip4/127.0.0.1/udp/0/quic-v1"
        flags = _serve_flags("--model", file, listen)
        node = mesh.run("whole", ("-m", "meshnode", "serve", *SIZES, *flags))
        node.wait_started()
        loading_at = time.monotonic()
        node.wait_ready()
        now = time.monotonic()
        part = Part(0, read_header(model).layers, file.stat().st_size, bytes_read(file))
        load = Load(now - began_at, now - loading_at, (part,))
        yield System(WHOLE, node.url, *_pids([node]), (), load)


@contextmanager
def split(
    stages: int, model: Path, links: Links, folder: Path, flags: Sequence[str]
) -> Iterator[System]:
    """So many nodes with these `flags`, none of which can hold all of it, and who reach each other
    by links alone."""
    with Mesh(folder, Models(model, model)) as mesh:
        files = [_own_file(model, folder, f"{stages}-{place}") for place in range(stages)]
        ports = [_free_udp_port() for _ in range(stages)]
        opened = tuple(links.open("udp", port) for port in ports)
        began_at = time.monotonic()
        nodes: list[NodeProcess] = []
        for file, port, link in zip(files, ports, opened, strict=True):
            address = f"/ip4/127.0.0.1/udp/{link.port}/quic-v1"
            listen = f"/ip4/127.0.0.1/udp/{port}/quic-v1"
            command = ["-m", "tests.bench.split.serve", "1", address, "serve", *SIZES]
            command += ["--memory", MEMORY[stages], *flags]
            command += _serve_flags("--standby", file, listen)
            if nodes:
                command += ["--join", nodes[0].invite()]
            nodes.append(mesh.run(file.stem, command).wait_started())
        head, load_s = _wait_ring(nodes)
        start_s = time.monotonic() - began_at
        parts = [
            _part(file, node.status()["models"][0]["parts"][0])
            for file, node in zip(files, nodes, strict=True)
        ]
        parts.sort(key=lambda part: part.first)
        load = Load(start_s, load_s, tuple(parts), links.crossed(*opened).bytes)

        def crossings() -> int:
            return stages * int(_head_part(head)["steps"])

        numbers = (stages - 1) * read_header(model).embedding_length
        name = f"{stages} stages"
        yield System(name, head.url, *_pids(nodes), opened, load, crossings, numbers)


def _serve_flags(option: str, file: Path, listen: str) -> tuple[str, ...]:
    where = ("--listen", listen, "--api", "127.0.0.1:0", "--no-mdns")
    return (option, f"{file}={MODEL_NAME}", *where)


def _wait_ring(nodes: Sequence[NodeProcess]) -> tuple[NodeProcess, float]:
    """The node that answers, as soon as all layers are in a ring, and for how long layers were
    being loaded until then."""
    loading_at, ready_at = 0.0, 0.0
    deadline = time.monotonic() + HANG_S
    while True:
        told = [node.status()["models"][0] for node in nodes]
        now = time.monotonic()
        parts = [part for model in told for part in model["parts"]]
        if parts and not loading_at:
            loading_at = now
        if len(parts) == len(nodes) and all(part["state"] == "ready" for part in parts):
            ready_at = ready_at or now
        for node, model in zip(nodes, told, strict=True):
            if model["ring"] and model["state"] == "ready":
                return node, ready_at - loading_at
        if now > deadline:
            raise SystemExit(f"never became a ring: {told}\n{nodes[0].log_tail()}")
        time.sleep(POLL_S)


def _head_part(head: NodeProcess) -> Json:
    model = head.status()["models"][0]
    if not model["ring"]:
        raise RuntimeError(f"the ring broke while it was measured:\n{head.log_tail()}")
    return dict(model["parts"][-1])


def _part(file: Path, part: Json) -> Part:
    first, end = int(part["first"]), int(part["end"])
    return Part(first, end, cut(file, first, end).source_bytes, bytes_read(file))


def _own_file(model: Path, folder: Path, name: str) -> Path:
    """A copy that nobody has read since, for the node of this name, which knows its digest."""
    file = folder / f"{name}.gguf"
    shutil.copyfile(model, file)
    digest_blocking(file, folder / name / "cache")
    forget(file)
    return file


def _pids(nodes: Sequence[NodeProcess]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the nodes, and of what they have started."""
    started = [child.pid for node in nodes for child in node.children()]
    return tuple(node.process.pid for node in nodes), tuple(started)


def _free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- llama.cpp's --------------------------------------------------------------------------------


@contextmanager
def rpc(servers: int, model: Path, links: Links, folder: Path) -> Iterator[System]:
    """llama-server with the first half of the layers, and an RPC server for the second half and
    the output, which is what `--n-gpu-layers` gives it; or two servers that share all of it."""
    server, backend = compiled(RPC_PROJECT, ("ggml-rpc-server", "libggml-rpc.so"), "half a minute")
    program = llama_server()
    file = folder / "rpc.gguf"
    shutil.copyfile(model, file)
    forget(file)
    environment = {"LD_PRELOAD": str(backend)}
    began_at = time.monotonic()
    with ExitStack() as stack:
        running = [
            stack.enter_context(_rpc_server(server, environment, folder / f"server-{place}.log"))
            for place in range(servers)
        ]
        opened = tuple(links.open("tcp", port) for port, _ in running)
        layers = read_header(file).layers
        given = layers + 1 if servers > 1 else layers - layers // 2 + 1  # and the output
        where = ",".join(f"127.0.0.1:{link.port}" for link in opened)
        flags = ["--rpc", where, "--n-gpu-layers", str(given), "--ctx-size", str(CONTEXT_TOKENS)]
        # Otherwise it saves what a slot held before it is asked something else, row by row and
        # each with a round trip: minutes at 20 ms.
        flags += ["--cache-ram", "0"]
        loading_at = time.monotonic()
        head = stack.enter_context(
            running_llama_server(program, file, Setting(threads=1), folder, flags, environment)
        )
        now = time.monotonic()
        part = Part(0, layers, file.stat().st_size, bytes_read(file))
        crossed_bytes = links.crossed(*opened).bytes
        load = Load(now - began_at, now - loading_at, (part,), crossed_bytes)
        pids = (*(pid for _, pid in running), *head.pids.values())
        yield System(RPC[servers], head.url, (), pids, opened, load)


@contextmanager
def _rpc_server(
    program: Path, environment: Mapping[str, str], log_path: Path
) -> Iterator[tuple[int, int]]:
    """Its port and process id."""
    port = free_port()
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            [program, "--host", "127.0.0.1", "--port", str(port), "--threads", "1"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**native_environment(spins=False), **environment},
        ) as process,
    ):
        try:
            _wait_listening(port, process)
            yield port, process.pid
        finally:
            process.kill()


def _wait_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the RPC server did not start") from None
            time.sleep(POLL_S)
        else:
            return


def crossed(system: System, links: Links) -> Crossed:
    """By its links so far; turns as it counts them itself, if it does."""
    by_links = links.crossed(*system.links)
    if system.crossings is None:
        return by_links
    return Crossed(by_links.bytes, system.crossings())
