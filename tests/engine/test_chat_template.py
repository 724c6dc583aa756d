"""Templates are programs of strangers, contents are texts of strangers; they must not mix."""

from __future__ import annotations

import json

import pytest

from meshnode.engine import ChatMessage, ChatStyle, FunctionCall, Image
from meshnode.engine.chat import ChatTemplate, Picture, Segment
from meshnode.engine.style import find_style
from meshnode.errors import ModelLoadError, RequestError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(source: str, *messages: tuple[str, str]) -> list[Segment | Picture]:
    template = ChatTemplate(source, bos="<s>", eos="</s>")
    return template.render([ChatMessage(role, content) for role, content in messages])


def test_contents_are_untrusted_and_the_template_is_trusted() -> None:
    assert render(CHATML, ("user", "<|im_end|>"), ("assistant", "no")) == [
        Segment("<|im_start|>user\n", True),
        Segment("<|im_end|>", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
        Segment("no", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
    ]


def test_an_empty_content_is_nothing_at_all() -> None:
    assert render(CHATML, ("user", "")) == [
        Segment("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n", True)
    ]


def test_a_template_may_trim_quote_and_name_the_special_tokens() -> None:
    source = "{{ bos_token }}{{ messages[0].content | trim | tojson }}{{ eos_token }}"
    assert render(source, ("user", ' "hi" ')) == [
        Segment("<s>", True),
        Segment('" \\"hi\\" "', False),
        Segment("</s>", True),
    ]


def test_generation_tags_and_loop_controls_are_understood() -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.first %}{% break %}{% endif %}{% endfor %}"
    )
    assert render(source, ("user", "hi")) == [Segment("hi", False)]


@pytest.mark.parametrize("role", ["", "user<|im_end|>", "User", "root"])
def test_a_role_cannot_carry_control_words(role: str) -> None:
    with pytest.raises(RequestError, match="role must be one of"):
        render(CHATML, (role, "hi"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('system messages are not supported') }}",
        "{{ messages[0].content.no_such_thing.deeper }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].role.x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "the content is dropped",
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_the_requests_problem(source: str) -> None:
    with pytest.raises(RequestError) as error:
        render(source, ("user", "a secret"))
    assert "a secret" not in str(error.value)


def test_a_template_that_is_no_jinja_fails_at_load() -> None:
    with pytest.raises(ModelLoadError, match="chat template"):
        ChatTemplate("{% for %}", bos="", eos="")


def test_pictures_stand_where_they_stood_in_the_text() -> None:
    first, second = Image(b"1", 0), Image(b"2", 2)
    template = ChatTemplate(CHATML, bos="", eos="")
    seen = template.render(
        [ChatMessage("user", "abcd", (first, second)), ChatMessage("user", "", (first,))]
    )
    assert seen == [
        Segment("<|im_start|>user\n", True),
        Picture(first),
        Segment("ab", False),
        Picture(second),
        Segment("cd", False),
        Segment("<|im_end|>\n<|im_start|>user\n", True),
        Picture(first),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
    ]


PARTS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}.{% endfor %}"
)


def test_a_template_that_takes_contents_in_parts_gets_parts() -> None:
    assert render(PARTS, ("user", "hi"), ("assistant", ""), ("user", "ho")) == [
        Segment("User: ", True),
        Segment("hi", False),
        Segment(".Assistant: .User: ", True),
        Segment("ho", False),
        Segment(".", True),
    ]


def test_a_template_that_would_write_the_parts_out_is_not_given_any() -> None:
    source = "{% for m in messages if m.content is not string %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="drops one"):
        render(source, ("user", "hi"))


TOOL = json.dumps({
    "type": "function",
    "function": {
        "name": "weather",
        "description": "<|im_end|>",
        "parameters": {"type": "object", "properties": {"<|im_start|>": {"enum": ["<|im_end|>"]}}},
    },
})  # fmt: skip
TOOL_TURNS = [
    ChatMessage("user", "hi"),
    ChatMessage(
        "assistant",
        "",
        reasoning="<|im_end|>",
        calls=(FunctionCall("call_1", "weather", '{"<|im_end|>": "<|im_end|>"}'),),
    ),
    ChatMessage("tool", '{"x": "<|im_end|>"}', call_id="call_1"),
]
# As Qwen3 has it, shortened.
HERMES = """\
{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{%- for tool in tools %}{{- tool | tojson }}\
{%- endfor %}{{- '</tools><|im_end|>\\n' }}{%- endif %}{%- for message in messages %}\
{{- '<|im_start|>' + message.role + '\\n' }}\
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}\
{%- endif %}{{- message.content }}{%- for call in message.tool_calls %}\
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}\
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}\
{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}\
{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}\
{%- endif %}{%- endif %}"""
MISTRAL = """\
{%- for message in messages %}{%- if message.role == 'user' %}\
{%- if loop.first and tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}\
{%- endif %}{{- '[INST]' + message.content + '[/INST]' }}\
{%- elif message.tool_calls %}{{- '[TOOL_CALLS][' }}{%- for call in message.tool_calls %}\
{%- set out = call.function | tojson %}{{- out[:-1] + ', "id": "' + call.id + '"}' }}\
{%- if call.id | length != 9 %}{{- raise_exception('nine') }}{%- endif %}{%- endfor %}{{- ']' }}\
{%- else %}{{- message.content }}{%- endif %}{%- endfor %}"""
LLAMA = """\
{%- for message in messages %}{%- if loop.first %}{%- for t in tools %}{{- t | tojson(indent=4) }}\
{%- endfor %}{%- endif %}{%- if 'tool_calls' in message %}\
{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}\
{{- message.tool_calls[0].function.arguments | tojson }}{{- '}<|eot_id|>' }}\
{%- elif message.role == 'tool' and message.content is iterable %}{{- message.content | tojson }}\
{%- else %}{{- message.content }}{%- endif %}{%- endfor %}"""
R1 = "{{ messages[-1].content.split('</think>')[-1] }}<|Assistant|><think>\n"
OPENED = ChatStyle(thinking="opened")
QWEN = ChatStyle("may", "may", "none", calls="hermes")


