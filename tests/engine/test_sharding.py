"""Shards of a real small model, made and measured in the child process as the command does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meshnode.config import Ranking
from meshnode.engine.experts import Observer, WindowReader
from meshnode.engine.sharding import Made, Order, Progress, make_shard
from meshnode.engine.sharding_child import compare
from meshnode.errors import ShardError
from meshnode.models.experts import read_experts
from meshnode.models.gguf import ShardMark, read_header

MODEL = Path(__file__).parents[1] / "data" / "tiny-moe.Q8_0.gguf"
SOURCE = "5e" * 32
EXPERTS, USED, LAYERS = 32, 4, 6
TEXT = Path(__file__).parents[2] / "meshnode" / "models" / "texts"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The beginnings of the texts that come along: ten windows to rank on, six to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    places = folder / "calibration.txt", folder / "held-out.txt"
    for place, size in zip(places, (7_500, 4_500), strict=True):
        place.write_text((TEXT / place.name).read_text()[:size])
    return places


def made(
    texts: tuple[Path, Path], place: Path, kept: int, ranking: Ranking = "output-norm"
) -> tuple[Made, list[Progress]]:
    told: list[Progress] = []
    calibration, held_out = map(str, texts)
    order = Order(str(MODEL), SOURCE, str(place), kept, ranking, calibration, held_out, 1)
    return make_shard(order, told.append), told


def test_a_shard_is_made_measured_and_watched(texts: tuple[Path, Path], tmp_path: Path) -> None:
    good, told = made(texts, tmp_path / "good.gguf", 24)
    assert (good.architecture, good.layers, good.of, good.used) == ("qwen3moe", LAYERS, 32, USED)
    assert read_header(tmp_path / "good.gguf").shard == ShardMark(SOURCE, 24, EXPERTS)
    assert good.calibration_tokens > good.held_out_tokens > 1000
    fractions = [progress.fraction for progress in told]
    assert fractions == sorted(fractions)
    assert {progress.doing for progress in told} == {"ranking", "cutting", "measuring"}
    assert fractions[-1] == pytest.approx(1.0)
    # Three of four experts: near, and chance is far worse.
    assert 0.0 < good.quality.kl < 0.12
    assert good.quality.agreement > 0.8
    assert 0.97 < good.quality.perplexity_ratio < 1.15
    bad, _ = made(texts, tmp_path / "bad.gguf", 24, "random")
    assert bad.quality.kl > 1.5 * good.quality.kl
    assert bad.quality.perplexity == good.quality.perplexity


def test_the_whole_model_is_as_good_as_itself(texts: tuple[Path, Path]) -> None:
    quality, _ = compare(MODEL, MODEL, texts[1].read_text(), 1, lambda _: None)
    assert quality.kl == 0.0
    assert quality.agreement == quality.perplexity_ratio == 1.0
    assert 10 < quality.perplexity < 200


def test_what_experts_do_is_counted_as_routers_mean_it() -> None:
    experts = read_experts(MODEL)
    observer = Observer("qwen3moe", EXPERTS)
    tokens = np.random.default_rng(3).integers(1, 4000, 64).tolist()
    with WindowReader(MODEL, len(tokens), 1, observer) as model:
        watched = model.read(tokens).copy()
    with WindowReader(MODEL, len(tokens), 1) as model:
        assert np.array_equal(model.read(tokens), watched)
    seen = observer.seen(experts.layers)
    for sums in (seen.probability, seen.weight):
        assert tuple(sorted(sums)) == experts.layers
        for row in sums.values():
            assert row.sum() == pytest.approx(len(tokens), rel=1e-3)
    # An expert that was never chosen has no weight and no output.
    for layer in experts.layers:
        assert np.array_equal(seen.weight[layer] > 0, seen.output_norm[layer] > 0)
    with pytest.raises(ShardError, match="does not show"):
        observer.seen((*experts.layers, 6))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kept": 33}, "32 experts"),
        ({"held_out": "/nowhere.txt"}, "nowhere"),
        ({"source": "/nowhere.gguf"}, "nowhere"),
    ],
)
def test_the_child_says_what_cannot_be_done(
    change: dict[str, object], why: str, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    fields: dict[str, object] = {
        "source": str(MODEL),
        "source_digest": SOURCE,
        "destination": str(tmp_path / "out.gguf"),
        "kept": 24,
        "ranking": "output-norm",
        "calibration": str(texts[0]),
        "held_out": str(texts[1]),
        "threads": 1,
    }
    with pytest.raises(ShardError, match=why):
        make_shard(Order(**{**fields, **change}), lambda _: None)  # type: ignore[arg-type]


def test_a_text_that_is_too_short_is_refused(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(ShardError, match="at least 256"):
        made((short, texts[1]), tmp_path / "out.gguf", 24)
