"""A tiny model with random weights for each architecture that may be cut into stages.

Only the settings are listed: which tensors a model of such settings has, llama.cpp says itself.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np

from tests.models.gguf_writer import Tensor, write_gguf


class _Parameters(ctypes.Structure):
    """struct gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


_GGML = ctypes.CDLL(str(Path(llama.__file__).parent / "lib" / "libggml-base.so.0"))
_GGML.gguf_init_from_buffer.restype = ctypes.c_void_p
_GGML.gguf_init_from_buffer.argtypes = [ctypes.c_char_p, ctypes.c_size_t, _Parameters]
_GGML.gguf_free.argtypes = [ctypes.c_void_p]
_GGML.ggml_get_name.restype = ctypes.c_char_p
_GGML.ggml_get_name.argtypes = [ctypes.c_void_p]
_GGML.ggml_quantize_chunk.restype = ctypes.c_size_t
_GGML.ggml_quantize_chunk.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
    ctypes.c_void_p,
]  # fmt: skip

WORDS, CONTEXT_TOKENS = 96, 512
F32 = 0  # ggml_type
COMMON: dict[str, Any] = {
    "block_count": 8,
    "context_length": CONTEXT_TOKENS,
    "embedding_length": 64,  # √64 is a power of two: scaling by it is exact
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "rope.dimension_count": 16,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "vocab_size": WORDS,
    "rope.freq_base": 10000.0,
}
ALL_HEADS = {"attention.head_count_kv": 4}
WINDOW = {"attention.sliding_window": 8}
FEW_EXPERTS: dict[str, Any] = {"expert_count": 8, "expert_used_count": 2}
EXPERTS: dict[str, Any] = FEW_EXPERTS | {
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.5,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
}
# Of queries, keys and values that are compressed (MLA).
LATENT: dict[str, Any] = {
    "attention.q_lora_rank": 16,
    "attention.kv_lora_rank": 16,
    "attention.key_length_mla": 16,
    "attention.value_length_mla": 16,
    "attention.key_length": 24,
    "rope.dimension_count": 8,
    "attention.head_count_kv": 1,
}
STATE: dict[str, Any] = {
    "block_count": 12,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
}
WIDE_STATE: dict[str, Any] = STATE | {"ssm.inner_size": 128, "ssm.time_step_rank": 8}
UNLIKE_LAYERS: dict[str, Any] = {
    "attention.head_count": [4, 2, 4, 2] * 2,
    "attention.head_count_kv": [1, 2, 4, 2, 1, 2, 2, 1],
    "feed_forward_length": [96, 64, 96, 128] * 2,
}
GRANITE: dict[str, Any] = {
    "embedding_scale": 3.0,
    "residual_scale": 0.5,
    "logit_scale": 2.0,
    "attention.scale": 0.1,
}
DENSE_FIRST = {"leading_dense_block_count": 2}
AXES = {"rope.dimension_sections": [4, 2, 2, 0]}
CONVOLUTIONS: dict[str, Any] = {
    "shortconv.l_cache": 3,
    "block_count": 12,
    "attention.head_count_kv": [0, 0, 2, 0, 0, 2, 0, 2, 0, 0, 2, 0],
}

