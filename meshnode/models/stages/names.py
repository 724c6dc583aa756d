"""What tensors are called (llama.cpp's names), and which of them belong to a layer."""

from __future__ import annotations

ROWS_OF_TOKENS = "token_embd.weight"
POSITIONS = "position_embd.weight"
NORM, NORM_BIAS = "output_norm.weight", "output_norm.bias"
HEAD, HEAD_BIAS = "output.weight", "output.bias"
# How positions are rotated: of the whole model, whichever its layers.
ROTATION_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Of a layer: "blk.7.attn_norm.weight".
LAYER = "blk"

# What the norm behind the last layer is called, where it is not `NORM`.
LAST_NORMS = dict.fromkeys(("lfm2", "lfm2moe"), "token_embd_norm.weight")

_KNOWN = frozenset((ROWS_OF_TOKENS, POSITIONS, NORM_BIAS, HEAD, HEAD_BIAS, *ROTATION_FACTORS))


def last_norm(architecture: str) -> str:
    return LAST_NORMS.get(architecture, NORM)


def is_known(architecture: str, name: str) -> bool:
    """Whether a tensor's name says what to do with it."""
    return name in _KNOWN or name == last_norm(architecture) or layer_of(name) is not None


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, if its name says one."""
    kind, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    return int(number) if kind == LAYER and number.isdecimal() and part else None
