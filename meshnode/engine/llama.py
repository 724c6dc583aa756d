"""A GGUF file in memory, and one decode at a time.

Knows pointers, batches and samplers. Decides nothing about who runs: it performs the batches of
`scheduler.py`. Everything here may crash the process if called wrongly, which is why it runs in a
child (`child.py`); so every pointer and return code is checked, and arguments are checked before
they reach C.

Import this module only in a process whose environment is that of `child_process.CHILD_ENVIRONMENT`:
libgomp reads it once, when it is loaded.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp.llama_cpp as _llama
import numpy as np

from meshnode.config import KvType
from meshnode.engine import (
    GRAMMAR_BYTES_MAX,
    PENALTY_TOKENS_MAX,
    After,
    ChatMessage,
    ChatStyle,
    Grammar,
    Logprob,
    Sampling,
    TokenLogprobs,
)
from meshnode.engine.cells import cells
from meshnode.engine.chat import ChatTemplate, Picture, Segment
from meshnode.engine.embedder import Embedder
from meshnode.engine.native import (
    GGML_TYPES,
    AbortFlag,
    checked,
    initialise,
    log,
    pointer,
    tokenise,
)
from meshnode.engine.scheduler import PREFILL_TOKENS_MAX, Batch, Chunk, Copy, Trim
from meshnode.engine.style import find_style
from meshnode.engine.trial import survives
from meshnode.engine.trigger import Trigger
from meshnode.engine.vision import Positions, Projector, View
from meshnode.errors import ModelLoadError, RequestError

# Below it the likeliest token is drawn anyway, and dividing by it would soon overflow.
TEMPERATURE_MIN = 1e-3
# llama.cpp reads this seed as "choose one at random", so it cannot be a client's seed.
_SEED_RANDOM = 0xFFFF_FFFF
# How many of the likeliest tokens mirostat 1 estimates its distribution from: llama.cpp's choice.
_MIROSTAT_TOKENS = 100
# Grammars that have passed their trial, each of at most `GRAMMAR_BYTES_MAX`.
_GRAMMARS_KEPT_MAX = 64
# How far a trial walks: most of what explodes does so within the first tokens.
_GRAMMAR_TRIAL_TOKENS = 16
# The rule that stands before a grammar's `root`; no sane grammar has one of this name.
_START = "meshnode-start"
# llama_token_data as numpy lays it out.
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
# A piece is seldom longer than 16 bytes; a longer one reports its length and is read again.
_PIECE_BYTES = 64
# llama_ftype of Q4_0, the only 4-bit type that is repacked for fast matrix products on x86.
_FTYPE_Q4_0 = 2
# What llama_decode returns.
_DECODED = 0
_ABORTED = 2


class DecodeError(Exception):
    """llama.cpp failed in a way that no request should cause; the process should end."""


class Candidates:
    """All tokens of a vocabulary, for samplers to sort and strike."""

    def __init__(self, vocabulary_size: int) -> None:
        self._table = np.zeros(vocabulary_size, _CANDIDATE)
        self._ids = np.arange(vocabulary_size, dtype=np.int32)

    def fill(self, logits: np.ndarray[Any, Any]) -> Any:
        """All of them, as yet unsorted. One set at a time is good."""
        self._table["id"] = self._ids
        self._table["logit"] = logits
        self._table["p"] = 0.0
        data = self._table.ctypes.data_as(ctypes.POINTER(_llama.llama_token_data))
        return _llama.llama_token_data_array(data, len(self._table), -1, False)

    @property
    def logits(self) -> np.ndarray[Any, Any]:
        """Minus infinity where struck."""
        return self._table["logit"]


class GrammarSampler:
    """How far an answer has come in its grammar, and which tokens may come next.

    llama.cpp ends the process if it is given a token to accept that the grammar does not admit.
    """

    def __init__(self, sampler: Any) -> None:
        """Takes over a sampler of llama.cpp's that is not NULL."""
        self._sampler = sampler

    def strike(self, candidates: Any) -> None:
        """Make impossible what may not come next: 15 ms for a vocabulary."""
        _llama.llama_sampler_apply(self._sampler, ctypes.byref(candidates))

    def admits(self, token: int) -> bool:
        """Whether this token may come next."""
        one = _llama.llama_token_data(token, 1.0, 0.0)
        array = _llama.llama_token_data_array(ctypes.pointer(one), 1, -1, False)
        self.strike(array)
        return bool(math.isfinite(one.logit))

    def accept(self, token: int) -> None:
        _llama.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        if self._sampler:
            _llama.llama_sampler_free(self._sampler)
            self._sampler = None


