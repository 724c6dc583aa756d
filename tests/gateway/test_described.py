"""Every route as /openapi.json describes it: no body makes a 5xx, and each refusal names a field.

`make clients` and `make soak` let schemathesis do the same with all it has.
"""

from __future__ import annotations

import json
import re

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshnode.engine import ChatStyle
from meshnode.gateway.app import create_api_app
from meshnode.gateway.openapi import encode_openapi
from tests.fakes import MODEL, WordEngine, local_mesh

HANG_S = 20.0
DEPTH_MAX = 4
DOCUMENT = json.loads(encode_openapi())
TURN = {"role": "user", "content": "to be or"}
# The least that each route answers with 200.
LEAST = {
    "/v1/chat/completions": {"model": MODEL, "messages": [TURN]},
    "/v1/completions": {"model": MODEL, "prompt": "to be or", "max_tokens": 3},
    "/v1/responses": {"model": MODEL, "input": "to be or"},
    "/v1/messages": {"model": MODEL, "messages": [TURN], "max_tokens": 3},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": [TURN]},
    "/api/chat": {"model": MODEL, "messages": [TURN], "stream": False},
    "/api/generate": {"model": MODEL, "prompt": "to be or", "stream": False},
    "/api/show": {"model": MODEL},
    "/v1/embeddings": {"model": MODEL, "input": "to be"},
    "/v1/rerank": {"model": MODEL, "query": "to be", "documents": ["or", "not"]},
    "/rerank": {"model": MODEL, "query": "to be", "documents": ["or", "not"]},
    "/api/embed": {"model": MODEL, "input": "to be"},
    "/api/embeddings": {"model": MODEL, "prompt": "to be"},
}
POSTS = sorted(path for path, methods in DOCUMENT["paths"].items() if "post" in methods)
JUNK = st.sampled_from([None, True, 0, -1, 1e300, "", "x", [], [None], {}, {"x": 1}, "\ud800"])


def schema_of(path: str) -> dict:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    return resolved(content["application/json"]["schema"])


def resolved(schema: dict) -> dict:
    while "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def values(schema: dict, depth: int = 0) -> st.SearchStrategy:
    """What a schema admits, of the kinds that msgspec writes."""
    schema = resolved(schema)
    if depth > DEPTH_MAX:
        return JUNK
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    if "anyOf" in schema:
        return st.one_of([values(each, depth + 1) for each in schema["anyOf"]])
    match schema.get("type"):
        case "object" if "properties" in schema:
            fields = {k: values(v, depth + 1) for k, v in schema["properties"].items()}
            needed = set(schema.get("required", ()))
            return st.fixed_dictionaries(
                {k: v for k, v in fields.items() if k in needed},
                optional={k: v for k, v in fields.items() if k not in needed},
            )
        case "object":
            return st.dictionaries(st.text(max_size=4), JUNK, max_size=2)
        case "array":
            return st.lists(values(schema.get("items", {}), depth + 1), max_size=3)
        case "string":
            return st.text(max_size=8)
        case "integer":
            return st.integers(schema.get("minimum"), schema.get("maximum"))
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum"))
            return st.floats(low, schema.get("maximum"), allow_nan=False, allow_infinity=False)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return JUNK


@st.composite
def requests(draw):
    """A route, a body that is nearly good, and the fields of it that were drawn."""
    path = draw(st.sampled_from(POSTS))
    fields = schema_of(path)["properties"]
    names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True))
    changes = {name: draw(st.one_of(values(fields[name]), JUNK)) for name in names}
    # Long answers show nothing more.
    for limit in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if type(changes.get(limit)) is int:
            changes[limit] = min(changes[limit], 8)
    if type(changes.get("n")) is int:  # this engine has one answer
        changes["n"] = min(changes["n"], 1)
    return path, {**LEAST[path], **changes}


@pytest.fixture(scope="module")
def api():
    engine = WordEngine(style=ChatStyle("may", "may", "none", has_effort=True))
    return create_api_app(local_mesh(engine)).test_client()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=requests())
async def test_no_body_makes_a_5xx_and_refusals_name_a_field(api, request):
    path, body = request
    with trio.fail_after(HANG_S):
        response = await api.post(path, data=json.dumps(body).encode())
        said = await response.get_data()
    assert response.status_code < 500, said
    if response.status_code != 400:
        return
    error = json.loads(said)["error"]
    message = error if isinstance(error, str) else error["message"]
    named = re.search(r"`([^`]+)`", message)
    assert named or "JSON" in message, message
    if named and path.startswith("/v1/") and not path.startswith("/v1/messages"):
        assert error["param"], message


@pytest.mark.parametrize("path", POSTS)
async def test_the_least_is_enough_and_a_stranger_is_named(api, path):
    response = await api.post(path, json=LEAST[path])
    assert response.status_code == 200
    response = await api.post(path, json={**LEAST[path], "stranger": None})
    assert response.status_code == 400
    assert "`stranger`" in json.dumps(json.loads(await response.get_data()))


@pytest.mark.parametrize("path", POSTS)
async def test_every_field_that_is_described_is_known(api, path):
    """Null asks for nothing, so that it works or is missed, but is never unknown."""
    for name in schema_of(path)["properties"]:
        response = await api.post(path, json={**LEAST[path], name: None})
        said = await response.get_data()
        assert b"unknown field" not in said, name
        needed = {*schema_of(path).get("required", ()), "model"}
        assert response.status_code == (400 if name in needed else 200), name
