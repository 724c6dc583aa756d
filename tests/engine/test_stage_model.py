"""A cut model computes what the whole one does, to the bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.models.catalog import resolve

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

from tests.engine.ring import Bare, Batch, Ring  # noqa: E402

LAYERS = 30
TEXT = "The sun rises in the east, and the city wakes with it: bread, trams, and pigeons."


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is packaged, Q4_1."""
    return resolve("default", tmp_path_factory.mktemp("data")).path


@pytest.fixture(scope="module")
def bare(path: Path) -> Iterator[Bare]:
    whole = Bare(path)
    yield whole
    whole.close()


@pytest.fixture(scope="module", params=[(15,), (10, 20)], ids=["2 stages", "3 stages"])
def cut_ring(path: Path, request: pytest.FixtureRequest) -> Iterator[Ring]:
    ring = Ring(path, *request.param, layers=LAYERS)
    yield ring
    ring.close()


@pytest.fixture
def whole(bare: Bare) -> Bare:
    bare.forget()
    return bare


@pytest.fixture
def ring(cut_ring: Ring) -> Ring:
    cut_ring.forget()
    return cut_ring


def both(whole: Bare, ring: Ring, batch: Batch) -> np.ndarray:
    """The logits, which must be the same bits."""
    expected = whole.compute(batch)
    assert np.array_equal(expected, ring.compute(batch))
    return expected


def go_on(whole: Bare, ring: Ring, logits: np.ndarray, slot: int, position: int, n: int) -> int:
    """Greedy: n more tokens after the last row of `logits`; the next position."""
    for place in range(position, position + n):
        batch = Batch().add(slot, place, [int(logits[-1].argmax())])
        logits = both(whole, ring, batch)
    return position + n


def test_an_answer(whole: Bare, ring: Ring) -> None:
    prompt = whole.tokens(TEXT)
    go_on(whole, ring, both(whole, ring, Batch().add(0, 0, prompt)), 0, len(prompt), 24)
