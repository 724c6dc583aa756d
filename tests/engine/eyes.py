"""Projectors (mmproj files) of random weights: what they see is nonsense, but how it gets into a
language model is as with any other."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from tests.models.gguf_writer import ALIGNMENT, string, value_of

SMOLLM2_WIDTH = 576
PATCH = 14
EMBEDDING, FEED_FORWARD = 32, 64


def write_projector(
    path: Path, kind: str = "gemma3", *, width: int = SMOLLM2_WIDTH, side: int = 8 * PATCH
) -> Path:
    """A vision tower of one layer. For the default `side` in pixels, gemma3 has 16 cells that all
    see each other; mlp (LLaVA) 64, of which each sees those before it; qwen2vl_merger as many as a
    picture's size asks for, with places in two dimensions."""
    patches = (side // PATCH) ** 2
    metadata: dict[str, Any] = {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.projector_type": kind,
        "clip.use_gelu": True,
        "clip.vision.image_size": side,
        "clip.vision.patch_size": PATCH,
        "clip.vision.embedding_length": EMBEDDING,
        "clip.vision.feed_forward_length": FEED_FORWARD,
        "clip.vision.block_count": 1,
        "clip.vision.projection_dim": width,
        "clip.vision.attention.head_count": 2,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }
    # numpy's order of dimensions; a GGUF file has them the other way round.
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (EMBEDDING, 3, PATCH, PATCH),
        "v.position_embd.weight": (patches, EMBEDDING),
        "v.blk.0.ffn_up.weight": (FEED_FORWARD, EMBEDDING),
        "v.blk.0.ffn_down.weight": (EMBEDDING, FEED_FORWARD),
        "v.post_ln.weight": (EMBEDDING,),
        "v.post_ln.bias": (EMBEDDING,),
    }
    for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
        shapes[f"v.blk.0.{part}.weight"] = (EMBEDDING, EMBEDDING)
    for part in ("ln1", "ln2"):
        shapes |= {f"v.blk.0.{part}.weight": (EMBEDDING,), f"v.blk.0.{part}.bias": (EMBEDDING,)}
    if kind == "qwen2vl_merger":
        del shapes["v.position_embd.weight"]
        shapes["v.patch_embd.weight.1"] = shapes["v.patch_embd.weight"]
        for part in ("attn_q", "attn_k", "attn_v"):
            shapes[f"v.blk.0.{part}.bias"] = (EMBEDDING,)
        merged = 4 * EMBEDDING
        shapes |= {"mm.0.weight": (merged, merged), "mm.0.bias": (merged,),
                   "mm.2.weight": (width, merged), "mm.2.bias": (width,)}  # fmt: skip
    elif kind == "gemma3":
        metadata["clip.vision.projector.scale_factor"] = 2
        shapes |= {"mm.input_projection.weight": (EMBEDDING, width),
                   "mm.soft_emb_norm.weight": (EMBEDDING,)}  # fmt: skip
    else:
        shapes |= {"mm.0.weight": (width, EMBEDDING), "mm.0.bias": (width,),
                   "mm.2.weight": (width, width), "mm.2.bias": (width,)}  # fmt: skip
    return _write(path, metadata, shapes)


def write_language_model(path: Path, width: int = 64) -> Path:
    """A Qwen2-VL of one layer, whose tokens are bytes: its positions have dimensions."""
    # As GPT-2 writes bytes: those that cannot be seen are moved to where they can.
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    tokens = [chr(byte) for byte in seen] + [chr(256 + place) for place in range(len(hidden))]
    tokens += ["<|vision_start|>", "<|vision_end|>", "<|im_end|>"]
    metadata: dict[str, Any] = {
        "general.architecture": "qwen2vl",
        "qwen2vl.context_length": 1024,
        "qwen2vl.embedding_length": width,
        "qwen2vl.block_count": 1,
        "qwen2vl.feed_forward_length": 2 * width,
        "qwen2vl.attention.head_count": 2,
        "qwen2vl.attention.head_count_kv": 2,
        "qwen2vl.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen2vl.rope.freq_base": 10000.0,
        "qwen2vl.rope.dimension_sections": [4, 6, 6, 0],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 3,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.attn_output.weight": (width, width),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.ffn_gate.weight": (2 * width, width),
        "blk.0.ffn_up.weight": (2 * width, width),
        "blk.0.ffn_down.weight": (width, 2 * width),
    }
    for part in ("attn_q", "attn_k", "attn_v"):
        shapes |= {f"blk.0.{part}.weight": (width, width), f"blk.0.{part}.bias": (width,)}
    return _write(path, metadata, shapes)


def picture(colour: str = "red", size: tuple[int, int] = (64, 48), form: str = "PNG") -> bytes:
    """A file with one colour in it, and a line to tell up from down."""
    image = Pillow.new("RGB", size, colour)
    image.paste((0, 0, 0), (0, 0, size[0], max(1, size[1] // 8)))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def _write(path: Path, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    dice = np.random.default_rng(7)
    tensors = {name: dice.normal(0, 0.2, shape).astype(np.float32)
               for name, shape in shapes.items()}  # fmt: skip
    path.write_bytes(_gguf(metadata, tensors))
    return path


def _gguf(metadata: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += string(key) + _value(value)
    data = b""
    for name, array in tensors.items():
        out += string(name) + struct.pack("<I", array.ndim)
        out += struct.pack(f"<{array.ndim}Q", *reversed(array.shape))
        out += struct.pack("<IQ", 0, len(data))
        data += array.tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    return out + bytes(-len(out) % ALIGNMENT) + data


def _value(value: Any) -> bytes:
    """Lists of numbers as llama.cpp wants them of projectors: 32-bit floats, or signed."""
    match value:
        case [float(), *_]:
            return struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
        case [int(), *_]:
            return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return value_of(value)
