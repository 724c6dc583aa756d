"""Several answers to one prompt: computed once, drawn apart, ended together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from meshnode.engine import ChatMessage, Continuation, Finish, ModelCard, Request, Sampling
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.engine.scheduler import Copy, Limits, Scheduler
from meshnode.errors import RequestError
from tests.engine.serving import started

OPTIONS = EngineOptions(context_tokens=1024, slots=4, waiting_max=4, threads=1)
QUESTION = (ChatMessage("user", "Write one sentence about the sea, please, and do it well."),)
WILD = Sampling(temperature=1.2, seed=11)
END, WORD = 0, 7


# --- policy --------------------------------------------------------------------------------------


def scheduler(slots: int = 3) -> Scheduler:
    return Scheduler(Limits(slots, 100, 400, 4, 10, 4), frozenset({END}))


def step(policy: Scheduler, draws: Sequence[int] = ()) -> tuple[list[Copy], list[tuple[int, int]]]:
    """One step; returns its copies, and who computed how many tokens."""
    batch = policy.plan()
    assert batch is not None
    given = iter(draws)
    policy.commit(batch, [next(given, WORD) for _ in range(batch.outputs)])
    return [c for c in batch.changes if isinstance(c, Copy)], [
        (chunk.sequence, len(chunk.tokens)) for chunk in batch.chunks
    ]


def test_followers_wait_for_the_prompt_and_copy_it() -> None:
    policy = scheduler()
    policy.submit(1, b"a", range(1, 21), 4)
    for follower in (2, 3):
        policy.submit(follower, b"a", range(1, 21), 4)
    assert step(policy) == ([], [(1, 10)])
    assert step(policy) == ([], [(1, 10)])
    assert step(policy) == ([Copy(0, 1, 19)], [])
    assert step(policy) == ([Copy(1, 2, 19)], [])
    assert step(policy) == ([], [(1, 1), (2, 1), (3, 1)])


def test_others_pass_a_follower_that_waits() -> None:
    policy = scheduler()
    policy.submit(1, b"a", range(1, 21), 4)
    policy.submit(2, b"a", range(1, 21), 4)
    policy.submit(3, b"b", [30, 31], 4)
    assert step(policy) == ([], [(1, 10)])
    copies, _ = step(policy)
    assert policy.load().slots_busy == 2
    assert copies == []


@pytest.mark.parametrize("how", ["ends at once", "is cancelled"])
def test_a_leader_that_is_gone_holds_nobody_up(how: str) -> None:
    policy = scheduler(slots=1)
    policy.submit(1, b"a", [1, 2, 3], 4)
    policy.submit(2, b"a", [1, 2, 3], 4)
    if how == "is cancelled":
        assert policy.end(1) is not None
        assert step(policy) == ([], [(2, 3)])
    else:
        step(policy, [END])
        assert step(policy) == ([], [(2, 1)])  # in the very slot that its leader has left


def test_a_follower_without_room_comes_later() -> None:
    policy = scheduler(slots=2)
    policy.submit(1, b"a", [1, 2, 3], 3)
    for follower in (2, 3):
        policy.submit(follower, b"a", [1, 2, 3], 3)
    seen = set()
    while not policy.idle:
        _, chunks = step(policy)
        seen |= {sequence for sequence, _ in chunks}
    assert seen == {1, 2, 3}


# --- mechanism -----------------------------------------------------------------------------------


@pytest.fixture
async def engine(q4_0_card: ModelCard) -> AsyncIterator[EngineProcess]:
    async with started(q4_0_card, OPTIONS) as engine:
        yield engine


async def run(engine: EngineProcess, request: Request) -> tuple[list[str], list[Finish]]:
    texts = [""] * request.n
    finishes: dict[int, Finish] = {}
    async with engine.generate(request) as events:
        async for event in events:
            assert event.index not in finishes
            if isinstance(event, Finish):
                finishes[event.index] = event
            else:
                texts[event.index] += event.text
    return texts, [finishes[index] for index in range(request.n)]


async def test_each_choice_is_what_its_seed_gives_alone(engine: EngineProcess) -> None:
    request = Request("r", b"a" * 16, QUESTION, WILD, 12, n=3)
    texts, finishes = await run(engine, request)
    assert len(set(texts)) == 3
    prompt_tokens = finishes[0].usage.prompt_tokens
    assert [finish.usage.cached_tokens for finish in finishes] == [0] + [prompt_tokens - 1] * 2
    assert [finish.reason for finish in finishes] == ["length"] * 3
    # Alone, with another batch around it, a token may flip; the first does not depend on that.
    for index, text in enumerate(texts):
        seeded = replace(WILD, seed=11 + index)
        alone, _ = await run(engine, replace(request, n=1, sampling=seeded, session=b"b" * 16))
        assert alone[0].split()[0] == text.split()[0]
    again, _ = await run(engine, replace(request, session=b"c" * 16))
    assert [text.split()[0] for text in again] == [text.split()[0] for text in texts]


async def test_greedy_choices_are_one(engine: EngineProcess) -> None:
    texts, _ = await run(engine, Request("r", b"", QUESTION, Sampling(temperature=0), 12, n=4))
    assert len(set(texts)) == 1


async def test_leaving_ends_all_and_slots_are_free_again(engine: EngineProcess) -> None:
    request = Request("r", b"a" * 16, QUESTION, WILD, 500, n=4)
    async with engine.generate(request) as events:
        async for event in events:
            assert not isinstance(event, Finish)
            break
    await engine.wait_idle()
    texts, _ = await run(engine, replace(request, max_tokens=3))
    assert all(texts)


@pytest.mark.parametrize("n", [0, 5])
async def test_more_than_there_are_slots_are_refused(engine: EngineProcess, n: int) -> None:
    with pytest.raises(RequestError) as caught:
        await run(engine, Request("r", b"", QUESTION, WILD, 4, n=n))
    assert caught.value.param == "n"
    come = Continuation((5,), 0)
    with pytest.raises(RequestError):
        await run(engine, Request("r", b"", QUESTION, WILD, 4, n=2, continuation=come))
