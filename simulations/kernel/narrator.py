"""What happens in a world, in words: one line for each thing, fit to be read and compared."""

from __future__ import annotations

from meshnode.messages import Control, Decided, GetPeers, Handover, Peers, Proposal, Refused, Vote
from meshnode.protocol import (
    Connect,
    Disconnect,
    Effect,
    Emit,
    Event,
    MemberJoined,
    MemberLost,
    Publish,
    PublishRecord,
    Send,
)
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.world import Power, World

_WORDS: dict[Power, str] = {
    "on": "starts",
    "killed": "is killed",
    "stopped": "stops",
    "asleep": "falls asleep",
    "awake": "wakes",
}


class Narrator:
    """Listens to a world from its construction on; `lines` grows with what happens."""

    def __init__(self, world: World) -> None:
        self.lines: list[str] = []
        self._world = world
        world.on_effect.append(self._on_effect)
        world.on_power.append(self._on_power)
        world.on_running.append(self._on_running)

    def _say(self, line: str) -> None:
        self.lines.append(f"{self._world.loop.now_s:9.3f}  {line}")

    def _on_power(self, machine: Machine, power: Power) -> None:
        self._say(f"{machine.name} {_WORDS[power]}")

    def _on_running(self, machine: Machine) -> None:
        shown = [machine.models[model][0].name for model in machine.running]
        self._say(f"{machine.name} is to run {' '.join(shown) or 'nothing'}")

    def _on_effect(self, machine: Machine, effect: Effect) -> None:
        name = machine.name
        match effect:
            case Send(peer, message):
                self._say(f"{name} → {self._named(peer)}: {self._shown(message)}")
            case Connect(peer, _):
                self._say(f"{name} dials {self._named(peer)}")
            case Disconnect(peer, reason):
                self._say(f"{name} hangs up on {self._named(peer)}: {reason}")
            case Publish():
                self._say(f"{name} gossips its advert")
            case PublishRecord():
                self._say(f"{name} publishes its record")
            case Emit(MemberJoined() | MemberLost() as event):
                self._say(f"{name}: member {self._named(event.peer)} {_happened(event)}")

    def _named(self, peer: str) -> str:
        machine = next((m for m in self._world.machines if m.peer_id == peer), None)
        return "a stranger" if machine is None else machine.name

    def _shown(self, message: Control) -> str:
        match message:
            case GetPeers(wanted):
                return f"GetPeers, up to {wanted}"
            case Peers(records):
                return f"Peers, {len(records)} records"
            case Refused(reason):
                return f"Refused: {reason}"
            case Proposal(header, body, _, _, vote):
                items = [
                    f"{item.name} {item.replica} {item.state} on {self._named(item.owner)}"
                    for item in body.items
                ]
                voters = " ".join(map(self._named, header.voters))
                shown = ", ".join(items) or "nothing"
                return f"Proposal {header.epoch}.{vote.view}: {shown}; voters {voters}"
            case Vote():
                return f"Vote {message.epoch}.{message.view}: {message.kind}"
            case Decided(_, _, Handover(header)):
                return f"Decided {header.epoch}"
        return type(message).__name__


def _happened(event: Event) -> str:
    return f"lost ({event.reason})" if isinstance(event, MemberLost) else "joined"
