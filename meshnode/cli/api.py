"""Talk to the node that runs on this machine, over its HTTP API.

Finds it, asks it, and turns every way of failing into an error that says what to do. Uses the
standard library's client: no proxy from the environment ever stands between us and ourselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from meshnode.config import split_host_port
from meshnode.console.requests import (
    FetchReport,
    FetchRequest,
    OrderGiven,
    OrderRequest,
    PlacementReport,
    PreviewRequest,
    Proof,
    Recovered,
)
from meshnode.console.snapshot import Snapshot
from meshnode.errors import ConfigError, MeshnodeError

T = TypeVar("T")

API_FILE = "api.json"
"""In the data directory, written by a running node: {"url": …, "pid": …}."""
CONNECT_TIMEOUT_S = 10.0
"""A local node that does not answer in this time hangs."""
ANSWER_TIMEOUT_S = 600.0
"""Between two pieces of an answer: a long prompt on a slow machine takes minutes to prefill."""
BODY_BYTES_MAX = 16 * 1024 * 1024
"""A status of a thousand peers is under 1 MiB."""


class NoNodeError(MeshnodeError):
    """No node answers where we looked."""


class ApiError(MeshnodeError):
    """The node answered, and the answer is no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _ApiFile(msgspec.Struct, frozen=True):
    url: str
    pid: int


class Ticket(msgspec.Struct, frozen=True):
    """An invitation that the node made; `expires_at` in Unix seconds."""

    token: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class NodeApi:
    """The API at `url`. `started_by` is the process that said it is there, if one did.

    `key` is sent with every request; only those for answers need one, where keys are in force.
    """

    url: str
    started_by: int | None = None
    key: str | None = field(default=None, repr=False)

    def status_json(self) -> dict[str, object]:
        """What `/api/status` says, as it is."""
        return self.ask("GET", "/api/status")

    def status(self) -> Snapshot:
        return read_status(self.status_json())

    def invite(self, uses: int, expires_s: int, role: str) -> Ticket:
        order = {"uses": uses, "expires_s": expires_s, "role": role}
        return _read(self.ask("POST", "/api/invite", order), Ticket)

    def preview_json(self, request: PreviewRequest) -> dict[str, object]:
        """A `PlacementReport` as it is; `read_placement` reads it."""
        return self.ask("POST", "/api/placement/preview", msgspec.to_builtins(request))

    def give(self, order: OrderRequest) -> OrderGiven:
        return _read(self.ask("POST", "/api/orders", msgspec.to_builtins(order)), OrderGiven)

    def fetch(self, request: FetchRequest) -> FetchReport:
        return _read(self.ask("POST", "/api/fetch", msgspec.to_builtins(request)), FetchReport)

    def recover(self) -> Recovered:
        return _read(self.ask("POST", "/api/recover", {}), Recovered)

    def proof(self) -> Proof:
        return _read(self.ask("GET", "/api/proof"), Proof)

    def ask(self, method: str, path: str, body: object = None) -> dict[str, object]:
        """One JSON answer. Raises `NoNodeError` or `ApiError`."""
        with self.answering(method, path, body, CONNECT_TIMEOUT_S) as response:
            data = response.read(BODY_BYTES_MAX + 1)
        try:
            answer = json.loads(data) if len(data) <= BODY_BYTES_MAX else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ApiError(response.status, f"what answers at {self.url} is not a meshnode")
        return answer

    @contextmanager
    def answering(
        self, method: str, path: str, body: object, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> Iterator[HTTPResponse]:
        """An open answer with status 200; leaving early hangs up, which cancels the request."""
        headers = {"content-type": "application/json"}
        if self.key is not None:
            if not (self.key.isascii() and self.key.isprintable()):
                raise ConfigError("the API key has characters that no key has: copy it again")
            headers["authorization"] = f"Bearer {self.key}"
        parts = urlsplit(self.url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=CONNECT_TIMEOUT_S)
        try:
            try:
                connection.connect()
                connection.sock.settimeout(timeout_s)
                payload = None if body is None else json.dumps(body).encode()
                connection.request(method, path, payload, headers)
                response = connection.getresponse()
                if response.status != 200:
                    message = _refusal(response.read(BODY_BYTES_MAX), response.reason)
                    if response.status == HTTPStatus.UNAUTHORIZED:
                        message = self._locked_out(message)
                    raise ApiError(response.status, message)
                yield response
            except (OSError, HTTPException) as error:
                raise NoNodeError(self._unreachable(error)) from error
        finally:
            connection.close()

    def _locked_out(self, message: str) -> str:
        if self.key is not None:
            return f"{message} `meshnode key list` shows whose keys are."
        return (
            "this node's API asks for a key: put one into MESHNODE_API_KEY (or pass --api-key); "
            "`meshnode key create NAME` makes one"
        )

    def _unreachable(self, error: Exception) -> str:
        what = error.strerror if isinstance(error, OSError) else None
        cause = what or str(error) or type(error).__name__
        if self.started_by is not None:
            return (
                f"the node that last ran here (process {self.started_by}, {self.url}) does not "
                f"answer ({cause}): start it again with `meshnode serve`"
            )
        return f"nothing answers at {self.url} ({cause}): is `meshnode serve` running there?"


def find_node(address: str | None, data_dir: Path) -> NodeApi:
    """The node at `address`, or the one that runs with this data directory."""
    if address is not None:
        host, port = split_host_port(address)
        return NodeApi(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    file = data_dir / API_FILE
    try:
        found = msgspec.json.decode(file.read_bytes(), type=_ApiFile)
    except (OSError, msgspec.DecodeError) as error:
        raise NoNodeError(
            f"no node runs with the data directory {data_dir}: start one with `meshnode serve`, "
            "or name the API of one with --api HOST:PORT"
        ) from error
    return NodeApi(found.url, found.pid)


def read_status(answer: dict[str, object]) -> Snapshot:
    """Raises `ApiError` if it is not a status."""
    return _read(answer, Snapshot)


def read_placement(answer: dict[str, object]) -> PlacementReport:
    """Raises `ApiError` if it is not a plan."""
    return _read(answer, PlacementReport)


def _read(answer: dict[str, object], kind: type[T]) -> T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise ApiError(
            200, f"the node's answer cannot be read ({error}): is it another version of meshnode?"
        ) from error


def _refusal(body: bytes, reason: str) -> str:
    """The message of an error in OpenAI's shape, or the status line's words."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the node refused: {reason}"
    return str(message)
