"""Every reason for which a block is refused, provoked once, and the blocks that may pass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import pytest

from meshnode.errors import RemoteProtocolError
from meshnode.messages import Body, Claim, Consent, Item, Order, Shard
from meshnode.protocol import rules
from meshnode.protocol.rules import ORDER_AGE_MAX, Witness, covered, refusal, serving_models

M = TypeVar("M", Consent, Order)
GROUP, MODEL, OTHER = "aa" * 16, "ab" * 32, "cd" * 32
EPOCH = 100
_KEPT: dict[bytes, tuple[str, Consent | Order]] = {}


def sealed(signer: str, message: Consent | Order) -> bytes:
    """An envelope, without the cryptography."""
    envelope = signer.encode() + b"/" + msgspec.msgpack.encode(message)
    _KEPT[envelope] = (signer, message)
    return envelope


def consent(peer: str, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "sequence": 1, "model": MODEL, "name": "smol", "state": "ready", "wanted": False,
        "bytes": 10, "memory_bytes": 25, "weight_bytes": 5, "kv_bytes": 3, "layers": 4,
    }  # fmt: skip
    return sealed(peer, Consent(group=GROUP, **{**fields, **changes}))  # type: ignore[arg-type]


def item(owner: str, **changes: object) -> Item:
    fields: dict[str, object] = {
        "model": MODEL, "name": "smol", "replica": 0, "shard": Shard("whole", 0, 4, 4),
        "standbys": (), "state": "serving", "bytes": 10,
    }  # fmt: skip
    return Item(owner=owner, **{**fields, **changes})  # type: ignore[arg-type]


def order(signer: str, action: str, subject: str = "", peer: str = "", **changes: object) -> bytes:
    fields: dict[str, object] = {"group": GROUP, "sequence": 1, "epoch": EPOCH - 1}
    given = {**fields, **changes}
    return sealed(signer, Order(action=action, subject=subject, peer=peer, **given))  # type: ignore[arg-type]


@dataclass(frozen=True)
class World:
    dead: frozenset[str] = frozenset()
    promised: frozenset[str] = frozenset()
    outlaws: frozenset[str] = frozenset()

    def witness(self) -> Witness:
        return Witness(
            GROUP,
            _opener(Consent),
            _opener(Order),
            lambda signer, order: signer not in self.outlaws,
            lambda peer: peer not in self.dead,
            lambda peer: peer in self.promised,
        )


def _opener(kind: type[M]) -> Callable[[bytes], tuple[str, M]]:
    def open_(envelope: bytes) -> tuple[str, M]:
        signer, message = _KEPT.get(envelope, ("", None))
        if not isinstance(message, kind):
            raise RemoteProtocolError("forged")
        return signer, message

    return open_


HEAD = Body((item("ann", standbys=("bea",)),), consents=(consent("ann"), consent("bea")))
DEAD_ANN = World(dead=frozenset({"ann"}))
PIN = order("ann", "pin", MODEL, "bea")
PINNED = msgspec.structs.replace(HEAD, orders=(PIN,))
HELD = msgspec.structs.replace(HEAD, claims=(Claim("pen", "ann", 90),))
LAYERS = (
    item("ann", shard=Shard("layers", 0, 2, 4)),
    item("bea", shard=Shard("layers", 2, 4, 4)),
)
LOADING = tuple(msgspec.structs.replace(each, state="loading") for each in LAYERS)
CUTS = {"state": "file", "activation_bytes": 4, "edge_bytes": 1}
STAGES = (consent("ann", **CUTS, parts=((0, 2),)), consent("bea", **CUTS, parts=((2, 4),)))


def changed(body: Body, **changes: object) -> Body:
    return msgspec.structs.replace(body, **changes)


REFUSED: list[tuple[str, Body, Body, World]] = [
    ("a forged consent or order", HEAD, changed(HEAD, consents=(b"noise",)), World()),
    (
        "a forged consent or order",
        HEAD,
        changed(HEAD, consents=(*HEAD.consents, consent("ann", sequence=2))),
        World(),
    ),
    ("a forged consent or order", HEAD, changed(HEAD, orders=(b"noise",)), World()),
    (
        "two orders about one thing",
        PINNED,
        changed(PINNED, orders=(PIN, order("bea", "unpin", MODEL, "bea"))),
        World(),
    ),
    ("an order by someone who may not", HEAD, PINNED, World(outlaws=frozenset({"ann"}))),
    (
        "an order that is out of date",
        HEAD,
        changed(HEAD, orders=(order("ann", "pin", MODEL, "bea", epoch=EPOCH - ORDER_AGE_MAX - 1),)),
        World(),
    ),
    (
        "an order that is out of date",
        HEAD,
        changed(HEAD, orders=(order("ann", "pin", MODEL, "bea", epoch=EPOCH + 1),)),
        World(),
    ),
    ("an order in force was dropped", PINNED, HEAD, World()),
    ("two owners of one shard", HEAD, changed(HEAD, items=(item("ann"), item("bea"))), World()),
    (
        "an owner that has not consented",
        HEAD,
        changed(HEAD, items=(*HEAD.items, item("cat", replica=1))),
        World(),
    ),
    (
        "an owner that has not consented",
        HEAD,
        changed(HEAD, consents=(consent("ann", state="gone"), consent("bea"))),
        World(),
    ),
    (
        "an owner that has not said it is ready",
        HEAD,
        changed(HEAD, consents=(consent("ann", state="file"), consent("bea"))),
        World(),
    ),
    (
        "less memory than the owner says it needs",
        HEAD,
        changed(HEAD, items=(item("ann", bytes=9),)),
        World(),
    ),
    ("a standby twice", HEAD, changed(HEAD, items=(item("ann", standbys=("ann",)),)), World()),
    (
        "a standby twice",
        HEAD,
        changed(HEAD, items=(item("ann", standbys=("bea", "bea")),)),
        World(),
    ),
    (
        "a standby that has not consented",
        HEAD,
        changed(HEAD, items=(item("ann", standbys=("cat",)),)),
        World(),
    ),
    ("a replica with a gap", Body(), Body(LAYERS[:1], consents=STAGES), World()),
    (
        "an owner that has not said it is ready",
        Body(),
        Body(LAYERS, consents=(STAGES[0], consent("bea", **CUTS, parts=((0, 4),)))),
        World(),
    ),
    (
        "an owner that cannot run these layers",
        Body(),
        Body(LOADING, consents=(consent("ann", state="file"), STAGES[1])),
        World(),
    ),
    (
        "less memory than the layers need",
        Body(),
        Body(tuple(msgspec.structs.replace(i, bytes=2) for i in LAYERS), consents=STAGES),
        World(),
    ),
    (
        "more memory committed than the owner offers",
        HEAD,
        changed(
            HEAD,
            items=(*HEAD.items, item("ann", model=OTHER, bytes=20)),
            consents=(*HEAD.consents, consent("ann", model=OTHER)),
        ),
        World(),
    ),
    (
        "an owner that answers was dropped without draining",
        HEAD,
        changed(HEAD, items=(item("bea"),)),
        World(),
    ),
    (
        "a model lost its last serving replica",
        HEAD,
        changed(HEAD, items=(item("ann", state="draining"),)),
        World(),
    ),
    (
        "a draining replica started to load again",
        changed(HEAD, items=(item("ann", state="draining"), item("bea", replica=1))),
        changed(HEAD, items=(item("ann", state="loading"), item("bea", replica=1))),
        World(),
    ),
    (
        "two holders of one right",
        HELD,
        changed(
            HELD,
            claims=(*HELD.claims, Claim("pen", "bea", EPOCH)),
            orders=(order("bea", "claim", "pen"),),
        ),
        World(),
    ),
    (
        "a right was taken from a holder that may rely on it",
        HELD,
        changed(HELD, claims=(Claim("pen", "bea", EPOCH),), orders=(order("bea", "claim", "pen"),)),
        World(promised=frozenset({"ann"})),
    ),
    (
        "a right was taken from a holder that may rely on it",
        HELD,
        changed(HELD, claims=(), orders=(order("ann", "release", "pen", epoch=89),)),
        World(promised=frozenset({"ann"})),
    ),
    (
        "a right was given to someone who did not ask",
        HELD,
        changed(HELD, claims=(Claim("pen", "bea", EPOCH),)),
        World(),
    ),
    (
        "a right with a wrong date",
        HEAD,
        changed(
            HEAD,
            claims=(Claim("pen", "bea", 7),),
            orders=(order("bea", "claim", "pen", epoch=EPOCH - ORDER_AGE_MAX),),
        ),
        World(),
    ),
]


@pytest.mark.parametrize(
    ("reason", "head", "body", "world"),
    REFUSED,
    ids=[f"{n}: {each[0]}" for n, each in enumerate(REFUSED)],
)
def test_a_block_is_refused_for_this(reason: str, head: Body, body: Body, world: World) -> None:
    assert refusal(head, EPOCH, body, world.witness()) == reason


PASSES: dict[str, tuple[Body, Body, World]] = {
    "nothing changes": (HEAD, HEAD, World()),
    "a first block": (Body(), HEAD, World()),
    "its standby takes over from a dead owner": (
        HEAD,
        changed(HEAD, items=(item("bea"),)),
        DEAD_ANN,
    ),
    "nobody takes over": (HEAD, Body(), DEAD_ANN),
    "an owner that has withdrawn goes at once": (
        HEAD,
        Body(consents=(consent("ann", state="failed"),)),
        World(),
    ),
    "two nodes share a model by layers": (Body(), Body(LAYERS, consents=STAGES), World()),
    "it drains once another serves": (
        HEAD,
        changed(HEAD, items=(item("ann", state="draining"), item("bea", replica=1))),
        World(),
    ),
    "what drains keeps what it was given": (
        HEAD,
        changed(
            HEAD,
            items=(item("ann", state="draining"), item("bea", replica=1)),
            consents=(consent("ann", bytes=11, state="file"), consent("bea")),
        ),
        World(),
    ),
    "a pin is taken back": (
        PINNED,
        changed(HEAD, orders=(order("bea", "unpin", MODEL, "bea"),)),
        World(),
    ),
    "a right is taken from a holder whose lease is over": (
        HELD,
        changed(HELD, claims=(Claim("pen", "bea", EPOCH),), orders=(order("bea", "claim", "pen"),)),
        World(),
    ),
    "a right is given back by a holder that is still promised": (
        HELD,
        changed(HELD, claims=(), orders=(order("ann", "release", "pen"),)),
        World(promised=frozenset({"ann"})),
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_block_may_pass_although(name: str) -> None:
    head, body, world = PASSES[name]
    assert refusal(head, EPOCH, body, world.witness()) is None


def test_every_reason_in_the_rules_is_provoked() -> None:
    written = set(re.findall(r'return "(an? [^"]+|[a-z]+ [^"]+)"', inspect.getsource(rules)))
    assert written == {reason for reason, *_ in REFUSED}


@pytest.mark.parametrize(
    ("shards", "whole"),
    [
        ([(0, 4)], True),
        ([(2, 4), (0, 2)], True),
        ([(0, 2)], False),
        ([(0, 2), (3, 4)], False),
        ([(0, 3), (2, 4)], False),
        ([(0, 2), (0, 2), (2, 4)], False),
        ([], False),
    ],
)
def test_a_replica_is_whole_without_gap_or_overlap(
    shards: list[tuple[int, int]], whole: bool
) -> None:
    found = [item("ann", shard=Shard("layers", first, end, 4)) for first, end in shards]
    assert covered(found) == whole


def test_kinds_of_shards_do_not_mix() -> None:
    assert not covered([LAYERS[0], item("bea", shard=Shard("experts", 2, 4, 4))])


def test_a_replica_serves_when_all_its_shards_do() -> None:
    loading = msgspec.structs.replace(LAYERS[1], state="loading")
    assert serving_models(Body(LAYERS)) == {MODEL: [LAYERS]}
    assert serving_models(Body((LAYERS[0], loading))) == {}
