"""Embeddings from an engine as the node uses it: a real model in a real child process."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import trio

from meshnode.engine import (
    EMBED_FLOATS_MAX,
    EMBED_INPUTS_MAX,
    EMBED_TOKENS_MAX,
    Delta,
    Embedded,
    EmbedRequest,
    Finish,
    ModelCard,
    Request,
    Sampling,
)
from meshnode.engine.card import load_card
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.errors import EngineBusyError, EngineError
from meshnode.errors import RequestError as BadRequestError
from meshnode.models.catalog import ModelSource
from tests.engine.serving import started
from tests.engine.tiny_models import CONTEXT_TOKENS, EMBEDDING, write_bert

SENTENCE = "A cat sat on the mat and looked at the rain behind the window. "


def options(context_tokens: int | None) -> EngineOptions:
    return EngineOptions(context_tokens, slots=2, waiting_max=2, threads=1)


async def card_of(path: Path) -> ModelCard:
    return await load_card(ModelSource("tiny", path), path.parent, lambda fraction: None)


@pytest.fixture
async def engine(q4_0_card: ModelCard) -> AsyncIterator[EngineProcess]:
    async with started(q4_0_card, options(1024)) as engine:
        yield engine


def ask(*inputs: str | tuple[int, ...], query: str | None = None) -> EmbedRequest:
    return EmbedRequest("r", inputs, query)


async def vectors(engine: EngineProcess, request: EmbedRequest) -> tuple[list[np.ndarray], int]:
    async with engine.embed(request) as embedded:
        made = [np.frombuffer(vector, "<f4") async for vector in embedded.vectors]
        return made, embedded.prompt_tokens


async def test_vectors_beside_running_answers(engine: EngineProcess) -> None:
    """The answers go on while a large job is read, and so does the job."""
    story = Request("r", b"s" * 16, "Once upon a time", Sampling(temperature=0.8, seed=1), 60)
    events: list[str] = []

    async def embed() -> None:
        made, tokens = await vectors(engine, ask(*[SENTENCE] * 48))
        assert len(made) == 48
        assert tokens % 48 == 0
        assert all(float(made[0] @ vector) > 0.999 for vector in made)
        events.append("embedded")

    async with trio.open_nursery() as nursery, engine.generate(story) as answer:
        async for event in answer:
            if isinstance(event, Delta) and not events:
                nursery.start_soon(embed)
            events.append("end" if isinstance(event, Finish) else "text")
            if events[-1] == "end":
                break
    between = events[1 : events.index("embedded")]
    assert between.count("text") >= 5, events


async def test_what_is_left_early_is_not_computed(engine: EngineProcess) -> None:
    async with engine.embed(ask(*[SENTENCE * 20] * 100)) as embedded:
        await embedded.vectors.__anext__()
        while engine.stats().queue_depth != 1:
            await trio.sleep(0.01)
    with trio.fail_after(10):  # all of it would take minutes
        await engine.wait_idle()
        made, _ = await vectors(engine, ask("Hello"))
        while engine.stats().queue_depth:
            await trio.sleep(0.01)
    assert made[0].shape == (576,)


async def test_jobs_are_bounded_as_requests_are(engine: EngineProcess) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            await nursery.start(_hold, engine)
        with pytest.raises(EngineBusyError):
            await vectors(engine, ask("Hello"))
        nursery.cancel_scope.cancel()
    await engine.wait_idle()


async def _hold(
    engine: EngineProcess, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    async with engine.embed(ask(*[SENTENCE * 20] * 100)):
        task_status.started()
        await trio.sleep_forever()


async def _all(embedded: Embedded) -> list[bytes]:
    return [vector async for vector in embedded.vectors]


async def test_a_crash_is_told_and_overcome(engine: EngineProcess) -> None:
    async with engine.embed(ask(*[SENTENCE * 20] * 100)) as embedded:
        await embedded.vectors.__anext__()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="SIGKILL"):
            await _all(embedded)
    await engine.wait_ready()
    assert len((await vectors(engine, ask("Hello")))[0]) == 1


REFUSED = [
    (ask(), "input", "1 to 2048"),
    (ask("a", ""), "input[1]", "empty"),
    (ask("a", ()), "input[1]", "empty"),
    (ask((1, 49152)), "input[0]", "0 to 49151"),
    (ask((2**40,)), "input[0]", "0 to 49151"),
    (ask("a", "hello " * 1025), "input[1]", "context is 1024"),
    (ask(*["a"] * (EMBED_INPUTS_MAX + 1)), "input", "1 to 2048"),
    (ask(*[(1,) * 1000] * (EMBED_TOKENS_MAX // 1000 + 1)), "input", "over 300000 tokens"),
    (EmbedRequest("r", ("a",), dimensions=128), "dimensions", "have 576"),
    (ask("a", query="b"), "model", "no head for ranking"),
]


async def test_bad_requests_are_named(engine: EngineProcess) -> None:
    for request, param, problem in REFUSED:
        with pytest.raises(BadRequestError, match=problem) as refused:
            await vectors(engine, request)
        assert refused.value.param == param
    assert len((await vectors(engine, ask("a")))[0]) == 1
    assert engine.in_flight == 0


async def test_an_embedding_model_says_what_it_is_for(tmp_path: Path) -> None:
    card = await card_of(write_bert(tmp_path / "bert.gguf", gguf.PoolingType.MEAN))
    async with started(card, options(None)) as engine:
        made, tokens = await vectors(engine, ask("the cat sat", "a dog runs fast"))
        assert [len(vector) for vector in made] == [EMBEDDING] * 2
        assert tokens == 5 + 6
        assert (engine.stats().purpose, engine.stats().sees) == ("embed", False)
        with pytest.raises(BadRequestError, match=f"context is {CONTEXT_TOKENS}"):
            await vectors(engine, ask("cat " * CONTEXT_TOKENS))
        with pytest.raises(BadRequestError, match="/v1/embeddings"):
            await engine.generate(Request("r", b"s" * 16, "the cat")).__aenter__()
        with pytest.raises(BadRequestError, match="/v1/embeddings") as refused:
            await vectors(engine, ask("a", query="b"))
        assert refused.value.param == "model"


async def test_a_reranker_ranks(tmp_path: Path) -> None:
    card = await card_of(write_bert(tmp_path / "rank.gguf", gguf.PoolingType.RANK))
    documents = ("a dog runs fast", "the cat sat on the mat", "a dog runs fast")
    async with started(card, options(None)) as engine:
        scores, _ = await vectors(engine, ask(*documents, query="the cat"))
        assert [score.shape for score in scores] == [(1,)] * 3
        assert engine.stats().purpose == "rank"
        assert scores[0] == pytest.approx(scores[2], rel=1e-3)
        assert scores[0] != pytest.approx(scores[1], rel=1e-3)
        other, _ = await vectors(engine, ask(documents[0], query="a small dog"))
        assert other[0] != pytest.approx(scores[0], rel=1e-3)
        with pytest.raises(BadRequestError, match="/v1/rerank"):
            await vectors(engine, ask("the cat"))
        with pytest.raises(BadRequestError, match=r"documents\[0\].*ranked as text"):
            await vectors(engine, ask((1, 2), query="the cat"))
        with pytest.raises(BadRequestError, match=r"documents\[1\]"):
            await vectors(engine, ask("a", "cat " * CONTEXT_TOKENS, query="the cat"))


def test_an_answer_fits_between_nodes() -> None:
    """In base64, with room for the rest of it."""
    assert EMBED_FLOATS_MAX * 4 * 4 // 3 + EMBED_INPUTS_MAX * 100 < 16 * 1024 * 1024
