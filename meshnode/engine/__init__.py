"""From a request to tokens: what every engine looks like to the rest of the node.

An engine runs one model. It knows tokens, sequences and KV caches; it knows nothing of peers,
routing or HTTP. The parts, in data-flow order:

* `style.py`      how a model's chat template has it think and call tools
* `scheduler.py`  sans-IO policy: waiting and running sequences in, the next batch out
* `kv.py`         what the scheduler knows of the KV cache: slots, and the cells they share
* `prefix.py`     its choices of what a sequence begins with, and `saved.py` of what is kept outside
* `states.py`     what is kept outside, as bytes in memory and on disk
* `prepare.py`    performs on the model what a batch wants changed first
* `cells.py`      what stands for a picture among tokens
* `llama.py`      mechanism: a loaded model, inside the child process; only it, `embedder.py`,
                  `vision.py` and `native.py`, which all need, import llama_cpp
* `vision.py`     mechanism: libmtmd, which makes embeddings of pictures
* `pictures.py`   decodes pictures, within bounds
* `trigger.py`    where in an answer a grammar begins to bind
* `speculate.py`  sans-IO: guesses at the next tokens, and which of them stand
* `payoff.py`     sans-IO: whether guessing pays, by what it did
* `draft.py`      a small model that guesses for a large one
* `embedding.py`  sans-IO policy: which inputs are read next for embeddings
* `embedder.py`   mechanism: a model's other context, that turns inputs into vectors
* `trial.py`      tries a client's grammar where a crash costs nothing
* `reading.py`    joins these two beside the answers
* `child.py`      the child process's main loop: requests in, deltas out, one step at a time
* `head_model.py` mechanism: the last layers of a cut model, which begin with activations
* `head.py`       the child's main loop where only these are loaded: it plans for a pipeline
* `process.py`    `EngineProcess`: the Trio side that starts, watches and talks to the child
* `echo.py`       a deterministic engine without a model, for protocol tests only

This file holds the vocabulary they share.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from meshnode.config import Speculate

# OpenAI's penalties look at the whole answer; this is longer than almost all of them.
PENALTY_TOKENS_MAX = 2048
# Far more than any schema that a small model could follow.
GRAMMAR_BYTES_MAX = 64 * 1024
# OpenAI's own bounds.
TOP_LOGPROBS_MAX = 20
EMBED_INPUTS_MAX = 2048
EMBED_TOKENS_MAX = 300_000
# 8 MiB of them, so that an answer in base64 fits into what a gateway takes from a peer.
EMBED_FLOATS_MAX = 2 * 1024 * 1024
# Each takes some hundred tokens: more would leave a default context no room for an answer.
IMAGES_MAX = 16
# Larger than a telephone's photo; all of a request together fit into one body as base64.
IMAGE_BYTES_MAX = 8 * 1024 * 1024
IMAGES_BYTES_MAX = 16 * 1024 * 1024

__all__ = [
    "EMBED_FLOATS_MAX",
    "EMBED_INPUTS_MAX",
    "EMBED_TOKENS_MAX",
    "GRAMMAR_BYTES_MAX",
    "IMAGES_BYTES_MAX",
    "IMAGES_MAX",
    "IMAGE_BYTES_MAX",
    "PENALTY_TOKENS_MAX",
    "TOP_LOGPROBS_MAX",
    "After",
    "CallStyle",
    "ChatMessage",
    "ChatStyle",
    "Continuation",
    "Delta",
    "EmbedRequest",
    "Embedded",
    "Engine",
    "EngineStats",
    "Finish",
    "FunctionCall",
    "Grammar",
    "Image",
    "Logprob",
    "ModelCard",
    "Purpose",
    "Request",
    "Sampling",
    "Speculate",
    "SpeculationStats",
    "Thinking",
    "TokenLogprobs",
    "Usage",
    "images_of",
]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known of a model file without loading it.

    `digest` is the hex tree hash of the GGUF content and is the model's identity; `name` is for
    people. Two files with one name and different digests are two models.
    """

    name: str
    digest: str
    path: str
    size_bytes: int
    architecture: str
    quantization: str
    parameters: int
    context_tokens_train: int


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a message: the bytes of a file, and before which character of the text it
    stands. `low_detail`: a glance at it is enough."""

    data: bytes
    at: int
    low_detail: bool = False


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A tool that was called in an earlier turn; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. All of it is plain text that can never become a control token, and pictures.

    `images` are in the order in which they stand in `content`. `reasoning` and `calls` are an
    assistant's, `call_id` names the call that a `tool` answers.
    """

    role: str
    content: str
    images: tuple[Image, ...] = ()
    reasoning: str = ""
    calls: tuple[FunctionCall, ...] = ()
    call_id: str = ""