# Architecture, or "architecture/variant": its settings besides the common ones.
SETTINGS: dict[str, dict[str, Any]] = {
    "afmoe": EXPERTS | DENSE_FIRST | WINDOW | {"block_count": 16},
    "apertus": {
        "xielu.alpha_n": [0.8, 0.7] * 4,
        "xielu.alpha_p": [0.8, 0.9] * 4,
        "xielu.beta": [0.5, 0.4] * 4,
        "xielu.eps": [-1e-6] * 8,
    },
    "arcee": {},
    "arctic": FEW_EXPERTS,
    "bailingmoe": EXPERTS | DENSE_FIRST,
    "bailingmoe2": EXPERTS | DENSE_FIRST,
    "bitnet": {},
    "chatglm": {},
    "codeshell": {},
    "cohere2": WINDOW | {"logit_scale": 0.5},
    "cohere2moe": EXPERTS | DENSE_FIRST | WINDOW | {"logit_scale": 0.5},
    "command-r": {"logit_scale": 0.5},
    "dbrx": FEW_EXPERTS | {"attention.clamp_kqv": 8.0},
    "deci": UNLIKE_LAYERS,
    "deepseek": EXPERTS | DENSE_FIRST,
    "deepseek2": EXPERTS | DENSE_FIRST | LATENT,
    "deepseek2/lite": EXPERTS
    | DENSE_FIRST
    | {key: value for key, value in LATENT.items() if key != "attention.q_lora_rank"}
    | {"block_count": 27, "expert_gating_func": 0},
    "dots1": EXPERTS | DENSE_FIRST | ALL_HEADS,
    "ernie4_5": {},
    "ernie4_5-moe": EXPERTS | DENSE_FIRST | {"interleave_moe_layer_step": 1},
    "exaone": {},
    "exaone-moe": EXPERTS | DENSE_FIRST | WINDOW,
    "exaone4": {},
    "falcon": {},
    "falcon-h1": WIDE_STATE,
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3": WINDOW,
    "gemma3/no windows": {},
    "gemma4": WINDOW
    | {
        "attention.sliding_window_pattern": [True, True, False] * 3,
        "block_count": 9,
        "embedding_length_per_layer_input": 0,
        "attention.shared_kv_layers": 0,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "attention.key_length_swa": 16,
        "attention.value_length_swa": 16,
        "rope.dimension_count_swa": 16,
    },
    "glm4moe": EXPERTS | DENSE_FIRST,
    "glm4moe/predicts": EXPERTS | DENSE_FIRST | {"nextn_predict_layers": 1, "block_count": 9},
    "gpt-oss": EXPERTS | WINDOW,
    "gpt2": ALL_HEADS,
    "gptneox": ALL_HEADS | {"use_parallel_residual": True},
    "granite": GRANITE,
    "granitehybrid": GRANITE | WIDE_STATE | {"attention.head_count_kv": [0, 0, 2, 0] * 3},
    "granitemoe": FEW_EXPERTS | GRANITE,
    "grok": EXPERTS,
    "grovemoe": EXPERTS
    | {"expert_chunk_feed_forward_length": 32, "expert_group_scale": 0.05, "experts_per_group": 2},
    "hunyuan-dense": {},
    "hunyuan-moe": EXPERTS,
    "hunyuan_vl": {},
    "internlm2": {},
    "jais": {},
    "jais2": {},
    "lfm2": CONVOLUTIONS,
    "lfm2moe": EXPERTS | DENSE_FIRST | CONVOLUTIONS,
    "llama": {},
    "llama/experts": FEW_EXPERTS,
    "llama/wide": {"embedding_length": 256},
    "llama4": EXPERTS | WINDOW | {"interleave_moe_layer_step": 2, "block_count": 12},
    "maincoder": {},
    "mellum": EXPERTS | WINDOW,
    "minicpm": {},
    "minimax-m2": EXPERTS,
    "mistral3": {},
    "mistral4": EXPERTS | DENSE_FIRST | LATENT,
    "mpt": {"attention.max_alibi_bias": 8.0},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo2/windows": WINDOW,
    "olmoe": EXPERTS | ALL_HEADS,
    "openelm": UNLIKE_LAYERS,
    "orion": {},
    "pangu-embedded": {},
    "phi2": ALL_HEADS,
    "phi3": {},
    "phimoe": EXPERTS,
    "qwen": ALL_HEADS | {"feed_forward_length": 192},
    "qwen2": {},
    "qwen2moe": EXPERTS,
    "qwen2vl": AXES,
    "qwen3": {},
    "qwen35": STATE | {"rope.dimension_sections": [4, 4, 0, 0]},
    "qwen35moe": EXPERTS | STATE | {"rope.dimension_sections": [4, 4, 0, 0]},
    "qwen3moe": EXPERTS,
    "qwen3next": EXPERTS | STATE,
    "qwen3vl": AXES | {"n_deepstack_layers": 3},
    "qwen3vlmoe": EXPERTS | AXES | {"n_deepstack_layers": 3},
    "refact": {},
    "seed_oss": {},
    "smallthinker": EXPERTS | WINDOW | {"block_count": 24},
    "smollm3": {"block_count": 12},
    "stablelm": {},
    "starcoder": {},
    "starcoder2": {},
    "xverse": {},
}


