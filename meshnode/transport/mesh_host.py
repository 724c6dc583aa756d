"""The host as py-libp2p's own services (DHT, pubsub) see it: members only, names of this mesh.

A service that registers a protocol through this proxy is guarded like our own handlers, and a
protocol id that py-libp2p hard-codes (`/ipfs/kad/1.0.0`) can be replaced by one of the mesh.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from meshnode.transport.libp2p import Libp2pHost


class MeshHost:
    """Forwards everything to the real host but protocol ids and handlers."""

    def __init__(self, host: Libp2pHost, renamed: Mapping[str, str] | None = None) -> None:
        self._host = host
        self._renamed = dict(renamed or {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host.raw, name)

    def set_stream_handler(
        self, protocol_id: TProtocol, handler: Callable[[INetStream], Awaitable[None]]
    ) -> None:
        self._host.handle_raw(self._rename(protocol_id), handler)

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> INetStream:
        names = [TProtocol(self._rename(name)) for name in protocol_ids]
        return await self._host.raw.new_stream(peer_id, names)

    def _rename(self, protocol_id: str) -> str:
        return self._renamed.get(str(protocol_id), str(protocol_id))
