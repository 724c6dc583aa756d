"""From a plan to the next block: items, orders, claims and voters, step by step."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from meshnode.messages import CLAIMS_MAX, ORDERS_MAX, Claim, Consent, Item, Order, Shard
from meshnode.protocol.draft import (
    ABSENT_S,
    Candidate,
    Word,
    current_replicas,
    draft_claims,
    draft_items,
    draft_orders,
    draft_voters,
    heeded,
)
from meshnode.protocol.placement import Part, Plan, Replica
from meshnode.protocol.quorum import Faults, may_follow

MODEL = "ab" * 32


def word(state: str = "ready", size: int = 10) -> Word:
    return Word(
        Consent("aa" * 16, 1, MODEL, "smol", state, False, size, 25, 5, 3, 4),  # type: ignore[arg-type]
        b"",
    )


def item(owner: str, state: str = "serving", replica: int = 0, *standbys: str) -> Item:
    shard = Shard("whole", 0, 4, 4)
    return Item(MODEL, "smol", replica, shard, owner, standbys, state, 10)  # type: ignore[arg-type]


def plan(*owners: tuple[str, int]) -> Plan:
    """Whole replicas: (owner, number)."""
    replicas = tuple(
        Replica(MODEL, (Part(owner, 0, 4, 10),), ((),), number) for owner, number in owners
    )
    return Plan(replicas, (), (), ())


READY = {(peer, MODEL): word() for peer in ("ann", "bea", "cat")}
NEW = -1


def drafted(
    items: tuple[Item, ...],
    wanted: Plan,
    words: dict[tuple[str, str], Word] = READY,
    *,
    dead: str = "",
    drained: bool = False,
) -> list[tuple[str, int, str]]:
    found = draft_items(items, wanted, words, lambda peer: peer != dead, lambda key, owner: drained)
    return [(each.owner, each.replica, each.state) for each in found]


def said(**states: str) -> dict[tuple[str, str], Word]:
    return {**READY, **{(peer, MODEL): word(state) for peer, state in states.items()}}


@pytest.mark.parametrize(
    ("before", "wanted", "words", "more", "after"),
    [
        ((), plan(("ann", NEW)), said(ann="file"), {}, [("ann", 0, "loading")]),
        ((item("ann", "loading"),), plan(("ann", 0)), READY, {}, [("ann", 0, "serving")]),
        ((item("ann"),), plan(("ann", 0)), said(ann="file"), {}, [("ann", 0, "loading")]),
        # a move: the old one stays until the new one is ready, then drains, then goes
        (
            (item("ann"),), plan(("bea", NEW)), said(bea="file"), {},
            [("ann", 0, "serving"), ("bea", 1, "loading")],
        ),
        (
            (item("ann"), item("bea", "loading", 1)), plan(("bea", 1)), READY, {},
            [("ann", 0, "draining"), ("bea", 1, "serving")],
        ),
        (
            (item("ann", "draining"), item("bea", replica=1)), plan(("bea", 1)), READY, {},
            [("ann", 0, "draining"), ("bea", 1, "serving")],
        ),
        (
            (item("ann", "draining"), item("bea", replica=1)), plan(("bea", 1)), READY,
            {"drained": True}, [("bea", 1, "serving")],
        ),
        # whoever is dead, or has withdrawn, goes at once
        ((item("ann"),), plan(("bea", 0)), said(bea="file"), {"dead": "ann"},
         [("bea", 0, "loading")]),
        ((item("ann"),), plan(("bea", NEW)), said(ann="gone"), {}, [("bea", 1, "serving")]),
        ((item("ann"),), plan(), READY, {"dead": "ann"}, []),
        # nobody follows: it drains all the same, its operators want it so
        ((item("ann"),), plan(), READY, {}, [("ann", 0, "draining")]),
        # what only loads is dropped without ado
        ((item("ann", "loading"),), plan(), READY, {}, []),
        # an owner that stays for now, and has to load again itself
        (
            (item("ann"),), plan(("bea", NEW)), said(ann="file", bea="file"), {},
            [("ann", 0, "loading"), ("bea", 1, "loading")],
        ),
    ],
)  # fmt: skip
def test_the_next_items(
    before: tuple[Item, ...],
    wanted: Plan,
    words: dict[tuple[str, str], Word],
    more: dict[str, object],
    after: list[tuple[str, int, str]],
) -> None:
    assert drafted(before, wanted, words, **more) == after  # type: ignore[arg-type]


def test_what_stays_for_now_names_no_standby_that_has_withdrawn() -> None:
    before = (item("ann", "serving", 0, "cat", "bea"),)
    found = draft_items(
        before, plan(("bea", NEW)), said(bea="file", cat="gone"), lambda peer: True,
        lambda key, owner: False,
    )  # fmt: skip
    assert found[0].standbys == ("bea",)


def test_replicas_on_their_way_out_are_no_longer_current() -> None:
    items = (item("ann", "draining"), item("bea", "serving", 1, "cat"))
    bea = Replica(MODEL, (Part("bea", 0, 4, 10),), (("cat",),), 1)
    assert current_replicas(items, {}) == (bea,)


def cut(state: str = "file", parts: tuple[tuple[int, int], ...] = ()) -> Word:
    """A model of 9 layers that is cut every two: four units, the last of three layers."""
    consent = replace(word(state).consent, layers=9, cut_every=2, activation_bytes=4, parts=parts)
    return Word(consent, b"")


def test_a_replica_of_parts_is_drafted_in_layers_and_is_current_in_units() -> None:
    parts = (Part("ann", 0, 1, 10), Part("bea", 1, 4, 30))
    wanted = Plan((Replica(MODEL, parts, ((), ()), NEW),), (), (), ())
    words = {("ann", MODEL): cut(parts=((0, 2),)), ("bea", MODEL): cut(parts=((0, 9),))}
    found = draft_items((), wanted, words, lambda peer: True, lambda key, owner: False)
    assert [(i.owner, i.shard, i.state) for i in found] == [
        ("ann", Shard("layers", 0, 2, 9), "serving"),
        ("bea", Shard("layers", 2, 9, 9), "loading"),  # it has others ready
    ]
    (current,) = current_replicas(found, {MODEL: 2})
    assert (current.parts, current.number) == (parts, 0)


# --- orders and rights ---------------------------------------------------------------------------


def order(action: str, subject: str = MODEL, peer: str = "ann", sequence: int = 1) -> Order:
    return Order("aa" * 16, sequence, 5, action, subject, peer)  # type: ignore[arg-type]


def given(signer: str, *orders: Order) -> list[tuple[str, Order, bytes]]:
    return [(signer, each, msgspec.msgpack.encode(each)) for each in orders]


def actions(found: tuple[tuple[str, Order, bytes], ...]) -> list[str]:
    return [each.action for _, each, _ in found]


def test_the_newest_order_about_a_thing_counts_and_what_was_taken_back_is_forgotten() -> None:
    pin, unpin = given("ann", order("pin")), given("ann", order("unpin", sequence=2))
    assert actions(draft_orders(pin, [])) == ["pin"]
    assert actions(draft_orders(pin, unpin)) == ["unpin"]
    assert actions(draft_orders(unpin, [])) == []
    assert actions(draft_orders(given("ann", order("drain", "", "ann", 3)), pin)) == [
        "drain", "pin",
    ]  # fmt: skip
    old = given("ann", order("unpin", sequence=0))
    assert actions(draft_orders(pin, old)) == ["pin"], "it was overtaken on its way"


def test_a_full_block_takes_back_but_takes_no_more() -> None:
    full = given("ann", *(order("pin", f"{n:064x}") for n in range(ORDERS_MAX)))
    more = given("ann", order("pin", "ff" * 32, sequence=9))
    assert len(draft_orders(full, more)) == ORDERS_MAX
    back = draft_orders(full, given("ann", order("unpin", f"{3:064x}", sequence=9)))
    assert actions(back).count("unpin") == 1


def rights(claims: tuple[Claim, ...], *orders: tuple[str, Order], free: bool = False) -> list[str]:
    return [c.holder for c in draft_claims(claims, orders, 7, lambda holder: free)]


def test_rights_are_given_kept_returned_and_taken_over() -> None:
    held = (Claim("pen", "ann", 5),)
    claim, release = order("claim", "pen", ""), order("release", "pen", "")
    assert rights((), ("ann", claim), ("bea", order("claim", "pen", "", 2))) == ["ann"]
    assert rights(held, ("bea", claim)) == ["ann"]
    assert rights(held, ("bea", claim), free=True) == ["bea"]
    assert rights(held, ("ann", release)) == []
    assert rights(held, ("bea", release)) == ["ann"], "it is not its to give"
    assert rights(held, ("ann", release), ("bea", claim)) == ["bea"]
    renewed = (Claim("pen", "ann", 6),)
    assert rights(renewed, ("ann", release)) == ["ann"], "given back before it was claimed anew"
    full = tuple(Claim(f"r{n:02}", "ann", 5) for n in range(CLAIMS_MAX))
    assert len(rights(full, ("bea", claim))) == CLAIMS_MAX


def test_a_claim_that_gets_nothing_waits_outside_the_block() -> None:
    held = (Claim("pen", "ann", 5),)
    asked = given("bea", order("claim", "pen", ""))
    assert heeded(asked, held, held) == ()
    assert actions(heeded(asked, held, (Claim("pen", "bea", 7),))) == ["claim"]
    assert heeded(given("bea", order("release", "pen", "")), held, held) == ()
    assert actions(heeded(given("bea", order("pin")), held, held)) == ["pin"]


# --- voters --------------------------------------------------------------------------------------


def people(names: str, **absent_s: float) -> list[Candidate]:
    """The earlier in `names`, the longer here."""
    found = []
    for place, name in enumerate(names):
        away = absent_s.get(name)
        found.append(
            Candidate(name, 0.0 if away is not None else 100.0 - place, away or 0.0, away is None)
        )
    return found


GONE = ABSENT_S + 1.0


@pytest.mark.parametrize(
    ("voters", "candidates", "faults", "after"),
    [
        ("a", people("a"), "crash", "a"),
        ("a", people("ab"), "crash", "a"),
        ("a", people("abc"), "crash", "abc"),
        ("abc", people("abcd"), "crash", "abc"),
        ("abc", people("abcde"), "crash", "abcde"),
        ("abcde", people("abcdefgh"), "crash", "abcde"),
        ("abc", people("abcd", c=GONE), "crash", "abd"),
        ("abc", people("abcd", c=ABSENT_S), "crash", "abc"),
        ("abc", people("abc", c=GONE), "crash", "a"),
        ("abcde", people("abcde", e=GONE), "crash", "abc"),
        ("abcde", people("abcde", d=GONE, e=GONE), "crash", "abc"),
        ("a", people("abcd"), "byzantine", "abcd"),
        ("abcd", people("abcde", d=GONE), "byzantine", "abce"),
        ("abcd", people("abcd", d=GONE), "byzantine", "a"),
        ("abcd", people("abcdefg"), "byzantine", "abcd"),
    ],
)
def test_the_next_voters(
    voters: str, candidates: list[Candidate], faults: Faults, after: str
) -> None:
    found = draft_voters(tuple(voters), candidates, faults)
    assert set(found) == set(after)
    assert may_follow(tuple(voters), found, faults), "what is drafted may be voted for"


def test_who_abstains_is_replaced_and_does_not_come_back_before_it_remembers() -> None:
    forgetful = Candidate("c", 50.0, 0.0, True, abstains=True)
    assert draft_voters(("a", "b", "c"), [*people("abd"), forgetful], "crash") == ("a", "b", "d")
    assert draft_voters(("a",), [*people("ab"), forgetful], "crash") == ("a",)
    young = Candidate("c", 1.0, 0.0, True)
    behind = Candidate("c", 50.0, 0.0, False)
    for newcomer in (young, behind):
        assert draft_voters(("a",), [*people("ab"), newcomer], "crash") == ("a",)
