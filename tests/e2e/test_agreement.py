"""Nodes are killed, frozen and ordered about while clients stream: somebody always goes on.

The tests share a crew, in this order; each of the first leaves it whole.
"""

from __future__ import annotations

import threading
import time

import pytest

from tests.e2e import load
from tests.e2e.agreed import (
    Watch,
    claim,
    epoch,
    order,
    owners,
    standbys,
    trouble,
    wait_agreed,
)
from tests.e2e.conftest import Figure
from tests.e2e.crew import Crew
from tests.e2e.mesh import MODEL_NAME, Json, Mesh, NodeProcess, serves

SERVED_S = 12.0
"""A warm standby serves within five seconds of its owner's death on a free machine; here clients
and nodes fill two cores."""
NEWS_S = 2.0
"""A gateway learns a new epoch within this time."""
STEADY_S = 5.0
"""Long enough for a leader to make up its mind twice."""
FROZEN_S = 10.0
LEASE_S = 15.0
"""A right whose holder is gone is free after a lease of three seconds and an epoch."""
STORY = "Tell me a long story about a lighthouse."
STORY_TOKENS = 400
RIGHT = "writer/of-the-log"


@pytest.fixture(scope="module")
def crew(module_mesh: Mesh) -> Crew:
    return Crew.start(module_mesh)


def test_load_alone_moves_nothing(crew: Crew, figure: Figure) -> None:
    """A busy owner measures slower than its peers are thought to be: no reason to move."""
    figure("three voters, an owner and a standby, s", crew.wait_whole())
    before = epoch(crew.gates[0].status())
    with load.Clients(crew.gates) as clients:
        until = time.monotonic() + STEADY_S
        clients.wait_text(until)
    assert epoch(crew.gates[0].status()) == before
    assert all(told.is_whole for told in clients.told)


@pytest.mark.parametrize(
    "who",
    [
        "owner",
        "two",
        pytest.param("standby", marks=pytest.mark.soak),
        pytest.param("leader", marks=pytest.mark.soak),
    ],
)
def test_killed_under_load(crew: Crew, who: str, figure: Figure) -> None:
    """`two`: the owner, and the leader if that is not its heir. Two of three may decide, one
    alone may only answer."""
    crew.wait_whole()
    owner = crew.owner()
    if who == "two":
        leader, heir = crew.leader(), crew.standby()
        killed = [owner, *(crew.others(owner, heir) if leader in (owner, heir) else [leader])]
    else:
        killed = [getattr(crew, who)()]
    living = crew.others(*killed)
    answering = {node.peer_id for node in living}
    with Watch(crew.everybody) as watch, load.Clients(crew.gates) as clients:
        clients.wait_text(time.monotonic())
        killed_at = time.monotonic()
        for node in killed:
            node.kill()
        for gate in crew.gates:
            gate.wait_until(lambda status: serves(status, MODEL_NAME) & answering)
        clients.wait_text(time.monotonic())
        if who == "two":
            living[0].wait_until(lambda status: "no quorum" in trouble(status))
        else:
            wait_agreed([*living, *crew.gates], lambda status: _goes_on(status, killed[0]))
            figure(f"{who} killed under load: decided anew, s", time.monotonic() - killed_at)
        crew.start_again(killed)
        crew.wait_whole()
        figure(f"{who} killed under load: whole again, s", time.monotonic() - killed_at)
        clients.wait_text(time.monotonic())
    assert not clients.broken()
    assert not watch.fallen
    silence_s = clients.silence_s(killed_at)
    figure(f"{who} killed under load: longest without text, s", silence_s)
    figure(f"{who} killed under load: answers refused", len(clients.refused()))
    assert silence_s < SERVED_S


def _goes_on(status: Json, without: NodeProcess) -> bool:
    """It is decided that the model is served, and `without` has no part in that."""
    named = owners(status, MODEL_NAME) | {*standbys(status, MODEL_NAME)}
    return bool(owners(status, MODEL_NAME, "serving")) and without.peer_id not in named


