"""libmtmd: from the pixels of a picture to the embeddings that a language model reads.

The mechanism beside `llama.py`: loads a projector (an mmproj file), says how many cells a picture
takes, and computes them. Decides nothing about who runs. Everything here may crash the process if
called wrongly, as there.

llama-cpp-python's own bindings (`llama_cpp.mtmd_cpp`) also bind the helpers that decode pictures,
sound and video, which our libmtmd does not have (scripts/llama_trimmed.cmake), so the part that is
needed is declared here, after mtmd.h of the release that requirements.lock pins.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_size_t,
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as _llama
import numpy as np
from llama_cpp._ctypes_extensions import load_shared_library

from meshnode.engine import Image
from meshnode.engine.cells import VIEW_CELLS_MAX
from meshnode.engine.pictures import check, pixels
from meshnode.engine.scheduler import PREFILL_TOKENS_MAX
from meshnode.errors import ModelLoadError, RequestError

# Of a SHA-256: whoever finds two views with equal ones could read another's picture in the cache.
_DIGEST_BYTES = 16
# mtmd_input_chunk_type: the others are text and sound.
_CHUNK_IMAGE = 1
# What mtmd.h documents, to be found in the struct if it is laid out as declared here.
_MARKER = b"<__media__>"
_BATCH_TOKENS = 1024


class _Params(Structure):
    """mtmd_context_params."""

    _fields_ = (
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attn_type", c_int),
        ("warmup", c_bool),
        ("image_min_tokens", c_int),
        ("image_max_tokens", c_int),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
    )


class _Text(Structure):
    """mtmd_input_text."""

    _fields_ = (
        ("text", c_char_p),
        ("text_len", c_size_t),
        ("add_special", c_bool),
        ("parse_special", c_bool),
    )


class _Part(Structure):
    """mtmd_input_part: one of the two is NULL."""

    _fields_ = (("text", POINTER(_Text)), ("bitmap", c_void_p))


class _Place(Structure):
    """mtmd_decoder_pos."""

    _fields_ = (("t", c_uint32), ("x", c_uint32), ("y", c_uint32), ("z", c_uint32))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "mtmd_context_params_default": (_Params, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, c_void_p, _Params]),
    "mtmd_free": (None, [c_void_p]),
    "mtmd_log_set": (None, [_llama.llama_log_callback, c_void_p]),
    "mtmd_support_vision": (c_bool, [c_void_p]),
    "mtmd_decode_use_mrope": (c_bool, [c_void_p]),
    "mtmd_decode_use_non_causal": (c_bool, [c_void_p, c_void_p]),
    "mtmd_bitmap_init": (c_void_p, [c_uint32, c_uint32, c_char_p]),
    "mtmd_bitmap_free": (None, [c_void_p]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunks_free": (None, [c_void_p]),
    "mtmd_input_chunk_get_type": (c_int, [c_void_p]),
    "mtmd_input_chunk_get_tokens_text": (POINTER(c_int32), [c_void_p, POINTER(c_size_t)]),
    "mtmd_input_chunk_get_tokens_image": (c_void_p, [c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_input_chunk_get_n_pos": (c_int32, [c_void_p]),
    "mtmd_tokenize_from_parts": (
        c_int32,
        [c_void_p, c_void_p, POINTER(POINTER(_Part)), c_size_t, c_bool],
    ),
    "mtmd_image_tokens_get_decoder_pos": (_Place, [c_void_p, c_int32, c_size_t]),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (POINTER(c_float), [c_void_p]),
}


@dataclass(frozen=True, slots=True)
class View:
    """A run of a picture's embeddings, not computed yet: number `index` of what it is cut into.

    It has `cells` cells in the KV cache and takes `positions` positions of the text, fewer where
    a model has places in two dimensions. `digest` is that of its cells.
    """

    image: Image
    index: int
    digest: int
    cells: int
    positions: int


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A view as the language model reads it: `vectors` (cells, width) in float32.

    `places`: (4, cells) positions, for a model with places in two dimensions; None if they count
    up from the view's first. `causal`: whether a cell sees only those before it.
    """

    vectors: np.ndarray[Any, Any]
    places: np.ndarray[Any, Any] | None
    causal: bool


