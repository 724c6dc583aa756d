"""The Kademlia DHT of one mesh: node records as values; models and the mesh as provided keys.

What comes out of a DHT is hearsay. Values are our signed node records, so a validator refuses
what is forged, expired, of another mesh or under another peer's key; provider claims are unsigned
in Kademlia and therefore only hints whose records are fetched and verified.

py-libp2p's KadDHT is used as it is, through `MeshHost` (its protocol id is hard-coded), with its
traps avoided: keys are hashed (peers refuse keys over 50 bytes), look-ups ask for one answer
(with more it returns duplicates), silent peers cost 10 s so every operation has a bound here, and
who provides something itself is asked past (`_asking_others`).
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import trio
from libp2p.abc import IHost
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service

from meshnode.identity import PeerId
from meshnode.transport import CheckRecord, NewerRecord
from meshnode.transport.libp2p import STREAM_ERRORS, Libp2pHost, try_parse
from meshnode.transport.mesh_host import MeshHost

logger = logging.getLogger(__name__)

OPERATION_TIMEOUT_S = 25.0
"""py-libp2p waits 10 s for a dead peer; two such batches and some work."""
PROVIDERS_MAX = 8
"""Enough to reach the mesh or a model by; more makes the look-up walk on and return duplicates."""
_NAMESPACE = "node"


class Dht:
    """Publish and look up signed node records and providers."""

    def __init__(
        self, host: Libp2pHost, mesh_id: str, check: CheckRecord, newest: NewerRecord
    ) -> None:
        """`check` verifies a node record and returns its author (None refuses it); `newest`
        returns the index of the newest of several valid ones.
        """
        self._mesh_id = mesh_id
        mesh_host = MeshHost(host, {PROTOCOL_ID: f"/meshnode/{mesh_id}/kad/1.0.0"})
        self._kad = KadDHT(
            cast(IHost, mesh_host),
            DHTMode.SERVER,
            validator=NamespacedValidator(
                {_NAMESPACE: _RecordValidator(check, newest)}, strict_validation=True
            ),
            validator_changed=True,
            strict_validation=True,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with background_trio_service(self._kad):
            yield

    async def add_member(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        """A member that can be asked; the DHT only ever talks to members."""
        usable = [address for text in addrs if (address := try_parse(text)) is not None]
        if usable:
            info = PeerInfo(ID.from_string(peer), usable)
            await self._kad.routing_table.add_peer(info, skip_server_mode_check=True)

    def remove_member(self, peer: PeerId) -> None:
        self._kad.routing_table.remove_peer(ID.from_string(peer))

    def size(self) -> int:
        """Members in our routing table."""
        return self._kad.get_routing_table_size()

    async def publish_record(self, author: PeerId, record: bytes) -> bool:
        """Store our signed record near its key. False if nobody could take it in time."""
        return await self._bounded(self._kad.put_value, _record_key(author), record) is not None

    async def find_record(self, peer: PeerId) -> bytes | None:
        """A peer's record as the DHT has it; already validated, still to be compared by age."""
        found = await self._bounded(self._kad.get_value, _record_key(peer), 1)
        return found if isinstance(found, bytes) else None

    async def provide(self, subject: str) -> bool:
        """Announce that we have `subject`: a model digest, or "" for the mesh itself."""
        return bool(await self._bounded(self._kad.provide, self._provider_key(subject)))

    async def find_providers(self, subject: str) -> dict[PeerId, tuple[str, ...]]:
        """Who claims to have `subject`, and where, ourselves left out; unsigned, so hints only."""
        key = self._provider_key(subject)
        found = await self._bounded(self._asking_others().find_providers, key, PROVIDERS_MAX)
        own = self._kad.host.get_id()
        providers: dict[PeerId, tuple[str, ...]] = {}
        for info in found if isinstance(found, list) else []:
            if info.peer_id == own:
                continue
            peer = PeerId(str(info.peer_id))
            providers[peer] = tuple(str(address).partition("/p2p/")[0] for address in info.addrs)
        return providers

    def _asking_others(self) -> KadDHT:
        """The DHT, but for what it has stored itself: py-libp2p asks nobody else if that is
        anything at all, even if it is only what this node has announced of itself
        (https://github.com/libp2p/py-libp2p/blob/main/libp2p/kad_dht/provider_store.py)."""
        store = copy.copy(self._kad.provider_store)
        store.get_providers = lambda key: []  # type: ignore[method-assign]
        kad = copy.copy(self._kad)
        kad.provider_store = store
        return kad

    async def _bounded(self, operation: Callable[..., object], *args: object) -> object:
        """Run one DHT operation within its bound. Failures are normal: hence None."""
        with trio.move_on_after(OPERATION_TIMEOUT_S):
            try:
                result = await operation(*args)  # type: ignore[misc]
            except (*STREAM_ERRORS, ValueError) as error:
                logger.debug("dht: %s failed: %s", getattr(operation, "__name__", "?"), error)
                return None
            return True if result is None else result
        return None

    def _provider_key(self, subject: str) -> str:
        digest = hashlib.sha256(f"{self._mesh_id}/provider/{subject}".encode()).hexdigest()
        return "1220" + digest  # a sha2-256 multihash in hex


class _RecordValidator(Validator):
    """Accepts exactly the valid node records of this mesh, each under its author's key."""

    def __init__(self, check: CheckRecord, newest: NewerRecord) -> None:
        self._check = check
        self._newest = newest

    def validate(self, key: str, value: bytes) -> None:
        author = self._check(value)
        if author is None or key != _record_key(author):
            raise ValueError("not a valid node record for this key")

    def select(self, key: str, values: list[bytes]) -> int:
        return self._newest(values)


def _record_key(peer: PeerId) -> str:
    # Peers refuse look-ups for keys over 50 bytes; this has 38.
    return f"/{_NAMESPACE}/{hashlib.sha256(peer.encode()).hexdigest()[:32]}"
