"""Real nodes in real processes, and what a test does with them.

`Mesh` starts processes in a folder and ends every one of them; `NodeProcess` is one node: its
command line, its status, its API. Everything is synchronous and has a deadline; nothing here
imports meshnode, so a test sees a node as an operator and a client do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).parents[2]
MODEL_NAME = "small"
OTHER_NAME = "other"

HANG_S = 90.0
"""A guard, not an expectation: two slow cores start five nodes at once."""
POLL_S = 0.05
STOP_S = 15.0
LOG_TAIL_BYTES = 6_000
QUESTION = "What is the capital of France? Answer in one sentence."

SHIFTED_CLOCK = """
import time
_true = time.time
time.time = lambda: _true() + {skew_s}
"""

Json = dict[str, Any]


@dataclass(frozen=True)
class Models:
    """Two files with different content: the packaged model as shipped, and requantised."""

    small: Path
    other: Path

    def flags(self, *names: str, option: str = "--model") -> tuple[str, ...]:
        """`--model`, or another option, for each of `MODEL_NAME` and `OTHER_NAME`."""
        files = {MODEL_NAME: self.small, OTHER_NAME: self.other}
        return tuple(flag for name in names for flag in (option, f"{files[name]}={name}"))


@dataclass(frozen=True)
class Reply:
    """One answer as a client sees it; `events` are the data lines of a stream."""

    status: int
    headers: Mapping[str, str]
    body: Json
    events: tuple[str, ...] = ()
    first_token_s: float = 0.0

    @property
    def served_by(self) -> str:
        return self.headers["x-meshnode-served-by"]

    @property
    def route(self) -> str:
        return self.headers["x-meshnode-route"]

    @property
    def text(self) -> str:
        if not self.events:
            choice = self.body["choices"][0]
            return str(choice["message"]["content"] if "message" in choice else choice["text"])
        chunks = [json.loads(event) for event in self.events if event != "[DONE]"]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk.get("choices", ())]
        return "".join(delta.get("content") or "" for delta in deltas)

    @property
    def cached_tokens(self) -> int:
        return int(self.body["usage"]["prompt_tokens_details"]["cached_tokens"])

    @property
    def error(self) -> Json:
        return dict(self.body["error"])


def chat(*turns: str, **fields: object) -> Json:
    """A chat request: user and assistant turns in alternation, greedy, short."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {
        "model": MODEL_NAME,
        "messages": messages,
        "max_tokens": 12,
        "temperature": 0,
        **fields,
    }


