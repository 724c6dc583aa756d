"""Where in an answer its grammar begins to bind. No llama here, only bytes.

Decides when one of the words of `engine.After` is complete. Does not know grammars or tokens.

llama.cpp has lazy grammars of its own. They match a regular expression against the whole answer
with each token, by a matcher that recurses for every character: the longer the answer, the nearer
the end of the stack. And a token that completes the word and goes on in a way that the grammar
does not admit ends the process. Here only the tail of the answer is kept, and the caller learns of
the word before it accepts the token.
"""

from __future__ import annotations

from meshnode.engine import After

__all__ = ["Trigger"]

_OPEN, _CLOSE = b"<think>", b"</think>"


class Trigger:
    """Watches one growing answer."""

    def __init__(self, after: After) -> None:
        self._words = tuple(word.encode() for word in after.words)
        self._at_start = after.at_start
        self._may_think = after.thinking == "may"
        self._thinks = after.thinking == "opened"
        self._tail = b""
        self._never = False

    def begins(self, piece: bytes) -> bytes | None:
        """What of `piece`, the next token, is before or in the word that it completes.

        None if it completes none. Changes nothing: the token may yet be another.
        """
        tail, thinks = self._past_thoughts(self._tail + piece)
        if thinks or self._never:
            return None
        ends = [
            at + len(word)
            for word in self._words
            if (at := tail.find(word)) >= 0 and not (self._at_start and tail[:at].strip())
        ]
        if not ends:
            return None
        return piece[: len(piece) - (len(tail) - min(ends))]

    def accept(self, piece: bytes) -> None:
        """The next token is this one, and completes no word."""
        tail, self._thinks = self._past_thoughts(self._tail + piece)
        if self._thinks:
            self._may_think = False
            self._tail = tail[-len(_CLOSE) + 1 :]
            return
        said = tail.lstrip()
        if self._may_think and said and not _OPEN.startswith(said):
            self._may_think = False
        if self._may_think:
            self._tail = tail
            return
        longest = max(map(len, self._words))
        if not self._at_start:
            self._tail = tail[-longest + 1 :] if longest > 1 else b""
        elif said and not any(word.startswith(said) for word in self._words):
            self._never, self._tail = True, b""
        else:
            self._tail = said

    def _past_thoughts(self, tail: bytes) -> tuple[bytes, bool]:
        """The tail without thoughts, and whether they go on at its end."""
        if self._may_think and tail.lstrip().startswith(_OPEN):
            tail = tail.lstrip()[len(_OPEN) :]
        elif not self._thinks:
            return tail, False
        _, closed, rest = tail.partition(_CLOSE)
        return (rest, False) if closed else (tail, True)
