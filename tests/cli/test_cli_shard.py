"""models shard: what it refuses before any work; e2e/test_shards.py makes one with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.models.gguf_writer import write_gguf

Run = Callable[..., Result]
MOE = Path(__file__).parents[1] / "data" / "tiny-moe.Q8_0.gguf"


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("{moe}", "--experts", "32"), 2, "has 32 experts in a layer"),
        (("{moe}", "--experts", "0"), 2, "--experts"),
        (("{moe}",), 2, "--experts"),
        (("{moe}", "--experts", "8", "--rank", "luck"), 2, "--rank"),
        (("{moe}", "--experts", "8", "--out", "{dense}"), 2, "no shard"),
        (("{moe}", "--experts", "8", "--held-out", "/nowhere.txt"), 2, "/nowhere.txt"),
        (("{dense}", "--experts", "8"), 1, "no experts"),
        (("nothing", "--experts", "8"), 2, "There is no model 'nothing'"),
    ],
)
def test_what_cannot_be_a_shard_is_said_at_once(
    meshnode: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, why: str
) -> None:
    dense = tmp_path / "dense.gguf"
    dense.write_bytes(write_gguf())
    before = dense.read_bytes()
    given = [argument.format(moe=MOE, dense=dense) for argument in arguments]
    result = meshnode("models", "shard", *given)
    assert result.exit_code == code, result.output
    assert why in result.output
    told = json.loads(meshnode("models", "shard", *given, "--json").stdout)
    assert told["error"]["exit_code"] == code
    assert dense.read_bytes() == before
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_shard_is_made_watched_and_explained(meshnode: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((MOE.parent / "README.md").read_text() * 3)
    flags = ("--calibration", str(text), "--held-out", str(text), "--experts", "8")
    result = meshnode("models", "shard", str(MOE), *flags, "--rank", "random")
    assert result.exit_code == 0, result.output
    place = tmp_path / "data" / "models" / "tiny-moe.q8_0~8of32.gguf"
    assert place.is_file()
    for line in (str(place), "8 of 32 in 6 layers, by random", "signed by 12D3KooW", "text.txt,"):
        assert line in result.stdout
    # An older shard may be replaced.
    again = meshnode("models", "shard", str(MOE), *flags, "--json")
    assert json.loads(again.stdout)["receipt"]["ranking"] == "output-norm"
    assert sorted(path.name for path in place.parent.iterdir()) == [
        place.name,
        f"{place.name}.receipt.json",
    ]
