"""Tier 2: the real Trio driver of every node, with real signatures, over links in memory.

A world like tier 1's, but what the stacks decide is performed by `meshnode.driver`: its outboxes,
streams, frames, paces and timers, with every message encoded and decoded. The network's delays,
faults, engines, clients and figures are tier 1's own, so what differs is the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from meshnode.driver import Driver
from meshnode.errors import ConfigError
from meshnode.identity import PeerId
from meshnode.messages import Decided, Offer
from meshnode.protocol import Effect, Input
from meshnode.transport import OnAdvert
from meshnode_simulations.kernel.keys import ED25519
from meshnode_simulations.kernel.machine import Link, Machine
from meshnode_simulations.kernel.network import Network
from meshnode_simulations.kernel.world import World
from meshnode_simulations.record import Result
from meshnode_simulations.simulation import Simulation
from meshnode_simulations.tiers.memory import (
    HostEvents,
    MemoryDht,
    MemoryGossip,
    MemoryHost,
    Wires,
)
from meshnode_simulations.tiers.virtual import TrioLoop, run_virtual

FAULTS = ("kill", "stop", "cut", "sever", "block", "part", "lose", "slow", "jump", "drain")
"""What can happen to a driver from outside. Tasks cannot be frozen, nor run at another rate."""


def run(simulation: Simulation) -> Result:
    """One run, a function of scenario and seed. Raises `ConfigError` for what only tier 1 has."""
    if simulation.scenario.adversaries.kind != "none" or simulation.scenario.chaos.buggify:
        raise ConfigError("adversaries and buggified cores exist on tier 1 only")
    for fault in simulation.faults():
        if fault.kind not in FAULTS:
            raise ConfigError(f"{fault.kind!r} does not exist on tier 2: {', '.join(FAULTS)} do")
    return run_virtual(_run, simulation, seed=simulation.seed)


async def _run(simulation: Simulation) -> Result:
    about = simulation.scenario.scenario
    started_s = time.process_time()
    async with trio.open_nursery() as nursery:
        loop = TrioLoop()
        state = simulation.prepare(partial(DrivenWorld, nursery, loop))
        nursery.start_soon(loop.drive)
        while trio.current_time() < about.duration_s:
            before_s = trio.current_time()
            await trio.sleep_until(min(before_s + about.interval_s, about.duration_s))
            for finish in state.intervals:
                finish(trio.current_time() - before_s)
            state.recorder.close_interval(trio.current_time())
        result = simulation.finish(state, time.process_time() - started_s)
        nursery.cancel_scope.cancel()
    return result


@dataclass(slots=True)
class _Node:
    """One run of one machine."""

    driver: Driver
    host: MemoryHost
    hear: OnAdvert
    life: trio.CancelScope


class DrivenWorld(World):
    """See the module. Lives in a nursery, under a `TrioLoop`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        loop: TrioLoop,
        seed: int,
        network: Network,
        *,
        open_mesh: bool = False,
    ) -> None:
        super().__init__(seed, network, scheme=ED25519, open_mesh=open_mesh, loop=loop)
        self._nursery = nursery
        self._wires = Wires(self)
        self._nodes: dict[int, _Node] = {}

    # --- machines -------------------------------------------------------------------------------

    def _begin(
        self, machine: Machine, bootstrap: tuple[Machine, ...], offers: tuple[Offer, ...]
    ) -> None:
        host = MemoryHost(
            self._wires,
            machine,
            HostEvents(
                connected=lambda peer: driver.connected(peer),
                disconnected=lambda peer, reason: driver.disconnected(peer, reason),
            ),
        )
        hears: list[OnAdvert] = []

        def gossip(on_advert: OnAdvert) -> MemoryGossip:
            hears.append(on_advert)
            return MemoryGossip(self, machine, on_advert)

        driver = Driver(
            machine.live,
            host,
            gossip,
            lambda check, newest: MemoryDht(self, machine),
            partial(self._emit, machine),
            machine.disk.__setitem__,
            trio.current_time,
        )
        node = _Node(driver, host, hears[0], trio.CancelScope())
        self._nodes[machine.index] = node
        begin = partial(super()._begin, machine, bootstrap, offers)
        self._nursery.start_soon(self._live, node, begin)

    async def _live(self, node: _Node, begin: Callable[[], None]) -> None:
        """Until it is switched off."""
        with node.life:
            async with trio.open_nursery() as nursery:
                node.host.serve_in(nursery)
                await nursery.start(node.driver.run)
                begin()

    def tell(self, machine: Machine, message: Input, *, sender: PeerId | None = None) -> None:
        sender = machine.peer_id if sender is None else sender
        self._nodes[machine.index].driver.submit(sender, message)

    def learn(self, machine: Machine, peer: Machine, proof: Decided) -> None:
        self._nodes[machine.index].driver.learn(peer.peer_id, proof)

    def now_of(self, machine: Machine) -> float:
        """To the last bit what the timers go by: rounded to nanoseconds, a deadline may be ahead
        of its timer, again and again."""
        return trio.current_time()

    def hear(self, machine: Machine, advert: bytes) -> bool:
        node = self._nodes.get(machine.index)
        return node is not None and node.hear(advert)

    # --- what happens to them -------------------------------------------------------------------

    def stop(self, machine: Machine) -> None:
        self._tell_power(machine, "stopped")
        self._nursery.start_soon(self._leave, machine, self._nodes[machine.index])

    async def _leave(self, machine: Machine, node: _Node) -> None:
        await node.driver.say_goodbye()
        if self._nodes.get(machine.index) is node:
            self._switch_off(machine, 2 * self.network.rtt_ns(machine.index, machine.index))

    def _switch_off(self, machine: Machine, noticed_after_ns: int) -> None:
        node = self._nodes.pop(machine.index)
        node.host.switch_off()
        node.life.cancel()
        super()._switch_off(machine, noticed_after_ns)

    def _lose(self, machine: Machine, peer: Machine, link: Link) -> None:
        node = self._nodes.get(machine.index)
        if node is not None:
            node.host.lose(link, "silent for too long")

    # --- what only tier 1 does itself -----------------------------------------------------------

    def _arm(self, machine: Machine) -> None:
        """The driver keeps the time."""

    def _perform(self, machine: Machine, effects: list[Effect]) -> None:
        raise AssertionError("the driver performs what the stack decides")


__all__ = ["FAULTS", "DrivenWorld", "run"]
