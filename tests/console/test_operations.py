"""What `/api/` answers: over the routes, asked of real stacks in a simulated mesh."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
from quart_trio import QuartTrio

from meshnode import clock
from meshnode.console.fetches import Fetches
from meshnode.console.operations import Operations
from meshnode.console.proof import verify_proof
from meshnode.console.requests import ClaimRequest, InviteTicket, OrderRequest, PreviewRequest
from meshnode.console.routes import Console, mount
from meshnode.console.snapshot import Snapshot
from meshnode.errors import ConfigError
from meshnode.messages import Decided, decode
from meshnode.weights import Peers
from tests.protocol.agreement.scenes import NAMES, SMOL, mesh_of, owners
from tests.protocol.cluster import MESH, Cluster, key_of

STEP_S = 0.05
"""Of the mesh's time, in which it lives on while something is asked."""
PAUSE_S = 0.001
"""Of ours, between two steps: a minute of the mesh is about a second."""
ADA, BOB, CLEO = (str(key_of(name).peer_id) for name in NAMES[:3])
HANG_S = 30.0
Ask = Callable[..., Any]


async def passes(cluster: Cluster, seconds: float) -> None:
    """Until so much of the mesh's time has passed."""
    end = cluster.now + seconds
    with trio.fail_after(HANG_S):
        while cluster.now < end:
            await trio.sleep(PAUSE_S)


def operations_of(cluster: Cluster, name: str, monkeypatch: pytest.MonkeyPatch) -> Operations:
    monkeypatch.setattr(clock, "now", lambda: cluster.now)
    return Operations(cluster.stack(name), partial(cluster.tell, name), serves=True)


@pytest.fixture
def cluster() -> Cluster:
    return mesh_of(3)


@pytest.fixture
async def ask(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery) -> Ask:
    """POST to a node of the mesh, whose time passes meanwhile: the status and the answer."""

    async def live() -> None:
        while True:
            cluster.run(STEP_S)
            await trio.sleep(PAUSE_S)

    async def post(path: str, body: object, name: str = "ada", **options: Any) -> Any:
        def snapshot() -> Snapshot:
            raise AssertionError("not asked for")

        async def nobody(*_: object) -> NoReturn:
            raise AssertionError("not asked for")

        operations = operations_of(cluster, name, monkeypatch)
        peers = Peers(lambda _: (), nobody, nobody)
        fetches = Fetches(Path(), peers, nobody, dict)
        console = Console(snapshot, lambda _: InviteTicket("t", 1), operations, fetches)
        app = QuartTrio("test")
        mount(app, console)
        options.setdefault("headers", {"content-type": "application/json"})
        options.setdefault("scope_base", {"client": ("127.0.0.1", 1)})
        method = "GET" if body is None else "POST"
        data = None if body is None else json.dumps(body)
        answer = await app.test_client().open(path, method=method, data=data, **options)
        return answer.status_code, json.loads(await answer.get_data())

    nursery.start_soon(live)
    return post


# --- who may ask, and how ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/api/orders", "/api/claims", "/api/recover", "/api/placement/preview", "/api/proof"]
)
async def test_only_this_machine_may_ask(ask: Ask, path: str) -> None:
    body = None if path == "/api/proof" else {}
    status, told = await ask(path, body, scope_base={"client": ("192.0.2.1", 1)})
    assert (status, told["error"]["message"]) == (403, "only from this machine")
    if body is not None:
        status, _ = await ask(path, body, headers={"content-type": "text/plain"})
        assert status == 415


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/orders", {}),
        ("/api/orders", {"action": "kill", "node": "self"}),
        ("/api/claims", {"action": "claim", "right": "two words"}),
        ("/api/claims", {"action": "claim", "right": "r", "wait_s": 1e9}),
        ("/api/recover", {"epoch": 3}),
        ("/api/placement/preview", {"what_if": [{"what_if": "magic"}]}),
        ("/api/placement/preview", {"what_if": [{"what_if": "add_node", "memory_bytes": -1}]}),
    ],
)
async def test_a_body_that_means_nothing_is_refused(ask: Ask, path: str, body: object) -> None:
    status, told = await ask(path, body)
    assert status == 400
    assert told["error"]["message"]


