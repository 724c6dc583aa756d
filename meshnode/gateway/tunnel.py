"""The app for peers: what they forward is answered by this very node, by an engine or a server
behind it, or not at all.

Five POST routes and nothing else; it forwards nothing, so there are no loops, and has no
management route to reach. Plain ASGI instead of Quart: fixed routes need no framework, and a
request through it reaches the engine about a millisecond sooner (tests/bench/hop).
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import trio

from meshnode.errors import MeshnodeError, RemoteProtocolError, RequestError
from meshnode.fence import FENCE_HEADER, Fence, parse_fence
from meshnode.gateway import VIA_HEADER, Mesh
from meshnode.gateway.answer import (
    CREATED_HEADER,
    DECIDED_TYPE,
    DIGEST_HEADER,
    HOPS_HEADER,
    REQUEST_ID_BYTES,
    REQUEST_ID_HEADER,
    RETRY_HEADER,
    SERVED_BY_HEADER,
    SESSION_HEADER,
    Answer,
    Ask,
    answer_locally,
    answer_upstream,
)
from meshnode.gateway.counting import COUNT_PATH, Count, decode_count
from meshnode.gateway.embeddings import (
    EMBED_PATH,
    RERANK_PATH,
    Embed,
    Rerank,
    decode_embed,
    decode_rerank,
)
from meshnode.gateway.openai import (
    CHAT_PATH,
    TEXT_PATH,
    Call,
    decode_chat,
    decode_text,
    encode_error,
)
from meshnode.gateway.passing import decode_via
from meshnode.gateway.refusal import Refusal, refusal_of
from meshnode.gateway.resume import CONTINUE_HEADER, split_continuation
from meshnode.gateway.session import SESSION_BYTES
from meshnode.messages import Decided, decode
from meshnode.transport.http import BODY_BYTES_MAX, Message

__all__ = ["TunnelApp"]

BODY_TIMEOUT_S = 60
"""A gateway has the whole body before it forwards it; slower than this is a broken path."""

_ROUTES: dict[str, Callable[[bytes], Call | Count | Embed | Rerank]] = {
    CHAT_PATH: decode_chat,
    TEXT_PATH: decode_text,
    COUNT_PATH: decode_count,
    EMBED_PATH: decode_embed,
    RERANK_PATH: decode_rerank,
}
_REQUEST_ID = re.compile(rf"[0-9a-f]{{{2 * REQUEST_ID_BYTES}}}")
_SESSION = re.compile(rf"[0-9a-f]{{{2 * SESSION_BYTES}}}")
_UNIX_SECONDS = re.compile(r"[0-9]{1,12}")
_log = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TunnelApp:
    """An ASGI application for `transport.http.serve_asgi`."""

    def __init__(self, mesh: Mesh, body_bytes_max: int = BODY_BYTES_MAX) -> None:
        self._mesh = mesh
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request. An engine that dies midway raises, which cuts the stream: the
        gateway tells its client.
        """
        headers = {name.decode("latin-1"): value.decode("latin-1")
                   for name, value in scope["headers"]}  # fmt: skip
        given = headers.get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(REQUEST_ID_BYTES)
        async with AsyncExitStack() as owned:
            try:
                said = await self._answer(scope, headers, request_id, receive, owned)
            except MeshnodeError as error:
                refusal = refusal_of(error)
                if refusal is None:
                    raise
                said = refusal
            await self._say(said, request_id, send)

    async def _answer(
        self,
        scope: Message,
        headers: dict[str, str],
        request_id: str,
        receive: Receive,
        owned: AsyncExitStack,
    ) -> Answer | Refusal:
        path: str = scope["path"]
        understand = _ROUTES.get(path)
        if understand is None:
            return _refusal(404, "There is no such path here.", "unknown_url")
        if scope["method"] != "POST":
            return _refusal(405, "This path does not take this method.", "method_not_allowed")
        hops = headers.get(HOPS_HEADER, "")
        if not hops:
            raise RequestError(
                f"A tunnelled request carries `{HOPS_HEADER}: 1`.", param=HOPS_HEADER
            )
        if hops != "1":
            message = f"A request is forwarded once; this one has {HOPS_HEADER} {hops[:16]!r}."
            return _refusal(508, message, "loop_detected")
        with trio.move_on_after(BODY_TIMEOUT_S) as patience:
            body = await self._read(receive)
        if patience.cancelled_caught:
            return _refusal(408, "The body did not arrive in time.", "request_timeout")
        if body is None:
            return _refusal(413, "The body is too large.", "body_too_large")
        continuation = None
        if come := headers.get(CONTINUE_HEADER):
            continuation, body = split_continuation(come, body)
        digest = headers.get(DIGEST_HEADER, "")
        fence = _fence(headers)
        # After the body, which may take a while: nothing comes between this and the engine.
        proof = self._mesh.check(fence, digest)
        if proof is not None:
            return _fenced(proof, fence)
        upstream = self._mesh.upstream(digest)
        if upstream is not None and continuation is None and path != COUNT_PATH:
            via = decode_via(headers.get(VIA_HEADER))
            return await answer_upstream(upstream, path, body, via, self._mesh.peer_id, owned)
        engine = self._mesh.engine(digest)
        if engine is None:
            message = "The model is not loaded on this node."
            refusal = _refusal(503, message, "not_loaded")
            refusal.headers[RETRY_HEADER] = "elsewhere"
            return refusal
        call = understand(body)
        if continuation is not None and not call.stream:
            raise RequestError("Only a stream can be continued.", param=CONTINUE_HEADER)
        if continuation is not None and not call.is_resumable:
            raise RequestError("This answer cannot be continued.", param=CONTINUE_HEADER)
        ask = Ask(call, request_id, _session(headers), path, body, _created(headers), continuation)
        return await answer_locally(engine, ask, digest, self._mesh.peer_id, owned)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if it is too large."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._body_bytes_max:
                return None
            if not message.get("more_body", False):
                return bytes(body)

    async def _say(self, said: Answer | Refusal, request_id: str, send: Send) -> None:
        headers = {
            REQUEST_ID_HEADER: request_id,
            SERVED_BY_HEADER: self._mesh.peer_id,
            "content-type": "application/json",
            **said.headers,
        }
        if isinstance(said, Refusal):
            headers["content-length"] = str(len(said.body))
        encoded = [(name.encode("latin-1"), value.encode("latin-1"))
                   for name, value in headers.items()]  # fmt: skip
        await send({"type": "http.response.start", "status": said.status, "headers": encoded})
        if isinstance(said, Refusal):
            await send({"type": "http.response.body", "body": said.body, "more_body": False})
            return
        async for piece in said.body:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _refusal(status: int, message: str, code: str) -> Refusal:
    if status < 500:
        return Refusal(status, encode_error(message, "invalid_request_error", code=code))
    return Refusal(status, encode_error(message, "server_error", code=code))


