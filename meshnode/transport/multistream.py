"""multistream-select 1.0: which protocol a new stream speaks (libp2p connections spec).

The dialler proposes, the listener accepts or says "na". `proposal` is what we send ahead of the
first bytes, so that opening a stream costs no round trip; `answer` is the listener's half, which
sends its greeting and its acceptance in one packet where the proposal is here already.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from libp2p.stream_muxer.exceptions import MuxedStreamEOF

GREETING = b"\x13/multistream/1.0.0\n"
_NOT_AVAILABLE = b"\x03na\n"
LINE_BYTES_MAX = 127
"""One length byte; the longest id in use, a DHT's with its mesh, has 60."""
PROPOSALS_MAX = 8
"""py-libp2p's services propose three at most before they give up."""


def proposal(protocol: str) -> bytes:
    """Greeting and proposal; the listener echoes exactly this when it accepts."""
    line = protocol.encode() + b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise ValueError(f"protocol ids are shorter than {LINE_BYTES_MAX} bytes")
    return GREETING + bytes([len(line)]) + line


async def answer(raw: Any, known: Container[str]) -> str | None:
    """Agree with the dialler of `raw` (an `IMuxedStream`) on one of `known`; None if it cannot.

    Raises py-libp2p's stream errors if the stream breaks.
    """
    if await _read(raw, len(GREETING)) != GREETING:
        return None
    unsent = GREETING
    for _ in range(PROPOSALS_MAX):
        if unsent and not getattr(raw, "unread_bytes", 0):
            await raw.write(unsent)  # a dialler that waits for it before it proposes
            unsent = b""
        prefix = await _read(raw, 1)
        if not prefix or prefix[0] > LINE_BYTES_MAX:
            return None
        line = await _read(raw, prefix[0])
        protocol = line[:-1].decode("utf-8", "replace")
        if line.endswith(b"\n") and protocol in known:
            await raw.write(unsent + prefix + line)
            return protocol
        await raw.write(unsent + _NOT_AVAILABLE)
        unsent = b""
    return None


async def _read(raw: Any, count: int) -> bytes:
    """Exactly `count` bytes, or fewer at the end of the stream."""
    data = b""
    while len(data) < count:
        try:
            piece: bytes = await raw.read(count - len(data))
        except MuxedStreamEOF:
            break
        if not piece:
            break
        data += piece
    return data
