"""An engine without a model, for tests of everything around engines; no option selects it.

Its answer is the last message, one word per token. It keeps the contract of `Engine` to the
letter: counts, cached prefixes, slots, stop strings, limits and cancellation are real, only the
tokens are not. Texts with more words in common have closer vectors, and rank higher.
Deterministic, and safe under a virtual clock.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from meshnode.engine import (
    EMBED_INPUTS_MAX,
    ChatMessage,
    Delta,
    Embedded,
    EmbedRequest,
    EngineStats,
    Finish,
    ModelCard,
    Request,
    Usage,
    images_of,
)
from meshnode.engine.kv import common_prefix
from meshnode.engine.text import AnswerText
from meshnode.errors import (
    ContextLengthError,
    EngineBusyError,
    EngineError,
    NoVisionError,
    RequestError,
)

CONTEXT_TOKENS = 4096
BUSY_RETRY_AFTER_S = 1.0
# Kept conversations; the least recently used is forgotten first.
SESSIONS_MAX = 8
# Each word adds to one of so many numbers.
DIMENSIONS = 64


def echo_card(name: str = "echo") -> ModelCard:
    """A card for an echo engine; equal names give equal digests."""
    return ModelCard(
        name=name,
        digest=name.encode().hex().ljust(64, "0")[:64],
        path="",
        size_bytes=0,
        architecture="echo",
        quantization="none",
        parameters=0,
        context_tokens_train=CONTEXT_TOKENS,
    )


class EchoEngine:
    """Answers with the last message. `break_after_tokens` makes every answer fail midway."""

    def __init__(
        self,
        card: ModelCard | None = None,
        *,
        slots: int = 4,
        token_interval_s: float = 0.0,
        break_after_tokens: int | None = None,
    ) -> None:
        self._card = card or echo_card()
        self._slots = slots
        self._token_interval_s = token_interval_s
        self._break_after_tokens = break_after_tokens
        self._busy = 0
        self._sessions: dict[bytes, list[str]] = {}

    def stats(self) -> EngineStats:
        return EngineStats(
            card=self._card,
            state="ready",
            progress=1.0,
            error=None,
            context_tokens=CONTEXT_TOKENS,
            slots=self._slots,
            slots_busy=self._busy,
            queue_depth=0,
            kv_tokens_free=CONTEXT_TOKENS,
            prefill_tokens_per_s=0.0,
            decode_tokens_per_s=0.0,
            memory_bytes=0,
            sessions=tuple(self._sessions),
        )

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[AsyncIterator[Delta | Finish]]:
        """See `Engine.generate`."""
        await trio.lowlevel.checkpoint()
        if request.logprobs is not None:
            raise RequestError("An echo has no probabilities.", param="logprobs")
        if request.grammar is not None:
            raise RequestError("An echo keeps to no grammar.", param=request.grammar.param)
        if request.n != 1:
            raise RequestError("There is only one echo.", param="n")
        if images_of(request.prompt):
            raise NoVisionError(self._card.name)
        prompt, answer = _words(request)
        if not prompt:
            raise RequestError("The prompt is empty.", param="messages")
        if len(prompt) + (request.max_tokens or 1) > CONTEXT_TOKENS:
            raise ContextLengthError(len(prompt), request.max_tokens, CONTEXT_TOKENS)
        with self._slot():
            yield self._events(request, prompt, answer)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._busy >= self._slots:
            raise EngineBusyError("All echo slots are busy.", BUSY_RETRY_AFTER_S)
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    @asynccontextmanager
    async def embed(self, request: EmbedRequest) -> AsyncIterator[Embedded]:
        """See `Engine.embed`."""
        await trio.lowlevel.checkpoint()
        if request.dimensions not in (None, DIMENSIONS):
            raise RequestError(f"`dimensions`: an echo has {DIMENSIONS}.", param="dimensions")
        if not 1 <= len(request.inputs) <= EMBED_INPUTS_MAX:
            raise RequestError(f"`input`: 1 to {EMBED_INPUTS_MAX} inputs.", param="input")
        inputs = [[word.strip() for word in _prompt_words(each)] for each in request.inputs]
        for index, words in enumerate(inputs):
            if len(words) > CONTEXT_TOKENS or not words:
                raise RequestError(
                    f"`input[{index}]` has {len(words)} tokens; an echo reads 1 to "
                    f"{CONTEXT_TOKENS}.",
                    param=f"input[{index}]",
                )
        with self._slot():
            yield Embedded(sum(map(len, inputs)), self._vectors(inputs, request.query))

    async def count(self, request: Request) -> int:
        """See `Engine.count`."""
        await trio.lowlevel.checkpoint()
        if images_of(request.prompt):
            raise NoVisionError(self._card.name)
        return len(_words(request)[0])

    async def _vectors(self, inputs: list[list[str]], query: str | None) -> AsyncIterator[bytes]:
        for done, words in enumerate(inputs):
            await trio.sleep(self._token_interval_s * len(words))
            if done == self._break_after_tokens:
                raise EngineError("The echo engine breaks here, as it was told to.")
            if query is None:
                yield _vector(words)
            else:
                yield struct.pack("<f", len(set(words) & set(query.split())))

    async def _events(
        self, request: Request, prompt: list[str], answer: list[str]
    ) -> AsyncIterator[Delta | Finish]:
        kept = self._sessions.pop(request.session, [])
        cached_tokens = min(common_prefix(kept, prompt), len(prompt) - 1)
        text, completion_tokens, unsent = AnswerText(request.stop), 0, 0
        tokens_max = request.max_tokens or CONTEXT_TOKENS - len(prompt)
        for word in answer[:tokens_max]:
            await trio.sleep(self._token_interval_s)
            if completion_tokens == self._break_after_tokens:
                raise EngineError("The echo engine breaks here, as it was told to.")
            completion_tokens += 1
            unsent += 1
            if safe := text.feed(word.encode()):
                yield Delta(safe, unsent)
                unsent = 0
            if text.stopped:
                break
        if rest := text.flush():
            yield Delta(rest, unsent)
        self._sessions[request.session] = prompt + answer[:completion_tokens]
        while len(self._sessions) > SESSIONS_MAX:
            del self._sessions[next(iter(self._sessions))]
        cut = len(answer) > tokens_max and not text.stopped
        usage = Usage(len(prompt), cached_tokens, completion_tokens)
        yield Finish("length" if cut else "stop", usage)


def _vector(words: list[str]) -> bytes:
    counts = [0.0] * DIMENSIONS
    for word in words:
        counts[zlib.crc32(word.encode()) % DIMENSIONS] += 1.0
    length = math.hypot(*counts)
    return struct.pack(f"<{DIMENSIONS}f", *(count / length for count in counts))


def _prompt_words(prompt: str | tuple[int, ...]) -> list[str]:
    return _split(prompt) if isinstance(prompt, str) else [f" {token}" for token in prompt]


def _words(request: Request) -> tuple[list[str], list[str]]:
    """The prompt's tokens and the answer's: words with the space before them."""
    prompt = request.prompt
    if isinstance(prompt, str):
        words = _split(prompt)
        return words, words
    messages = [message for message in prompt if isinstance(message, ChatMessage)]
    if messages:
        words = [word for message in messages for word in _split(message.content)]
        return words, _split(messages[-1].content)
    words = [f" {token}" for token in prompt]
    return words, words


def _split(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)
