"""The gateway's routes, for clients and for peers.

Decides which paths exist, what each error looks like on the wire, and what a peer may ask of us.
Does not know sockets or streams: `server.py` serves the API app to clients, the node serves the
tunnel app to peers with `transport.http.serve_asgi`.

* `create_api_app`     models, chat and text completions, health; routes each request in the mesh.
                       Behind a door, whoever asks for more than health needs an API key
* `create_tunnel_app`  chat and text completions only, answered by an engine of this very node
"""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, cast

import trio
from quart import g, request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest
from werkzeug.exceptions import HTTPException

from meshnode.errors import (
    EngineBusyError,
    EngineError,
    NoReplicaError,
    RequestError,
    UnknownModelError,
)
from meshnode.gateway import Mesh
from meshnode.gateway.answer import (
    DIGEST_HEADER,
    HOPS_HEADER,
    REQUEST_ID_HEADER,
    RETRY_HEADER,
    SESSION_HEADER,
    Answer,
    Ask,
    NobodyAnsweredError,
    answer,
    answer_locally,
)
from meshnode.gateway.door import Door
from meshnode.gateway.keys import BadKeyError, LimitError
from meshnode.gateway.openai import (
    Call,
    decode_chat,
    decode_text,
    encode_error,
    encode_model,
    encode_models,
)
from meshnode.gateway.session import SESSION_BYTES, session_key
from meshnode.transport.http import BODY_BYTES_MAX, TunnelPool

__all__ = ["GatewayLimits", "create_api_app", "create_tunnel_app"]

SERVED_BY_HEADER = "x-meshnode-served-by"
ROUTE_HEADER = "x-meshnode-route"
CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"

# A client that needs longer to upload its request is holding a connection, not asking.
BODY_TIMEOUT_S = 60
# 96 bits: unique among all requests of all nodes.
REQUEST_ID_BYTES = 12

_REQUEST_ID = re.compile(r"[0-9a-f]{24}")
_log = logging.getLogger(__name__)

Body = bytes | Any
Result = tuple[Body, int, dict[str, str]]


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """What one request may cost before it is understood."""

    body_bytes_max: int = BODY_BYTES_MAX


def create_api_app(
    mesh: Mesh,
    limits: GatewayLimits | None = None,
    *,
    door: Door | None = None,
    mount: Callable[[QuartTrio], None] | None = None,
) -> QuartTrio:
    """The app for clients. `door` None asks nobody for a key.

    `mount` may add routes of its own, which no peer can reach; it guards them itself.
    """
    app = _create_app(mesh, limits or GatewayLimits())
    pool = TunnelPool(mesh.open_tunnel)

    async def complete(decode: Callable[[bytes], Call]) -> Result:
        body = await _body()
        call = decode(body)
        session = session_key(call, header=request.headers.get("x-session-id"), tenant=g.tenant)
        ask = Ask(call, g.request_id, session, request.path, body)
        return _result(await answer(mesh, pool, ask, _owned()))

    @app.post(CHAT_PATH)
    async def chat() -> Result:
        return await complete(decode_chat)

    @app.post(TEXT_PATH)
    async def text() -> Result:
        return await complete(decode_text)

    @app.get("/v1/models")
    async def models() -> Result:
        return _json(encode_models(mesh.models()))

    @app.get("/v1/models/<path:model_id>")
    async def model(model_id: str) -> Result:
        known = mesh.models()
        for served in known:
            if served.id == model_id:
                return _json(encode_model(served))
        raise UnknownModelError(model_id, tuple(served.id for served in known))

    @app.get("/healthz")
    async def alive() -> Result:
        return _json(b'{"status":"ok"}')

    @app.get("/readyz")
    async def ready() -> Result:
        is_ready, reason = mesh.ready()
        if is_ready:
            return _json(b'{"status":"ready"}')
        message = f"This node is not ready ({reason})."
        body = encode_error(message, "server_error", code="not_ready", state=reason)
        return _json(body, 503, {"retry-after": "1"})

    @app.after_serving
    async def close_tunnels() -> None:
        await pool.aclose()

    # By endpoint, not by path: what is not named here needs a key, whatever its address.
    keyed = set(app.view_functions) - {"alive", "ready"}
    if mount is not None:
        mount(app)
    open_to_all = set(app.view_functions) - keyed

    @app.before_request
    async def ask_for_key() -> None:
        g.tenant = b""
        if door is not None and request.endpoint not in open_to_all:
            visitor = door.admit(_token(), trio.current_time())
            _owned().callback(visitor.leave)
            g.tenant = visitor.name.encode()

    @app.errorhandler(BadKeyError)
    async def bad_key(error: BadKeyError) -> Result:
        body = encode_error(str(error), "invalid_request_error", code="invalid_api_key")
        return _json(body, 401, {"www-authenticate": "Bearer"})

    @app.errorhandler(LimitError)
    async def over_limit(error: LimitError) -> Result:
        body = encode_error(str(error), "requests", code="rate_limit_exceeded")
        return _json(body, 429, _retry_after(error.retry_after_s))

    return app


