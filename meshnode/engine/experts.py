"""A model that reads text in windows, and what its experts do with each.

Knows pointers. Decides nothing: it gives the logits of every position, and the router's doings as
llama.cpp computes them, to whoever looks. As in `llama.py`, a wrong call crashes the process, so
this runs in a child (`sharding_child.py`).

llama.cpp asks about every tensor that it is about to compute, by name, and shows those it is asked
for; that is its debugging interface, which no fork is needed for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp.llama_cpp as _llama
import numpy as np
from llama_cpp._ggml import libggml as _ggml

from meshnode.engine.native import pointer, tokenise
from meshnode.errors import ShardError
from meshnode.models.ranking import Seen

_DIMENSIONS = 4
# ggml_type of the tensors that are looked at.
_TYPES = {0: np.float32, 26: np.int32}
# Inputs of experts that were weighted before, not outputs: llama4 alone multiplies them first.
_WEIGHTED_BEFORE = frozenset({"llama4"})
# A token's chosen experts may all have next to nothing, as numbers go.
_SHARE_MIN = 1e-20

Array = np.ndarray[Any, Any]


class _Tensor(ctypes.Structure):
    """The beginning of a ggml_tensor."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * _DIMENSIONS),
        ("strides", ctypes.c_size_t * _DIMENSIONS),
    )


_ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
_ggml.ggml_get_name.restype = ctypes.c_char_p
_ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
_ggml.ggml_nbytes.restype = ctypes.c_size_t
_ggml.ggml_nelements.argtypes = [ctypes.c_void_p]
_ggml.ggml_nelements.restype = ctypes.c_int64
_ggml.ggml_backend_tensor_get.argtypes = [
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
]  # fmt: skip
_ggml.ggml_backend_tensor_get.restype = None


@dataclass
class Observer:
    """Adds up what the experts of each layer did; `architecture` says how to see it."""

    architecture: str
    experts: int
    _output_norm: dict[int, Array] = field(default_factory=dict)
    _weight: dict[int, Array] = field(default_factory=dict)
    _probability: dict[int, Array] = field(default_factory=dict)
    _shares: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    _chosen: Array = field(default_factory=lambda: np.zeros((0, 0), np.int32))

    def seen(self, layers: Sequence[int]) -> Seen:
        """Raises `ShardError` if one of the layers has shown nothing."""
        hidden = [layer for layer in layers if layer not in self._output_norm]
        if hidden:
            raise ShardError(f"llama.cpp does not show the experts of the layers {hidden}.")
        # A router that weighs by other than probabilities shows numbers below zero.
        is_probable = all((row >= 0.0).all() for row in self._probability.values())
        known = self._probability.keys() >= set(layers) and is_probable
        return Seen(
            self._output_norm,
            self._weight if known else {},
            self._probability if known else {},
        )

    @property
    def _output(self) -> str:
        return "ffn_moe_down" if self.architecture in _WEIGHTED_BEFORE else "ffn_moe_weighted"

    def wants(self, name: str) -> bool:
        """Whether a tensor of this name is to be shown: `ffn_moe_topk-7`, and not "(reshaped)"."""
        part, _, layer = name.rpartition("-")
        return layer.isdecimal() and part in ("ffn_moe_topk", "ffn_moe_probs", self._output)

    def take(self, name: str, values: Array) -> None:
        """Of a layer its probabilities come first, then the choice, then the outputs."""
        part, _, number = name.rpartition("-")
        layer = int(number)
        if part == "ffn_moe_probs":  # 1 × 1 × tokens × experts
            self._shares = values[0, 0]
            self._add(self._probability, layer, self._shares.sum(axis=0, dtype=np.float64))
        elif part == "ffn_moe_topk":  # 1 × 1 × tokens × chosen
            self._chosen = values[0, 0]
            shares = np.take_along_axis(self._shares, self._chosen, axis=1)
            shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), _SHARE_MIN)
            self._add(self._weight, layer, self._by_expert(shares))
        else:  # 1 × tokens × chosen × width
            self._add(self._output_norm, layer, self._by_expert(np.linalg.norm(values[0], axis=2)))

    def _by_expert(self, amounts: Array) -> Array:
        return np.bincount(self._chosen.ravel(), amounts.ravel(), minlength=self.experts)

    def _add(self, sums: dict[int, Array], layer: int, amounts: Array) -> None:
        sums[layer] = sums[layer] + amounts if layer in sums else amounts


