"""What everybody who calls llama_cpp needs: its log, text to tokens, and numpy's arrays as C's.

Knows pointers. A vocabulary's functions are safe from any thread.
"""

from __future__ import annotations

import ctypes
import re
import sys
from typing import Any

import llama_cpp.llama_cpp as _llama
import numpy as np

from meshnode.errors import ModelLoadError, RequestError

# ggml_type of what a KV cache may be made of besides f16.
GGML_TYPES = {"q8_0": 8}
# Levels of ggml: 1 debug, 2 info, 3 warn, 4 error, 5 continuation of the previous message.
_LOG_LEVEL_WARN = 3
_LOG_LEVEL_CONTINUED = 5
_LOG_ERROR = re.compile(
    r"error loading model: |clip_init: failed to load model '.*?': "
    r"|mtmd_init_from_file: error: (?!Failed to load CLIP)"
)


# Kinds of positions (llama_rope_type) that have four numbers for each row: time, height, width.
_FOURFOLD_POSITIONS = (
    _llama.LLAMA_ROPE_TYPE_MROPE,
    _llama.LLAMA_ROPE_TYPE_IMROPE,
    _llama.LLAMA_ROPE_TYPE_VISION,
)


class _Log:
    """llama.cpp's log, from warnings up, on standard error; keeps the latest error."""

    def __init__(self) -> None:
        self._level = 0
        self.error = ""
        # C keeps the pointer, so this object lives as long as the process.
        self.callback = _llama.llama_log_callback(self._write)

    def _write(self, level: int, text: bytes, _data: object) -> None:
        if level != _LOG_LEVEL_CONTINUED:
            self._level = level
        if self._level < _LOG_LEVEL_WARN:
            return
        line = text.decode("utf-8", "replace")
        sys.stderr.write(line)
        # "error loading model: ..." says why; "failed to load model" after it says nothing more.
        if found := _LOG_ERROR.search(line):
            self.error = line[found.end() :].partition("\n")[0].strip()


log = _Log()


def initialise() -> None:
    """Before anything else of llama.cpp; more than once does no harm."""
    _llama.llama_log_set(log.callback, ctypes.c_void_p(0))
    _llama.llama_backend_init()


def checked(pointer: Any, path: str, what: str) -> Any:
    """The pointer. Raises `ModelLoadError` if it is NULL, with what the log says about it."""
    if not pointer:
        why = f": {log.error}" if log.error else ""
        raise ModelLoadError(f"{path}: llama.cpp cannot make the {what}{why}.")
    return pointer


def tokenise(
    vocabulary: Any, text: str, *, add_special: bool = False, parse_special: bool = False
) -> list[int]:
    """The tokens of a text; `add_special` puts those around it that the model expects, and
    `parse_special` lets control tokens be written in it, so that is for trusted text only."""
    data = text.encode("utf-8", "replace")
    capacity = len(data) + 8  # a token is at least a byte, but for a prefix space and special ones
    buffer = (ctypes.c_int32 * capacity)()
    count = _llama.llama_tokenize(
        vocabulary, data, len(data), buffer, capacity, add_special, parse_special
    )
    if count < 0:
        raise RequestError("The text cannot be tokenised.")
    return list(buffer[:count])


def pointer(array: np.ndarray[Any, Any], cell: Any) -> Any:
    """To an array's first cell; the array must outlive it."""
    return array.ctypes.data_as(ctypes.POINTER(cell))


def position_planes(model: Any) -> int:
    """How many numbers llama.cpp wants of each position, where it is given activations."""
    return 4 if _llama.llama_model_rope_type(model) in _FOURFOLD_POSITIONS else 1


class AbortFlag:
    """Stops a context's `llama_decode` within milliseconds: it returns 2. From any thread.

    llama.cpp asks a callback once per graph node. A Python one would cost a tenth of the speed, so
    it is C's own `strlen`, and its data a two-byte string: an empty one has length 0, which means
    go on.
    """

    def __init__(self, context: Any) -> None:
        self._flag = ctypes.create_string_buffer(2)
        callback = ctypes.cast(ctypes.CDLL(None).strlen, _llama.ggml_abort_callback)
        data = ctypes.cast(self._flag, ctypes.c_void_p)
        _llama.llama_set_abort_callback(context, callback, data)

    def set(self) -> None:
        self._flag[0] = b"x"

    def clear(self) -> None:
        self._flag[0] = b"\0"
