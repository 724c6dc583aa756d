"""From messages to prompt text, keeping apart what the model's author and what people wrote.

Decides which parts of a rendered chat template are trusted. A template is a program that mixes
its own control words (`<|im_start|>`) with people's text; once mixed, a message that contains
`<|im_end|>` could end its own turn and forge the next. So the template is rendered with an
unguessable placeholder for every text of theirs, be it a message, a thought or a word of a tool's
description, and the result is cut at the placeholders. Does not know tokens: the caller turns only
trusted segments into control tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from meshnode.engine import ChatMessage
from meshnode.errors import ModelLoadError, RequestError

# The role goes into the prompt as the template's own text, so it must be one of these words.
ROLES = frozenset({"system", "user", "assistant", "tool"})
# Mistral's templates insist on it; others take any length.
_CALL_ID_CHARS = 9
# Under this name our JSON filter finds the placeholders of the prompt it works for.
_MARKS = "_marks"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the prompt; only `trusted` ones may contain control tokens."""

    text: str
    trusted: bool


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what is trained on; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A model's own Jinja template, in a sandbox."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        """Raises `ModelLoadError` if the template is not valid Jinja."""
        environment = ImmutableSandboxedEnvironment(
            # These settings are those of Hugging Face transformers, which templates are made for.
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        self.source = source
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: datetime.now().strftime(form),
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the model's chat template is not valid: {error}") from error
        self._words = {"bos_token": bos, "eos_token": eos}

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[str] = (),
        thinking: bool | None = None,
        effort: str | None = None,
    ) -> list[Segment]:
        """The prompt up to where the assistant speaks next. For the rest see `Request`.

        Raises `RequestError` if a role is unknown or the template refuses the conversation.
        """
        for message in messages:
            if message.role not in ROLES:
                known = ", ".join(sorted(ROLES))
                raise RequestError(f"A message's role must be one of {known}.", param="messages")
        marks = _Marks()
        words: dict[str, Any] = {**self._words, _MARKS: marks}
        if tools:
            words["tools"] = [_definition(json.loads(tool), marks) for tool in tools]
        if thinking is not None:  # two words for one thing; a template knows one of them
            words |= {"enable_thinking": thinking, "thinking": thinking}
        if effort is not None:
            words["reasoning_effort"] = effort
        try:
            rendered = self._template.render(
                messages=[_turn(message, marks) for message in messages],
                add_generation_prompt=True,
                **words,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        segments = marks.cut(rendered)
        # Old thoughts, and what is said beside a call, are not for every model.
        if any(m.content and not m.calls and not marks.shows(m.content) for m in messages):
            raise RequestError(
                "The model's chat template drops one of these messages; "
                "try without the system message.",
                param="messages",
            )
        return segments


class _Marks:
    """The placeholders of one prompt: stand-ins for texts that are not the template's own."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(16)
        self._pattern = re.compile(f"(text-{self._nonce}-[0-9]+-end)")
        self._texts: dict[str, str] = {}
        self._shown: set[str] = set()

    def of(self, text: str) -> str:
        """A placeholder; nothing stands for nothing, so that templates can ask."""
        if not text:
            return ""
        mark = f"text-{self._nonce}-{len(self._texts)}-end"
        self._texts[mark] = text
        return mark

    def within(self, value: Any) -> Any:
        """A JSON value with a placeholder for each string that is not a key."""
        match value:
            case str():
                return self.of(value)
            case list():
                return [self.within(each) for each in value]
            case dict():
                return {key: self.within(each) for key, each in value.items()}
        return value

    def of_json(self, text: str) -> str:
        """A placeholder for JSON that a template has made, with the texts themselves in it."""
        return self.of(self._pattern.sub(lambda mark: _dumps(self._show(mark[0]))[1:-1], text))

    def cut(self, rendered: str) -> list[Segment]:
        """What was rendered, with the texts for their placeholders."""
        parts = self._pattern.split(rendered)
        return [
            Segment(self._show(part), trusted=False)
            if part in self._texts
            else Segment(part, trusted=True)
            for part in parts
            if part
        ]

    def shows(self, text: str) -> bool:
        """Whether such a text has got into the prompt."""
        return text in self._shown

    def _show(self, mark: str) -> str:
        self._shown.add(self._texts[mark])
        return self._texts[mark]


def _turn(message: ChatMessage, marks: _Marks) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": marks.of(message.content)}
    if message.reasoning:
        turn["reasoning_content"] = marks.of(message.reasoning)
    if message.calls:
        turn["tool_calls"] = [
            {
                "id": _call_id(call.id),
                "type": "function",
                "function": {
                    "name": marks.of(call.name),
                    "arguments": marks.within(json.loads(call.arguments)),
                },
            }
            for call in message.calls
        ]
    if message.call_id:
        turn["tool_call_id"] = _call_id(message.call_id)
    return turn


def _definition(tool: dict[str, Any], marks: _Marks) -> dict[str, Any]:
    return {"type": "function", "function": marks.within(tool["function"])}


def _call_id(id: str) -> str:
    return hashlib.blake2b(id.encode("utf-8", "replace")).hexdigest()[:_CALL_ID_CHARS]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@jinja2.pass_context
def _to_json(
    context: jinja2.runtime.Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Transformers' own filter. (Jinja's escapes HTML, which would reach the model.)

    What it makes is nobody's control word: the keys in it are people's as well.
    """
    marks: _Marks = context[_MARKS]
    return marks.of_json(
        json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
    )


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
