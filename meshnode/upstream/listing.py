"""What a server lists, and what the mesh calls it. Pure.

Decides which models of a listing are offered, under which name and identity, and with which
context. Does not know HTTP, nor whether the server is well. What a server says is hostile bytes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from meshnode.errors import RemoteProtocolError
from meshnode.messages import MODELS_MAX, is_model_name

__all__ = ["Listed", "Named", "choose", "read_models", "read_props"]

NAME_CHARS_MAX = 256
"""Of a server's own name: a file's path, with some servers; also what our clients may send."""
CONTEXT_TOKENS_MAX = 2**24
_UNNAMEABLE = re.compile(r"[^A-Za-z0-9._:-]+")
_MESH_NAME_CHARS_MAX = 128


@dataclass(frozen=True, slots=True)
class Listed:
    """A model in the server's words; `context_tokens` 0 if it did not tell.

    `served_by`: if the server is a node, the nodes that answer for it.
    """

    name: str
    context_tokens: int
    served_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Named:
    """A listed model as the mesh knows it: `digest` is 64 hex digits."""

    name: str
    digest: str
    listed: Listed


class _Row(msgspec.Struct):
    """Of the fields that name a context: vLLM's and SGLang's, hubs', LM Studio's, our own."""

    id: str
    max_model_len: Any = None
    context_length: Any = None
    max_context_length: Any = None
    meshnode: Any = None


class _Listing(msgspec.Struct):
    data: list[_Row]


class _Generation(msgspec.Struct):
    n_ctx: Any = None


class _Props(msgspec.Struct):
    default_generation_settings: _Generation


_listing = msgspec.json.Decoder(_Listing)
_props = msgspec.json.Decoder(_Props)
_BAD = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read_models(body: bytes) -> tuple[Listed, ...]:
    """The answer of GET /v1/models, in its order. Raises `RemoteProtocolError`.

    A name that could not stand in a request is left out, as if it were not there, and so is an
    approximation of another mesh: whoever asks this one could not be told that it is one.
    """
    try:
        rows = _listing.decode(body).data
    except _BAD:
        raise RemoteProtocolError("its /v1/models is not a list of models") from None
    listed: dict[str, Listed] = {}
    for row in rows:
        is_exact = _of_ours(row, "approximate") is None
        if row.id and len(row.id) <= NAME_CHARS_MAX and is_exact:
            listed.setdefault(row.id, Listed(row.id, _context_tokens(row), _served_by(row)))
    return tuple(listed.values())


def read_props(body: bytes) -> int:
    """The context of one slot, in tokens, from llama-server's GET /props; 0 if it says none."""
    try:
        return _tokens(_props.decode(body).default_generation_settings.n_ctx)
    except _BAD:
        return 0


def choose(
    listed: tuple[Listed, ...],
    wanted: str | None,
    digest: str | None,
    *,
    own: str,
    url: str,
) -> tuple[Named, ...]:
    """The models to offer: all, `MODELS_MAX` at most, or the one that `wanted` picks or renames.

    `digest` is what the operator declared of that one. `own`, our peer id, and `url` tell this
    server from all others; what it lists because we offer it is left out.
    Two names that are alike in the mesh's alphabet are one name; the first has it.
    Raises `RemoteProtocolError` if there is none.
    """
    listed = tuple(each for each in listed if own not in each.served_by)
    if wanted is not None:
        picked = [each for each in listed if wanted in (each.name, _mesh_name(each.name))]
        if not picked and len(listed) == 1:
            picked = list(listed)
        if not picked:
            raise RemoteProtocolError(f"it lists {len(listed)} models, and none is {wanted}")
        found = picked[0]
        return (Named(wanted, digest or _identity(own, url, found.name), found),)
    named: dict[str, Named] = {}
    for each in listed:
        name = _mesh_name(each.name)
        if is_model_name(name) and len(named) < MODELS_MAX:
            named.setdefault(name, Named(name, _identity(own, url, each.name), each))
    if not named:
        raise RemoteProtocolError("it lists no model")
    return tuple(named.values())


def _mesh_name(name: str) -> str:
    """`meta-llama-Llama-3.1-8B` of `meta-llama/Llama-3.1-8B`; "" if nothing is left of it."""
    return _UNNAMEABLE.sub("-", name).lstrip("._:-")[:_MESH_NAME_CHARS_MAX]


def _identity(*parts: str) -> str:
    """A digest that stands for one server's model, and for nothing else."""
    drawn = hashlib.blake2b(digest_size=32, person=b"meshnode.front")
    for data in (part.encode("utf-8", "surrogatepass") for part in parts):
        drawn.update(len(data).to_bytes(8, "big") + data)
    return drawn.hexdigest()


def _context_tokens(row: _Row) -> int:
    of_ours = _of_ours(row, "context_tokens")
    told = (row.max_model_len, row.context_length, row.max_context_length, of_ours)
    return next((tokens for each in told if (tokens := _tokens(each))), 0)


def _served_by(row: _Row) -> tuple[str, ...]:
    told = _of_ours(row, "served_by")
    return tuple(each for each in told if isinstance(each, str)) if isinstance(told, list) else ()


def _of_ours(row: _Row, field: str) -> object:
    return row.meshnode.get(field) if isinstance(row.meshnode, dict) else None


def _tokens(told: object) -> int:
    """`told` as a number of tokens; 0 if it is none."""
    return told if type(told) is int and 0 < told <= CONTEXT_TOKENS_MAX else 0
