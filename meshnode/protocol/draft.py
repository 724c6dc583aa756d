"""The block a leader proposes: from a plan and the words it has heard to items and voters.

Pure. A plan says where replicas should be; a draft says by which next step to get there, so that
nobody stops answering meanwhile: a new owner first loads, then serves; only then the old one
drains, and is let go when what was in flight has had its time. A dead owner goes at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from meshnode.messages import (
    CLAIMS_MAX,
    CONSENTS_MAX,
    ITEMS_MAX,
    ORDERS_MAX,
    Body,
    Claim,
    Item,
    Order,
    Shard,
)
from meshnode.protocol.placement import Part, Plan, Replica
from meshnode.protocol.quorum import Faults
from meshnode.protocol.rules import ItemKey, item_key, order_key, serving_models
from meshnode.protocol.words import Word

__all__ = [
    "Candidate",
    "current_replicas",
    "draft_claims",
    "draft_items",
    "draft_orders",
    "draft_voters",
    "heeded",
]

ABSENT_S = 30.0
"""A voter that has been away so long is replaced: a restart or an upgrade takes less."""
SETTLED_S = 2.0
"""A node has been here so long before it is named a voter."""


def current_replicas(items: Iterable[Item], cut_every: Mapping[str, int]) -> tuple[Replica, ...]:
    """The replicas of a block that are not on their way out, as the planner knows them: in units
    of so many layers, by model."""
    grouped: defaultdict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        if item.state != "draining":
            grouped[item.model, item.replica].append(item)
    return tuple(
        _replica(model, number, parts, cut_every.get(model, 1))
        for (model, number), parts in grouped.items()
    )


def _replica(model: str, number: int, items: list[Item], every: int) -> Replica:
    ordered = sorted(items, key=lambda item: item.shard)
    return Replica(
        model,
        tuple(
            # The last unit has what is left over.
            Part(i.owner, i.shard.first // every, max(i.shard.end // every, 1), i.bytes)
            for i in ordered
        ),
        tuple(item.standbys for item in ordered),
        number,
    )


def draft_items(
    items: tuple[Item, ...],
    plan: Plan,
    words: Mapping[tuple[str, str], Word],
    is_alive: Callable[[str], bool],
    has_drained: Callable[[ItemKey, str], bool],
) -> tuple[Item, ...]:
    """The next block's items.

    `words` by (peer, model); `has_drained` says of a draining item that its time is over.
    """
    planned = _planned(items, plan, words)
    drafted = [_promoted(item, words) for item in planned]
    kept = {(item_key(item), item.owner) for item in drafted}
    taken = {item_key(item) for item in drafted}
    served = serving_models(Body(tuple(drafted)))
    leaving: list[Item] = []
    for item in items:
        if (item_key(item), item.owner) in kept or item_key(item) in taken:
            continue
        word = words.get((item.owner, item.model))
        if not is_alive(item.owner) or word is None or word.consent.state in ("gone", "failed"):
            continue
        if item.state == "draining":
            if not has_drained(item_key(item), item.owner):
                leaving.append(item)
        elif item.state == "serving":
            # Whoever is to follow must have proved itself first.
            follows = any(other.model == item.model for other in drafted)
            stays = follows and item.model not in served
            leaving.append(
                _staying(item, words) if stays else replace(item, state="draining", standbys=())
            )
    return _bounded(tuple(sorted((*drafted, *leaving), key=item_key))[:ITEMS_MAX])


def _bounded(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Without the standbys whose consents would not fit into the block any more."""
    named = {(item.owner, item.model) for item in items}
    bounded: list[Item] = []
    for item in items:
        more = {(standby, item.model) for standby in item.standbys} - named
        if len(named) + len(more) > CONSENTS_MAX:
            bounded.append(replace(item, standbys=()))
        else:
            named |= more
            bounded.append(item)
    return tuple(bounded)


def _planned(
    items: tuple[Item, ...], plan: Plan, words: Mapping[tuple[str, str], Word]
) -> Iterable[Item]:
    """The plan's replicas as items, each under its number; new ones are loading."""
    used: defaultdict[str, set[int]] = defaultdict(set)
    draining: dict[tuple[str, str], int] = {}
    for item in items:
        used[item.model].add(item.replica)
        word = words.get((item.owner, item.model))
        is_ready = word is not None and word.consent.is_ready(item.shard)
        if item.state == "draining" and item.shard.kind == "whole" and is_ready:
            draining[item.owner, item.model] = item.replica
    for replica in plan.replicas:
        number = replica.number
        if number < 0 and len(replica.parts) == 1:
            # Who is to serve again while it still drains just goes on.
            number = draining.pop((replica.parts[0].owner, replica.model), -1)
        if number < 0:
            number = next(n for n in range(len(used[replica.model]) + 1)
                          if n not in used[replica.model])  # fmt: skip
            used[replica.model].add(number)
        for place, part in enumerate(replica.parts):
            consent = words[part.owner, replica.model].consent
            is_whole = len(replica.parts) == 1
            of = max(consent.layers, 1)
            shard = Shard("whole", 0, of, of) if is_whole else (
                Shard(
                    "layers",
                    part.first * consent.cut_every,
                    of if part.end == consent.units else part.end * consent.cut_every,
                    of,
                )
            )  # fmt: skip
            standbys = replica.standbys[place] if place < len(replica.standbys) else ()
            item = Item(
                model=replica.model,
                name=consent.name,
                replica=number,
                shard=shard,
                owner=part.owner,
                standbys=standbys,
                state="loading",
                bytes=max(part.bytes, consent.bytes) if is_whole else part.bytes,
            )
            yield item


