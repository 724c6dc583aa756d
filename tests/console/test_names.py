"""What people write for nodes and models, and what they are told when it is not clear."""

from __future__ import annotations

import pytest

from meshnode.console.names import find_model, find_node
from meshnode.errors import ConfigError
from tests.protocol.cluster import key_of

ADA, BOB, EVE = (str(key_of(name).peer_id) for name in ("ada", "bob", "eve"))
MODELS = {"ab" * 32: "small", "ac" * 32: "small", "cd" * 32: "big"}


@pytest.mark.parametrize("text", [BOB, BOB[-8:], f"…{BOB[-8:]}", f" {BOB[-4:]}", BOB[:-3]])
def test_a_node_is_known_by_either_end_of_its_id(text: str) -> None:
    assert find_node(text, ADA, (BOB, EVE)) == BOB


def test_self_is_this_node() -> None:
    assert find_node("self", ADA, (BOB,)) == ADA


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("12D3", "fits several nodes"),
        (BOB[-3:], "at least 4 characters"),
        ("", "at least 4 characters"),
        ("nobody", "begins or ends so"),
        (BOB[10:20], "begins or ends so"),
    ],
)
def test_an_unclear_node_is_refused_with_those_there_are(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as told:
        find_node(text, ADA, (BOB, EVE))
    assert '"self"' in str(told.value)


def test_a_model_is_known_by_its_name_or_its_digest() -> None:
    assert find_model("big", MODELS) == "cd" * 32
    assert find_model("small@ac", MODELS) == "ac" * 32
    assert find_model("CDCD", MODELS) == "cd" * 32


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("small", "more than one model: say which of small@abab"),
        ("none", "Models here: big, small"),
        ("small@ff", "Models here"),
        ("a", "Models here"),
    ],
)
def test_an_unclear_model_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        find_model(text, MODELS)
