"""What a block may say: the rules by which a voter votes or does not.

They ask whether a block is *valid*, not whether it is the best: every owner has signed that it
would, everything fits, every served model is whole, nobody who serves is dropped while it answers,
and no exclusive right moves while its holder may rely on it. Pure, given what the voter itself
knows (`Witness`). The invariants are those of docs: S4, S5, S7, S8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from meshnode.errors import RemoteProtocolError
from meshnode.messages import Body, Consent, Item, Order, Shard

__all__ = [
    "ORDER_AGE_MAX",
    "Witness",
    "covered",
    "item_key",
    "order_key",
    "refusal",
    "serving_models",
]

ORDER_AGE_MAX = 64
"""Epochs after which an order that was never heeded is void: nobody can replay it for ever."""

ItemKey = tuple[str, int, str, int, int]


@dataclass(frozen=True, slots=True)
class Witness:
    """What a voter knows by itself. The openers verify signatures and raise
    `RemoteProtocolError`; they return the signer with what it signed."""

    group: str
    open_consent: Callable[[bytes], tuple[str, Consent]]
    open_order: Callable[[bytes], tuple[str, Order]]
    may_order: Callable[[str, Order], bool]
    is_alive: Callable[[str], bool]
    is_promised: Callable[[str], bool]


def item_key(item: Item) -> ItemKey:
    """(model, replica, kind, first, end): what may have one owner in one epoch."""
    return (item.model, item.replica, item.shard.kind, item.shard.first, item.shard.end)


def order_key(order: Order, signer: str) -> tuple[str, str, str]:
    """Which orders are about the same thing: the newer one then counts."""
    kinds = {"pin": "pin", "unpin": "pin", "drain": "drain", "undrain": "drain"}
    kind = kinds.get(order.action, "claim")
    return (kind, order.subject, signer if kind == "claim" else order.peer)


def covered(items: Iterable[Item]) -> bool:
    """Whether these items of one replica are all of it, without gap or overlap (S7)."""
    shards = sorted(item.shard for item in items)
    if not shards or len({(shard.kind, shard.of) for shard in shards}) != 1:
        return False
    ends = [0, *(shard.end for shard in shards)]
    return [shard.first for shard in shards] == ends[:-1] and ends[-1] == shards[0].of


def serving_models(body: Body) -> dict[str, list[tuple[Item, ...]]]:
    """The replicas of each model whose every shard is serving."""
    replicas: defaultdict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in body.items:
        replicas[item.model, item.replica].append(item)
    served: defaultdict[str, list[tuple[Item, ...]]] = defaultdict(list)
    for (model, _), items in replicas.items():
        if all(item.state == "serving" for item in items):
            served[model].append(tuple(items))
    return dict(served)


def refusal(head: Body, epoch: int, body: Body, witness: Witness) -> str | None:
    """Why `body` must not follow `head` in `epoch`; None if it may."""
    try:
        consents = _consents(body, witness)
        orders = _orders(body, witness)
        old_orders = _orders(head, witness)
    except RemoteProtocolError:
        return "a forged consent or order"
    return (
        _refused_orders(head, body, epoch, old_orders, orders, witness)
        or _refused_items(body, consents)
        or _refused_changes(head, body, consents, witness)
        or _refused_claims(head, body, epoch, orders, witness)
    )


# --- the signed words ----------------------------------------------------------------------------


def _consents(body: Body, witness: Witness) -> dict[tuple[str, str], Consent]:
    found: dict[tuple[str, str], Consent] = {}
    for envelope in body.consents:
        signer, consent = witness.open_consent(envelope)
        if consent.group != witness.group or (signer, consent.model) in found:
            raise RemoteProtocolError("a consent for another group, or twice")
        found[signer, consent.model] = consent
    return found


def _orders(body: Body, witness: Witness) -> dict[bytes, tuple[str, Order]]:
    found: dict[bytes, tuple[str, Order]] = {}
    for envelope in body.orders:
        signer, order = witness.open_order(envelope)
        if order.group != witness.group:
            raise RemoteProtocolError("an order for another group")
        found[envelope] = (signer, order)
    return found


def _refused_orders(
    head: Body,
    body: Body,
    epoch: int,
    old: dict[bytes, tuple[str, Order]],
    new: dict[bytes, tuple[str, Order]],
    witness: Witness,
) -> str | None:
    keys = [order_key(order, signer) for signer, order in new.values()]
    if len(set(keys)) != len(keys):
        return "two orders about one thing"
    for envelope, (signer, order) in new.items():
        if envelope not in old:
            if not witness.may_order(signer, order):
                return "an order by someone who may not"
            if not order.epoch <= epoch <= order.epoch + ORDER_AGE_MAX:
                return "an order that is out of date"
    for envelope, (signer, order) in old.items():
        is_standing = order.action in ("pin", "drain")
        if is_standing and envelope not in new and order_key(order, signer) not in keys:
            return "an order in force was dropped"
    return None


# --- items ---------------------------------------------------------------------------------------


def _refused_items(body: Body, consents: dict[tuple[str, str], Consent]) -> str | None:
    keys = [item_key(item) for item in body.items]
    if len(set(keys)) != len(keys):
        return "two owners of one shard"  # S4
    replicas: defaultdict[tuple[str, int], list[Item]] = defaultdict(list)
    # By owner, model and layers: what an old and a new replica have in common is loaded once.
    committed: dict[tuple[str, str, Shard], int] = {}
    offered: dict[str, tuple[int, int]] = {}
    for (peer, _), word in consents.items():
        offered[peer] = max(offered.get(peer, (-1, 0)), (word.sequence, word.memory_bytes))
    for item in body.items:
        replicas[item.model, item.replica].append(item)
        held = (item.owner, item.model, item.shard)
        committed[held] = max(committed.get(held, 0), item.bytes)
        consent = consents.get((item.owner, item.model))
        if consent is None or consent.state in ("gone", "failed"):
            return "an owner that has not consented"
        if item.state == "serving" and not consent.is_ready(item.shard):
            return "an owner that has not said it is ready"
        is_whole = item.shard.kind == "whole" and item.state != "draining"
        if is_whole and item.bytes < consent.bytes:
            return "less memory than the owner says it needs"
        if item.owner in item.standbys or len(set(item.standbys)) != len(item.standbys):
            return "a standby twice"
        for standby in item.standbys:
            other = consents.get((standby, item.model))
            if other is None or other.state in ("gone", "failed"):
                return "a standby that has not consented"
    for items in replicas.values():
        if not covered(items):
            return "a replica with a gap"  # S7
    for item in body.items:
        if item.shard.kind == "layers" and item.state != "draining":
            consent = consents[item.owner, item.model]
            is_layers = item.shard.of == consent.layers and not item.shard.first % consent.cut_every
            if not consent.activation_bytes or not is_layers:
                return "an owner that cannot run these layers"
            if item.bytes < _layers_bytes(consent, item.shard):
                return "less memory than the layers need"
    for owner in {owner for owner, *_ in committed}:
        total = sum(size for (other, *_), size in committed.items() if other == owner)
        if total > offered[owner][1]:
            return "more memory committed than the owner offers"  # S8
    return None


def _layers_bytes(consent: Consent, shard: Shard) -> int:
    """The least that these layers take: their share of weights and KV."""
    shared = max(consent.weight_bytes - consent.edge_bytes, 0) + consent.kv_bytes
    return shared * (shard.end - shard.first) // shard.of


def _refused_changes(
    head: Body,
    body: Body,
    consents: dict[tuple[str, str], Consent],
    witness: Witness,
) -> str | None:
    """Nobody who still answers is dropped from serving without having drained, and no model loses
    its last serving replica to one that has not proved itself."""
    after = {(item_key(item), item.owner): item for item in body.items}
    for item in head.items:
        if item.state == "serving" and (item_key(item), item.owner) not in after:
            word = consents.get((item.owner, item.model))
            has_withdrawn = word is not None and word.state in ("gone", "failed")
            if witness.is_alive(item.owner) and not has_withdrawn:
                return "an owner that answers was dropped without draining"
    served = serving_models(body)
    for model, replicas in serving_models(head).items():
        if model not in served and any(
            all(
                witness.is_alive(item.owner)
                and (item_key(item), item.owner) in after
                and consents[item.owner, model].is_ready(item.shard)
                for item in items
            )
            for items in replicas
        ):
            return "a model lost its last serving replica"
    for item in head.items:
        if (
            item.state == "draining"
            and (kept := after.get((item_key(item), item.owner))) is not None
            and kept.state == "loading"
        ):
            return "a draining replica started to load again"
    return None


# --- exclusive rights ----------------------------------------------------------------------------


def _refused_claims(
    head: Body,
    body: Body,
    epoch: int,
    orders: dict[bytes, tuple[str, Order]],
    witness: Witness,
) -> str | None:
    before = {claim.right: claim for claim in head.claims}
    after = {claim.right: claim for claim in body.claims}
    if len(after) != len(body.claims):
        return "two holders of one right"
    said = {(o.action, o.subject, signer): o.epoch for signer, o in orders.values()}
    for right in before.keys() | after.keys():
        old, new = before.get(right), after.get(right)
        if old == new:
            continue
        if old is not None and (new is None or new.holder != old.holder):
            # An old release must not be used against a newer claim.
            released = said.get(("release", right, old.holder), -1) >= old.since
            if not released and witness.is_promised(old.holder):
                return "a right was taken from a holder that may rely on it"  # S5
        if new is not None:
            if ("claim", right, new.holder) not in said:
                return "a right was given to someone who did not ask"
            if new.since != epoch:
                return "a right with a wrong date"
    return None
