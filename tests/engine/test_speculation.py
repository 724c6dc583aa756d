"""Guessing ahead with the real model: answers stay what they are.

What is exact is what `speculate.py` promises: each token is the sequence's own draw, in order.
Batches of another width round differently, so two runs may part where the model finds two tokens
about equally likely, and only there: `agree` checks it, token by token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from meshnode.engine import (
    ChatMessage,
    EngineStats,
    Finish,
    Grammar,
    ModelCard,
    Request,
    Sampling,
    Speculate,
    TokenLogprobs,
    wire,
)
from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.engine.pace import Threads
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.errors import ModelLoadError
from meshnode.models.catalog import resolve

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

from meshnode.engine.child import speculation_for

# Generous: the machine may be busy, and all of it takes seconds on a free one.
HANG_S = 200
# Runs may part where the model prefers one of two tokens by less (natural logarithm). Rounding,
# made larger by activations of eight bits, moved them by up to 0.1, with or without guesses.
TIE = 0.3
OPTIONS = EngineOptions(context_tokens=1024, slots=4, waiting_max=8, threads=1)
GREEDY = Sampling(temperature=0)
COUNT = ("one two three four five six seven eight nine ten, " * 4).strip()
STORY = (ChatMessage("user", "Tell me a short story about a llama and the sea."),)


@dataclass(frozen=True)
class Outcome:
    """One choice of an answer."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: Finish


def ask(prompt: str | tuple[ChatMessage, ...], sampling: Sampling = GREEDY) -> Request:
    return Request("r", b"", prompt, sampling, 20, logprobs=2)


SEEDS = [
    Sampling(temperature=0.8, seed=seed, repeat_penalty=1.1, repeat_last_n=8) for seed in range(3)
]
REQUESTS: dict[str, Request] = {
    "count": ask(COUNT),
    "story": ask(STORY),
    "seven tokens": replace(ask(COUNT), max_tokens=7),
    "stop in a word": replace(ask(COUNT), stop=("even",)),
    "stop over words": replace(ask(COUNT), stop=("two three",)),
    "penalties": ask(COUNT, replace(GREEDY, presence_penalty=0.5, frequency_penalty=0.5)),
    "grammar": replace(ask(COUNT), grammar=Grammar('root ::= ("one " | "two " | "three ")+')),
    **{f"seed {number}": ask(COUNT, sampling) for number, sampling in enumerate(SEEDS)},
}


async def collect(engine: EngineProcess, request: Request) -> list[Outcome]:
    texts: dict[int, str] = {}
    ids: dict[int, tuple[int, ...]] = {}
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
    outcomes: dict[int, Outcome] = {}
    async with engine.generate(request) as events:
        async for event in events:
            at = event.index
            if isinstance(event, Finish):
                outcomes[at] = Outcome(
                    texts.get(at, ""), ids.get(at, ()), logprobs.get(at, ()), event
                )
            else:
                texts[at] = texts.get(at, "") + event.text
                ids[at] = ids.get(at, ()) + event.ids
                logprobs[at] = logprobs.get(at, ()) + event.logprobs
    return [outcomes[at] for at in sorted(outcomes)]


@dataclass(frozen=True)
class Run:
    """What one engine did with everything that is asked of each."""

    alone: Mapping[str, Outcome]
    together: tuple[Outcome, ...]
    choices: tuple[Outcome, ...]
    after_leaving: Outcome
    stats: EngineStats


async def run_all(card: ModelCard, options: EngineOptions) -> Run:
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            engine = EngineProcess(card, options)
            await nursery.start(engine.run)
            await engine.wait_ready()
            alone = {name: (await collect(engine, r))[0] for name, r in REQUESTS.items()}
            together: dict[str, Outcome] = {}

            async def one(name: str) -> None:
                (together[name],) = await collect(engine, REQUESTS[name])

            async with trio.open_nursery() as clients:
                for name in ("count", "story", "stop in a word"):
                    clients.start_soon(one, name)
            choices = await collect(engine, replace(REQUESTS["seed 1"], n=2))
            # A client leaves in the middle; its sequence ends, and its session goes on after.
            leaver = replace(ask(COUNT), session=b"a" * 16, max_tokens=None)
            async with engine.generate(leaver) as events:
                async for _ in events:
                    break
            (after_leaving,) = await collect(engine, replace(leaver, max_tokens=20))
            while engine.stats().slots_busy:
                await trio.sleep(0.01)
            stats = engine.stats()
            nursery.cancel_scope.cancel()
    return Run(alone, tuple(together[name] for name in sorted(together)),
               tuple(choices), after_leaving, stats)  # fmt: skip


@pytest.fixture(scope="module")
def run_of(q4_0_card: ModelCard) -> Callable[[Speculate], Run]:
    """Each kind of engine is run once."""
    runs: dict[str, Run] = {}

    def run(speculate: Speculate) -> Run:
        if speculate not in runs:
            # The draft model is the same one before it was requantised: guesses well, not always.
            draft = resolve("default", Path("/nowhere")).path if speculate == "draft" else None
            options = replace(OPTIONS, speculate=speculate, draft=draft)
            runs[speculate] = trio.run(run_all, q4_0_card, options)
        return runs[speculate]

    return run


