"""A model that sees, in a real child process: SmolLM2 with projectors of random weights.

What it says of pictures is nonsense; that they reach it, and how, is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from meshnode.engine import (
    IMAGES_BYTES_MAX,
    ChatMessage,
    Delta,
    Finish,
    Image,
    ModelCard,
    Request,
    Sampling,
    Usage,
)
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.errors import EngineBusyError, ModelLoadError, NoVisionError, RequestError
from tests.engine.eyes import picture, write_projector
from tests.engine.test_pictures import BAD

HANG_S = 120
OPTIONS = EngineOptions(context_tokens=2048, slots=4, waiting_max=4, threads=1)
RED, BLUE = picture("red"), picture("blue")


def user(text: str, *images: bytes) -> ChatMessage:
    return ChatMessage("user", text, tuple(Image(data, 0) for data in images))


def ask(*messages: ChatMessage, session: bytes = b"s", tokens: int = 8) -> Request:
    return Request("r", session * 16, messages, Sampling(temperature=0), tokens, logprobs=0)


async def answer(engine: EngineProcess, request: Request) -> tuple[str, list[float], Usage]:
    text, likely = "", []
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Finish):
                return text, likely, event.usage
            assert isinstance(event, Delta)
            text += event.text
            likely += [each.drawn.logprob for each in event.logprobs]
    raise AssertionError("the answer has no finish")


@pytest.fixture
async def engine(
    request: pytest.FixtureRequest, q4_0_card: ModelCard, tmp_path: Path
) -> AsyncIterator[EngineProcess]:
    kind = getattr(request, "param", "gemma3")
    projector = write_projector(tmp_path / "mmproj.gguf", kind)
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            engine = EngineProcess(q4_0_card, replace(OPTIONS, projector=projector))
            await nursery.start(engine.run)
            await engine.wait_ready()
            yield engine
            nursery.cancel_scope.cancel()


# Of one kind the cells of a picture all see each other; of the other each sees those before it.
@pytest.mark.parametrize(("engine", "cells"), [("gemma3", 16), ("mlp", 64)], indirect=["engine"])
async def test_pictures_are_seen_cached_and_kept_apart(engine: EngineProcess, cells: int) -> None:
    question = "What is this?"
    blind = await answer(engine, ask(user(question), session=b"0"))
    red = await answer(engine, ask(user(question, RED), session=b"1"))
    assert (engine.stats().purpose, engine.stats().sees) == ("generate", True)
    assert red[2].prompt_tokens >= blind[2].prompt_tokens + cells
    assert await engine.count(ask(user(question, RED))) == red[2].prompt_tokens
    assert red[1] != blind[1]

    # Another picture is another prompt, from its first cell on.
    blue = await answer(engine, ask(user(question, BLUE), session=b"2"))
    assert blue[1] != red[1]
    assert blue[2].cached_tokens < blue[2].prompt_tokens - cells

    # The second turn has all of the first in its cache, its picture included.
    turn = (user(question, RED), ChatMessage("assistant", red[0]), user("Why?"))
    second = await answer(engine, ask(*turn, session=b"1"))
    assert second[2].cached_tokens >= red[2].prompt_tokens

    # Two pictures are two, and their order matters.
    two = await answer(engine, ask(user(question, RED, BLUE), session=b"4"))
    swapped = await answer(engine, ask(user(question, BLUE, RED), session=b"5"))
    assert two[2].prompt_tokens == red[2].prompt_tokens * 2 - blind[2].prompt_tokens
    assert two[1] != swapped[1]

    # What a user writes is no picture.
    written = await answer(engine, ask(user("<__media__><start_of_image>"), session=b"6"))
    assert written[2].prompt_tokens < blind[2].prompt_tokens + cells


async def test_several_answers_share_a_picture(engine: EngineProcess) -> None:
    request = replace(ask(user("What is this?", RED)), n=2)
    texts = {0: "", 1: ""}
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Delta):
                texts[event.index] += event.text
    assert texts[0] == texts[1] != ""


async def test_hostile_pictures_are_refused_and_the_engine_lives(engine: EngineProcess) -> None:
    pid = engine.pid
    for data, why in BAD.values():
        with pytest.raises(RequestError, match=why):
            await answer(engine, ask(user("What is this?", RED, data)))
    huge = Request("r", b"", (user("x" * 9_000_000, RED),))
    with pytest.raises(RequestError, match="too large"):
        await answer(engine, huge)
    await answer(engine, ask(user("What is this?", RED)))
    assert engine.pid == pid


async def test_images_that_wait_are_bounded(engine: EngineProcess) -> None:
    large = RED + bytes(IMAGES_BYTES_MAX - len(RED))  # what follows a picture is not read
    request = ask(user("What is this?", large), tokens=1000)
    async with contextlib.AsyncExitStack() as held:
        for _ in range(4):
            await held.enter_async_context(engine.generate(request))
        with pytest.raises(EngineBusyError):
            await answer(engine, ask(user("What is this?", RED)))
        await answer(engine, ask(user("Hello.")))


async def test_too_many_pictures_for_the_context_are_counted(
    q4_0_card: ModelCard, tmp_path: Path
) -> None:
    projector = write_projector(tmp_path / "mmproj.gguf", "mlp")
    options = replace(OPTIONS, projector=projector, context_tokens=256)
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            engine = EngineProcess(q4_0_card, options)
            await nursery.start(engine.run)
            await engine.wait_ready()
            with pytest.raises(RequestError, match="256 tokens; the prompt has 3"):
                await answer(engine, ask(user("What?", *[RED] * 5)))
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("projector", "why"),
    [
        ({"width": 64}, "mismatch between text model .n_embd = 576. and mmproj .n_embd = 64"),
        ({"kind": "no_such_projector"}, "unknown projector type: no_such_projector"),
        (b"GGUF", "not a usable GGUF file"),
        ("the model itself", "it is no projector"),
        (None, "cannot be read"),
    ],
)
async def test_a_projector_that_does_not_fit_fails_the_load(
    projector: object, why: str, q4_0_card: ModelCard, tmp_path: Path
) -> None:
    path = tmp_path / "mmproj.gguf"
    match projector:
        case dict():
            write_projector(path, **projector)
        case bytes():
            path.write_bytes(projector)
        case str():
            path = Path(q4_0_card.path)
    engine = EngineProcess(q4_0_card, replace(OPTIONS, projector=path))
    with trio.fail_after(HANG_S):
        await engine.run()
        with pytest.raises(ModelLoadError, match=why):
            await engine.wait_ready()


async def test_without_a_projector_the_model_is_named(q4_0_card: ModelCard) -> None:
    engine = EngineProcess(q4_0_card, OPTIONS)
    with pytest.raises(NoVisionError, match=f"`{q4_0_card.name}` cannot see"):
        async with engine.generate(ask(user("What is this?", RED))):
            raise AssertionError("it cannot see")
