"""Real nodes in processes of this machine, on its loopback: started, listened to, asked, killed.

A node is seen as its operator and its clients see it: its command line, its log, its API. What it
logs as JSON lines carries the time of each event to the millisecond.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio

from meshnode.errors import MeshnodeError

START_S_MAX = 120.0
"""Eight nodes that start at once on two cores need a minute; more is a hang."""
ASK_S_MAX = 60.0
"""As long as a simulated client waits for a token (`models.gateway.GIVE_UP_S`)."""
LOG_BYTES_SHOWN = 2000

Json = dict[str, Any]


class NodeFailedError(MeshnodeError):
    """A node of tier 3 did not start, or ended by itself."""


@dataclass
class NodeProcess:
    """One running node. `heard` are the times (Unix) and texts of what it has logged."""

    name: str
    folder: Path
    process: trio.Process
    peer_id: str = ""
    url: str = ""
    since_s: float = 0.0
    """When it began to listen and to dial, by the Unix clock: later than its process began."""
    heard: list[tuple[float, str]] = field(default_factory=list)
    is_up: bool = True
    said: str = ""
    has_started: trio.Event = field(default_factory=trio.Event)

    async def wait_started(self) -> None:
        """Raises `NodeFailedError` with what it said."""
        with trio.move_on_after(START_S_MAX):
            await self.has_started.wait()
        if not self.url:
            raise NodeFailedError(f"{self.name} did not start: {self.said[-LOG_BYTES_SHOWN:]}")
        status = await self.status()
        self.since_s = time.time() - status["uptime_s"]

    async def listen(self) -> None:
        """Follow what it says, until it ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, self.process.stdout, self._on_output)
            nursery.start_soon(self._read, self.process.stderr, self._on_log)
            nursery.start_soon(self.process.wait)
        self.has_started.set()

    async def _read(self, pipe: trio.abc.ReceiveStream | None, take: Callable[[str], None]) -> None:
        assert pipe is not None
        pending = b""
        async for chunk in pipe:
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                take(line.decode("utf-8", "replace"))

    def _on_output(self, line: str) -> None:
        self.said += line + "\n"
        said = json.loads(line)
        if said.get("event") == "started":
            self.peer_id, self.url = said["peer_id"], said["api_url"]
        self.has_started.set()

    def _on_log(self, line: str) -> None:
        self.said = (self.said + line + "\n")[-LOG_BYTES_SHOWN:]
        try:
            entry = json.loads(line)
            at_s = datetime.fromisoformat(entry["time"]).timestamp()
        except (ValueError, KeyError, TypeError):
            return  # a library that writes what it likes
        self.heard.append((at_s, entry["message"]))

    def times_of(self, what: str) -> Iterator[tuple[float, str]]:
        """When it logged lines that begin so, and the first word that follows."""
        for at_s, message in self.heard:
            if message.startswith(what):
                yield at_s, message[len(what) :].split()[0]

    # --- its API --------------------------------------------------------------------------------

    async def status(self) -> Json:
        found: Json = await self.call("GET", "/api/status")
        return found

    async def call(self, method: str, path: str, body: Json | None = None) -> Any:
        """The JSON it answers. Raises `OSError` or `HTTPException` if it is not there."""
        return await trio.to_thread.run_sync(
            partial(self._call, method, path, body), abandon_on_cancel=True
        )

    def _call(self, method: str, path: str, body: Json | None) -> Any:
        with self.answering(method, path, body) as response:
            return json.loads(response.read())

    @contextmanager
    def answering(self, method: str, path: str, body: Json | None) -> Iterator[HTTPResponse]:
        """An answer while it comes; blocks, so only for threads."""
        parts = urlsplit(self.url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=ASK_S_MAX)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"content-type": "application/json"})
            yield connection.getresponse()
        finally:
            connection.close()

    # --- its end --------------------------------------------------------------------------------

    def stop_the_power(self) -> None:
        """As if its machine had lost power: silent at once. A process that is merely killed is
        not, since on loopback the kernel tells those who write to its port."""
        self.is_up = False
        os.killpg(self.process.pid, signal.SIGSTOP)

    def end(self) -> None:
        """It and its engines, now."""
        self.is_up = False
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class Processes:
    """The nodes of one run, in a folder; each listens in the nursery."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self._folder = folder
        self._nursery = nursery
        self.nodes: list[NodeProcess] = []

    async def start(self, name: str, *flags: str) -> NodeProcess:
        """Begin to start `meshnode FLAGS`, with what makes it a node of its own."""
        folder = self._folder / name
        where = ("--no-mdns", "--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--api", "127.0.0.1:0")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MESHNODE_")}
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "meshnode", *flags, *where, "--data-dir", str(folder), "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        node = NodeProcess(name, folder, process)
        self.nodes.append(node)
        self._nursery.start_soon(node.listen)
        return node

    def end(self) -> None:
        for node in self.nodes:
            node.end()


GONE = (OSError, HTTPException, ValueError)
"""What asking a node that dies may raise."""
