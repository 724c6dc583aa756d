"""Whole models and stages of them, computed as simply as can be: what stages are tested with."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np

from meshnode.models.stages import Stage, open_stage
from meshnode.models.stages.lookup import Lookup

CONTEXT_TOKENS, BATCH_TOKENS, SEQUENCES = 256, 64, 2
Rows = np.ndarray[Any, np.dtype[np.float32]]

_GGML = ctypes.CDLL(str(Path(llama.__file__).parent / "lib" / "libggml-base.so"))
_GGML.ggml_get_name.restype = ctypes.c_char_p
_GGML.ggml_get_name.argtypes = [ctypes.c_void_p]
_GGML.ggml_nbytes.restype = ctypes.c_size_t
_GGML.ggml_nbytes.argtypes = [ctypes.c_void_p]
_GGML.ggml_backend_tensor_get.restype = None
_GGML.ggml_backend_tensor_get.argtypes = [
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
]  # fmt: skip


class Computer:
    """A model in llama.cpp, on one thread: from tokens or activations to logits, or activations
    if it `stops_early`, behind its last layer."""

    def __init__(self, path: str, *, stops_early: bool = False) -> None:
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(path.encode(), parameters)
        assert self._model, f"llama.cpp does not load {path}"
        self._layers = llama.llama_model_n_layer(self._model)
        self._width = llama.llama_model_n_embd(self._model)
        self._words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._stops_early = stops_early
        self._seen: list[Rows] = []
        self._callback = llama.ggml_backend_sched_eval_callback(self._see)
        wanted = llama.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = CONTEXT_TOKENS, BATCH_TOKENS, BATCH_TOKENS
        wanted.n_seq_max, wanted.kv_unified = SEQUENCES, True
        wanted.n_threads = wanted.n_threads_batch = 1
        if stops_early:
            wanted.cb_eval = self._callback
        self._context = llama.llama_init_from_model(self._model, wanted)
        assert self._context, f"llama.cpp has no context for {path}"

    def close(self) -> None:
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)

    def compute(self, what: list[int] | Rows, positions: list[int], sequences: list[int]) -> Rows:
        """A row for each token or activation."""
        count = len(positions)
        batch = llama.llama_batch(n_tokens=count)
        # All arrays must live until the batch is computed.
        if isinstance(what, np.ndarray):
            rows = np.ascontiguousarray(what, np.float32)
            batch.embd = _pointer(rows, ctypes.c_float)
        else:
            tokens = np.array(what, np.int32)
            batch.token = _pointer(tokens, ctypes.c_int32)
        places = np.zeros((4, count), np.int32)
        places[:3] = positions  # time, height and width, if there are several axes: alike for text
        batch.pos = _pointer(places, ctypes.c_int32)
        counts, wanted = np.ones(count, np.int32), np.ones(count, np.int8)
        batch.n_seq_id = _pointer(counts, ctypes.c_int32)
        batch.logits = _pointer(wanted, ctypes.c_int8)
        own = [(ctypes.c_int32 * 1)(sequence) for sequence in sequences]
        casts = [ctypes.cast(one, ctypes.POINTER(ctypes.c_int32)) for one in own]
        batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * count)(*casts)
        self._seen.clear()
        result = llama.llama_decode(self._context, batch)
        assert result == 0
        if self._stops_early:
            return np.concatenate(self._seen)
        logits = [llama.llama_get_logits_ith(self._context, index) for index in range(count)]
        return np.stack([np.ctypeslib.as_array(row, (self._words,)) for row in logits]).copy()

    def _see(self, tensor: int, is_question: bool, _data: object) -> bool:
        """Take what comes out of the last layer, and stop there."""
        if is_question:
            name: bytes = _GGML.ggml_get_name(tensor)
            return name == b"l_out-%d" % (self._layers - 1)
        size_bytes = _GGML.ggml_nbytes(tensor)
        rows = np.empty((size_bytes // 4 // self._width, self._width), np.float32)
        _GGML.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, size_bytes)
        self._seen.append(rows)
        return False


def _pointer(array: np.ndarray[Any, Any], cell: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(cell))


class Ring:
    """The stages of a model, one after the other."""

    def __init__(self, stages: list[Stage], source: Path) -> None:
        self._stages = stages
        self._lookup = Lookup(stages[0], source)
        self._computers = []
        for stage in stages:
            with open_stage(stage, source) as file:
                self._computers.append(Computer(file.path, stops_early=not stage.is_last))

    def compute(self, tokens: list[int], positions: list[int], sequences: list[int]) -> Rows:
        rows = self._lookup.rows(np.array(tokens, np.int32))
        for stage, computer in zip(self._stages, self._computers, strict=True):
            rows = computer.compute(rows * np.float32(stage.input_scale), positions, sequences)
        return rows

    def close(self) -> None:
        for computer in self._computers:
            computer.close()
