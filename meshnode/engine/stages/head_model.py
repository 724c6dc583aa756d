"""The last layers of a cut model: what comes in are activations, what comes out are logits.

All else is `LlamaModel`'s: the vocabulary, the chat template, the samplers and the KV cache are
those of a whole model. Decides nothing about who runs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import llama_cpp.llama_cpp as _llama
import numpy as np

from meshnode.config import KvType
from meshnode.engine.llama import DecodeError, LlamaModel
from meshnode.engine.memory import available_bytes, prefers_disk
from meshnode.engine.native import pointer, position_planes
from meshnode.engine.scheduler import Batch
from meshnode.engine.stages.activations import Rows
from meshnode.errors import StageError
from meshnode.models.stages import cut, open_stage


class HeadModel(LlamaModel):
    """Layers `first` to `end - 1`, the last ones, of the model in a file."""

    def __init__(
        self,
        path: str,
        first: int,
        end: int,
        *,
        context_tokens: int,
        slots: int,
        slots_kept: int = 0,
        kv_type: KvType = "f16",
        threads: int,
        on_progress: Callable[[float], None],
    ) -> None:
        """Load; blocks. Raises `ModelLoadError`, and `StageError` if these cannot be a head."""
        self._stage = cut(path, first, end)
        if self._stage.is_first or not self._stage.is_last:
            raise StageError(
                f"Layers {first} to {end - 1} of {path}, which has {self._stage.layers}, are not "
                "its last ones behind others: another stage is the head."
            )
        super().__init__(
            path,
            context_tokens=context_tokens,
            slots=slots,
            slots_kept=slots_kept,
            kv_type=kv_type,
            threads=threads,
            on_progress=on_progress,
        )
        if not self.can_rewind:
            self.close()
            raise StageError(
                f"{path} is recurrent: it cannot go back to a prefix, and the stages of a "
                "pipeline would not forget the same tokens."
            )
        self._planes = position_planes(self._model)

    def _load_model(self, path: str, on_progress: Callable[[float], None]) -> Any:
        on_disk = prefers_disk(self._stage, available_bytes())
        with open_stage(self._stage, path, on_disk=on_disk) as file:
            return super()._load_model(file.path, on_progress)

    @property
    def width(self) -> int:
        """How many numbers an activation has."""
        return self._stage.width

    def decode_rows(self, batch: Batch, rows: Rows) -> bool:
        """Compute the last layers of a batch; `rows`, float32[batch.tokens, width], are what the
        layers before have made of its tokens. Never aborted, so never False.

        Raises `StageError` if that leads to no numbers: some stage's file is damaged, or a peer
        sent activations that no model has.
        """
        self._fill(batch)
        if self._stage.input_scale != 1:
            rows = rows * np.float32(self._stage.input_scale)
        rows = np.ascontiguousarray(rows)
        positions = np.zeros((self._planes, batch.tokens), np.int32)
        # All but the last of the planes, where there are four, tell a text's position.
        positions[: max(1, self._planes - 1)] = self._batch_positions[: batch.tokens]
        given = _llama.llama_batch()
        given.n_tokens = batch.tokens
        given.embd = pointer(rows, ctypes.c_float)
        given.pos = pointer(positions, ctypes.c_int32)
        given.n_seq_id, given.seq_id = self._batch.n_seq_id, self._batch.seq_id
        given.logits = self._batch.logits
        if not self._compute(given):
            raise DecodeError("a batch of a pipeline was stopped by nobody")
        for chunk, row in batch.rows():
            logits = [self._logits(row + place) for place in range(chunk.outputs)]
            if not all(math.isfinite(each.max()) for each in logits):
                raise StageError("what the stages compute together are no numbers")
        return True
