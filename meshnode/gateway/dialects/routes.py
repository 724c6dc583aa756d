"""The paths of the other dialects, and whose shape an error on them has.

Decides nothing about answers: requests are translated and handed to the app, which answers them
as it answers its own. Keys are asked for as on every route of the app; `/api/` is also where a
node's operator asks it things, but those routes are the console's, and it guards them itself.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio
from quart import g, request
from quart_trio import QuartTrio

from meshnode.engine import EngineStats
from meshnode.errors import RequestError, UnknownModelError
from meshnode.gateway import Mesh, ServedModel
from meshnode.gateway.dialects import Asked, ollama
from meshnode.gateway.dialects.anthropic import (
    decode_count,
    decode_messages,
    encode_counted,
    encode_messages_error,
)
from meshnode.gateway.dialects.kept import Kept, KeptResponses
from meshnode.gateway.dialects.responses import decode_response, encode_deleted
from meshnode.gateway.embeddings import Embed, Vectors

__all__ = ["error_shape", "mount_dialects"]

MESSAGES_PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
RESPONSES_PATH = "/v1/responses"

Result = tuple[Any, int, dict[str, str]]

_ERROR_SHAPES: dict[str, Callable[[int, bytes], bytes]] = {
    MESSAGES_PATH: encode_messages_error,
    COUNT_PATH: encode_messages_error,
    "/api/embed": ollama.encode_ollama_error,
    "/api/embeddings": ollama.encode_ollama_error,
    "/api/chat": ollama.encode_ollama_error,
    "/api/generate": ollama.encode_ollama_error,
    "/api/show": ollama.encode_ollama_error,
    "/api/tags": ollama.encode_ollama_error,
    "/api/version": ollama.encode_ollama_error,
}


def error_shape(path: str) -> Callable[[int, bytes], bytes] | None:
    """What makes an error's body, from its status and its body in OpenAI's shape.

    None where OpenAI's shape is the right one.
    """
    return _ERROR_SHAPES.get(path)


def mount_dialects(
    app: QuartTrio,
    mesh: Mesh,
    complete: Callable[[Asked], Awaitable[Result]],
    count: Callable[[Asked, Callable[[int], bytes]], Awaitable[Result]],
    embed: Callable[[Embed, Callable[[Vectors], bytes]], Awaitable[Result]],
) -> None:
    """Add the routes to the API app; `complete` answers what was asked, in its writer's words,
    `count` (its tokens) and `embed` in those that they are given."""
    kept = KeptResponses()

    @app.post(MESSAGES_PATH)
    async def messages() -> Result:
        return await complete(decode_messages(await _body()))

    @app.post(COUNT_PATH)
    async def count_tokens() -> Result:
        return await count(decode_count(await _body()), encode_counted)

    @app.post(RESPONSES_PATH)
    async def responses() -> Result:
        tenant: bytes = g.tenant

        def recall(id: str) -> Any:
            found = kept.find(tenant, id, trio.current_time(), param="previous_response_id")
            return found.conversation

        def keep(id: str, response: Kept) -> None:
            kept.keep(tenant, id, response, trio.current_time())

        return await complete(decode_response(await _body(), recall, keep))

    @app.get(f"{RESPONSES_PATH}/<id>")
    async def response(id: str) -> Result:
        for name in request.args:
            raise RequestError(
                f"`{name}` is not supported here; leave it out.",
                param=name,
                code="unsupported_parameter",
            )
        return _json(kept.find(g.tenant, id, trio.current_time()).wire)

    @app.delete(f"{RESPONSES_PATH}/<id>")
    async def forget_response(id: str) -> Result:
        kept.forget(g.tenant, id, trio.current_time())
        return _json(encode_deleted(id))

    def stats(model: ServedModel) -> EngineStats | None:
        engine = mesh.engine(model.digest)
        return None if engine is None else engine.stats()

    def known(model: ServedModel) -> ollama.Known:
        here = stats(model)
        return model, None if here is None else here.card

    def room(name: str) -> int | None:
        return next((each.context_tokens for each in mesh.models() if each.id == name), None)

    @app.post("/api/chat")
    async def ollama_chat() -> Result:
        return await complete(ollama.decode_chat(await _body(), room))

    @app.post("/api/generate")
    async def ollama_generate() -> Result:
        return await complete(ollama.decode_generate(await _body(), room))

    @app.post("/api/embed")
    async def ollama_embed() -> Result:
        call = ollama.decode_embed_body(await _body())
        began = time.monotonic_ns()

        def told(answer: Vectors) -> bytes:
            return ollama.encode_embeddings(call, answer, time.monotonic_ns() - began)

        return await embed(call, told)

    @app.post("/api/embeddings")
    async def ollama_old_embed() -> Result:
        call = ollama.decode_old_embed(await _body())
        return await embed(call, ollama.encode_old_embedding)

    @app.get("/api/tags")
    async def ollama_tags() -> Result:
        return _json(ollama.encode_tags(known(model) for model in mesh.models()))

    @app.post("/api/show")
    async def ollama_show() -> Result:
        name = ollama.decode_show(await _body())
        models = {model.id: model for model in mesh.models()}
        if name not in models:
            raise UnknownModelError(name, tuple(models))
        found = models[name]
        return _json(ollama.encode_show(*known(found), ollama.capabilities_of(stats(found))))

    @app.get("/api/version")
    async def ollama_version() -> Result:
        return _json(msgspec.json.encode({"version": ollama.API_VERSION}))


async def _body() -> bytes:
    body: bytes = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    return body


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Result:
    return body, status, {"content-type": "application/json", **(headers or {})}