def _token() -> str | None:
    """The caller's API key, where OpenAI's clients put it or where Anthropic's do.

    It goes no further than the door: not to an engine, a peer or a log.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return request.headers.get("x-api-key")


def create_tunnel_app(mesh: Mesh, limits: GatewayLimits | None = None) -> QuartTrio:
    """The app for peers: what they forward is answered here or not at all, never forwarded."""
    app = _create_app(mesh, limits or GatewayLimits())

    async def complete(decode: Callable[[bytes], Call]) -> Result:
        hops = request.headers.get(HOPS_HEADER, "")
        if not hops:
            raise RequestError(
                f"A tunnelled request carries `{HOPS_HEADER}: 1`.", param=HOPS_HEADER
            )
        if hops != "1":
            message = f"A request is forwarded once; this one has {HOPS_HEADER} {hops[:16]!r}."
            return _json(encode_error(message, "server_error", code="loop_detected"), 508)
        body = await _body()
        call = decode(body)
        digest = request.headers.get(DIGEST_HEADER, "")
        engine = mesh.engine(digest)
        if engine is None:
            message = f"The model `{call.model}` is not loaded on this node."
            return _json(
                encode_error(message, "server_error", code="not_loaded"),
                503,
                {RETRY_HEADER: "elsewhere"},
            )
        ask = Ask(call, g.request_id, _peer_session(), request.path, body)
        return _result(await answer_locally(engine, ask, digest, mesh.peer_id, _owned()))

    @app.post(CHAT_PATH)
    async def chat() -> Result:
        return await complete(decode_chat)

    @app.post(TEXT_PATH)
    async def text() -> Result:
        return await complete(decode_text)

    @app.before_request
    async def adopt_request_id() -> None:
        given = request.headers.get(REQUEST_ID_HEADER, "")
        if _REQUEST_ID.fullmatch(given):
            g.request_id = given

    return app


async def _body() -> bytes:
    body: bytes = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    return body


def _peer_session() -> bytes:
    given = request.headers.get(SESSION_HEADER, "")
    if not re.fullmatch(rf"[0-9a-f]{{{2 * SESSION_BYTES}}}", given):
        raise RequestError(
            f"`{SESSION_HEADER}` must be {SESSION_BYTES} bytes in hex.", param=SESSION_HEADER
        )
    return bytes.fromhex(given)


def _result(answer: Answer) -> Result:
    headers = {
        "content-type": answer.content_type,
        SERVED_BY_HEADER: answer.served_by,
        ROUTE_HEADER: answer.route,
    }
    if answer.content_type.startswith("text/event-stream"):
        headers["cache-control"] = "no-cache"
        headers["x-accel-buffering"] = "no"  # nginx in between would hold the tokens back
    return answer.body, answer.status, headers


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Result:
    return body, status, {"content-type": "application/json", **(headers or {})}


# ---------------------------------------------------------------------------------------------
# What both apps share
# ---------------------------------------------------------------------------------------------


class _Request(TrioRequest):
    """A request that owns what its answer holds open."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.owned = AsyncExitStack()


