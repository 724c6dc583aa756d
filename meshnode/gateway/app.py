"""The gateway's routes for clients: models, completions, embeddings, reranking, health.

Decides which paths exist and who may take them: behind a door, whoever asks for more than health
needs an API key. Does not know sockets (`server.py`), nor how a request is answered (`answer.py`).
What peers may ask is in `tunnel.py`; what clients of other APIs may, in `dialects/routes.py`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, cast

import trio
from quart import g, request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest
from werkzeug.exceptions import HTTPException

from meshnode.errors import MeshnodeError, RequestError, UnknownModelError
from meshnode.gateway import EXACT_HEADER, VIA_HEADER, Mesh
from meshnode.gateway.answer import (
    REQUEST_ID_BYTES,
    REQUEST_ID_HEADER,
    SERVED_BY_HEADER,
    Answer,
    Ask,
    answer,
)
from meshnode.gateway.counting import COUNT_PATH, Count, read_count
from meshnode.gateway.dialects import Asked
from meshnode.gateway.dialects.answer import told_as_stream, told_whole
from meshnode.gateway.dialects.routes import error_shape, mount_dialects
from meshnode.gateway.door import Door
from meshnode.gateway.embeddings import (
    EMBED_PATH,
    RERANK_ALIAS,
    RERANK_PATH,
    Embed,
    Rerank,
    Vectors,
    decode_embed,
    decode_rerank,
    encode_floats,
    read_vectors,
)
from meshnode.gateway.metrics import METRICS_TYPE
from meshnode.gateway.openai import (
    CHAT_PATH,
    TEXT_PATH,
    Call,
    decode_chat,
    decode_text,
    encode_error,
    encode_model,
    encode_models,
)
from meshnode.gateway.openapi import encode_openapi
from meshnode.gateway.passing import Passed, decode_via, understand
from meshnode.gateway.refusal import refusal_of
from meshnode.gateway.session import session_key, spread
from meshnode.transport.http import BODY_BYTES_MAX, TunnelPool

__all__ = ["GatewayLimits", "create_api_app"]

# A client that needs longer to upload its request is holding a connection, not asking.
BODY_TIMEOUT_S = 60

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
        ask = _ask(understand(body, decode, mesh.is_fronted), request.path, body)
        return _result(await answer(mesh, pool, ask, _owned()))

    async def complete_translated(asked: Asked) -> Result:
        ask = _ask(asked.call, CHAT_PATH, asked.body)
        writer = asked.writer(ask.id, ask.created)
        try:
            said = await answer(mesh, pool, ask, _owned())
        except RequestError as error:
            raise asked.renamed(error) from None
        if said.status != 200:
            refused = b"".join([part async for part in said.body])
            return asked.renamed_body(refused), said.status, said.headers
        if said.is_stream:
            told = await _owned().enter_async_context(aclosing(told_as_stream(said.body, writer)))
            return told, 200, {**said.headers, "content-type": writer.stream_type}
        whole = b"".join([part async for part in said.body])
        return told_whole(whole, writer), 200, said.headers

    async def count(asked: Asked, told: Callable[[int], bytes]) -> Result:
        try:
            said = await read(Count(asked.call), COUNT_PATH, asked.body)
        except RequestError as error:
            raise asked.renamed(error) from None
        whole = b"".join([part async for part in said.body])
        if said.status != 200:
            return asked.renamed_body(whole), said.status, said.headers
        return told(read_count(whole)), 200, said.headers

    async def read(call: Count | Embed | Rerank | Passed, target: str, body: bytes) -> Answer:
        via = decode_via(request.headers.get(VIA_HEADER))
        ask = Ask(call, g.request_id, spread(), target, body, via=via, exact=_wants_exact())
        return await answer(mesh, pool, ask, _owned())

    async def embed(call: Embed, told: Callable[[Vectors], Body]) -> Result:
        said = await read(call, EMBED_PATH, call.body)
        if said.status != 200:
            return _result(said)
        whole = b"".join([part async for part in said.body])
        return told(read_vectors(call, whole)), 200, said.headers

    @app.post(EMBED_PATH)
    async def embeddings() -> Result:
        body = await _body()
        call = understand(body, decode_embed, mesh.is_fronted)
        if isinstance(call, Passed):
            return _result(await read(call, EMBED_PATH, body))
        if call.encoding_format == "base64":
            return _result(await read(call, EMBED_PATH, call.body))
        return await embed(call, lambda answer: _paced(encode_floats(call, answer)))

    @app.post(RERANK_PATH)
    @app.post(RERANK_ALIAS)
    async def rerank() -> Result:
        body = await _body()
        call = understand(body, decode_rerank, mesh.is_fronted)
        return _result(await read(call, RERANK_PATH, body))

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

    mount_dialects(app, mesh, complete_translated, count, embed)

    @app.get("/openapi.json")
    async def described() -> Result:
        return _json(encode_openapi())

    @app.get("/metrics")
    async def metrics() -> Result:
        return mesh.metrics(), 200, {"content-type": METRICS_TYPE}

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

    return app


def _ask(call: Call | Passed, target: str, body: bytes) -> Ask:
    """The request of this moment: `body` says `call` to the route `target` of a peer."""
    session = session_key(call, header=request.headers.get("x-session-id"), tenant=g.tenant)
    via = decode_via(request.headers.get(VIA_HEADER))
    return Ask(call, g.request_id, session, target, body, via=via, exact=_wants_exact())


def _wants_exact() -> bool:
    """Raises `RequestError` for a demand that we do not understand."""
    demand = request.headers.get(EXACT_HEADER)
    if demand not in (None, "required"):
        raise RequestError(f"`{EXACT_HEADER}` can only be `required`.", param=EXACT_HEADER)
    return demand is not None


def _token() -> str | None:
    """The caller's API key, where OpenAI's clients put it or where Anthropic's do.

    It goes no further than the door: not to an engine, a peer or a log.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return request.headers.get("x-api-key")


async def _body() -> bytes:
    body: bytes = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    return body


async def _paced(pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """What takes long to write must not hold up everybody else."""
    for piece in pieces:
        await trio.lowlevel.checkpoint()
        yield piece


def _result(answer: Answer) -> Result:
    return answer.body, answer.status, answer.headers


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Result:
    return body, status, {"content-type": "application/json", **(headers or {})}


# ---------------------------------------------------------------------------------------------
# Requests that own what they hold open, and errors in OpenAI's shape
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

    @app.after_request
    async def shape_error(response: Any) -> Any:
        if response.status_code >= 400 and (shape := error_shape(request.path)) is not None:
            response.set_data(shape(response.status_code, await response.get_data(as_text=False)))
        return response

    @app.errorhandler(MeshnodeError)
    async def refused(error: MeshnodeError) -> Result:
        refusal = refusal_of(error)
        if refusal is None:
            return await bug(error)
        return _json(refusal.body, refusal.status, refusal.headers)

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
