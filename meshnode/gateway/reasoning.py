"""Thoughts, which come before an answer: asked for, told apart, let through grammars. Pure.

Decides what in an answer is thought, and what a request for more or less of it means to a model.
Does not know OpenAI's shapes, nor chat templates but for what `engine.ChatStyle` says of them.

The models of the day (DeepSeek, Qwen, GLM, SmolLM3) think between `<think>` and `</think>`; some
templates put the first tag into the prompt, so that the answer begins inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshnode.engine import ChatStyle, Grammar, Thinking
from meshnode.errors import RequestError
from meshnode.gateway.said import Content, Reasoning, begun_at_end

__all__ = ["NO_WISH", "ThoughtReader", "Wish", "let_think"]

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Wish:
    """How a client wants the model to think; None leaves it to the model.

    `effort` is "none" or a word for the template. Each is refused under its own name.
    """

    thinking: bool | None = None
    effort: str | None = None

    def granted(self, style: ChatStyle) -> tuple[bool | None, str | None, Thinking]:
        """What the template is told (`Request.thinking` and `.effort`), and what the model then
        does. Raises `RequestError` if it cannot be had of this model."""
        effort = None if self.effort == "none" else self.effort
        if effort is not None and not style.has_effort:
            raise _refused("reasoning_effort", "cannot be told how hard to think")
        switch, param = self.thinking, "chat_template_kwargs.enable_thinking"
        if self.effort == "none":
            switch, param = False, "reasoning_effort"
        if switch is None:
            return None, effort, style.thinking
        told = style.thinking_on if switch else style.thinking_off
        if told is not None:
            return switch, effort, told
        if switch == (style.thinking == "none"):  # not what it does anyway
            raise _refused(param, "does not think" if switch else "cannot be kept from thinking")
        return None, effort, style.thinking


NO_WISH = Wish()


def _refused(param: str, why: str) -> RequestError:
    return RequestError(f"`{param}`: this model {why}.", param=param, code="unsupported_parameter")


def let_think(grammar: Grammar, thinking: Thinking) -> Grammar:
    """A grammar of ours, for the answer that comes after the thoughts; it has no rule `answer`."""
    if thinking == "none":
        return grammar
    before = "thought" if thinking == "opened" else f'("{_OPEN}" thought)?'
    answer = grammar.gbnf.replace("root ::=", "answer ::=", 1)
    rules = "\n".join((f"root ::= {before} answer", answer, *_up_to_close()))
    return replace(grammar, gbnf=rules)


def _up_to_close() -> Iterator[str]:
    """Any text that ends with the tag and does not have it before, and the blanks after it.

    One rule for each character of the tag that has been seen. Only its first is `<`.
    """
    yield 'thought ::= [^<] thought | "<" thought1'
    for seen in range(1, len(_CLOSE)):
        next_one = _CLOSE[seen]
        rest = f"thought{seen + 1}" if seen + 1 < len(_CLOSE) else r"[ \n]{0,4}"
        yield (f'thought{seen} ::= "{next_one}" {rest} | "<" thought1 | [^<{next_one}] thought')


class ThoughtReader:
    """Tells thoughts from answer in one growing text, never half a tag as either.

    Blanks around thoughts say nothing, and are not told.
    """

    def __init__(self, thinking: Thinking, *, resumed: bool | None = None) -> None:
        """`resumed`: the text goes on, in thoughts (True) or after them (False)."""
        # start: a tag may open. thoughts: inside. gap: blanks after them. answer: the rest.
        self._state = "start" if thinking != "none" else "answer"
        self._opened = thinking == "opened"
        self._blank = True  # nothing thought yet
        self._held = ""
        if resumed is not None:
            self._state, self._blank = ("thoughts", False) if resumed else ("answer", False)

    @property
    def is_thinking(self) -> bool:
        return self._state == "thoughts" or (self._state == "start" and self._opened)

    @property
    def is_settled(self) -> bool:
        """Whether all that was fed has been told, so that `is_thinking` says all about the rest."""
        return not self._held and self._state in ("thoughts", "answer")

    def feed(self, text: str) -> list[Reasoning | Content]:
        """Add text; returns what is now sure."""
        self._held += text
        return [said for said in self._advance() if said.text]

    def flush(self) -> list[Reasoning | Content]:
        """The text is over: half a tag is what it looks like."""
        held, self._held = self._held, ""
        said: Reasoning | Content = Content(held)
        if self.is_thinking:
            said = Reasoning(held.strip() if self._blank else held.rstrip())
        elif self._state == "gap":
            said = Content(held.lstrip())
        return [said] if said.text else []

    def _advance(self) -> Iterator[Reasoning | Content]:
        if self._state == "start":
            begin = self._held.lstrip()
            if begin.startswith(_OPEN):
                self._state, self._held = "thoughts", begin[len(_OPEN) :]
            elif not _OPEN.startswith(begin):
                self._state = "thoughts" if self._opened else "answer"
        if self._state == "thoughts":
            yield self._thought()
        if self._state == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answer"
        if self._state == "answer":
            said, self._held = Content(self._held), ""
            yield said

    def _thought(self) -> Reasoning:
        text, closed, rest = self._held.partition(_CLOSE)
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        if closed:
            self._state, self._held = "gap", rest
            return Reasoning(text.rstrip())
        # The tag, or the blanks before it, may be going on.
        sure = text[: len(text) - begun_at_end(text, _CLOSE)].rstrip()
        self._held = text[len(sure) :]
        return Reasoning(sure)