@pytest.mark.parametrize("who", ["owner", pytest.param("leader", marks=pytest.mark.soak)])
def test_frozen_for_ten_seconds(crew: Crew, who: str, figure: Figure) -> None:
    """The others go on without it; when it wakes it learns what it has missed."""
    crew.wait_whole()
    frozen = getattr(crew, who)()
    awake = [*crew.others(frozen), *crew.gates]
    frozen_at = time.monotonic()
    with Watch(crew.everybody) as watch:
        frozen.freeze()
        try:
            wait_agreed(awake, lambda status: _goes_on(status, frozen), SERVED_S)
            figure(f"{who} frozen: decided anew, s", time.monotonic() - frozen_at)
            living = {node.peer_id for node in crew.others(frozen)}
            crew.gates[0].wait_until(lambda status: serves(status, MODEL_NAME) & living)
            assert crew.gates[0].ask().served_by in living
            time.sleep(max(0.0, frozen_at + FROZEN_S - time.monotonic()))
        finally:
            frozen.thaw()
        figure(f"{who} thawed: all of one mind, s", crew.wait_whole())
    assert not watch.fallen
    assert {gate.ask().served_by for gate in crew.gates} == {crew.owner().peer_id}


def test_drained_node_ends_its_streams_and_gets_no_new_ones(crew: Crew, figure: Figure) -> None:
    """The model is served elsewhere before its owner lets go, and both gateways turn there."""
    crew.wait_whole()
    owner, gate = crew.owner(), crew.gates[0]
    told: list[load.Told] = []
    client = threading.Thread(target=lambda: told.append(load.ask(gate, STORY, STORY_TOKENS)))
    client.start()
    ordered_at = time.monotonic()
    order(crew.others(owner)[0], "drain", owner)
    owner.wait_until(lambda status: owners(status, MODEL_NAME, "serving") - {owner.peer_id})
    figure("owner drained: served elsewhere, s", time.monotonic() - ordered_at)
    decided_at, now = time.monotonic(), epoch(owner.status())
    for gateway in crew.gates:
        gateway.wait_until(lambda status: epoch(status) >= now, NEWS_S)
    figure("both gateways know of a new epoch after s", time.monotonic() - decided_at)
    answers = [g.ask(f"What is {n} times two?") for g in crew.gates for n in range(2)]
    assert {answer.served_by for answer in answers} == {crew.owner().peer_id}
    assert crew.owner() is not owner
    client.join()
    assert told[0].is_whole
    assert told[0].served_by == owner.peer_id
    order(owner, "undrain", owner)
    wait_agreed(crew.everybody(), lambda status: not status["groups"][0]["orders"])


def test_pinned_model_is_served_where_it_is_pinned(crew: Crew, figure: Figure) -> None:
    other = crew.others(crew.owner())[0]
    begun = time.monotonic()
    order(crew.nodes[0], "pin", other, MODEL_NAME)
    wait_agreed(
        crew.everybody(), lambda status: other.peer_id in owners(status, MODEL_NAME, "serving")
    )
    figure("pinned: served there, s", time.monotonic() - begun)
    order(crew.nodes[0], "unpin", other, MODEL_NAME)
    wait_agreed(
        crew.everybody(),
        lambda status: (
            not status["groups"][0]["orders"] and len(owners(status, MODEL_NAME, "serving")) == 1
        ),
    )


def test_a_right_has_one_holder(crew: Crew, figure: Figure) -> None:
    """All want it at once: one gets it; nobody else does before its holder's lease is over."""
    answers: dict[str, dict[str, object]] = {}

    def want(node: NodeProcess) -> None:
        answers[node.peer_id] = claim(node, RIGHT, wait_s=3.0)

    wanting = [threading.Thread(target=want, args=(node,)) for node in crew.nodes]
    for thread in wanting:
        thread.start()
    for thread in wanting:
        thread.join()
    (holder,) = [node for node in crew.nodes if answers[node.peer_id]["holds"]]
    others = crew.others(holder)
    assert {claim(node, RIGHT, "read")["holder"] for node in others} == {holder.peer_id}

    killed_at = time.monotonic()
    holder.kill()
    while not (answer := claim(others[0], RIGHT, wait_s=1.0))["holds"]:
        assert time.monotonic() - killed_at < LEASE_S, answer
    figure("right of a killed holder claimed anew, s", time.monotonic() - killed_at)
    crew.start_again([holder])
    again = crew.by_peer(holder.peer_id)
    wait_agreed(crew.everybody())
    answer = claim(again, RIGHT, "read")
    assert answer["holder"] == others[0].peer_id
    assert not answer["holds"]
    assert "error" not in claim(others[0], RIGHT, "release")
    assert claim(again, RIGHT)["holds"]
