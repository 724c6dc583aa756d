"""From messages to prompt text, keeping apart what the model's author and what people wrote.

Decides which parts of a rendered chat template are trusted. A template is a program that mixes
its own control words (`<|im_start|>`) with people's text; once mixed, a message that contains
`<|im_end|>` could end its own turn and forge the next. So the template is rendered with an
unguessable placeholder for every text of theirs, be it a message, a thought or a word of a tool's
description, and the result is cut at the placeholders. A picture is a segment of its own, so that
no text can pass for one. Does not know tokens: the caller turns only trusted segments into control
tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from meshnode.engine import ChatMessage, Image
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


@dataclass(frozen=True, slots=True)
class Picture:
    """Where a picture stands in the prompt."""

    image: Image


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
    ) -> list[Segment | Picture]:
        """The prompt up to where the assistant speaks next. For the rest see `Request`.

        Raises `RequestError` if a role is unknown or the template refuses the conversation.
        """
        for message in messages:
            if message.role not in ROLES:
                known = ", ".join(sorted(ROLES))
                raise RequestError(f"A message's role must be one of {known}.", param="messages")
        words: dict[str, Any] = dict(self._words)
        if thinking is not None:  # two words for one thing; a template knows one of them
            words |= {"enable_thinking": thinking, "thinking": thinking}
        if effort is not None:
            words["reasoning_effort"] = effort
        segments, dropped = self._render(messages, tools, words)
        if _are_missed(messages, dropped):
            # The templates of some models that can see take contents in parts, and only so.
            segments, dropped = self._render(messages, tools, words, in_parts=dropped)
        if _are_missed(messages, dropped):
            raise RequestError(
                "The model's chat template drops one of these messages; "
                "try without the system message.",
                param="messages",
            )
        return segments

    def _render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[str],
        words: dict[str, Any],
        in_parts: frozenset[int] = frozenset(),
    ) -> tuple[list[Segment | Picture], frozenset[int]]:
        """The prompt, and which messages' contents are not in it.

        The contents of those messages that are `in_parts` are given as lists.
        """
        marks = _Marks()
        contents = [marks.of(message.content, message.images) for message in messages]
        try:
            if tools:
                words = {**words, "tools": [_definition(tool, marks) for tool in tools]}
            rendered = self._template.render(
                messages=[
                    _turn(message, _parts(mark) if index in in_parts else mark, marks)
                    for index, (message, mark) in enumerate(zip(messages, contents, strict=True))
                ],
                add_generation_prompt=True,
                **words,
                **{_MARKS: marks},
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        segments = marks.cut(rendered)
        dropped = (
            index
            for index, mark in enumerate(contents)
            # A quoted mark is a list of parts that was written out as it is.
            if mark and (not marks.shows(mark) or f"'text': '{mark}'" in rendered)
        )
        return segments, frozenset(dropped)


def _are_missed(messages: Sequence[ChatMessage], dropped: frozenset[int]) -> bool:
    """Whether the model must have heard one of them: what is said beside a call is not for every
    model, nor are old thoughts."""
    return any(messages[index].images or not messages[index].calls for index in dropped)


@dataclass(frozen=True, slots=True)
class _Said:
    """A text of people's with its pictures, and the placeholders whose texts are in it."""

    text: str
    images: tuple[Image, ...] = ()
    marks: frozenset[str] = frozenset()

    def pieces(self) -> Iterator[Segment | Picture]:
        """The text, cut where its pictures stand."""
        start = 0
        for image in self.images:
            if start < image.at:
                yield Segment(self.text[start : image.at], trusted=False)
            yield Picture(image)
            start = image.at
        if self.text[start:]:
            yield Segment(self.text[start:], trusted=False)


class _Marks:
    """The placeholders of one prompt: stand-ins for what is not the template's own."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(16)
        self._pattern = re.compile(f"(text-{self._nonce}-[0-9]+-end)")
        self._said: dict[str, _Said] = {}
        self._shown: set[str] = set()

    def of(self, text: str, images: tuple[Image, ...] = ()) -> str:
        """A placeholder; nothing stands for nothing, so that templates can ask."""
        return self._add(_Said(text, images)) if text or images else ""

    def _add(self, said: _Said) -> str:
        mark = f"text-{self._nonce}-{len(self._said)}-end"
        self._said[mark] = said
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
        """A placeholder for JSON that a template has made, with what they stand for in it."""
        json_text, images, marks = "", [], set()
        for part in self._pattern.split(text):
            if part not in self._said:
                json_text += part
                continue
            marks.add(part)
            for piece in self._said[part].pieces():
                if isinstance(piece, Picture):
                    images.append(replace(piece.image, at=len(json_text)))
                else:
                    json_text += _dumps(piece.text)[1:-1]
        return self._add(_Said(json_text, tuple(images), frozenset(marks)))

    def cut(self, rendered: str) -> list[Segment | Picture]:
        """What was rendered, with what the placeholders in it stand for."""
        segments: list[Segment | Picture] = []
        for part in self._pattern.split(rendered):
            if part in self._said:
                said = self._said[part]
                self._shown |= {part, *said.marks}
                segments += said.pieces()
            elif part:
                segments.append(Segment(part, trusted=True))
        return segments

    def shows(self, mark: str) -> bool:
        """Whether what it stands for has got into the prompt that was cut."""
        return mark in self._shown


def _turn(message: ChatMessage, content: object, marks: _Marks) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": content}
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


def _parts(mark: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": mark}]


def _definition(tool: str, marks: _Marks) -> dict[str, Any]:
    return {"type": "function", "function": marks.within(json.loads(tool)["function"])}


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
