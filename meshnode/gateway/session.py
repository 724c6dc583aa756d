"""Which requests are turns of one conversation. Pure.

Decides the 16-byte session key that dispatch ranks by and engines keep KV caches under. Does not
know who serves what. Keys are salted per tenant: nobody can name, and so continue or displace,
another tenant's session.
"""

from __future__ import annotations

import hashlib
import secrets

from meshnode.engine import ChatMessage
from meshnode.gateway.openai import Call
from meshnode.gateway.passing import Passed

__all__ = ["SESSION_BYTES", "session_key", "spread"]

SESSION_BYTES = 16
# A plain prompt grows at its end from turn to turn; its beginning is what the turns share.
OPENING_CHARS = 1024
OPENING_TOKENS = 256


def session_key(call: Call | Passed, *, header: str | None, tenant: bytes) -> bytes:
    """The key of a request: as its caller named it, else by how its conversation opened.

    In order: `prompt_cache_key`, `header` (X-Session-Id), `user`, else model, system text and
    first user message. `tenant` is the name of the caller's API key, b"" without one.
    """
    parts: tuple[str, ...]
    if call.prompt_cache_key:
        parts = ("prompt_cache_key", call.prompt_cache_key)
    elif header:
        parts = ("x-session-id", header)
    elif call.user:
        parts = ("user", call.user)
    else:
        parts = ("opening", call.model, *_opening(call.prompt))
    # The tenant's own hash is the key: BLAKE2b takes 64 bytes at most.
    salt = hashlib.blake2b(tenant, digest_size=32).digest()
    digest = hashlib.blake2b(digest_size=SESSION_BYTES, key=salt, person=b"meshnode.session")
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def spread() -> bytes:
    """A key for a request that is no turn of anything: one of so few that they displace nothing
    that is remembered of chats, and of enough to give each replica its share."""
    return secrets.token_bytes(1).rjust(SESSION_BYTES, b"\0")


def _opening(prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]) -> tuple[str, ...]:
    if isinstance(prompt, str):
        return ("text", prompt[:OPENING_CHARS])
    messages: list[str] = []
    tokens: list[int] = []
    for item in prompt:
        if isinstance(item, int):
            tokens.append(item)
        elif item.role == "system" or item.role == "user":
            messages += (item.role, item.content)
            if item.role == "user":
                break
    if tokens:
        return ("tokens", ",".join(map(str, tokens[:OPENING_TOKENS])))
    return ("chat", *messages)
