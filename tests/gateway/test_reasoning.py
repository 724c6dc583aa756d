"""Thoughts: told apart wherever an answer is cut, asked for, gone on with by another replica."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine import ChatStyle, Continuation, Delta, Finish, Grammar, Usage
from meshnode.errors import RequestError
from meshnode.gateway.openai import Encoder, decode_chat
from meshnode.gateway.reasoning import ThoughtReader, Wish, let_think
from meshnode.gateway.resume import Progress, join_continuation, note, split_continuation
from meshnode.gateway.said import Reasoning
from tests.fakes import WordEngine
from tests.gateway.link import Link

QWEN = ChatStyle("may", "may", "none", calls="hermes")
R1 = ChatStyle("opened")
CASES = [
    ("may", "<think>\nHm. \n</think>\n\nYes.", "Hm.", "Yes."),
    ("may", " \n<think>Hm.</think>Yes. ", "Hm.", "Yes. "),
    ("may", "<think></think>Yes.", "", "Yes."),
    ("may", "<think>\n\n</think>\n\nYes.", "", "Yes."),
    ("may", "Yes <think>no</think>", "", "Yes <think>no</think>"),
    ("may", " <thi", "", " <thi"),
    ("may", "<think>a </th b </thin", "a </th b </thin", ""),
    ("may", "<think>a <</think>b</think>c", "a <", "b</think>c"),
    ("opened", "Hm.\n</think>\nYes.", "Hm.", "Yes."),
    ("opened", "<think>\nHm.\n</think>\nYes.", "Hm.", "Yes."),
    ("opened", "\nHm. \n", "Hm.", ""),
    ("opened", "<", "<", ""),
    ("none", "<think>a</think>", "", "<think>a</think>"),
]  # fmt: skip


def told(reader, pieces):
    thoughts, content = [], []
    said = [each for piece in pieces for each in reader.feed(piece)] + reader.flush()
    for each in said:
        assert each.text
        (thoughts if isinstance(each, Reasoning) else content).append(each.text)
        assert not (isinstance(each, Reasoning) and content), "thoughts come first"
    return "".join(thoughts), "".join(content)


def cut(text, cuts):
    ends = [0, *sorted(min(each, len(text)) for each in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(ends)]


@pytest.mark.parametrize(("thinking", "text", "thoughts", "content"), CASES)
@given(cuts=st.lists(st.integers(0, 40), max_size=8))
def test_thoughts_are_told_apart_however_they_are_cut(thinking, text, thoughts, content, cuts):
    for pieces in ([text], list(text), cut(text, cuts)):
        assert told(ThoughtReader(thinking), pieces) == (thoughts, content)


@given(
    text=st.text(st.sampled_from("<>/think \na"), max_size=40),
    thinking=st.sampled_from(["may", "opened"]),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_every_split_of_every_text_says_the_same(text, thinking, cuts):
    assert told(ThoughtReader(thinking), cut(text, cuts)) == told(ThoughtReader(thinking), [text])


@given(text=st.text(st.sampled_from("<>/think \na"), max_size=30), begun=st.booleans())
def test_another_reader_goes_on_wherever_nothing_is_held_back(text, begun):
    text = "<think>a" * begun + text
    for at in range(len(text)):
        first = ThoughtReader("may")
        said = first.feed(text[:at])
        if not first.is_settled:
            continue
        second = ThoughtReader("may", resumed=first.is_thinking)
        said += second.feed(text[at:]) + second.flush()
        thoughts = "".join(each.text for each in said if isinstance(each, Reasoning))
        content = "".join(each.text for each in said if not isinstance(each, Reasoning))
        assert (thoughts, content) == told(ThoughtReader("may"), [text])


@pytest.mark.parametrize(
    ("style", "wish", "granted"),
    [
        (QWEN, Wish(), (None, None, "may")),
        (QWEN, Wish(True), (True, None, "may")),
        (QWEN, Wish(False), (False, None, "none")),
        (QWEN, Wish(effort="none"), (False, None, "none")),
        (QWEN, Wish(effort="low"), "reasoning_effort"),
        (R1, Wish(True), (None, None, "opened")),
        (R1, Wish(False), "chat_template_kwargs.enable_thinking"),
        (R1, Wish(effort="none"), "reasoning_effort"),
        (ChatStyle(), Wish(False, "none"), (None, None, "none")),
        (ChatStyle(), Wish(True), "chat_template_kwargs.enable_thinking"),
        (ChatStyle("may", has_effort=True), Wish(effort="low"), (None, "low", "may")),
    ],
)
def test_a_wish_is_granted_or_refused_by_name(style, wish, granted):
    if isinstance(granted, str):
        with pytest.raises(RequestError) as refused:
            wish.granted(style)
        assert refused.value.param == granted
    else:
        assert wish.granted(style) == granted


def test_grammars_let_the_model_think_first():
    grammar = Grammar('root ::= "a"\n', "response_format")
    assert let_think(grammar, "none") == grammar
    assert let_think(grammar, "opened").gbnf.startswith('root ::= thought answer\nanswer ::= "a"')
    assert let_think(grammar, "may").gbnf.startswith('root ::= ("<think>" thought)? answer')


# --- as clients see it ---------------------------------------------------------------------------


def ask(**fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return decode_chat(json.dumps(body).encode())


def chunks(wire: bytes):
    events = [event.rpartition("\n")[2] for event in wire.decode().split("\n\n")]
    return [json.loads(event[6:]) for event in events if event.startswith("data: {")]


def test_streamed_and_whole():
    text, finish = "<think>\nHm. Or </think>\nYes.", Finish("stop", Usage(1, 0, 28))
    call = ask(stream=True, stream_options={"include_usage": True})
    encoder = Encoder(call, "id", "ab" * 32, 1, QWEN)
    wire = b"".join(encoder.delta(Delta(each)) for each in text) + encoder.closing(finish)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(wire) if chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm. Or"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert len(deltas) > 8
    usage = chunks(wire)[-1]["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 23}
    whole = json.loads(Encoder(ask(), "id", "ab" * 32, 1, QWEN).whole([Delta(text, 9), finish]))
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm. Or", "Yes.")
    plain = json.loads(Encoder(ask(), "id", "ab" * 32, 1).whole([Delta(text), finish]))
    assert plain["choices"][0]["message"]["content"] == text


def test_notes_tell_where_in_the_thoughts_an_answer_is():
    come = Continuation((1, 2), 9, 2, True)
    assert split_continuation(*join_continuation(come, b"body")) == (come, b"body")
    progress = Progress()
    event = b"data: x\n\n"
    progress.feed(note([Delta("ab", 1, (7,)), Delta("c", 1, (8,))], 2, True) + event)
    assert progress.continuation() == Continuation((7, 8), 3, 2, True)
    progress.feed(note([Delta("d", 1, (9,))], 3, False) + event)
    assert progress.continuation() == Continuation((7, 8, 9), 4, 3, False)


THINKS = {"messages": [{"role": "user", "content": "<think> so it is </think> or not"}]}


@pytest.mark.parametrize("die_after", range(1, 7))
async def test_another_replica_goes_on_thinking(die_after):
    async with trio.open_nursery() as nursery:
        first = WordEngine(tells_ids=True, die_after=die_after, tokens_default=7, style=QWEN)
        second = WordEngine(tells_ids=True, tokens_default=7, style=QWEN)
        link = Link(nursery, b=first, c=second)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response, body = await link.ask(**THINKS, **options)
        assert response.status_code == 200
        told = chunks(body)
        deltas = [chunk["choices"][0]["delta"] for chunk in told if chunk["choices"]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "so it is"
        assert "".join(delta.get("content", "") for delta in deltas) == "or not "
        assert told[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}
        assert second.requests
        nursery.cancel_scope.cancel()


async def test_a_model_that_cannot_refuses_by_name():
    async with trio.open_nursery() as nursery:
        link = Link(nursery, b=WordEngine())
        for fields, param in (
            ({"reasoning_effort": "high"}, "reasoning_effort"),
            ({"chat_template_kwargs": {"enable_thinking": True}},
             "chat_template_kwargs.enable_thinking"),
            ({"chat_template_kwargs": {"budget": 1}}, "chat_template_kwargs.budget"),
        ):  # fmt: skip
            response, body = await link.ask(**fields)
            assert response.status_code == 400
            assert json.loads(body)["error"]["param"] == param
        nursery.cancel_scope.cancel()
