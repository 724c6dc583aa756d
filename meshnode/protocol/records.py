"""Who exists and where: the newest signed node record of every peer of one mesh.

A record reaches us from its author, from another member or from the DHT; who brought it does not
matter, because only its author can make one. Refused, and counted by reason: forged, malformed,
of another mesh, expired, or older than one we hold. Decides nothing about dialling or trust.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from meshnode.credentials import CLOCK_SKEW_S
from meshnode.errors import RemoteProtocolError
from meshnode.identity import PeerId, Signed
from meshnode.messages import NodeRecord, decode

RECORD_BYTES_MAX = 8 * 1024
"""The longest legal record, 16 addresses and 32 models, has 6.5 KiB with its signature."""
RECORDS_MAX = 4096
"""About 2 MiB of records; a mesh beyond that finds the rest through the DHT when needed."""


@dataclass(frozen=True, slots=True)
class KnownRecord:
    """A verified record, with the envelope to pass on and the receiver's own expiry."""

    peer: PeerId
    record: NodeRecord
    envelope: bytes
    expires_at: float


class RecordBook:
    """The newest record of each peer; bounded; a sans-IO core."""

    def __init__(self, mesh_id: str, open_record: Callable[[bytes], Signed]) -> None:
        """`open_record` verifies an envelope or raises `RemoteProtocolError`."""
        self._mesh_id = mesh_id
        self._open = open_record
        self._known: dict[PeerId, KnownRecord] = {}
        self._sequences: dict[PeerId, int] = {}
        self._expires_at = math.inf  # no record that we keep expires before
        self.refused: Counter[str] = Counter()

    def receive(self, envelope: bytes, now: float, unix_s: float) -> KnownRecord | None:
        """Keep a record if it is valid and news. None if refused (counted) or not newer."""
        known = self.check(envelope, now, unix_s)
        if known is None:
            return None
        last = self._sequences.get(known.peer, -1)
        if known.record.sequence < last:
            self.refused["rolled back"] += 1
            return None
        if known.record.sequence == last:
            return None
        if known.peer not in self._known and len(self._known) >= RECORDS_MAX:
            self._make_room()
        self._known[known.peer] = known
        self._expires_at = min(self._expires_at, known.expires_at)
        self._sequences[known.peer] = known.record.sequence
        return known

    def check(self, envelope: bytes, now: float, unix_s: float) -> KnownRecord | None:
        """Verify without keeping: what a DHT node does with records that pass through it."""
        if len(envelope) > RECORD_BYTES_MAX:
            self.refused["too large"] += 1
            return None
        try:
            signed = self._open(envelope)
        except RemoteProtocolError:
            self.refused["forged"] += 1
            return None
        try:
            record = decode(signed.payload, NodeRecord)
        except RemoteProtocolError:
            self.refused["malformed"] += 1
            return None
        if record.mesh != self._mesh_id:
            self.refused["foreign mesh"] += 1
            return None
        left_s = record.issued_at + record.ttl_s + CLOCK_SKEW_S - unix_s
        if left_s <= 0:
            self.refused["expired"] += 1
            return None
        # The receiver counts the life from receipt, so a skewed clock cannot shorten it; the
        # author's own time only bounds how long an old record can be replayed to a newcomer.
        return KnownRecord(signed.signer, record, envelope, now + min(record.ttl_s, left_s))

    def get(self, peer: PeerId) -> KnownRecord | None:
        return self._known.get(peer)

    def __iter__(self) -> Iterator[KnownRecord]:
        return iter(tuple(self._known.values()))

    def __len__(self) -> int:
        return len(self._known)

    def tick(self, now: float) -> list[PeerId]:
        """Forget what has expired; returns whom."""
        if self._expires_at > now:
            return []
        expired = [known.peer for known in self._known.values() if known.expires_at <= now]
        for peer in expired:
            # The sequence stays: an expired record must not come back from somebody's cache.
            del self._known[peer]
        left = (known.expires_at for known in self._known.values())
        self._expires_at = min(left, default=math.inf)
        if len(self._sequences) > 2 * RECORDS_MAX:
            for peer in [p for p in self._sequences if p not in self._known][:RECORDS_MAX]:
                del self._sequences[peer]
        return expired

    def deadline(self) -> float | None:
        return None if self._expires_at == math.inf else self._expires_at

    def _make_room(self) -> None:
        """Let go of the record that would go next; its author may tell it to us again."""
        known = min(self._known.values(), key=lambda other: other.expires_at)
        del self._known[known.peer]
        self._sequences[known.peer] = known.record.sequence - 1
