"""Conversations of a group, kept as they were: one file in `transcripts/` for each.

After a wanted change, rewrite them with REWRITE_TRANSCRIPTS=1 and review the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.messages import Decided, GetDecided, Proposal, Vote
from tests.protocol.consensus.parts import Said, a_body, a_genesis, peer, peers, seal_recovery
from tests.protocol.consensus.room import Room


def transcript(name: str, told: str) -> str:
    """What is written down under this name."""
    file = Path(__file__).parent / "transcripts" / f"{name}.txt"
    if os.environ.get("REWRITE_TRANSCRIPTS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(told)
    return file.read_text()


def three() -> Room:
    room = Room(a_genesis(3))
    for name, application in room.applications.items():
        application.body = a_body(f"{name}'s-wish")
    return room


def undisturbed() -> Room:
    """All three want something, and the leader's block is decided: three hops, no timer."""
    room = three()
    room.want("ada", "bob", "cyd")
    room.run(5.0)
    return room


def leader_dead() -> Room:
    """Ada leads and is dead, which bob and cyd know: they do not wait."""
    room = three()
    room.kill("ada")
    for application in room.applications.values():
        application.dead = {peer("ada")}
    room.want("bob", "cyd")
    room.run(5.0)
    return room


def leader_silent() -> Room:
    """Ada leads and nobody hears from it, though it seems alive: its second is waited out."""
    room = three()
    room.is_lost = lambda sender, to, message: sender == "ada"
    room.want("bob", "cyd")
    room.run(5.0)
    return room


def proposal_lost() -> Room:
    """The proposal reaches neither; it is said again after a second, in time or too late."""
    room = three()
    lost: list[str] = []

    def is_lost(sender: str, to: str, message: Said) -> bool:
        if isinstance(message, Proposal) and len(lost) < 2:
            lost.append(to)
            return True
        return False

    room.is_lost = is_lost
    room.want("ada")
    room.run(5.0)
    return room


def carried_on() -> Room:
    """All know that ada's block is notarized, and the votes to finalize it are lost: bob, who leads
    the next view, has to propose ada's block, whatever it wants itself."""
    room = three()
    room.is_lost = lambda sender, to, message: (
        isinstance(message, Vote) and message.kind == "finalize" and message.view == 1
    )
    room.want("ada", "bob", "cyd")
    room.run(5.0)
    return room


def caught_up() -> Room:
    """Cyd was away for three epochs. One question, one answer, and it stands where all stand."""
    room = three()
    room.is_lost = lambda sender, to, message: "cyd" in (sender, to)
    for _ in range(3):
        room.want("ada", "bob")
        room.run(0.5)
    room.trace.clear()
    room.is_lost = lambda sender, to, message: False
    cyd = room.registers["cyd"]
    room.tell("cyd", "ada", GetDecided(cyd.group, cyd.head.epoch, cyd.lineage.anchor))
    room.run(1.0)
    return room


def late_vote() -> Room:
    """Cyd missed how the epoch ended and asks for an end of it: the others tell it."""
    room = three()
    room.is_lost = lambda sender, to, message: to == "cyd" and not isinstance(message, Proposal)
    room.want("ada", "bob", "cyd")
    room.run(0.5)
    room.is_lost = lambda sender, to, message: False
    room.run(3.0)
    return room


def voter_replaced() -> Room:
    """Cyd is dead and dan takes its place; then bob fails too, and ada and dan go on."""
    room = Room(a_genesis(3), "dan")
    room.kill("cyd")
    for application in room.applications.values():
        application.dead = {peer("cyd")}
        application.swap = (2, peer("dan"))
    room.want("ada", "bob")
    room.run(0.5)
    room.tell("ada", "dan", room.registers["ada"].decided(0))
    room.run(0.5)
    room.kill("bob")
    room.want("ada", "dan")
    room.run(3.0)
    return room


def recovered() -> Room:
    """Bob and cyd are lost for ever. The root's word lets ada go on alone; bob, back from the dead
    after all, hears of it."""
    room = three()
    room.want("ada", "bob", "cyd")
    room.run(0.5)
    room.kill("bob")
    room.kill("cyd")
    room.want("ada")
    room.run(1.5)
    header = room.registers["ada"].recovery_header(peers("ada"))
    room.note("the root speaks")
    room.do("ada", room.registers["ada"].recover(seal_recovery(header), room.now))
    room.want("ada")
    room.start("bob")
    room.want("bob")
    room.run(2.0)
    room.tell("ada", "bob", room.registers["ada"].decided(room.registers["bob"].lineage.anchor))
    room.run(1.0)
    return room


SCENES: tuple[Callable[[], Room], ...] = (
    undisturbed,
    leader_dead,
    leader_silent,
    proposal_lost,
    carried_on,
    caught_up,
    late_vote,
    voter_replaced,
    recovered,
)


@pytest.mark.parametrize("scene", SCENES)
def test_the_conversation_is_as_written_down(scene: Callable[[], Room]) -> None:
    room = scene()
    doc = " ".join((scene.__doc__ or "").split())
    told = f"# {doc}\n" + "\n".join(room.trace) + "\n"
    assert told == transcript(scene.__name__, told)
    assert len({register.head.header for register in room.registers.values()}) == 1, (
        "all agree in the end"
    )


def test_catching_up_is_one_message() -> None:
    room = caught_up()
    question, answer, _ = room.trace
    assert GetDecided.__name__ in question
    assert Decided.__name__ in answer