def _staying(item: Item, words: Mapping[tuple[str, str], Word]) -> Item:
    """An item that its successor is not ready to relieve, as its owner and standbys see it now."""
    word = words[item.owner, item.model].consent
    willing = (words.get((standby, item.model)) for standby in item.standbys)
    standbys = tuple(
        standby
        for standby, known in zip(item.standbys, willing, strict=True)
        if known is not None and known.consent.state in ("file", "ready")
    )
    size = max(item.bytes, word.bytes) if item.shard.kind == "whole" else item.bytes
    return _promoted(replace(item, standbys=standbys, bytes=size), words)


def _promoted(item: Item, words: Mapping[tuple[str, str], Word]) -> Item:
    """Serving as soon as its owner has said that it is ready, and loading again if it is not."""
    is_ready = words[item.owner, item.model].consent.is_ready(item.shard)
    return replace(item, state="serving" if is_ready else "loading")


def draft_orders(
    in_force: Iterable[tuple[str, Order, bytes]], fresh: Iterable[tuple[str, Order, bytes]]
) -> tuple[tuple[str, Order, bytes], ...]:
    """The newest order about each thing. One that takes something back stands in the block that
    heeds it, and in no later one."""
    newest: dict[tuple[str, str, str], tuple[str, Order, bytes]] = {}
    for signer, order, envelope in in_force:
        if order.action in ("pin", "drain"):
            newest[order_key(order, signer)] = (signer, order, envelope)
    for signer, order, envelope in fresh:
        key = order_key(order, signer)
        known = newest.get(key)
        if known is None and len(newest) >= ORDERS_MAX:
            continue  # it waits until one of the others is taken back
        if known is None or known[0] != signer or known[1].sequence < order.sequence:
            newest[key] = (signer, order, envelope)
    return tuple(newest[key] for key in sorted(newest))


def draft_claims(
    claims: tuple[Claim, ...],
    orders: Sequence[tuple[str, Order]],
    epoch: int,
    may_take: Callable[[str], bool],
) -> tuple[Claim, ...]:
    """Who holds what after `orders`: released rights are free, free ones go to who asks first,
    and a right may be taken over from a holder of whom `may_take` is true. Its holder may claim it
    anew, after a restart."""
    held = {claim.right: claim for claim in claims}
    for signer, order in orders:
        found = held.get(order.subject)
        is_its = found is not None and found.holder == signer and found.since <= order.epoch
        if order.action == "release" and is_its:
            del held[order.subject]
    for signer, order in sorted(orders, key=lambda each: (each[1].sequence, each[0])):
        if order.action != "claim":
            continue
        found = held.get(order.subject)
        if found is None and len(held) >= CLAIMS_MAX:
            continue
        if found is None or found.holder == signer or may_take(found.holder):
            held[order.subject] = Claim(order.subject, signer, epoch)
    return tuple(held[right] for right in sorted(held))


def heeded(
    orders: Iterable[tuple[str, Order, bytes]],
    before: tuple[Claim, ...],
    after: tuple[Claim, ...],
) -> tuple[tuple[str, Order, bytes], ...]:
    """The orders that a block with these claims does something about: a claim of a right that
    another holds waits outside."""
    held = {(claim.right, claim.holder) for claim in before}
    got = {(claim.right, claim.holder) for claim in after if claim not in before}
    relevant = {"claim": got, "release": held}
    return tuple(
        (signer, order, envelope)
        for signer, order, envelope in orders
        if order.action not in relevant or (order.subject, signer) in relevant[order.action]
    )


# --- voters --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could vote. `age_s`: how long it has been here without a break, which is the
    best guess of how long it will stay; 0 for one that is away. `is_caught_up`: knows the newest
    epoch; `absent_s`: how long it has been away.
    """

    peer: str
    age_s: float
    absent_s: float
    is_caught_up: bool
    abstains: bool = False

    @property
    def may_join(self) -> bool:
        return self.age_s >= SETTLED_S and self.is_caught_up and not self.abstains


def voters_wanted(nodes: int, faults: Faults) -> int:
    """How many voters a mesh of so many nodes should have.

    One or two nodes have one voter: two would both be needed. In an open mesh four tolerate one
    liar. More than seven or ten make agreement slower, not safer (simulations in the docs).
    """
    if faults == "crash":
        return 1 if nodes < 3 else 3 if nodes < 5 else 5 if nodes <= 30 else 7
    return 1 if nodes < 4 else 4 if nodes < 14 else 7 if nodes < 40 else 10


def draft_voters(
    voters: tuple[str, ...], candidates: Iterable[Candidate], faults: Faults
) -> tuple[str, ...]:
    """The voters of the next epoch: one step from `voters`, or the same."""
    known = {candidate.peer: candidate for candidate in candidates}
    here = [c for c in known.values() if c.age_s > 0]
    spare = sorted(
        (c for c in here if c.may_join and c.peer not in voters),
        key=lambda c: (-c.age_s, c.peer),
    )
    gone = [
        voter
        for voter in voters
        if voter not in known or known[voter].absent_s > ABSENT_S or known[voter].abstains
    ]
    step = 2 if faults == "crash" else 3
    wanted = voters_wanted(len(here), faults)
    if wanted >= len(voters) + step and len(spare) >= step:
        return (*voters, *(c.peer for c in spare[:step]))
    if gone and spare:
        return (*(voter for voter in voters if voter != gone[0]), spare[0].peer)
    if gone and wanted <= len(voters) - step:
        by_age = sorted(
            voters, key=lambda v: (v not in gone, known[v].age_s if v in known else 0.0, v)
        )
        leaving = by_age[:step]
        return tuple(voter for voter in voters if voter not in leaving)
    return voters
