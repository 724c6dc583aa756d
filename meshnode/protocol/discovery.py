"""Whom to dial, and when.

Addresses come from the operator (bootstrap peers), from the disk (peers of the last run), from
signed records, the DHT and mDNS. Up to `CONNECTIONS_TARGET` members every node is connected to
every other, which is what makes the death of a peer visible everywhere within seconds; beyond
that a node keeps a random sample. Knows peers and addresses; not what is said on a connection.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from enum import Enum, auto

from meshnode.identity import PeerId
from meshnode.messages import ADDRS_MAX, PEERS_MAX, GetPeers
from meshnode.protocol import Connect, Effect, Send

CONNECTIONS_TARGET = 64
"""64 idle QUIC connections cost about 8 MiB and 1 % of a core (libp2p measurements, doubled)."""
DIALS_MAX = 8
"""Concurrent dials: a handshake costs about 12 ms of CPU, so 8 keep below 0.1 s of backlog."""
BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 60.0
CONTENDED_DIAL_DELAY_S = 1.0
"""Of two members that learn of each other at once, the one with the larger id waits this long,
so that one connection is made and not two."""
FORGET_AFTER_FAILURES = 65
"""About an hour: two members that a long outage parts find each other without a third."""
ASK_FIRST_S = 5.0
ASK_EVERY_S = 30.0
"""Asking one random member for its peers: often while young, then every half minute."""
ASK_YOUNG_COUNT = 6
PEERS_KNOWN_MAX = 4096


class Source(Enum):
    """Who says where a peer is; in the order in which we believe them."""

    OPERATOR = auto()
    RECORD = auto()
    HINT = auto()


class _State(Enum):
    IDLE = auto()
    DIALLING = auto()
    CONNECTED = auto()


@dataclass(slots=True)
class _Peer:
    told: dict[Source, tuple[str, ...]] = field(default_factory=dict)
    addrs: tuple[str, ...] = ()
    """Where to dial, the most credible first: no hint can hide what the peer has signed."""
    state: _State = _State.IDLE
    failures: int = 0
    dial_at: float = 0.0

    @property
    def permanent(self) -> bool:
        """The operator named it: dialled for ever."""
        return Source.OPERATOR in self.told

    def tell(self, source: Source, addrs: tuple[str, ...]) -> None:
        self.told[source] = addrs
        believed = (address for source in Source for address in self.told.get(source, ()))
        self.addrs = tuple(dict.fromkeys(believed))[:ADDRS_MAX]


class Discovery:
    """A sans-IO core: addresses in, `Connect` and `GetPeers` out."""

    def __init__(self, own: PeerId, rng: random.Random) -> None:
        self._own = own
        self._rng = rng
        self._peers: dict[PeerId, _Peer] = {}
        self._members: dict[PeerId, None] = {}
        self._preferred: dict[PeerId, None] = {}
        self._asked = 0
        self._ask_at = 0.0
        self._dial_at: float | None = None  # when somebody may be dialled next; None: to be found

    def learn(
        self, peer: PeerId, addrs: tuple[str, ...], now: float, source: Source = Source.HINT
    ) -> None:
        """Remember where a peer is. What a source says replaces what it said before, but an
        operator's addresses come one at a time and all count.
        """
        if peer == self._own or not addrs:
            return
        self._dial_at = None
        known = self._peers.get(peer)
        if known is None:
            if len(self._peers) >= PEERS_KNOWN_MAX and source is not Source.OPERATOR:
                return
            contended = source is not Source.OPERATOR and self._own > peer
            known = self._peers[peer] = _Peer(
                dial_at=now + (CONTENDED_DIAL_DELAY_S if contended else 0.0)
            )
        before = known.addrs
        earlier = known.told.get(source, ()) if source is Source.OPERATOR else ()
        known.tell(source, (*earlier, *addrs)[:ADDRS_MAX])
        if before and known.addrs != before:
            known.failures = 0
            known.dial_at = min(known.dial_at, now)

    def prefer(self, peers: tuple[PeerId, ...]) -> None:
        """Be connected to these, whether or not there is room for more members."""
        if tuple(self._preferred) != peers:
            self._preferred = dict.fromkeys(peers)
            self._dial_at = None

    def connected(self, peer: PeerId) -> None:
        known = self._peers.setdefault(peer, _Peer())
        known.state = _State.CONNECTED
        self._dial_at = None

    def joined(self, peer: PeerId, now: float) -> None:
        """The connected peer is a member: it may be asked for others."""
        known = self._peers.setdefault(peer, _Peer())
        known.state = _State.CONNECTED
        known.failures = 0
        self._members[peer] = None
        self._dial_at = None
        if self._asked < ASK_YOUNG_COUNT:
            self._ask_at = min(self._ask_at, now)

    def dial_failed(self, peer: PeerId, now: float) -> None:
        self._retry_later(peer, now)

    def disconnected(self, peer: PeerId, now: float) -> None:
        self._members.pop(peer, None)
        self._retry_later(peer, now)

    def left(self, peer: PeerId) -> None:
        """The peer said goodbye: do not call it, it will come back by itself."""
        self._members.pop(peer, None)
        self._dial_at = None
        known = self._peers.get(peer)
        if known is not None and not known.permanent:
            del self._peers[peer]

    def tick(self, now: float) -> list[Effect]:
        effects = self._dial(now) if self._next_dial_at() <= now else []
        if self._members and self._ask_at <= now:
            self._asked += 1
            period_s = ASK_FIRST_S if self._asked < ASK_YOUNG_COUNT else ASK_EVERY_S
            self._ask_at = now + period_s * self._rng.uniform(0.75, 1.25)
            effects.append(Send(self._rng.choice(tuple(self._members)), GetPeers(PEERS_MAX)))
        return effects

    def _dial(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        self._dial_at = None
        busy = sum(peer.state is _State.DIALLING for peer in self._peers.values())
        room = CONNECTIONS_TARGET - busy - len(self._members)
        for peer_id, peer in self._peers.items():
            if busy >= DIALS_MAX:
                break
            if room <= 0 and peer_id not in self._preferred:
                continue
            if peer.state is _State.IDLE and peer.addrs and peer.dial_at <= now:
                peer.state = _State.DIALLING
                busy, room = busy + 1, room - 1
                effects.append(Connect(peer_id, peer.addrs))
        return effects

    def deadline(self) -> float | None:
        at = min(self._next_dial_at(), self._ask_at if self._members else math.inf)
        return None if at == math.inf else at

    def _next_dial_at(self) -> float:
        """Found anew only when something has changed: a node may know of thousands of peers."""
        if self._dial_at is None:
            self._dial_at = self._find_dial_at()
        return self._dial_at

    def _find_dial_at(self) -> float:
        busy = sum(peer.state is _State.DIALLING for peer in self._peers.values())
        is_full = busy + len(self._members) >= CONNECTIONS_TARGET
        times = [
            peer.dial_at
            for peer_id, peer in self._peers.items()
            if peer.state is _State.IDLE
            and peer.addrs
            and (not is_full or peer_id in self._preferred)
        ]
        if busy >= DIALS_MAX:
            return math.inf  # the end of a dial is what happens next
        return min(times, default=math.inf)

    def addresses(self) -> dict[PeerId, tuple[str, ...]]:
        """What is worth keeping for the next start: members' addresses, newest knowledge."""
        return {p: self._peers[p].addrs for p in self._members if self._peers[p].addrs}

    def _retry_later(self, peer: PeerId, now: float) -> None:
        self._dial_at = None
        known = self._peers.get(peer)
        if known is None:
            return
        known.state = _State.IDLE
        known.failures += 1
        if not known.addrs or (known.failures > FORGET_AFTER_FAILURES and not known.permanent):
            del self._peers[peer]
            return
        backoff_s = min(BACKOFF_FIRST_S * 2.0 ** min(known.failures - 1, 16), BACKOFF_MAX_S)
        known.dial_at = now + backoff_s * self._rng.uniform(0.75, 1.25)
