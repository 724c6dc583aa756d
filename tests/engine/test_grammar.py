"""Answers that keep to a grammar, by the real model; and grammars that are none."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from meshnode.engine import (
    After,
    ChatMessage,
    Continuation,
    Finish,
    Grammar,
    ModelCard,
    Request,
    Sampling,
)
from meshnode.engine.process import EngineOptions, EngineProcess
from meshnode.errors import RequestError
from meshnode.gateway.calls import CALL_WORDS, CallReader
from meshnode.gateway.said import Call
from meshnode.gateway.schema import SchemaGrammar
from meshnode.gateway.tools import Function, Tools
from tests.engine.serving import started

OPTIONS = EngineOptions(context_tokens=1024, slots=4, waiting_max=4, threads=1)
WILD = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=5)
QUESTION = (ChatMessage("user", "Describe a llama as JSON."),)


@pytest.fixture
async def engine(q4_0_card: ModelCard) -> AsyncIterator[EngineProcess]:
    async with started(q4_0_card, OPTIONS) as engine:
        yield engine


def ask(gbnf: str, **changes: Any) -> Request:
    request = Request("r", b"a" * 16, QUESTION, Sampling(temperature=0), 200)
    return replace(request, grammar=Grammar(gbnf), **changes)


async def run(engine: EngineProcess, request: Request) -> tuple[str, tuple[int, ...], Finish]:
    text, ids = "", ()
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Finish):
                return text, ids, event
            text += event.text
            ids += event.ids
    raise AssertionError("the answer has no finish")


def compile_schema(schema: dict[str, Any]) -> str:
    rules = SchemaGrammar()
    return rules.text(rules.add(schema, "schema"))


SHORT = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {
        "type": "object",
        "properties": {
            "name": SHORT,
            "age": {"type": "integer", "minimum": 1, "maximum": 120},
            "wild": {"type": "boolean"},
            "height": {"type": "number", "minimum": 0},
        },
        "required": ["name", "age", "wild", "height"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {"a": SHORT, "b": {"type": "null"}, "c": {"type": ["integer", "null"]}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "array",
        "minItems": 2,
        "maxItems": 3,
        "items": {
            "type": "object",
            "properties": {"kind": {"enum": ["llama", "al\"paca", "🦙", 7]}, "tags": {
                "type": "array", "items": SHORT, "maxItems": 2}},
            "required": ["kind", "tags"],
        },
    },
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                    "value": {"const": -3},
                },
                "required": ["left", "value"],
                "additionalProperties": False,
            }
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), WILD], ids=["greedy", "wild"])
async def test_answers_validate(engine: EngineProcess, sampling: Sampling) -> None:
    for name, schema in SCHEMAS.items():
        request = ask(compile_schema(schema), sampling=sampling)
        text, _, finish = await run(engine, request)
        if name == "recursive" and finish.reason == "length":
            continue  # the model may go deeper and deeper
        assert finish.reason == "stop", (name, text)
        jsonschema.validate(json.loads(text), schema)


async def test_any_object_and_a_grammar_of_ones_own(engine: EngineProcess) -> None:
    text, _, finish = await run(engine, ask(compile_schema({"type": "object"}), sampling=WILD))
    assert text.startswith("{")
    assert finish.reason == "length" or isinstance(json.loads(text), dict)
    grammar = 'root ::= ("yes" | "no") ", " [a-c]{3} "."'
    text, _, finish = await run(engine, ask(grammar, sampling=WILD))
    assert re.fullmatch(r"(yes|no), [a-c]{3}\.", text)
    assert finish.reason == "stop"


async def test_an_answer_goes_on_in_the_middle_of_its_grammar(engine: EngineProcess) -> None:
    request = ask(compile_schema(SCHEMAS["flat"]))
    text, ids, _ = await run(engine, request)
    half = len(ids) // 2
    shown, _, _ = await run(engine, replace(request, max_tokens=half))
    come = Continuation(ids[:half], len(shown))
    rest, _, finish = await run(engine, replace(request, continuation=come, session=b"b" * 16))
    assert shown + rest == text
    assert finish.usage.completion_tokens == len(ids)
    with pytest.raises(RequestError, match="breaks its grammar"):
        await run(engine, replace(request, continuation=Continuation(ids[::-1], len(text))))


BAD = {
    "nothing": "x",
    "no root": 'other ::= "a"',
    "undefined": "root ::= nobody",
    "left recursion": 'root ::= root "a"',
    "open": 'root ::= ("a"',
    "deep": "root ::= " + "(" * 60_000,
    "repetition": 'root ::= ((("a"{900}){900}){900}){900}',
    "explosion": 'root ::= ("a"? "a"? "a"? "a"?){500}',
    "long": 'root ::= "a"\n#' + "x" * 70_000,
}


async def test_what_is_no_grammar_is_refused_and_nobody_dies(engine: EngineProcess) -> None:
    pid = engine.pid
    for name, gbnf in BAD.items():
        begun = time.monotonic()
        with pytest.raises(RequestError) as caught:
            await run(engine, ask(gbnf, max_tokens=3))
        assert caught.value.param == "grammar", name
        assert caught.value.code == "invalid_grammar"
        assert time.monotonic() - begun < 30
    # A grammar whose end cannot come, for want of an end: the answer stops where it stands.
    text, _, _ = await run(engine, ask('root ::= "a" [\\uFFFF]', max_tokens=20))
    assert text.startswith("a")
    assert engine.pid == pid


CALL = r"""root ::= "\n{\"name\": \"f\", \"city\": \"" [A-Z] [a-z]{2,9} "\"}\n</tool_call>"
"""
CALLED = re.compile(r'\n\{"name": "f", "city": "[A-Z][a-z]{2,9}"\}\n</tool_call>')


async def test_a_lazy_grammar_leaves_text_free_and_then_binds(engine: EngineProcess) -> None:
    """However wildly it is drawn, and whether the word's last token is drawn here or elsewhere."""
    lazy = Grammar(CALL, "tools", After(("<tool_call>",)))
    _, (last, *_), _ = await run(engine, ask('root ::= ">"'))
    for known, bias in (("Well: <tool_call>", ()), ("Well: <tool_call", ((last, 100.0),))):
        _, ids, _ = await run(engine, ask(f'root ::= "{known}"'))
        for seed in range(3):
            sampling = replace(WILD, seed=seed, logit_bias=bias)
            come = Continuation(ids, len(known))
            request = replace(ask("", continuation=come, sampling=sampling), grammar=lazy)
            said, _, finish = await run(engine, request)
            assert CALLED.fullmatch(said.removeprefix("<tool_call>"[len(known) - 6 :])), said
            assert finish.reason == "stop"
    free, _, _ = await run(engine, replace(ask("", max_tokens=20), grammar=lazy))
    plain, _, _ = await run(engine, replace(ask("", max_tokens=20), grammar=None))
    assert free == plain


async def test_an_answer_is_a_call_or_has_its_form(engine: EngineProcess) -> None:
    """Many draws, so that both are among them; whichever it is, it is valid."""
    city = {"properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
    parameters = {"type": "object", "additionalProperties": False, **city}
    form = {"enum": ["sunny", "rainy"]}
    function = Function("weather", None, parameters, "tools")
    tools = Tools((function,), "auto", parallel=False, form=(form, "response_format"))
    grammar = tools.grammar("hermes", "none")
    # Without a nudge the model would hardly ever begin with a tag.
    begin = Sampling(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, logit_bias=((27, 4.0),))
    said = {"call": 0, "text": 0}
    for seed in range(12):
        request = ask(grammar.gbnf, sampling=replace(begin, seed=seed))
        text, _, finish = await run(engine, request)
        assert finish.reason == "stop", text
        reader = CallReader(CALL_WORDS["hermes"], tools.names)
        pieces = [*reader.feed(text), *reader.flush()]
        told = "".join(each.text for each in pieces if not isinstance(each, Call))
        kind, schema = ("call", parameters) if reader.calls else ("text", form)
        said[kind] += 1
        jsonschema.validate(json.loads(told), schema)
    assert all(said.values()), said
