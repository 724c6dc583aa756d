"""A few machines by name, in the simulator's world: what protocol tests are told in.

Strict where a simulation of thousands is not: real signatures, every message encoded and decoded,
no stack may spin. One run is a function of its seed; `trace` is what happened, in words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from meshnode.credentials import MeshDescriptor, issue_certificate
from meshnode.identity import KeyPair, PeerId
from meshnode.messages import Offer, Role
from meshnode.protocol import Input
from meshnode.protocol.agreement import Holding
from meshnode.protocol.stack import Member, Stack
from meshnode_simulations.kernel.keys import ED25519
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import EPOCH_S, Machine
from meshnode_simulations.kernel.narrator import Narrator
from meshnode_simulations.kernel.network import SILENCE_S
from meshnode_simulations.kernel.world import LOAD_S, World

__all__ = [
    "EPOCH_S", "LOAD_S", "MESH", "ROOT", "SILENCE_S", "Cluster", "Machine", "a_holding",
    "an_offer", "chain_of", "key_of",
]  # fmt: skip


def key_of(name: str) -> KeyPair:
    key = ED25519.key_of(name)
    assert isinstance(key, KeyPair)
    return key


ROOT = key_of("root")
MESH = MeshDescriptor(name="lab", root=ROOT.public.hex(), admission="invite")


def chain_of(
    name: str,
    mesh: MeshDescriptor = MESH,
    root: KeyPair = ROOT,
    roles: tuple[Role, ...] = ("node",),
) -> tuple[bytes, ...]:
    return (issue_certificate(root, mesh, key_of(name).peer_id, roles, EPOCH_S),)


def an_offer(name: str = "smol", digest: str = "ab" * 32, **changes: object) -> Offer:
    fields: dict[str, object] = {
        "state": "ready",
        "context_tokens": 2048,
        "slots": 4,
        "slots_busy": 0,
        "queue_depth": 0,
        "kv_tokens_free": 8192,
        "prefill_tokens_per_s": 400.0,
        "decode_tokens_per_s": 40.0,
    }
    return Offer(name=name, digest=digest, **{**fields, **changes})  # type: ignore[arg-type]


def a_holding(offer: Offer, *, wanted: bool = True, **changes: object) -> Holding:
    """The file of an offer's model, not loaded yet."""
    fields: dict[str, object] = {
        "state": "file",
        "bytes": 2**30,
        "weight_bytes": 2**29,
        "kv_bytes": 2**28,
        "layers": 30,
    }
    given = {**fields, **changes}
    return Holding(offer.digest, offer.name, wanted=wanted, **given)  # type: ignore[arg-type]


class Cluster:
    """Machines and the world that moves them, by name."""

    def __init__(self, seed: int = 1, *, is_open: bool = False) -> None:
        self.world = World(seed, scheme=ED25519, open_mesh=is_open, strict=True)
        self.machines: dict[str, Machine] = self.world.by_name
        self._narrator = Narrator(self.world)

    @property
    def now(self) -> float:
        return self.world.loop.now_s

    @property
    def trace(self) -> list[str]:
        """What has happened."""
        return self._narrator.lines

    @property
    def delivered(self) -> Counter[str]:
        """Messages that arrived, by kind."""
        return self.world.trace.messages

    # --- what a test does to it -----------------------------------------------------------------

    def start(
        self,
        name: str,
        bootstrap: Iterable[str] = (),
        *,
        offers: tuple[Offer, ...] = (),
        clock_ahead_s: float = 0.0,
        chain: tuple[bytes, ...] | None = None,
        models: tuple[tuple[Offer, Holding], ...] = (),
        is_root: bool = False,
        memory_bytes: int = 2**33,
        roles: tuple[Role, ...] = ("node",),
    ) -> Machine:
        """Switch a machine on, for the first time or again. `is_root`: it made the mesh; of
        `models` it has the files, and it does what its duties say about them.
        """
        machine = self.machines.get(name)
        if machine is None:
            proof = chain_of(name, self.world.mesh, roles=roles) if chain is None else chain
            machine = self.world.add(
                name, roles=roles, memory_bytes=memory_bytes, is_root=is_root, chain=proof
            )
            machine.unix_ahead_s = clock_ahead_s
        machine.models.update({holding.model: (offer, holding) for offer, holding in models})
        known = [self.machines[other] for other in bootstrap]
        self.world.switch_on(machine, known, offers=offers)
        return machine

    def tell(self, name: str, message: Input, *, sender: PeerId | None = None) -> None:
        """Give a stack one input now, from itself unless said otherwise."""
        self.world.tell(self.machines[name], message, sender=sender)

    def kill(self, name: str) -> None:
        self.world.kill(self.machines[name])

    def cut(self, one: str, other: str, after_s: float = 0.0) -> None:
        self.world.cut(self.machines[one], self.machines[other], int(after_s * NS_PER_S))

    def crash_within(self, name: str, effects: int) -> None:
        self.world.crash_within(self.machines[name], effects)

    def sleep(self, name: str) -> None:
        self.world.sleep(self.machines[name])

    def wake(self, name: str) -> None:
        self.world.wake(self.machines[name])

    def sever(self, one: str, other: str) -> None:
        self.world.sever(self.machines[one], self.machines[other])

    def partition(self, *islands: Iterable[str]) -> None:
        self.world.partition(*([self.machines[name] for name in island] for island in islands))

    def heal(self) -> None:
        self.world.heal()

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        self.world.loop.run(self.world.loop.now_ns + int(seconds * NS_PER_S))

    def run_until(self, holds: Callable[[], bool], within_s: float) -> float:
        """Let time pass until `holds`; the seconds it took."""
        start, loop = self.now, self.world.loop
        done = loop.run_until(holds, loop.now_ns + int(within_s * NS_PER_S))
        assert done, f"not within {within_s:g} s: {self.members()}"
        return self.now - start

    # --- what a test asks -----------------------------------------------------------------------

    def stack(self, name: str) -> Stack:
        return self.machines[name].live

    def members(self) -> dict[str, str]:
        """Whom each running machine counts as members, by name."""
        return {
            machine.name: " ".join(sorted(map(self._name_of, machine.live.members())))
            for machine in self.world.running()
        }

    def complete(self) -> bool:
        """Whether every running machine has every other as a member."""
        running = sorted(machine.name for machine in self.world.running())
        wanted = {name: " ".join(n for n in running if n != name) for name in running}
        return self.members() == wanted

    def offers_seen_by(self, name: str) -> list[str]:
        return sorted(self.world.by_peer[PeerId(peer)].name for peer in self.stack(name).offers())

    def _name_of(self, member: Member) -> str:
        return self.world.by_peer[member.peer].name
