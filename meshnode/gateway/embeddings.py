"""Embeddings and reranking: JSON to and from the engine's vocabulary. Pure.

Decides which fields of /v1/embeddings and /v1/rerank work and what the answers look like. Does not
know engines, peers or HTTP.

Between nodes, vectors always travel in base64: a quarter of the bytes, and exact. The gateway that
the client asked writes them as it was asked to. The shapes follow OpenAI's reference; those of
rerank follow Jina's and Cohere's, as far as they agree.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import msgspec

from meshnode.engine import EMBED_INPUTS_MAX, EmbedRequest
from meshnode.errors import EngineError, RequestError
from meshnode.gateway.fields import Shape, decode_body
from meshnode.gateway.openai import NAME_CHARS_MAX, TOKEN_ID_MAX

__all__ = [
    "EMBED_PATH",
    "EMBED_SHAPE",
    "RERANK_ALIAS",
    "RERANK_PATH",
    "RERANK_SHAPE",
    "Embed",
    "Rerank",
    "Vectors",
    "decode_embed",
    "decode_rerank",
    "embed_of",
    "encode_floats",
    "floats",
    "read_vectors",
]

EMBED_PATH = "/v1/embeddings"
RERANK_PATH = "/v1/rerank"
RERANK_ALIAS = "/rerank"

_FLOAT_BYTES = 4
_json = msgspec.json.Encoder()

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]
_TokenId = Annotated[int, msgspec.Meta(ge=0, le=TOKEN_ID_MAX)]


_Input = str | Sequence[str | int | list[int]]


class _EmbedBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: _Name
    input: str | list[str | _TokenId | list[_TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    user: str | None = None  # harmless: it changes no answer


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class _RerankBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: _Name
    query: Annotated[str, msgspec.Meta(min_length=1)]
    documents: Annotated[
        list[str | _Document], msgspec.Meta(min_length=1, max_length=EMBED_INPUTS_MAX)
    ]
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool | None = None


EMBED_SHAPE = Shape(_EmbedBody, {})
RERANK_SHAPE = Shape(_RerankBody, {})
_embed_decoder = msgspec.json.Decoder(_EmbedBody)
_rerank_decoder = msgspec.json.Decoder(_RerankBody)


# ---------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Embed:
    """The body of /v1/embeddings, understood. Never streamed: another replica begins it anew."""

    stream: ClassVar[Literal[False]] = False
    is_resumable: ClassVar[Literal[False]] = False

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"

    def embed_request(self, id: str) -> EmbedRequest:
        """The same in the engine's words."""
        return EmbedRequest(id, self.inputs, dimensions=self.dimensions)

    @property
    def body(self) -> bytes:
        """The request as nodes pass it on."""
        return _json.encode(
            {
                "model": self.model,
                "input": self.inputs,
                "encoding_format": "base64",
                "dimensions": self.dimensions,
            }
        )

    def encode(self, id: str, vectors: Sequence[bytes], prompt_tokens: int) -> bytes:
        """In base64, whatever the client is to get."""
        return _json.encode(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": vector}
                    for index, vector in enumerate(vectors)
                ],
                "model": self.model,
                "usage": _usage(prompt_tokens),
            }
        )


def decode_embed(body: bytes) -> Embed:
    """Understand the body of /v1/embeddings. Raises `RequestError` naming the field."""
    asked: _EmbedBody = decode_body(_embed_decoder, body)
    embed = embed_of(asked.model, asked.input, asked.dimensions)
    return replace(embed, encoding_format=asked.encoding_format or "float")


def embed_of(model: str, input: _Input, dimensions: int | None = None) -> Embed:
    """A request in the forms that its input may have. Raises `RequestError` naming `input`."""
    return Embed(model, _inputs(input), dimensions)


def _inputs(given: _Input) -> tuple[str | tuple[int, ...], ...]:
    """One text, several, one list of token ids, or several; a list is of one kind."""
    items: list[str | int | list[int]] = [given] if isinstance(given, str) else list(given)
    if items and all(isinstance(item, int) for item in items):
        items = [[item for item in items if isinstance(item, int)]]
    if not 1 <= len(items) <= EMBED_INPUTS_MAX:
        raise _bad_input("input", f"has 1 to {EMBED_INPUTS_MAX} items")
    inputs: list[str | tuple[int, ...]] = []
    for index, item in enumerate(items):
        if isinstance(item, int) or type(item) is not type(items[0]):
            raise _bad_input("input", "is of one kind: texts, or token ids, or lists of token ids")
        if not item:
            raise _bad_input(f"input[{index}]", "is empty")
        inputs.append(item if isinstance(item, str) else tuple(item))
    return tuple(inputs)


