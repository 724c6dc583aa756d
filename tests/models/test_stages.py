"""What is in a stage's file, and what cannot be one."""

from __future__ import annotations

import mmap
import os
import pickle
import struct
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_writer import LLAMA, Tensor, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshnode.errors import LocalProtocolError, ModelLoadError, StageError
from meshnode.models.catalog import resolve
from meshnode.models.gguf import read_layout
from meshnode.models.stages import Cuts, Stage, cut, cut_points, open_stage, why_not
from meshnode.models.stages.architectures import REFUSED, RULES
from meshnode.models.stages.lookup import Lookup
from meshnode.models.stages.names import last_norm

EDGES = (0, 10, 20, 30)
WIDTH, WORDS, LAYERS = 64, 3, 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M: 30 layers, and its rows of tokens are also its head."""
    return resolve("default", tmp_path_factory.mktemp("data")).path


@pytest.fixture(scope="module")
def stages(whole: Path) -> list[Stage]:
    return [cut(whole, first, end) for first, end in pairwise(EDGES)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def small(
    path: Path, architecture: str = "llama", *more: Tensor, layers: int = LAYERS, **keys: Any
) -> Path:
    """A model without anything in its layers; `keys` are settings, with _ for the points."""
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.context_length": 512,
        f"{architecture}.block_count": layers,
        f"{architecture}.embedding_length": WIDTH,
        "tokenizer.ggml.tokens": ["a", "b", "c"],
    } | {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    norm = last_norm(architecture)
    tensors = [
        Tensor("token_embd.weight", (WIDTH, WORDS), 0, 4 * WIDTH * WORDS, data=b"t" * 768),
        Tensor(norm, (WIDTH,), 0, 4 * WIDTH, data=b"n" * 256),
        Tensor("output.weight", (WIDTH, WORDS), 0, 4 * WIDTH * WORDS, data=b"o" * 768),
        *more,
    ] + [
        Tensor(f"blk.{layer}.x.weight", (WIDTH,), 0, 256, data=bytes([65 + layer]) * 256)
        for layer in range(layers)
    ]
    path.write_bytes(write_gguf(metadata, tensors))
    return path


# -- what is in it -----------------------------------------------------------------------------


def test_stages_of_the_default_model(stages: list[Stage], whole: Path) -> None:
    assert [(stage.is_first, stage.is_last) for stage in stages] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    size = whole.stat().st_size
    sizes = [stage.source_bytes for stage in stages]
    assert sizes == [22_164_480, 22_164_480, 52_247_808]  # the last has the head, of 30 MB
    assert len(stages[1].ranges) == 1  # layers 10 to 19 are written one after the other
    for stage in stages:
        assert (stage.architecture, stage.layers, stage.width) == ("llama", 30, 576)
        assert (stage.vocabulary, stage.lookup.count, stage.lookup.row_bytes) == (49152, 49152, 612)
        assert (stage.input_scale, stage.lookup_scale) == (1.0, 1.0)
        assert stage.bytes_total < stage.source_bytes + len(stage.header) + 4096
        assert pickle.loads(pickle.dumps(stage)) == stage  # noqa: S301  # ours; a child gets it
    # Whatever is not in two stages is in one; only the table of the file is in none.
    covered = sorted(interval for stage in stages for interval in stage.ranges)
    assert all(end <= start for (_, end), (start, _) in pairwise(covered))
    assert sum(sizes) == size - covered[0][0]


def test_a_stage_is_a_model_file(stages: list[Stage], whole: Path) -> None:
    source = read_layout(whole)
    data = whole.read_bytes()
    for stage in stages:
        with open_stage(stage, whole) as file:
            assert file.copied_bytes == sum(piece.size_bytes for piece in stage.pieces)
            layout = read_layout(file.path)
            written = Path(file.path).read_bytes()
            if not stage.is_last:  # whose vocabulary takes it 10 s
                again = gguf.GGUFReader(file.path)  # another reader agrees that it is one
                assert {tensor.name for tensor in again.tensors} == set(layout.tensors)
        assert len(written) == stage.bytes_total
        assert layout.metadata["llama.block_count"] == 10
        assert ("tokenizer.ggml.tokens" in layout.values) == stage.is_last
        for name, tensor in layout.tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "blk":
                number, _, part = rest.partition(".")
                original = source.tensors[f"blk.{int(number) + stage.first}.{part}"]
            elif stage.is_last:
                original = source.tensors[name]
            else:
                continue
            expected = data[original.offset : original.offset + original.size_bytes]
            assert written[tensor.offset : tensor.offset + tensor.size_bytes] == expected, name
        if not stage.is_last:
            assert layout.tensors["token_embd.weight"].shape == (576, 1)
            norm = layout.tensors["output_norm.weight"]
            assert np.frombuffer(written, "<f4", 576, norm.offset).tolist() == [1.0] * 576


def test_nothing_else_of_the_source_is_read(
    stages: list[Stage], whole: Path, tmp_path: Path
) -> None:
    """A source that has the stage's ranges only, and holes elsewhere, is as good."""
    data = whole.read_bytes()
    for stage in stages:
        sparse = tmp_path / f"{stage.first}.gguf"
        with open(sparse, "wb") as file:
            file.truncate(len(data))
            for start, end in stage.ranges:
                os.pwrite(file.fileno(), data[start:end], start)
        with open_stage(stage, whole) as one, open_stage(stage, sparse) as other:
            assert Path(one.path).read_bytes() == Path(other.path).read_bytes()
        assert sum(end - start for start, end in stage.ranges) == stage.source_bytes


