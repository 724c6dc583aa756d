"""Models that come and go: a real engine is loaded, asked, unloaded and loaded again."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode import hosted
from meshnode.config import Config
from meshnode.engine import ChatMessage, Delta, Engine, Finish, Request, Sampling
from meshnode.errors import ConfigError, EngineError
from meshnode.hosted import HostedModel, find_models, run_models
from meshnode.messages import Approximate
from meshnode.models.digest import leaf_hashes, tree_root
from meshnode.models.experts import write_shard
from meshnode.models.gguf import ShardMark
from tests.models.gguf_writer import write_gguf
from tests.models.shards import KEY, SOURCE, a_receipt, put_receipt

HANG_S = 90
"""Generous: a load takes a second or two on a free machine."""
WARM_LOAD_S_MAX = 30.0
"""Far above what is printed; a load that hashed or converted the file again would show there."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the default model is converted once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def standby(data_dir: Path) -> Config:
    return Config(data_dir, models=(), standbys=("default",), context_tokens=2048, slots=4)


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[HostedModel]:
    """The configuration's one model, in its life."""
    (model,) = find_models(config)
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_models, (model,))
            yield model
            nursery.cancel_scope.cancel()


async def until(model: HostedModel, *states: str) -> None:
    while model.state not in states:
        await trio.sleep(0.005)


def engine_of(model: HostedModel) -> Engine:
    holding = model.holding()
    assert holding is not None
    engine = model.engine_for(holding.digest)
    assert engine is not None
    return engine


def pid_of(model: HostedModel) -> int:
    assert model.engine is not None
    assert model.engine.pid is not None
    return model.engine.pid


def story(tokens: int) -> Request:
    prompt = (ChatMessage("user", "Tell me a long story."),)
    return Request("r", b"s" * 16, prompt, Sampling(temperature=0), tokens)


async def ask(engine: Engine, request: Request, begun: trio.Event | None = None) -> list[str]:
    """The pieces of a whole answer; the last one is why it ended."""
    pieces: list[str] = []
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Delta):
                pieces.append(event.text)
                if begun is not None:
                    begun.set()
            elif isinstance(event, Finish):
                pieces.append(event.reason)
    return pieces


async def test_a_standby_is_loaded_unloaded_and_loaded_again(standby: Config) -> None:
    async with running(standby) as model:
        assert model.is_settled
        assert model.holding() is None
        await until(model, "standby")
        holding = model.holding()
        assert holding is not None
        assert (holding.state, holding.wanted, holding.layers) == ("file", False, 30)
        cache_bytes = holding.kv_bytes_per_token * holding.context_tokens
        assert holding.bytes == holding.weight_bytes + cache_bytes + holding.compute_bytes
        assert holding.context_tokens == 2048
        assert model.offer() is None
        assert model.engine is None
        assert model.snapshot().digest == holding.digest

        answers = []
        for _ in range(2):
            asked_at = trio.current_time()
            model.assign(True)
            await until(model, "ready")
            warm_load_s = trio.current_time() - asked_at
            print(f"warm standby to ready: {warm_load_s:.2f} s")
            assert warm_load_s < WARM_LOAD_S_MAX
            assert model.holding() == replace(holding, state="ready")
            offer = model.offer()
            assert offer is not None
            assert (offer.digest, offer.state) == (holding.digest, "ready")
            answers.append(await ask(engine_of(model), story(8)))
            pid = pid_of(model)
            # An estimate that is rounded up, and not by much.
            assert 0.5 * holding.bytes < model.snapshot().memory_bytes < holding.bytes
            model.assign(False)
            await until(model, "standby")
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            assert model.holding() == holding
        assert answers[0] == answers[1]
        assert answers[0][-1] == "length"


async def test_an_answer_in_progress_is_finished_before_the_memory_is_freed(
    standby: Config,
) -> None:
    answers: list[list[str]] = []
    begun = trio.Event()

    async def read(engine: Engine) -> None:
        answers.append(await ask(engine, story(200), begun))

    async with running(standby) as model:
        model.assign(True)
        await until(model, "ready")
        pid = pid_of(model)
        digest = model.snapshot().digest
        async with trio.open_nursery() as readers:
            readers.start_soon(read, engine_of(model))
            await begun.wait()
            model.assign(False)
            assert model.engine_for(digest) is None
            assert model.offer() is None
            assert model.state == model.snapshot().state == "unloading"
            holding = model.holding()
            assert holding is not None
            assert holding.state == "ready"  # the memory is still taken
            await until(model, "standby")
        assert answers[0][-1] == "length"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_assigned_again_while_draining_it_stays_loaded(standby: Config) -> None:
    answers: list[list[str]] = []
    begun = trio.Event()

    async def read(engine: Engine) -> None:
        answers.append(await ask(engine, story(200), begun))

    async with running(standby) as model:
        model.assign(True)
        await until(model, "ready")
        pid = pid_of(model)
        async with trio.open_nursery() as readers:
            readers.start_soon(read, engine_of(model))
            await begun.wait()
            model.assign(False)
            await trio.testing.wait_all_tasks_blocked()
            model.assign(True)
            model.assign(False)  # within one turn of the loop
            await trio.testing.wait_all_tasks_blocked()
            assert model.state == "unloading"  # an answer is in flight: not cut
            model.assign(True)
            assert model.state == "ready"
        await trio.testing.wait_all_tasks_blocked()
        assert answers[0][-1] == "length"
        assert (model.state, pid_of(model)) == ("ready", pid)
        assert (await ask(engine_of(model), story(4)))[-1] == "length"


