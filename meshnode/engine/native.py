"""What everybody who calls llama_cpp needs: text to tokens, and numpy's arrays as C's.

Knows pointers. A vocabulary's functions are safe from any thread.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as _llama
import numpy as np

from meshnode.errors import RequestError


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
