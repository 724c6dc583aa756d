"""The OpenAPI document: every path, and the very structs that bodies are decoded into. Pure.

Decides how the API describes itself. Does not know what a field means: types, bounds and which
values do not work are read off the code that checks them, so the document cannot lag behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from meshnode import __version__
from meshnode.gateway import APPROXIMATE_HEADER, EXACT_HEADER
from meshnode.gateway.dialects import ollama
from meshnode.gateway.dialects.anthropic import COUNT_SHAPE, MESSAGES_SHAPE
from meshnode.gateway.dialects.responses import RESPONSES_SHAPE
from meshnode.gateway.embeddings import (
    EMBED_PATH,
    EMBED_SHAPE,
    RERANK_ALIAS,
    RERANK_PATH,
    RERANK_SHAPE,
)
from meshnode.gateway.fields import Shape
from meshnode.gateway.openai import CHAT_PATH, CHAT_SHAPE, TEXT_PATH, TEXT_SHAPE

__all__ = ["encode_openapi"]

_JSON = "application/json"
_STREAM = "text/event-stream"
_LINES = "application/x-ndjson"
# Path, what is posted, and the type of a stream; None where nothing streams.
_POSTS: tuple[tuple[str, Shape, str | None], ...] = (
    (CHAT_PATH, CHAT_SHAPE, _STREAM),
    (TEXT_PATH, TEXT_SHAPE, _STREAM),
    (EMBED_PATH, EMBED_SHAPE, None),
    (RERANK_PATH, RERANK_SHAPE, None),
    (RERANK_ALIAS, RERANK_SHAPE, None),
    ("/v1/responses", RESPONSES_SHAPE, _STREAM),
    ("/v1/messages", MESSAGES_SHAPE, _STREAM),
    ("/v1/messages/count_tokens", COUNT_SHAPE, None),
    ("/api/chat", ollama.CHAT_SHAPE, _LINES),
    ("/api/generate", ollama.GENERATE_SHAPE, _LINES),
    ("/api/embed", ollama.EMBED_SHAPE, None),
    ("/api/embeddings", ollama.OLD_EMBED_SHAPE, None),
    ("/api/show", ollama.SHOW_SHAPE, None),
)
# Method, path, and what is in the path.
_OTHERS: tuple[tuple[str, str, str | None], ...] = (
    ("get", "/v1/models", None),
    ("get", "/v1/models/{model}", "model"),
    ("get", "/v1/responses/{response_id}", "response_id"),
    ("delete", "/v1/responses/{response_id}", "response_id"),
    ("get", "/api/tags", None),
    ("get", "/api/version", None),
    ("get", "/metrics", None),
    ("get", "/healthz", None),
    ("get", "/readyz", None),
)

_EXACT = {
    "name": EXACT_HEADER,
    "in": "header",
    "description": f"An approximation, whose answers have {APPROXIMATE_HEADER}, may not answer.",
    "schema": {"enum": ["required"]},
}


def encode_openapi() -> bytes:
    """The answer of /openapi.json."""
    schemas, components = _schemas()
    paths: dict[str, dict[str, Any]] = {}
    for path, shape, stream in _POSTS:
        body = {"required": True, "content": {_JSON: {"schema": schemas[shape.body]}}}
        kinds = (_JSON,) if stream is None else (_JSON, stream)
        paths[path] = {
            "post": {"parameters": [_EXACT], "requestBody": body, "responses": _responses(kinds)}
        }
    for method, path, name in _OTHERS:
        kinds = ("text/plain",) if path == "/metrics" else (_JSON,)
        operation: dict[str, Any] = {"responses": _responses(kinds)}
        if name is not None:
            place = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [place]
        paths.setdefault(path, {})[method] = operation
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "meshnode", "version": __version__},
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                },
            },
            # A node without a key file asks for none.
            "security": [{}, {"bearer": []}, {"x-api-key": []}],
        }
    )


def _schemas() -> tuple[Mapping[type[msgspec.Struct], Any], dict[str, Any]]:
    """A reference to each struct's schema, and the schemas by name."""
    neutral = {struct: values for _, shape, _ in _POSTS for struct, values in shape.neutral.items()}
    structs = list(dict.fromkeys([*neutral, *(shape.body for _, shape, _ in _POSTS)]))
    references, components = msgspec.json.schema_components(
        structs, ref_template="#/components/schemas/{name}"
    )
    schemas = dict(zip(structs, references, strict=True))
    for struct, values in neutral.items():
        name = schemas[struct]["$ref"].rpartition("/")[2]
        for field, works in values.items():
            components[name]["properties"][field] = {"enum": [None, *works]}
    return schemas, components


def _responses(kinds: tuple[str, ...]) -> dict[str, Any]:
    """`kinds` are the content types of an answer."""
    refused = {"description": "Refused; the error says why.", "content": {_JSON: {}}}
    return {
        "200": {"description": "The answer.", "content": {kind: {} for kind in kinds}},
        "4XX": refused,
        "5XX": {**refused, "description": "Nobody can answer now; Retry-After says when."},
    }
