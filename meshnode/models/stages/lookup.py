"""The rows of tokens: what the first stage computes on, looked up in the whole model's file.

Numbers come out of their quantised form as in llama.cpp, to the bit: ggml's own functions do it.
This module is a door to llama_cpp, of which it needs one library, and no model.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from meshnode.errors import LocalProtocolError, ModelLoadError
from meshnode.models.stages.stage import Stage

_F32 = 0


class _TypeTraits(ctypes.Structure):
    """The beginning of `struct ggml_type_traits` (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_elements", ctypes.c_int64),
        ("block_elements_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


# By the name under which libllama has loaded it: any other would be a second copy.
_GGML = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so.0"))
_GGML.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
_GGML.ggml_get_type_traits.argtypes = [ctypes.c_int]


class Lookup:
    """Rows of tokens for a stage, mapped from the source; only pages with asked rows are read."""

    def __init__(self, stage: Stage, source: str | Path) -> None:
        rows = stage.lookup
        try:
            self._table: np.ndarray[Any, np.dtype[np.uint8]] = np.memmap(
                source, np.uint8, "r", rows.offset, (rows.count, rows.row_bytes)
            )
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{source} has no rows of tokens: {error}.") from error
        self._width = stage.width
        self._scale = np.float32(stage.lookup_scale)
        self._kind = rows.kind
        self._to_float = _GGML.ggml_get_type_traits(rows.kind).contents.to_float

    def rows(self, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> np.ndarray[Any, Any]:
        """float32[n, width] of int32[n] tokens, scaled as the stage wants them.

        Raises `LocalProtocolError` for tokens that the vocabulary has not.
        """
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(self._table):
            raise LocalProtocolError("a token that the vocabulary has not")
        packed = np.ascontiguousarray(self._table[tokens])
        if self._kind == _F32:
            rows = packed.view(np.float32)
        else:
            rows = np.empty((len(tokens), self._width), np.float32)
            self._to_float(packed.ctypes.data, rows.ctypes.data, rows.size)
        return rows if self._scale == 1 else rows * self._scale
