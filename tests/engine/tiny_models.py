"""Tiny models with random weights, as llama.cpp loads them: for what only such models can show."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "sat", "on", "mat",
         "runs", "fast", "big", "small", ".", ","]  # fmt: skip
EMBEDDING, HEADS, LAYERS, CONTEXT_TOKENS = 32, 2, 2, 64
# Words within a text begin with this in the vocabularies of WordPiece tokenisers.
WORD_START = "▁"


def write_bert(
    path: Path, pooling: gguf.PoolingType, *, rerank_template: str | None = None
) -> Path:
    """An encoder; with `PoolingType.RANK` it has a head for ranking. Equal names, equal weights."""
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(EMBEDDING)
    writer.add_feed_forward_length(2 * EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_token_type_count(2)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    words = [word if word.startswith("[") else WORD_START + word for word in WORDS]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("[") else 1 for word in words])
    writer.add_unk_token_id(WORDS.index("[UNK]"))
    writer.add_sep_token_id(WORDS.index("[SEP]"))
    writer.add_pad_token_id(WORDS.index("[PAD]"))
    writer.add_bos_token_id(WORDS.index("[CLS]"))
    writer.add_mask_token_id(WORDS.index("[MASK]"))
    if rerank_template is not None:
        writer.add_chat_template([{"name": "rerank", "template": rerank_template}])
    for name in _SHAPES:
        if pooling is gguf.PoolingType.RANK or not name.startswith("cls."):
            writer.add_tensor(name, weights(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(name: str) -> np.ndarray:
    random = np.random.default_rng(list(name.encode()))
    scale = 2.0 if name == "token_embd.weight" else 0.3  # so that words make a difference
    return random.normal(0.0, scale, _SHAPES[name]).astype(np.float32)


def _shapes() -> dict[str, tuple[int, ...]]:
    """In numpy's order of dimensions, which is the opposite of GGUF's."""
    wide = 2 * EMBEDDING
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(WORDS), EMBEDDING),
        "token_types.weight": (2, EMBEDDING),
        "position_embd.weight": (CONTEXT_TOKENS, EMBEDDING),
        "token_embd_norm.weight": (EMBEDDING,),
        "token_embd_norm.bias": (EMBEDDING,),
        "cls.weight": (EMBEDDING, EMBEDDING),
        "cls.bias": (EMBEDDING,),
        "cls.output.weight": (1, EMBEDDING),
        "cls.output.bias": (1,),
    }
    for layer in range(LAYERS):
        for part, shape in {
            "attn_q": (EMBEDDING, EMBEDDING),
            "attn_k": (EMBEDDING, EMBEDDING),
            "attn_v": (EMBEDDING, EMBEDDING),
            "attn_output": (EMBEDDING, EMBEDDING),
            "ffn_up": (wide, EMBEDDING),
            "ffn_down": (EMBEDDING, wide),
        }.items():
            shapes[f"blk.{layer}.{part}.weight"] = shape
            shapes[f"blk.{layer}.{part}.bias"] = shape[:1]
        for part in ("attn_output_norm", "layer_output_norm"):
            shapes[f"blk.{layer}.{part}.weight"] = (EMBEDDING,)
            shapes[f"blk.{layer}.{part}.bias"] = (EMBEDDING,)
    return shapes


_SHAPES = _shapes()