class LazyGrammar:
    """A grammar that binds an answer only from some word on."""

    def __init__(
        self,
        after: After,
        bind: Callable[[bytes], GrammarSampler],
        piece: Callable[[int], bytes],
    ) -> None:
        """`bind` gives the grammar with some text before it, `piece` any token's bytes."""
        self._trigger = Trigger(after)
        self._bind = bind
        self._piece = piece

    def bound_by(self, token: int) -> GrammarSampler | None:
        """The grammar, if this token would complete the word.

        What of the token is not after the word stands before the grammar, so that it can judge
        the token; the word cannot be unsaid.
        """
        before = self._trigger.begins(self._piece(token))
        return None if before is None else self._bind(before)

    def accept(self, token: int) -> None:
        self._trigger.accept(self._piece(token))


class Sampler:
    """The chain that draws one sequence's tokens; it remembers them for penalties and seed."""

    def __init__(
        self,
        vocabulary: Any,
        vocabulary_size: int,
        sampling: Sampling,
        grammar: GrammarSampler | LazyGrammar | None = None,
    ) -> None:
        self._grammar = grammar if isinstance(grammar, GrammarSampler) else None
        self._lazy = grammar if isinstance(grammar, LazyGrammar) else None
        self._candidates = None if grammar is None else Candidates(vocabulary_size)
        self._chain = _llama.llama_sampler_chain_init(_llama.llama_sampler_chain_default_params())
        if not self._chain:
            raise DecodeError("no memory for a sampler")
        if sampling.logit_bias:
            biases = (_llama.llama_logit_bias * len(sampling.logit_bias))()
            for cell, (token, bias) in zip(biases, sampling.logit_bias, strict=True):
                cell.token, cell.bias = token, bias
            self._add(_llama.llama_sampler_init_logit_bias(vocabulary_size, len(biases), biases))
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._add(
                _llama.llama_sampler_init_penalties(
                    vocabulary_size,
                    PENALTY_TOKENS_MAX,
                    1.0,
                    sampling.frequency_penalty,
                    sampling.presence_penalty,
                )
            )
        if sampling.repeat_penalty != 1.0:
            self._add(
                _llama.llama_sampler_init_penalties(
                    vocabulary_size, sampling.repeat_last_n, sampling.repeat_penalty, 0.0, 0.0
                )
            )
        if sampling.dry_multiplier:
            self._add(_dry(vocabulary, sampling))
        if sampling.temperature < TEMPERATURE_MIN:
            self._add(_llama.llama_sampler_init_greedy())
            return
        seed = sampling.seed
        if seed is None:
            seed = int.from_bytes(os.urandom(4), "big")
        seed %= _SEED_RANDOM
        tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
        if sampling.mirostat:
            self._add(_llama.llama_sampler_init_temp(sampling.temperature))
            if sampling.mirostat == 1:
                draw = _llama.llama_sampler_init_mirostat(
                    vocabulary_size, seed, tau, eta, _MIROSTAT_TOKENS
                )
            else:
                draw = _llama.llama_sampler_init_mirostat_v2(seed, tau, eta)
            self._add(draw)
            return
        self._add(_llama.llama_sampler_init_top_k(sampling.top_k))
        self._add(_llama.llama_sampler_init_typical(sampling.typical_p, 1))
        self._add(_llama.llama_sampler_init_top_p(sampling.top_p, 1))
        self._add(_llama.llama_sampler_init_min_p(sampling.min_p, 1))
        self._add(_llama.llama_sampler_init_temp(sampling.temperature))
        self._add(_llama.llama_sampler_init_dist(seed))

    def _add(self, sampler: Any) -> None:
        if not sampler:  # a NULL in the chain would be a crash at the first token
            self.close()
            raise DecodeError("llama.cpp refused a sampler")
        _llama.llama_sampler_chain_add(self._chain, sampler)

    def draw(self, context: Any, row: int, logits: np.ndarray[Any, Any]) -> int | None:
        """The next token, from row `row` of the last batch; it must have wanted logits.

        None if the grammar admits no token of this vocabulary, not even an end.
        """
        if self._candidates is None:
            return int(_llama.llama_sampler_sample(self._chain, context, row))
        token = self._choose(self._candidates.fill(logits))
        grammar = self._binding(token)
        if grammar is not None:
            # To ask about all tokens doubles a step, and it seldom minds the first choice.
            if not grammar.admits(token):
                candidates = self._candidates.fill(logits)
                grammar.strike(candidates)
                token = self._choose(candidates)
                if not grammar.admits(token):
                    return None
            grammar.accept(token)
        _llama.llama_sampler_accept(self._chain, token)
        return token

    def _binding(self, token: int) -> GrammarSampler | None:
        """The grammar that has a say in this token; None if the answer is free still."""
        if self._lazy is not None:
            self._grammar = self._lazy.bound_by(token)
            if self._grammar is None:
                self._lazy.accept(token)
            else:
                self._lazy = None
        return self._grammar

    def _choose(self, candidates: Any) -> int:
        _llama.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        return int(candidates.data[candidates.selected].id)

    def remember(self, tokens: Sequence[int]) -> None:
        """Count tokens that another engine drew, as if drawn here; the seed does not move on.

        Raises `RequestError` if the grammar would not have let it draw them.
        """
        for token in tokens:
            grammar = self._binding(token)
            if grammar is not None:
                if not grammar.admits(token):
                    self.close()
                    raise RequestError("The answer to be continued breaks its grammar.")
                grammar.accept(token)
            _llama.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        if self._grammar is not None:
            self._grammar.close()
            self._grammar = None
        if self._chain:
            _llama.llama_sampler_free(self._chain)
            self._chain = None


