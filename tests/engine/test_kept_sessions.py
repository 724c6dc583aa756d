"""Sessions that outlive their requests, in a real child: more of them than may run at once."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from meshnode.engine import ChatMessage, Finish, ModelCard, Request, Sampling, Usage
from meshnode.engine.process import EngineOptions, EngineProcess
from tests.engine.serving import started

SPILLED_BYTES_MAX = 64 * 1024**2
SYSTEM = ChatMessage("system", "You teach geography, with patience, and answer briefly. " * 8)


@pytest.fixture
async def engine(q4_0_card: ModelCard, tmp_path: Path) -> AsyncIterator[EngineProcess]:
    options = EngineOptions(
        context_tokens=512,
        slots=2,
        threads=1,
        kv_spill_bytes=SPILLED_BYTES_MAX,
        kv_spill_dir=tmp_path,
    )
    async with started(q4_0_card, options) as engine:
        yield engine


async def ask(
    engine: EngineProcess, session: int, prompt: tuple[ChatMessage, ...] | str, tokens: int = 4
) -> Usage:
    request = Request("r", bytes([session]) * 16, prompt, Sampling(temperature=0), tokens)
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Finish):
                return event.usage
    raise AssertionError("the answer has no finish")


def spilled(engine: EngineProcess, directory: Path) -> int:
    """Files without a name that the child has there."""
    assert list(directory.iterdir()) == []
    links = [os.readlink(link) for link in Path(f"/proc/{engine.pid}/fd").iterdir()]
    return sum(link.startswith(str(directory)) for link in links)


async def test_a_system_prompt_is_shared_also_with_who_is_answering(engine: EngineProcess) -> None:
    usages: dict[int, Usage] = {}

    async def one(session: int) -> None:
        question = ChatMessage("user", f"Tell me about country number {session}.")
        usages[session] = await ask(engine, session, (SYSTEM, question), 24)

    async with trio.open_nursery() as nursery:
        for session in range(4):
            nursery.start_soon(one, session)
    first, *others = sorted(usages.values(), key=lambda usage: usage.cached_tokens)
    assert first.cached_tokens == 0
    assert all(usage.prompt_tokens - usage.cached_tokens < 20 for usage in others)
    # Two answered at a time, and four are remembered.
    while set(engine.stats().sessions) != {bytes([session]) * 16 for session in range(4)}:
        await trio.sleep(0.01)


async def test_who_was_evicted_comes_back_from_disk(engine: EngineProcess, tmp_path: Path) -> None:
    words = ("one two three ", "red green blue ", "north south west ", "is was were ", "a an the ")
    stories = [word * 64 for word in words]  # the cache holds two of them, memory two more
    for session, story in enumerate(stories):
        await ask(engine, session, story)
    while not spilled(engine, tmp_path):
        await trio.sleep(0.01)
    usage = await ask(engine, 0, stories[0] + "and so on")
    assert usage.prompt_tokens - usage.cached_tokens < 10
    while engine.stats().sessions[-1] != bytes([0]) * 16:  # told a moment after the answer
        await trio.sleep(0.01)
