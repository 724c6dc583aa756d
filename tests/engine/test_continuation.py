"""An answer that another engine began: the real model goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from meshnode.engine import (
    ChatMessage,
    Continuation,
    Delta,
    Finish,
    ModelCard,
    Request,
    Sampling,
)
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.errors import RequestError
from tests.engine.serving import started

# One thread: another thread count may flip a greedy token.
OPTIONS = EngineOptions(context_tokens=2048, slots=4, waiting_max=4, threads=1)
QUESTION = (ChatMessage("user", "Tell me a story about a llama, a 🦙, and a café."),)


@pytest.fixture
async def engine(q4_0_card: ModelCard) -> AsyncIterator[EngineProcess]:
    async with started(q4_0_card, OPTIONS) as engine:
        yield engine


def ask(max_tokens: int | None = 40, stop: tuple[str, ...] = (), **sampling: float) -> Request:
    return Request("r", b"a" * 16, QUESTION, Sampling(temperature=0, **sampling), max_tokens, stop)  # type: ignore[arg-type]


async def run(engine: EngineProcess, request: Request) -> tuple[list[Delta], Finish]:
    deltas: list[Delta] = []
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Finish):
                return deltas, event
            deltas.append(event)
    raise AssertionError("the answer has no finish")


def come(deltas: list[Delta]) -> Continuation:
    ids = tuple(token for delta in deltas for token in delta.ids)
    return Continuation(ids, sum(len(delta.text) for delta in deltas))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def check(engine: EngineProcess, request: Request, step: int) -> tuple[str, Finish]:
    """Lose the answer after every `step` deltas; each time it must become the same."""
    whole, finish = await run(engine, request)
    for lost in (*range(0, len(whole), step), len(whole)):
        had = whole[:lost]
        # Another session: no KV cache of the first answer is of help.
        elsewhere = replace(request, session=bytes([lost]) * 16, continuation=come(had))
        rest, end = await run(engine, elsewhere)
        assert text_of(had) + text_of(rest) == text_of(whole)
        assert end.reason == finish.reason
        assert end.usage.completion_tokens == finish.usage.completion_tokens
        assert end.usage.prompt_tokens == finish.usage.prompt_tokens
        assert come(had + rest).chars == come(whole).chars
    return text_of(whole), finish


async def test_a_greedy_answer_goes_on_as_it_would_have(engine: EngineProcess) -> None:
    _, finish = await check(engine, ask(), step=3)
    assert finish.reason == "length"


async def test_an_answer_with_an_end_of_its_own(engine: EngineProcess) -> None:
    question = (ChatMessage("user", "What is the capital of France?"),)
    _, finish = await check(engine, replace(ask(max_tokens=None), prompt=question), step=2)
    assert finish.reason == "stop"


async def test_a_stop_string_may_begin_before_the_loss(engine: EngineProcess) -> None:
    plain = text_of((await run(engine, ask()))[0])
    middle = len(plain) // 2
    stop = plain[middle : middle + 24]
    stopped, finish = await check(engine, ask(stop=(stop,)), step=1)
    assert finish.reason == "stop"
    assert stopped == plain.partition(stop)[0]


async def test_half_a_stop_string_at_the_end_is_shown_once(engine: EngineProcess) -> None:
    plain = text_of((await run(engine, ask(max_tokens=20)))[0])
    shown, finish = await check(engine, ask(max_tokens=20, stop=(plain[-9:] + "\0",)), step=1)
    assert (shown, finish.reason) == (plain, "length")


async def test_half_a_stop_string_before_an_end_of_its_own_is_shown_once(
    engine: EngineProcess,
) -> None:
    question = (ChatMessage("user", "What is the capital of France?"),)
    request = replace(ask(max_tokens=None), prompt=question)
    plain = text_of((await run(engine, request))[0])
    shown, finish = await check(engine, replace(request, stop=(plain[-9:] + "\0",)), step=1)
    assert (shown, finish.reason) == (plain, "stop")


async def test_characters_of_several_tokens_are_not_torn(engine: EngineProcess) -> None:
    pieces = ((10813, 100.0), (116, 90.0), (243, 80.0))
    sampling = Sampling(temperature=0, presence_penalty=50.0, logit_bias=pieces)
    request = Request("r", b"a" * 16, "An animal:", sampling, 3)
    rest, _ = await run(engine, replace(request, continuation=Continuation((10813, 116), 0)))
    assert text_of(rest) == "🦙"


async def test_penalties_count_what_was_said_before(engine: EngineProcess) -> None:
    await check(engine, ask(frequency_penalty=1.5, presence_penalty=0.5), step=5)


@pytest.mark.parametrize("tokens", [(-1,), (2**31 - 1,)])
async def test_tokens_of_another_vocabulary_are_refused(
    engine: EngineProcess, tokens: tuple[int, ...]
) -> None:
    with pytest.raises(RequestError):
        async with engine.generate(replace(ask(), continuation=Continuation(tokens, 0))):
            raise AssertionError("it was accepted")


async def test_less_text_than_tokens_is_refused(engine: EngineProcess) -> None:
    whole, _ = await run(engine, ask(max_tokens=5))
    less = replace(come(whole), chars=1)
    with pytest.raises(RequestError):
        async with engine.generate(replace(ask(), continuation=less)):
            raise AssertionError("it was accepted")
