"""How long responses are kept, how many, and for whom."""

from __future__ import annotations

import pytest

from meshnode.engine import ChatMessage
from meshnode.gateway.dialects.kept import (
    KEPT_FOR_S,
    OVERHEAD_BYTES,
    Kept,
    KeptResponses,
    UnknownResponseError,
)


def kept(text: str = "x") -> Kept:
    return Kept(b"{}", (ChatMessage("user", text),))


def test_found_until_it_expires() -> None:
    responses = KeptResponses()
    responses.keep(b"", "r", kept(), 0.0)
    assert responses.find(b"", "r", KEPT_FOR_S - 1) == kept()
    with pytest.raises(UnknownResponseError):
        responses.find(b"", "r", KEPT_FOR_S)


def test_each_key_sees_its_own() -> None:
    responses = KeptResponses()
    responses.keep(b"alice", "r", kept(), 0.0)
    for whose in (b"bob", b""):
        with pytest.raises(UnknownResponseError):
            responses.find(whose, "r", 0.0)
        with pytest.raises(UnknownResponseError):
            responses.forget(whose, "r", 0.0)
    assert responses.find(b"alice", "r", 0.0) == kept()


def test_forgotten_when_asked() -> None:
    responses = KeptResponses()
    responses.keep(b"", "r", kept(), 0.0)
    responses.forget(b"", "r", 0.0)
    with pytest.raises(UnknownResponseError) as unknown:
        responses.find(b"", "r", 0.0, param="previous_response_id")
    assert unknown.value.param == "previous_response_id"


def test_who_takes_most_loses_the_oldest() -> None:
    size = kept().size
    assert size > OVERHEAD_BYTES
    responses = KeptResponses(bytes_max=3 * size)
    responses.keep(b"bob", "b", kept(), 0.0)
    for index in range(5):
        responses.keep(b"alice", f"a{index}", kept(), 0.0)
    assert responses.find(b"bob", "b", 0.0)
    assert responses.find(b"alice", "a3", 0.0)
    assert responses.find(b"alice", "a4", 0.0)
    with pytest.raises(UnknownResponseError):
        responses.find(b"alice", "a2", 0.0)


def test_one_that_is_too_large_drives_nobody_out() -> None:
    responses = KeptResponses(bytes_max=2 * kept().size)
    responses.keep(b"", "small", kept(), 0.0)
    responses.keep(b"", "large", kept("x" * 10_000), 0.0)
    assert responses.find(b"", "small", 0.0)
    with pytest.raises(UnknownResponseError):
        responses.find(b"", "large", 0.0)


def test_an_error_does_not_repeat_megabytes() -> None:
    assert len(str(UnknownResponseError("x" * 10**6, "response_id"))) < 300
