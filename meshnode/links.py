"""How far our peers are, measured: the planner predicts nothing from assumed links.

Round-trip times come from the transport, which sees them in what is sent anyway. Bandwidth needs
bytes, so each peer is asked for a few once an hour, one peer at a time. Knows nothing of what the
figures are for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import trio

from meshnode.errors import PeerUnreachableError
from meshnode.identity import PeerId
from meshnode.messages import LINKS_MAX, Link
from meshnode.transport import Stream
from meshnode.transport.libp2p import Libp2pHost

logger = logging.getLogger(__name__)

LINK_PROTOCOL = "/meshnode/link/1"
PROBE_BYTES = 256 * 1024
"""An eighth of a second on a home uplink. Only the second half is timed, when the sender's window
has grown; a fast link far away is still taken for slower than it is (one window a round trip)."""
PROBE_EVERY_S = 10.0
PROBE_AGAIN_S = 3600.0
PROBE_TIMEOUT_S = 10.0
SERVE_AGAIN_S = 5.0
"""Nobody can make us send more than 50 KB/s this way."""
PEERS_MAX = 4096
_CHUNK = bytes(16 * 1024)


class Links:
    """What this node has measured of the ways to its peers."""

    def __init__(self, host: Libp2pHost) -> None:
        self._host = host
        self._bytes_per_s: dict[PeerId, tuple[int, float]] = {}
        self._served: dict[str, float] = {}
        host.handle(LINK_PROTOCOL, self._serve)

    def measured(self, peers: Iterable[PeerId]) -> tuple[Link, ...]:
        """The links to those of `peers` that are connected, nearest first."""
        rtts = ((self._host.rtt_s(peer), peer) for peer in peers)
        known = sorted((rtt_s, peer) for rtt_s, peer in rtts if rtt_s is not None)
        return tuple(
            Link(peer, round(1e6 * rtt_s), self._bytes_per_s.get(peer, (0, 0.0))[0])
            for rtt_s, peer in known[:LINKS_MAX]
        )

    async def run(self, peers: Callable[[], Iterable[PeerId]]) -> None:
        """Probe one peer after the other until cancelled."""
        while True:
            await trio.sleep(PROBE_EVERY_S)
            now = trio.current_time()
            due = [
                peer
                for peer in sorted(peers())
                if peer not in self._bytes_per_s
                or now >= self._bytes_per_s[peer][1] + PROBE_AGAIN_S
            ]
            if due:
                await self._probe(due[0])

    async def _probe(self, peer: PeerId) -> None:
        rate = 0
        try:
            with trio.move_on_after(PROBE_TIMEOUT_S):
                async with await self._host.open_stream(peer, LINK_PROTOCOL) as stream:
                    rate = await _timed(stream)
        except (PeerUnreachableError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("no bandwidth to %s: %s", peer, error)
        if len(self._bytes_per_s) >= PEERS_MAX:
            del self._bytes_per_s[next(iter(self._bytes_per_s))]
        # A peer that did not answer is asked again in an hour too: it is measured for plans only.
        self._bytes_per_s[peer] = (rate, trio.current_time())

    async def _serve(self, stream: Stream) -> None:
        """Send the bytes that a peer wants to time."""
        now, peer = trio.current_time(), stream.peer_id
        if now < self._served.get(peer, -SERVE_AGAIN_S) + SERVE_AGAIN_S:
            await stream.reset()
            return
        if len(self._served) >= PEERS_MAX:
            self._served.clear()
        self._served[peer] = now
        with trio.move_on_after(PROBE_TIMEOUT_S):
            for _ in range(PROBE_BYTES // len(_CHUNK)):
                await stream.send_all(_CHUNK)
            await stream.send_eof()
            await stream.receive_some(1)  # its end: all has arrived


async def _timed(stream: Stream) -> int:
    """Bytes per second of the second half of a probe; 0 if it was cut short."""
    received, half_at, half = 0, None, 0
    await stream.send_eof()
    while chunk := await stream.receive_some(64 * 1024):
        received += len(chunk)
        if received > PROBE_BYTES:
            return 0
        if half_at is None and received >= PROBE_BYTES // 2:
            half_at, half = trio.current_time(), received
    if half_at is None or received < PROBE_BYTES:
        return 0
    return round((received - half) / max(trio.current_time() - half_at, 1e-4))
