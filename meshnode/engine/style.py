"""How a chat template has its model think and call tools: found by trying it out.

Decides what of thoughts and tools a template knows, from a few conversations with words of our
own. A template is a program; what it says is a better witness than what it is called. Does not
know what is done about it (`gateway/reasoning.py`, `gateway/calls.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from meshnode.engine import CallStyle, ChatMessage, ChatStyle, FunctionCall, Thinking
from meshnode.engine.chat import ChatTemplate, Picture, Segment
from meshnode.errors import RequestError

__all__ = ["find_style"]

_ASKED = ChatMessage("user", "probe question")
_KEY = "probe_key"
_TOOL = json.dumps({
    "type": "function",
    "function": {
        "name": "probe_name",
        "description": "probe description",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
})  # fmt: skip
_CALL = FunctionCall("probe", "probe_name", json.dumps({_KEY: "x"}))
_CALLED = (
    _ASKED,
    ChatMessage("assistant", "", calls=(_CALL,)),
    ChatMessage("tool", "probe result", call_id="probe"),
)
# How the call above is written, for each way that can be read.
_HEAD = r'\{\s*"name":\s*"probe_name",\s*"%s":\s*\{'
_CALLS: tuple[tuple[CallStyle, re.Pattern[str]], ...] = (
    ("hermes", re.compile(r"<tool_call>\s*" + _HEAD % "arguments")),
    ("mistral", re.compile(r"\[TOOL_CALLS\]\s*\[\s*" + _HEAD % "arguments")),
    ("llama", re.compile(_HEAD % "parameters")),
)


def find_style(template: ChatTemplate) -> ChatStyle:
    """What a template does; it may be hostile, so that nothing here fails."""
    usual = _thinking(template, None)
    on, off = _thinking(template, True), _thinking(template, False)
    has_switch = _prompt(template, thinking=True) != _prompt(template, thinking=False)
    return ChatStyle(
        thinking=usual,
        thinking_on=on if has_switch else None,
        thinking_off=off if has_switch else None,
        has_effort=_prompt(template, effort="low") != _prompt(template, effort="high"),
        calls=_calls(template),
    )


def _thinking(template: ChatTemplate, thinking: bool | None) -> Thinking:
    prompt = _prompt(template, thinking=thinking)
    if prompt is None:
        return "none"
    end = prompt.rstrip()
    if end.endswith("<think>"):
        return "opened"
    if end.endswith("</think>") or "</think>" not in template.source:
        return "none"
    return "may"


def _calls(template: ChatTemplate) -> CallStyle | None:
    """Templates that print the keys of a tool as words of their own are not trusted with tools."""
    try:
        segments = template.render(_CALLED, (_TOOL,))
    except RequestError:
        return None
    text = _text(segments)
    if "probe description" not in text or "probe result" not in text:
        return None
    if any(_KEY in each.text for each in segments if isinstance(each, Segment) and each.trusted):
        return None
    return next((style for style, written in _CALLS if written.search(text)), None)


def _prompt(
    template: ChatTemplate, *, thinking: bool | None = None, effort: str | None = None
) -> str | None:
    """What is rendered; None if the template refuses."""
    try:
        segments = template.render([_ASKED], (), thinking, effort)
    except RequestError:
        return None
    return _text(segments)


def _text(segments: Sequence[Segment | Picture]) -> str:
    return "".join(each.text for each in segments if isinstance(each, Segment))
