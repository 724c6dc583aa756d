"""What-ifs change the facts as they say, and the plan is told with its reasons."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from meshnode.console.preview import Changed, report, with_file, with_idle, with_what_ifs
from meshnode.console.requests import (
    AddNode,
    DrainNode,
    ModelFile,
    ModelReport,
    PinModel,
    PlacementReport,
    RemoveNode,
    SetMemory,
    SetReplicas,
    WhatIf,
)
from meshnode.errors import ConfigError
from meshnode.protocol.placement import Holding, Host, Model, Part, Problem, Replica, Want

GB = 10**9
SMALL = Model("ab" * 32, "small", GB, 10, 0, 1, 0)
FILE = ModelFile("large", 12 * GB, 40, 0, 1, 0, 4096)
FACTS = Problem(
    models={SMALL.digest: SMALL},
    hosts={
        name: Host(
            name, 8 * GB, 50_000, GB, {SMALL.digest: Holding(state, False, GB, us)}, stages=True
        )
        for name, state, us in (("ada", "ready", 40_000), ("bob", "file", 60_000))
    },
    wants={SMALL.digest: Want(1)},
    current=(Replica(SMALL.digest, (Part("ada", 0, 10, GB),), number=0),),
)


def told(*what_ifs: WhatIf, model: str | None = SMALL.digest) -> PlacementReport:
    return report(with_what_ifs(Changed(FACTS, (), model), what_ifs, lambda name: name), 7)


def small(*what_ifs: WhatIf) -> ModelReport:
    (model,) = told(*what_ifs).models
    return model


def owners(model: ModelReport) -> list[str]:
    return [part.owner for replica in model.replicas for part in replica.parts]


def test_without_what_ifs_it_is_what_is_decided() -> None:
    found = told(model=None)
    assert (found.epoch, found.assumed) == (7, ())
    (model,) = found.models
    assert owners(model) == ["ada"]
    assert model.changes == ()
    assert model.missing == ""
    (replica,) = model.replicas
    assert (replica.ms_per_token, replica.tokens_per_s, replica.is_measured) == (40.0, 25.0, True)
    assert replica.parts[0].standbys == ("bob",)
    assert [(v.node, v.included, v.reason) for v in model.verdicts] == [
        ("ada", True, "holds the file, fastest"),
        ("bob", False, "stands by"),
    ]


@pytest.mark.parametrize("what_if", [RemoveNode("ada"), DrainNode("ada"), SetMemory("ada", 1)])
def test_without_its_owner_a_model_moves(what_if: WhatIf) -> None:
    model = small(what_if)
    assert owners(model) == ["bob"]
    assert [(change.node, change.action) for change in model.changes] == [
        ("bob", "load"),
        ("ada", "let go"),
    ]


def test_pins_and_replicas_add_up() -> None:
    pinned = small(PinModel("bob"))
    assert "bob" in owners(pinned)
    assert "pinned here" in {verdict.reason for verdict in pinned.verdicts}
    model = small(SetReplicas(2))
    assert sorted(owners(model)) == ["ada", "bob"]
    assert model.replicas_wanted == 2


def test_a_new_node_is_measured_as_assumed() -> None:
    found = told(AddNode(8 * GB, ms_per_token=5.0), AddNode(8 * GB), SetReplicas(3))
    (model,) = found.models
    by_owner = {replica.parts[0].owner: replica for replica in model.replicas}
    assert by_owner["new-1"].ms_per_token == 5.0
    assert len(by_owner) == 3
    assert found.assumed == (
        "a node new-1 had the file",
        "a node new-2 had the file",
        "3 replicas were wanted",
    )


@pytest.mark.parametrize(
    ("what_if", "complaint"),
    [
        (PinModel("ada"), "pin is about one model"),
        (SetReplicas(2), "replicas is about one model"),
        (AddNode(GB, ms_per_token=1.0), "name the model"),
        (RemoveNode("eve"), "could own nothing"),
    ],
)
def test_what_cannot_be_is_refused(what_if: WhatIf, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        told(what_if, model=None)


def test_a_node_without_any_model_is_told_why_it_is_out() -> None:
    facts = with_idle(FACTS, {"ada": 1, "eve": 2 * GB})
    (model,) = report(Changed(facts, (), None), 7).models
    (eve,) = (verdict for verdict in model.verdicts if verdict.node == "eve")
    assert (eve.included, eve.reason) == (False, "does not have the file")
    assert eve.memory_bytes == 2 * GB
    assert next(v for v in model.verdicts if v.node == "ada").memory_bytes == 8 * GB


def test_a_file_that_fits_nowhere_is_cut_if_it_can_be() -> None:
    (model,) = report(with_file(FACTS, FILE), 7).models
    assert (model.name, model.layers, model.missing) == ("large", 40, "")
    (cut,) = model.replicas
    assert cut.is_cut
    assert min(part.first for part in cut.parts) == 0
    assert sum(part.end - part.first for part in cut.parts) == 40
    (whole,) = report(with_file(FACTS, replace(FILE, activation_bytes=0)), 7).models
    assert whole.replicas == ()
    assert "needs 4.0 GB more on one node" in whole.missing


def test_a_file_that_fits_is_placed_whole() -> None:
    (model,) = report(with_file(with_idle(FACTS, {"eve": 16 * GB}), FILE), 7).models
    assert owners(model) == ["eve"]
    assert model.missing == ""