async def test_a_reader_that_takes_too_long_is_cut(
    standby: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted, "UNLOAD_DRAIN_S", 1.0)
    async with running(standby) as model:
        model.assign(True)
        await until(model, "ready")
        async with engine_of(model).generate(story(1800)) as events:
            for load in (False, True, False):
                await anext(events)
                model.assign(load)
            taken_back_at = trio.current_time()
            with pytest.raises(EngineError):
                async for _ in events:
                    pass
            # The time counts from the last assignment, not from the first.
            assert trio.current_time() - taken_back_at >= hosted.UNLOAD_DRAIN_S
        await until(model, "standby")


async def test_a_pinned_model_loads_without_being_asked(standby: Config) -> None:
    pinned = replace(standby, models=standby.standbys, standbys=())
    async with running(pinned) as model:
        assert not model.is_settled
        await until(model, "ready")
        assert model.is_settled
        holding = model.holding()
        assert holding is not None
        assert (holding.state, holding.wanted) == ("ready", True)
        model.assign(False)
        await until(model, "standby")
        assert model.is_settled


async def test_a_model_too_large_for_this_machine_waits_for_others(
    standby: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its layers can be spread: what a machine with less memory would do with it."""
    monkeypatch.setattr(hosted, "available_bytes", lambda: 200 * 2**20)
    pinned = replace(standby, models=standby.standbys, standbys=())
    (model,) = find_models(pinned)
    model.keep_ring = no_ring
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_models, (model,))
            await until(model, "standby")
            holding = model.holding()
            nursery.cancel_scope.cancel()
    assert holding is not None
    assert (holding.state, holding.wanted) == ("file", False)
    assert (holding.activation_bytes, holding.cut_every) == (4 * 576, 1)
    assert 0 < holding.edge_bytes < holding.weight_bytes
    assert "--standby" in caplog.text, "what the others are to do"


async def test_layers_are_loaded_and_unloaded_as_they_are_assigned(standby: Config) -> None:
    (model,) = find_models(standby)
    model.keep_ring = no_ring
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_models, (model,))
            await until(model, "standby")
            model.assign(False, frozenset({(0, 3), (27, 30)}))
            while (holding := model.holding()) is None or len(holding.parts) < 2:
                await trio.sleep(0.005)
            assert holding.state == "file", "not all of it"
            assert model.state == "loading", "its head is in no ring"
            assert model.engine_for(holding.digest) is None
            assert model.stage(holding.digest, 0, 3) is not None
            assert model.stage(holding.digest, 27, 30) is None, "that is the head"
            offer = model.offer()
            assert offer is not None
            assert offer.state == "loading"
            model.assign(False, frozenset({(0, 3)}))
            await until(model, "stage")
            assert model.offer() is None
            model.assign(False)
            await until(model, "standby")
            nursery.cancel_scope.cancel()


async def no_ring(head: object) -> None:
    await trio.sleep_forever()


async def test_a_load_that_is_taken_back_leaves_nothing(standby: Config) -> None:
    async with running(standby) as model:
        model.assign(True)
        while model.engine is None or model.engine.pid is None:
            await trio.sleep(0.005)
        pid = model.engine.pid
        model.assign(False)
        await until(model, "standby")
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("way", ["assigned anew", "after a while"])
async def test_a_failed_load_is_tried_again(
    standby: Config, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    free = [0]
    monkeypatch.setattr("meshnode.engine.process.available_bytes", lambda: free[0])
    if way == "after a while":
        monkeypatch.setattr(hosted, "LOAD_RETRY_AFTER_S", 0.5)
    pinned = replace(standby, models=standby.standbys, standbys=())
    async with running(pinned) as model:
        await until(model, "failed")
        assert model.is_settled
        holding, offer = model.holding(), model.offer()
        assert holding is not None
        assert holding.state == "failed"
        assert offer is not None
        assert offer.state == "failed"
        assert "does not fit into memory" in (model.snapshot().error or "")
        free[0] = 2**40
        if way == "assigned anew":
            model.assign(True)  # it was already: nothing changes
            assert model.state == "failed"
            model.assign(False)
            await trio.testing.wait_all_tasks_blocked()
            assert (model.state, model.offer()) == ("failed", None)
            model.assign(True)
        await until(model, "ready")
        assert model.snapshot().error is None


async def test_a_file_that_changed_on_disk_is_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(write_gguf())
    config = Config(tmp_path, models=(), standbys=(str(file),))
    async with running(config) as model:
        await until(model, "standby")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(0, 0))
        model.assign(True)
        await until(model, "failed")
        assert "has changed since it was verified" in (model.snapshot().error or "")
        assert model.offer() is None


def test_what_is_named_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").touch()
    a, b = str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf")
    models = find_models(Config(tmp_path, models=(a,), standbys=(f"{b}=other",)))
    assert [(model.name, model.pinned) for model in models] == [("a", True), ("other", False)]
    for config in (
        Config(tmp_path, models=(a,), standbys=(f"{a}=other",)),
        Config(tmp_path, models=(), standbys=(a, b, a)),
    ):
        with pytest.raises(ConfigError, match=r"named twice.*--model .* or as --standby"):
            find_models(config)


def a_projector(folder: Path) -> str:
    path = folder / "mmproj-x=y.gguf"
    path.write_bytes(b"GGUF")
    return str(path)


def test_a_projector_belongs_to_the_only_model_or_to_the_one_it_names(
    standby: Config, tmp_path: Path
) -> None:
    file = a_projector(tmp_path)
    alone = replace(standby, standbys=("default=a",))
    for spec in (file, f"a={file}"):
        (model,) = find_models(replace(alone, projectors=(spec,)))
        assert model._options.projector == Path(file)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    both = replace(alone, models=(f"{other}=b",), projectors=(f"a={file}",))
    assert [model._options.projector for model in find_models(both)] == [None, Path(file)]


@pytest.mark.parametrize(
    ("specs", "why"),
    [
        (("no-such-file",), "no such file"),
        (("a=no-such-file",), "no such file"),
        (("c={file}",), r"--mmproj NAME=mmproj-x=y.gguf \(models here: a\)"),
        (("{file}", "a={file}"), "once for each"),
    ],
)
def test_a_projector_that_belongs_to_no_model_is_refused(
    specs: tuple[str, ...], why: str, standby: Config, tmp_path: Path
) -> None:
    file = a_projector(tmp_path)
    projectors = tuple(spec.format(file=file) for spec in specs)
    with pytest.raises(ConfigError, match=why):
        find_models(replace(standby, standbys=("default=a",), projectors=projectors))


MOE = Path(__file__).parent / "data" / "tiny-moe.Q8_0.gguf"


def a_shard(folder: Path, name: str = "moe~16of32.gguf") -> Path:
    """Of the small MoE; without a receipt."""
    place = folder / name
    kept = dict.fromkeys(range(6), range(16))
    write_shard(MOE, place, kept, ShardMark(SOURCE, 16, 32))
    return place


def digest_of(file: Path) -> str:
    return tree_root(leaf_hashes(file)).hex()


async def test_a_shard_is_served_with_its_receipt_and_says_what_it_is(tmp_path: Path) -> None:
    shard = a_shard(tmp_path)
    put_receipt(shard, a_receipt(digest_of(shard), 16))
    async with running(Config(tmp_path, models=(str(shard),), context_tokens=256)) as model:
        await until(model, "ready", "failed")
        offer = model.offer()
        assert offer is not None
        assert offer.name == "moe~16of32"
        assert offer.approximate == Approximate(0.024, 0.89, 1.04, 16, 32, KEY.peer_id)
        assert model.snapshot().approximate == offer.approximate
        request = Request("r", b"s" * 16, "And the LORD", Sampling(temperature=0), 4)
        assert (await ask(engine_of(model), request))[-1] == "length"


@pytest.mark.parametrize("receipt", ["none", "of other bytes"])
async def test_a_shard_without_a_good_receipt_is_not_served(receipt: str, tmp_path: Path) -> None:
    shard = a_shard(tmp_path)
    if receipt != "none":
        put_receipt(shard, a_receipt("0d" * 32, 16))
    async with running(Config(tmp_path, models=(str(shard),))) as model:
        await until(model, "failed")
        why = model.snapshot().error or ""
        assert "meshnode models shard MODEL --experts 16" in why
        assert (model.offer(), model.holding()) == (None, None)


@pytest.mark.parametrize("is_shard", [True, False])
async def test_a_name_says_what_the_file_is(is_shard: bool, tmp_path: Path) -> None:
    """Nobody who asks for the whole model gets a shard, whatever it was called."""
    if is_shard:
        file, name = a_shard(tmp_path), "moe"
        put_receipt(file, a_receipt(digest_of(file), 16))
    else:
        file, name = MOE, "moe~16of32"
    async with running(Config(tmp_path, models=(f"{file}={name}",))) as model:
        await until(model, "failed")
        told = "=moe~16of32" if is_shard else "without ~"
        assert told in (model.snapshot().error or "")
        assert model.offer() is None
