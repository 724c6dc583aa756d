"""What the real model tells of its choices: probabilities that are its own."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from meshnode.engine import ChatMessage, Delta, Finish, ModelCard, Request, Sampling, TokenLogprobs
from meshnode.engine.process import EngineOptions, EngineProcess
from tests.engine.serving import started

OPTIONS = EngineOptions(context_tokens=1024, slots=4, waiting_max=4, threads=1)
GREEDY = Sampling(temperature=0)
QUESTION = (ChatMessage("user", "What is the capital of France?"),)
ASK = Request("r", b"a" * 16, QUESTION, GREEDY, 8, logprobs=3)


@pytest.fixture
async def engine(q4_0_card: ModelCard) -> AsyncIterator[EngineProcess]:
    async with started(q4_0_card, OPTIONS) as engine:
        yield engine


async def run(engine: EngineProcess, request: Request) -> tuple[str, list[TokenLogprobs], Finish]:
    deltas: list[Delta] = []
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Finish):
                text = "".join(delta.text for delta in deltas)
                return text, [each for delta in deltas for each in delta.logprobs], event
            deltas.append(event)
    raise AssertionError("the answer has no finish")


async def test_every_token_has_its_probability(engine: EngineProcess) -> None:
    text, told, finish = await run(engine, ASK)
    assert b"".join(each.drawn.piece for each in told).decode() == text
    assert len(told) == finish.usage.completion_tokens == 8
    for each in told:
        # A greedy answer is the likeliest, and probabilities are none above 1.
        assert each.drawn == each.top[0]
        assert [top.logprob for top in each.top] == sorted(
            (top.logprob for top in each.top), reverse=True
        )
        assert len(each.top) == 3
        assert sum(math.exp(top.logprob) for top in each.top) <= 1.0 + 1e-6
        assert math.exp(each.drawn.logprob) > 0.1
    _, bare, _ = await run(engine, replace(ASK, logprobs=0))
    assert [each.top for each in bare] == [()] * 8
    _, none, _ = await run(engine, replace(ASK, logprobs=None))
    assert none == []


async def test_they_are_the_models_own_whatever_the_sampling(engine: EngineProcess) -> None:
    _, told, _ = await run(engine, replace(ASK, max_tokens=1))
    forced = Sampling(temperature=0, logit_bias=((77, 100.0),))
    _, bent, _ = await run(engine, replace(ASK, max_tokens=1, sampling=forced))
    assert bent[0].top == told[0].top
    assert bent[0].drawn.logprob < told[0].drawn.logprob


async def test_a_stop_string_takes_its_tokens_with_it(engine: EngineProcess) -> None:
    plain, told, _ = await run(engine, ASK)
    pieces = [each.drawn.piece.decode() for each in told]
    stop = pieces[3] + pieces[4]
    text, cut, finish = await run(engine, replace(ASK, stop=(stop,)))
    assert (text, finish.reason) == ("".join(pieces[:3]), "stop")
    assert cut == told[:3]
    assert plain.startswith(text)
