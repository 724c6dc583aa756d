"""Management routes under `/api/`: for callers on this machine, never through the tunnel."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from quart import request
from quart_trio import QuartTrio

from meshnode.console.snapshot import Snapshot
from meshnode.errors import ConfigError

INVITE_S_MAX = 365 * 24 * 3600


class InviteOrder(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /api/invite`."""

    uses: Annotated[int, Meta(ge=1, le=10_000)] = 1
    expires_s: Annotated[int, Meta(ge=60, le=INVITE_S_MAX)] = 24 * 3600
    role: Literal["node", "gateway", "bootstrap"] = "node"


class InviteTicket(Struct, frozen=True):
    """Its answer: the token is a credential, `expires_at` is in Unix seconds."""

    token: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class Console:
    """What the routes call. `invite` raises `ConfigError` on a node that may not invite."""

    snapshot: Callable[[], Snapshot]
    invite: Callable[[InviteOrder], InviteTicket]


def mount(app: QuartTrio, console: Console) -> None:
    """Add the routes to the API app."""

    def refused() -> Any:
        """A remote caller, or a web page that posts without being able to set a JSON type."""
        caller = (request.remote_addr or "").partition("%")[0]
        try:
            local = ipaddress.ip_address(caller).is_loopback
        except ValueError:
            local = False
        if not local:
            return _reply({"error": {"message": "only from this machine"}}, 403)
        if request.method == "POST" and request.mimetype != "application/json":
            return _reply({"error": {"message": "Content-Type must be application/json"}}, 415)
        return None

    @app.get("/api/status")
    async def status() -> Any:
        return refused() or _reply(console.snapshot())

    @app.post("/api/invite")
    async def invite() -> Any:
        if (refusal := refused()) is not None:
            return refusal
        try:
            order = msgspec.json.decode(await request.get_data() or b"{}", type=InviteOrder)
            return _reply(console.invite(order))
        except msgspec.DecodeError as error:
            return _reply({"error": {"message": str(error)}}, 400)
        except ConfigError as error:
            return _reply({"error": {"message": str(error)}}, 409)


def _reply(body: object, status: int = 200) -> Any:
    return msgspec.json.encode(body), status, {"content-type": "application/json"}
