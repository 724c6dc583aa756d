"""A cut model in this process, and the whole one beside it, both called as llama.cpp has them.

Independent of the engine: what `StageModel` computes is compared with what llama.cpp alone says.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np

from meshnode.engine.native import initialise
from meshnode.engine.stages import activations
from meshnode.engine.stages.model import StageModel
from meshnode.engine.stages.steps import Codec, Keep, Share, Step, decode, encode
from meshnode.models.stages import cut, open_stage

CONTEXT_TOKENS, SLOTS = 1024, 4
PIPELINE, EPOCH = b"p" * 16, 7


@dataclass
class Batch:
    """Rows in order, each a token at a position of a slot."""

    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    changes: list[Keep | Share] = field(default_factory=list)

    def add(self, slot: int, position: int, tokens: Sequence[int]) -> Batch:
        self.tokens += tokens
        self.slots += [slot] * len(tokens)
        self.positions += range(position, position + len(tokens))
        return self

    def step(self, number: int) -> Step:
        return Step(
            PIPELINE,
            EPOCH,
            number,
            tuple(self.changes),
            np.array(self.slots, "<u2").tobytes(),
            np.array(self.positions, "<i4").tobytes(),
            np.array(self.tokens, "<i4").tobytes(),
        )


class Bare:
    """A model file as llama.cpp computes it: logits of all rows, from tokens or activations."""

    def __init__(self, path: str | Path, *, rows_max: int = 512) -> None:
        initialise()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        assert self._model
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = CONTEXT_TOKENS, SLOTS
        settings.n_batch = settings.n_ubatch = rows_max
        settings.n_threads = settings.n_threads_batch = 1
        settings.kv_unified = settings.swa_full = True
        self._context = llama.llama_init_from_model(self._model, settings)
        assert self._context
        self.memory = llama.llama_get_memory(self._context)
        self.vocabulary = llama.llama_model_get_vocab(self._model)
        self._words = llama.llama_vocab_n_tokens(self.vocabulary)
        width = llama.llama_model_n_embd(self._model)
        self._of_tokens = llama.llama_batch_init(rows_max, 0, SLOTS)
        self._of_rows = llama.llama_batch_init(rows_max, width, SLOTS)
        # Activations have four positions where there are several axes; as many as there may be.
        self._positions = np.zeros(4 * rows_max, np.int32)
        self._of_rows.pos = self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))

    def compute(self, batch: Batch, rows: np.ndarray[Any, Any] | None = None) -> np.ndarray:
        """float32[n, vocabulary]; `rows` instead of the batch's tokens."""
        self.change(batch.changes)
        given = self._of_tokens if rows is None else self._of_rows
        given.n_tokens = count = len(batch.tokens)
        if rows is not None:
            rows = np.ascontiguousarray(rows, np.float32)
            ctypes.memmove(given.embd, rows.ctypes.data, rows.nbytes)
            # Time, height and width are the same for text; the fourth is nothing.
            self._positions[: 4 * count] = batch.positions * 3 + [0] * count
        for row in range(count):
            if rows is None:
                given.token[row] = batch.tokens[row]
            given.logits[row] = 1
            if rows is None:
                given.pos[row] = batch.positions[row]
            given.n_seq_id[row], given.seq_id[row][0] = 1, batch.slots[row]
        assert llama.llama_decode(self._context, given) == 0
        logits = [llama.llama_get_logits_ith(self._context, row) for row in range(count)]
        return np.array([np.ctypeslib.as_array(row, (self._words,)) for row in logits])

    def change(self, changes: Sequence[Keep | Share]) -> None:
        for change in changes:
            if isinstance(change, Keep):
                llama.llama_memory_seq_rm(self.memory, change.slot, change.tokens, -1)
            else:
                llama.llama_memory_seq_cp(self.memory, change.source, change.slot, 0, change.tokens)

    def forget(self) -> None:
        llama.llama_memory_clear(self.memory, True)

    def save(self, slot: int) -> bytes:
        state = (ctypes.c_uint8 * llama.llama_state_seq_get_size(self._context, slot))()
        size = llama.llama_state_seq_get_data(self._context, state, len(state), slot)
        assert size == len(state)
        return bytes(state)

    def restore(self, slot: int, state: bytes) -> None:
        cells = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        size = llama.llama_state_seq_set_data(self._context, cells, len(state), slot)
        assert size == len(state)

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        cells = (ctypes.c_int32 * (len(data) + 8))()
        count = llama.llama_tokenize(
            self.vocabulary, data, len(data), cells, len(cells), False, True
        )
        return list(cells[:count])

    def close(self) -> None:
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)


def load(path: Path, first: int, end: int) -> StageModel:
    return StageModel(
        str(path),
        first,
        end,
        context_tokens=CONTEXT_TOKENS,
        slots=SLOTS,
        threads=1,
        on_progress=lambda _fraction: None,
    )


class Ring:
    """Stages that end before each of `cuts`, and the last one; as frames between them."""

    def __init__(self, path: Path, *cuts: int, layers: int, codec: Codec = "f32") -> None:
        self._stack = ExitStack()
        self.cuts = cuts
        self.stages = [
            self._stack.enter_context(load(path, first, end)) for first, end in pairwise((0, *cuts))
        ]
        last = cut(path, cuts[-1], layers)
        self._scale = np.float32(last.input_scale)
        with open_stage(last, path) as file:
            self.last = Bare(file.path)
        self._stack.callback(self.last.close)
        self.codec = codec
        self._number = 0

    def compute(self, batch: Batch) -> np.ndarray:
        """float32[n, vocabulary], as `Bare.compute`."""
        frame = encode(batch.step(self._number))
        self._number += 1
        for stage in self.stages:
            step = decode(frame, stage.shape)
            codec, packed = activations.pack(stage.compute(step), self.codec)
            frame = encode(
                Step(PIPELINE, EPOCH, step.number, step.changes, step.slots, step.positions,
                     rows=packed, codec=codec)
            )  # fmt: skip
        rows = activations.unpack(packed, codec, self.stages[-1].shape.width)
        return self.last.compute(batch, rows * self._scale)

    def forget(self) -> None:
        for stage in self.stages:
            stage.forget()
        self.last.forget()

    def close(self) -> None:
        self._stack.close()