def test_a_head_of_its_own_comes_without_the_rows_of_tokens(path: Path) -> None:
    first, last = (cut(small(path), *layers) for layers in ((0, 5), (5, LAYERS)))
    with open_stage(first, path) as file:
        data = Path(file.path).read_bytes()
        assert read_layout(file.path).metadata["llama.vocab_size"] == 1
    assert b"E" * 256 in data
    assert not any(byte * 256 in data for byte in (b"t", b"n", b"o", b"F"))
    with open_stage(last, path) as file:
        data = Path(file.path).read_bytes()
        assert read_layout(file.path).tensors["token_embd.weight"].shape == (WIDTH, WORDS)
    assert all(byte * 256 in data for byte in (b"n", b"o", b"F", b"G", b"H"))
    assert not any(byte * 256 in data for byte in (b"t", b"E"))
    assert last.source_bytes == 256 + 768 + 3 * 256


def test_holes_take_no_memory(path: Path) -> None:
    """They do while all is mapped, as llama.cpp does, but not when the stage is loaded."""
    hole_bytes = 2**24
    names = ("output.weight", "blk.0.x", "blk.1.x")
    tensors = [Tensor(name, (WIDTH,), 0, 256) for name in names]
    words = Tensor("token_embd.weight", (WIDTH, 2**16), 0, hole_bytes)
    path.write_bytes(write_gguf(LLAMA, [words, *tensors]))
    stage = cut(path, 1, 2)
    with open_stage(stage, path) as file:
        descriptor = os.open(file.path, os.O_RDWR)
        before = _bytes_taken(descriptor)
        os.pwrite(descriptor, bytes(hole_bytes), len(stage.header))
        assert _bytes_taken(descriptor) > hole_bytes
    assert _bytes_taken(descriptor) <= before + 2 * mmap.PAGESIZE
    os.close(descriptor)


