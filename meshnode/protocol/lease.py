"""Exclusive rights by durable support: at no instant of true time has a right two holders.

A block says who holds a right (`messages.Claim`). To act on it, the holder also needs, now, the
live promises of a quorum of voters. It heartbeats them; a voter's promise binds the voter for
`LEASE_S` from *receipt*, and the owner relies on it for `TERM_S` from *sending*. The idea is
CockroachDB's store liveness (docs/tla-plus/StoreLiveness; pkg/kv/kvserver/storeliveness/doc.go)
with durations in place of shared timestamps, as in Gray and Cheriton's leases (SOSP 1989): only
the clocks' *rates* must agree, within `DRIFT`, and they must go on in suspend (`clock.py`).

The promise: "for `LEASE_S` I notarize no block that takes a right from you." Why that suffices,
for an owner O that knows epoch j and its voters V(j), and a block of epoch k > j that takes the
right from O and is decided by a quorum Q of V(k-1):

1. *One promise.* True time from sending to the owner's end is at most TERM_S / (1 - DRIFT), from
   receipt to the voter's end at least LEASE_S / (1 + DRIFT). TERM_S makes them equal, and nothing
   is received before it is sent: the owner stops first, whatever the delays.
2. *The same voters.* Q and the quorum O relies on share a voter v. Before v notarized, its
   promises to O had ended; after it, v withholds until the epoch is decided, and from then on v
   knows epoch k: O, which does not, is promised nothing it would count. So O's lease is over when
   the block is decided. Nobody else acts on the block earlier.
3. *Other voters.* Say m, j < m < k, is the first epoch that changed them. A block that changes the
   voters need not wait for promises to end, but who notarizes one withholds from *everybody*.
   Hence any quorum that O can count has a promise older than the decision of m, and its lease
   ends within `LEASE_S` of that. Every voter in Q learnt of m later still, and then waited
   `LEASE_S` before it took anything from anybody. The two sets of voters need not even overlap.
4. *Crashes.* Promises are not written down: a voter waits `LEASE_S` after its start, as if it had
   promised everything to everybody in its last moment. What it withholds follows from its votes,
   which are on disk before they are sent.

What this needs of the caller, one `Grants` and one `Lease` for each group:

* A promise counts for a group only if the voter, when it gave it, knew no newer epoch of the
  group than the owner does when it hears of it (`Heartbeat.standings`, `Support.standings`).
* `withhold` in the same step as the decision to notarize, and again after a restart for every
  stored vote in the undecided epoch. `resume` when the epoch is decided; before that only if each
  view we voted in so has been nullified by a quorum, for then it decides nothing any more.
* `restart` whenever the voters change, or an epoch was skipped and so may hide a change.
* Heartbeats carry numbers that this identity never used before, also before a restart.
* A right is taken only if `is_promised` is False at the moment of the vote, anew in every view.
  A release signed by the holder stands in for that if it is younger than its present claim, and
  if the holder stopped relying before it signed and never resumes, not even after a restart.
* `holds` is true at its `now`, not afterwards; receivers refuse what comes under an old epoch.

Not covered: a recovery signed by the root moves rights without asking the old voters. It is safe
only after fewer than a quorum of those have been alive for `LEASE_S`.
"""

from __future__ import annotations

import math

__all__ = ["DRIFT", "LEASE_S", "TERM_S", "Grants", "Lease"]

LEASE_S = 3.0
"""Of this the owner has two and a half heartbeats: one may be lost. A dead holder's rights are free
after it."""
DRIFT = 0.1
"""How far a clock's rate may be from true. Crystals keep 1e-4; but what sets a clock right slews
it, the kernel's NTP by 5e-4 and chrony by 8 % unless told otherwise."""
TERM_S = LEASE_S * (1 - DRIFT) / (1 + DRIFT)
"""The owner's share of a promise, if its clock is as slow and the voter's as fast as assumed."""
WAIT_S = LEASE_S * (1 + DRIFT) / (1 - DRIFT)
"""A voter's wait after its start. `LEASE_S` would do, since `TERM_S` is shorter by both errors;
this way the wait does not lean on what owners compute."""
PEERS_MAX = 4096
"""As many as a node holds adverts of."""
ASKED_MAX = 64
"""Heartbeats of one lease time, with room for one more to each voter that connects."""
VOTERS_REMEMBERED_MAX = 64
"""Several times the voters of one epoch, since they are replaced one by one."""


