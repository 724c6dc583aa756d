"""Every message survives the wire, and no bytes do more than be refused."""

from __future__ import annotations

from contextlib import suppress
from typing import cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.errors import LocalProtocolError, RemoteProtocolError
from meshnode.messages import (
    CHAIN_MAX,
    FILE_BYTES_MAX,
    LEAVES_MAX,
    MESSAGE_BYTES_MAX,
    PEERS_MAX,
    PROOF_HASHES_MAX,
    Advert,
    Approximate,
    Certificate,
    Control,
    Demand,
    Files,
    GetPeers,
    Hello,
    Invitation,
    Join,
    JoinDenied,
    JoinGranted,
    JoinProof,
    JoinRequest,
    LeavesFollow,
    Leaving,
    Message,
    NodeRecord,
    NoLeaves,
    Offer,
    Peers,
    Record,
    Refused,
    WantFiles,
    WantLeaves,
    Welcome,
    decode,
    encode,
    is_model_name,
    reason_of,
)

Leaves = WantLeaves | LeavesFollow | NoLeaves | WantFiles | Files
MESH = "0123456789abcdef" * 2
PEER = "12D3KooWAaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
DIGEST = "ab" * 32
OFFER = Offer("smol", DIGEST, "ready", 2048, 4, 1, 0, 8192, 400.0, 40.0, b"\1\2\3\4")
APPROXIMATE = Approximate(0.024, 0.89, 1.04, 24, 32, PEER)
ADVERT = Advert(MESH, 7, 150, (OFFER,), (Demand("smol", 0.5),), 2**33, 2, "cpu")
RECORD = NodeRecord(MESH, 7, 1_800_000_000, 1800, ("/ip4/10.0.0.1/tcp/1",), ("node",), (DIGEST,))

EXAMPLES: list[tuple[object, Message]] = [
    (Control, Hello(1, MESH, (b"chain",), 1_800_000_000_000)),
    (Control, Welcome(b"record", b"advert")),
    (Control, Refused("membership certificate has expired")),
    (Control, GetPeers(PEERS_MAX)),
    (Control, Peers((b"one", b"two"))),
    (Control, Leaving()),
    (Join, JoinRequest(b"invitation", b"proof")),
    (Join, JoinGranted((b"chain",))),
    (Join, JoinDenied("used up")),
    (Record, Certificate(MESH, PEER, ("node",), 0, 1)),
    (Record, Invitation(MESH, PEER, bytes(32), ("node",), 1, 1)),
    (Record, RECORD),
    (Record, ADVERT),
    (Record, JoinProof(MESH, PEER)),
    (Leaves, WantLeaves(DIGEST, 7, LEAVES_MAX)),
    (Leaves, LeavesFollow(FILE_BYTES_MAX, (bytes(32),) * PROOF_HASHES_MAX)),
    (Leaves, WantFiles()),
    (Leaves, Files({DIGEST: "smol"})),
    (Leaves, NoLeaves("it does not have the file")),
]
KINDS = (Control, Join, Record, Advert, NodeRecord, Leaves)


def read(data: bytes, kind: object) -> Message:
    return decode(data, cast(type[Message], kind))


@pytest.mark.parametrize(("kind", "message"), EXAMPLES, ids=lambda v: type(v).__name__)
def test_every_message_survives_the_wire(kind: object, message: Message) -> None:
    assert read(encode(message), kind) == message


def test_a_message_is_legal_only_where_it_belongs() -> None:
    for kind, message in EXAMPLES:
        for other in (Control, Join, Record):
            if other is not kind:
                with pytest.raises(RemoteProtocolError):
                    read(encode(message), other)


def change(message: Message, **changes: object) -> bytes:
    """The bytes of a message that its author could not have made by our rules."""
    return encode(msgspec.structs.replace(message, **changes))


@pytest.mark.parametrize(
    "data",
    [
        change(RECORD, mesh="short"),
        change(RECORD, mesh=MESH[:-1] + "\n"),
        change(RECORD, mesh=MESH.upper()),
        change(RECORD, sequence=-1),
        change(RECORD, sequence=2**62),
        change(RECORD, ttl_s=0),
        change(RECORD, ttl_s=24 * 3600 + 1),
        change(RECORD, addrs=("ip4/10.0.0.1",)),
        change(RECORD, addrs=("/ip4/10.0.0.1\x1b[31m",)),
        change(RECORD, addrs=("/" + "a" * 256,)),
        change(RECORD, addrs=("/ip4/10.0.0.1/tcp/1",) * 17),
        change(RECORD, roles=()),
        change(RECORD, roles=("king",)),
        change(RECORD, models=(DIGEST,) * 33),
        change(RECORD, models=("ab",)),
        change(ADVERT, accelerator="cpu\n"),
        change(ADVERT, accelerator="x" * 65),
        change(ADVERT, ttl_s=3601),
        change(ADVERT, offers=(OFFER,) * 33),
        change(ADVERT, demand=(Demand("smol", float("nan")),)),
        change(ADVERT, demand=(Demand("smol", float("inf")),)),
        change(ADVERT, demand=(Demand("smol", -1.0),)),
        change(ADVERT, offers=(msgspec.structs.replace(OFFER, slots=-1),)),
        change(ADVERT, offers=(msgspec.structs.replace(OFFER, sessions=bytes(2049)),)),
        change(ADVERT, offers=(msgspec.structs.replace(OFFER, state="perhaps"),)),
        *(
            change(ADVERT, offers=(msgspec.structs.replace(OFFER, name=name),))
            for name in ("", "smol\n", "a b", "a@b", "a/b", "-a", "ä", "x" * 129, "\x1b[2J")
        ),
    ],
)
def test_what_is_out_of_bounds_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read(data, Record)


