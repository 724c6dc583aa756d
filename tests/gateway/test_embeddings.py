"""Embeddings and reranking through the gateway: shapes, refusals, and the way through peers."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
import trio

from meshnode.engine import EMBED_INPUTS_MAX
from meshnode.engine.echo import DIMENSIONS
from meshnode.errors import EngineError, RequestError
from meshnode.gateway.app import create_api_app
from meshnode.gateway.dialects import ollama
from meshnode.gateway.embeddings import (
    Embed,
    Rerank,
    decode_embed,
    decode_rerank,
    read_vectors,
)
from tests.fakes import MODEL, WordEngine, local_mesh, tunnel_to
from tests.gateway.link import Link

EMBED = {"model": MODEL, "input": ["to be or", "not to be"]}
RERANK = {"model": MODEL, "query": "to be", "documents": ["not me", "to be or", "be"]}
OLLAMA = {"model": MODEL, "input": "to be"}


def embed(**fields: Any) -> Embed:
    return decode_embed(json.dumps({"model": "m", "input": "a", **fields}).encode())


def rerank(**fields: Any) -> Rerank:
    return decode_rerank(json.dumps({**RERANK, **fields}).encode())


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a"] * EMBED_INPUTS_MAX, ("a",) * EMBED_INPUTS_MAX),
    ],
)
def test_forms_of_input(given: Any, inputs: tuple[Any, ...]) -> None:
    call = embed(input=given)
    assert call.inputs == inputs
    # As nodes pass it on, it means the same.
    passed_on = decode_embed(call.body)
    assert (passed_on.inputs, passed_on.encoding_format) == (inputs, "base64")


REFUSED_EMBED = [
    ({"input": []}, "input"),
    ({"input": ""}, "input[0]"),
    ({"input": ["a", ""]}, "input[1]"),
    ({"input": [[]]}, "input[0]"),
    ({"input": [[1], []]}, "input[1]"),
    ({"input": ["a", 1]}, "input"),
    ({"input": [1, "a"]}, "input"),
    ({"input": [1, [2]]}, "input"),
    ({"input": ["a", [2]]}, "input"),
    ({"input": ["a"] * (EMBED_INPUTS_MAX + 1)}, "input"),
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": {"text": "a"}}, "input"),
    ({"input": [True]}, "input[0]"),
    ({"input": [-1]}, "input[0]"),
    ({"input": [2**31]}, "input[0]"),
    ({"input": [1.5]}, "input[0]"),
    ({"input": [["a"]]}, "input[0][0]"),
    ({"encoding_format": "int8"}, "encoding_format"),
    ({"dimensions": 0}, "dimensions"),
    ({"dimensions": "8"}, "dimensions"),
    ({"user": 1}, "user"),
    ({"model": ""}, "model"),
    ({"input_type": "query"}, "input_type"),
    ({"stream": True}, "stream"),
]
REFUSED_RERANK = [
    ({"documents": []}, "documents"),
    ({"documents": "a"}, "documents"),
    ({"documents": [1]}, "documents[0]"),
    ({"documents": [{"image": "a"}]}, "documents[0].image"),
    ({"documents": ["a"] * (EMBED_INPUTS_MAX + 1)}, "documents"),
    ({"query": ""}, "query"),
    ({"query": ["a"]}, "query"),
    ({"top_n": 0}, "top_n"),
    ({"return_documents": "yes"}, "return_documents"),
    ({"max_chunks_per_doc": 1}, "max_chunks_per_doc"),
]
REFUSED_OLLAMA = [
    ({"truncate": True}, "truncate"),
    ({"options": {"num_ctx": 4096}}, "options"),
    ({"input": [1]}, "input[0]"),
    ({"input": []}, "input"),
    ({"dimensions": -1}, "dimensions"),
    ({"prompt": "a"}, "prompt"),
]


@pytest.mark.parametrize(
    ("path", "least", "fields", "param"),
    [("/v1/embeddings", EMBED, *case) for case in REFUSED_EMBED]
    + [("/v1/rerank", RERANK, *case) for case in REFUSED_RERANK]
    + [("/rerank", RERANK, *REFUSED_RERANK[0])],
)
async def test_refusals_name_the_field(
    path: str, least: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    api = create_api_app(local_mesh(WordEngine())).test_client()
    response = await api.post(path, json={**least, **fields})
    assert response.status_code == 400
    error = json.loads(await response.get_data())["error"]
    assert error["param"] == param
    assert f"`{param}`" in error["message"]


@pytest.mark.parametrize(("fields", "param"), REFUSED_OLLAMA)
def test_ollamas_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        ollama.decode_embed_body(json.dumps({**OLLAMA, **fields}).encode())
    assert refused.value.param == param


async def said(api: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await api.post(path, json=body)
    whole = await response.get_data()
    assert response.status_code == 200, whole
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = json.loads(whole)
    return answer


async def test_floats_and_base64_agree() -> None:
    engine = WordEngine()
    api = create_api_app(local_mesh(engine)).test_client()
    answer = await said(api, "/v1/embeddings", {**EMBED, "user": "u"})
    coded = await said(api, "/v1/embeddings", {**EMBED, "encoding_format": "base64"})
    assert answer["object"] == "list"
    assert answer["model"] == MODEL
    assert answer["usage"] == coded["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    for index, (row, other) in enumerate(zip(answer["data"], coded["data"], strict=True)):
        assert (row["object"], row["index"]) == (other["object"], index) == ("embedding", index)
        assert len(row["embedding"]) == DIMENSIONS
        vector = base64.b64decode(other["embedding"])
        assert struct.pack(f"<{DIMENSIONS}f", *row["embedding"]) == vector
    assert [request.inputs for request in engine.requests] == [("to be or", "not to be")] * 2


async def test_dimensions_work_or_are_refused() -> None:
    api = create_api_app(local_mesh(WordEngine())).test_client()
    await said(api, "/v1/embeddings", {**EMBED, "dimensions": DIMENSIONS})
    response = await api.post("/v1/embeddings", json={**EMBED, "dimensions": 8})
    assert response.status_code == 400
    assert json.loads(await response.get_data())["error"]["param"] == "dimensions"


async def test_rerank_sorts_and_cuts() -> None:
    api = create_api_app(local_mesh(WordEngine())).test_client()
    answer = await said(api, "/v1/rerank", RERANK)
    assert answer["results"] == [
        {"index": 1, "relevance_score": 2.0},
        {"index": 2, "relevance_score": 1.0},
        {"index": 0, "relevance_score": 0.0},
    ]
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    documents = [{"text": text} for text in RERANK["documents"]]
    asked = {**RERANK, "documents": documents, "top_n": 1, "return_documents": True}
    answer = await said(api, "/rerank", asked)
    best = {"index": 1, "relevance_score": 2.0, "document": {"text": "to be or"}}
    assert answer["results"] == [best]
    assert answer["model"] == MODEL


async def test_ollamas_shapes() -> None:
    api = create_api_app(local_mesh(WordEngine())).test_client()
    rows = (await said(api, "/v1/embeddings", EMBED))["data"]
    answer = await said(api, "/api/embed", {**EMBED, "truncate": False, "options": {}})
    assert answer["embeddings"] == [row["embedding"] for row in rows]
    assert answer["prompt_eval_count"] == 6
    assert answer["total_duration"] > 0
    asked = {"model": MODEL, "prompt": EMBED["input"][0]}
    answer = await said(api, "/api/embeddings", asked)
    assert answer == {"embedding": rows[0]["embedding"]}
    response = await api.post("/api/embed", json={**OLLAMA, "model": "nobody"})
    assert response.status_code == 404
    assert "nobody" in json.loads(await response.get_data())["error"]


# ---------------------------------------------------------------------------------------------
# Through peers
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/embeddings", EMBED), ("/v1/rerank", RERANK), ("/rerank", RERANK),
     ("/api/embed", OLLAMA)],
)  # fmt: skip
async def test_a_peer_answers_for_us(
    nursery: trio.Nursery, path: str, body: dict[str, Any]
) -> None:
    alone = create_api_app(local_mesh(WordEngine())).test_client()
    link = Link(nursery, b=WordEngine())
    response = await link.api.post(path, json=body)
    assert response.headers["x-meshnode-served-by"] == "peer-b"
    assert response.headers["x-meshnode-route"] == "tunnel"
    there = json.loads(await response.get_data())
    here = await said(alone, path, body)
    for changing in ("id", "total_duration"):
        assert (changing in there) == (changing in here)
        there.pop(changing, None)
        here.pop(changing, None)
    assert there == here
    assert link.mesh.calls == [("routed", "peer-b"), ("finished", "peer-b")]


@pytest.mark.parametrize("b", [WordEngine(die_after=1), WordEngine(busy=True)])
async def test_the_next_replica_begins_anew(nursery: trio.Nursery, b: WordEngine) -> None:
    link = Link(nursery, b=b, c=WordEngine())
    response = await link.api.post("/v1/embeddings", json=EMBED)
    assert response.status_code == 200
    assert response.headers["x-meshnode-served-by"] == "peer-c"
    assert len(json.loads(await response.get_data())["data"]) == 2


async def test_nobody_left_is_a_503(nursery: trio.Nursery) -> None:
    link = Link(nursery, b=WordEngine(die_after=0))
    response = await link.api.post("/v1/embeddings", json=EMBED)
    assert response.status_code == 503
    assert "retry-after" in response.headers


async def test_requests_are_spread_over_the_replicas(nursery: trio.Nursery) -> None:
    link = Link(nursery, b=WordEngine())
    sessions = set()
    for _ in range(12):
        await link.api.post("/v1/embeddings", json=EMBED)
        sessions.add(link.mesh.sessions[-1])
    assert len(sessions) > 1


def rows(*vectors: Any) -> bytes:
    data = [{"embedding": vector} for vector in vectors]
    return json.dumps({"data": data, "usage": {"prompt_tokens": 1}}).encode()


FLOAT = base64.b64encode(bytes(4)).decode()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[" * 10_000,
        b"\xff",
        b"{}",
        b'{"data":[],"usage":{}}',
        rows(),
        rows(FLOAT),
        rows(FLOAT, FLOAT, FLOAT),
        rows(FLOAT, "!"),
        rows(FLOAT, "é"),
        rows(FLOAT, [0.5]),
        rows(FLOAT, FLOAT + FLOAT),
        rows("AAA=", "AAA="),
        rows(*[base64.b64encode(bytes(8)).decode(), FLOAT]),
    ],
)
def test_what_a_peer_says_is_read_strictly(answer: bytes) -> None:
    with pytest.raises(EngineError):
        read_vectors(embed(input=["a", "b"]), answer)


async def test_a_lying_peer_is_no_mistake_of_ours(nursery: trio.Nursery) -> None:
    async def lie(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": rows(FLOAT)})

    link = Link(nursery, b=WordEngine())
    link.mesh.tunnels["peer-b"] = tunnel_to(lie, nursery)
    response = await link.api.post("/v1/embeddings", json=EMBED)
    assert response.status_code == 503


def test_what_is_no_number_is_no_vector() -> None:
    """JSON has no NaN; a peer can send its bits."""
    nan = base64.b64encode(struct.pack("<f", float("nan"))).decode()
    call = embed()
    with pytest.raises(EngineError):
        read_vectors(call, rows(nan))
