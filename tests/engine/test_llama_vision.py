"""Pictures in llama.cpp's own terms: batches of embeddings, positions, neighbours. In this process.

Batches are made by hand where numbers are compared to the last bit: a model computes the same
only in batches of the same shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from meshnode.engine import ChatMessage, Image
from meshnode.engine.cells import stretch, view_at
from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.engine.scheduler import Batch, Chunk, Copy, Trim
from tests.engine.eyes import picture, write_language_model, write_projector

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

import llama_cpp.llama_cpp as llama_cpp

from meshnode.engine.llama import LlamaModel

RED, BLUE = Image(picture("red"), 0), Image(picture("blue"), 0)
STEPS = 6


def ignore_progress(_fraction: float) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module", params=["gemma3", "mlp"])
def model(
    request: pytest.FixtureRequest, q4_0_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlamaModel]:
    projector = write_projector(tmp_path_factory.mktemp("eyes") / "mmproj.gguf", request.param)
    with LlamaModel(
        str(q4_0_path),
        context_tokens=1024,
        slots=2,
        threads=1,
        on_progress=ignore_progress,
        projector=str(projector),
    ) as model:
        yield model


class Lane:
    """One slot, computed greedily."""

    def __init__(self, model: LlamaModel, slot: int, *messages: ChatMessage) -> None:
        self.model, self.slot = model, slot
        self.views: dict[int, object] = {}
        self.tokens = model.prompt_tokens(messages, self.views)  # type: ignore[arg-type]
        self.computed = 0
        assert model.trim(Trim(slot, 0))

    def step(self) -> np.ndarray[tuple[int], np.dtype[np.float32]] | None:
        """One batch; its last row's logits, and the next token, when the prompt is done."""
        start = self.computed
        count = stretch(self.tokens, start, 512)
        self.computed += count
        is_last = self.computed == len(self.tokens)
        tokens = tuple(self.tokens[start : self.computed])
        chunk = Chunk(1, self.slot, start, tokens, is_last)
        digest = view_at(tokens, 0)
        if digest is not None:
            assert self.model.decode_view(chunk, self.views[digest])  # type: ignore[arg-type]
            return None
        assert self.model.decode(Batch((), (chunk,)))
        if not is_last:
            return None
        logits = self.model._logits(count - 1).copy()
        self.tokens.append(int(logits.argmax()))
        return logits

    def run(self) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
        found: list[np.ndarray[tuple[int], np.dtype[np.float32]]] = []
        while len(found) < STEPS:
            logits = self.step()
            found += [] if logits is None else [logits]
        return found


@pytest.fixture(scope="module")
def planar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    """A model whose pictures have places in two dimensions, and fewer positions than cells."""
    folder = tmp_path_factory.mktemp("planar")
    projector = write_projector(folder / "mmproj.gguf", "qwen2vl_merger", width=64)
    with LlamaModel(
        str(write_language_model(folder / "model.gguf")),
        context_tokens=512,
        slots=2,
        threads=1,
        on_progress=ignore_progress,
        projector=str(projector),
    ) as model:
        yield model


def see(*images: Image) -> ChatMessage:
    return ChatMessage("user", "What is this?", images)


def test_the_same_picture_gives_the_same_numbers_and_another_gives_others(
    model: LlamaModel,
) -> None:
    red, again, blue = (Lane(model, 0, see(each)).run() for each in (RED, RED, BLUE))
    assert all(np.array_equal(a, b) for a, b in zip(red, again, strict=True))
    assert not np.allclose(red[0], blue[0], atol=0.01)
    order, reverse = Lane(model, 0, see(RED, BLUE)).run(), Lane(model, 0, see(BLUE, RED)).run()
    assert not np.allclose(order[0], reverse[0], atol=0.01)


def test_a_neighbour_that_sees_changes_nothing(model: LlamaModel) -> None:
    assert model.trim(Trim(1, 0))
    alone = Lane(model, 0, ChatMessage("user", "Tell me a story.")).run()
    neighbour = Lane(model, 1, see(RED))
    lane = Lane(model, 0, ChatMessage("user", "Tell me a story."))
    beside = []
    while len(beside) < STEPS:
        logits = lane.step()
        beside += [] if logits is None else [logits]
        neighbour.step()
    assert all(np.array_equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_an_aborted_view_leaves_nothing_behind(model: LlamaModel) -> None:
    whole = Lane(model, 0, see(RED)).run()
    lane = Lane(model, 0, see(RED))
    lane.step()
    start = lane.computed
    model.abort()
    count = stretch(lane.tokens, start, 512)
    chunk = Chunk(1, 0, start, tuple(lane.tokens[start : start + count]), False)
    view = lane.views[view_at(chunk.tokens, 0)]  # type: ignore[index]
    assert not model.decode_view(chunk, view)  # type: ignore[arg-type]
    model.allow()
    assert model.trim(chunk.undo)
    assert all(np.array_equal(a, b) for a, b in zip(whole, lane.run(), strict=True))


def test_one_libggml_serves_both_libraries(model: LlamaModel) -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split()[-1] for line in maps if "libggml-base" in line or "libllama" in line}
    assert len(files) == 2
    assert any("libmtmd" in line for line in maps)


@pytest.mark.parametrize("words", ["<__media__>", "<start_of_image>", "<|im_end|>"])
def test_what_a_user_writes_is_no_picture(model: LlamaModel, words: str) -> None:
    tokens = model.prompt_tokens((ChatMessage("user", words + "x", (RED,)),))
    only_seen = model.prompt_tokens((ChatMessage("user", "x", (RED,)),))
    assert sum(token < 0 for token in tokens) == sum(token < 0 for token in only_seen)
    plain = model.prompt_tokens(words)
    assert "".join(model.piece(token).decode() for token in plain).endswith(words)


def test_pictures_with_places_in_two_dimensions(planar: LlamaModel) -> None:
    wide = Image(picture("red", (224, 112)), 0)
    lane = Lane(planar, 0, see(wide, wide))
    views = [*lane.views.values()]
    assert [(view.cells, view.positions) for view in views] == [(32, 8)]  # type: ignore[attr-defined]
    first = lane.run()
    # Two pictures of 32 cells; each moves what comes after it by its width only.
    last = int(llama_cpp.llama_memory_seq_pos_max(planar._memory, 0))
    assert last == lane.computed - 1 - 2 * (32 - 8)

    # Back to behind the first picture, and on: the same numbers.
    begin = lane.tokens.index(min(lane.tokens))  # the last cell of either
    assert planar.trim(Trim(0, begin + 1))
    lane.computed = begin + 1
    del lane.tokens[-STEPS:]
    assert all(np.array_equal(a, b) for a, b in zip(first, lane.run(), strict=True))

    # From there in another slot as well.
    other = Lane(planar, 1, see(wide, wide))
    planar.copy(Copy(0, 1, begin + 1))
    other.computed = begin + 1
    assert all(np.array_equal(a, b) for a, b in zip(first, other.run(), strict=True))

    # Where a picture's pixels lie matters: the same ones, turned.
    turned = Image(picture("red", (112, 224)), 0)
    assert not np.allclose(first[0], Lane(planar, 0, see(turned, turned)).run()[0], atol=1e-4)
