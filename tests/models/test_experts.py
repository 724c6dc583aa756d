"""Expert shards: with all experts, in any order, a model is what it was; with some, another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.engine.experts import WindowReader
from meshnode.errors import ModelLoadError, ShardError
from meshnode.models.experts import ARCHITECTURES, Kept, read_experts, write_shard
from meshnode.models.gguf import SHARD_KEYS, ShardMark, read_header, read_layout
from tests.engine.tiny_architectures import SETTINGS, WORDS, write_tiny
from tests.models.gguf_writer import LLAMA, Tensor, write_gguf

SOURCE = "5e" * 32
EXPERTS = 8
TOKENS = np.random.default_rng(6).integers(0, WORDS, 40).tolist()
# Sums in another order: what the notes of the first trials show is at most a third of it.
ORDER_MATTERS = 0.01
OF_THE_TABLE = sorted("llama/experts" if name == "llama" else name for name in ARCHITECTURES)


def logits(path: Path) -> np.ndarray:
    with WindowReader(path, len(TOKENS), 1) as model:
        return model.read(TOKENS).copy()


def shard_of(source: Path, chosen: list[int], name: str = "shard.gguf") -> Path:
    kept = dict.fromkeys(read_experts(source).layers, chosen)
    place = source.with_name(name)
    size = write_shard(source, place, kept, ShardMark(SOURCE, len(chosen), EXPERTS))
    assert size == place.stat().st_size
    return place


@pytest.mark.parametrize("name", OF_THE_TABLE)
def test_all_experts_in_any_order_compute_what_the_whole_does(name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", name)
    expected = logits(source)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.1
    same = shard_of(source, list(range(EXPERTS)))
    assert np.array_equal(logits(same), expected)
    turned = shard_of(source, [3, 1, 7, 0, 2, 6, 5, 4])
    assert np.abs(logits(turned) - expected).max() < ORDER_MATTERS
    some = logits(shard_of(source, [1, 3, 4]))
    assert np.isfinite(some).all()
    assert np.abs(some - expected).max() > ORDER_MATTERS


def test_a_shard_consists_of_the_sources_bytes(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", "qwen3moe")
    shard = shard_of(source, [2, 5, 6])
    header = read_header(shard)
    assert header.shard == ShardMark(SOURCE, 3, EXPERTS)
    whole, part = read_layout(source), read_layout(shard)
    assert part.metadata["qwen3moe.expert_count"] == 3
    assert part.metadata["qwen3moe.expert_used_count"] == 2
    changed = {"qwen3moe.expert_count", "qwen3moe.expert_used_count", *SHARD_KEYS}
    assert {key for key in part.values if part.values[key] != whole.values.get(key)} == (
        changed - {"qwen3moe.expert_used_count"}
    )
    before, after = source.read_bytes(), shard.read_bytes()
    assert whole.tensors.keys() == part.tensors.keys()
    for name, tensor in whole.tensors.items():
        found = part.tensors[name]
        data = before[tensor.offset : tensor.offset + tensor.size_bytes]
        if "_exps" in name or "ffn_gate_inp." in name:
            each = tensor.size_bytes // EXPERTS
            data = b"".join(data[i * each : (i + 1) * each] for i in (2, 5, 6))
            assert found.shape == (*tensor.shape[:-1], 3)
        else:
            assert found.shape == tensor.shape
        assert after[found.offset : found.offset + found.size_bytes] == data


def test_fewer_experts_than_were_asked_for_each_token_are_all_asked(tmp_path: Path) -> None:
    shard = shard_of(write_tiny(tmp_path / "tiny.gguf", "llama/experts"), [4])
    assert read_layout(shard).metadata["llama.expert_used_count"] == 1
    assert np.isfinite(logits(shard)).all()


def test_layers_that_guess_ahead_have_experts_that_nobody_computes(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", "glm4moe/predicts")
    experts = read_experts(source)
    assert experts.idle == (8,)
    assert experts.layers == (2, 3, 4, 5, 6, 7, 8)
    assert np.array_equal(logits(shard_of(source, list(range(EXPERTS)))), logits(source))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama", "no experts"),
        ("smallthinker", "permuting"),
        ("deepseek2/groups", "groups"),
        ("lfm2moe", "never tested"),
    ],
)
def test_what_was_not_shown_to_work_is_refused(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"expert_group_count": 4, "expert_group_used_count": 2}
    monkeypatch.setitem(SETTINGS, "deepseek2/groups", SETTINGS["deepseek2"] | groups)
    source = write_tiny(tmp_path / "tiny.gguf", name)
    with pytest.raises(ShardError, match=why):
        read_experts(source)


def moe_file(path: Path, *tensors: Tensor, **changes: Any) -> Path:
    experts = {"llama.expert_count": 8, "llama.expert_used_count": 2}
    path.write_bytes(write_gguf({**LLAMA, **experts, **changes}, tensors))
    return path


ROUTER = Tensor("blk.0.ffn_gate_inp.weight", (64, 8), 0, 64 * 8 * 4)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("blk.0.ffn_up_chexps.weight", (64, 64, 8), 0, 64 * 64 * 8 * 4),
        Tensor("blk.0.ffn_up_exps.weight", (64, 64, 4), 0, 64 * 64 * 4 * 4),
    ],
)
def test_a_tensor_whose_experts_are_not_understood_is_refused(
    tensor: Tensor, tmp_path: Path
) -> None:
    read_experts(moe_file(tmp_path / "good.gguf", ROUTER))
    with pytest.raises(ShardError, match="unknown"):
        read_experts(moe_file(tmp_path / "bad.gguf", ROUTER, tensor))


def test_a_shard_is_not_cut_again_and_its_mark_is_whole(tmp_path: Path) -> None:
    shard = shard_of(moe_file(tmp_path / "moe.gguf", ROUTER), [0, 1])
    with pytest.raises(ShardError, match="already"):
        read_experts(shard)
    half = moe_file(tmp_path / "half.gguf", ROUTER, **{SHARD_KEYS[1]: 2})
    with pytest.raises(ModelLoadError, match="which experts"):
        read_header(half)


@pytest.mark.parametrize(
    "kept", [{}, {0: [0]}, {0: [0, 0]}, {0: [0, 8]}, {0: [0, -1]}, {0: [0, 1], 1: [0, 1]}], ids=str
)
def test_only_experts_that_are_there_can_be_kept(kept: Kept, tmp_path: Path) -> None:
    source = moe_file(tmp_path / "moe.gguf", ROUTER)
    with pytest.raises(ShardError):
        write_shard(source, tmp_path / "shard.gguf", kept, ShardMark(SOURCE, 2, 8))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = moe_file(tmp_path / "moe.gguf", ROUTER)
    place = tmp_path / "nowhere" / "shard.gguf"
    with pytest.raises(ShardError, match="nowhere"):
        write_shard(source, place, {0: [0, 1]}, ShardMark(SOURCE, 2, 8))
