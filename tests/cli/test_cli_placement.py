"""placement: what-ifs as people type them, and a plan as they read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from fake_node import DIGEST, OWN, PEER, FakeNode

from meshnode.cli.placement import what_if_of
from meshnode.console.requests import (
    AddNode,
    ChangeReport,
    DrainNode,
    ModelReport,
    PartReport,
    PinModel,
    PlacementReport,
    RemoveNode,
    ReplicaReport,
    SetMemory,
    SetReplicas,
    VerdictReport,
)
from meshnode.errors import ConfigError
from tests.models.gguf_writer import write_gguf

Run = Callable[..., Result]
GIB = 2**30
PEER_SHORT = f"…{PEER[-8:]}"


def plan_of(**changes: object) -> PlacementReport:
    whole = PartReport(OWN, 0, 30, GIB, (PEER,))
    slower = f"slower than {PEER} alone: 40 ms a token, not 20"
    fields: dict[str, object] = {
        "digest": DIGEST,
        "name": "small",
        "layers": 30,
        "bytes": GIB,
        "replicas_wanted": 1,
        "replicas": (ReplicaReport((whole,), 40.0, 25.0, True, 20.0, slower),),
        "verdicts": (
            VerdictReport(OWN, True, "its operator serves it here", 8 * GIB),
            VerdictReport(PEER, False, "stands by \x1b[31m", 4 * GIB),
        ),
        "changes": (ChangeReport(PEER, "let go"),),
        "missing": "",
    }
    model = ModelReport(**{**fields, **changes})  # type: ignore[arg-type]
    return PlacementReport(17, (model,), ("…abc were gone",), 0)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("+node:memory=8GiB", AddNode(8 * GIB)),
        ("+node:ms_per_token=2.5,memory=1GB", AddNode(10**9, 2.5)),
        ("-xLvKXtf", RemoveNode("xLvKXtf")),
        ("drain=self", DrainNode("self")),
        ("pin=…xLvKXtf", PinModel("…xLvKXtf")),
        ("replicas=3", SetReplicas(3)),
        ("memory:self=512MiB", SetMemory("self", GIB // 2)),
    ],
)
def test_what_ifs_are_read(text: str, meant: object) -> None:
    assert what_if_of(text) == meant


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not one of"),
        ("-", "is not one of"),
        ("bob", "is not one of"),
        ("drain=", "is not one of"),
        ("memory:=8GiB", "is not one of"),
        ("memory=8GiB", "is not one of"),
        ("+node", "is not one of"),
        ("+gpu:memory=8GiB", "is not one of"),
        ("+node:ms_per_token=2", "does not say how much memory"),
        ("+node:memory=8GiB,stages=1", "no property of a node"),
        ("+node:memory=8GiB,cores=4", "no property of a node"),
        ("+node:memory=8GiB,memory=9GiB", "gives memory twice"),
        ("+node:memory=8", "is not a size with its unit"),
        ("+node:memory=8GiB,ms_per_token=fast", "number of milliseconds"),
        ("+node:memory=8GiB,ms_per_token=0", "more than 0"),
        ("replicas=-1", "number from 0 to 64"),
        ("replicas=65", "number from 0 to 64"),
    ],
)
def test_what_is_no_what_if_is_taught(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as told:
        what_if_of(text)
    assert repr(text) in str(told.value)


def test_the_plan_is_told_with_its_reasons(meshnode: Run, node: FakeNode) -> None:
    node.answers["/api/placement/preview"] = (200, plan_of())
    result = meshnode("placement", "small", "--what-if", "-abcdef", "--what-if", "replicas=2")
    assert result.exit_code == 0, result.output
    assert node.asked == [
        {
            "model": "small",
            "file": None,
            "what_if": [
                {"what_if": "remove_node", "node": "abcdef"},
                {"what_if": "replicas", "count": 2},
            ],
        }
    ]
    for line in (
        "What if …abc were gone?",
        "small: 30 layers, 1.0 GiB, 1 placed",
        f"  this node: 40.0 ms/token, 25.0 tok/s (measured), standby {PEER_SHORT}",
        f"  → {PEER_SHORT} would let it go",
    ):
        assert line in result.stdout.splitlines(), result.stdout
    assert f"slower than {PEER_SHORT} alone" in result.stderr
    assert "\x1b[31m" not in result.output


def test_as_json_it_is_what_the_node_said(meshnode: Run, node: FakeNode) -> None:
    node.answers["/api/placement/preview"] = (200, plan_of())
    told = json.loads(meshnode("placement", "--json").stdout)
    assert (told["epoch"], told["models"][0]["name"]) == (17, "small")
    assert node.asked == [{"model": None, "file": None, "what_if": []}]


def test_a_cut_model_is_shown_with_its_layers(meshnode: Run, node: FakeNode) -> None:
    parts = (PartReport(OWN, 0, 12, GIB, ()), PartReport("new-1", 12, 30, GIB, ()))
    cut = ReplicaReport(parts, 90.0, 20.0, False, None, "no node can hold all of it")
    node.answers["/api/placement/preview"] = (
        200,
        plan_of(replicas=(cut,), changes=()),
    )
    result = meshnode("placement", "small")
    assert "this node [0–11, 1.0 GiB] → new-1 [12–29, 1.0 GiB]: 90.0 ms/token" in result.stdout
    assert "no node can hold all of it" in result.stderr


def test_a_file_that_nobody_has_is_described_to_the_node(
    meshnode: Run, node: FakeNode, tmp_path: Path
) -> None:
    node.answers["/api/placement/preview"] = (200, plan_of())
    path = tmp_path / "Tiny.gguf"
    path.write_bytes(write_gguf())
    assert meshnode("placement", str(path), "--context", "256").exit_code == 0
    (asked,) = node.asked
    assert asked["model"] is None
    assert asked["file"] == {
        "name": "tiny",
        "weight_bytes": 328,
        "layers": 2,
        "kv_bytes_per_token": 256,
        "context_tokens": 256,
        "compute_bytes": asked["file"]["compute_bytes"],
        "activation_bytes": 0,  # a made-up architecture is not cut
    }
    assert asked["file"]["compute_bytes"] > 128 * 1024**2
    beyond = meshnode("placement", str(path), "--context", "9999")
    assert beyond.exit_code == 1
    assert "trained for 512 tokens" in beyond.stderr
    path.write_bytes(b"GGUF")
    assert "not a usable GGUF file" in meshnode("placement", str(path)).stderr
    assert meshnode("placement", "small", "--context", "256").exit_code == 2