def _dry(vocabulary: Any, sampling: Sampling) -> Any:
    breakers = [breaker.encode("utf-8", "replace") for breaker in sampling.dry_sequence_breakers]
    return _llama.llama_sampler_init_dry(
        vocabulary,
        sampling.dry_multiplier,
        sampling.dry_base,
        sampling.dry_allowed_length,
        sampling.dry_penalty_last_n,
        (ctypes.c_char_p * len(breakers))(*breakers),
        len(breakers),
    )


class LlamaModel:
    """A loaded model with a KV cache of `slots` lanes that share `context_tokens` cells.

    If it was made for embeddings or reranking, `embedder` is all there is to use.

    Tokenising (`prompt_tokens`, `piece`) and `abort` are safe from any thread; all else belongs
    to the thread that decodes.
    """

    def __init__(
        self,
        path: str,
        *,
        context_tokens: int,
        slots: int,
        slots_kept: int = 0,
        kv_type: KvType = "f16",
        threads: int,
        on_progress: Callable[[float], None],
        projector: str | None = None,
    ) -> None:
        """Load; blocks. `slots` compute, `slots_kept` more hold KV; `projector` is the mmproj file
        of a model that can see. Raises `ModelLoadError`.
        """
        initialise()
        self._context = None
        self._projector: Projector | None = None
        self._positions = Positions()
        self._model = self._load_model(path, on_progress)
        self._embedder: Embedder | None = None
        self._template: ChatTemplate | None = None
        self.end_tokens: frozenset[int] = frozenset()
        try:
            self._vocabulary = checked(_llama.llama_model_get_vocab(self._model), path, "vocab")
            self.context_tokens = context_tokens
            # A recurrent model's state is that of its last token: it cannot go back to a prefix,
            # nor copy one, and each slot takes memory of its own.
            self.can_rewind = not (
                _llama.llama_model_is_recurrent(self._model)
                or _llama.llama_model_is_hybrid(self._model)
            )
            self.slots_kept = slots_kept if self.can_rewind else 0
            if _llama.llama_model_has_encoder(self._model):
                raise ModelLoadError(f"{path}: encoder models cannot generate text here")
            if _llama.llama_model_is_diffusion(self._model):
                raise ModelLoadError(f"{path}: diffusion models cannot generate text here")
            self._embedder = Embedder(self._model, path)
            if self._embedder.is_purpose:
                on_progress(1.0)
                return
            self._context = self._make_context(path, slots, threads, kv_type)
            self._memory = checked(_llama.llama_get_memory(self._context), path, "KV cache")
            self.vocabulary_size = int(_llama.llama_vocab_n_tokens(self._vocabulary))
            self.end_tokens = frozenset(
                token
                for token in range(self.vocabulary_size)
                if _llama.llama_vocab_is_eog(self._vocabulary, token)
            )
            self._bos = int(_llama.llama_vocab_bos(self._vocabulary))
            self._add_bos = bool(_llama.llama_vocab_get_add_bos(self._vocabulary))
            self._template = self._load_template()
            if projector is not None:
                self._projector = self._load_projector(projector, threads)
        except BaseException:
            self.close()
            raise
        self._slots = slots
        self._pieces: dict[int, bytes] = {}
        self._grammars: dict[str, None] = {}
        self._make_batch()
        self._abort_flag = AbortFlag(self._context)
        on_progress(1.0)

    # -- loading -------------------------------------------------------------------------------

    def _load_model(self, path: str, on_progress: Callable[[float], None]) -> Any:
        @_llama.llama_progress_callback  # type: ignore[untyped-decorator]
        def progress(fraction: float, _data: object) -> bool:
            on_progress(fraction)
            return True

        params = _llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.progress_callback = progress
        return checked(_llama.llama_model_load_from_file(os.fsencode(path), params), path, "model")

    def _make_context(self, path: str, slots: int, threads: int, kv_type: KvType) -> Any:
        params = _llama.llama_context_default_params()
        params.n_ctx = self.context_tokens
        # One batch is one compute pass, so an aborted batch leaves nothing in the KV cache.
        params.n_batch = params.n_ubatch = max(PREFILL_TOKENS_MAX, slots)
        params.n_seq_max = slots + self.slots_kept
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        params.swa_full = True  # a kept prefix can only be reused if no layer forgot it
        params.no_perf = True
        if kv_type != "f16":
            params.type_k = params.type_v = GGML_TYPES[kv_type]
            # Only flash attention reads such values; chosen automatically, it might not be.
            params.flash_attn_type = _llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = _llama.llama_init_from_model(self._model, params)
        if not context and kv_type != "f16":
            raise ModelLoadError(
                f"{path}: llama.cpp cannot keep this model's KV cache as {kv_type}; use f16."
            )
        checked(context, path, "context")
        # llama.cpp may round the context up; our arithmetic keeps to what was asked for.
        if _llama.llama_n_ctx(context) < self.context_tokens:
            _llama.llama_free(context)
            raise ModelLoadError(f"{path}: llama.cpp gave a smaller context than asked for")
        return context

    def _load_projector(self, path: str, threads: int) -> Projector:
        log.error = ""
        width = int(_llama.llama_model_n_embd_inp(self._model))
        return Projector(path, self._model, width, threads, log.callback, lambda: log.error)

    def _load_template(self) -> ChatTemplate | None:
        source = _llama.llama_model_chat_template(self._model, None)
        if source is None:
            return None
        return ChatTemplate(
            source.decode("utf-8", "replace"),
            bos=self._token_text(self._bos),
            eos=self._token_text(int(_llama.llama_vocab_eos(self._vocabulary))),
        )

    def _token_text(self, token: int) -> str:
        if not 0 <= token < self.vocabulary_size:  # -1: the model has no such token
            return ""
        text: bytes = _llama.llama_vocab_get_text(self._vocabulary, token)
        return text.decode("utf-8", "replace")

    def _make_batch(self) -> None:
        """A llama_batch whose arrays are numpy's: filling one is a few slice assignments."""
        size = max(PREFILL_TOKENS_MAX, self._slots)
        self._batch_tokens = np.zeros(size, np.int32)
        self._batch_positions = np.zeros(size, np.int32)
        self._batch_slots = np.zeros(size, np.int32)
        self._batch_slot_counts = np.ones(size, np.int32)
        self._batch_logits = np.zeros(size, np.int8)
        # seq_id is an array of pointers, one per token, each to that token's cell in _batch_slots.
        step = self._batch_slots.itemsize
        self._batch_slot_pointers = (
            np.uint64(self._batch_slots.ctypes.data) + np.arange(size, dtype=np.uint64) * step
        ).astype(np.uint64)
        batch = _llama.llama_batch()
        batch.token = pointer(self._batch_tokens, ctypes.c_int32)
        batch.pos = pointer(self._batch_positions, ctypes.c_int32)
        batch.n_seq_id = pointer(self._batch_slot_counts, ctypes.c_int32)
        batch.seq_id = pointer(self._batch_slot_pointers, ctypes.POINTER(ctypes.c_int32))
        batch.logits = pointer(self._batch_logits, ctypes.c_int8)
        self._batch = batch

    def close(self) -> None:
        if self._projector is not None:
            self._projector.close()
        if self._embedder is not None:
            self._embedder.close()
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

    @property
    def embedder(self) -> Embedder:
        assert self._embedder is not None  # only while it is being loaded
        return self._embedder

    def vocabulary_digest(self) -> bytes:
        """Equal for models whose tokens mean the same: texts, kinds and special tokens."""
        special = (
            _llama.llama_vocab_bos(self._vocabulary),
            _llama.llama_vocab_eos(self._vocabulary),
            _llama.llama_vocab_eot(self._vocabulary),
            *sorted(self.end_tokens),
        )
        digest = hashlib.sha256(repr(special).encode())
        for token in range(self.vocabulary_size):
            text = _llama.llama_vocab_get_text(self._vocabulary, token)
            kind = _llama.llama_vocab_get_attr(self._vocabulary, token)
            digest.update(b"%d %d " % (kind, len(text)) + text)
        return digest.digest()

    # -- text and tokens -----------------------------------------------------------------------

    @property
    def style(self) -> ChatStyle:
        """How its chat template has it think and call; plainly, if it has none."""
        return ChatStyle() if self._template is None else find_style(self._template)

    def prompt_tokens(
        self,
        prompt: Sequence[ChatMessage] | str | tuple[int, ...],
        views: dict[int, View] | None = None,
        tools: Sequence[str] = (),
        thinking: bool | None = None,
        effort: str | None = None,
    ) -> list[int]:
        """A prompt as tokens, with cells where it shows pictures; their views go into `views`.

        For the rest see `Request`. People's text never becomes a control token. Segments are
        tokenised apart. That is what makes them safe, and it puts the same token boundaries into a
        conversation's next prompt as generation put into its KV cache.
        Raises `RequestError` if it is empty, has unknown tokens or a picture that is none, or the
        template refuses it.
        """
        views = {} if views is None else views
        if isinstance(prompt, str):
            tokens = self._tokenise(Segment(prompt, trusted=False))
        elif prompt and isinstance(prompt[0], ChatMessage):
            if self._template is None:
                raise RequestError(
                    "This model has no chat template; ask /v1/completions with a plain prompt.",
                    param="messages",
                )
            tokens = []
            messages = [message for message in prompt if isinstance(message, ChatMessage)]
            for segment in self._template.render(messages, tools, thinking, effort):
                if isinstance(segment, Picture):
                    tokens += self._look(segment, views)
                else:
                    tokens += self._tokenise(segment)
        else:
            tokens = [token for token in prompt if isinstance(token, int)]
            self._check_tokens(tokens, "prompt")
        if self._add_bos and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        if not tokens:
            raise RequestError("The `prompt` is empty.", param="prompt")
        if tokens[-1] < 0:
            raise RequestError(
                "The model's chat template ends in an image; say something after it.",
                param="messages",
            )
        return tokens

    def _look(self, picture: Picture, views: dict[int, View]) -> list[int]:
        """Tokens and cells of a picture, whose views are added to `views`."""
        if self._projector is None:
            raise RequestError("This model cannot see images.", param="messages")
        tokens: list[int] = []
        for item in self._projector.look(picture.image):
            if isinstance(item, View):
                views[item.digest] = item
                tokens += cells(item.digest, item.cells)
            else:
                tokens.append(item)
        return tokens

    def _tokenise(self, segment: Segment) -> list[int]:
        return tokenise(self._vocabulary, segment.text, parse_special=segment.trusted)

    def piece(self, token: int) -> bytes:
        """The bytes of a token: maybe part of a character, empty for a control token."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token)
        return piece

    def shown_pieces(self, words: Sequence[str]) -> dict[int, bytes]:
        """Of these words, those that are tokens by themselves, and their bytes."""
        shown = {}
        for word in words:
            tokens = self._tokenise(Segment(word, trusted=True))
            if len(tokens) == 1:
                shown[tokens[0]] = word.encode()
        return shown

    def _whole_piece(self, token: int) -> bytes:
        """The bytes of a token as a grammar sees them: control tokens have some, too."""
        return self._read_piece(token, special=True)

    def _read_piece(self, token: int, *, special: bool = False) -> bytes:
        size = _PIECE_BYTES
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            count = _llama.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count
        raise DecodeError(f"token {token} has no piece")

    def sampler(self, sampling: Sampling, grammar: Grammar | None = None) -> Sampler:
        """A new chain; the caller closes it.

        Raises `RequestError` for tokens of no vocabulary, for numbers that are none, and for what
        is no grammar.
        """
        self._check_tokens([token for token, _ in sampling.logit_bias], "logit_bias")
        settings = [getattr(sampling, setting.name) for setting in dataclasses.fields(sampling)]
        numbers = [setting for setting in settings if isinstance(setting, float)]
        if not all(map(math.isfinite, [*numbers, *(bias for _, bias in sampling.logit_bias)])):
            raise RequestError("Sampling settings must be finite numbers.")
        rules: GrammarSampler | LazyGrammar | None = None
        if grammar is not None:
            self._check_grammar(grammar)
            rules = self._binding(grammar)
        return Sampler(self._vocabulary, self.vocabulary_size, sampling, rules)

    def _check_grammar(self, grammar: Grammar) -> None:
        """Raises `RequestError` for one that does not survive its trial."""
        if grammar.gbnf not in self._grammars:
            if len(grammar.gbnf.encode()) > GRAMMAR_BYTES_MAX:
                raise RequestError(
                    f"`{grammar.param}` makes a grammar of over {GRAMMAR_BYTES_MAX} bytes.",
                    param=grammar.param,
                    code="invalid_grammar",
                )
            if not survives(lambda: self._try_grammar(grammar)):
                raise RequestError(
                    f"`{grammar.param}` is no grammar that llama.cpp can follow.",
                    param=grammar.param,
                    code="invalid_grammar",
                )
            if len(self._grammars) >= _GRAMMARS_KEPT_MAX:
                del self._grammars[next(iter(self._grammars))]
            self._grammars[grammar.gbnf] = None

    def _binding(self, grammar: Grammar) -> GrammarSampler | LazyGrammar:
        """A checked grammar, from the beginning of an answer on or from somewhere in it."""

        def bind(before: bytes) -> GrammarSampler:
            compiled = self._compile(grammar.gbnf, before)
            if compiled is None:
                raise DecodeError("a grammar that compiled before does not compile again")
            return compiled

        if grammar.after is None:
            return bind(b"")
        return LazyGrammar(grammar.after, bind, self._whole_piece)

    def _compile(self, gbnf: str, before: bytes = b"") -> GrammarSampler | None:
        """`before`: what must be said before that which matches `gbnf`."""
        root = "root"
        if before:
            root = _START
            # Half a character cannot be said in a grammar; a token with one is then drawn anew.
            gbnf += f"\n{root} ::= {_literal(before.decode('utf-8', 'ignore'))} root\n"
        sampler = _llama.llama_sampler_init_grammar(
            self._vocabulary, gbnf.encode("utf-8", "replace"), root.encode()
        )
        return GrammarSampler(sampler) if sampler else None

    def _try_grammar(self, grammar: Grammar) -> bool:
        """Compile it and walk a few tokens into it; may crash or never end."""
        rules = self._compile(grammar.gbnf)
        if rules is None:
            return False
        candidates = Candidates(self.vocabulary_size)
        for step in range(_GRAMMAR_TRIAL_TOKENS):
            rules.strike(candidates.fill(np.zeros(self.vocabulary_size, np.float32)))
            admitted = np.flatnonzero(np.isfinite(candidates.logits))
            if not len(admitted):
                return step > 0
            token = int(admitted[step % len(admitted)])
            if token in self.end_tokens:
                break
            rules.accept(token)
        return True

    def _check_tokens(self, tokens: list[int], param: str) -> None:
        if any(not 0 <= token < self.vocabulary_size for token in tokens):
            raise RequestError(
                f"Token ids of this model are 0 to {self.vocabulary_size - 1}.", param=param
            )

    # -- decoding ------------------------------------------------------------------------------

    def trim(self, trim: Trim) -> bool:
        """Forget a slot's KV from `keep` on; False if this model could only forget all of it.

        Recurrent models keep a state and no history, so they cannot go back to a prefix.
        """
        keep = self._positions.of(trim.slot, trim.keep)
        if _llama.llama_memory_seq_rm(self._memory, trim.slot, keep, -1):
            self._positions.trim(trim.slot, trim.keep)
            return True
        if not _llama.llama_memory_seq_rm(self._memory, trim.slot, -1, -1):
            raise DecodeError(f"the KV cache of slot {trim.slot} cannot be cleared")
        self._positions.trim(trim.slot, 0)
        return False

    def copy(self, copy: Copy) -> None:
        """Share a slot's KV with another; only if the model `can_rewind`."""
        end = self._positions.of(copy.source, copy.tokens)
        _llama.llama_memory_seq_cp(self._memory, copy.source, copy.slot, 0, end)
        self._positions.copy(copy.source, copy.slot, copy.tokens)

    def save(self, slot: int, bytes_max: int) -> bytearray | None:
        """The KV of a slot, for `restore`; None if it is larger than it should be, or if pictures
        in it take fewer positions than cells, which a state does not say."""
        size = _llama.llama_state_seq_get_size(self._context, slot)
        if not 0 < size <= bytes_max or self._positions.are_moved(slot):
            return None
        state = bytearray(size)
        cells = (ctypes.c_uint8 * size).from_buffer(state)
        if _llama.llama_state_seq_get_data(self._context, cells, size, slot) != size:
            raise DecodeError(f"the KV of slot {slot} cannot be read")
        return state

    def restore(self, slot: int, state: bytearray) -> bool:
        """Put a state that nobody has touched into an empty slot; False if there is no room.

        llama.cpp finds a wrong length and another model's, but not a flipped bit.
        """
        cells = (ctypes.c_uint8 * len(state)).from_buffer(state)
        read = _llama.llama_state_seq_set_data(self._context, cells, len(state), slot)
        return bool(read == len(state))

    def decode(self, batch: Batch) -> bool:
        """Compute a batch of tokens; False if `abort` stopped it, then trim its slots to where
        they were."""
        self._fill(batch)
        return self._compute(self._batch)

    def _fill(self, batch: Batch) -> None:
        filled = 0
        for chunk in batch.chunks:
            end = filled + len(chunk.tokens)
            self._batch_tokens[filled:end] = chunk.tokens
            first = self._positions.of(chunk.slot, chunk.start)
            self._batch_positions[filled:end] = np.arange(first, first + len(chunk.tokens))
            self._batch_slots[filled:end] = chunk.slot
            self._batch_logits[filled:end] = 0
            self._batch_logits[end - chunk.outputs : end] = 1
            filled = end
        self._batch.n_tokens = filled

    def decode_view(self, chunk: Chunk, view: View) -> bool:
        """Compute a view that `prompt_tokens` has given, in place of its cells; as `decode`."""
        assert self._projector is not None
        first = self._positions.of(chunk.slot, chunk.start)
        seen = self._projector.embed(view, first)
        _llama.llama_set_causal_attn(self._context, seen.causal)
        try:
            for start in range(0, view.cells, len(self._batch_tokens)):
                part = slice(start, start + len(self._batch_tokens))
                vectors = np.ascontiguousarray(seen.vectors[part])
                if seen.places is None:
                    places = np.arange(first + start, first + start + len(vectors), dtype=np.int32)
                else:
                    places = np.ascontiguousarray(seen.places[:, part])
                batch = _llama.llama_batch()
                batch.n_tokens = len(vectors)
                batch.embd = pointer(vectors, ctypes.c_float)
                batch.pos = pointer(places, ctypes.c_int32)
                batch.n_seq_id, batch.seq_id = self._batch.n_seq_id, self._batch.seq_id
                batch.logits = self._batch.logits
                self._batch_slots[: len(vectors)] = chunk.slot
                self._batch_logits[: len(vectors)] = 0
                if not self._compute(batch):
                    return False
        finally:
            _llama.llama_set_causal_attn(self._context, True)
        self._positions.add(chunk.slot, chunk.start, view)
        return True

    def _compute(self, batch: Any) -> bool:
        code = _llama.llama_decode(self._context, batch)
        if code not in (_DECODED, _ABORTED):
            # 1 would be a full KV cache, which the scheduler's arithmetic rules out.
            raise DecodeError(f"llama_decode returned {code}")
        return bool(code == _DECODED)

    def draw(self, sampler: Sampler, row: int) -> int:
        """The next token from row `row` of the last batch."""
        logits = self._logits(row)
        if not math.isfinite(logits.max()):
            raise DecodeError("the model computes no numbers; its file may be damaged")
        token = sampler.draw(self._context, row, logits)
        if token is None:  # a dead end of the grammar is the end of the answer
            return min(self.end_tokens)
        if not 0 <= token < self.vocabulary_size:
            raise DecodeError(f"sampling gave token {token}")
        return token

    def logprobs(self, row: int, drawn: int, top: int) -> TokenLogprobs:
        """What row `row` of the last batch says of the token drawn from it, and the `top` best."""
        logits = self._logits(row)
        scores = logits - logits.max()
        scores -= math.log(np.exp(scores).sum())
        best = np.argpartition(scores, -top)[-top:] if top else np.zeros(0, np.int64)
        best = best[np.argsort(-scores[best])]
        entries = [Logprob(self.piece(int(t)), float(scores[t])) for t in (drawn, *best)]
        return TokenLogprobs(entries[0], tuple(entries[1:]))

    def _logits(self, row: int) -> np.ndarray[Any, Any]:
        logits = _llama.llama_get_logits_ith(self._context, row)
        if not logits:
            raise DecodeError(f"row {row} of the batch has no logits")
        return np.ctypeslib.as_array(logits, shape=(self.vocabulary_size,))

    def abort(self) -> None:
        """Make a running `decode` return False within milliseconds. From any thread."""
        self._abort_flag.set()

    def allow(self) -> None:
        """Take back `abort`, before the next `decode`."""
        self._abort_flag.clear()

    def set_threads(self, threads: int) -> None:
        _llama.llama_set_n_threads(self._context, threads, threads)


def quantize_q4_0(source: Path, destination: Path) -> None:
    """Write a Q4_0 version of a GGUF file; blocks for seconds. Raises `ModelLoadError`."""
    initialise()
    params = _llama.llama_model_quantize_default_params()
    params.ftype = _FTYPE_Q4_0
    params.allow_requantize = True
    code = _llama.llama_model_quantize(
        os.fsencode(source), os.fsencode(destination), ctypes.byref(params)
    )
    if code != 0:
        raise ModelLoadError(f"{source}: cannot be requantised to Q4_0")


def _literal(text: str) -> str:
    """Text as GBNF quotes it; control characters but line ends cannot harm it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = escaped.replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'
