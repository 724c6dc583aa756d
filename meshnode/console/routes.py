"""Management routes under `/api/`: for callers on this machine, never through the tunnel."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from quart import request
from quart_trio import QuartTrio

from meshnode.console.fetches import Fetches
from meshnode.console.operations import NotDecidedError, Operations
from meshnode.console.requests import (
    ClaimRequest,
    FetchRequest,
    InviteOrder,
    InviteTicket,
    OrderRequest,
    PreviewRequest,
    RecoverRequest,
)
from meshnode.console.snapshot import Snapshot
from meshnode.errors import ConfigError, FetchError, ModelLoadError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Console:
    """What the routes call. `invite` raises `ConfigError` on a node that may not invite."""

    snapshot: Callable[[], Snapshot]
    invite: Callable[[InviteOrder], InviteTicket]
    operations: Operations
    fetches: Fetches


def mount(app: QuartTrio, console: Console) -> None:
    """Add the routes to the API app."""
    operations = console.operations

    @app.get("/api/status")
    async def status() -> Any:
        return _refused() or _reply(console.snapshot())

    @app.get("/api/proof")
    async def proof() -> Any:
        return _refused() or await _answered(_now(lambda _: operations.proof()), None)

    @app.post("/api/invite")
    async def invite() -> Any:
        return await _asked(InviteOrder, _now(console.invite))

    @app.post("/api/placement/preview")
    async def preview() -> Any:
        return await _asked(PreviewRequest, operations.preview)

    @app.post("/api/orders")
    async def orders() -> Any:
        return await _asked(OrderRequest, _now(operations.give))

    @app.post("/api/fetch")
    async def fetch() -> Any:
        return await _asked(FetchRequest, console.fetches.ask)

    @app.post("/api/recover")
    async def recover() -> Any:
        return await _asked(RecoverRequest, _now(lambda _: operations.recover()))

    @app.post("/api/claims")
    async def claims() -> Any:
        return await _asked(ClaimRequest, operations.claim)


def _refused() -> Any:
    """A remote caller, or a web page that posts without being able to set a JSON type."""
    caller = (request.remote_addr or "").partition("%")[0]
    try:
        local = ipaddress.ip_address(caller).is_loopback
    except ValueError:
        local = False
    if not local:
        return _error("only from this machine", 403)
    if request.method == "POST" and request.mimetype != "application/json":
        return _error("Content-Type must be application/json", 415)
    return None


async def _asked(kind: type[T], answer: Callable[[T], Awaitable[object]]) -> Any:
    """Check the body of a request, and answer it."""
    if (refusal := _refused()) is not None:
        return refusal
    try:
        body = msgspec.json.decode(await request.get_data() or b"{}", type=kind)
    except msgspec.DecodeError as error:
        return _error(str(error), 400)
    return await _answered(answer, body)


async def _answered(answer: Callable[[T], Awaitable[object]], body: T) -> Any:
    try:
        return _reply(await answer(body))
    except NotDecidedError as error:
        told = msgspec.to_builtins(error.answer)
        return _reply({"error": {"message": str(error)}, **told}, 409)
    except (ConfigError, FetchError, ModelLoadError) as error:
        return _error(str(error), 409)


def _now(answer: Callable[[T], object]) -> Callable[[T], Awaitable[object]]:
    """An answer that needs no waiting, where one is expected that may."""

    async def given(body: T) -> object:
        return answer(body)

    return given


def _error(message: str, status: int) -> Any:
    return _reply({"error": {"message": message}}, status)


def _reply(body: object, status: int = 200) -> Any:
    return msgspec.json.encode(body), status, {"content-type": "application/json"}