class WindowReader:
    """A loaded model with room for one window of text at a time, each read by itself."""

    def __init__(
        self, path: Path, window_tokens: int, threads: int, observer: Observer | None = None
    ) -> None:
        """Load; blocks. Raises `ShardError` if llama.cpp refuses the file."""
        self._observer = observer
        # C keeps the pointer, so this object keeps what it points to.
        self._callback = _llama.ggml_backend_sched_eval_callback(self._on_tensor)
        _llama.llama_backend_init()
        params = _llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._context: Any = None
        self._model = _llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ShardError(f"{path}: llama.cpp cannot load the model.")
        self._vocabulary = _llama.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(_llama.llama_vocab_n_tokens(self._vocabulary))
        trained_tokens = int(_llama.llama_model_n_ctx_train(self._model))
        self.window_tokens = min(window_tokens, trained_tokens)
        settings = _llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self.window_tokens
        settings.n_seq_max = 1
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        if observer is not None:
            settings.cb_eval = self._callback
        self._context = _llama.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise ShardError(f"{path}: llama.cpp cannot make a context.")
        self._memory = _llama.llama_get_memory(self._context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._context:
            _llama.llama_free(self._context)
            self._context = None
        if self._model:
            _llama.llama_model_free(self._model)
            self._model = None

    def windows(self, text: str, tokens_max: int) -> list[list[int]]:
        """The beginning of a text, cut into windows, each begun as the model expects; the rest of
        the last one is left out. Raises `ShardError` if it does not fill one."""
        begin = []
        if _llama.llama_vocab_get_add_bos(self._vocabulary):
            begin = [int(_llama.llama_vocab_bos(self._vocabulary))]
        tokens = tokenise(self._vocabulary, text)[:tokens_max]
        step = self.window_tokens - len(begin)
        starts = range(0, len(tokens) - step + 1, step)
        if not starts:
            raise ShardError(f"The text has {len(tokens)} tokens; at least {step} are needed.")
        return [begin + tokens[start : start + step] for start in starts]

    def read(self, window: Sequence[int]) -> Array:
        """The logits after each token: float32, tokens × vocabulary, until the next call."""
        count = len(window)
        tokens = np.array(window, np.int32)
        positions = np.arange(count, dtype=np.int32)
        ones, outputs = np.ones(count, np.int32), np.ones(count, np.int8)
        lane = np.zeros(1, np.int32)
        lanes = np.full(count, lane.ctypes.data, np.uint64)
        batch = _llama.llama_batch()
        batch.n_tokens = count
        batch.token = pointer(tokens, ctypes.c_int32)
        batch.pos = pointer(positions, ctypes.c_int32)
        batch.n_seq_id = pointer(ones, ctypes.c_int32)
        batch.seq_id = pointer(lanes, ctypes.POINTER(ctypes.c_int32))
        batch.logits = pointer(outputs, ctypes.c_int8)
        _llama.llama_memory_clear(self._memory, True)
        code = _llama.llama_decode(self._context, batch)
        if code != 0:
            raise ShardError(f"The text cannot be read (llama_decode returned {code}).")
        found = _llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, shape=(count, self.vocabulary_size))

    def _on_tensor(self, address: int, asks: bool, _data: object) -> bool:
        """What ctypes catches here it only prints: `Observer.seen` notices what is missing."""
        name = _ggml.ggml_get_name(address).decode("utf-8", "replace")
        assert self._observer is not None
        if asks:
            return self._observer.wants(name)
        self._observer.take(name, _values(address))
        return True


def _values(address: int) -> Array:
    """A computed tensor, as C has it: the first dimension of ggml is the last."""
    tensor = _Tensor.from_address(address)
    shape, strides = tuple(tensor.shape), tuple(tensor.strides)
    if int(np.prod(shape)) != _ggml.ggml_nelements(address) or tensor.kind not in _TYPES:
        raise ShardError("This llama.cpp has its tensors in another form than is known here.")
    raw = np.empty(_ggml.ggml_nbytes(address), np.uint8)
    _ggml.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
    return np.ndarray(shape[::-1], _TYPES[tensor.kind], raw.data, strides=strides[::-1])
