"""How bytes and peers are reached: the interface that everything above stands on.

In data-flow order: `quic/` is our QUIC transport, `libp2p.py` the host that uses it, with TCP,
Noise and Yamux (`yamux.py`) beside it; `multistream.py` agrees on a stream's protocol; `dht.py` and
`gossip.py` run py-libp2p's Kademlia and gossipsub for one mesh, through the proxy in
`mesh_host.py`; `mdns.py` finds peers on a LAN; `http.py` carries HTTP/1.1 over any stream and
`frames.py` messages; `addresses.py` reads and writes multiaddrs. Nothing outside this package
imports libp2p or aioquic. A transport knows peers and protocol ids; it knows no model and no
request.
"""

from __future__ import annotations

from abc import abstractmethod

import trio

__all__ = ["Stream"]


class Stream(trio.abc.HalfCloseableStream):
    """One multiplexed, flow-controlled byte stream to an authenticated peer.

    Follows trio's stream contract: `receive_some` returns b"" at a clean end and raises
    `trio.BrokenResourceError` when the peer reset the stream or is gone; `send_all` waits while
    the peer's window is full. `aclose` ends it cleanly if our side has sent EOF, else resets it.
    """

    @property
    @abstractmethod
    def peer_id(self) -> str:
        """The authenticated peer at the other end."""

    @property
    @abstractmethod
    def protocol(self) -> str:
        """The negotiated protocol id."""

    @abstractmethod
    async def reset(self) -> None:
        """Abandon both directions at once; the peer sees a reset, not an end."""
