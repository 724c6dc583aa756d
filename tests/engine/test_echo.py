"""The echo engine keeps the contract of engines, so what is tested with it means something."""

from __future__ import annotations

import math
import struct

import pytest
import trio

from meshnode.engine import ChatMessage, Delta, EmbedRequest, Engine, Finish, Request, Usage
from meshnode.engine.echo import CONTEXT_TOKENS, SESSIONS_MAX, EchoEngine
from meshnode.errors import ContextLengthError, EngineBusyError, EngineError
from meshnode.errors import RequestError as BadRequestError


def ask(
    *contents: str, session: bytes = b"s", max_tokens: int | None = None, stop: tuple[str, ...] = ()
) -> Request:
    prompt = tuple(ChatMessage("user", content) for content in contents)
    return Request("r", session, prompt, max_tokens=max_tokens, stop=stop)


async def collect(engine: Engine, request: Request) -> tuple[str, Finish]:
    async with engine.generate(request) as events:
        received = [event async for event in events]
    *deltas, finish = received
    assert isinstance(finish, Finish)
    text = "".join(delta.text for delta in deltas if isinstance(delta, Delta))
    tokens = sum(delta.tokens for delta in deltas if isinstance(delta, Delta))
    assert tokens <= finish.usage.completion_tokens
    return text, finish


async def test_it_says_the_last_message_and_counts() -> None:
    engine = EchoEngine()
    assert await collect(engine, ask("be short", "hello big world")) == (
        "hello big world",
        Finish("stop", Usage(prompt_tokens=5, cached_tokens=0, completion_tokens=3)),
    )
    _, finish = await collect(engine, ask("be short", "hello big world", "x"))
    assert finish.usage.cached_tokens == 5
    assert engine.stats().sessions == (b"s",)


async def test_limits_and_stop_strings() -> None:
    engine = EchoEngine()
    text, finish = await collect(engine, ask("one two three", max_tokens=2))
    assert (text, finish.reason) == ("one two", "length")
    text, finish = await collect(engine, ask("one two three", stop=(" tw",)))
    assert (text, finish.reason) == ("one", "stop")
    with pytest.raises(ContextLengthError):
        await collect(engine, ask("x " * (CONTEXT_TOKENS + 1)))
    with pytest.raises(BadRequestError):
        await collect(engine, ask(""))


async def test_slots_are_bounded_and_freed_by_leaving() -> None:
    engine = EchoEngine(slots=1, token_interval_s=1.0)
    async with engine.generate(ask("a b c")):
        assert engine.stats().slots_busy == 1
        with pytest.raises(EngineBusyError):
            await collect(engine, ask("d"))
    assert engine.stats().slots_busy == 0


async def test_it_can_break_midway() -> None:
    engine = EchoEngine(break_after_tokens=1)
    seen = []

    async def consume() -> None:
        async with engine.generate(ask("one two")) as events:
            seen.extend([event async for event in events])

    with pytest.raises(EngineError, match="breaks here"):
        await consume()
    assert engine.stats().slots_busy == 0


async def test_time_passes_only_as_asked(autojump_clock: trio.abc.Clock) -> None:
    started_at = trio.current_time()
    await collect(EchoEngine(token_interval_s=2.0), ask("one two three"))
    assert trio.current_time() - started_at == 6.0


async def test_old_sessions_are_forgotten() -> None:
    engine = EchoEngine()
    for number in range(SESSIONS_MAX + 1):
        await collect(engine, ask("hi", session=bytes([number])))
    assert engine.stats().sessions == tuple(bytes([n]) for n in range(1, SESSIONS_MAX + 1))


async def vectors(
    engine: Engine, *inputs: str, query: str | None = None
) -> list[tuple[float, ...]]:
    async with engine.embed(EmbedRequest("r", inputs, query)) as embedded:
        assert embedded.prompt_tokens == sum(len(text.split()) for text in inputs)
        return [struct.unpack(f"<{len(v) // 4}f", v) async for v in embedded.vectors]


async def test_common_words_bring_texts_closer() -> None:
    engine = EchoEngine()
    one, near, far = await vectors(engine, "a big cat", "a small cat", "no more")
    assert math.hypot(*one) == pytest.approx(1.0)
    assert math.dist(one, near) < math.dist(one, far)
    assert await vectors(engine, "a cat", "a dog", "it", query="a cat") == [(2.0,), (1.0,), (0.0,)]
    for inputs, dimensions in ((("a", ""), None), ((), None), (("a",), 8)):
        with pytest.raises(BadRequestError):
            await engine.embed(EmbedRequest("r", inputs, dimensions=dimensions)).__aenter__()
    with pytest.raises(EngineError):
        await vectors(EchoEngine(break_after_tokens=1), "a", "b")
