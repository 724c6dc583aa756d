"""Text that may be shown: the split into tokens must make no difference."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine.text import AnswerText


def feed_all(pieces: list[bytes], stop: tuple[str, ...]) -> tuple[str, bool]:
    answer = AnswerText(stop)
    text = "".join(answer.feed(piece) for piece in pieces)
    return text + answer.flush(), answer.stopped


def test_half_a_character_waits_for_its_other_half() -> None:
    answer = AnswerText()
    first, second = "🦙".encode()[:2], "🦙".encode()[2:]
    assert answer.feed(b"a" + first) == "a"
    assert answer.feed(second + b"b") == "🦙b"


def test_half_a_character_at_the_end_is_replaced() -> None:
    assert feed_all([b"ok", "é".encode()[:1]], ()) == ("ok\ufffd", False)


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "stopped"),
    [
        (["one", "\n", "\n", "two"], ("\n\n",), "one", True),
        (["one", "\n", "two"], ("\n\n",), "one\ntwo", False),
        (["aaab"], ("aab",), "a", True),
        (["EN", "DLESS"], ("END!",), "ENDLESS", False),
        (["x", "EN"], ("END",), "xEN", False),
        (["END"], ("END",), "", True),
        (["a", "b", "c"], ("abcd", "b"), "a", True),
    ],
)
def test_stop_strings(pieces: list[str], stop: tuple[str, ...], shown: str, stopped: bool) -> None:
    assert feed_all([piece.encode() for piece in pieces], stop) == (shown, stopped)


def test_nothing_of_a_possible_stop_is_shown_early() -> None:
    answer = AnswerText(("STOP",))
    assert answer.feed(b"go ST") == "go "
    assert answer.feed(b"OP and on") == ""
    assert answer.stopped
    assert answer.feed(b"more") == ""
    assert answer.flush() == ""


@given(
    text=st.text(alphabet="ab\né🦙", max_size=30),
    stop=st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), max_size=3).map(tuple),
    data=st.data(),
)
def test_any_split_gives_the_same_text(
    text: str, stop: tuple[str, ...], data: st.DataObject
) -> None:
    encoded = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=6)))
    edges = [0, *cuts, len(encoded)]
    pieces = [encoded[a:b] for a, b in itertools.pairwise(edges)]
    assert feed_all(pieces, stop) == feed_all([encoded], stop)
    shown, stopped = feed_all([encoded], stop)
    assert text.startswith(shown)
    assert stopped == any(word in text for word in stop)
    assert stopped or shown == text