class NodeProcess:
    """A running `meshnode serve`, `meshnode client` or bootstrap process."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        *,
        data_dir: Path | None = None,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        inside: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`prefix` runs the command elsewhere (another namespace); `inside` enters that place
        for as long as it takes to connect a socket."""
        self.name = name
        self.command = tuple(command)
        self.place: dict[str, Any] = {"env": env, "prefix": prefix, "inside": inside}
        self.data_dir = data_dir or folder / name
        self.log = folder / f"{name}.log"
        self.started: Json = {}
        self._inside = inside
        self._out = folder / f"{name}.out"
        self._at = time.monotonic()
        with self._out.open("wb") as out, self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *command, "--data-dir", str(self.data_dir), "--json"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=_environment(env),
                start_new_session=True,
            )

    # --- life -----------------------------------------------------------------------------------

    def wait_started(self) -> NodeProcess:
        """Until it has said where it is; raises with its log if it ends instead."""
        deadline = time.monotonic() + HANG_S
        while b"\n" not in (said := self._out.read_bytes()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} did not start: {said!r}\n{self.log_tail()}")
            time.sleep(POLL_S)
        self.started = json.loads(said)
        if "error" in self.started:
            raise AssertionError(f"{self.name} did not start: {self.started}")
        return self

    def wait_ready(self) -> NodeProcess:
        if not self.started:
            self.wait_started()
        self.wait_until(lambda status: status["ready"])
        return self

    def wait_until(self, holds: Callable[[Json], object], within_s: float = HANG_S) -> float:
        """Seconds until the node's status made `holds` true; fails after `within_s`."""
        begun = time.monotonic()
        while True:
            status = self.status()
            if holds(status):
                return time.monotonic() - begun
            if time.monotonic() - begun > within_s:
                raise AssertionError(
                    f"{self.name} never came to it in {within_s} s; last status:\n"
                    + json.dumps(status, indent=1)
                )
            time.sleep(POLL_S)

    def terminate(self) -> int:
        """Stop in good order; the exit code."""
        self.process.terminate()
        return self.process.wait(STOP_S)

    def kill(self) -> None:
        """Gone without a word, as by the kernel."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Silent but not gone: its sockets stay open."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        """Whatever is left of it, now."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # the node has taken its engines with it

    def log_tail(self) -> str:
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")

    # --- what it says of itself -----------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        return str(self.started["peer_id"])

    @property
    def addrs(self) -> list[str]:
        return list(self.started["addrs"])

    @property
    def url(self) -> str:
        return str(self.started["api_url"])

    def status(self) -> Json:
        return self.request("GET", "/api/status").body

    def peers(self) -> set[str]:
        return {peer["peer_id"] for peer in self.status()["peers"]}

    def invite(self, uses: int = 20, role: str = "node") -> str:
        reply = self.request("POST", "/api/invite", {"uses": uses, "role": role})
        assert reply.status == 200, reply
        return str(reply.body["token"])

    # --- its API --------------------------------------------------------------------------------

    @contextmanager
    def answering(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = HANG_S,
    ) -> Iterator[HTTPResponse]:
        """An open answer; leaving the block hangs up. Bytes go out as they are, all else as
        JSON."""
        parts = urlsplit(self.url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
        payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            with self._inside():
                connection.connect()
            sent = {"content-type": "application/json", **(headers or {})}
            connection.request(method, path, payload, sent)
            yield connection.getresponse()
        finally:
            connection.close()

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = HANG_S,
    ) -> Reply:
        with self.answering(method, path, body, headers, timeout_s) as response:
            data = response.read()
            return Reply(response.status, _headers(response), json.loads(data))

    def ask(self, *turns: str, timeout_s: float = HANG_S, **fields: object) -> Reply:
        """A whole chat answer; fails unless it is one."""
        asked = turns or (QUESTION,)
        reply = self.request(
            "POST", "/v1/chat/completions", chat(*asked, **fields), timeout_s=timeout_s
        )
        assert reply.status == 200, f"{self.name}: {reply}"
        return reply

    def stream(self, *turns: str, timeout_s: float = HANG_S, **fields: object) -> Reply:
        """A streamed chat answer, to its end."""
        begun = time.monotonic()
        asked = chat(*(turns or (QUESTION,)), stream=True, **fields)
        with self.answering("POST", "/v1/chat/completions", asked, timeout_s=timeout_s) as response:
            assert response.status == 200, response.read()
            events: list[str] = []
            first_token_s = 0.0
            for event in events_of(response):
                first_token_s = first_token_s or time.monotonic() - begun
                events.append(event)
            return Reply(200, _headers(response), {}, tuple(events), first_token_s)


def events_of(response: HTTPResponse) -> Iterator[str]:
    """The data of each server-sent event as it arrives."""
    while line := response.readline():
        if line.startswith(b"data: "):
            yield line[6:].decode().rstrip("\n")


