"""From token bytes to text that may be shown: whole UTF-8 characters, and nothing of a stop.

Decides which part of an answer is safe to send now. Does not know tokens or models.
"""

from __future__ import annotations

import codecs


class AnswerText:
    """The text of one growing answer.

    A token may end in the middle of a character or of a stop string. Such a tail is held back
    until it is either completed or refuted; `flush` gives what is held when the answer ends.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        """`stop` holds no empty string."""
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stop: str | None = None
        """The stop string that has ended the answer."""

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    def feed(self, piece: bytes) -> str:
        """Add a token's bytes; returns the text that is now safe, often empty.

        Sets `stop` when a stop string is complete; its text and all after it are dropped.
        """
        return self._advance(self._decoder.decode(piece))

    def flush(self) -> str:
        """The answer is over: half a character becomes U+FFFD, half a stop is plain text."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stop
                 if (start := text.find(stop)) >= 0]  # fmt: skip
        if found:
            # The stop that is complete first, so that the split into tokens makes no difference.
            _, start, self.stop = min(found)
            self._held = ""
            return text[:start]
        safe = len(text) - self._held_length(text)
        self._held = text[safe:]
        return text[:safe]

    def _held_length(self, text: str) -> int:
        """Length of the longest suffix with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for length in range(min(len(text), longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