class Projector:
    """A loaded mmproj file. `look` is safe from any thread, `embed` belongs to one."""

    def __init__(
        self, path: str, model: Any, width: int, threads: int, log: Any, why: Callable[[], str]
    ) -> None:
        """Load; blocks. `width`: of the model's embeddings. `why` gives the log's latest error.

        Raises `ModelLoadError`.
        """
        self._lib = _library(path)
        self._lib.mtmd_log_set(log, None)
        params = self._lib.mtmd_context_params_default()
        if (params.media_marker, params.batch_max_tokens) != (_MARKER, _BATCH_TOKENS):
            raise ModelLoadError(f"{path}: the engine's libmtmd is of another release than we know")
        params.use_gpu = False
        params.print_timings = False
        params.n_threads = threads
        self._width = width
        self._context = self._lib.mtmd_init_from_file(os.fsencode(path), model, params)
        if not self._context:
            said = f": {why()}" if why() else ""
            raise ModelLoadError(f"{path} does not give this model eyes{said}.")
        if not self._lib.mtmd_support_vision(self._context):
            self.close()
            raise ModelLoadError(f"{path} is for sound, not for pictures.")
        self.has_places = bool(self._lib.mtmd_decode_use_mrope(self._context))

    def close(self) -> None:
        if self._context:
            self._lib.mtmd_free(self._context)
            self._context = None

    def look(self, image: Image) -> list[int | View]:
        """A picture as the model will read it: its views, with tokens round and between them.

        Raises `RequestError` if it is no picture, or one that this model takes nothing from.
        """
        check(image)
        seen: list[int | View] = []
        with self._cut(image) as chunks:
            for index, chunk in enumerate(chunks):
                if self._lib.mtmd_input_chunk_get_type(chunk) == _CHUNK_IMAGE:
                    seen.append(self._view(image, index, chunk))
                else:
                    seen += self._tokens(chunk)
        return seen

    def embed(self, view: View, position: int) -> Embeddings:
        """Compute a view that begins at a position; blocks for as long as that takes."""
        with self._cut(view.image) as chunks:
            chunk = chunks[view.index]
            if self._lib.mtmd_encode_chunk(self._context, chunk) != 0:
                raise RuntimeError("libmtmd cannot compute what it has cut out itself")
            found = self._lib.mtmd_get_output_embd(self._context)
            vectors = np.ctypeslib.as_array(found, shape=(view.cells, self._width)).copy()
            causal = not self._lib.mtmd_decode_use_non_causal(self._context, chunk)
            return Embeddings(vectors, self._places(chunk, view.cells, position), causal)

    @contextmanager
    def _cut(self, image: Image) -> Iterator[list[Any]]:
        """The picture scaled and cut as the model wants it, while the context is open."""
        found = pixels(image)
        bitmap = self._lib.mtmd_bitmap_init(found.width, found.height, found.rgb)
        chunks = self._lib.mtmd_input_chunks_init()
        try:
            part = _Part(None, bitmap)
            parts = (POINTER(_Part) * 1)(ctypes.pointer(part))
            code = self._lib.mtmd_tokenize_from_parts(self._context, chunks, parts, 1, False)
            if code != 0:
                raise _unreadable()
            count = self._lib.mtmd_input_chunks_size(chunks)
            yield [self._lib.mtmd_input_chunks_get(chunks, index) for index in range(count)]
        finally:
            self._lib.mtmd_input_chunks_free(chunks)
            self._lib.mtmd_bitmap_free(bitmap)

    def _view(self, image: Image, index: int, chunk: Any) -> View:
        count = int(self._lib.mtmd_input_chunk_get_n_tokens(chunk))
        positions = int(self._lib.mtmd_input_chunk_get_n_pos(chunk))
        cells_max = VIEW_CELLS_MAX
        if self._lib.mtmd_decode_use_non_causal(self._context, chunk):
            cells_max = PREFILL_TOKENS_MAX  # they all see each other, so they go in one pass
        if not 1 <= count <= cells_max or not 1 <= positions <= count:
            raise _unreadable()
        salt = b"%d %d" % (index, image.low_detail)
        digest = hashlib.blake2b(image.data, digest_size=_DIGEST_BYTES, salt=salt).digest()
        return View(image, index, int.from_bytes(digest, "big"), count, positions)

    def _tokens(self, chunk: Any) -> list[int]:
        count = c_size_t()
        tokens = self._lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        found = list(tokens[: count.value])
        if any(token < 0 for token in found):
            raise _unreadable()  # the model's vocabulary lacks a word that its projector needs
        return found

    def _places(self, chunk: Any, count: int, position: int) -> np.ndarray[Any, Any] | None:
        if not self.has_places:
            return None
        tokens = self._lib.mtmd_input_chunk_get_tokens_image(chunk)
        places = np.zeros((4, count), np.int32)
        for cell in range(count):
            place = self._lib.mtmd_image_tokens_get_decoder_pos(tokens, position, cell)
            # llama.cpp's order is time, row, column.
            places[:, cell] = place.t, place.y, place.x, place.z
        return places


class Positions:
    """Where the cells of each slot stand, for models whose pictures take fewer positions."""

    def __init__(self) -> None:
        # By slot: the place behind each view, and by how much it moves what comes after it.
        self._views: dict[int, list[tuple[int, int]]] = {}

    def of(self, slot: int, place: int) -> int:
        """The position of the item at `place`, which is not inside a view."""
        return place - sum(saved for end, saved in self._views.get(slot, ()) if end <= place)

    def add(self, slot: int, start: int, view: View) -> None:
        """A view was computed from `start` on."""
        if view.positions < view.cells:
            saved = view.cells - view.positions
            self._views.setdefault(slot, []).append((start + view.cells, saved))

    def are_moved(self, slot: int) -> bool:
        """Whether places and positions differ anywhere in a slot."""
        return bool(self._views.get(slot))

    def trim(self, slot: int, keep: int) -> None:
        """The slot keeps what was before `keep`."""
        self._views[slot] = [each for each in self._views.get(slot, ()) if each[0] <= keep]

    def copy(self, source: int, slot: int, tokens: int) -> None:
        """The slot begins with so much of another."""
        self._views[slot] = [each for each in self._views.get(source, ()) if each[0] <= tokens]


def _unreadable() -> RequestError:
    return RequestError("An image cannot be read by this model.", param="messages",
                        code="invalid_image")  # fmt: skip


def _library(path: str) -> Any:
    """Loaded beside libllama, so that both use the one libggml that is in memory already."""
    assert _llama.__file__ is not None
    folder = Path(_llama.__file__).parent / "lib"
    try:
        lib = load_shared_library("mtmd", folder)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (AttributeError, OSError, RuntimeError) as error:
        raise ModelLoadError(
            f"{path} needs libmtmd, which this llama-cpp-python was compiled without; "
            "`make setup` compiles one with it."
        ) from error
    return lib
