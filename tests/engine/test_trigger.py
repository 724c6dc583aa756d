"""Where a grammar begins to bind, wherever an answer is cut into tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine import After
from meshnode.engine.trigger import Trigger

CALL = After(("<tool_call>",))
JSON = After(('{"name":', '<|tag|>{"name":'), at_start=True)
CASES = [
    (CALL, "hello <tool_call>{", "hello <tool_call>"),
    (CALL, "hello <tool <tool_call>", "hello <tool <tool_call>"),
    (CALL, "<think><tool_call></think>", "<think><tool_call>"),
    (After(CALL.words, thinking="may"), " <think><tool_call></think>a<tool_call>b",
     " <think><tool_call></think>a<tool_call>"),
    (After(CALL.words, thinking="may"), "a<think><tool_call>", "a<think><tool_call>"),
    (After(CALL.words, thinking="opened"), "<tool_call></think><tool_call>b",
     "<tool_call></think><tool_call>"),
    (After(CALL.words, thinking="opened"), "<tool_call>b", None),
    (JSON, ' \n{"name": 1', ' \n{"name":'),
    (JSON, '<|tag|>{"name": 1', '<|tag|>{"name":'),
    (JSON, 'a {"name": 1', None),
    (JSON, '{"nome": 1, "x": {"name": 1', None),
    (After(JSON.words, True, "opened"), '{"name":</think>\n{"name":1',
     '{"name":</think>\n{"name":'),
    (After(JSON.words, True, "may"), '<think>x</think>{"name":1', '<think>x</think>{"name":'),
    (After(JSON.words, True, "may"), '<thought>x</think>{"name":1', None),
]  # fmt: skip


def bound_after(after: After, pieces: list[bytes]) -> str | None:
    trigger, said = Trigger(after), b""
    for piece in pieces:
        before = trigger.begins(piece)
        if before is not None:
            return (said + before).decode()
        trigger.accept(piece)
        said += piece
        assert len(trigger._tail) < 64
    return None


@pytest.mark.parametrize(("after", "text", "until"), CASES)
@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_it_is_the_same_place_however_an_answer_is_cut(after, text, until, cuts):
    data = text.encode()
    assert bound_after(after, [data[at : at + 1] for at in range(len(data))]) == until
    ends = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[begin:end] for begin, end in pairwise(ends)]
    assert bound_after(after, pieces) == until


def test_a_long_answer_is_not_kept():
    assert bound_after(CALL, [b"word "] * 10_000 + [b"<tool", b"_call>"]) is not None
