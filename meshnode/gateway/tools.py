"""Tools in the manner of Hermes: how a model is told of them, and how its calls are read. Pure.

Decides the words around tools in a prompt, the grammar that forces a call, and what in an answer
is a call. Does not know the OpenAI shapes around them, nor engines.

Models of the ChatML family (Qwen, Hermes, SmolLM) are trained on just these words: tools stand in
the system message, a call is `<tool_call>` with a JSON object, a result comes from the user as
`<tool_response>`. All of it is plain text, so a tool's description can never forge a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from meshnode.engine import ChatMessage, Grammar
from meshnode.gateway.schema import SchemaGrammar

__all__ = [
    "CALL_END",
    "Arguments",
    "Call",
    "Content",
    "ToolReader",
    "Tools",
    "call_text",
    "join_responses",
    "response_text",
]

CALL_BEGIN = "<tool_call>"
CALL_END = "</tool_call>"
# More in one answer are a model that has lost its way.
FORCED_CALLS_MAX = 8

_INTRODUCTION = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Function:
    """A tool; `parameters` is a JSON schema of an object, `param` where it stands."""

    name: str
    description: str | None
    parameters: dict[str, Any]
    param: str


@dataclass(frozen=True, slots=True)
class Tools:
    """What may be called. `choice` is "auto", "required" or the one function that must be."""

    functions: tuple[Function, ...]
    choice: str
    parallel: bool

    @property
    def is_forced(self) -> bool:
        return self.choice != "auto"

    def introduce(self, messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
        """The conversation with the tools in its system message."""
        lines = []
        for function in self.functions:
            about: dict[str, Any] = {"name": function.name, "description": function.description,
                     "parameters": function.parameters}  # fmt: skip
            if function.description is None:
                del about["description"]
            lines.append(_dumps({"type": "function", "function": about}))
        text = _INTRODUCTION.format(tools="\n".join(lines))
        first, rest = messages[0], tuple(messages[1:])
        if first.role != "system":
            return ChatMessage("system", text), first, *rest
        return replace(first, content=f"{first.content}\n\n{text}"), *rest

    def grammar(self) -> Grammar | None:
        """What forces a call; None if none is forced.

        Raises `RequestError` for parameters that cannot be promised.
        """
        if not self.is_forced:
            return None
        rules = SchemaGrammar()
        options = []
        for function in self.functions:
            if self.choice in ("required", function.name):
                arguments = rules.add(function.parameters, function.param)
                opening = _quoted(f'{{"name": "{function.name}", "arguments": ')
                options.append(rules.rule(f'{opening} {arguments} "}}"'))
        call = rules.rule(
            f'{_quoted(CALL_BEGIN)} "\\n" ({" | ".join(options)}) "\\n" {_quoted(CALL_END)}'
        )
        several = self.parallel and self.choice == "required"
        more = f' ("\\n" {call}){{0,{FORCED_CALLS_MAX - 1}}}' if several else ""
        return Grammar(rules.text(call + more), "tools")


def call_text(name: str, arguments: str) -> str:
    """A call of an earlier turn, as the model wrote it. `arguments` is JSON."""
    return f'{CALL_BEGIN}\n{{"name": {_dumps(name)}, "arguments": {arguments}}}\n{CALL_END}'


def response_text(content: str) -> str:
    """What a tool has answered, as the model expects it."""
    return f"<tool_response>\n{content}\n</tool_response>"


def join_responses(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Messages of the role `tool` become the user's; those in a row become one."""
    joined: list[ChatMessage] = []
    follows = False
    for message in messages:
        if message.role == "tool" and follows:
            joined[-1] = ChatMessage("user", f"{joined[-1].content}\n{message.content}")
        elif message.role == "tool":
            joined.append(ChatMessage("user", message.content))
        else:
            joined.append(message)
        follows = message.role == "tool"
    return tuple(joined)


# --- what a model says ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Content:
    """Some text that is no call."""

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


_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"(?P<name>[A-Za-z0-9_.-]+)"\s*,\s*"arguments"\s*:\s*(?=\{)'
)


class ToolReader:
    """Reads one growing answer. A call that is none, or of no known function, is plain text."""

    def __init__(self, tools: Tools) -> None:
        self._names = {function.name for function in tools.functions}
        self._state: Literal["text", "call", "arguments", "end"] = "text"
        self._held = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self.calls = 0

    def feed(self, text: str) -> list[Content | Call | Arguments]:
        """Add text; returns what is now sure."""
        self._held += text
        return [event for event in self._advance() if _says_something(event)]

    def flush(self) -> list[Content | Call | Arguments]:
        """The answer is over: half a call is plain text, half of its arguments stay as they are."""
        held, self._held = self._held, ""
        if self._state == "text":
            # After a call, blanks and the beginning of another are what an answer is cut in.
            cut = self.calls and CALL_BEGIN.startswith(held.strip())
            return [Content(held)] if held and not cut else []
        if self._state == "call":
            return [*self._whole_call(held, CALL_BEGIN + held)]
        return []

    def _advance(self) -> Iterator[Content | Call | Arguments]:
        while self._held:
            before = self._state, len(self._held)
            match self._state:
                case "text":
                    yield from self._read_text()
                case "call":
                    yield from self._read_call()
                case "arguments":
                    yield self._read_arguments()
                case "end":
                    self._read_end()
            if before == (self._state, len(self._held)):
                return

    def _read_text(self) -> Iterator[Content]:
        text, found, rest = self._held.partition(CALL_BEGIN)
        if found:
            self._state, self._held = "call", rest
            # Blanks between calls say nothing.
            yield Content(text.rstrip() if not self.calls else text.strip())
            return
        # A tag, or the blanks before one, may be going on.
        cut = len(text) - _tail(text, CALL_BEGIN)
        cut = len(text[:cut].rstrip())
        self._held = text[cut:]
        yield Content(text[:cut])

    def _read_call(self) -> Iterator[Content | Call | Arguments]:
        head = _HEAD.match(self._held)
        if head is not None and head["name"] in self._names:
            self._state, self._held = "arguments", self._held[head.end() :]
            self.calls += 1
            yield Call(self.calls - 1, head["name"])
            return
        body, found, rest = self._held.partition(CALL_END)
        if found:
            self._state, self._held = "text", rest
            yield from self._whole_call(body, CALL_BEGIN + body + CALL_END)

    def _whole_call(self, body: str, otherwise: str) -> Iterator[Content | Call | Arguments]:
        """A call whose members stand in another order; or what is none."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            call = None
        members = call if isinstance(call, dict) else {}
        name, arguments = members.get("name"), members.get("arguments", {})
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            yield Content(otherwise)
            return
        self.calls += 1
        yield Call(self.calls - 1, name)
        yield Arguments(self.calls - 1, _dumps(arguments))

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
        _, found, rest = self._held.partition(CALL_END)
        if found:
            self._state, self._held = "text", rest


def _says_something(event: Content | Call | Arguments) -> bool:
    return isinstance(event, Call) or bool(event.text)


def _tail(text: str, word: str) -> int:
    """Length of the longest end of `text` with which `word` begins."""
    return next(
        (n for n in range(min(len(text), len(word) - 1), 0, -1) if word.startswith(text[-n:])), 0
    )


def _quoted(text: str) -> str:
    """Text without control characters, as GBNF quotes it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
