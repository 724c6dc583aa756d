"""Frames between the node and its engine child."""

from __future__ import annotations

import pytest

from meshnode.engine import ChatMessage, EmbedRequest, Request, Sampling, Usage, wire
from meshnode.errors import LocalProtocolError

SESSION = bytes(range(16))


@pytest.mark.parametrize(
    "prompt",
    [(ChatMessage("user", "hi"), ChatMessage("assistant", "🦙")), "plain", (1, 2, 3), "", ()],
)
def test_a_request_arrives_as_it_left(prompt: tuple[ChatMessage, ...] | str) -> None:
    request = Request(
        id="r",
        session=SESSION,
        prompt=prompt,
        sampling=Sampling(temperature=0.5, seed=7, logit_bias=((5, -100.0),)),
        max_tokens=9,
        stop=("\n",),
    )
    frame = wire.Generate.of(3, request)
    (body,) = wire.FrameReader().feed(wire.encode(frame))
    received = wire.decode_to_child(body)
    assert received == frame
    assert isinstance(received, wire.Generate)
    assert received.prompt == prompt
    assert received.sampling == request.sampling


def test_inputs_and_vectors_arrive_as_they_left() -> None:
    frame = wire.Embed.of(3, EmbedRequest("r", ("text", (1, 2)), query="q", dimensions=4))
    (body,) = wire.FrameReader().feed(wire.encode(frame))
    assert wire.decode_to_child(body) == frame
    answers: list[wire.FromChild] = [wire.Vector(3, bytes(range(8))), wire.Embedded(3)]
    data = b"".join(map(wire.encode, answers))
    assert wire.decode_from_child(wire.FrameReader().feed(data)) == answers


def test_frames_may_be_cut_anywhere() -> None:
    frames: list[wire.FromChild] = [
        wire.Text(1, "a", 1),
        wire.Done(1, "stop", Usage(3, 2, 1)),
        wire.LoadFailed("no"),
    ]
    data = b"".join(wire.encode(frame) for frame in frames)
    reader = wire.FrameReader()
    received = [frame for i in range(len(data))
                for frame in wire.decode_from_child(reader.feed(data[i : i + 1]))]  # fmt: skip
    assert received == frames


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", wire.encode(wire.Cancel(1)), b"\0\0\0\1\xc1", b"\0\0\0\0"]
)
def test_anything_else_is_an_error(data: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        wire.decode_from_child(wire.FrameReader().feed(data))


def test_a_frame_over_the_bound_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="too large"):
        wire.encode(wire.LoadFailed("x" * wire.FRAME_BYTES_MAX))
