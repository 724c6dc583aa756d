"""Requests for a server of another kind: read as little as it takes to route them. Pure.

Decides what of such a body must be understood here: which model it names, which chat it belongs
to. Everything else goes on unread, known to us or not: the server judges it, not we.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from meshnode.engine import ChatMessage
from meshnode.errors import RequestError
from meshnode.gateway import VIA_HEADER
from meshnode.gateway.fields import decode_body
from meshnode.gateway.openai import NAME_CHARS_MAX

__all__ = ["Passed", "decode_passed", "decode_via", "understand"]

Strict = TypeVar("Strict")
"""What a body means where every field of it is judged here."""
_VIA = re.compile(r"[A-Za-z0-9-]{1,64}(,[A-Za-z0-9-]{1,64}){0,15}")


@dataclass(frozen=True, slots=True)
class Passed:
    """What of a body is understood; `prompt` is what session keys are drawn from."""

    model: str
    prompt: tuple[ChatMessage, ...] | str
    prompt_cache_key: str | None
    user: str | None


class _Named(msgspec.Struct):
    model: Any = None


class _Message(msgspec.Struct):
    role: str
    content: Any = None


_named = msgspec.json.Decoder(_Named)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_BAD = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def understand(
    body: bytes, decode: Callable[[bytes], Strict], is_fronted: Callable[[str], bool]
) -> Strict | Passed:
    """A client's request: by `decode`, unless it is for a server that knows better.

    Raises `RequestError`.
    """
    try:
        model = _named.decode(body).model
    except _BAD:
        return decode(body)  # says what is wrong with it
    return decode_passed(body) if isinstance(model, str) and is_fronted(model) else decode(body)


def decode_passed(body: bytes) -> Passed:
    """Raises `RequestError` if the body is no JSON object, or names no model."""
    members: dict[str, msgspec.Raw] = decode_body(_members, body)
    model = _text(members, "model")
    if not model or len(model) > NAME_CHARS_MAX:
        raise RequestError("`model` must name a model.", param="model", code="invalid_value")
    return Passed(
        model=model,
        prompt=_opening(members),
        prompt_cache_key=_text(members, "prompt_cache_key"),
        user=_text(members, "user"),
    )


def decode_via(header: str | None) -> tuple[str, ...]:
    """The nodes that have passed the request on. Raises `RequestError`."""
    if header is None:
        return ()
    if not _VIA.fullmatch(header):
        raise RequestError(f"`{VIA_HEADER}` must be peer ids.", param=VIA_HEADER)
    return tuple(header.split(","))


def _opening(members: Mapping[str, msgspec.Raw]) -> tuple[ChatMessage, ...] | str:
    """How the conversation began, if that can be seen."""
    try:
        messages = msgspec.json.decode(members["messages"], type=list[_Message])
    except (KeyError, *_BAD):
        return _text(members, "prompt") or ""
    return tuple(ChatMessage(each.role, _said(each.content)) for each in messages)


def _said(content: object) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _text(members: Mapping[str, msgspec.Raw], name: str) -> str | None:
    """The member `name`, if it is a string."""
    try:
        return msgspec.json.decode(members[name], type=str)
    except (KeyError, *_BAD):
        return None
