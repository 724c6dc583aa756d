"""Counting a prompt's tokens: how nodes ask each other, and what they answer. Pure.

Decides that a node with the model counts, by its chat template and its vocabulary, what a chat
request would cost; other APIs' ways to ask are translated to this one (`dialects/`). Does not know
engines, peers or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import msgspec

from meshnode.errors import EngineError
from meshnode.gateway.openai import CHAT_PATH, Call, decode_chat

__all__ = ["COUNT_PATH", "Count", "decode_count", "encode_count", "read_count"]

COUNT_PATH = f"{CHAT_PATH}/count"
"""Between nodes only: OpenAI has no such path."""


@dataclass(frozen=True, slots=True)
class Count:
    """A chat request of which only the prompt's length is wanted. Never streamed."""

    stream: ClassVar[Literal[False]] = False
    is_resumable: ClassVar[Literal[False]] = False

    call: Call

    @property
    def model(self) -> str:
        return self.call.model

    @property
    def images_bytes(self) -> int:
        return self.call.images_bytes


class _Counted(msgspec.Struct):
    prompt_tokens: int


_counted = msgspec.json.Decoder(_Counted)


def decode_count(body: bytes) -> Count:
    """`body` is that of a chat request. Raises `RequestError` naming the field."""
    return Count(decode_chat(body))


def encode_count(prompt_tokens: int) -> bytes:
    return msgspec.json.encode(_Counted(prompt_tokens))


def read_count(answer: bytes) -> int:
    """What `encode_count` wrote. Raises `EngineError` if a peer wrote something else."""
    try:
        return _counted.decode(answer).prompt_tokens
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EngineError("The replica's count cannot be read. Ask again.") from None