def write_tiny(path: Path, name: str, *, rows_of_tokens: int = F32) -> Path:
    """A model of `SETTINGS[name]`, whose rows of tokens are of that type. Equal names, equal
    weights."""
    architecture = name.split("/")[0]
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "no_vocab",
    }
    for key, value in (COMMON | SETTINGS.get(name, {})).items():
        prefix = "" if key.startswith("xielu.") else f"{architecture}."
        metadata[prefix + key] = value
    shapes = _shapes({key: value for key, value in metadata.items() if _PREDICTS not in key})
    if f"{architecture}.{_PREDICTS}" in metadata:
        shapes |= _of_prediction(metadata, architecture)
    random = np.random.default_rng(list(name.encode()))
    tensors = []
    for tensor, shape in shapes.items():
        kind = rows_of_tokens if tensor == "token_embd.weight" else F32
        data = _quantized(_weights(tensor, shape, random), kind)
        tensors.append(Tensor(tensor, shape, kind, len(data), data=data))
    path.write_bytes(write_gguf(metadata, tensors))
    return path


def _weights(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    values = random.standard_normal(shape[::-1])
    if name.endswith("ssm_a"):
        values = -0.1 - abs(values)  # how fast a state fades
    elif name.startswith("rope_"):
        values = 1 + abs(values)  # factors of wavelengths
    elif "norm" in name and name.endswith("weight"):
        values = 1 + 0.1 * values
    elif len(shape) == 1:
        values *= 0.1
    elif not name.startswith("token_embd"):
        values *= 1.5 / shape[0] ** 0.5
    return np.asarray(values, np.float32)


def _quantized(values: np.ndarray, kind: int) -> bytes:
    """As llama.cpp does it."""
    if kind == F32:
        return values.tobytes()
    cells = ctypes.create_string_buffer(values.nbytes)
    rows, width = values.shape
    address = values.ctypes.data
    size = _GGML.ggml_quantize_chunk(kind, address, cells, 0, rows, width, None)
    return cells.raw[:size]


_PREDICTS = "nextn_predict_layers"


def _of_prediction(metadata: dict[str, Any], architecture: str) -> dict[str, tuple[int, ...]]:
    """What the last layer has besides, if it predicts further tokens; llama.cpp skips it."""
    last, width = metadata[f"{architecture}.block_count"] - 1, COMMON["embedding_length"]
    shapes = {"eh_proj": (2 * width, width), "enorm": (width,), "hnorm": (width,)}
    return {f"blk.{last}.nextn.{name}.weight": shape for name, shape in shapes.items()}


# -- which tensors a model has -----------------------------------------------------------------

_SHAPE_OFFSET = 16  # in struct ggml_tensor, after its type and its buffer: int64 ne[4]
_SCALES = (".scale", ".input_scale")  # of 4-bit floats only
_OF_EMBEDDERS = ("cls", "dense_")


def _shapes(metadata: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """As llama.cpp asks for them, all optional ones too."""
    asked: dict[str, tuple[int, ...]] = {}

    def note(tensor: int, _data: object) -> None:
        sizes = list((ctypes.c_int64 * 4).from_address(tensor + _SHAPE_OFFSET))
        while len(sizes) > 1 and sizes[-1] == 1:
            sizes.pop()
        asked.setdefault(_GGML.ggml_get_name(tensor).decode(), tuple(sizes))

    data = write_gguf(metadata, ())
    settings = _GGML.gguf_init_from_buffer(data, len(data), _Parameters(True, None))
    callback = llama.llama_model_set_tensor_data_t(note)
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_init_from_user(settings, callback, None, parameters)
    assert model, "llama.cpp does not take these settings"
    llama.llama_model_free(model)
    _GGML.gguf_free(settings)
    return {
        name: shape
        for name, shape in asked.items()
        if not name.endswith(_SCALES) and not name.startswith(_OF_EMBEDDERS)
    }
