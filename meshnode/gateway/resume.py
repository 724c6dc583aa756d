"""How far a streamed answer has come, so that another replica can go on with it. Pure.

Decides what a serving node notes beside the events of an answer, what a gateway keeps of that,
and how it tells the next replica. Does not know replicas, nor what the events say.

Between nodes, an event with text is preceded by a note, a comment in the terms of SSE:

    : 5;1234,99
    data: {...}

It says that the event shows 5 characters, and that tokens 1234 and 99 have been decoded since the
last note. If the model thinks, `;17` after it says that 17 tokens of the answer so far were
thoughts, and `;17+` that these go on.

Tokens, not text, because the same text may be cut into tokens in several ways, and a model that
has read other tokens goes on differently.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from meshnode.engine import Continuation, Delta
from meshnode.errors import RemoteProtocolError, RequestError

__all__ = [
    "CONTINUE_HEADER",
    "OPENING_NOTE",
    "Progress",
    "join_continuation",
    "note",
    "split_continuation",
]

CONTINUE_HEADER = "x-meshnode-continue"
TOKENS_MAX = 1024 * 1024
"""More than any context here; at 4 bytes each they leave room in a body for the prompt."""
OPENING_NOTE = b": 0;\n"
"""What goes before the event that opens an answer, if notes come after it."""
HELD_BYTES_MAX = 1024 * 1024
"""An answer's end is a few hundred bytes; a peer that holds back more is hostile."""

_NOTE = re.compile(rb": ([0-9]{1,7});((?:[0-9]{1,10}(?:,[0-9]{1,10})*)?)(?:;([0-9]{1,7})(\+?))?")
_CONTINUE = re.compile(r"([0-9]{1,7});([0-9]{1,8})(?:;([0-9]{1,7})(\+?))?")
_TOKEN_END = 2**31


def note(deltas: Sequence[Delta], thoughts: int = 0, thinking: bool = False) -> bytes:
    """What goes before the event that shows `deltas`; nothing if their tokens are not told.

    `thoughts` and `thinking` as in `engine.Continuation`, after this event.
    """
    ids = [id for delta in deltas for id in delta.ids]
    if not ids:
        return b""
    chars = sum(len(delta.text) for delta in deltas)
    place = _place(thoughts, thinking)
    return b": %d;%b%b\n" % (chars, ",".join(map(str, ids)).encode(), place.encode())


def _place(thoughts: int, thinking: bool) -> str:
    return f";{thoughts}{'+' * thinking}" if thoughts or thinking else ""


class Progress:
    """A gateway's view of one answer: takes notes off its events and adds them up.

    The end of an answer has no notes. It is held back until it is complete, so that a client
    never sees an answer end twice.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._chars = 0
        self._thoughts = 0
        self._thinking = False
        self._notes = 0
        self._unnoted = 0
        self._held = bytearray()

    def feed(self, events: bytes) -> bytes:
        """Whole events from a replica; returns those that the client gets now.

        Raises `RemoteProtocolError` for a note that is none, and beyond the bounds.
        """
        shown: list[bytes] = []
        for event in events.split(b"\n\n")[:-1]:
            if event.startswith(b":"):
                written, _, event = event.partition(b"\n")
                self._read(written)
            elif self._notes:
                self._held += event + b"\n\n"
                continue
            else:
                self._unnoted += 1
            shown += (event, b"\n\n")
        if len(self._held) > HELD_BYTES_MAX or len(self._tokens) > TOKENS_MAX:
            raise RemoteProtocolError("The replica's answer is out of all bounds.")
        return b"".join(shown)

    def end(self) -> bytes:
        """The answer is complete: what was held back of it."""
        return bytes(self._held)

    def continuation(self) -> Continuation | None:
        """Where another replica would go on; None if nobody could, for want of notes."""
        self._held.clear()
        if self._unnoted or not self._notes:
            return None
        return Continuation(tuple(self._tokens), self._chars, self._thoughts, self._thinking)

    def _read(self, written: bytes) -> None:
        found = _NOTE.fullmatch(written)
        if found is None:
            raise RemoteProtocolError("The replica's answer has a note that is none.")
        tokens = [int(token) for token in found[2].split(b",")] if found[2] else []
        if any(token >= _TOKEN_END for token in tokens):
            raise RemoteProtocolError("The replica's answer has a token that is none.")
        self._notes += 1
        self._chars += int(found[1])
        self._tokens += tokens
        self._thoughts, self._thinking = int(found[3] or 0), bool(found[4])


def join_continuation(continuation: Continuation, body: bytes) -> tuple[str, bytes]:
    """The header's value, and the request's body with the tokens before it."""
    tokens = continuation.tokens
    packed = struct.pack(f">{len(tokens)}I", *tokens)
    place = _place(continuation.thoughts, continuation.thinking)
    return f"{len(tokens)};{continuation.chars}{place}", packed + body


def split_continuation(value: str, body: bytes) -> tuple[Continuation, bytes]:
    """The reverse, of what a peer sent. Raises `RequestError`."""
    found = _CONTINUE.fullmatch(value)
    count = int(found[1]) if found is not None else 0
    if found is None or count > TOKENS_MAX or 4 * count > len(body):
        raise RequestError(
            f"`{CONTINUE_HEADER}` must be <tokens>;<characters>.", param=CONTINUE_HEADER
        )
    tokens = struct.unpack_from(f">{count}I", body)
    if any(token >= _TOKEN_END for token in tokens):
        raise RequestError("A token to go on from is none.", param=CONTINUE_HEADER)
    come = Continuation(tokens, int(found[2]), int(found[3] or 0), bool(found[4]))
    return come, body[4 * count :]
