"""Templates are programs of strangers, contents are texts of strangers; they must not mix."""

from __future__ import annotations

import pytest

from meshnode.engine import ChatMessage, Image
from meshnode.engine.chat import ChatTemplate, Picture, Segment
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
    assert render(source, ("user", " hi ")) == [
        Segment('<s>"', True),
        Segment(" hi ", False),
        Segment('"</s>', True),
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
