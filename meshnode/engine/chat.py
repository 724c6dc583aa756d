"""From messages to prompt text, keeping apart what the model's author and what people wrote.

Decides which parts of a rendered chat template are trusted. A template is a program that mixes
its own control words (`<|im_start|>`) with people's text; once mixed, a message that contains
`<|im_end|>` could end its own turn and forge the next. So the template is rendered with an
unguessable placeholder for every content, and the result is cut at the placeholders. A picture is
a segment of its own, so that no text can pass for one. Does not know tokens: the caller turns only
trusted segments into control tokens.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from meshnode.engine import ChatMessage, Image
from meshnode.errors import ModelLoadError, RequestError

# The role goes into the prompt as the template's own text, so it must be one of these words.
ROLES = frozenset({"system", "user", "assistant", "tool"})


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
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: datetime.now().strftime(form),
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the model's chat template is not valid: {error}") from error
        self._words = {"bos_token": bos, "eos_token": eos}

    def render(self, messages: Sequence[ChatMessage]) -> list[Segment | Picture]:
        """The prompt up to where the assistant speaks next.

        Raises `RequestError` if a role is unknown or the template refuses the conversation.
        """
        for message in messages:
            if message.role not in ROLES:
                known = ", ".join(sorted(ROLES))
                raise RequestError(f"A message's role must be one of {known}.", param="messages")
        marks = [f"content-{secrets.token_hex(16)}-end" for _ in messages]
        contents = {
            mark: message
            for message, mark in zip(messages, marks, strict=True)
            if message.content or message.images
        }
        roles = [message.role for message in messages]
        texts = [mark if mark in contents else "" for mark in marks]
        rendered = self._render(roles, texts)
        if not all(mark in rendered for mark in contents):
            # The templates of some models that can see take contents in parts, and only so.
            parts = [[{"type": "text", "text": text}] if text else [] for text in texts]
            rendered = self._render(roles, parts)
        # A quoted mark is a list of parts that was written out as it is.
        if not all(mark in rendered and f"'{mark}'" not in rendered for mark in contents):
            raise RequestError(
                "The model's chat template drops one of these messages; "
                "try without the system message.",
                param="messages",
            )
        return _cut(rendered, contents)

    def _render(self, roles: Sequence[str], contents: Sequence[object]) -> str:
        try:
            return self._template.render(
                messages=[
                    {"role": role, "content": content}
                    for role, content in zip(roles, contents, strict=True)
                ],
                add_generation_prompt=True,
                **self._words,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error


def _cut(rendered: str, contents: dict[str, ChatMessage]) -> list[Segment | Picture]:
    if not contents:
        return [Segment(rendered, trusted=True)] if rendered else []
    segments: list[Segment | Picture] = []
    for part in re.split(f"({'|'.join(map(re.escape, contents))})", rendered):
        if part in contents:
            segments += _said(contents[part])
        elif part:
            segments.append(Segment(part, trusted=True))
    return segments


def _said(message: ChatMessage) -> Iterator[Segment | Picture]:
    """A message's text, cut where its pictures stand."""
    start = 0
    for image in message.images:
        if start < image.at:
            yield Segment(message.content[start : image.at], trusted=False)
        yield Picture(image)
        start = image.at
    if message.content[start:]:
        yield Segment(message.content[start:], trusted=False)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML, which would reach the model.
    return json.dumps(value, ensure_ascii=False, indent=indent)
