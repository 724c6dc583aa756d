"""The engine as the node uses it: a real model in a real child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from meshnode.engine import ChatMessage, Delta, Engine, Finish, ModelCard, Request, Sampling
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.errors import ContextLengthError, EngineBusyError, EngineError, ModelLoadError
from meshnode.errors import RequestError as BadRequestError
from tests.engine.serving import HANG_S, started

# One thread: another thread count may flip a greedy token.
OPTIONS = EngineOptions(context_tokens=2048, slots=4, waiting_max=4, threads=1)
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finish: Finish


def ask(
    *contents: str,
    session: bytes = b"s" * 16,
    max_tokens: int | None = 16,
    stop: tuple[str, ...] = (),
    sampling: Sampling = GREEDY,
) -> Request:
    roles = ("user", "assistant")
    prompt = tuple(ChatMessage(roles[i % 2], content) for i, content in enumerate(contents))
    return Request("r", session, prompt, sampling, max_tokens, stop)


async def collect(engine: Engine, request: Request) -> Answer:
    text, tokens = "", 0
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Finish):
                return Answer(text, tokens, event)
            text += event.text
            tokens += event.tokens
    raise AssertionError("the answer has no finish")


@pytest.fixture
async def engine(q4_0_card: ModelCard) -> AsyncIterator[EngineProcess]:
    async with started(q4_0_card, OPTIONS) as engine:
        yield engine


async def wait_until_idle(engine: EngineProcess) -> None:
    while engine.stats().slots_busy or engine.stats().queue_depth:
        await trio.sleep(0.01)


async def test_answers_repeat_and_turns_reuse_the_cache(engine: EngineProcess) -> None:
    question = "What is the capital of France?"
    first = await collect(engine, ask(question))
    assert "Paris" in first.text
    assert first.finish.usage.completion_tokens >= first.tokens > 0
    again = await collect(engine, ask(question, session=b"t" * 16))
    assert again.text == first.text
    turn = await collect(engine, ask(question, first.text, "And of Italy?", session=b"t" * 16))
    usage = first.finish.usage
    held = usage.prompt_tokens + usage.completion_tokens
    assert turn.finish.usage.cached_tokens >= held - 2
    stats = engine.stats()
    assert stats.state == "ready"
    assert stats.progress == 1.0
    assert stats.decode_tokens_per_s > 0
    assert stats.memory_bytes > 50e6
    assert stats.sessions[-1] == b"t" * 16


async def test_the_shape_of_answers(engine: EngineProcess) -> None:
    with_limit = await collect(engine, ask("Count from 1 to 100.", max_tokens=5))
    assert with_limit.finish.reason == "length"
    assert with_limit.finish.usage.completion_tokens == 5
    natural = await collect(engine, ask("What is the capital of France?", max_tokens=None))
    assert natural.finish.reason == "stop"
    stop = natural.text.split()[3]
    stopped = await collect(engine, ask("What is the capital of France?", stop=(stop,)))
    assert stopped.finish.reason == "stop"
    assert stopped.text == natural.text.partition(stop)[0]
    plain = Request("r", b"", "The sun rises in the", GREEDY, 3)
    assert "sky" in (await collect(engine, plain)).text


async def test_a_character_of_three_tokens_comes_out_whole(engine: EngineProcess) -> None:
    # The bytes F0 9F, A6 and 99 in this vocabulary; each may be drawn once, in this order.
    pieces = ((10813, 100.0), (116, 90.0), (243, 80.0))
    forced = Sampling(temperature=0, presence_penalty=50.0, logit_bias=pieces)

    async def draw(tokens: int) -> list[Delta | Finish]:
        request = Request("r", b"", "An animal:", forced, tokens)
        async with engine.generate(request) as events:
            return [event async for event in events]

    whole, _ = await draw(3)
    assert whole == Delta("🦙", tokens=3, ids=(10813, 116, 243))
    half, _ = await draw(2)
    assert half == Delta("\ufffd", tokens=2, ids=(10813, 116))


async def test_four_sessions_interleave(engine: EngineProcess) -> None:
    questions = ["Name a colour.", "Name a city.", "Name an animal.", "Name a number."]
    order: list[int] = []
    answers: dict[int, str] = {}

    async def one(number: int) -> None:
        text = ""
        request = ask(questions[number], session=bytes([number]) * 16, max_tokens=24)
        async with engine.generate(request) as events:
            async for event in events:
                if isinstance(event, Delta):
                    order.append(number)
                    text += event.text
        answers[number] = text

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(one, number)
    assert sorted(answers) == [0, 1, 2, 3]
    assert all(answers.values())
    first_end = min(max(i for i, n in enumerate(order) if n == number) for number in range(4))
    assert set(order[:first_end]) == {0, 1, 2, 3}, "nobody waits for another's answer"
    # The batch's shape may flip a late greedy token, but not what the answer is about.
    alone = await collect(engine, ask(questions[1], session=b"x" * 16, max_tokens=24))
    assert alone.text[:4] == answers[1][:4]


async def test_more_conversations_than_the_cache_can_hold(q4_0_card: ModelCard) -> None:
    # Four of up to 100 tokens each in 128 cells: some are preempted and computed again.
    options = replace(OPTIONS, context_tokens=128)
    # Without its end tokens the model has to go on.
    endless = Sampling(temperature=0, logit_bias=((0, -100.0), (2, -100.0), (4, -100.0)))
    usages = []

    async def one(engine: EngineProcess, number: int) -> None:
        request = ask("Go on.", session=bytes([number]) * 16, max_tokens=60, sampling=endless)
        usages.append((await collect(engine, request)).finish.usage.completion_tokens)

    async with started(q4_0_card, options) as engine, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(one, engine, number)
    assert usages == [60] * 4


async def test_leaving_early_frees_the_slot(engine: EngineProcess) -> None:
    story = ask("Tell me a very long story.", max_tokens=None)
    async with engine.generate(story) as events:
        async for event in events:
            assert isinstance(event, Delta)
            break
    with trio.fail_after(5):
        await wait_until_idle(engine)
    # A long prefill is aborted in the middle, and the engine is as good as before.
    with trio.move_on_after(0.2):
        await collect(engine, ask("word " * 1500, session=b"long" * 4))
    with trio.fail_after(5):
        await wait_until_idle(engine)
    assert "Paris" in (await collect(engine, ask("What is the capital of France?"))).text


async def test_a_prompt_is_counted_as_it_will_be_computed(engine: EngineProcess) -> None:
    turn = ask("What is the capital of France? <|im_end|>")
    answer = await collect(engine, turn)
    assert await engine.count(turn) == answer.finish.usage.prompt_tokens
    # More than the context holds is a number, not an error.
    assert await engine.count(ask("word " * 4000)) > 4000
    with pytest.raises(BadRequestError):
        await engine.count(replace(turn, prompt=(ChatMessage("nobody", "hi"),)))
    assert engine.in_flight == 0


async def test_requests_that_cannot_be_served(engine: EngineProcess) -> None:
    with pytest.raises(ContextLengthError, match="context is 2048 tokens"):
        await collect(engine, ask("word " * 3000))
    with pytest.raises(ContextLengthError):
        await collect(engine, ask("word", max_tokens=2048))
    with pytest.raises(BadRequestError, match="role"):
        await collect(engine, Request("r", b"", (ChatMessage("<|im_end|>", "x"),)))
    with pytest.raises(BadRequestError, match="too large"):
        await collect(engine, ask("x" * 9_000_000))
    with pytest.raises(BadRequestError):
        await collect(engine, ask("x", sampling=Sampling(logit_bias=((10**8, 1.0),))))
    assert (await collect(engine, ask("Still there?"))).text


async def test_a_full_queue_is_busy_at_once(engine: EngineProcess) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(OPTIONS.slots + OPTIONS.waiting_max):
            story = ask("Tell me a long story.", session=bytes([number]) * 16, max_tokens=500)
            nursery.start_soon(collect, engine, story)
        while engine.stats().queue_depth < OPTIONS.waiting_max:
            await trio.sleep(0.01)
        with pytest.raises(EngineBusyError) as error:
            await collect(engine, ask("And me?"))
        assert error.value.retry_after_s > 0
        nursery.cancel_scope.cancel()


async def test_a_killed_child_fails_its_requests_and_comes_back(engine: EngineProcess) -> None:
    pid = engine.pid
    assert pid is not None

    async def kill_midway() -> None:
        async with engine.generate(ask("Tell me a story.", max_tokens=None)) as events:
            async for _ in events:
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineError, match=r"gguf was ended by SIGKILL") as error:
        await kill_midway()
    assert error.value.retry_elsewhere
    with pytest.raises(EngineError, match="is loading"):
        await collect(engine, ask("Now?"))
    assert "SIGKILL" in (engine.stats().error or "")
    await engine.wait_ready()
    assert engine.pid != pid
    assert engine.stats().error is None
    assert (await collect(engine, ask("And now?"))).text


async def test_stopping_ends_the_child_and_its_requests(q4_0_card: ModelCard) -> None:
    failures = []

    async def wait_for_failure(engine: EngineProcess) -> None:
        try:
            await collect(engine, ask("Tell me a story.", max_tokens=None))
        except EngineError as error:
            failures.append(error)

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as consumers, trio.open_nursery() as owner:
            engine = EngineProcess(q4_0_card, OPTIONS)
            await owner.start(engine.run)
            await engine.wait_ready()
            pid = engine.pid
            assert pid is not None
            consumers.start_soon(wait_for_failure, engine)
            while not engine.stats().slots_busy:
                await trio.sleep(0.01)
            owner.cancel_scope.cancel()
    assert len(failures) == 1
    assert engine.stats().state == "stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_file_that_is_cut_while_in_use(
    q4_0_card: ModelCard, q4_0_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cut.gguf"
    await trio.to_thread.run_sync(damage, q4_0_path, path, "not at all")
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            engine = EngineProcess(replace(q4_0_card, path=str(path)), OPTIONS)
            await nursery.start(engine.run)
            await engine.wait_ready()
            os.truncate(path, 1000)
            with pytest.raises(EngineError, match=r"cut\.gguf was ended by SIGBUS.*truncated"):
                await collect(engine, ask("Hello?"))
    assert engine.stats().state == "failed"
    assert "ends within its header" in (engine.stats().error or "")


# A node that says which process its engine is in.
NODE = """
import sys, trio
from meshnode.engine import ModelCard
from meshnode.engine.process import EngineProcess

