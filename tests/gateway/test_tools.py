"""Tools: how a conversation tells of them, and how calls are read wherever an answer is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine import (
    ChatMessage,
    ChatStyle,
    Delta,
    Finish,
    FunctionCall,
    Image,
    Logprob,
    TokenLogprobs,
    Usage,
)
from meshnode.errors import RequestError
from meshnode.gateway.calls import CALL_WORDS, CallReader
from meshnode.gateway.openai import Encoder, decode_chat
from meshnode.gateway.said import Arguments, Call, Content
from meshnode.gateway.tools import Function, Tools, in_plain_words

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
TWO = '<tool_call>\n{"name": "t-2", "arguments": {}}\n</tool_call>'


def read(text, cuts=(), style="hermes"):
    """What a reader says of a text that comes in pieces, neighbours joined."""
    reader = CallReader(CALL_WORDS[style], TOOLS.names)
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
BOTH = [*FIRST, Call(1, "t-2"), Arguments(1, "{}")]
ARRAY = (
    '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "a}\\"b"}, "id": "a1"}, '
    '{"name": "t-2", "arguments": {}}]'
)
OBJECT = '{"name": "weather", "parameters": {"city": "a}\\"b"}}'
UNKNOWN = '<tool_call>{"name": "x", "arguments": {}}'
MISSHAPEN = '<tool_call>{"name": ["weather"]}</tool_call>'
READ = [
    ("hermes", "plain", [Content("plain")]),
    ("hermes", " plain <tool ", [Content(" plain <tool ")]),
    ("hermes", ONE, FIRST),
    ("hermes", f"Well.\n{ONE}", [Content("Well."), *FIRST]),
    ("hermes", f"{ONE}\n{TWO}", BOTH),
    ("hermes", f"{ONE} and", [*FIRST, Content(" and")]),
    ("hermes", f"{ONE}\n<tool_call>\n{{", FIRST),
    ("hermes", ONE[:49], [FIRST[0], Arguments(0, '{"ci')]),
    ("hermes", "<tool_call>\nsorry</tool_call>!", [Content("<tool_call>\nsorry</tool_call>!")]),
    ("hermes", UNKNOWN, [Content(UNKNOWN)]),
    ("hermes", MISSHAPEN, [Content(MISSHAPEN)]),
    ("hermes", "<tool_call>", [Content("<tool_call>")]),
    ("mistral", ARRAY, BOTH),
    ("mistral", "Hm " + ARRAY, [Content("Hm"), *BOTH]),
    ("mistral", ARRAY[:-1], BOTH),
    ("mistral", "[TOOL_CALLS]x", [Content("[TOOL_CALLS]x")]),
    ("llama", OBJECT, FIRST),
    ("llama", "\n<|python_tag|>" + OBJECT, FIRST),
    ("llama", '{"type": "function", ' + OBJECT[1:], FIRST),
    ("llama", "So: " + OBJECT, [Content("So: " + OBJECT)]),
    ("llama", '{"name": "x", "parameters": {}}', [Content('{"name": "x", "parameters": {}}')]),
    ("llama", '{"na', [Content('{"na')]),
]  # fmt: skip


@pytest.mark.parametrize(("style", "text", "said"), READ)
@given(cuts=st.lists(st.integers(0, 150), max_size=8))
def test_an_answer_says_the_same_wherever_it_is_cut(style, text, said, cuts):
    assert read(text, (), style) == said
    assert read(text, [min(cut, len(text)) for cut in cuts], style) == said
    assert read(text, range(len(text)), style) == said


def test_arguments_are_told_as_they_come():
    reader = CallReader(CALL_WORDS["hermes"], TOOLS.names)
    assert reader.feed('<tool_call>{"name": "weather", "arguments": {"ci') == [
        Call(0, "weather"),
        Arguments(0, '{"ci'),
    ]
    assert reader.feed('ty": "Rome"') == [Arguments(0, 'ty": "Rome"')]


def test_the_tools_stand_in_the_system_message():
    added = in_plain_words([USER], TOOLS)
    assert [message.role for message in added] == ["system", "user"]
    assert '{"type": "function", "function": {"name": "t-2", "parameters": {}}}' in added[0].content
    appended = in_plain_words([ChatMessage("system", "Be brief."), USER], TOOLS)
    assert appended[0].content == "Be brief.\n\n" + added[0].content


def test_plain_words_and_pictures_go_together():
    picture = Image(b"1", 1)
    called = (FunctionCall("c", "f", "{}"),)
    turns = [
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "hi", (picture,)),
        ChatMessage("assistant", "hm", reasoning="so", calls=called),
        ChatMessage("tool", "42", call_id="c"),
        ChatMessage("user", "ho", (picture,)),
    ]
    plain = in_plain_words(turns, TOOLS)
    assert [turn.role for turn in plain] == ["system", "user", "assistant", "user", "user"]
    assert [turn.images for turn in plain] == [turn.images for turn in turns]
    assert plain[2].reasoning == "so"
    assert not plain[2].calls
    assert "42" in plain[3].content


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
    asked = ask(messages=conversation)
    called = FunctionCall("c", "weather", '{"city": "Rome"}')
    assert asked.prompt[1] == ChatMessage("assistant", "", calls=(called, called))
    assert asked.request("r", b"", ChatStyle(calls="mistral")).prompt == asked.prompt
    assert asked.request("r", b"", ChatStyle()).prompt == (
        USER,
        ChatMessage("assistant", f"{said}\n{said}"),
        ChatMessage("user", "<tool_response>\nsunny\n</tool_response>\n"
                            "<tool_response>\nrainy\n</tool_response>"),
    )  # fmt: skip


def grammar(style=None, **fields):
    return ask(**fields).request("r", b"", ChatStyle(calls=style)).grammar


def test_choices():
    tools = [tool("weather", WEATHER), tool("t-2")]
    auto = grammar(tools=tools)
    assert auto.after.words == ("<tool_call>",)
    assert "{0,7}" in auto.gbnf
    assert not ask(tools=tools).is_resumable
    assert "{0,7}" not in grammar(tools=tools, parallel_tool_calls=False).gbnf
    none = ask(tools=tools, tool_choice="none")
    assert (none.tools, none.prompt, none.grammar) == (None, (USER,), None)
    required = grammar(tools=tools, tool_choice="required")
    assert required.after is None
    assert "weather" in required.gbnf
    assert "t-2" in required.gbnf
    named = grammar(tools=tools, tool_choice={"type": "function", "function": {"name": "t-2"}})
    assert "weather" not in named.gbnf


FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}


def test_an_answer_is_a_call_or_has_the_form_that_is_asked_for():
    tools = [tool("weather", WEATHER)]
    both = grammar(tools=tools, response_format=FORM)
    assert both.after is None, "it binds from the first character on"
    assert both.gbnf.startswith('root ::= "<tool_call>" ')
    assert "yes" in both.gbnf.partition("\n")[2]
    forced = grammar(tools=tools, response_format=FORM, tool_choice="required")
    assert "yes" not in forced.gbnf, "a call must come, so nothing else does"
    untold = grammar(tools=tools, response_format=FORM, tool_choice="none")
    assert untold == grammar(response_format=FORM)
    schema = {"type": "string", "pattern": "x+"}
    strange = {**FORM, "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(RequestError) as refused:
        ask(tools=tools, response_format=strange)
    assert refused.value.param == "response_format.json_schema.schema.pattern"


def test_probabilities_are_those_of_all_tokens_also_of_calls():
    """As many as were drawn, in their order, streamed or whole; none comes twice."""
    call = ask(tools=[tool("weather", WEATHER)], logprobs=True)
    events = [
        Delta(each, logprobs=(TokenLogprobs(Logprob(each.encode(), -0.5), ()),))
        for each in ("Hm. ", *ONE)
    ]
    finish = Finish("stop", Usage(1, 0, len(events)))
    whole = json.loads(Encoder(call, "id", "ab" * 32, 1).whole([*events, finish]))
    told = [each["token"] for each in whole["choices"][0]["logprobs"]["content"]]
    assert "".join(told) == f"Hm. {ONE}"
    encoder = Encoder(call, "id", "ab" * 32, 1)
    wire = b"".join(map(encoder.delta, events)) + encoder.closing(finish)
    choices = [json.loads(event[6:])["choices"][0] for event in wire.decode().split("\n\n")[:-2]]
    streamed = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
    assert [each["token"] for some in streamed for each in some] == told
    assert choices[0]["delta"] == {"content": "Hm."}


def test_a_template_that_knows_tools_is_given_them():
    asked = ask(tools=[tool("weather", WEATHER)])
    request = asked.request("r", b"", ChatStyle("opened", calls="mistral"))
    assert (request.prompt, request.shown) == ((USER,), ("[TOOL_CALLS]",))
    assert json.loads(request.tools[0])["function"]["parameters"] == WEATHER
    assert request.grammar.after.thinking == "opened"
    assert asked.request("r", b"", ChatStyle()).tools == ()
    llama = grammar("llama", tools=[tool("weather", WEATHER)], tool_choice="required")
    assert '"{\\"name\\":"' in llama.gbnf


def test_a_schema_that_cannot_be_promised_is_only_refused_if_it_is_strict():
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x+"}}}
    assert "object" in grammar(tools=[tool("f", schema)]).gbnf
    strict = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    with pytest.raises(RequestError) as refused:
        ask(tools=[strict])
    assert refused.value.param == "tools[0].function.parameters.properties.a.pattern"


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
