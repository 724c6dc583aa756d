"""The first or a middle stage of a cut model in memory, and one step at a time.

Computes what a step says, as the whole model would between its first and its last layer, to the
bit: activations in, or tokens to look up, activations out. Decides nothing about who runs; the
last stage, which has the vocabulary and the samplers, is `llama.LlamaModel`.

A wrong batch may be an abort in C, so what a step says is checked against what the slots hold
before llama.cpp sees it; and this runs in a child (`child.py`). Import this module only in
a process whose environment is that of `child_process.CHILD_ENVIRONMENT`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp.llama_cpp as _llama
import numpy as np

from meshnode.config import KvType
from meshnode.engine.memory import available_bytes, prefers_disk
from meshnode.engine.native import (
    GGML_TYPES,
    AbortFlag,
    checked,
    initialise,
    pointer,
    position_planes,
)
from meshnode.engine.stages.activations import Rows, unpack
from meshnode.engine.stages.steps import (
    STATE_BYTES_MAX,
    STEP_ROWS_MAX,
    WIDTH_MAX,
    Keep,
    Shape,
    Share,
    Step,
)
from meshnode.errors import EngineError, ModelLoadError, RemoteProtocolError, StageError
from meshnode.models.stages import Stage, cut, open_stage
from meshnode.models.stages.lookup import Lookup

# What llama_decode returns.
_DECODED = 0
_KV_FULL = 1
_ABORTED = 2
# What llama.cpp calls the position of nothing.
_NO_POSITION = -1


def _ggml() -> Any:
    """libggml-base, by the name under which libllama has loaded it: any other is a second copy."""
    assert _llama.__file__ is not None
    library = ctypes.CDLL(str(Path(_llama.__file__).parent / "lib" / "libggml-base.so.0"))
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_nbytes.argtypes = [ctypes.c_void_p]
    library.ggml_backend_tensor_get.restype = None
    library.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    return library


class _Capture:
    """Takes what the last layer computes, and ends the computation there.

    llama.cpp asks for each node of the graph whether it is wanted, and shows it when it is
    computed. What would follow, the norm and the head, belongs to another stage.
    """

    def __init__(self, layers: int, width: int) -> None:
        self._ggml = _ggml()
        self._wanted = b"l_out-%d" % (layers - 1)
        self._rows = np.empty((STEP_ROWS_MAX, width), np.float32)
        self._bytes_taken = 0
        # C keeps the pointer: this object must outlive the context.
        self.callback = _llama.ggml_backend_sched_eval_callback(self._visit)

    def _visit(self, tensor: int, asks: bool, _data: object) -> bool:
        if asks:
            return bool(self._ggml.ggml_get_name(tensor) == self._wanted)
        # Raising here would be taken for False, so what is wrong is seen in `take`.
        size = self._ggml.ggml_nbytes(tensor)
        if size <= self._rows.nbytes:
            self._ggml.ggml_backend_tensor_get(tensor, self._rows.ctypes.data, 0, size)
        self._bytes_taken += size
        return False

    def take(self, count: int) -> Rows:
        """Of so many rows just computed. Raises `EngineError` if they did not come."""
        taken, self._bytes_taken = self._bytes_taken, 0
        rows = self._rows[:count]
        if taken != rows.nbytes:
            raise EngineError(f"llama.cpp showed {taken} bytes for {count} rows of this stage.")
        return rows.copy()


class StageModel:
    """Layers `first` to `end - 1` of the model in a file, but never the last ones.

    Its KV cache has `slots` lanes that share `context_tokens` cells. All methods but `abort` belong
    to one thread. After an error of `compute`, only `forget` brings it back to a known state.
    """

    def __init__(
        self,
        path: str,
        first: int,
        end: int,
        *,
        context_tokens: int,
        slots: int,
        kv_type: KvType = "f16",
        threads: int,
        on_progress: Callable[[float], None],
    ) -> None:
        """Load; blocks. Raises `ModelLoadError`, and `StageError` for impossible layers."""
        initialise()
        stage = cut(path, first, end)
        if stage.is_last:
            raise StageError(f"Layers {first} to {end - 1} of {path} are the last: that stage is "
                             "the head, which is another engine.")  # fmt: skip
        if stage.width > WIDTH_MAX:
            raise StageError(f"{path} has activations of {stage.width} numbers, over {WIDTH_MAX}.")
        self._context: Any = None
        self._model: Any = None
        self._held = [0] * slots
        self.shape = Shape(
            width=stage.width,
            slots=slots,
            context_tokens=context_tokens,
            vocabulary=stage.lookup.count if stage.is_first else 0,
        )
        self._lookup = Lookup(stage, path) if stage.is_first else None
        self._input_scale = np.float32(stage.input_scale)
        self._capture = _Capture(end - first, stage.width)
        try:
            self._model = self._load(path, stage, on_progress)
            self._context = self._make_context(path, threads, kv_type)
            self._memory = checked(_llama.llama_get_memory(self._context), path, "KV cache")
            self._abort_flag = AbortFlag(self._context)
            self._make_batch()
            self._try(path)
        except BaseException:
            self.close()
            raise
        on_progress(1.0)

    # -- loading -------------------------------------------------------------------------------

    def _load(self, path: str, stage: Stage, on_progress: Callable[[float], None]) -> Any:
        @_llama.llama_progress_callback  # type: ignore[untyped-decorator]
        def progress(fraction: float, _data: object) -> bool:
            on_progress(fraction)
            return True

        params = _llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.progress_callback = progress
        on_disk = prefers_disk(stage, available_bytes())
        with open_stage(stage, path, on_disk=on_disk) as file:
            loaded = _llama.llama_model_load_from_file(os.fsencode(file.path), params)
        model = checked(loaded, path, "stage")
        # llama.cpp copies as many numbers of each row as this says, whatever we have.
        if _llama.llama_model_n_embd_inp(model) != stage.width:
            _llama.llama_model_free(model)
            raise ModelLoadError(f"{path}: llama.cpp expects rows of another width.")
        # A recurrent model's state is that of its last token: it cannot go back to a prefix, nor
        # copy one.
        self._can_rewind = not (
            _llama.llama_model_is_recurrent(model) or _llama.llama_model_is_hybrid(model)
        )
        return model

    def _make_context(self, path: str, threads: int, kv_type: KvType) -> Any:
        """As that of `LlamaModel`: other settings would compute other numbers."""
        params = _llama.llama_context_default_params()
        params.n_ctx = self.shape.context_tokens
        # One step is one compute pass, so `_Capture` sees all its rows at once.
        params.n_batch = params.n_ubatch = STEP_ROWS_MAX
        params.n_seq_max = self.shape.slots
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True  # else rows of several slots would be reordered
        params.swa_full = True
        params.no_perf = True
        params.cb_eval = self._capture.callback
        if kv_type != "f16":
            params.type_k = params.type_v = GGML_TYPES[kv_type]
            params.flash_attn_type = _llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return checked(_llama.llama_init_from_model(self._model, params), path, "context")

    def _make_batch(self) -> None:
        """A llama_batch whose arrays are numpy's. All its rows are wanted."""
        size = STEP_ROWS_MAX
        self._planes = position_planes(self._model)
        self._positions = np.zeros(self._planes * size, np.int32)
        self._slots = np.zeros(size, np.int32)
        self._slot_counts = np.ones(size, np.int32)
        self._wanted = np.ones(size, np.int8)
        # seq_id is an array of pointers, one per row, each to that row's cell in _slots.
        self._slot_pointers = (
            np.uint64(self._slots.ctypes.data)
            + np.arange(size, dtype=np.uint64) * self._slots.itemsize
        ).astype(np.uint64)
        batch = _llama.llama_batch()
        batch.pos = pointer(self._positions, ctypes.c_int32)
        batch.n_seq_id = pointer(self._slot_counts, ctypes.c_int32)
        batch.seq_id = pointer(self._slot_pointers, ctypes.POINTER(ctypes.c_int32))
        batch.logits = pointer(self._wanted, ctypes.c_int8)
        self._batch = batch

    def _try(self, path: str) -> None:
        """Compute one row, so that a model whose layers cannot be seen fails here."""
        row = np.ones((1, self.shape.width), np.float32)
        first = np.zeros(1, np.int32)
        try:
            self._compute(row, first, first)
        except EngineError as error:
            raise ModelLoadError(f"{path} cannot be a stage: {error}") from error
        self.forget()

    def close(self) -> None:
        if self._context:
            _llama.llama_free(self._context)
            self._context = None
        if self._model:
            _llama.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- computing -----------------------------------------------------------------------------

    def compute(self, step: Step) -> Rows:
        """Make a step's changes, then compute its rows; float32[n, width] in the step's order.

        `step` comes from `steps.decode` with this stage's `shape`. Raises `RemoteProtocolError`
        if it does not go on where its slots are, or its rows are no numbers; `EngineError` if
        llama.cpp cannot compute it.
        """
        rows = self._rows_of(step)
        for change in step.changes:
            if isinstance(change, Keep):
                self._keep(change)
            else:
                self._share(change)
        if not step.count:
            return rows
        slots = np.frombuffer(step.slots, "<u2").astype(np.int32)
        positions = np.frombuffer(step.positions, "<i4").astype(np.int32)
        held = self._held.copy()
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            if position != held[slot]:
                raise RemoteProtocolError(
                    f"a row at position {position} of slot {slot}, which holds {held[slot]} tokens"
                )
            held[slot] += 1
        computed = self._compute(rows, slots, positions)
        self._held = held
        return computed

    def _rows_of(self, step: Step) -> Rows:
        if self._lookup is not None:
            rows: Rows = self._lookup.rows(np.frombuffer(step.tokens, "<i4").astype(np.int32))
            return rows
        return unpack(step.rows, step.codec, self.shape.width)

    def _keep(self, change: Keep) -> None:
        """A recurrent model that cannot go back forgets all, as `LlamaModel.trim` does."""
        keep = min(change.tokens, self._held[change.slot])
        if not _llama.llama_memory_seq_rm(self._memory, change.slot, keep, -1):
            keep = 0
            if not _llama.llama_memory_seq_rm(self._memory, change.slot, -1, -1):
                raise EngineError(f"The KV cache of slot {change.slot} cannot be cleared.")
        self._held[change.slot] = keep

    def _share(self, change: Share) -> None:
        held = self._held
        fits = not held[change.slot] and change.tokens <= held[change.source]
        if not fits or not self._can_rewind:
            raise RemoteProtocolError(
                f"{change.tokens} tokens to share from slot {change.source}, which holds "
                f"{held[change.source]}, with slot {change.slot}, which holds {held[change.slot]}"
            )
        if change.tokens:
            _llama.llama_memory_seq_cp(self._memory, change.source, change.slot, 0, change.tokens)
        held[change.slot] = change.tokens

    def _compute(
        self, rows: Rows, slots: np.ndarray[Any, Any], positions: np.ndarray[Any, Any]
    ) -> Rows:
        count = len(rows)
        if self._input_scale != 1:
            rows = rows * self._input_scale
        rows = np.ascontiguousarray(rows)
        self._batch.n_tokens = count
        self._batch.embd = pointer(rows, ctypes.c_float)
        self._slots[:count] = slots
        # All but the last of the planes, where there are four, tell a text's position.
        told = max(1, self._planes - 1)
        self._positions[: told * count] = np.tile(positions, told)
        self._positions[told * count : self._planes * count] = 0
        code = _llama.llama_decode(self._context, self._batch)
        if code == _KV_FULL:
            raise EngineError("The KV cache of this stage is full.")
        if code == _ABORTED:
            raise EngineError("The step was aborted.")
        if code != _DECODED:
            raise EngineError(f"llama.cpp cannot compute this step (llama_decode: {code}).")
        return self._capture.take(count)

    def forget(self) -> None:
        """All KV of all slots, and that there was an `abort`."""
        self._abort_flag.clear()
        _llama.llama_memory_clear(self._memory, False)
        self._held = [0] * self.shape.slots

    def abort(self) -> None:
        """Make `compute` fail within milliseconds, until `forget`. From any thread."""
        self._abort_flag.set()

    def set_threads(self, threads: int) -> None:
        _llama.llama_set_n_threads(self._context, threads, threads)

    # -- moving --------------------------------------------------------------------------------

    def save(self, slot: int) -> bytes:
        """The KV of a slot, for the same stage of the same model with the same `kv_type`.

        Raises `EngineError` if it is empty, or larger than `STATE_BYTES_MAX`.
        """
        if not self._held_by(slot):
            raise EngineError(f"Slot {slot} is empty.")
        size = int(_llama.llama_state_seq_get_size(self._context, slot))
        if not 0 < size <= STATE_BYTES_MAX:
            raise EngineError(f"The KV of slot {slot} takes {size} bytes, too many to be moved.")
        state = bytearray(size)
        cells = (ctypes.c_uint8 * size).from_buffer(state)
        if _llama.llama_state_seq_get_data(self._context, cells, size, slot) != size:
            raise EngineError(f"The KV of slot {slot} cannot be read.")
        return bytes(state)

    def restore(self, slot: int, state: bytes) -> int:
        """Put what `save` has given into an empty slot, and return how many tokens it now holds.

        Raises `EngineError`, and leaves the slot empty, if it is not this stage's or there is no
        room. llama.cpp finds a wrong length and another model's, but not a flipped bit.
        """
        if self._held_by(slot):
            raise EngineError(f"Slot {slot} is not empty.")
        cells = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        read = _llama.llama_state_seq_set_data(self._context, cells, len(state), slot)
        begins = int(_llama.llama_memory_seq_pos_min(self._memory, slot))
        held = int(_llama.llama_memory_seq_pos_max(self._memory, slot)) + 1
        # Of a recurrent model's state only the last position can be known.
        whole = begins == 0 or (begins > 0 and not self._can_rewind)
        if read != len(state) or not whole or held > self.shape.context_tokens:
            self._empty(slot)
            raise EngineError(f"What was to be the KV of slot {slot} is not this stage's.")
        self._held[slot] = held
        return held

    def _empty(self, slot: int) -> None:
        """Of what a hostile state has put there. Cells at positions before the first can only be
        removed with those of all slots."""
        _llama.llama_memory_seq_rm(self._memory, slot, -1, -1)
        if _llama.llama_memory_seq_pos_max(self._memory, slot) != _NO_POSITION:
            self.forget()

    def _held_by(self, slot: int) -> int:
        """How many tokens. Raises `EngineError` if there is no such slot."""
        if not 0 <= slot < self.shape.slots:
            raise EngineError(f"There is no slot {slot} of {self.shape.slots}.")
        return self._held[slot]
