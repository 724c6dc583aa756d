"""How models write calls of tools, for the families of models in use. Pure.

Decides where in an answer a call begins, what its grammar is, and what of it is its name and its
arguments. Does not know what the tools are for, nor OpenAI's shapes.

* hermes: Qwen, Hermes, SmolLM, and any model that knows no tools and is told of them in its words:
  `<tool_call>` newline `{"name": …, "arguments": …}` newline `</tool_call>`, again for the next
* mistral: `[TOOL_CALLS][{"name": …, "arguments": …}, …]`; the first word is a control token
* llama: the answer is `{"name": …, "parameters": …}`, perhaps after the control token
  `<|python_tag|>`; one call only
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from meshnode.engine import CallStyle
from meshnode.gateway.said import Arguments, Call, Content, begun_at_end

__all__ = ["CALL_WORDS", "CallReader", "CallWords"]

# More in one answer are a model that has lost its way.
CALLS_MAX = 8
# A call's name stands within its first characters, or it is none.
HEAD_CHARS_MAX = 256

_NAME = r'"(?P<name>[A-Za-z0-9_.-]+)"\s*,\s*"%s"\s*:\s*(?=\{)'


@dataclass(frozen=True, slots=True)
class CallWords:
    """One family's way. `begins` are the words from which on it is a call, the usual one first;
    with `at_start` they count only at the beginning of the answer.

    `head` is what comes from there to the arguments, `end` what comes after them, up to free text
    or, in its group `more`, up to the head of the next call. `control` are words that are control
    tokens. For grammars: a call is `before`, the object, `after`; `between` two of them.
    """

    begins: tuple[str, ...]
    at_start: bool
    head: re.Pattern[str]
    end: re.Pattern[str]
    control: tuple[str, ...]
    arguments: str
    grammar: tuple[str, str, str]
    takes_several: bool

    def rules(self, options: str, *, several: bool) -> str:
        """The body of a rule for what comes after the first of `begins`.

        `options` is a rule for what stands between `"name":` and the end of an object.
        """
        before, between, after = self.grammar
        more = ""
        if several and self.takes_several:
            more = f"({between} {options}){{0,{CALLS_MAX - 1}}}"
        return f"{before} {options} {more} {after}"


CALL_WORDS: Mapping[CallStyle, CallWords] = {
    "hermes": CallWords(
        begins=("<tool_call>",),
        at_start=False,
        head=re.compile(r'\s*\{\s*"name"\s*:\s*' + _NAME % "arguments"),
        end=re.compile(r"\s*\}\s*</tool_call>"),
        control=(),
        arguments="arguments",
        grammar=(
            r'"\n{\"name\":"',
            r'"\n</tool_call>\n<tool_call>\n{\"name\":"',
            r'"\n</tool_call>"',
        ),
        takes_several=True,
    ),
    "mistral": CallWords(
        begins=("[TOOL_CALLS]",),
        at_start=False,
        head=re.compile(r'\s*\[?\s*\{\s*"name"\s*:\s*' + _NAME % "arguments"),
        end=re.compile(r'\s*(?:,\s*"id"\s*:\s*"[A-Za-z0-9]*"\s*)?\}\s*(?:(?P<more>,)|\])'),
        control=("[TOOL_CALLS]",),
        arguments="arguments",
        grammar=(r'" "? "[{\"name\":"', r'", {\"name\":"', '"]"'),
        takes_several=True,
    ),
    "llama": CallWords(
        begins=(
            '{"name":',
            '<|python_tag|>{"name":',
            '{"type": "function", "name":',
            '<|python_tag|>{"type": "function", "name":',
        ),
        at_start=True,
        head=re.compile(r"\s*" + _NAME % "parameters"),
        end=re.compile(r"\s*\}"),
        control=("<|python_tag|>",),
        arguments="parameters",
        grammar=("", "", ""),
        takes_several=False,
    ),
}


class CallReader:
    """Reads one growing answer. A call that is none, or of no known function, is plain text."""

    def __init__(self, words: CallWords, names: frozenset[str]) -> None:
        self._words = words
        self._names = names
        self._state: Literal["text", "head", "arguments", "end", "plain"] = "text"
        self._held = ""
        self._begin = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self.calls = 0

    def feed(self, text: str) -> list[Content | Call | Arguments]:
        """Add text; returns what is now sure."""
        self._held += text
        return [said for said in self._advance() if isinstance(said, Call) or said.text]

    def flush(self) -> list[Content | Call | Arguments]:
        """The answer is over: half a call is plain text, half of its arguments stay as they are."""
        held, self._held = self._held, ""
        if self._state == "end" or (self.calls and not held.strip()):
            return []  # what an answer is cut in says nothing
        if self._state == "head":
            held = self._begin + held
            if self.calls:  # the model was stopped in its next call
                return []
        return [Content(held)] if held else []

    def _advance(self) -> Iterator[Content | Call | Arguments]:
        while self._held:
            before = self._state, len(self._held)
            match self._state:
                case "text":
                    yield self._read_text()
                case "head":
                    yield from self._read_head()
                case "arguments":
                    yield self._read_arguments()
                case "end":
                    self._read_end()
                case "plain":
                    yield Content(self._held)
                    self._held = ""
            if before == (self._state, len(self._held)):
                return

    def _read_text(self) -> Content:
        """Text up to where a call begins, or may be beginning."""
        held = self._held
        found = [(at, word) for word in self._words.begins if (at := held.find(word)) >= 0]
        if self._words.at_start:
            begin = held.lstrip()
            found = [(at, word) for at, word in found if not held[:at].strip()]
            if not found and (
                self.calls or not any(word.startswith(begin) for word in self._words.begins)
            ):
                self._state = "plain"
                return Content("")
            cut = 0
        else:
            cut = len(held) - max(begun_at_end(held, word) for word in self._words.begins)
        if found:
            cut, self._begin = min(found)
            self._state, self._held = "head", held[cut + len(self._begin) :]
        # Blanks before a call, and between two, say nothing; there may be one after them.
        text = held[:cut].rstrip()
        if not found:
            self._held = held[len(text) :]
        return Content(text)

    def _read_head(self) -> Iterator[Content | Call | Arguments]:
        head = self._words.head.match(self._held)
        if head is not None and head["name"] in self._names:
            self._state, self._held = "arguments", self._held[head.end() :]
            self.calls += 1
            yield Call(self.calls - 1, head["name"])
        elif head is not None or len(self._held) > HEAD_CHARS_MAX:
            text, self._held = self._begin + self._held, ""
            self._state = "plain" if self._words.at_start else "text"
            yield Content(text)

    def _read_arguments(self) -> Arguments:
        """Up to the brace that closes the one they begin with."""
        for at, character in enumerate(self._held):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    text, self._held = self._held[: at + 1], self._held[at + 1 :]
                    self._state = "end"
                    return Arguments(self.calls - 1, text)
        text, self._held = self._held, ""
        return Arguments(self.calls - 1, text)

    def _read_end(self) -> None:
        end = self._words.end.match(self._held)
        if end is not None:
            self._begin = end.groupdict().get("more") or ""
            self._state = "head" if self._begin else "text"
            self._held = self._held[end.end() :]
