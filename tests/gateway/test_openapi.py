"""The API's description of itself: complete, and true of the code that checks bodies."""

from __future__ import annotations

import json
import re

import pytest

from meshnode.gateway.app import create_api_app
from meshnode.gateway.openapi import encode_openapi
from tests.fakes import WordEngine, local_mesh

DOCUMENT = json.loads(encode_openapi())
# What describes itself.
LEFT_OUT = {"/openapi.json"}


async def test_served_as_it_is_encoded() -> None:
    api = create_api_app(local_mesh(WordEngine())).test_client()
    response = await api.get("/openapi.json")
    assert response.status_code == 200
    assert json.loads(await response.get_data()) == DOCUMENT


def test_every_route_is_described() -> None:
    app = create_api_app(local_mesh(WordEngine()))
    routes = {
        (method.lower(), re.sub(r"<.*?>", "{}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.rule not in LEFT_OUT
    }
    described = {
        (method, re.sub(r"{.*?}", "{}", path))
        for path, methods in DOCUMENT["paths"].items()
        for method in methods
    }
    assert described == routes


def schema(path: str) -> dict[str, object]:
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return DOCUMENT["components"]["schemas"][body["$ref"].rpartition("/")[2]]


@pytest.mark.parametrize(
    ("path", "required"),
    [
        ("/v1/chat/completions", {"model", "messages"}),
        ("/v1/completions", {"model", "prompt"}),
        ("/v1/responses", {"model", "input"}),
        ("/v1/messages", {"model", "messages", "max_tokens"}),
        ("/v1/messages/count_tokens", {"model", "messages"}),
        ("/api/chat", {"model", "messages"}),
        ("/api/generate", {"model", "prompt"}),
    ],
)
def test_bodies_say_what_they_need_and_allow(path: str, required: set[str]) -> None:
    body = schema(path)
    assert set(body["required"]) == required
    assert body["additionalProperties"] is False


def test_a_field_that_does_not_work_says_so() -> None:
    assert schema("/v1/responses")["properties"]["background"] == {"enum": [None, False]}
    assert schema("/api/chat")["properties"]["logprobs"] == {"enum": [None, False]}