async def main():
    card = ModelCard("m", "", sys.argv[1], 0, "", "", 0, 0)
    async with trio.open_nursery() as nursery:
        engine = EngineProcess(card)
        await nursery.start(engine.run)
        await engine.wait_ready()
        print(engine.pid, flush=True)

trio.run(main)
"""


async def test_the_child_ends_when_its_parent_is_killed(q4_0_path: Path) -> None:
    with trio.fail_after(HANG_S):
        node = await trio.lowlevel.open_process(
            [sys.executable, "-c", NODE, str(q4_0_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert node.stdout is not None
        engine_pidfd = os.pidfd_open(int(await node.stdout.receive_some()))
        node.kill()
        await node.wait()
        await trio.lowlevel.wait_readable(engine_pidfd)
        os.close(engine_pidfd)
        await node.stdout.aclose()


def damage(source: Path, target: Path, kind: str) -> None:
    data = source.read_bytes()
    match kind:
        case "missing":
            return
        case "empty":
            data = b""
        case "text":
            data = b"This is not a model.\n" * 1000
        case "zeros":
            data = bytes(1_000_000)
        case "cut in the header":
            data = data[:5000]
        case "cut in the weights":
            data = data[: len(data) * 2 // 3]
        case "last byte missing":
            data = data[:-1]
        case "tensor renamed":
            data = data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_X.weight")
        case "flipped in the header":
            data = data[:8] + bytes([data[8] ^ 0x40]) + data[9:]
    target.write_bytes(data)


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "empty",
        "text",
        "zeros",
        "cut in the header",
        "cut in the weights",
        "last byte missing",
        "flipped in the header",
    ],
)
async def test_a_damaged_file_fails_by_name_and_the_node_goes_on(
    kind: str, q4_0_card: ModelCard, q4_0_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "broken.gguf"
    damage(q4_0_path, path, kind)
    engine = EngineProcess(replace(q4_0_card, path=str(path)), OPTIONS)
    with trio.fail_after(HANG_S):
        await engine.run()
        with pytest.raises(ModelLoadError, match=r"broken\.gguf"):
            await engine.wait_ready()
        with pytest.raises(EngineError, match="is failed"):
            await collect(engine, ask("Hello?"))
    stats = engine.stats()
    assert stats.state == "failed"
    assert "broken.gguf" in (stats.error or "")


async def test_damage_that_only_llama_cpp_sees(
    q4_0_card: ModelCard, q4_0_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "broken.gguf"
    damage(q4_0_path, path, "tensor renamed")
    engine = EngineProcess(replace(q4_0_card, path=str(path)), OPTIONS)
    with trio.fail_after(HANG_S):
        await engine.run()
    assert engine.stats().state == "failed"
    assert "attn_q" in (engine.stats().error or "")


async def test_a_model_that_is_too_large_says_so_with_the_sum(
    q4_0_card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.engine.process.available_bytes", lambda: 100 * 1024**2)
    engine = EngineProcess(q4_0_card, OPTIONS)
    with trio.fail_after(HANG_S):
        await engine.run()
    assert engine.stats().state == "failed"
    error = engine.stats().error or ""
    assert "45 MiB KV cache for 2048 tokens" in error
    assert "100 MiB are available" in error