def agree(plain: Outcome, guessed: Outcome) -> bool:
    """Whether both are the same, or part at a near tie; asserts that it is nothing else."""
    for left, right in zip(plain.logprobs, guessed.logprobs, strict=False):
        if left.drawn.piece == right.drawn.piece:
            assert abs(left.drawn.logprob - right.drawn.logprob) < TIE
            continue
        pieces = {entry.piece for entry in left.top}
        assert {left.drawn.piece, right.drawn.piece} <= pieces, "no tie, another token"
        assert abs(left.top[0].logprob - left.top[1].logprob) < TIE
        return False
    assert replace(guessed, logprobs=()) == replace(plain, logprobs=())
    return True


MODES: tuple[Speculate, ...] = ("lookup", "draft")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in REQUESTS if not name.startswith("seed")])
def test_greedy_answers_stay_what_they_are(
    run_of: Callable[[Speculate], Run], mode: Speculate, name: str
) -> None:
    agree(run_of("off").alone[name], run_of(mode).alone[name])


@pytest.mark.parametrize("mode", MODES)
def test_the_ends_are_where_they_belong(
    run_of: Callable[[Speculate], Run], mode: Speculate
) -> None:
    run = run_of(mode)
    seven = run.alone["seven tokens"]
    assert (seven.finish.reason, seven.finish.usage.completion_tokens) == ("length", 7)
    assert len(seven.ids) == len(seven.logprobs) == 7
    for name, before in (("stop in a word", "six s"), ("stop over words", " one ")):
        stopped = run.alone[name]
        assert stopped.finish.reason == "stop"
        assert stopped.text.endswith(before)
        assert stopped.finish.usage.completion_tokens < 20
    assert set(run.alone["grammar"].text.split()) <= {"one", "two", "three"}


@pytest.mark.parametrize("mode", MODES)
def test_seeded_answers_stay_what_they_are(
    run_of: Callable[[Speculate], Run], mode: Speculate
) -> None:
    plain, guessed = run_of("off"), run_of(mode)
    same = [
        plain.alone[name].text == guessed.alone[name].text
        for name in REQUESTS
        if name.startswith("seed")
    ]
    # One of three may have drawn within the rounding of the border between two tokens.
    assert sum(same) >= len(same) - 1
    assert len({plain.alone[f"seed {n}"].text for n in range(3)}) > 1


@pytest.mark.parametrize("mode", MODES)
def test_sequences_side_by_side(run_of: Callable[[Speculate], Run], mode: Speculate) -> None:
    plain, guessed = run_of("off"), run_of(mode)
    for left, right in zip(plain.together, guessed.together, strict=True):
        agree(left, right)
    assert len(guessed.choices) == 2
    assert [choice.finish.usage for choice in guessed.choices] == [
        choice.finish.usage for choice in plain.choices
    ]


@pytest.mark.parametrize("mode", MODES)
def test_who_leaves_leaves_nothing_behind(
    run_of: Callable[[Speculate], Run], mode: Speculate
) -> None:
    left = run_of(mode).after_leaving
    assert left.finish.usage.cached_tokens > 0
    whole = run_of("off").after_leaving
    agree(replace(whole, finish=left.finish), left)


def test_guesses_are_counted(run_of: Callable[[Speculate], Run]) -> None:
    assert run_of("off").stats.speculation is None
    for mode in MODES:
        stats = run_of(mode).stats.speculation
        assert stats is not None
        assert stats.on
        assert 0 < stats.passes <= stats.proposed
        assert 0.3 * stats.proposed < stats.accepted < stats.proposed


@pytest.fixture
def other_words(q4_0_path: Path, tmp_path: Path) -> Path:
    """The same file, but for two letters in the text of one token."""
    other = tmp_path / "other.gguf"
    other.write_bytes(q4_0_path.read_bytes().replace(b"<reponame>", b"<repomane>", 1))
    return other


async def test_a_draft_model_of_other_words(q4_0_card: ModelCard, other_words: Path) -> None:
    engine = EngineProcess(q4_0_card, replace(OPTIONS, speculate="draft", draft=other_words))
    with trio.fail_after(HANG_S):
        await engine.run()
    assert engine.stats().state == "failed"
    assert "another vocabulary" in (engine.stats().error or "")


def test_a_model_that_cannot_go_back_is_left_alone_or_refused() -> None:
    class Recurrent:
        can_rewind = False

    def load(speculate: Speculate) -> wire.Load:
        return wire.Load("x.gguf", 64, 1, 1, 1, speculate)

    for mode in ("off", "auto"):
        assert speculation_for(load(mode), Recurrent(), Threads(1)) is None
    with pytest.raises(ModelLoadError, match=r"x\.gguf is recurrent"):
        speculation_for(load("lookup"), Recurrent(), Threads(1))


async def test_a_draft_model_that_is_none(q4_0_card: ModelCard, tmp_path: Path) -> None:
    engine = EngineProcess(
        q4_0_card, replace(OPTIONS, speculate="draft", draft=tmp_path / "none.gguf")
    )
    with trio.fail_after(HANG_S):
        await engine.run()
    with pytest.raises(ModelLoadError, match=r"none\.gguf cannot be read"):
        await engine.wait_ready()