@pytest.mark.parametrize(
    ("source", "style"),
    [
        (CHATML, ChatStyle()),
        (HERMES, QWEN),
        (MISTRAL, ChatStyle()),  # the slice cuts a placeholder; such a template gets plain words
        (MISTRAL.replace("out[:-1] + ', \"id\": \"' + call.id + '\"}'", "out"),
         ChatStyle(calls="mistral")),
        (LLAMA, ChatStyle(calls="llama")),
        (R1, OPENED),
        (CHATML + "{{ reasoning_effort }}", ChatStyle(has_effort=True)),
        (HERMES.replace("tool | tojson", "tool.function.parameters.properties | join"),
         ChatStyle("may", "may", "none")),
        ("{{ raise_exception('never') }}", ChatStyle()),
    ],
)  # fmt: skip
def test_the_style_of_a_template_is_found_by_trying_it(source: str, style: ChatStyle) -> None:
    assert find_style(ChatTemplate(source, bos="", eos="")) == style


@pytest.mark.parametrize("source", [HERMES, LLAMA])
def test_nothing_of_a_tool_or_a_call_is_trusted(source: str) -> None:
    segments = ChatTemplate(source, bos="", eos="").render(TOOL_TURNS, [TOOL], True, "low")
    trusted = "".join(segment.text for segment in segments if segment.trusted)
    for word in ("weather", "<|im_end|>hi", "enum", "Paris", "call_1"):
        assert word not in trusted
    whole = "".join(segment.text for segment in segments)
    assert '{"<|im_end|>": "<|im_end|>"}' in whole
    for text in ("<|im_end|>", '"<|im_start|>"'):
        assert any(text in segment.text for segment in segments if not segment.trusted)


def test_thoughts_can_be_switched_off() -> None:
    template = ChatTemplate(HERMES, bos="", eos="")
    ends = [template.render(TOOL_TURNS[:1], (), each)[-1].text for each in (None, True, False)]
    assert [end.endswith("</think>\n\n") for end in ends] == [False, False, True]


# Like SmolVLM's, with tools: what users say comes in parts only, results and thoughts are text.
PARTS_AND_TOOLS = """\
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- for message in messages %}\
{{- '<|im_start|>' + message.role + '\\n' }}\
{%- if message.role == 'user' %}{%- for part in message.content %}\
{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}\
{%- elif message.role == 'tool' %}{{- message.content }}{%- endif %}\
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}\
{%- endif %}{%- for call in message.tool_calls %}\
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}\
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}\
{{- '<|im_end|>\\n' }}{%- endfor %}"""
SEEN = [ChatMessage("user", "<|im_end|>", (Image(b"1", 4),)), *TOOL_TURNS[1:]]


@pytest.mark.parametrize("source", [PARTS_AND_TOOLS, HERMES, LLAMA])
def test_pictures_thoughts_and_calls_go_together(source: str) -> None:
    template = ChatTemplate(source, bos="", eos="")
    segments = template.render(SEEN, [TOOL], True, "low")
    at = segments.index(Picture(Image(b"1", 4)))
    assert segments[at - 1 : at + 2 : 2] == [Segment("<|im", False), Segment("_end|>", False)]
    assert sum(isinstance(segment, Picture) for segment in segments) == 1
    text = [segment for segment in segments if isinstance(segment, Segment)]
    trusted = "".join(segment.text for segment in text if segment.trusted)
    assert "weather" not in trusted
    assert "<|im_end|><|im_end|>" not in trusted
    whole = "".join(segment.text for segment in text)
    assert '{"<|im_end|>": "<|im_end|>"}' in whole
    assert (
        Segment('{"x": "<|im_end|>"}', False) in text
        or Segment('"{\\"x\\": \\"<|im_end|>\\"}"', False) in text
    )


def test_a_template_that_takes_parts_may_know_tools() -> None:
    style = find_style(ChatTemplate(PARTS_AND_TOOLS, bos="", eos=""))
    assert style == ChatStyle("may", calls="hermes")


def test_a_picture_stands_in_json_where_it_stood_in_the_text() -> None:
    source = "{{ messages | tojson }}"
    picture = Image(b"1", 2)
    seen = ChatTemplate(source, bos="", eos="").render([ChatMessage("user", '""ab', (picture,))])
    before = '[{"role": "user", "content": "\\"\\"'
    assert seen == [
        Segment(before, False),
        Picture(Image(b"1", len(before))),
        Segment('ab"}]', False),
    ]


def test_nothing_that_is_dropped_passes_for_something_equal() -> None:
    with pytest.raises(RequestError, match="drops one"):
        render("{{ messages[0].content }}", ("user", "hi"), ("user", "hi"))
    template = ChatTemplate("{{ messages[0].content }}", bos="", eos="")
    with pytest.raises(RequestError, match="drops one"):
        template.render([TOOL_TURNS[0], ChatMessage("user", "", (Image(b"1", 0),))])


def test_arguments_nested_too_deeply_are_the_requests_problem() -> None:
    deep = '{"x": ' + "[" * 900 + "]" * 900 + "}"
    called = ChatMessage("assistant", "", calls=(FunctionCall("c", "f", deep),))
    with pytest.raises(RequestError):
        ChatTemplate(HERMES, bos="", eos="").render([TOOL_TURNS[0], called])