def _bytes_taken(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def test_settings_are_those_of_its_layers(path: Path) -> None:
    small(
        path,
        feed_forward_length=list(range(100, 108)),
        rope__dimension_sections=[1, 2, 3, 4, 5, 6, 7, 8],
        expert_count=3,
        nextn_predict_layers=0,
    )
    with open_stage(cut(path, 2, 5), path) as file:
        metadata = read_layout(file.path).metadata
    assert metadata["llama.feed_forward_length"] == [102, 103, 104]
    assert metadata["llama.rope.dimension_sections"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (metadata["llama.block_count"], metadata["llama.expert_count"]) == (3, 3)
    assert metadata["tokenizer.ggml.model"] == "no_vocab"
    assert metadata["llama.context_length"] == 512


def test_layers_that_predict_further_tokens_are_left_out(path: Path) -> None:
    small(path, nextn_predict_layers=2, feed_forward_length=list(range(100, 108)))
    assert cut_points(path).layers == LAYERS - 2
    with open_stage(cut(path, 3, 6), path) as file:
        layout = read_layout(file.path)
    assert layout.metadata["llama.nextn_predict_layers"] == 0
    assert layout.metadata["llama.feed_forward_length"] == [103, 104, 105]
    assert sum(name.startswith("blk.") for name in layout.tensors) == 3
    with pytest.raises(StageError, match="layers 0 to 5, not 3 to 7"):
        cut(path, 3, 8)


@pytest.mark.parametrize(
    ("architecture", "keys", "layers", "expected"),
    [
        ("gemma2", {}, (3, 6), {"attention.sliding_window_pattern": [False, True, False]}),
        (
            "cohere2",
            {"attention__sliding_window_pattern": 3},
            (1, 4),
            {"attention.sliding_window_pattern": [True, False, True]},
        ),
        (
            "smallthinker",
            {},
            (1, 7),
            {"attention.sliding_window_pattern": [True, True, True, False, True, True]},
        ),
        ("deepseek", {"leading_dense_block_count": 3}, (2, 5), {"leading_dense_block_count": 1}),
        ("deepseek", {"leading_dense_block_count": 3}, (0, 2), {"leading_dense_block_count": 2}),
        ("deepseek", {"leading_dense_block_count": 3}, (4, 8), {"leading_dense_block_count": 0}),
        ("granite", {"embedding_scale": 12.0}, (0, 2), {"embedding_scale": 12.0}),
        ("granite", {"embedding_scale": 12.0}, (2, 8), {"embedding_scale": 1.0}),
        ("minicpm", {}, (0, 2), {"residual_scale": pytest.approx(1.4 / 8**0.5)}),
        ("minicpm", {"residual_scale": 0.5}, (2, 8), {"residual_scale": 0.5}),
        ("qwen35", {}, (2, 5), {"attention.recurrent_layers": [True, False, True]}),
        ("qwen3vl", {"n_deepstack_layers": 3}, (2, 5), {"n_deepstack_layers": 0}),
        ("deepseek2", {}, (2, 5), {"attention.q_lora_rank": 0, "expert_gating_func": 1}),
        ("deepseek2", {"expert_gating_func": 2}, (2, 5), {"expert_gating_func": 2}),
        (
            "glm4moe",
            {"rope__dimension_count": 64},
            (2, 5),
            {"rope.dimension_sections": [16, 16, 0, 0]},
        ),
    ],
)
def test_rules_rewrite_settings(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    layers: tuple[int, int],
    expected: dict[str, Any],
) -> None:
    stage = cut(small(path, architecture, **keys), *layers)
    with open_stage(stage, path) as file:
        metadata = read_layout(file.path).metadata
    assert {key: metadata[f"{architecture}.{key}"] for key in expected} == expected


def test_rules_scale_what_comes_in(path: Path) -> None:
    for architecture, first, later in (
        ("gemma", (1.0, 1.0), (0.125, 1.0)),
        ("gemma3", (1.0, 8.0), (1.0, 1.0)),
        ("llama", (1.0, 1.0), (1.0, 1.0)),
    ):
        small(path, architecture)
        stages = cut(path, 0, 4), cut(path, 4, 8)
        scales = [(stage.input_scale, stage.lookup_scale) for stage in stages]
        assert scales == [first, later], architecture


# -- where it can be cut -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "keys", "every"),
    [
        ("llama", {}, 1),
        ("smollm3", {}, 4),
        ("llama4", {"interleave_moe_layer_step": 2}, 4),
        ("ernie4_5-moe", {"interleave_moe_layer_step": 3}, 3),
        ("gemma3", {"attention__sliding_window": 8}, 2),
        ("gemma3", {}, 1),
        ("gemma4", {"attention__sliding_window_pattern": [True, False] * 4}, 2),
        ("olmo2", {"attention__sliding_window": 8}, 2),
        ("qwen3next", {}, 4),
        ("qwen3next", {"full_attention_interval": 2}, 2),
        ("lfm2", {"attention__head_count_kv": [0, 0, 2, 0, 2, 2, 0, 2]}, 3),
    ],
)
def test_where_it_can_be_cut(
    path: Path, architecture: str, keys: dict[str, Any], every: int
) -> None:
    cuts = cut_points(small(path, architecture, **keys))
    assert cuts == Cuts(LAYERS, every)
    assert cuts.edges()[0] == 0
    for first, end in combinations(cuts.edges(), 2):
        assert cut(path, first, end).end == end


def test_the_last_stage_is_as_long_as_others(path: Path) -> None:
    cuts = cut_points(small(path, "smollm3", layers=30))
    assert cuts.edges() == (0, 4, 8, 12, 16, 20, 24, 30)


@pytest.mark.parametrize(
    ("architecture", "keys", "layers", "why"),
    [
        ("llama", {}, (0, 9), "has layers 0 to 7, not 0 to 8"),
        ("llama", {}, (-1, 3), "has layers 0 to 7"),
        ("llama", {}, (4, 4), "has layers 0 to 7"),
        ("smollm3", {}, (0, 6), "begin at multiples of 4"),
        ("gemma2", {}, (1, 2), "none of these layers has an attention window"),
        ("qwen3next", {}, (4, 7), "a layer with attention and a recurrent one"),
        ("gemma4", {}, (0, 1), "llama.cpp demands 2 layers"),
    ],
)
def test_layers_that_cannot_be_a_stage(
    path: Path, architecture: str, keys: dict[str, Any], layers: tuple[int, int], why: str
) -> None:
    with pytest.raises(StageError, match=why) as error:
        cut(small(path, architecture, **keys), *layers)
    assert str(path) in str(error.value)


def test_counts_of_layers_that_mean_another_variant(path: Path) -> None:
    small(path, "deepseek2", layers=61, attention__q_lora_rank=16)
    assert cut_points(path).every == 4  # whose multiples are neither 26 nor 27, nor 61 less those
    with pytest.raises(StageError, match="take 26 layers for a lite variant"):
        cut(path, 10, 36)
    small(path, "exaone4", layers=70)
    with pytest.raises(StageError, match="take 64 layers for the 32B variant"):
        cut(path, 0, 64)


def test_where_stages_are_not_exact(path: Path) -> None:
    """√64 is a power of two, √128 is not."""
    assert cut_points(small(path, "gemma")).is_exact
    words = Tensor("token_embd.weight", (128, WORDS), 0, 4 * 128 * WORDS)
    metadata = {"general.architecture": "gemma", "gemma.embedding_length": 128}
    metadata |= {"gemma.context_length": 512, "gemma.block_count": 2}
    path.write_bytes(write_gguf(metadata, [words]))
    assert not cut_points(path).is_exact


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", REFUSED)
def test_architectures_known_not_to_work(path: Path, architecture: str) -> None:
    assert architecture not in RULES
    assert why_not(small(path, architecture)) == f"{architecture}: {REFUSED[architecture]}"
    with pytest.raises(StageError, match="cannot be cut into stages") as error:
        cut(path, 0, 4)
    assert REFUSED[architecture] in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "keys", "layers", "why"),
    [
        ("somethingnew", {}, 8, "was never tried"),
        ("gemma2", {}, 46, "27B variant"),
        ("gemma3", {}, 62, "27B variant"),
        ("exaone4", {}, 64, "32B variant"),
        ("command-r", {}, 64, "Command R"),
        ("gemma4", {"embedding_length_per_layer_input": 256}, 8, "look tokens up"),
        ("gemma4", {"attention__shared_kv_layers": 2}, 8, "KV of earlier ones"),
        ("granite", {"deepstack_mapping": [0] * 8}, 8, "pictures go into"),
        ("llama4", {"attention__sliding_window": 0}, 8, "does not rotate keys"),
        ("lfm2", {}, 8, "does not say which of its layers are recurrent"),
        ("lfm2", {"attention__head_count_kv": [0, 2]}, 8, "does not say which"),
        ("qwen3next", {"attention__recurrent_layers": [True, False]}, 8, "shorter than"),
        ("gemma2", {"attention__sliding_window_pattern": [True] * 7}, 8, "shorter than"),
        ("llama", {"nextn_predict_layers": 9}, 8, "-1 layers of width 64 make no sense"),
        ("llama", {"embedding_length": 2**31}, 8, "of width 2147483647 make no sense"),
        ("llama", {"block_count": 2**31}, 8, "2147483647 layers"),
        ("llama", {"embedding_length": 32}, 8, "no rows of tokens of its width"),
        ("smollm3", {}, 7, "no part of its layers can be a stage"),
    ],
)
def test_models_that_cannot_be_cut(
    path: Path, architecture: str, keys: dict[str, Any], layers: int, why: str
) -> None:
    reason = why_not(small(path, architecture, layers=layers, **keys))
    assert reason is not None
    assert why in reason
    with pytest.raises(StageError, match="cannot be cut into stages"):
        cut_points(path)
    with pytest.raises(StageError):
        cut(path, 0, 1)


