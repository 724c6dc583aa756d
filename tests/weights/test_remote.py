"""A node without a model's file: it says what the model would take, and loads a part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from meshnode.config import Config
from meshnode.errors import ConfigError, ModelLoadError
from meshnode.hosted import HostedModel, find_models, run_models
from meshnode.models.catalog import resolve
from meshnode.models.digest import LEAF_BYTES, corners, leaf_count
from meshnode.models.stages import cut
from meshnode.pipeline.parts import HeadPart
from meshnode.weights import RemoteFile
from meshnode.weights.remote import needed
from tests.weights.givers import ANN, SIZE, World

HANG_S = 90.0
LAYERS = 30
HEADER_LEAVES = range(2)
"""The vocabulary of SmolLM2 takes 1.7 MB."""


async def never(head: HeadPart) -> None:
    await trio.sleep_forever()


@pytest.fixture
def world(tmp_path: Path, nursery: trio.Nursery) -> World:
    return World(nursery, tmp_path, resolve("default", tmp_path).path)


def hosted(world: World, folder: Path) -> HostedModel:
    config = Config(
        folder / "data", models=(), standbys=("mesh:smol",), context_tokens=256, slots=2
    )
    (model,) = find_models(config)
    assert model.remote is not None
    model.remote.peers = world.given
    model.remote.find = world.find
    model.keep_ring = never
    return model


def leaves_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {n for start, end in ranges for n in range(start // LEAF_BYTES, -(-end // LEAF_BYTES))}


@pytest.mark.parametrize("layers", [(0, 10), (10, 20)])
async def test_a_part_is_loaded_from_no_more_than_its_own_bytes(
    world: World, tmp_path: Path, layers: tuple[int, int], nursery: trio.Nursery
) -> None:
    model = hosted(world, tmp_path)
    nursery.start_soon(run_models, (model,))
    with trio.fail_after(HANG_S):
        world.add(ANN)
        while model.state != "standby":
            await trio.sleep(0.01)
        holding = model.holding()
        assert holding is not None
        assert (holding.name, holding.digest, holding.layers) == ("smol", world.model, LAYERS)
        assert model.file() is None, "it has nothing to give"
        count = leaf_count(world.path.stat().st_size)
        header = {*HEADER_LEAVES, *corners(count)}
        assert {leaf for _, leaf in world.asked} == header

        model.assign(load=False, parts=frozenset([layers]))
        while model.stage(world.model, *layers) is None:
            assert model.state != "failed", model.snapshot()
            await trio.sleep(0.01)
    stage = cut(world.path, *layers)
    (part,) = (tmp_path / "data").glob("cache/parts/*.gguf")
    rows = slice(
        stage.lookup.offset, stage.lookup.offset + stage.lookup.count * stage.lookup.row_bytes
    )
    read = part.read_bytes()[rows] == world.path.read_bytes()[rows]
    assert read is stage.is_first, "only the first layers look tokens up"
    own = leaves_of(needed(stage))
    assert {leaf for _, leaf in world.asked} == header | own
    assert len(own) * LEAF_BYTES <= sum(end - start for start, end in needed(stage)) + (
        2 * LEAF_BYTES * len(needed(stage))
    )
    assert len(world.asked) == len(set(world.asked)), "nothing twice"
    assert len(own | header) < count * 2 / 3


async def test_all_of_it_comes_when_all_of_it_is_to_be_served(
    world: World, tmp_path: Path, nursery: trio.Nursery
) -> None:
    model = hosted(world, tmp_path)
    nursery.start_soon(run_models, (model,))
    with trio.fail_after(HANG_S):
        assert model.state == "loading", "nobody has it yet"
        world.add(ANN)
        while model.state != "standby":
            await trio.sleep(0.01)
        model.assign(load=True)
        while model.engine_for(world.model) is None:
            assert model.state != "failed", model.snapshot()
            await trio.sleep(0.01)
    found = model.file()
    assert found is not None
    assert found[1].path.read_bytes() == world.path.read_bytes()


async def test_what_is_no_model_is_given_up(world: World, tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"noise" * (SIZE // 5))
    noise = World(world._nursery, tmp_path / "other", path)
    noise.add(ANN)
    remote = RemoteFile("smol", tmp_path / "cache")
    remote.peers, remote.find = noise.given, noise.find
    with trio.fail_after(HANG_S), pytest.raises(ModelLoadError, match="GGUF"):
        await remote.card("smol")


async def test_a_name_that_cannot_be(tmp_path: Path) -> None:
    for spec in ("mesh:", "mesh:a/b", "mesh:a=../b"):
        with pytest.raises(ConfigError, match="is not mesh:NAME"):
            find_models(Config(tmp_path, models=(), standbys=(spec,)))