@pytest.mark.parametrize(
    "message",
    [
        GetPeers(0),
        GetPeers(PEERS_MAX + 1),
        Peers((b"",) * (PEERS_MAX + 1)),
        Hello(1, MESH, (b"",) * (CHAIN_MAX + 1), 0),
        Hello(0, MESH, (), 0),
        Refused("x" * 257),
        Refused("\x1b[2Jgone"),
    ],
    ids=repr,
)
def test_control_messages_have_bounds_too(message: Message) -> None:
    with pytest.raises(RemoteProtocolError):
        read(encode(message), Control)


def test_unknown_fields_and_messages_are_refused() -> None:
    for content in ({"t": "GetPeers", "count": 1, "more": 2}, {"t": "Surprise"}, {}, [], None, 7):
        with pytest.raises(RemoteProtocolError):
            read(msgspec.msgpack.encode(content), Control)


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 4 billion
        b"\xdf\xff\xff\xff\xff",  # a map of 4 billion
        b"\x82\xa1t\xa5Peers\xa7records\xdd\xff\xff\xff\xff",
        b"\x82\xa1t\xa5Peers\xa7records\x91\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\x91" * 100_000,
        b"\x81\xa1x" * 50_000,
        b"\x82\xa1t\xa8GetPeers\xa5count\xd9\x02\xc3\x28",  # not UTF-8
    ],
)
def test_claims_of_great_length_or_depth_cost_nothing(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read(data, Control)


def test_messages_are_bounded_both_ways() -> None:
    with pytest.raises(LocalProtocolError, match="too large"):
        encode(Peers((bytes(60_000),) * 5))
    with pytest.raises(RemoteProtocolError, match="limit"):
        read(bytes(MESSAGE_BYTES_MAX + 1), Control)


@given(st.binary(max_size=200), st.sampled_from(KINDS))
@settings(max_examples=500, deadline=None)
def test_no_bytes_do_more_than_be_refused(data: bytes, kind: object) -> None:
    with pytest.raises(RemoteProtocolError):
        read(data, kind)


@given(st.data())
@settings(max_examples=1000, deadline=None)
def test_no_change_to_a_good_message_does_more_than_be_refused(data: st.DataObject) -> None:
    kind, message = data.draw(st.sampled_from(EXAMPLES))
    mutated = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if how == "set":
            mutated[place] = data.draw(st.integers(0, 255))
        elif how == "cut" and len(mutated) > 1:
            del mutated[place]
        else:
            mutated.insert(place, data.draw(st.integers(0, 255)))
    try:
        decoded = read(bytes(mutated), kind)
    except RemoteProtocolError:
        return
    assert read(encode(decoded), kind) == decoded, "what is legal stays so"


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=500, deadline=None)
def test_no_value_in_a_field_does_more_than_be_refused(
    example: tuple[object, Message], data: st.DataObject
) -> None:
    kind, message = example
    fields = msgspec.msgpack.decode(encode(message))
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(json_like)
    with suppress(RemoteProtocolError):
        read(msgspec.msgpack.encode(fields), kind)


@given(st.text(max_size=150))
def test_a_model_name_is_what_an_offer_may_hold(name: str) -> None:
    approximate = APPROXIMATE if "~" in name else None
    offer = msgspec.structs.replace(OFFER, name=name, approximate=approximate)
    data = change(ADVERT, offers=(offer,))
    if is_model_name(name):
        read(data, Record)
    else:
        with pytest.raises(RemoteProtocolError):
            read(data, Record)


def test_an_approximation_is_offered_under_no_plain_name_nor_anything_else_as_one() -> None:
    shard = msgspec.structs.replace(OFFER, name="smol~24of32", approximate=APPROXIMATE)
    whole = read(change(ADVERT, offers=(OFFER, shard)), Record)
    assert isinstance(whole, Advert)
    assert whole.offers == (OFFER, shard)
    assert str(APPROXIMATE) == "kl=0.024; agree=0.89; experts=24/32"
    for name, approximate in (("smol", APPROXIMATE), ("smol~24of32", None)):
        with pytest.raises(ValueError, match="~"):
            msgspec.structs.replace(OFFER, name=name, approximate=approximate)
        fields = msgspec.to_builtins(shard, builtin_types=(bytes,))
        fields |= {"name": name, "approximate": msgspec.to_builtins(approximate)}
        told = msgspec.to_builtins(ADVERT, builtin_types=(bytes,)) | {"offers": [fields]}
        with pytest.raises(RemoteProtocolError):
            read(msgspec.msgpack.encode(told), Record)


@pytest.mark.parametrize(
    "changes",
    [{"kl": -1.0}, {"kl": float("nan")}, {"agreement": 1.1}, {"perplexity_ratio": 0.0},
     {"kept": 0}, {"measured_by": "me"}],
    ids=str,
)  # fmt: skip
def test_a_measurement_has_bounds(changes: dict[str, object]) -> None:
    lie = msgspec.structs.replace(APPROXIMATE, **changes)
    shard = msgspec.structs.replace(OFFER, name="smol~24of32", approximate=lie)
    with pytest.raises(RemoteProtocolError):
        read(change(ADVERT, offers=(shard,)), Record)


@given(st.text(max_size=400))
def test_any_error_can_be_told_as_a_reason(text: str) -> None:
    read(encode(Refused(reason_of(ValueError(text)))), Control)
