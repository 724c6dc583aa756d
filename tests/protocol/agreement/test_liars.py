"""An open mesh with four voters, of whom one lies: it is refused, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from meshnode.credentials import MeshDescriptor
from meshnode.identity import seal
from meshnode.messages import Body, Claim, Item, Order, Orders, Proposal, Vote, encode
from meshnode.protocol.consensus import Head
from meshnode.protocol.quorum import body_hash, header_hash, vote_bytes
from meshnode.protocol.stack import GiveOrder
from tests.protocol.agreement.invariants import watch
from tests.protocol.agreement.scenes import (
    NAMES,
    SMOL,
    awake,
    epochs,
    is_served,
    leader,
    owners,
    view,
    voters,
)
from tests.protocol.cluster import ROOT, Cluster, a_holding, key_of

OPEN = MeshDescriptor(name="lab", root=ROOT.public.hex(), admission="open")


def open_mesh(count: int = 5) -> Cluster:
    cluster = Cluster(is_open=True)
    watch(cluster)
    for place, name in enumerate(NAMES[:count]):
        models = ((SMOL, a_holding(SMOL, wanted=name == "bob")),)
        cluster.start(name, NAMES[:1] if place else (), models=models, is_root=place == 0)
    cluster.run(20.0)
    return cluster


def test_an_open_mesh_has_four_voters_of_whom_three_decide() -> None:
    cluster = open_mesh()
    assert len(voters(cluster)) == 4
    assert view(cluster, "ada").quorum == 3
    assert view(cluster, "ada").faults == "byzantine"
    cluster.kill(next(name for name in voters(cluster) if name not in ("bob", leader(cluster))))
    cluster.kill("bob")
    cluster.run(40.0)
    assert all(is_served(cluster, name) for name in awake(cluster))


def _rob(body: Body, liar: str) -> Body:
    """Itself in the place of the owner."""
    mine = tuple(msgspec.structs.replace(item, owner=liar, standbys=()) for item in body.items)
    return msgspec.structs.replace(body, items=mine)


def _conscript(body: Body, liar: str) -> Body:
    """An owner that never consented."""
    more = _another(body.items[0], key_of("nobody").peer_id)
    return msgspec.structs.replace(body, items=(*body.items, more))


def _overload(body: Body, liar: str) -> Body:
    """More than the owner has room for."""
    huge = tuple(msgspec.structs.replace(item, bytes=2**39) for item in body.items)
    return msgspec.structs.replace(body, items=huge)


def _starve(body: Body, liar: str) -> Body:
    return msgspec.structs.replace(body, items=())


def _take(body: Body, liar: str) -> Body:
    """A right that nobody gave it."""
    return msgspec.structs.replace(body, claims=(*body.claims, Claim("pen", liar, 1)))


def _forge(body: Body, liar: str) -> Body:
    return msgspec.structs.replace(body, consents=(b"forged", *body.consents))


def _another(item: Item, owner: str) -> Item:
    return msgspec.structs.replace(item, owner=owner, replica=9, standbys=())


@pytest.mark.parametrize("lie", [_rob, _conscript, _overload, _starve, _take, _forge])
def test_a_leader_that_proposes_nonsense_is_refused_and_passed_by(
    lie: Callable[[Body, str], Body],
) -> None:
    cluster = open_mesh()
    liar = leader(cluster)
    machine = cluster.machines[liar]
    (group,) = machine.live.agreement._groups.values()
    honest, peer = group.propose, machine.peer_id

    def propose(head: Head, now: float) -> tuple[Body, tuple[str, ...]]:
        body, named = honest(head, now)
        return lie(body, peer), named

    group.propose = propose  # type: ignore[method-assign]
    before = owners(cluster), view(cluster, "ada").epoch
    cluster.tell("ada", GiveOrder("pin", SMOL.digest, cluster.machines["dan"].peer_id))
    cluster.run_until(lambda: "dan" in owners(cluster), 15.0)
    cluster.run(10.0)
    assert owners(cluster) == {**before[0], "dan": "serving"}
    assert leader(cluster) != liar
    assert len(set(epochs(cluster).values())) == 1
    assert view(cluster, "ada").claims == ()
    others = [cluster.stack(name) for name in voters(cluster) if name != liar]
    groups = [group for each in others for group in each.agreement._groups.values()]
    assert all(group.register.refused for group in groups)


def test_a_leader_that_says_two_things_is_convicted_and_decides_neither_twice() -> None:
    cluster = open_mesh()
    liar = leader(cluster)
    machine = cluster.machines[liar]
    (group,) = machine.live.agreement._groups.values()
    head, others = group.register.head, [name for name in voters(cluster) if name != liar]
    proposals: list[Proposal] = []
    for orders in ((), head.body.orders[:0]):
        body = msgspec.structs.replace(head.body, orders=orders)
        if proposals:  # the same but for a replica that nobody asked for
            items = (*body.items, _loading(cluster, body))
            body = msgspec.structs.replace(body, items=items)
        header = msgspec.structs.replace(
            head.header,
            epoch=head.epoch + 1,
            previous=header_hash(head.header),
            proposer=machine.peer_id,
            body=body_hash(body),
        )
        block = header_hash(header)
        words = vote_bytes(group.register.group, header.epoch, 1, "notarize", block)
        vote = _vote(group.register.group, header.epoch, block, machine.peer_id,
                     key_of(liar).sign(words))  # fmt: skip
        proposals.append(Proposal(header, body, 0, (), vote))
    first, second = proposals
    for name, proposal in zip(others, (first, second, first), strict=True):
        cluster.tell(name, proposal, sender=machine.peer_id)
    cluster.tell(others[0], second, sender=machine.peer_id)
    (judge,) = cluster.stack(others[0]).agreement._groups.values()
    assert machine.peer_id in judge.register.equivocations
    cluster.run(20.0)
    assert len({view(cluster, name).epoch for name in others}) == 1
    cluster.tell(others[0], GiveOrder("drain", "", cluster.machines[others[0]].peer_id))
    before = view(cluster, others[0]).epoch
    cluster.run(20.0)
    assert view(cluster, others[0]).epoch > before, "and the rest goes on"


def _loading(cluster: Cluster, body: Body) -> Item:
    standby = body.items[0].standbys[0]
    return msgspec.structs.replace(_another(body.items[0], standby), state="loading")


def _vote(group: str, epoch: int, block: bytes, voter: str, signature: bytes) -> Vote:
    return Vote(group, epoch, 1, "notarize", block, voter, signature)


def test_only_the_root_moves_what_others_own() -> None:
    cluster = open_mesh()
    before = owners(cluster)
    cluster.tell("dan", GiveOrder("drain", "", cluster.machines["bob"].peer_id))
    cluster.tell("dan", GiveOrder("pin", SMOL.digest, cluster.machines["eve"].peer_id))
    cluster.run(20.0)
    assert owners(cluster) == before
    cluster.tell("bob", GiveOrder("drain", "", cluster.machines["bob"].peer_id))
    cluster.run(30.0)
    assert "bob" not in owners(cluster), "but everybody may go"
    cluster.tell("ada", GiveOrder("undrain", "", cluster.machines["bob"].peer_id))
    cluster.run(20.0)
    assert owners(cluster)["bob"] == "serving", "and the node that has the root's key may say so"


def test_an_order_from_the_future_blocks_nothing() -> None:
    """One signed for an epoch that is far off must not get into a block, or all refuse it."""
    cluster = open_mesh()
    name = next(n for n in NAMES if n in voters(cluster) and n != leader(cluster))
    stack = cluster.stack(name)
    (group,) = stack.agreement._groups.values()
    order = Order(group.register.group, 2**50, 2**50, "claim", "pen", "")
    envelope = seal(key_of(name), "meshnode-record", b"/meshnode/order/1", encode(order))
    for voter in voters(cluster):
        cluster.tell(voter, Orders((envelope,)), sender=cluster.machines[name].peer_id)
    cluster.run(1.0)
    cluster.kill("bob")
    took_s = cluster.run_until(lambda: "bob" not in owners(cluster, awake(cluster)[0]), 20.0)
    assert took_s <= 5.0
