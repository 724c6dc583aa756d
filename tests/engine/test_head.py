"""The last layers of a real model as an engine, in a ring with its other layers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import trio

from meshnode.engine import (
    ChatMessage,
    Delta,
    EmbedRequest,
    Engine,
    Finish,
    Grammar,
    ModelCard,
    Request,
    Sampling,
    wire,
)
from meshnode.engine.process import EngineOptions, EngineProcess, Part
from meshnode.engine.stages import head
from meshnode.errors import EngineError, ModelLoadError, RemoteProtocolError
from meshnode.gateway.schema import SchemaGrammar
from tests.engine.pipelines import Pipeline, parted
from tests.engine.serving import started

LAYERS = 30
# One thread: another thread count may flip a greedy token.
OPTIONS = EngineOptions(context_tokens=1024, slots=4, waiting_max=4, threads=1)
GREEDY = Sampling(temperature=0)
COUNT = ("one two three four five six seven eight nine ten, " * 2).strip()
STORY = (ChatMessage("user", "Tell me a short story about a llama and the sea."),)


def ask(
    prompt: str | tuple[ChatMessage, ...],
    session: int = 1,
    max_tokens: int = 24,
    grammar: Grammar | None = None,
) -> Request:
    return Request(
        "r", bytes([session]) * 16, prompt, GREEDY, max_tokens, grammar=grammar, logprobs=0
    )


async def collect(engine: Engine, request: Request) -> tuple[str, tuple[int, ...], Finish]:
    text, ids = "", ()
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Finish):
                return text, ids, event
            text += event.text
            ids += event.ids
    raise AssertionError("the answer has no finish")


def person() -> Grammar:
    rules = SchemaGrammar()
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    return Grammar(rules.text(rules.add(schema, "schema")))


async def turns(engine: Engine) -> list[tuple[str, tuple[int, ...], Finish]]:
    """One session at a time, so that batches have equal shapes wherever this is asked."""
    first = await collect(engine, ask(STORY))
    again = ChatMessage("assistant", first[0]), ChatMessage("user", "And then?")
    second = await collect(engine, ask((*STORY, *again)))
    other = await collect(engine, ask("The sun rises in the", session=2))
    made = await collect(engine, ask(STORY, session=3, max_tokens=60, grammar=person()))
    return [first, second, other, made]


@pytest.mark.parametrize("cuts", [(15,), (10, 20)])
async def test_answers_are_those_of_the_whole_model(
    q4_0_card: ModelCard, cuts: tuple[int, ...]
) -> None:
    async with started(q4_0_card, OPTIONS) as whole:
        expected = await turns(whole)
    async with parted(q4_0_card, OPTIONS, *cuts, layers=LAYERS) as pipeline, pipeline.running():
        answers = await turns(pipeline.head)
    assert answers == expected
    first, second, _, made = answers
    usage = first[2].usage
    assert second[2].usage.cached_tokens >= usage.prompt_tokens + usage.completion_tokens - 2
    assert json.loads(made[0]).keys() == {"name", "age"}


async def test_sessions_go_round_at_once_and_leave_when_they_like(q4_0_card: ModelCard) -> None:
    order: list[int] = []
    texts: dict[int, str] = {}

    async def one(pipeline: Pipeline, number: int) -> None:
        request = ask(f"{COUNT} {number}", session=number, max_tokens=16 + number)
        texts[number] = ""
        async with pipeline.head.generate(request) as events:
            async for event in events:
                if isinstance(event, Finish):
                    assert event.usage.completion_tokens == 16 + number
                    continue
                order.append(number)
                texts[number] += event.text
                if number == 2:
                    break

    async with parted(q4_0_card, OPTIONS, 10, 20, layers=LAYERS) as pipeline, pipeline.running():
        async with trio.open_nursery() as nursery:
            for number in range(6):  # two of them wait for a slot
                nursery.start_soon(one, pipeline, number)
        assert all(texts.values())
        whole = set(order) - {2}
        first_end = min(max(i for i, n in enumerate(order) if n == number) for number in whole)
        assert len(set(order[:first_end])) >= 3, "nobody waits for another's answer"
        await pipeline.head.wait_idle()
        while pipeline.head.stats().slots_busy or pipeline.head.stats().queue_depth:
            await trio.sleep(0.01)
        assert pipeline.head.stats().decode_tokens_per_s > 0
        # The batch's shape may flip a late greedy token, but not what the answer is about.
        alone, _, _ = await collect(pipeline.head, ask(f"{COUNT} 1", session=9, max_tokens=17))
        assert alone[:8] == texts[1][:8]


async def test_a_broken_ring_loses_and_repeats_no_token(q4_0_card: ModelCard) -> None:
    request = ask(COUNT, max_tokens=40)
    async with parted(q4_0_card, OPTIONS, 15, layers=LAYERS) as pipeline:
        async with pipeline.running():
            whole, ids, _ = await collect(pipeline.head, request)
        text, seen = "", ()
        async with pipeline.head.generate(replace(request, session=b"b" * 16)) as events:
            for _ in range(3):
                async with pipeline.running():
                    async for event in events:
                        assert isinstance(event, Delta)
                        text += event.text
                        seen += event.ids
                        if len(seen) % 10 == 9:
                            break
                with pytest.raises(EngineError, match="taken apart"):
                    await pipeline.head.next_step()
            async with pipeline.running():
                async for event in events:
                    if isinstance(event, Finish):
                        assert event.usage.completion_tokens == 40
                        break
                    text += event.text
                    seen += event.ids
        # Computed again in one chunk, a near tie might fall otherwise; these numbers have none.
        assert (text, seen) == (whole, ids)


async def test_guesses_go_round_in_one_pass(q4_0_card: ModelCard) -> None:
    request = ask(COUNT, max_tokens=32)
    passes = {}
    answers = {}
    for speculate in ("off", "lookup"):
        options = replace(OPTIONS, speculate=speculate)
        async with parted(q4_0_card, options, 15, layers=LAYERS) as pipeline, pipeline.running():
            answers[speculate] = await collect(pipeline.head, request)
            passes[speculate] = pipeline.steps
            # Rejected guesses are taken back in every stage: the next turn is right as well.
            turn = replace(request, prompt=COUNT + answers[speculate][0] + ", again: one two")
            answers[speculate + " then"] = await collect(pipeline.head, turn)
            stats = pipeline.head.stats().speculation
    assert answers["lookup"][:2] == answers["off"][:2]
    assert answers["lookup then"][:2] == answers["off then"][:2]
    assert passes["lookup"] < 0.7 * passes["off"]
    assert stats is not None
    assert 0 < stats.accepted < stats.proposed


def with_no_number(frame: bytes) -> bytes:
    """The last number of the rows, before the name of their codec, becomes NaN."""
    return frame[:-8] + b"\xff\xff\xff\x7f" + frame[-4:]


async def test_rows_that_are_none_break_the_ring_and_not_the_engine(q4_0_card: ModelCard) -> None:
    async with parted(q4_0_card, OPTIONS, 15, layers=LAYERS) as pipeline:
        for spoil in (with_no_number, lambda frame: frame[:-1], lambda frame: frame * 2):
            with pytest.raises(ExceptionGroup) as caught:
                async with pipeline.running(spoil):
                    await collect(pipeline.head, ask(COUNT))
            assert caught.group_contains(RemoteProtocolError)
        async with pipeline.running():
            assert await collect(pipeline.head, ask(COUNT, max_tokens=2))
            with pytest.raises(RemoteProtocolError, match="not sent"):
                await pipeline.head.feed(b"")
            with pytest.raises(EngineError, match="embeddings"):
                async with pipeline.head.embed(EmbedRequest("r", ("a",))):
                    pass


class Heard:
    """What would go to the parent."""

    def __init__(self) -> None:
        self.frames: list[wire.FromChild] = []

    def send(self, *frames: wire.FromChild) -> None:
        self.frames += frames

    def of(self, kind: type) -> list[wire.FromChild]:
        return [frame for frame in self.frames if isinstance(frame, kind)]


def test_requests_wait_for_a_pipeline_but_not_for_ever(
    q4_0_card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Heard()
    monkeypatch.setattr(head, "PIPELINE_WAIT_S", 0.2)
    load = wire.Load(q4_0_card.path, 256, 2, 2, 1, part=(20, LAYERS))
    child = head.load_head(pipe, load)  # type: ignore[arg-type]
    child.hear(wire.Generate.of(1, replace(ask(COUNT), n=2)))
    child.hear(wire.Generate.of(2, ask(COUNT, session=2)))
    child.turn()
    child.turn()
    child.hear(wire.StartPipeline(b"p" * 16, 1, 2))
    child.turn()
    assert len(pipe.of(wire.Planned)) == 1, "there is one now"
    child.hear(wire.StopPipeline("a stage died"))
    child.turn()
    child.turn()  # until their time is over
    assert [(frame.number, "a stage died" in frame.message) for frame in pipe.of(wire.Unable)] == [
        (1, True),
        (2, True),
    ]
    child.hear(wire.Generate.of(3, ask(COUNT)))
    child.turn()
    child.turn()
    assert [frame.number for frame in pipe.of(wire.Unable)] == [1, 2, 3], "who comes later as well"


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Part(10, 20), "another stage is the head"),
        (Part(0, 30), "another stage is the head"),
        (Part(20, 31), "layers 0 to 29"),
    ],
)
async def test_parts_that_are_no_head(q4_0_card: ModelCard, part: Part, reason: str) -> None:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            engine = EngineProcess(q4_0_card, replace(OPTIONS, part=part))
            nursery.start_soon(engine.run)
            with pytest.raises(ModelLoadError, match=reason):
                await engine.wait_ready()
            nursery.cancel_scope.cancel()
