"""What /metrics says after requests of every outcome, of clients here and of peers."""

from __future__ import annotations

import json

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from meshnode.gateway.app import create_api_app
from meshnode.gateway.door import Door
from meshnode.gateway.keys import ApiKey, generate_token, hash_token, with_key
from tests.fakes import DIGEST, MODEL, FakeMesh, WordEngine, local_mesh
from tests.gateway.link import HANG_S, Link

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "to be or"}]}


async def scraped(mesh: FakeMesh) -> dict[tuple[str, str], float]:
    """Each sample by its name and its outcome, as Prometheus's own parser reads them."""
    api = create_api_app(mesh).test_client()
    response = await api.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=1.0.0")
    families = text_string_to_metric_families((await response.get_data()).decode())
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["model"] for sample in samples} <= {MODEL}
    return {(each.name, each.labels.get("outcome", "")): each.value
            for each in samples if "le" not in each.labels}  # fmt: skip


async def post(mesh: FakeMesh, path: str = "/v1/chat/completions", **changes: object) -> int:
    api = create_api_app(mesh).test_client()
    with trio.fail_after(HANG_S):
        response = await api.post(path, json={**CHAT, **changes})
        await response.get_data()
    status: int = response.status_code
    return status


async def test_what_is_computed_is_counted() -> None:
    engine = WordEngine()
    mesh = local_mesh(engine)
    assert await scraped(mesh) == {
        ("meshnode_queue_depth", ""): 0, ("meshnode_slots_busy", ""): 0, ("meshnode_slots", ""): 1,
    }  # fmt: skip
    assert await post(mesh) == 200
    assert await post(mesh, stream=True) == 200
    assert await post(mesh, logit_bias={"x": 1}) == 400  # the edge refuses; no engine was asked
    assert await post(mesh, max_tokens=1) == 200
    api = create_api_app(mesh).test_client()
    embed = {"model": MODEL, "input": ["to be", "or"]}
    assert (await api.post("/v1/embeddings", json=embed)).status_code == 200
    empty = {"model": MODEL, "prompt": []}
    assert (await api.post("/v1/completions", json=empty)).status_code == 400  # it was asked
    said = await scraped(mesh)
    assert said["meshnode_requests_total", "finished"] == 4
    assert said["meshnode_requests_total", "refused"] == 1
    assert said["meshnode_prompt_tokens_total", ""] == 3 * 3 + 3
    assert said["meshnode_cached_prompt_tokens_total", ""] == 3
    assert said["meshnode_completion_tokens_total", ""] == 5 + 5 + 1
    assert said["meshnode_time_to_first_token_seconds_count", ""] == 3


@pytest.mark.parametrize(
    ("engine", "outcome"),
    [(WordEngine(busy=True), "busy"), (WordEngine(die_after=2), "failed")],
)
async def test_what_goes_wrong_is_counted(engine: WordEngine, outcome: str) -> None:
    mesh = local_mesh(engine)
    assert await post(mesh) == 503
    assert (await scraped(mesh))["meshnode_requests_total", outcome] == 1


async def test_who_leaves_is_counted() -> None:
    computing = trio.Event()

    async def pace() -> None:
        computing.set()
        await trio.sleep_forever()

    mesh = local_mesh(WordEngine(pace=pace))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(post, mesh)
        await computing.wait()
        nursery.cancel_scope.cancel()
    assert (await scraped(mesh))["meshnode_requests_total", "left"] == 1


async def test_the_node_that_computes_counts(nursery: trio.Nursery) -> None:
    link = Link(nursery, b=WordEngine())
    response, _ = await link.ask()
    assert response.status_code == 200
    assert await scraped(link.mesh) == {}
    assert (await scraped(link.meshes["b"]))["meshnode_requests_total", "finished"] == 1


async def test_where_keys_are_asked_for_metrics_need_one(tmp_path) -> None:
    token = generate_token()
    file = tmp_path / "api-keys.toml"
    file.write_text(with_key("", ApiKey("alice", hash_token(token)), file))
    file.chmod(0o600)
    api = create_api_app(local_mesh(WordEngine()), door=Door(file)).test_client()
    response = await api.get("/metrics")
    assert response.status_code == 401
    assert "key" in json.loads(await response.get_data())["error"]["message"]
    response = await api.get("/metrics", headers={"authorization": f"Bearer {token}"})
    assert response.status_code == 200
    assert DIGEST not in (await response.get_data()).decode()
