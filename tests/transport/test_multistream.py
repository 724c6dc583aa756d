"""Who speaks what on a new stream: the listener's half, against diallers good and bad."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from meshnode.transport.multistream import GREETING, PROPOSALS_MAX, answer, proposal

KNOWN = ("/echo/1", "/http/1.1")


class Wire:
    """A stream whose dialler says `script`, one piece after each write that it waits for."""

    def __init__(self, *script: bytes) -> None:
        self.script = list(script)
        self.arrived = bytearray(self.script.pop(0) if self.script else b"")
        self.written: list[bytes] = []

    @property
    def unread_bytes(self) -> int:
        return len(self.arrived)

    async def read(self, count: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.arrived:
            raise MuxedStreamEOF("the dialler says no more")
        data = bytes(self.arrived[:count])
        del self.arrived[:count]
        return data

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.written.append(data)
        self.arrived += self.script.pop(0) if self.script else b""


def line_of(protocol: str) -> bytes:
    return proposal(protocol)[len(GREETING) :]


async def test_a_proposal_that_is_here_is_answered_in_one_write_and_not_a_byte_more_is_read() -> (
    None
):
    wire = Wire(proposal("/echo/1") + b"the first request")
    assert await answer(wire, KNOWN) == "/echo/1"
    assert wire.written == [proposal("/echo/1")], "what the dialler expects to hear, exactly"
    assert bytes(wire.arrived) == b"the first request"


async def test_a_dialler_that_waits_for_the_greeting_gets_it() -> None:
    wire = Wire(GREETING, line_of("/http/1.1"))
    assert await answer(wire, KNOWN) == "/http/1.1"
    assert wire.written == [GREETING, line_of("/http/1.1")]


async def test_a_dialler_may_try_again() -> None:
    wire = Wire(GREETING, line_of("/nope/1"), line_of("/echo/1"))
    assert await answer(wire, KNOWN) == "/echo/1"
    assert wire.written == [GREETING, b"\x03na\n", line_of("/echo/1")]


async def test_nobody_may_try_for_ever() -> None:
    wire = Wire(GREETING + line_of("/nope/1") * 100)
    assert await answer(wire, KNOWN) is None
    assert b"".join(wire.written).count(b"na\n") == PROPOSALS_MAX


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        GREETING[:10],
        GREETING,
        GREETING + b"\xff\x01" + b"x" * 300,
        GREETING + line_of("/echo/1")[:-1],
        GREETING + line_of("/echo/1")[:-1] + b" ",
    ],
)
async def test_nonsense_is_no_protocol(said: bytes) -> None:
    assert await answer(Wire(said), KNOWN) is None


@settings(deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_raise(noise: bytes, greets: bool) -> None:
    async def main() -> None:
        assert await answer(Wire((GREETING if greets else b"") + noise), ()) is None

    trio.run(main)


def test_an_id_that_does_not_fit_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="shorter"):
        proposal("/" + "x" * 127)
