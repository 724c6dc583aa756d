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
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from meshnode.identity import PeerId

__all__ = ["CheckRecord", "Dht", "Gossip", "Handler", "Host", "NewerRecord", "OnAdvert", "Stream"]


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


Handler = Callable[[Stream], Awaitable[None]]


class Host(Protocol):
    """Who is connected, and streams to them, as far as the driver needs it (`libp2p.py`)."""

    def peers(self) -> tuple[PeerId, ...]: ...

    def handle(self, protocol: str, handler: Handler, *, members_only: bool = True) -> None: ...

    def admit(self, peer: PeerId) -> None: ...

    def is_admitted(self, peer: PeerId) -> bool: ...

    async def dial(self, peer: PeerId, addrs: tuple[str, ...]) -> None: ...

    async def disconnect(self, peer: PeerId) -> None: ...

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream: ...


OnAdvert = Callable[[bytes], bool]
"""Sees every advert before it spreads, and returns whether it may."""


class Gossip(Protocol):
    """How adverts spread (`gossip.py`)."""

    def running(self) -> AbstractAsyncContextManager[None]: ...

    async def publish(self, advert: bytes) -> None: ...


CheckRecord = Callable[[bytes], PeerId | None]
"""Verifies a node record and returns its author; None refuses it."""
NewerRecord = Callable[[list[bytes]], int]
"""The index of the newest of several valid records."""


class Dht(Protocol):
    """Records and providers for those who know nobody (`dht.py`)."""

    def running(self) -> AbstractAsyncContextManager[None]: ...

    async def add_member(self, peer: PeerId, addrs: tuple[str, ...]) -> None: ...

    def remove_member(self, peer: PeerId) -> None: ...

    def size(self) -> int: ...

    async def publish_record(self, author: PeerId, record: bytes) -> bool: ...

    async def find_record(self, peer: PeerId) -> bytes | None: ...

    async def provide(self, subject: str) -> bool: ...

    async def find_providers(self, subject: str) -> dict[PeerId, tuple[str, ...]]: ...
