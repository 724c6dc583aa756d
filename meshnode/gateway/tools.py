"""Tools: how a model is told of them, and the grammar of its calls. Pure.

Decides the words around tools in a prompt whose template has none of its own, and when a grammar
binds: at once if a call is asked for or all else has a form, else where the model begins one. Does
not know the OpenAI shapes around them, nor engines; how calls look and are read is in `calls.py`.

A template that knows tools is given them. For one that does not, the tools stand in the system
message in the words of Hermes, which more models are trained on than on any others. All of it is
plain text, so a tool's description can never forge a turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshnode.engine import After, CallStyle, ChatMessage, FunctionCall, Grammar, Thinking
from meshnode.errors import RequestError
from meshnode.gateway.calls import CALL_WORDS
from meshnode.gateway.reasoning import let_think
from meshnode.gateway.schema import SchemaGrammar

__all__ = ["Function", "Tools", "in_plain_words"]

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
    """A tool; `parameters` is a JSON schema of an object, `param` where it stands.

    `strict`: the arguments must be valid under the schema, whatever it costs.
    """

    name: str
    description: str | None
    parameters: dict[str, Any]
    param: str
    strict: bool = False

    def definition(self) -> str:
        """In OpenAI's JSON, which templates and models know."""
        about: dict[str, Any] = {"name": self.name, "description": self.description,
                 "parameters": self.parameters}  # fmt: skip
        if self.description is None:
            del about["description"]
        return _dumps({"type": "function", "function": about})


@dataclass(frozen=True, slots=True)
class Tools:
    """What may be called. `choice` is "auto", "required" or the one function that must be.

    `form`: what an answer must be that is no call, as a JSON schema, and where that stands.
    """

    functions: tuple[Function, ...]
    choice: str
    parallel: bool
    form: tuple[Any, str] | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)

    def definitions(self) -> tuple[str, ...]:
        return tuple(function.definition() for function in self.functions)

    def grammar(self, style: CallStyle, thinking: Thinking) -> Grammar:
        """What makes each call valid, and forces one if it must be, and all else into its form.

        Raises `RequestError` for a form, or strict parameters, that cannot be promised.
        """
        words, rules = CALL_WORDS[style], SchemaGrammar()
        options = []
        for function in self.functions:
            if self.choice in ("auto", "required", function.name):
                arguments = _arguments(function, rules)
                head = f' "{function.name}", "{words.arguments}": '
                options.append(rules.rule(f'{_quoted(head)} {arguments} "}}"'))
        several = self.parallel and self.choice in ("auto", "required")
        rest = words.rules(rules.rule(" | ".join(options)), several=several)
        if self.choice == "auto" and self.form is None:
            after = After(words.begins, words.at_start, thinking)
            return Grammar(rules.text(rest), "tools", after)
        answer = f"{_quoted(words.begins[0])} {rest}"
        if self.choice == "auto" and self.form is not None:
            answer += f" | {rules.add(*self.form)}"
        return let_think(Grammar(rules.text(answer), "tools"), thinking)


def _arguments(function: Function, rules: SchemaGrammar) -> str:
    """The rule of a call's arguments: any object, if their schema cannot be promised nor must."""
    before = rules.mark()
    try:
        return rules.add(function.parameters, function.param)
    except RequestError:
        if function.strict:
            raise
        rules.forget(before)
        return "object"


def in_plain_words(messages: Sequence[ChatMessage], tools: Tools | None) -> tuple[ChatMessage, ...]:
    """A conversation for a template that knows no tools: they, calls and results are text."""
    plain: list[ChatMessage] = []
    follows = False  # results in a row are one turn
    for message in messages:
        if message.role == "tool":
            content = f"<tool_response>\n{message.content}\n</tool_response>"
            if follows:
                content = f"{plain.pop().content}\n{content}"
            plain.append(ChatMessage("user", content))
        elif message.calls:
            said = [message.content] if message.content else []
            content = "\n".join([*said, *map(_call_text, message.calls)])
            plain.append(replace(message, content=content, calls=()))
        else:
            plain.append(message)
        follows = message.role == "tool"
    if tools is None:
        return tuple(plain)
    text = _INTRODUCTION.format(tools="\n".join(tools.definitions()))
    first = plain[0]
    if first.role != "system":
        return ChatMessage("system", text), *plain
    return replace(first, content=f"{first.content}\n\n{text}"), *plain[1:]


def _call_text(call: FunctionCall) -> str:
    head = f'{{"name": {_dumps(call.name)}, "arguments": {call.arguments}}}'
    return f"<tool_call>\n{head}\n</tool_call>"


def _quoted(text: str) -> str:
    """Text without control characters, as GBNF quotes it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