class _Connection(TrioASGIHTTPConnection):
    """Serves one request, and closes what it owns in the same task, however it ends.

    Quart drops an answer between making it and iterating it if the client leaves at that very
    moment: engine contexts and tunnels must not depend on the iteration.
    """

    async def handle_request(  # type: ignore[override]
        self, nursery: trio.Nursery, request: _Request, send: Any
    ) -> None:
        async with request.owned:
            response = await self.app.handle_request(request)
            await self._send_response(send, response)
        nursery.cancel_scope.cancel()


class _GatewayApp(QuartTrio):
    asgi_http_class = _Connection
    request_class = _Request


def _owned() -> AsyncExitStack:
    return cast(_Request, request).owned


def _create_app(mesh: Mesh, limits: GatewayLimits) -> QuartTrio:
    app = _GatewayApp("meshnode", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = limits.body_bytes_max
    app.config["BODY_TIMEOUT"] = BODY_TIMEOUT_S
    app.url_map.strict_slashes = False

    @app.before_request
    async def name_request() -> None:
        g.request_id = secrets.token_hex(REQUEST_ID_BYTES)

    @app.after_request
    async def sign_answer(response: Any) -> Any:
        response.headers[REQUEST_ID_HEADER] = g.get("request_id", "")
        response.headers.setdefault(SERVED_BY_HEADER, mesh.peer_id)
        return response

    @app.errorhandler(RequestError)
    async def bad_request(error: RequestError) -> Result:
        return _json(
            encode_error(str(error), "invalid_request_error", param=error.param, code=error.code),
            400,
        )

    @app.errorhandler(UnknownModelError)
    async def unknown_model(error: UnknownModelError) -> Result:
        return _json(
            encode_error(
                str(error),
                "invalid_request_error",
                param="model",
                code="model_not_found",
                models=error.known,
            ),
            404,
        )

    @app.errorhandler(NoReplicaError)
    async def no_replica(error: NoReplicaError) -> Result:
        return _json(
            encode_error(
                str(error), "server_error", param="model", code="no_replica", state=error.state
            ),
            503,
            _retry_after(error.retry_after_s),
        )

    @app.errorhandler(NobodyAnsweredError)
    async def nobody_answered(error: NobodyAnsweredError) -> Result:
        attempts = [{"peer": a.peer_id, "reason": a.reason} for a in error.attempts]
        return _json(
            encode_error(
                str(error),
                "server_error",
                code="replicas_failed",
                state=error.state,
                attempts=attempts,
            ),
            503,
            _retry_after(error.retry_after_s),
        )

    @app.errorhandler(EngineError)
    async def engine_failed(error: EngineError) -> Result:
        """Only in the tunnel app: the API app turns to the next candidate."""
        busy = isinstance(error, EngineBusyError)
        retry_after_s = error.retry_after_s if isinstance(error, EngineBusyError) else 1.0
        return _json(
            encode_error(str(error), "server_error", code="busy" if busy else "engine_failed"),
            503,
            {RETRY_HEADER: "elsewhere", **_retry_after(retry_after_s)},
        )

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Result:
        status = error.code or 500
        message, code = _HTTP_ERRORS.get(status, (error.name, None))
        kept = {"allow": allow} if (allow := dict(error.get_headers()).get("Allow")) else {}
        return _json(encode_error(message, "invalid_request_error", code=code), status, kept)

    @app.errorhandler(Exception)
    async def bug(error: Exception) -> Result:
        _log.error("request %s failed", g.get("request_id", "?"), exc_info=error)
        message = "This node made a mistake; its log has the details under this request id."
        return _json(encode_error(message, "server_error", code="internal_error"), 500)

    return app


_HTTP_ERRORS = {
    404: ("There is no such path here.", "unknown_url"),
    405: ("This path does not take this method.", "method_not_allowed"),
    408: ("The body did not arrive in time.", "request_timeout"),
    413: ("The body is too large.", "body_too_large"),
}


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}
