"""Which architectures may be cut into stages, and what must be minded about each.

An allow-list: a tiny random model of each was cut into two and three stages, and computed
the same numbers as the whole one, bit by bit (`tests/models/test_stage_architectures.py`). A name
is llama.cpp's; `REFUSED` has those known not to work. All others were never tried.
"""

from __future__ import annotations

from meshnode.models.stages.rules import (
    CountMeans,
    DeclaresSections,
    DenseFirst,
    EveryFew,
    EveryFewBySetting,
    FromCountOn,
    NeedsNone,
    NeedsSetting,
    Recurrent,
    RecurrentWithoutHeads,
    Rule,
    ScalesAllInput,
    ScalesInputBySetting,
    ScalesResidual,
    ScalesTokens,
    Windows,
)

_EXPERTS_EVERY_FEW = EveryFewBySetting("interleave_moe_layer_step")
_NO_ROPE = "one layer in four does not rotate keys (NoPE)"

RULES: dict[str, tuple[Rule, ...]] = {
    "apertus": (),
    "arcee": (),
    "bailingmoe2": (DenseFirst(),),
    "cohere2": (Windows(4, built_in=True),),
    "command-r": (FromCountOn(64, "Command R+, which normalises queries and keys,"),),
    "dbrx": (),
    "deepseek": (DenseFirst(),),
    "deepseek2": (
        DenseFirst(),
        CountMeans((26, 27), "a lite variant, with queries of full rank,"),
        NeedsSetting("attention.q_lora_rank", "it is a lite variant, known by its 26 or 27 layers"),
    ),
    "dots1": (DenseFirst(),),
    "ernie4_5": (),
    "ernie4_5-moe": (DenseFirst(), _EXPERTS_EVERY_FEW),
    "exaone-moe": (DenseFirst(), Windows(4)),
    "exaone4": (CountMeans((64,), "the 32B variant, which has windows,"),),
    "falcon": (),
    "gemma": (ScalesAllInput(),),
    "gemma2": (
        ScalesAllInput(),
        Windows(2, built_in=True),
        CountMeans((46,), "the 27B variant, with an attention scale of its own,"),
    ),
    "gemma3": (
        ScalesTokens(),
        Windows(6),
        CountMeans((62,), "the 27B variant, with an attention scale of its own,"),
    ),
    "gemma4": (
        ScalesTokens(),
        Windows(6),
        NeedsNone("embedding_length_per_layer_input", "each layer looks tokens up for itself"),
        NeedsNone("attention.shared_kv_layers", "layers share the KV of others"),
    ),
    "glm4moe": (DenseFirst(), DeclaresSections()),
    "gpt-oss": (Windows(2, built_in=True),),
    "gpt2": (),
    "gptneox": (),
    "granite": (ScalesInputBySetting(),),
    "granitemoe": (ScalesInputBySetting(),),
    "grok": (ScalesInputBySetting(),),
    "hunyuan-dense": (),
    "hunyuan-moe": (),
    "internlm2": (),
    "lfm2": (RecurrentWithoutHeads(),),
    "llama": (),
    "llama4": (Windows(4), EveryFew(4, _NO_ROPE), _EXPERTS_EVERY_FEW),
    "minicpm": (ScalesInputBySetting(), ScalesResidual(1.4)),
    "minimax-m2": (),
    "mistral3": (),
    "nemotron": (),
    "olmo": (),
    "olmo2": (Windows(4),),
    "olmoe": (),
    "phi2": (),
    "phi3": (),
    "phimoe": (),
    "qwen2": (),
    "qwen2moe": (),
    "qwen3": (),
    "qwen35": (Recurrent(4),),
    "qwen3moe": (),
    "qwen3next": (Recurrent(4),),
    "qwen3vl": (),
    "seed_oss": (),
    "smallthinker": (
        Windows(4, full_first=True),
        EveryFew(4, _NO_ROPE, lambda model: model.whole("attention.sliding_window") > 0),
        CountMeans((4,), "a variant that rotates the keys of all layers"),
    ),
    "smollm3": (EveryFew(4, _NO_ROPE),),
    "stablelm": (),
    "starcoder": (),
    "starcoder2": (),
    "afmoe": (ScalesAllInput(), DenseFirst(), Windows(4), EveryFew(4, _NO_ROPE)),
}

_ENCODER = "it is an encoder, which has no stages to generate with"
_NORM = "it normalises what comes in"
_STREAMS = "several streams run between its layers, not one"
_RECURRENT = "its layers have state that was never tried with stages"

REFUSED: dict[str, str] = {
    "baichuan": "how it knows positions depends on how many layers it has",
    "bert": _ENCODER,
    "bloom": _NORM,
    "deepseek4": _STREAMS,
    "falcon-h1": _RECURRENT,
    "gemma3n": "its layers look tokens up for themselves, and several streams run between them",
    "glm4": "llama.cpp takes no activations for it",
    "granitehybrid": _RECURRENT,
    "jamba": _RECURRENT,
    "kimi-linear": _RECURRENT,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "minicpm3": "how much a layer adds depends on how many layers it has",
    "modern-bert": _ENCODER,
    "nomic-bert": _ENCODER,
    "qwen4exp": _STREAMS,
    "rwkv6": _NORM,
    "rwkv7": _NORM,
    "t5": "it is an encoder and a decoder",
}