def test_tensors_that_nobody_knows(path: Path) -> None:
    for name in ("per_layer_token_embd.weight", "cls.weight", "blk.x.y", "blk.0", "blk.1."):
        reason = why_not(small(path, "llama", Tensor(name, (WIDTH,), 0, 256)))
        assert reason == f"llama: what to do with its tensor {name!r} is not known"


def test_overlapping_tensors(path: Path) -> None:
    """Else a small file could make a stage of any size."""
    many = [Tensor(f"blk.0.{index}", (WIDTH, 8), 0, 0, offset=0) for index in range(64)]
    assert why_not(small(path, "llama", *many)) == "llama: its tensors overlap"


# -- bad files ---------------------------------------------------------------------------------


def test_bad_files_are_refused_as_ever(path: Path) -> None:
    for call in (why_not, cut_points, lambda path: cut(path, 0, 1)):
        with pytest.raises(ModelLoadError, match="cannot be read"):
            call(path.parent / "none")
    data = small(path).read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(ModelLoadError, match="is truncated"):
        cut(path, 0, 1)


def test_a_source_that_shrank_or_vanished(path: Path) -> None:
    stage = cut(small(path), 0, 4)
    path.write_bytes(path.read_bytes()[: stage.pieces[0].source_offset])
    with pytest.raises(ModelLoadError, match="became shorter"), open_stage(stage, path):
        pass
    path.unlink()
    with pytest.raises(ModelLoadError, match="cannot be copied"), open_stage(stage, path):
        pass
    with pytest.raises(ModelLoadError, match="no rows of tokens"):
        Lookup(stage, path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    architecture=st.sampled_from(sorted(RULES)),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=5),
    layers=st.tuples(st.integers(0, 8), st.integers(0, 9)),
)
def test_any_damage_is_cut_or_refused(
    path: Path,
    architecture: str,
    changes: list[tuple[int, int]],
    layers: tuple[int, int],
) -> None:
    heads = [0, 0, 2, 0, 0, 2, 0, 2]
    data = bytearray(small(path, architecture, attention__head_count_kv=heads).read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    path.write_bytes(data)
    try:
        cut_points(path)
        stage = cut(path, *layers)
    except (StageError, ModelLoadError) as error:
        assert str(path) in str(error)  # noqa: PT017  # either outcome is right
        return
    with open_stage(stage, path) as file:
        assert read_layout(file.path).size_bytes == stage.bytes_total


# -- rows of tokens ----------------------------------------------------------------------------


def test_rows_of_the_default_model(stages: list[Stage], whole: Path) -> None:
    """As another implementation reads them, in Q8_0."""
    lookup = Lookup(stages[0], whole)
    tokens = np.arange(0, 49152, 7, dtype=np.int32)
    rows = stages[0].lookup
    table = np.memmap(whole, np.uint8, "r", rows.offset, (rows.count, rows.row_bytes))
    expected = gguf.quants.dequantize(table[tokens], gguf.GGMLQuantizationType(rows.kind))
    assert np.array_equal(lookup.rows(tokens), expected)
    assert lookup.rows(tokens[:0]).shape == (0, 576)


def test_rows_are_scaled_as_the_stage_wants_them(path: Path) -> None:
    small(path, "gemma3")
    value = struct.unpack("<f", b"tttt")[0]
    rows = Lookup(cut(path, 0, 4), path).rows(np.array([2, 0], np.int32))
    assert rows.dtype == np.float32
    assert rows.tolist() == [[np.float32(value) * np.float32(8)] * WIDTH] * 2


def test_tokens_that_there_are_not(path: Path) -> None:
    lookup = Lookup(cut(small(path), 0, 4), path)
    for token in (-1, WORDS):
        with pytest.raises(LocalProtocolError):
            lookup.rows(np.array([0, token], np.int32))