Purpose = Literal["generate", "embed", "rank"]
"""What a model was made for. One that generates can make embeddings as well."""

Thinking = Literal["none", "may", "opened"]
"""Whether an answer begins with thoughts, up to `</think>`: never, if it begins with `<think>`, or
always, because the prompt ends with that tag."""

CallStyle = Literal["hermes", "llama", "mistral"]
"""How calls of tools are written; see `gateway/calls.py`."""


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """How a model's chat template has it think and call tools.

    `thinking` is what it does unless told otherwise, `thinking_on` and `thinking_off` what it does
    when told (None: it has no such switch), `has_effort` whether it can be told how hard to think.
    `calls` is how it writes the calls of tools that its template was given; None if it knows no
    tools, or has words for them that nobody here can read.
    """

    thinking: Thinking = "none"
    thinking_on: Thinking | None = None
    thinking_off: Thinking | None = None
    has_effort: bool = False
    calls: CallStyle | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Defaults are llama.cpp's; temperature 0 is greedy.

    All penalties look at the answer, not at the prompt, so an answer that goes on elsewhere is
    penalised alike. `repeat_penalty` (1 is off) looks at its last `repeat_last_n` tokens, DRY at
    its last `dry_penalty_last_n`. Mirostat (0 is off) takes the place of the four filters by rank
    and probability.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = PENALTY_TOKENS_MAX
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1


@dataclass(frozen=True, slots=True)
class After:
    """Where a grammar begins to bind: after the first of `words` (none of them empty).

    `at_start`: such a word counts only at the beginning of the answer, blanks aside. Words in
    thoughts do not count.
    """

    words: tuple[str, ...]
    at_start: bool = False
    thinking: Thinking = "none"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match, in llama.cpp's GBNF; its first rule is `root`.

    `param` is the field of the client's request that it comes from, to be named if it is none.
    With `after`, the answer is free up to there, and only the rest must match.
    """

    gbnf: str
    param: str = "grammar"
    after: After | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """How far an answer had come when its engine was lost.

    `tokens` have been decoded, and `chars` characters of their text have been shown. (These are
    more than the tokens release by themselves if the end of the answer was shown but not told.)
    `thoughts` counts the tokens of an answer's thoughts; with `thinking`, these go on.
    """

    tokens: tuple[int, ...]
    chars: int
    thoughts: int = 0
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. Exactly one of the three prompt forms is used.

    `session` is the 16-byte session key of `protocol.dispatch`: requests with equal keys are
    turns of one conversation, and the engine keeps their KV cache together.
    `n` answers are drawn from one computed prompt, each with a slot of its own; choice i has the
    seed `seed + i`.
    `max_tokens` None means up to the end of the context.
    `logprobs` asks for every token's probability beside so many of the likeliest (0 to
    `TOP_LOGPROBS_MAX`); None for none.
    `tools` are what a model may call, each in OpenAI's JSON, for its own chat template to tell;
    only for one whose `ChatStyle` knows calls. `thinking` and `effort` are for the template, too.
    `shown` are control tokens of which the answer's text tells; of all others it does not.
    `continuation`: the answer goes on from there; what it counts, `max_tokens` and the usage
    include what came before, and stop strings may begin in it.
    """

    id: str
    session: bytes
    prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    continuation: Continuation | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    n: int = 1
    tools: tuple[str, ...] = ()
    thinking: bool | None = None
    effort: str | None = None
    shown: tuple[str, ...] = ()


