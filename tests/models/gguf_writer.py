"""Writes small GGUF files, valid unless asked otherwise."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 32
LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 2,
    "llama.context_length": 512,
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.chat_template": "{{ messages }}",
    "tokenizer.ggml.tokens": ["a", "b"],
}


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...] = (64, 2)
    kind: int = 2  # Q4_0
    size: int = 72
    offset: int | None = None
    data: bytes = b""
    """Zeros, if it is empty."""


TENSORS = (Tensor("a"), Tensor("b", (64,), 0, 256))


def write_gguf(
    metadata: Mapping[str, Any] = LLAMA, tensors: Sequence[Tensor] = TENSORS, version: int = 3
) -> bytes:
    """The bytes of a file."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += string(key) + value_of(value)
    end = 0
    weights = bytearray()
    for tensor in tensors:
        offset = end if tensor.offset is None else tensor.offset
        if tensor.data:
            weights.extend(bytes(max(0, offset - len(weights))))
            weights[offset : offset + len(tensor.data)] = tensor.data
        out += string(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        out += struct.pack("<IQ", tensor.kind, offset)
        end = -(-(offset + tensor.size) // ALIGNMENT) * ALIGNMENT
    out += bytes(-len(out) % ALIGNMENT)
    return out + weights + bytes(end - len(weights))


def string(text: str) -> bytes:
    """With its length before it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value_of(value: Any) -> bytes:
    """With its type before it; whole numbers are unsigned 32-bit ones."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
        case [bool(), *_]:
            return struct.pack("<IIQ", 9, 7, len(value)) + struct.pack(f"<{len(value)}?", *value)
        case [float(), *_]:
            return struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
        case [*_]:
            return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
    raise TypeError(value)
