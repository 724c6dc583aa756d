"""What an answer says, piece by piece: thoughts, text, calls. Pure.

Whoever reads an answer's text (`reasoning.py`, `calls.py`) speaks in these words, and whoever
writes one for clients (`openai.py`, `dialects/`) understands them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Arguments", "Call", "Content", "Reasoning", "Said", "begun_at_end"]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Some of the thoughts before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Some text of the answer that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call begins: number `index` of this answer, of the function `name`."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call `index`, as JSON text."""

    index: int
    text: str


Said = Reasoning | Content | Call | Arguments


def begun_at_end(text: str, word: str) -> int:
    """Length of the longest end of `text`, short of all of `word`, with which `word` begins."""
    return next(
        (n for n in range(min(len(text), len(word) - 1), 0, -1) if word.startswith(text[-n:])), 0
    )