# --- orders --------------------------------------------------------------------------------------


async def test_a_pin_is_decided_and_taken_back(ask: Ask, cluster: Cluster) -> None:
    order = {"action": "pin", "model": "smol", "node": CLEO[-8:]}
    status, given = await ask("/api/orders", order)
    assert (status, given["peer"], given["model"]) == (200, CLEO, SMOL.digest)
    assert not given["is_decided"]
    with trio.fail_after(HANG_S):
        while owners(cluster).get("cleo") != "serving":
            await trio.sleep(PAUSE_S)
    _, again = await ask("/api/orders", order)
    assert again["is_decided"]
    assert again["epoch"] > given["epoch"]
    _, back = await ask("/api/orders", {**order, "action": "unpin", "model": SMOL.digest[:8]})
    assert not back["is_decided"]
    with trio.fail_after(HANG_S):
        while not (await ask("/api/orders", {**order, "action": "unpin"}))[1]["is_decided"]:
            await trio.sleep(PAUSE_S)


async def test_any_nodes_operator_may_drain_any_node(ask: Ask, cluster: Cluster) -> None:
    await ask("/api/orders", {"action": "drain", "node": BOB}, name="cleo")
    with trio.fail_after(HANG_S):
        while "bob" in owners(cluster):
            await trio.sleep(PAUSE_S)
    assert owners(cluster)


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        ({"action": "pin", "node": "self"}, "pin needs a model"),
        ({"action": "drain", "node": "self", "model": "smol"}, "name none"),
        ({"action": "pin", "node": "self", "model": "nope"}, "Models here: smol"),
        ({"action": "pin", "node": "nobody", "model": "smol"}, "which node is 'nobody'"),
    ],
)
async def test_an_unclear_order_is_refused(ask: Ask, order: dict[str, str], complaint: str) -> None:
    status, told = await ask("/api/orders", order)
    assert status == 409
    assert complaint in told["error"]["message"]


async def test_a_pin_without_the_file_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = mesh_of(3, standbys=())
    operations = operations_of(cluster, "ada", monkeypatch)
    with pytest.raises(ConfigError, match="meshnode serve --standby smol"):
        operations.give(OrderRequest("pin", CLEO, "smol"))


# --- rights --------------------------------------------------------------------------------------


async def test_a_right_is_held_by_one_node_at_a_time(ask: Ask) -> None:
    claim = {"action": "claim", "right": "ledger"}
    status, ada = await ask("/api/claims", claim)
    assert (status, ada["holder"], ada["holds"]) == (200, ADA, True)
    status, bob = await ask("/api/claims", {**claim, "wait_s": 0.1}, name="bob")
    assert (status, bob["holder"], bob["holds"]) == (409, ADA, False)
    assert f"…{ADA[-8:]} holds it" in bob["error"]["message"]
    _, read = await ask("/api/claims", {"action": "read", "right": "ledger"}, name="cleo")
    assert (read["holder"], read["since"], read["holds"]) == (ADA, ada["since"], False)
    status, freed = await ask("/api/claims", {"action": "release", "right": "ledger"})
    assert (status, freed["holder"], freed["holds"]) == (200, "", False)
    status, bob = await ask("/api/claims", claim, name="bob")
    assert (status, bob["holder"], bob["holds"]) == (200, BOB, True)
    assert bob["since"] > ada["since"]


async def test_a_claim_that_was_refused_does_not_come_true_later(
    ask: Ask, cluster: Cluster
) -> None:
    claim = {"action": "claim", "right": "ledger"}
    await ask("/api/claims", claim)
    assert (await ask("/api/claims", {**claim, "wait_s": 0.1}, name="bob"))[0] == 409
    await ask("/api/claims", {"action": "release", "right": "ledger"})
    await passes(cluster, 10.0)
    for name in NAMES[:3]:
        _, read = await ask("/api/claims", {"action": "read", "right": "ledger"}, name=name)
        assert (read["holder"], read["holds"]) == ("", False)


