"""Whoever is answered by a part of a model is told so, on every way, and may decline."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshnode.gateway.app import create_api_app
from meshnode.messages import Approximate
from tests.fakes import MODEL, WordEngine, local_mesh
from tests.gateway.link import CHAT, Link

APPROXIMATE = Approximate(0.0244, 0.893, 1.04, 24, 32, "12D3KooW" + "A" * 44)
SAID = "kl=0.0244; agree=0.893; experts=24/32"
EXACT = {"x-meshnode-exact": "required"}
WAYS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": MODEL, "prompt": "to be or"},
    "/v1/embeddings": {"model": MODEL, "input": "to be or"},
    "/v1/responses": {"model": MODEL, "input": "to be or"},
    "/v1/messages": {**CHAT, "max_tokens": 5},
    "/api/chat": {**CHAT, "stream": False},
    "/api/generate": {"model": MODEL, "prompt": "to be or", "stream": True},
    "/api/embed": {"model": MODEL, "input": "to be or"},
}


@pytest.mark.parametrize("way", WAYS)
async def test_every_answer_says_how_near_it_comes(way: str) -> None:
    mesh = local_mesh(WordEngine())
    api = create_api_app(mesh).test_client()
    assert "x-meshnode-approximate" not in (await api.post(way, json=WAYS[way])).headers
    mesh.approximate = APPROXIMATE
    response = await api.post(way, json=WAYS[way])
    assert response.status_code == 200, await response.get_data()
    assert response.headers["x-meshnode-approximate"] == SAID


@pytest.mark.parametrize("stream", [False, True])
async def test_also_through_another_node(nursery, stream: bool) -> None:
    link = Link(nursery, b=WordEngine())
    link.mesh.approximate = APPROXIMATE
    response, _ = await link.ask(stream=stream)
    assert response.headers["x-meshnode-route"] == "tunnel"
    assert response.headers["x-meshnode-approximate"] == SAID
    response, _ = await link.ask("/v1/messages", stream=stream, max_tokens=5)
    assert response.headers["x-meshnode-approximate"] == SAID


@pytest.mark.parametrize("way", WAYS)
async def test_who_demands_an_exact_model_gets_one_or_nothing(way: str) -> None:
    engine = WordEngine()
    mesh = local_mesh(engine)
    api = create_api_app(mesh).test_client()
    assert (await api.post(way, json=WAYS[way], headers=EXACT)).status_code == 200
    engine.requests.clear()
    mesh.approximate = APPROXIMATE
    response = await api.post(way, json=WAYS[way], headers=EXACT)
    assert response.status_code == 400
    said = (await response.get_data()).decode()
    assert SAID in said
    assert "exact" in said
    assert engine.requests == []


async def test_the_refusal_is_openais_and_a_strange_demand_is_one(nursery) -> None:
    link = Link(nursery, b=WordEngine())
    link.mesh.approximate = APPROXIMATE
    response, body = await link.ask(headers=EXACT)
    error = json.loads(body)["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "approximate_only",
        "model",
    )
    for demand in ("yes", "", "Required"):
        response, body = await link.ask(headers={"x-meshnode-exact": demand})
        assert response.status_code == 400
        assert json.loads(body)["error"]["param"] == "x-meshnode-exact"
    assert link.engines["b"].requests == []


async def test_models_tell_it_with_who_measured_it() -> None:
    mesh = local_mesh(WordEngine())
    api = create_api_app(mesh).test_client()

    async def about() -> dict[str, Any]:
        listed = json.loads(await (await api.get("/v1/models")).get_data())["data"][0]
        alone = json.loads(await (await api.get(f"/v1/models/{MODEL}")).get_data())
        assert listed == alone
        found: dict[str, Any] = listed["meshnode"]
        return found

    assert "approximate" not in await about()
    mesh.approximate = APPROXIMATE
    assert (await about())["approximate"] == {
        "kl": 0.0244,
        "agreement": 0.893,
        "perplexity_ratio": 1.04,
        "kept": 24,
        "of": 32,
        "measured_by": APPROXIMATE.measured_by,
    }