class Mesh:
    """The processes of one test or module, in one folder. Ends them all when it is left."""

    open: list[Mesh] = []  # noqa: RUF012  those whose logs a failing test shows

    def __init__(self, folder: Path, models: Models) -> None:
        self.folder = folder
        self.models = models
        self.processes: list[NodeProcess] = []

    def __enter__(self) -> Mesh:
        Mesh.open.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        Mesh.open.remove(self)
        for process in self.processes:
            process.end()

    def run(self, name: str, command: Sequence[str], **place: Any) -> NodeProcess:
        process = NodeProcess(name, command, self.folder, **place)
        self.processes.append(process)
        return process

    def node(
        self,
        name: str,
        *flags: str,
        models: Sequence[str] = (MODEL_NAME,),
        standbys: Sequence[str] = (),
        listen: str = "/ip4/127.0.0.1/udp/0/quic-v1",
        mdns: bool = False,
        **place: Any,
    ) -> NodeProcess:
        """Begin to start a node with engines; `wait_started` or `wait_ready` when needed."""
        given = self.models.flags(*models) + self.models.flags(*standbys, option="--standby")
        sizes = ("--context", "2048", "--slots", "4")
        command = ("-m", "meshnode", "serve", *given, *sizes, *_network(listen, mdns), *flags)
        return self.run(name, command, **place)

    def again(self, node: NodeProcess, **place: Any) -> NodeProcess:
        """Begin to start a node that has ended: where and as it was, a member already, but for
        what `place` says."""
        command = list(node.command)
        if "--join" in command:
            at = command.index("--join")
            del command[at : at + 2]
        command[command.index("--listen") + 1] = node.addrs[0].partition("/p2p/")[0]
        return self.run(node.name, command, data_dir=node.data_dir, **{**node.place, **place})

    def gateway(
        self,
        name: str,
        *flags: str,
        listen: str = "/ip4/127.0.0.1/udp/0/quic-v1",
        **place: Any,
    ) -> NodeProcess:
        command = ("-m", "meshnode", "client", *_network(listen, mdns=False), *flags)
        return self.run(name, command, **place)

    def clock_off(self, skew_s: int) -> dict[str, str]:
        """The environment of a process whose wall clock is wrong."""
        site = self.folder / f"site{skew_s:+d}"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SHIFTED_CLOCK.format(skew_s=skew_s))
        return {"PYTHONPATH": f"{site}:{ROOT}"}

    def bootstrap(self, name: str, *flags: str, **place: Any) -> NodeProcess:
        listen = "/ip4/127.0.0.1/udp/0/quic-v1"
        where = ("--api", "127.0.0.1:0", "--listen", listen)
        return self.run(name, ("-m", "bootstrap", *where, *flags), **place)


def run_command(
    *arguments: str, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> tuple[int, str, str]:
    """Exit code, standard output and error of a `meshnode` command that ends by itself."""
    result = subprocess.run(
        [*prefix, sys.executable, "-m", "meshnode", *arguments],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env=_environment(env),
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


def wait_all_see(nodes: Sequence[NodeProcess]) -> float:
    """Seconds until every node is connected to every other."""
    begun = time.monotonic()
    everybody = {node.peer_id for node in nodes}
    for node in nodes:
        others = everybody - {node.peer_id}
        node.wait_until(lambda status, others=others: others <= _peer_ids(status))
    return time.monotonic() - begun


def serves(status: Json, model: str) -> set[str]:
    """Who serves `model`, in the eyes of a node."""
    rows = [row for row in status["mesh_models"] if row["id"] == model]
    return {peer for row in rows for peer in row["served_by"]}


def slots_busy(status: Json) -> int:
    return sum(int(model["slots_busy"]) + int(model["queue_depth"]) for model in status["models"])


def _peer_ids(status: Json) -> set[str]:
    return {peer["peer_id"] for peer in status["peers"]}


def _network(listen: str, mdns: bool) -> tuple[str, ...]:
    flags = ("--listen", listen, "--api", "127.0.0.1:0")
    return flags if mdns else (*flags, "--no-mdns")


def _headers(response: HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """Ours, without what would configure a node behind the test's back."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MESHNODE_")}
    kept["PYTHONPATH"] = str(ROOT)
    return {**kept, **(more or {})}