async def test_without_a_quorum_nobody_is_told_yes(ask: Ask, cluster: Cluster) -> None:
    for name in ("bob", "cleo"):
        cluster.kill(name)
    status, told = await ask("/api/claims", {"action": "claim", "right": "ledger", "wait_s": 0.2})
    assert (status, told["holder"], told["holds"]) == (409, "", False)
    assert "no quorum" in told["error"]["message"]


# --- a lost quorum -------------------------------------------------------------------------------


async def test_only_a_lost_quorum_is_recovered_and_only_by_the_root(
    ask: Ask, cluster: Cluster
) -> None:
    status, told = await ask("/api/recover", {})
    assert status == 409
    assert "3 of 3 voters answer" in told["error"]["message"]
    cluster.kill("cleo")
    cluster.kill("ada")
    await passes(cluster, 5.0)
    status, told = await ask("/api/recover", {}, name="bob")
    assert status == 409
    assert "only the node with the mesh's root key" in told["error"]["message"]


async def test_the_root_goes_on_alone(ask: Ask, cluster: Cluster) -> None:
    for name in ("bob", "cleo"):
        cluster.kill(name)
    await passes(cluster, 5.0)
    status, told = await ask("/api/recover", {})
    assert status == 200
    (epoch,) = told["groups"].values()
    assert epoch >= 2**32
    status, told = await ask("/api/claims", {"action": "claim", "right": "ledger"})
    assert (status, told["holds"]) == (200, True)


# --- what there is -------------------------------------------------------------------------------


async def test_the_proof_is_of_the_newest_decision(ask: Ask) -> None:
    status, told = await ask("/api/proof", None)
    assert status == 200
    proven = verify_proof(decode(base64.b64decode(told["proof"]), Decided), MESH.root_peer_id)
    assert (proven.group, proven.epoch) == (told["group"], told["epoch"])


async def test_a_preview_is_of_this_mesh(ask: Ask) -> None:
    what_ifs = [{"what_if": "remove_node", "node": BOB[-6:]}]
    status, told = await ask("/api/placement/preview", {"model": "smol", "what_if": what_ifs})
    assert status == 200
    (model,) = told["models"]
    assert model["name"] == "smol"
    assert {verdict["node"] for verdict in model["verdicts"]} == {ADA, CLEO}
    assert {change["action"] for change in model["changes"]} == {"load", "let go"}


async def test_groups_are_shown_with_names_not_digests(
    ask: Ask, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask("/api/orders", {"action": "pin", "model": "smol", "node": "self"})
    await passes(cluster, 3.0)
    (group,) = operations_of(cluster, "ada", monkeypatch).groups()
    assert [voter.alive for voter in group.voters] == [True] * 3
    assert (group.quorum, group.votes, group.faults) == (2, True, "crash")
    assert {item.name for item in group.items} == {"smol"}
    assert [(o.action, o.name, o.peer, o.given_by) for o in group.orders] == [
        ("pin", "smol", ADA, ADA)
    ]
    await ask("/api/orders", {"action": "unpin", "model": "smol", "node": "self"})
    await passes(cluster, 3.0)
    (group,) = operations_of(cluster, "ada", monkeypatch).groups()
    assert group.orders == ()


async def test_before_the_mesh_has_a_group_everything_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    cluster.start("bob")
    operations = operations_of(cluster, "bob", monkeypatch)
    assert operations.groups() == ()
    for asked in (
        operations.proof,
        operations.recover,
        lambda: operations.give(OrderRequest("drain", "self")),
    ):
        with pytest.raises(ConfigError, match="agreed on nothing yet"):
            asked()
    with pytest.raises(ConfigError, match="agreed on nothing yet"):
        await operations.preview(PreviewRequest())
    with pytest.raises(ConfigError, match="agreed on nothing yet"):
        await operations.claim(ClaimRequest("claim", "r"))
