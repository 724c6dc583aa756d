"""Tools: how a conversation tells of them, and how calls are read wherever an answer is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine import ChatMessage, Delta, Finish, Usage
from meshnode.gateway.openai import Encoder, decode_chat
from meshnode.gateway.tools import Arguments, Call, Content, Function, ToolReader, Tools

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = Tools((Function("weather", "Of a city", WEATHER, "p"), Function("t-2", None, {}, "q")),
              "auto", True)  # fmt: skip
USER = ChatMessage("user", "hi")
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "a}\\"b"}}\n</tool_call>'
TWO = '<tool_call>{"arguments": {}, "name": "t-2"}</tool_call>'


def read(text, cuts=()):
    """What a reader says of a text that comes in pieces, neighbours joined."""
    reader = ToolReader(TOOLS)
    events, begin = [], 0
    for end in (*sorted(cuts), len(text)):
        events += reader.feed(text[begin:end])
        begin = end
    joined = []
    for event in events + reader.flush():
        last = joined[-1] if joined else None
        if isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            joined[-1] = Arguments(last.index, last.text + event.text)
        else:
            joined.append(event)
    return joined


FIRST = [Call(0, "weather"), Arguments(0, '{"city": "a}\\"b"}')]
UNKNOWN = '<tool_call>{"name": "x", "arguments": {}}'
MISSHAPEN = '<tool_call>{"name": ["weather"]}</tool_call>'
READ = [
    ("plain", [Content("plain")]),
    (" plain <tool ", [Content(" plain <tool ")]),
    (ONE, FIRST),
    (f"Well.\n{ONE}", [Content("Well."), *FIRST]),
    (f"{ONE}\n{TWO}", [*FIRST, Call(1, "t-2"), Arguments(1, "{}")]),
    (f"{ONE} and", [*FIRST, Content(" and")]),
    ('<tool_call>{"name": "weather", "arguments": {"ci', [FIRST[0], Arguments(0, '{"ci')]),
    ("<tool_call>\nsorry</tool_call>!", [Content("<tool_call>\nsorry</tool_call>!")]),
    (UNKNOWN, [Content(UNKNOWN)]),
    (MISSHAPEN, [Content(MISSHAPEN)]),
    ("<tool_call>", [Content("<tool_call>")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), READ)
def test_what_an_answer_says(text, said):
    assert read(text) == said


@given(st.sampled_from(READ), st.lists(st.integers(0, 150), max_size=8))
def test_it_says_the_same_wherever_it_is_cut(case, cuts):
    text, said = case
    assert read(text, [min(cut, len(text)) for cut in cuts]) == said
    assert read(text, range(len(text))) == said


def test_arguments_are_told_as_they_come():
    reader = ToolReader(TOOLS)
    assert reader.feed('<tool_call>{"name": "weather", "arguments": {"ci') == [
        Call(0, "weather"),
        Arguments(0, '{"ci'),
    ]
    assert reader.feed('ty": "Rome"') == [Arguments(0, 'ty": "Rome"')]


def test_the_tools_stand_in_the_system_message():
    added = TOOLS.introduce([USER])
    assert [message.role for message in added] == ["system", "user"]
    assert '{"type": "function", "function": {"name": "t-2", "parameters": {}}}' in added[0].content
    appended = TOOLS.introduce([ChatMessage("system", "Be brief."), USER])
    assert appended[0].content == "Be brief.\n\n" + added[0].content


def ask(**fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return decode_chat(json.dumps(body).encode())


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_earlier_calls_and_results_go_back_into_the_models_words():
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        {"role": "tool", "tool_call_id": "d", "content": "rainy"},
    ]
    said = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert ask(messages=conversation).prompt == (
        USER,
        ChatMessage("assistant", f"{said}\n{said}"),
        ChatMessage("user", "<tool_response>\nsunny\n</tool_response>\n"
                            "<tool_response>\nrainy\n</tool_response>"),
    )  # fmt: skip


def test_choices():
    tools = [tool("weather", WEATHER), tool("t-2")]
    auto = ask(tools=tools)
    assert (auto.tools.choice, auto.grammar, auto.stop) == ("auto", None, ())
    assert not auto.is_resumable
    assert ask(tools=tools, parallel_tool_calls=False).stop == ("</tool_call>",)
    none = ask(tools=tools, tool_choice="none")
    assert (none.tools, none.prompt) == (None, (USER,))
    required = ask(tools=tools, tool_choice="required").grammar
    assert "weather" in required.gbnf
    assert "t-2" in required.gbnf
    named = ask(tools=tools, tool_choice={"type": "function", "function": {"name": "t-2"}})
    assert "weather" not in named.grammar.gbnf


def test_the_shapes_of_calls():
    call = ask(tools=[tool("weather", WEATHER), tool("t-2")])
    finish = Finish("stop", Usage(1, 0, 9))
    whole = json.loads(Encoder(call, "id", "ab" * 32, 1).whole([Delta(ONE), finish]))
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    function = {"name": "weather", "arguments": '{"city": "a}\\"b"}'}
    tool_call = {"id": "call_id0000", "type": "function", "function": function}
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [tool_call],
    }
    encoder = Encoder(call, "id", "ab" * 32, 1)
    wire = b"".join(encoder.delta(Delta(text)) for text in ("Hm. ", *ONE)) + encoder.closing(finish)
    chunks = [json.loads(event[6:]) for event in wire.decode().split("\n\n")[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"content": "Hm."}
    first = {"name": "weather", "arguments": ""}
    assert deltas[1] == {"tool_calls": [{**tool_call, "index": 0, "function": first}]}
    rest = [delta["tool_calls"][0] for delta in deltas[2:-1]]
    assert {each["index"] for each in rest} == {0}
    assert "".join(each["function"]["arguments"] for each in rest) == function["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    plain = json.loads(Encoder(call, "id", "ab" * 32, 1).whole([Delta("Hello."), finish]))
    assert plain["choices"][0]["message"]["content"] == "Hello."
    assert plain["choices"][0]["finish_reason"] == "stop"