def _bad_input(param: str, problem: str) -> RequestError:
    return RequestError(f"`{param}` {problem}.", param=param, code="invalid_value")


def _usage(prompt_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}


# ---------------------------------------------------------------------------------------------
# Their answer, read back: what a peer said is hostile until it has been read
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vectors:
    """An answer of /v1/embeddings: little-endian 32-bit floats, a vector for each input."""

    vectors: tuple[bytes, ...]
    prompt_tokens: int


class _Row(msgspec.Struct):
    embedding: bytes  # in JSON: base64


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Answer(msgspec.Struct):
    data: list[_Row]
    usage: _Usage


_answer = msgspec.json.Decoder(_Answer)


def read_vectors(embed: Embed, answer: bytes) -> Vectors:
    """What `Embed.encode` wrote. Raises `EngineError` if it is no answer to this request."""
    try:
        said = _answer.decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError("The replica's vectors cannot be read. Ask again.") from error
    vectors = tuple(row.embedding for row in said.data)
    sizes = {len(vector) for vector in vectors}
    if (
        len(vectors) != len(embed.inputs)
        or len(sizes) != 1
        or sizes.pop() % _FLOAT_BYTES
        or not all(math.isfinite(number) for vector in vectors for number in floats(vector))
    ):
        raise EngineError("The replica's vectors are not those asked for. Ask again.")
    return Vectors(vectors, said.usage.prompt_tokens)


def encode_floats(embed: Embed, answer: Vectors) -> Iterator[bytes]:
    """The answer with numbers instead of base64, a vector at a time."""
    yield b'{"object":"list","data":['
    for index, vector in enumerate(answer.vectors):
        row = {"object": "embedding", "index": index, "embedding": floats(vector)}
        yield (b"," if index else b"") + _json.encode(row)
    tail = _json.encode({"model": embed.model, "usage": _usage(answer.prompt_tokens)})
    yield b"]," + tail[1:]


def floats(vector: bytes) -> list[float]:
    """The numbers of a vector; a float32 is exact in JSON's."""
    numbers = array("f", vector)
    if not _IS_LITTLE_ENDIAN:
        numbers.byteswap()
    return numbers.tolist()


_IS_LITTLE_ENDIAN = array("H", b"\x01\x00")[0] == 1


# ---------------------------------------------------------------------------------------------
# Rerank
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rerank:
    """The body of /v1/rerank, understood."""

    stream: ClassVar[Literal[False]] = False
    is_resumable: ClassVar[Literal[False]] = False

    model: str
    query: str
    documents: tuple[str, ...]
    top_n: int | None = None
    return_documents: bool = False

    def embed_request(self, id: str) -> EmbedRequest:
        return EmbedRequest(id, self.documents, query=self.query)

    def encode(self, id: str, vectors: Sequence[bytes], prompt_tokens: int) -> bytes:
        """The most relevant first; the scores are the model's own, on its own scale."""
        scores = [floats(vector)[0] for vector in vectors]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        results: list[dict[str, object]] = []
        for index in order[: self.top_n]:
            result: dict[str, object] = {"index": index, "relevance_score": scores[index]}
            if self.return_documents:
                result["document"] = {"text": self.documents[index]}
            results.append(result)
        return _json.encode(
            {
                "id": f"rerank-{id}",
                "object": "list",
                "model": self.model,
                "results": results,
                "usage": _usage(prompt_tokens),
            }
        )


def decode_rerank(body: bytes) -> Rerank:
    """Understand the body of /v1/rerank. Raises `RequestError` naming the field."""
    asked: _RerankBody = decode_body(_rerank_decoder, body)
    documents = tuple(
        each.text if isinstance(each, _Document) else each for each in asked.documents
    )
    return Rerank(asked.model, asked.query, documents, asked.top_n, asked.return_documents is True)