def _session(headers: dict[str, str]) -> bytes:
    given = headers.get(SESSION_HEADER, "")
    if not _SESSION.fullmatch(given):
        raise RequestError(
            f"`{SESSION_HEADER}` must be {SESSION_BYTES} bytes in hex.", param=SESSION_HEADER
        )
    return bytes.fromhex(given)


def _created(headers: dict[str, str]) -> int:
    """The date that the gateway gave the answer; ours, if it gave none that could be one."""
    given = headers.get(CREATED_HEADER, "")
    return int(given) if _UNIX_SECONDS.fullmatch(given) else int(time.time())


def _fence(headers: dict[str, str]) -> Fence | None:
    given = headers.get(FENCE_HEADER)
    try:
        return None if given is None else parse_fence(given)
    except RemoteProtocolError as error:
        raise RequestError(str(error), param=FENCE_HEADER) from None


def _fenced(proof: bytes, fence: Fence | None) -> Refusal:
    """The sender is behind: the proof of it goes back, and names the epoch for people's eyes."""
    headers = {"content-type": DECIDED_TYPE}
    newest = decode(proof, Decided).newest
    if fence is not None and newest is not None:
        found = newest.header
        headers[FENCE_HEADER] = str(Fence(found.group, found.epoch, fence.shard))
    return Refusal(409, proof, headers)
