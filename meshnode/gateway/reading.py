"""One answer's text, read: thoughts first, then text and calls. Pure.

Decides in which order an answer is read, and how many of its tokens were thoughts. Does not know
how it is written for clients.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshnode.engine import CallStyle, Continuation, Delta, Thinking
from meshnode.gateway.calls import CALL_WORDS, CallReader
from meshnode.gateway.reasoning import ThoughtReader
from meshnode.gateway.said import Content, Reasoning, Said

__all__ = ["AnswerReader"]


class AnswerReader:
    """Reads one growing answer."""

    def __init__(
        self,
        thinking: Thinking,
        style: CallStyle,
        names: frozenset[str],
        continuation: Continuation | None = None,
    ) -> None:
        """`names` are the functions that may be called, none if there are no tools."""
        come = continuation
        self._thoughts = ThoughtReader(thinking, resumed=None if come is None else come.thinking)
        self._calls = CallReader(CALL_WORDS[style], names) if names else None
        self._tokens = 0 if come is None else len(come.tokens)
        self.thoughts = 0 if come is None else come.thoughts
        """Tokens that were thoughts, tags included."""

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return 0 if self._calls is None else self._calls.calls

    @property
    def is_thinking(self) -> bool:
        return self._thoughts.is_thinking

    @property
    def is_settled(self) -> bool:
        """Whether nothing that was fed is held back; only where there are no calls."""
        return self._thoughts.is_settled

    def feed(self, delta: Delta) -> list[Said]:
        """More of the answer; returns what is now sure."""
        thinking = self._thoughts.is_thinking
        said = self._without_calls(self._thoughts.feed(delta.text))
        self._tokens += delta.tokens
        if thinking or self._thoughts.is_thinking:  # and so was all before
            self.thoughts = self._tokens
        return said

    def flush(self) -> list[Said]:
        """The answer is over."""
        said = self._without_calls(self._thoughts.flush())
        return said if self._calls is None else [*said, *self._calls.flush()]

    def _without_calls(self, pieces: Sequence[Reasoning | Content]) -> list[Said]:
        if self._calls is None:
            return list(pieces)
        said: list[Said] = []
        for piece in pieces:
            said += [piece] if isinstance(piece, Reasoning) else self._calls.feed(piece.text)
        return said
