"""Which models may be cut, and where.

A model is refused unless its architecture was tried, its settings and tensors are such as were
tried, and no rule of its architecture speaks against it. Every refusal says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from meshnode.errors import StageError
from meshnode.models.gguf import read_layout
from meshnode.models.stages.architectures import REFUSED, RULES
from meshnode.models.stages.names import ROWS_OF_TOKENS, is_known
from meshnode.models.stages.rules import Model

# More makes no sense: llama.cpp takes 512 layers, and a step's rows are no wider (`steps.py`).
LAYERS_MAX = 512
WIDTH_MAX = 65_536


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a model of so many `layers` may be cut: at multiples of `every`, such that the last
    stage has at least so many.

    There may be other ways, which need not be known to place a model well. `is_exact`: the
    stages compute the whole model's numbers to the last bit; else nearly.
    """

    layers: int
    every: int
    is_exact: bool = True

    def edges(self) -> tuple[int, ...]:
        """Where a stage may begin or end, with both ends of the model."""
        return (*range(0, self.layers - self.every + 1, self.every), self.layers)


def why_not(path: str | Path) -> str | None:
    """Why the model in this file cannot be cut; None if it can. Raises `ModelLoadError`."""
    model = Model(read_layout(path))
    return _refusal(model) or (None if _cuts(model) else "no part of its layers can be a stage")


def cut_points(path: str | Path) -> Cuts:
    """Where it may be cut. Raises `StageError` if nowhere, and `ModelLoadError`."""
    cuts = _cuts(_cuttable(path))
    if cuts is None:
        raise StageError(f"{path} cannot be cut into stages: no part of it can be one.")
    return cuts


def stage_of(path: str | Path, first: int, end: int) -> Model:
    """The whole model, of which these layers may be a stage, or all of them.

    Raises `StageError` if they may not, and `ModelLoadError` if the file is bad.
    """
    model = _cuttable(path)
    if not 0 <= first < end <= model.layers:
        raise StageError(f"{path} has layers 0 to {model.layers - 1}, not {first} to {end - 1}.")
    reason = _stage_refusal(model, first, end)
    if reason is not None:
        raise StageError(f"Layers {first} to {end - 1} of {path} cannot be a stage: {reason}.")
    return model


def _cuttable(path: str | Path) -> Model:
    model = Model(read_layout(path))
    reason = _refusal(model)
    if reason is not None:
        raise StageError(f"{path} cannot be cut into stages: {reason}.")
    return model


def _refusal(model: Model) -> str | None:
    reason = next(_objections(model), None)
    return None if reason is None else f"{model.architecture}: {reason}"


def _objections(model: Model) -> Iterator[str]:
    """Later ones may rely on there being none before."""
    architecture, tensors = model.architecture, model.layout.tensors
    if architecture in REFUSED:
        yield REFUSED[architecture]
    if architecture not in RULES:
        yield "this architecture was never tried"
    if not 1 <= model.layers <= LAYERS_MAX or not 1 <= model.width <= WIDTH_MAX:
        yield f"{model.layers} layers of width {model.width} make no sense"
    if sum(tensor.size_bytes for tensor in tensors.values()) > model.layout.size_bytes:
        yield "its tensors overlap"
    for name in tensors:
        if not is_known(architecture, name):
            yield f"what to do with its tensor {name!r} is not known"
    tokens = tensors.get(ROWS_OF_TOKENS)
    if tokens is None or len(tokens.shape) != 2 or tokens.shape[0] != model.width:
        yield "it has no rows of tokens of its width"
    for rule in RULES[architecture]:
        if (reason := rule.why_not(model)) is not None:
            yield reason


def _stage_refusal(model: Model, first: int, end: int) -> str | None:
    reasons = (rule.why_not_stage(model, first, end) for rule in RULES[model.architecture])
    return next((reason for reason in reasons if reason is not None), None)


def _cuts(model: Model) -> Cuts | None:
    """With stages as short as can be, if every stage between any two edges is allowed."""
    rules = RULES[model.architecture]
    step = math.lcm(*(rule.step(model) for rule in rules))
    is_exact = all(rule.is_exact(model) for rule in rules)
    for every in range(step, model.layers // 2 + 1, step):
        cuts = Cuts(model.layers, every, is_exact)
        pairs = combinations(cuts.edges(), 2)
        whole = (0, model.layers)
        if not any(_stage_refusal(model, *pair) for pair in pairs if pair != whole):
            return cuts
    return None
