"""The default model in its fast form, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from meshnode.engine import ModelCard
from meshnode.engine.card import load_card
from meshnode.models.catalog import ModelSource, resolve
from meshnode.models.digest import digest
from meshnode.models.quantize import requantized


def ignore_progress(_fraction: float) -> None:
    """Nobody watches."""


@pytest.fixture(scope="session")
def q4_0_card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    """SmolLM2-135M-Instruct as Q4_0: 1.4 s to make, and half the time of every test after."""
    data_dir = tmp_path_factory.mktemp("data")

    async def make() -> ModelCard:
        source = resolve("default", data_dir)
        identity = await digest(source.path, data_dir)
        path = await requantized(source.path, identity, data_dir)
        return await load_card(ModelSource(source.name, path), data_dir, ignore_progress)

    return trio.run(make)


@pytest.fixture(scope="session")
def q4_0_path(q4_0_card: ModelCard) -> Path:
    return Path(q4_0_card.path)