class Grants:
    """The voter's side: what it has promised, and to whom."""

    def __init__(self, started_at: float) -> None:
        """Promises given before `started_at` are forgotten, so they are waited out."""
        self._waits_until = started_at + WAIT_S
        self._ends: dict[str, float] = {}
        self._withheld: set[str] = set()
        self._withheld_from_all = False

    def support(self, peer: str, now: float) -> bool:
        """Promise `peer` to take nothing from it for `LEASE_S`. False: nothing is promised.

        `now` is read after the heartbeat has come.
        """
        if self._withheld_from_all or peer in self._withheld:
            return False
        if peer not in self._ends and len(self._ends) >= PEERS_MAX:
            self._ends = {other: end for other, end in self._ends.items() if end > now}
            if len(self._ends) >= PEERS_MAX:
                return False
        self._ends[peer] = max(now + LEASE_S, self._ends.get(peer, -math.inf))
        return True

    def is_promised(self, peer: str, now: float) -> bool:
        """Whether `peer` may rely on us: then we must not vote to take a right from it."""
        return now < max(self._waits_until, self._ends.get(peer, -math.inf))

    def withhold(self, peers: tuple[str, ...] | None) -> None:
        """Promise nothing to `peers`, from whom the block we vote for takes a right.

        None, if it changes the voters: nothing to anybody. Adds to what is withheld already,
        for any of the blocks we voted for in this epoch may be the one that is decided.
        """
        if peers is None:
            self._withheld_from_all = True
        else:
            self._withheld.update(peers)

    def resume(self) -> None:
        """The epoch is decided, or our votes in it are void: promise to everybody again."""
        self._withheld.clear()
        self._withheld_from_all = False

    def restart(self, now: float) -> None:
        """The voters have changed: wait for what the former ones may have promised."""
        self._waits_until = max(self._waits_until, now + WAIT_S)


class Lease:
    """The owner's side: until when it may rely on its voters."""

    def __init__(self) -> None:
        self._asked: dict[int, float] = {}
        self._last = -1
        self._ends: dict[str, float] = {}

    def asked(self, sequence: int, now: float) -> None:
        """Heartbeat `sequence` is about to be sent. Numbers rise; one that several voters get
        counts from its first sending.
        """
        if sequence <= self._last:
            return
        self._last = sequence
        if len(self._asked) >= ASKED_MAX:
            # An answer to the oldest will go unheard: that shortens a lease, never lengthens it.
            del self._asked[next(iter(self._asked))]
        self._asked[sequence] = now

    def supported(self, voter: str, sequence: int) -> None:
        """`voter` promised upon heartbeat `sequence`; ignored if we do not know its sending.

        When the answer came does not matter, so it is not asked.
        """
        sent_at = self._asked.get(sequence)
        if sent_at is None:
            return
        if voter not in self._ends and len(self._ends) >= VOTERS_REMEMBERED_MAX:
            del self._ends[min(self._ends, key=lambda other: (self._ends[other], other))]
        self._ends[voter] = max(sent_at + TERM_S, self._ends.get(voter, -math.inf))

    def until(self, voters: tuple[str, ...], quorum: int) -> float:
        """When the promises of fewer than `quorum` (at least 1) of the distinct `voters` are left.

        -inf if there never were that many.
        """
        ends = sorted(
            (self._ends[voter] for voter in set(voters) & self._ends.keys()), reverse=True
        )
        return ends[quorum - 1] if len(ends) >= quorum else -math.inf

    def holds(self, voters: tuple[str, ...], quorum: int, now: float) -> bool:
        """Whether the right that the newest block gives us is ours at this instant."""
        return now < self.until(voters, quorum)
