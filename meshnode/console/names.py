"""From what people write to what the mesh calls it: nodes by a part of their id, models by name.

Peer ids are long and their ends are what tables show, so any end or beginning that only one known
peer has will do. Errors say what there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshnode.errors import ConfigError

SELF = "self"
PART_CHARS_MIN = 4
"""Shorter parts are unique today and ambiguous when the mesh has grown."""
_SHOWN_MAX = 8


def find_node(text: str, own: str, known: Iterable[str]) -> str:
    """The one peer of `known` (or `own`) that `text` means. Raises `ConfigError`."""
    if text == SELF:
        return own
    part = text.strip().lstrip("…")
    peers = sorted({own, *known})
    if part in peers:
        return part
    found = [peer for peer in peers if peer.startswith(part) or peer.endswith(part)]
    if len(part) >= PART_CHARS_MIN and len(found) == 1:
        return found[0]
    shown = ", ".join(f"…{peer[-8:]}" for peer in (found or peers)[:_SHOWN_MAX])
    if len(part) < PART_CHARS_MIN:
        why = f"give at least {PART_CHARS_MIN} characters of its id"
    elif found:
        why = f"it fits several nodes ({shown}): give more of it"
    else:
        why = f"no node of this mesh has an id that begins or ends so; known here: {shown}"
    raise ConfigError(f'which node is {text!r}? {why}, or "{SELF}" for this one')


def find_model(text: str, known: Mapping[str, str]) -> str:
    """The digest that a name, `name@digest` or the start of a digest means. `known` maps digests
    to names. Raises `ConfigError`."""
    name, _, part = text.partition("@")
    found = [
        digest
        for digest, called in sorted(known.items())
        if called == name and digest.startswith(part)
    ]
    if not found and not part and len(text) >= PART_CHARS_MIN:
        found = [digest for digest in sorted(known) if digest.startswith(text.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(f"{known[digest]}@{digest[:12]}" for digest in found[:_SHOWN_MAX])
        raise ConfigError(f"{text!r} is more than one model: say which of {shown}")
    names = ", ".join(sorted(set(known.values()))[:_SHOWN_MAX]) or "none yet"
    raise ConfigError(f"no node of this mesh has a model {text!r}. Models here: {names}")
