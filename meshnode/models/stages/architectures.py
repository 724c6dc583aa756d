"""Which architectures may be cut into stages, and what must be minded about each.

An allow-list: a tiny random model of each was cut into two and three stages, and computed
the same numbers as the whole one, bit by bit (`tests/engine/test_stage_architectures.py`). A name
is llama.cpp's; `REFUSED` has those known not to work. All others were never tried.
"""

from __future__ import annotations

from meshnode.models.stages.rules import (
    AtLeast,
    CountMeans,
    DeclaresSections,
    DenseFirst,
    EveryFew,
    EveryFewBySetting,
    FromCountOn,
    Gating,
    NoPictures,
    QueryRank,
    Recurrent,
    RecurrentWithoutHeads,
    Refuses,
    Rule,
    ScalesAllInput,
    ScalesInputBySetting,
    ScalesResidual,
    ScalesTokens,
    Windows,
)

_EXPERTS_EVERY_FEW = EveryFewBySetting(
    "interleave_moe_layer_step", "one layer of each group has experts"
)
_NO_ROPE = "one layer in four does not rotate keys (NoPE)"

RULES: dict[str, tuple[Rule, ...]] = {
    "afmoe": (ScalesAllInput(), DenseFirst(), Windows(4), EveryFew(4, _NO_ROPE)),
    "apertus": (),
    "arcee": (),
    "arctic": (),
    "bailingmoe": (DenseFirst(),),
    "bailingmoe2": (DenseFirst(),),
    "bitnet": (),
    "chatglm": (),
    "codeshell": (),
    "cohere2": (Windows(4, built_in=True),),
    "cohere2moe": (DenseFirst(), Windows(4, full_first=True, built_in=True)),
    "command-r": (FromCountOn(64, "Command R+, which normalises queries and keys,"),),
    "dbrx": (),
    "deci": (),
    "deepseek": (DenseFirst(),),
    "deepseek2": (DenseFirst(), QueryRank(), Gating()),
    "dots1": (DenseFirst(),),
    "ernie4_5": (),
    "ernie4_5-moe": (DenseFirst(), _EXPERTS_EVERY_FEW),
    "exaone": (),
    "exaone-moe": (DenseFirst(), Windows(4, built_in=True)),
    "exaone4": (CountMeans((64,), "the 32B variant, which has windows,"),),
    "falcon": (),
    "falcon-h1": (),
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
        Windows(6, built_in=True, full_factors=True),
        AtLeast(2),
        Refuses(
            "its layers look tokens up for themselves",
            lambda model: model.whole("embedding_length_per_layer_input") > 0,
        ),
        Refuses(
            "its last layers use the KV of earlier ones",
            lambda model: model.whole("attention.shared_kv_layers") > 0,
        ),
    ),
    "glm4moe": (DenseFirst(), DeclaresSections()),
    "gpt-oss": (Windows(2, built_in=True),),
    "gpt2": (),
    "gptneox": (),
    "granite": (
        ScalesInputBySetting(),
        Refuses(
            "pictures go into several of its layers",
            lambda model: model.get("deepstack_mapping") is not None,
        ),
    ),
    "granitehybrid": (ScalesInputBySetting(), RecurrentWithoutHeads()),
    "granitemoe": (ScalesInputBySetting(),),
    "grok": (ScalesInputBySetting(),),
    "grovemoe": (),
    "hunyuan-dense": (),
    "hunyuan-moe": (),
    "hunyuan_vl": (),
    "internlm2": (),
    "jais": (),
    "jais2": (),
    "lfm2": (RecurrentWithoutHeads(),),
    "lfm2moe": (DenseFirst(), RecurrentWithoutHeads()),
    "llama": (),
    "llama4": (
        Windows(4, built_in=True),
        EveryFew(4, _NO_ROPE),
        _EXPERTS_EVERY_FEW,
        Refuses(
            "which layer does not rotate keys depends on how many layers there are",
            lambda model: model.get("attention.sliding_window") == 0,
        ),
    ),
    "maincoder": (),
    "mellum": (Windows(4),),
    "minicpm": (ScalesInputBySetting(), ScalesResidual(1.4)),
    "minimax-m2": (),
    "mistral3": (),
    "mistral4": (DenseFirst(), QueryRank(), Gating()),
    "mpt": (),
    "nemotron": (),
    "olmo": (),
    "olmo2": (Windows(4),),
    "olmoe": (),
    "openelm": (),
    "orion": (),
    "pangu-embedded": (),
    "phi2": (),
    "phi3": (),
    "phimoe": (),
    "qwen": (),
    "qwen2": (),
    "qwen2moe": (),
    "qwen2vl": (),
    "qwen3": (),
    "qwen35": (Recurrent(4),),
    "qwen35moe": (Recurrent(4),),
    "qwen3moe": (),
    "qwen3next": (Recurrent(4),),
    "qwen3vl": (NoPictures(),),
    "qwen3vlmoe": (NoPictures(),),
    "refact": (),
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
    "xverse": (),
}

_ENCODER = "it is an encoder, which has no stages to generate with"
_NORM = "it normalises what comes in"
_STREAMS = "several streams run between its layers, not one"
_UNNAMED = "llama.cpp has no name for what its last layer gives"
_RECURRENT = "its layers have state that was never tried with stages"

REFUSED: dict[str, str] = {
    "baichuan": "how it knows positions depends on how many layers it has",
    "bert": _ENCODER,
    "bloom": _NORM,
    "deepseek4": _STREAMS,
    "gemma3n": "its layers look tokens up for themselves, and several streams run between them",
    "glm4": "llama.cpp takes no activations for it",
    "jamba": _RECURRENT,
    "kimi-linear": _RECURRENT,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "minicpm3": "how much a layer adds depends on how many layers it has",
    "modern-bert": _ENCODER,
    "nemotron_h": _UNNAMED,
    "nemotron_h_moe": _UNNAMED,
    "nomic-bert": _ENCODER,
    "qwen4exp": _STREAMS,
    "rwkv6": _NORM,
    "rwkv7": _NORM,
    "t5": "it is an encoder and a decoder",
}
