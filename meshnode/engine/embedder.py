"""A loaded model's second context, which turns inputs into vectors: one step at a time.

Knows pointers, pooling and special tokens. Decides nothing about what is read when: it performs
the steps of `embedding.py`. As in `llama.py`, a wrong call crashes the process, so all is checked.

A causal model is read in pieces, and pooled here, as its metadata says or by the mean; llama.cpp
would pool each piece alone. Encoders and rerankers are read whole and pooled by llama.cpp, which
has their heads.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import llama_cpp.llama_cpp as _llama
import numpy as np

from meshnode.engine.embedding import LANES, STEP_TOKENS_MAX, Piece
from meshnode.engine.memory import available_bytes, check_embedding_fits
from meshnode.engine.native import pointer, tokenise
from meshnode.errors import MeshnodeError, RequestError
from meshnode.models.gguf import read_header

# A context of this many tokens is made and dropped to see what kind of model it is.
_PROBE_TOKENS = 64
_METADATA_BYTES = 128


class EmbedError(MeshnodeError):
    """The model cannot be read now; the message is for whoever asked."""


class Pooling(IntEnum):
    """llama.cpp's numbers for what becomes of the vectors of an input's tokens."""

    NONE = _llama.LLAMA_POOLING_TYPE_NONE
    MEAN = _llama.LLAMA_POOLING_TYPE_MEAN
    CLS = _llama.LLAMA_POOLING_TYPE_CLS
    LAST = _llama.LLAMA_POOLING_TYPE_LAST
    RANK = _llama.LLAMA_POOLING_TYPE_RANK


class Embedder:
    """Reads inputs with a model that somebody else has loaded, and will close after this.

    `tokens` and `pair` are safe from any thread; all else belongs to the thread that decodes.
    """

    def __init__(self, model: Any, path: str) -> None:
        self._model = model
        self._path = path
        self._vocabulary = _llama.llama_model_get_vocab(model)
        self._vocabulary_size = int(_llama.llama_vocab_n_tokens(self._vocabulary))
        self._context: Any = None
        self._capacity_tokens = 0
        self._sums: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
        declared = _metadata(model, "pooling_type")
        causal = _metadata(model, "attention.causal") != "false"
        is_encoder = not causal or not self._has_memory()
        self.is_purpose = is_encoder or declared not in (None, "-1", str(int(Pooling.NONE)))
        """Whether the model was made for this, and not to generate text."""
        self.pooling = _pooling(declared)
        self.reads_whole = is_encoder or self.pooling is Pooling.RANK
        self.dimensions = 1 if self.ranks else int(_llama.llama_model_n_embd_out(model))

    @property
    def ranks(self) -> bool:
        """Whether it says how relevant a document is, instead of what it means."""
        return self.pooling is Pooling.RANK

    def close(self) -> None:
        if self._context:
            _llama.llama_free(self._context)
            self._context = None

    # -- text and tokens -----------------------------------------------------------------------

    def tokens(self, given: str | Sequence[int], param: str) -> list[int]:
        """An input as tokens: text between the special ones that the model expects, ids as given.

        Raises `RequestError`, naming `param`, for an empty one and for ids of no vocabulary.
        """
        if isinstance(given, str):
            tokens = tokenise(self._vocabulary, given, add_special=True) if given else []
        else:
            tokens = list(given)
            if any(not 0 <= token < self._vocabulary_size for token in tokens):
                raise RequestError(
                    f"`{param}`: token ids of this model are 0 to {self._vocabulary_size - 1}.",
                    param=param,
                    code="invalid_value",
                )
        if not tokens:
            raise RequestError(f"`{param}` is empty.", param=param, code="invalid_value")
        return tokens

    def pair(self, query: str, document: str) -> list[int]:
        """A query and a document as a reranker reads them: as llama.cpp's own server joins them."""
        template = _llama.llama_model_chat_template(self._model, b"rerank")
        if template is not None:
            # Split before anything is put in: a query may hold "{document}".
            places = {"{query}": query, "{document}": document}
            return [
                token
                for part in re.split(r"({query}|{document})", template.decode("utf-8", "replace"))
                for token in self._tokenise(
                    places.get(part, part), parse_special=part not in places
                )
            ]
        vocabulary = self._vocabulary
        sep = int(_llama.llama_vocab_sep(vocabulary))
        eos = int(_llama.llama_vocab_eos(vocabulary))
        begin = [int(_llama.llama_vocab_bos(vocabulary))]
        end = [sep if eos < 0 else eos]  # below 0: the model has no such token
        between = [sep]
        if not _llama.llama_vocab_get_add_bos(vocabulary):
            begin = []
        if not _llama.llama_vocab_get_add_eos(vocabulary):
            end = []
        if not _llama.llama_vocab_get_add_sep(vocabulary):
            between = []
        joined = [*begin, *self._tokenise(query), *end, *between, *self._tokenise(document), *end]
        return [token for token in joined if token >= 0]

    def _tokenise(self, text: str, *, parse_special: bool = False) -> list[int]:
        return tokenise(self._vocabulary, text, parse_special=parse_special)

    # -- reading -------------------------------------------------------------------------------

    def compute(
        self, pieces: Sequence[Piece], capacity_tokens: int, threads: int
    ) -> list[tuple[Piece, bytes]]:
        """Compute a step of an `EmbedQueue`; the vectors of the inputs that have come to their end.

        Raises `EmbedError` if there is no memory for its context, or no sense in its numbers.
        """
        self._make_room(capacity_tokens)
        _llama.llama_set_n_threads(self._context, threads, threads)
        memory = _llama.llama_get_memory(self._context)
        if memory and pieces[0].start == 0:
            # Nothing goes on: this also forgets the beginnings of what was cancelled.
            _llama.llama_memory_clear(memory, False)
            self._sums.clear()
        batch = _Batch(pieces)
        code = _llama.llama_decode(self._context, batch.struct)
        if code != 0:
            raise EmbedError(f"The inputs cannot be read (llama_decode returned {code}).")
        vectors = self._pooled(pieces) if self.reads_whole else self._gathered(pieces)
        if memory:
            for piece in pieces:
                if piece.is_last:
                    _llama.llama_memory_seq_rm(memory, piece.lane, -1, -1)
        return vectors

    def _pooled(self, pieces: Sequence[Piece]) -> list[tuple[Piece, bytes]]:
        """What llama.cpp has pooled; inputs are whole."""
        vectors = []
        for piece in pieces:
            found = _llama.llama_get_embeddings_seq(self._context, piece.lane)
            if not found:
                raise EmbedError("llama.cpp gives no vector for an input.")
            vector = np.ctypeslib.as_array(found, shape=(self.dimensions,)).astype(np.float64)
            vectors.append((piece, self._finished(vector)))
        return vectors

    def _gathered(self, pieces: Sequence[Piece]) -> list[tuple[Piece, bytes]]:
        """The vectors of all tokens, pooled over the pieces of their inputs."""
        found = _llama.llama_get_embeddings(self._context)
        if not found:
            raise EmbedError("llama.cpp gives no vectors for the tokens.")
        rows = sum(len(piece.tokens) for piece in pieces)
        table = np.ctypeslib.as_array(found, shape=(rows, self.dimensions))
        vectors, row = [], 0
        for piece in pieces:
            mine = table[row : row + len(piece.tokens)]
            row += len(piece.tokens)
            key = (piece.job, piece.index)
            pooled = self._pool(self._sums.pop(key, None), mine)
            if piece.is_last:
                vectors.append((piece, self._finished(pooled)))
            else:
                self._sums[key] = pooled
        return vectors

    def _pool(
        self, before: np.ndarray[Any, Any] | None, rows: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """What is kept of an input so far. A sum does for a mean: its length is made 1 anyway."""
        if self.pooling is Pooling.LAST:
            pooled: np.ndarray[Any, Any] = rows[-1].astype(np.float64)
        elif self.pooling is Pooling.CLS:
            pooled = rows[0].astype(np.float64) if before is None else before
        else:
            pooled = rows.sum(axis=0, dtype=np.float64)
            if before is not None:
                pooled += before
        return pooled

    def _finished(self, vector: np.ndarray[Any, Any]) -> bytes:
        length = 1.0 if self.ranks else float(np.linalg.norm(vector))
        if not math.isfinite(length) or not np.isfinite(vector).all():
            raise EmbedError("The model computes no numbers; its file may be damaged.")
        return (vector / (length or 1.0)).astype("<f4").tobytes()

    # -- the context ---------------------------------------------------------------------------

    def _has_memory(self) -> bool:
        """Whether the model remembers what it has read: an encoder sees all at once."""
        params = _llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = _PROBE_TOKENS
        context = _llama.llama_init_from_model(self._model, params)
        if not context:
            return True  # whoever makes the real one says why it cannot be made
        try:
            return bool(_llama.llama_get_memory(context))
        finally:
            _llama.llama_free(context)

    def _make_room(self, capacity_tokens: int) -> None:
        """A context for inputs of up to so many tokens."""
        if capacity_tokens == self._capacity_tokens:
            return
        self.close()
        self._capacity_tokens = 0
        # An input that goes on, and the others in its step.
        context_tokens = capacity_tokens + STEP_TOKENS_MAX
        step_tokens = max(capacity_tokens, STEP_TOKENS_MAX) if self.reads_whole else STEP_TOKENS_MAX
        try:
            check_embedding_fits(
                self._path,
                read_header(self._path),
                context_tokens,
                step_tokens,
                self._vocabulary_size,
                available_bytes(),
            )
        except MeshnodeError as error:
            raise EmbedError(str(error)) from None
        params = _llama.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_batch = params.n_ubatch = step_tokens
        params.n_seq_max = LANES
        params.embeddings = True
        params.pooling_type = self.pooling if self.reads_whole else Pooling.NONE
        params.kv_unified = True
        params.swa_full = True
        params.no_perf = True
        self._context = _llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise EmbedError("llama.cpp cannot make a context for embeddings.")
        self._capacity_tokens = capacity_tokens


class _Batch:
    """A llama_batch for a step, and the arrays that it points to."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        count = sum(len(piece.tokens) for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        positions = [piece.start + i for piece in pieces for i in range(len(piece.tokens))]
        lanes = [piece.lane for piece in pieces for _ in piece.tokens]
        self._tokens = np.array(tokens, np.int32)
        self._positions = np.array(positions, np.int32)
        self._lanes = np.array(lanes, np.int32)
        self._ones = np.ones(count, np.int32)
        self._outputs = np.ones(count, np.int8)
        # seq_id is an array of pointers, one per token, each to that token's cell in _lanes.
        self._pointers = np.uint64(self._lanes.ctypes.data) + np.uint64(
            self._lanes.itemsize
        ) * np.arange(count, dtype=np.uint64)
        self.struct = _llama.llama_batch()
        self.struct.n_tokens = count
        self.struct.token = pointer(self._tokens, ctypes.c_int32)
        self.struct.pos = pointer(self._positions, ctypes.c_int32)
        self.struct.n_seq_id = pointer(self._ones, ctypes.c_int32)
        self.struct.seq_id = pointer(self._pointers, ctypes.POINTER(ctypes.c_int32))
        self.struct.logits = pointer(self._outputs, ctypes.c_int8)


def _pooling(declared: str | None) -> Pooling:
    """By the mean unless the model says better: one vector is wanted, not one per token."""
    kinds = {str(int(kind)): kind for kind in Pooling if kind is not Pooling.NONE}
    return kinds.get(declared or "", Pooling.MEAN)


def _metadata(model: Any, key: str) -> str | None:
    """A short value of the model's own, under its architecture's name."""
    architecture = _read_metadata(model, "general.architecture")
    return None if architecture is None else _read_metadata(model, f"{architecture}.{key}")


def _read_metadata(model: Any, key: str) -> str | None:
    buffer = ctypes.create_string_buffer(_METADATA_BYTES)
    length = _llama.llama_model_meta_val_str(model, key.encode(), buffer, _METADATA_BYTES)
    return None if length < 0 else buffer.value.decode("utf-8", "replace")
