"""Models that do not chat, on a node of their own, and used through a gateway without an engine."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import pytest

from tests.e2e.mesh import Mesh, NodeProcess, serves, wait_all_see
from tests.engine.tiny_models import CONTEXT_TOKENS, EMBEDDING, write_bert


@dataclass
class Nodes:
    reader: NodeProcess
    gate: NodeProcess


@pytest.fixture(scope="module")
def nodes(module_mesh: Mesh) -> Nodes:
    encoder = write_bert(module_mesh.folder / "encoder.gguf", gguf.PoolingType.MEAN)
    reranker = write_bert(module_mesh.folder / "reranker.gguf", gguf.PoolingType.RANK)
    flags = ("--model", f"{encoder}=encoder", "--model", f"{reranker}=reranker")
    # Its --context is far more than these models were trained for.
    reader = module_mesh.node("reader", *flags, models=()).wait_ready()
    gate = module_mesh.gateway("gate", "--join", reader.invite()).wait_started()
    wait_all_see([reader, gate])
    for model in ("encoder", "reranker"):
        gate.wait_until(lambda status, model=model: serves(status, model) == {reader.peer_id})
    return Nodes(reader, gate)


def test_an_encoder_embeds_and_does_not_chat(nodes: Nodes) -> None:
    asked = {"model": "encoder", "input": ["the cat sat", "a dog runs fast"]}
    here, there = (
        node.request("POST", "/v1/embeddings", asked) for node in (nodes.reader, nodes.gate)
    )
    assert [len(row["embedding"]) for row in there.body["data"]] == [EMBEDDING] * 2
    assert there.body == here.body
    assert (there.route, there.served_by) == ("tunnel", nodes.reader.peer_id)
    chat = {"model": "encoder", "messages": [{"role": "user", "content": "the cat"}]}
    refused = nodes.gate.request("POST", "/v1/chat/completions", chat)
    assert refused.status == 400
    assert refused.body["error"]["param"] == "model"
    assert "/v1/embeddings" in refused.body["error"]["message"]
    long = {"model": "encoder", "input": ["a", "cat " * CONTEXT_TOKENS]}
    refused = nodes.gate.request("POST", "/v1/embeddings", long)
    assert (refused.status, refused.body["error"]["param"]) == (400, "input[1]")


def test_a_reranker_ranks(nodes: Nodes) -> None:
    documents = ["a dog runs fast", "the cat sat on the mat", "big"]
    asked = {"model": "reranker", "query": "the cat", "documents": documents}
    answer = nodes.gate.request("POST", "/v1/rerank", asked)
    assert answer.served_by == nodes.reader.peer_id
    results = answer.body["results"]
    scores = [result["relevance_score"] for result in results]
    assert sorted(scores, reverse=True) == scores
    assert len(set(scores)) == 3
    assert {result["index"] for result in results} == {0, 1, 2}
    best = nodes.reader.request("POST", "/rerank", {**asked, "top_n": 1, "return_documents": True})
    (result,) = best.body["results"]
    assert result["index"] == results[0]["index"]
    assert result["document"] == {"text": documents[result["index"]]}
