"""Length-prefixed frames on any stream: four bytes big-endian, then that many bytes."""

from __future__ import annotations

import trio

from meshnode.errors import RemoteProtocolError

_HEADER_BYTES = 4


async def send_frame(stream: trio.abc.SendStream, data: bytes) -> None:
    """One write, so that a frame is one packet where it fits."""
    await stream.send_all(len(data).to_bytes(_HEADER_BYTES, "big") + data)


async def receive_frame(stream: trio.abc.ReceiveStream, bytes_max: int) -> bytes | None:
    """The next frame; None at a clean end between frames.

    Raises `RemoteProtocolError` for a frame over `bytes_max` or an end inside one, and trio's
    resource errors for a broken stream.
    """
    header = await _receive_exactly(stream, _HEADER_BYTES)
    if header is None:
        return None
    length = int.from_bytes(header, "big")
    if length > bytes_max:
        raise RemoteProtocolError(f"frame of {length} bytes (limit {bytes_max})")
    body = await _receive_exactly(stream, length) if length else b""
    if body is None:
        raise RemoteProtocolError("stream ended inside a frame")
    return body


async def _receive_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        chunk = await stream.receive_some(count - len(data))
        if not chunk:
            if data:
                raise RemoteProtocolError("stream ended inside a frame")
            return None
        data += chunk
    return bytes(data)
