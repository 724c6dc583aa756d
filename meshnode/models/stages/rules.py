"""What keeps a part of a model from computing what the whole model computes, and what heals it.

llama.cpp loads a stage as if it were a whole, shorter model. That is right as long as a layer's
work depends only on its own weights and settings. Each kind of rule below names one way in which
it does not: a layer's place among all, or how many there are, means something. A rule either
rewrites the stage's settings so that they mean the same as before, or says why there is no cutting.

Which architecture has which rules is a table: `architectures.py`. Knows settings, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from meshnode.models.gguf import Layout, Value
from meshnode.models.stages.names import ROWS_OF_TOKENS

_NUMBER_MAX = 2**31 - 1
_SOFTMAX, _SIGMOID = 1, 2  # enum llama_expert_gating_func_type


@dataclass(frozen=True, slots=True)
class Model:
    """The whole model, as rules see it. `layers` is without those for multi-token prediction."""

    layout: Layout

    @property
    def architecture(self) -> str:
        return self.layout.architecture

    @property
    def layers(self) -> int:
        return self.whole("block_count") - self.whole("nextn_predict_layers")

    @property
    def width(self) -> int:
        return self.whole("embedding_length")

    @property
    def words(self) -> int:
        """How large its vocabulary is."""
        return self.layout.tensors[ROWS_OF_TOKENS].shape[-1]

    def get(self, key: str) -> Value:
        """A setting of this architecture."""
        return self.layout.metadata.get(f"{self.architecture}.{key}")

    def whole(self, key: str, default: int = 0) -> int:
        """A setting that is a number, unsigned; none that is larger makes sense."""
        value = self.get(key)
        return min(value, _NUMBER_MAX) if type(value) is int and value >= 0 else default


@dataclass(slots=True)
class Changes:
    """What is different in a stage: settings, by name, and factors for what comes in.

    `lookup_scale` is for the rows that are looked up for tokens, `input_scale` for activations of
    the stage before. `rotation_factors`: whether the stage needs those of the whole.
    """

    settings: dict[str, bool | int | float | list[bool] | list[int]] = field(default_factory=dict)
    lookup_scale: float = 1.0
    input_scale: float = 1.0
    rotation_factors: bool = True


class Rule:
    """One peculiarity of an architecture. Layers count from 0; `end` is not in the stage."""

    def why_not(self, model: Model) -> str | None:
        """Why such a model cannot be cut at all."""
        return None

    def why_not_stage(self, model: Model, first: int, end: int) -> str | None:
        """Why these layers cannot be a stage; None for the whole model."""
        return None

    def step(self, model: Model) -> int:
        """Stages begin at multiples of this."""
        return 1

    def is_exact(self, model: Model) -> bool:
        """Whether stages compute the same to the last bit."""
        return True

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        """Add what makes these layers compute as they do in the whole."""


# -- what comes in is scaled -------------------------------------------------------------------


@dataclass(frozen=True)
class ScalesAllInput(Rule):
    """Whatever comes in is multiplied by √width, activations too, so those are divided before.

    Both are exact if √width is a power of two; else the last bit of a number may differ.
    """

    def is_exact(self, model: Model) -> bool:
        return math.frexp(math.sqrt(model.width))[0] == 0.5

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        if first > 0:
            changes.input_scale = 1.0 / math.sqrt(model.width)


@dataclass(frozen=True)
class ScalesTokens(Rule):
    """Rows of tokens are multiplied by √width, vectors that come in are not: we do it."""

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        if first == 0:
            changes.lookup_scale = math.sqrt(model.width)


@dataclass(frozen=True)
class ScalesInputBySetting(Rule):
    """As `ScalesAllInput`, but by a setting, which is 1 in later stages."""

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        if first > 0:
            changes.settings["embedding_scale"] = 1.0


@dataclass(frozen=True)
class ScalesResidual(Rule):
    """What a layer adds is scaled by `factor` / √layers, unless a setting says by what."""

    factor: float

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        if model.get("residual_scale") is None:
            changes.settings["residual_scale"] = self.factor / math.sqrt(model.layers)


# -- a layer's kind depends on its place -------------------------------------------------------


@dataclass(frozen=True)
class Windows(Rule):
    """Most layers see only a window of the last tokens; every `every`th sees all.

    By place: so each stage gets a list that says it for each of its layers. llama.cpp aborts if
    a model with windows has no layer that uses them. `full_first`: the first of each group is the
    one that sees all, else it is the last. `built_in`: there are windows even if no setting says
    so. `full_factors`: only layers that see all rotate by the factors in the file.
    """

    every: int
    full_first: bool = False
    built_in: bool = False
    full_factors: bool = False

    def _pattern(self, model: Model) -> list[bool]:
        """For each layer of the whole, whether it has a window."""
        said = model.get("attention.sliding_window_pattern")
        if isinstance(said, list):
            return [bool(item) for item in said]
        every = model.whole("attention.sliding_window_pattern", self.every)
        if every == 0:
            return [True] * model.layers
        full = 0 if self.full_first else every - 1
        return [layer % every != full for layer in range(model.layers)]

    def why_not(self, model: Model) -> str | None:
        if len(self._pattern(model)) < model.layers:
            return "its list of windows is shorter than it has layers"
        return None

    def why_not_stage(self, model: Model, first: int, end: int) -> str | None:
        has_windows = self.built_in or model.whole("attention.sliding_window") > 0
        if has_windows and not any(self._pattern(model)[first:end]):
            return "none of these layers has an attention window, which llama.cpp demands"
        return None

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        pattern = self._pattern(model)[first:end]
        changes.settings["attention.sliding_window_pattern"] = pattern
        changes.rotation_factors = not self.full_factors or not all(pattern)


@dataclass(frozen=True)
class EveryFew(Rule):
    """Every few layers are alike in a way that only their place tells: stages begin where a group
    does. `when` says of which models that is true."""

    layers: int
    what: str
    when: Callable[[Model], bool] = lambda model: True

    def step(self, model: Model) -> int:
        return self.layers if self.when(model) else 1

    def why_not_stage(self, model: Model, first: int, end: int) -> str | None:
        return _why_not_there(self.step(model), self.what, model, first, end)


@dataclass(frozen=True)
class EveryFewBySetting(Rule):
    """As `EveryFew`; how many is a setting."""

    key: str
    what: str

    def step(self, model: Model) -> int:
        return max(1, model.whole(self.key, 1))

    def why_not_stage(self, model: Model, first: int, end: int) -> str | None:
        return _why_not_there(self.step(model), self.what, model, first, end)


def _why_not_there(step: int, what: str, model: Model, first: int, end: int) -> str | None:
    if first % step or (end % step and end != model.layers):
        return f"{what}, so stages begin at multiples of {step}"
    return None


@dataclass(frozen=True)
class DenseFirst(Rule):
    """The first layers have no experts; a setting says how many."""

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        dense = model.whole("leading_dense_block_count")
        changes.settings["leading_dense_block_count"] = max(0, min(end, dense) - first)


@dataclass(frozen=True)
class Recurrent(Rule):
    """All layers but every `full_attention_interval`th are recurrent: a list says so for each.

    llama.cpp keeps one memory for either kind, and aborts if a model lacks one kind.
    """

    interval: int

    def _pattern(self, model: Model) -> list[bool]:
        said = model.get("attention.recurrent_layers")
        if isinstance(said, list):
            return [bool(item) for item in said]
        interval = max(1, model.whole("full_attention_interval", self.interval))
        return [(layer + 1) % interval != 0 for layer in range(model.layers)]

    def why_not(self, model: Model) -> str | None:
        if len(self._pattern(model)) < model.layers:
            return "its list of recurrent layers is shorter than it has layers"
        return None

    def why_not_stage(self, model: Model, first: int, end: int) -> str | None:
        return _both_kinds(self._pattern(model)[first:end])

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        changes.settings["attention.recurrent_layers"] = self._pattern(model)[first:end]


@dataclass(frozen=True)
class RecurrentWithoutHeads(Rule):
    """As `Recurrent`; layers without KV heads are the recurrent ones."""

    def why_not(self, model: Model) -> str | None:
        heads = model.get("attention.head_count_kv")
        if not isinstance(heads, list) or len(heads) < model.layers:
            return "it does not say which of its layers are recurrent"
        return None

    def why_not_stage(self, model: Model, first: int, end: int) -> str | None:
        heads = model.get("attention.head_count_kv")
        assert isinstance(heads, list)
        return _both_kinds([count == 0 for count in heads[first:end]])


def _both_kinds(recurrent: list[bool]) -> str | None:
    if any(recurrent) and not all(recurrent):
        return None
    return "a stage needs a layer with attention and a recurrent one"


# -- the number of layers means something ------------------------------------------------------


@dataclass(frozen=True)
class CountMeans(Rule):
    """llama.cpp knows a variant by how many layers it has: a stage of it would be taken for
    another, and a stage of another with so many layers for it."""

    counts: tuple[int, ...]
    what: str

    def why_not(self, model: Model) -> str | None:
        if model.layers in self.counts:
            return f"llama.cpp knows {self.what} by its {model.layers} layers"
        return None

    def why_not_stage(self, model: Model, first: int, end: int) -> str | None:
        if end - first in self.counts:
            return f"llama.cpp would take {end - first} layers for {self.what}"
        return None


@dataclass(frozen=True)
class QueryRank(Rule):
    """Lite variants, which llama.cpp knows by how many layers they have, say no rank of their
    queries; to others, a rank of 0 says the same. A stage with a rank must not look lite."""

    lite: tuple[int, ...] = (26, 27)

    def why_not_stage(self, model: Model, first: int, end: int) -> str | None:
        if model.get("attention.q_lora_rank") is not None and end - first in self.lite:
            return f"llama.cpp would take {end - first} layers for a lite variant"
        return None

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        changes.settings["attention.q_lora_rank"] = model.whole("attention.q_lora_rank")


@dataclass(frozen=True)
class Gating(Rule):
    """How experts are chosen, where the file does not say: a variant with so many layers and
    words (GLM 4.7 Lite) by sigmoid, all others by softmax."""

    layers: tuple[int, ...] = (47, 48)
    words: int = 154880

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        if not model.whole("expert_gating_func"):
            by_sigmoid = model.layers in self.layers and model.words == self.words
            changes.settings["expert_gating_func"] = _SIGMOID if by_sigmoid else _SOFTMAX


@dataclass(frozen=True)
class FromCountOn(Rule):
    """As `CountMeans`, for all models with at least so many layers. Smaller ones stay smaller."""

    count: int
    what: str

    def why_not(self, model: Model) -> str | None:
        if model.layers >= self.count:
            return f"llama.cpp knows {self.what} by having {self.count} layers or more"
        return None


# -- others ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refuses(Rule):
    """Models of which `when` is true are a variant that cannot be cut."""

    why: str
    when: Callable[[Model], bool]

    def why_not(self, model: Model) -> str | None:
        return self.why if self.when(model) else None


@dataclass(frozen=True)
class AtLeast(Rule):
    """llama.cpp aborts if there are fewer layers."""

    layers: int

    def why_not_stage(self, model: Model, first: int, end: int) -> str | None:
        if end - first < self.layers:
            return f"llama.cpp demands {self.layers} layers of such a model"
        return None


@dataclass(frozen=True)
class NoPictures(Rule):
    """Pictures come in as several vectors for each place (deepstack), so llama.cpp would take
    activations that are wider than the model. A stage's are those of text."""

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        changes.settings["n_deepstack_layers"] = 0


@dataclass(frozen=True)
class DeclaresSections(Rule):
    """llama.cpp aborts on activations unless positions have several axes (M-RoPE). All axes equal,
    that is the same as the one axis the file has."""

    def change(self, model: Model, first: int, end: int, changes: Changes) -> None:
        if model.get("rope.dimension_sections") is None:
            rotated = model.whole("rope.dimension_count", model.whole("attention.key_length"))
            changes.settings["rope.dimension_sections"] = [rotated // 4, rotated // 4, 0, 0]