def images_of(prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]) -> tuple[Image, ...]:
    """All that its messages show, in order."""
    messages = (item for item in prompt if isinstance(item, ChatMessage))
    return tuple(image for message in messages for image in message.images)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; `cached_tokens` of the prompt were found in a kept KV cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's bytes, and the natural logarithm of its probability."""

    piece: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found a token of the answer, and the likeliest, best first.

    These are the model's own probabilities, before temperature, penalties and grammar.
    """

    drawn: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """Some text, always whole UTF-8 characters, from `tokens` newly decoded tokens.

    `ids` are these tokens; empty if the engine does not tell them, so that its answers cannot be
    continued by another. `logprobs`, if asked for, has one entry for each that has text to show.
    """

    text: str
    tokens: int = 1
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of the answer number `index`; its last event. `Request.n` of them come.

    `stop` is the stop string that ended it, if one did.
    """

    reason: Literal["stop", "length"]
    usage: Usage
    index: int = 0
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A vector for each of `inputs`; or, with a `query`, how relevant each of them is to it.

    1 to `EMBED_INPUTS_MAX` inputs of `EMBED_TOKENS_MAX` tokens together, none of them empty; with
    a query they are texts. Text gets the special tokens that the model expects around it, token
    ids are taken as they are. `dimensions`: what a vector must have; None for what it has.
    """

    id: str
    inputs: tuple[str | tuple[int, ...], ...]
    query: str | None = None
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """What becomes of an `EmbedRequest` that was accepted.

    `vectors` come in the order of the inputs, each as little-endian 32-bit floats: of length 1,
    or with a query just one number, the larger the more relevant, on the model's own scale.
    Iterating raises `EngineError` if the engine dies midway.
    """

    prompt_tokens: int
    vectors: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Guessing ahead, since the engine was loaded: `passes` had guesses in them, `proposed`
    tokens in all, of which `accepted` were what the model drew. `on`: in the latest pass."""

    on: bool
    passes: int
    proposed: int
    accepted: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A frozen snapshot, cheap enough to take for every advert and status page.

    `sessions` holds the session keys whose KV is kept, most recently used last; `saved_tokens` of
    KV are outside of the cache, in memory or on disk.
    Rates are tokens per second, measured (0.0 before the first measurement).
    `speculation` is None if it is not wanted or the model cannot. `sees`: it takes pictures.
    """

    card: ModelCard
    state: Literal["loading", "ready", "failed", "stopped"]
    progress: float
    error: str | None
    context_tokens: int
    slots: int
    slots_busy: int
    queue_depth: int
    kv_tokens_free: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    memory_bytes: int
    sessions: tuple[bytes, ...]
    saved_tokens: int = 0
    style: ChatStyle = ChatStyle()
    speculation: SpeculationStats | None = None
    purpose: Purpose = "generate"
    sees: bool = False


class Engine(Protocol):
    """One model that answers requests."""

    def stats(self) -> EngineStats: ...

    def generate(
        self, request: Request
    ) -> AbstractAsyncContextManager[AsyncIterator[Delta | Finish]]:
        """Enter: the request is tokenised and queued (raises `ContextLengthError`,
        `RequestError`, `EngineBusyError`, `EngineError` before any output).
        Iterate: `Delta`s, and after those of a choice its `Finish`; raises `EngineError` if the
        child dies midway.
        Leave early: the sequence is cancelled within one decode step; its KV stays for reuse.
        """
        ...

    def embed(self, request: EmbedRequest) -> AbstractAsyncContextManager[Embedded]:
        """Enter: the inputs are tokenised and queued. Raises as `generate` does: `RequestError`
        names the input that is too long, or says what else the model is for.
        Leave early: what is left of it is not computed.
        """
        ...

    async def count(self, request: Request) -> int:
        """How many tokens the prompt of `request` has, as `Usage.prompt_tokens` would say, however
        many that are. Nothing is computed. Raises as `generate` does, but for its length.
        """
        ...
