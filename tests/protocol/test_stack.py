"""One stack and its peers: the handshake, its refusals, and conversations kept as transcripts.

A transcript under `transcripts/` is what the cluster's trace must read. After a wanted change,
rewrite them with REWRITE_TRANSCRIPTS=1 and review the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshnode.credentials import MeshDescriptor
from meshnode.errors import NoReplicaError, UnknownModelError
from meshnode.identity import KeyPair, seal
from meshnode.messages import (
    ADDRS_MAX,
    MESSAGE_BYTES_MAX,
    MODELS_MAX,
    PEERS_MAX,
    GetPeers,
    Hello,
    NodeRecord,
    Peers,
    Refused,
    Welcome,
    encode,
)
from meshnode.protocol import Disconnect, Emit, MemberJoined, MemberLost, PublishRecord, Send
from meshnode.protocol.stack import (
    HELLO_TIMEOUT_S,
    Connected,
    Disconnected,
    RecordFound,
    SetAddrs,
    SetOffers,
    Stop,
)
from tests.protocol.cluster import EPOCH_S, MESH, Cluster, Machine, an_offer, chain_of, key_of

OTHER_ROOT = KeyPair.from_seed(b"o" * 32)
OTHER_MESH = MeshDescriptor(name="lab", root=OTHER_ROOT.public.hex(), admission="invite")
BOB = key_of("bob").peer_id


def alone() -> tuple[Cluster, Machine]:
    cluster = Cluster()
    return cluster, cluster.start("ada", offers=(an_offer(),))


def hello_of(machine: Machine, to: str = "eve") -> Hello:
    """What a machine says first."""
    sent = machine.live.receive(key_of(to).peer_id, Connected(), 0.0)
    return next(e.message for e in sent if isinstance(e, Send) and isinstance(e.message, Hello))


def welcome_of(machine: Machine) -> Welcome:
    """What a machine says to whoever it has accepted."""
    eve = key_of("eve")
    hello = Hello(1, MESH.mesh_id, chain_of("eve"), 0)
    machine.live.receive(eve.peer_id, Connected(), 0.0)
    sent = machine.live.receive(eve.peer_id, hello, 0.0)
    return next(e.message for e in sent if isinstance(e, Send) and isinstance(e.message, Welcome))


def record_of(key: KeyPair, sequence: int = 1, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "mesh": MESH.mesh_id,
        "sequence": sequence,
        "issued_at": EPOCH_S,
        "ttl_s": 1800,
        "addrs": ("/ip4/10.9.9.9/udp/1/quic-v1",),
        "roles": ("node",),
        "models": (),
    }
    record = NodeRecord(**{**fields, **changes})  # type: ignore[arg-type]
    return seal(key, "meshnode-record", b"/meshnode/node-record/1", encode(record))


# --- the handshake -------------------------------------------------------------------------------


def test_a_peer_becomes_a_member_by_its_hello_and_then_its_welcome() -> None:
    _, ada = alone()
    bob = Cluster().start("bob", offers=(an_offer("bobs"),))
    ada.live.receive(BOB, Connected(), 0.0)
    (answer,) = ada.live.receive(BOB, hello_of(bob, "ada"), 0.1)
    assert isinstance(answer, Send)
    assert isinstance(answer.message, Welcome)
    assert not ada.live.is_member(BOB)
    assert BOB not in ada.live.offers()
    effects = ada.live.receive(BOB, welcome_of(bob), 0.2)
    assert Emit(MemberJoined(BOB)) in effects
    assert ada.live.is_member(BOB)
    assert BOB in ada.live.offers()


def test_a_welcome_before_the_hello_is_hung_up_on() -> None:
    _, ada = alone()
    bob = Cluster().start("bob", offers=(an_offer("bobs"),))
    ada.live.receive(BOB, Connected(), 0.0)
    (effect,) = ada.live.receive(BOB, welcome_of(bob), 0.1)
    assert isinstance(effect, Disconnect)
    assert BOB not in ada.live.offers()


def test_a_stranger_reads_nothing_but_the_hello() -> None:
    """Neither where we are nor what we have, until it has shown its certificate."""
    _, ada = alone()
    (greeting,) = ada.live.receive(BOB, Connected(), 0.0)
    assert isinstance(greeting, Send)
    assert isinstance(greeting.message, Hello)
    said = encode(greeting.message)
    assert an_offer().name.encode() not in said
    assert b"/ip4/" not in said


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ((), "no membership certificate"),
        (chain_of("bob", OTHER_MESH, OTHER_ROOT), "of another mesh"),
        (chain_of("bob", MESH, OTHER_ROOT), "does not lead to this mesh's root"),
        (chain_of("eve"), "of another peer"),
        ((b"noise",), "invalid"),
        (chain_of("bob") * 3, "of another peer"),
    ],
)
def test_who_cannot_prove_its_membership_is_told_why_and_hung_up_on(
    chain: tuple[bytes, ...], reason: str
) -> None:
    _, ada = alone()
    bob = Cluster().start("bob", chain=chain, offers=(an_offer(),))
    ada.live.receive(BOB, Connected(), 0.0)
    refusal, hang_up = ada.live.receive(BOB, hello_of(bob, "ada"), 0.1)
    assert isinstance(refusal, Send)
    assert isinstance(refusal.message, Refused)
    assert reason in refusal.message.reason
    assert isinstance(hang_up, Disconnect)
    assert not ada.live.is_member(BOB)
    assert list(ada.live.offers()) == [ada.peer_id], "its offer is not heard"
    assert ada.live.records.get(BOB) is None
    assert sum(ada.live.refused.values()) == 1


def test_strangers_cannot_make_the_list_of_refusals_grow_without_end() -> None:
    _, ada = alone()
    for number in range(200):
        eve = KeyPair.from_seed(number.to_bytes(32, "big"))
        ada.live.receive(eve.peer_id, Connected(), 0.0)
        odd = seal(eve, "meshnode-credential", b"odd %d" % number, b"")
        hello = Hello(1, MESH.mesh_id, (odd,), 0)
        ada.live.receive(eve.peer_id, hello, 0.0)
        ada.live.receive(eve.peer_id, Refused(f"reason {number}"), 0.0)
    assert sum(ada.live.refused.values()) == 400
    assert len(ada.live.refused) == 2


@pytest.mark.parametrize("message", [GetPeers(1), Peers(())])
def test_only_members_may_ask(message: GetPeers | Peers) -> None:
    _, ada = alone()
    ada.live.receive(BOB, Connected(), 0.0)
    (effect,) = ada.live.receive(BOB, message, 0.1)
    assert isinstance(effect, Disconnect)


def test_a_second_hello_is_hung_up_on() -> None:
    _, ada = alone()
    bob = Cluster().start("bob")
    ada.live.receive(BOB, Connected(), 0.0)
    hello = hello_of(bob, "ada")
    ada.live.receive(BOB, hello, 0.1)
    (effect,) = ada.live.receive(BOB, hello, 0.2)
    assert isinstance(effect, Disconnect)


def test_silence_is_hung_up_on_after_a_while() -> None:
    _, ada = alone()
    ada.live.receive(BOB, Connected(), 1.0)
    assert not any(isinstance(e, Disconnect) for e in ada.live.tick(HELLO_TIMEOUT_S + 0.9))
    assert Disconnect(BOB, "no valid hello in time") in ada.live.tick(HELLO_TIMEOUT_S + 1.0)


def test_a_peer_that_is_lost_in_the_handshake_leaves_no_event() -> None:
    _, ada = alone()
    bob = Cluster().start("bob", offers=(an_offer("bobs"),))
    ada.live.receive(BOB, Connected(), 0.0)
    ada.live.receive(BOB, hello_of(bob, "ada"), 0.1)
    effects = ada.live.receive(BOB, Disconnected("gone"), 0.2)
    assert not any(isinstance(e, Emit) for e in effects)
    assert BOB not in ada.live.offers()


def test_frames_of_a_connection_that_is_gone_are_ignored() -> None:
    _, ada = alone()
    assert ada.live.receive(BOB, GetPeers(1), 0.0) == []


# --- members -------------------------------------------------------------------------------------


def pair() -> tuple[Cluster, Machine, Machine]:
    cluster = Cluster()
    ada, bob = cluster.start("ada", offers=(an_offer(),)), cluster.start("bob", ("ada",))
    cluster.run_until(cluster.complete, 5.0)
    return cluster, ada, bob


def test_a_lost_member_takes_its_offers_and_sessions_with_it() -> None:
    cluster, ada, bob = pair()
    bob.live.dispatcher.routed(an_offer().digest, b"chat", ada.peer_id)
    cluster.kill("ada")
    cluster.run(3.0)
    assert bob.events[-1] == MemberLost(ada.peer_id, "link cut")
    assert bob.live.offers() == {}
    with pytest.raises(UnknownModelError):
        bob.live.route("smol", b"chat", 100, {}, cluster.now)


def test_route_says_unknown_of_what_nobody_has_and_no_replica_of_what_nobody_can_serve() -> None:
    cluster, ada, bob = pair()
    with pytest.raises(UnknownModelError):
        bob.live.route("nope", b"chat", 100, {ada.peer_id: 0.01}, cluster.now)
    with pytest.raises(NoReplicaError):
        bob.live.route("smol", b"chat", 100, {}, cluster.now)
    _, ranked = bob.live.route("smol", b"chat", 100, {ada.peer_id: 0.01}, cluster.now)
    assert [each.peer for each in ranked] == [ada.peer_id]


def test_a_goodbye_goes_to_every_member() -> None:
    _, ada, bob = pair()
    (effect,) = ada.live.receive(ada.peer_id, Stop(), 10.0)
    assert isinstance(effect, Send)
    assert effect.peer == bob.peer_id


def test_a_new_address_is_told_to_the_members_at_once_and_to_the_dht() -> None:
    cluster, ada, bob = pair()
    effects = ada.live.receive(ada.peer_id, SetAddrs(("/ip4/10.1.1.1/udp/1/quic-v1",)), cluster.now)
    assert any(isinstance(e, PublishRecord) for e in effects)
    (told,) = (e for e in effects if isinstance(e, Send) and isinstance(e.message, Peers))
    bob.live.receive(ada.peer_id, told.message, cluster.now)
    (member,) = bob.live.members()
    assert member.addrs == ("/ip4/10.1.1.1/udp/1/quic-v1",)


def test_only_ready_models_are_published_and_only_when_they_change() -> None:
    _, ada = alone()
    published = []
    for state in ("loading", "ready", "ready", "failed"):
        effects = ada.live.receive(ada.peer_id, SetOffers((an_offer(state=state),)), 1.0)
        published.append([e.models for e in effects if isinstance(e, PublishRecord)])
    assert published == [[()], [("ab" * 32,)], [], [()]]


def test_a_reply_is_a_legal_message_however_long_the_records_are() -> None:
    cluster, ada, bob = pair()
    addrs = tuple("/" + "a" * 254 + f"{place:x}" for place in range(ADDRS_MAX))
    models = tuple(f"{place:064x}" for place in range(MODELS_MAX))
    for number in range(100):
        key = KeyPair.from_seed(number.to_bytes(32, "big"))
        ada.live.receive(
            key.peer_id, RecordFound(record_of(key, addrs=addrs, models=models)), cluster.now
        )
    (effect,) = ada.live.receive(bob.peer_id, GetPeers(PEERS_MAX), cluster.now)
    assert isinstance(effect, Send)
    assert isinstance(effect.message, Peers)
    assert 10 < len(effect.message.records) <= PEERS_MAX
    assert len(encode(effect.message)) < MESSAGE_BYTES_MAX


def test_the_asker_is_not_told_of_itself() -> None:
    cluster, ada, bob = pair()
    (effect,) = ada.live.receive(bob.peer_id, GetPeers(PEERS_MAX), cluster.now)
    assert effect == Send(bob.peer_id, Peers(()))


def test_a_forged_record_from_a_member_is_refused_and_costs_nobody_else() -> None:
    cluster, ada, bob = pair()
    dan = key_of("dan")
    honest = record_of(dan)
    forged = honest[:-1] + bytes([honest[-1] ^ 1])
    ada.live.receive(bob.peer_id, Peers((forged, honest)), cluster.now)
    assert ada.live.records.refused["forged"] == 1
    assert ada.live.records.get(dan.peer_id) is not None
    assert ada.live.is_member(bob.peer_id), "it may only have passed on what it got"


# --- conversations -------------------------------------------------------------------------------


def meeting() -> Cluster:
    """Two nodes of a mesh meet, and one goes."""
    cluster = Cluster()
    cluster.start("ada", offers=(an_offer(),))
    cluster.run(0.5)
    cluster.start("bob", ("ada",))
    cluster.run(4.0)
    cluster.tell("bob", Stop())
    cluster.run(0.5)
    return cluster


def introduction() -> Cluster:
    """Two who know only the third get to know each other: one of them dials, not both."""
    cluster = Cluster()
    cluster.start("ada")
    cluster.start("bob", ("ada",))
    cluster.start("cleo", ("ada",))
    cluster.run(3.0)
    return cluster


def outsider() -> Cluster:
    """Mallory has made a mesh of the same name, and a certificate with it."""
    cluster = Cluster()
    cluster.start("ada")
    cluster.start("mallory", ("ada",), chain=chain_of("mallory", OTHER_MESH, OTHER_ROOT))
    cluster.run(4.0)
    return cluster


def loss() -> Cluster:
    """A member dies without a word, and comes back."""
    cluster = Cluster()
    cluster.start("ada")
    cluster.start("bob", ("ada",), offers=(an_offer(),))
    cluster.run(2.0)
    cluster.kill("bob")
    cluster.run(4.0)
    cluster.start("bob", ("ada",), offers=(an_offer(),))
    cluster.run(2.0)
    return cluster


@pytest.mark.parametrize("scene", [meeting, introduction, outsider, loss])
def test_the_conversation_is_as_written_down(scene: object) -> None:
    assert callable(scene)
    told = f"# {scene.__doc__}\n" + "\n".join(scene().trace) + "\n"
    file = Path(__file__).parent / "transcripts" / f"{scene.__name__}.txt"
    if os.environ.get("REWRITE_TRANSCRIPTS"):
        file.write_text(told)
    assert told == file.read_text()
