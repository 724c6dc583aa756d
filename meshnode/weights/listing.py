"""Which files the members give, as they say themselves when they are asked.

Adverts tell of models that are served, and a decision's voters of what may be; a file that only
lies somewhere, ready for its first use, is known to its owner. Decides whom to ask and how long.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from meshnode.errors import PeerUnreachableError, RemoteProtocolError
from meshnode.identity import PeerId
from meshnode.messages import MESSAGE_BYTES_MAX, Files, NoLeaves, WantFiles, decode, encode
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame
from meshnode.weights.shelf import WEIGHTS_PROTOCOL, end

__all__ = ["Listing"]

logger = logging.getLogger(__name__)

LOOK_WITHIN_S = 5.0
"""A member that is there answers in a round trip."""
ASKED_MAX = 64
"""The nearest: a file that none of these has is best named to one of them."""


class Listing:
    """What was heard last; `look` asks anew."""

    def __init__(
        self,
        peers: Callable[[], Sequence[PeerId]],
        open_stream: Callable[[PeerId, str], Awaitable[Stream]],
    ) -> None:
        """`peers` are the members that can be asked now, the nearest first."""
        self._peers = peers
        self._open_stream = open_stream
        self._told: dict[PeerId, Mapping[str, str]] = {}

    def names(self) -> dict[str, str]:
        """What the files are called, by digest."""
        return {model: name for files in self._told.values() for model, name in files.items()}

    def holders(self, model: str) -> set[PeerId]:
        return {peer for peer, files in self._told.items() if model in files}

    async def look(self) -> None:
        """Ask all of them at once; who does not answer has nothing."""
        told: dict[PeerId, Mapping[str, str]] = {}
        with trio.move_on_after(LOOK_WITHIN_S):
            async with trio.open_nursery() as nursery:
                for peer in self._peers()[:ASKED_MAX]:
                    nursery.start_soon(self._ask, peer, told)
        self._told = told

    async def _ask(self, peer: PeerId, told: dict[PeerId, Mapping[str, str]]) -> None:
        try:
            stream = await self._open_stream(peer, WEIGHTS_PROTOCOL)
            try:
                await send_frame(stream, encode(WantFiles()))
                frame = await receive_frame(stream, MESSAGE_BYTES_MAX) or b""
                answer: Files | NoLeaves = decode(frame, Files | NoLeaves)  # type: ignore[arg-type]
                await stream.send_eof()
            finally:
                await end(stream)
        except (trio.BrokenResourceError, PeerUnreachableError, RemoteProtocolError) as error:
            logger.debug("weights: %s does not say what it has: %s", peer, error)
            return
        if isinstance(answer, Files):
            told[peer] = answer.names
