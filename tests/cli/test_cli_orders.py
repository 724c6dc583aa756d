"""pin, unpin and drain: what is asked, how long is waited, and what is said then."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import Result
from fake_node import DIGEST, GONE, GROUP, PEER, FakeNode

from meshnode.cli import orders

Run = Callable[..., Result]


def test_a_pin_says_when_it_is_decided_and_what_moves(meshnode: Run, node: FakeNode) -> None:
    result = meshnode("pin", "small", PEER[-6:])
    assert result.exit_code == 0, result.output
    assert node.asked == [{"action": "pin", "node": PEER[-6:], "model": "small"}]
    lines = result.stdout.splitlines()
    assert lines[0] == f"pinned small to …{PEER[-8:]}: decided in epoch 18"
    rows = [line.split() for line in lines if line.startswith("small")]
    assert [row[1:5] for row in rows] == [
        ["0", "this", "node", "serving"],
        ["1", f"…{PEER[-8:]}", "loading", "300.0"],
    ]
    again = meshnode("pin", "small", PEER[-6:])
    assert again.stdout.splitlines()[0].endswith("it was so already")


def test_what_was_ordered_is_taken_back(meshnode: Run, node: FakeNode) -> None:
    meshnode("drain", "self")
    assert node.asked[-1] == {"action": "drain", "node": "self", "model": None}
    assert [order.action for order in node.snapshot.groups[0].orders] == ["drain"]
    undone = meshnode("drain", "self", "--undo")
    assert undone.stdout.startswith(f"…{PEER[-8:]} may own models again: decided in epoch 19")
    assert node.snapshot.groups[0].orders == ()
    assert "it was so already" in meshnode("unpin", "small", "self").stdout


def test_as_json_it_is_one_document(meshnode: Run, node: FakeNode) -> None:
    told = json.loads(meshnode("pin", "small", "self", "--json").stdout)
    assert (told["action"], told["model"], told["peer"]) == ("pin", DIGEST, PEER)
    assert (told["group"], told["epoch"]) == (GROUP, 18)
    assert (told["is_decided"], told["was_decided"]) == (True, False)
    assert [item["state"] for item in told["items"]] == ["serving", "loading"]


def test_without_a_decision_it_says_who_is_missing(
    meshnode: Run, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "DECIDED_WITHIN_S", 0.2)
    monkeypatch.setattr(orders, "PROGRESS_AFTER_S", 0.05)
    monkeypatch.setattr(orders, "LOOK_S", 0.02)
    node.decides = False
    slow = meshnode("pin", "small", "self")
    assert slow.exit_code == 1
    assert "waiting for 2 of 3 voters to agree (2 answer) …" in slow.stderr
    assert "though enough voters answer" in slow.stderr
    import msgspec

    group = node.snapshot.groups[0]
    voters = tuple(msgspec.structs.replace(v, alive=v.peer_id == PEER) for v in group.voters)
    node.snapshot = msgspec.structs.replace(
        node.snapshot, groups=(msgspec.structs.replace(group, voters=voters),)
    )
    lost = json.loads(meshnode("drain", "self", "--json").stdout)["error"]["message"]
    assert f"…{GONE[-8:]} do not answer, and 2 must" in lost
    assert "meshnode mesh recover" in lost


def test_a_refused_order_is_told_as_it_was(meshnode: Run, node: FakeNode) -> None:
    node.answers["/api/orders"] = (409, {"error": {"message": "no node has a model 'x'"}})
    result = meshnode("pin", "x", "self")
    assert result.exit_code == 1
    assert "no node has a model 'x'" in result.stderr
