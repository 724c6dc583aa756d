"""What a scenario says of the network and of who is there, made into models.

Latencies, access links, NATs, gossip, the DHT and churn: `simulation.py` asks for each of them here
and knows none of the models itself.
"""

from __future__ import annotations

from pathlib import Path

from meshnode.errors import ConfigError
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.network import Constant, Latency, Network
from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.kernel.world import World
from meshnode_simulations.models import access, churn
from meshnode_simulations.models.kademlia import Kademlia
from meshnode_simulations.models.latency import Plane, PlanetLab, Regions
from meshnode_simulations.models.nat import Kind, Nats
from meshnode_simulations.models.pubsub import Gossipsub
from meshnode_simulations.run import Run
from meshnode_simulations.scenario import Scenario

REPLACED_AWAY_S = 10.0
"""Mean absence under the churn `replace`: somebody else takes the place soon."""
_HOMES = ("dsl", "cable", "fibre")


def network(scenario: Scenario, seed: int) -> Network:
    """How far all are from each other."""
    net = scenario.network
    return Network(
        _latency(scenario, seed), stream(seed, "network"), jitter=net.jitter, loss=net.loss
    )


def _latency(scenario: Scenario, seed: int) -> Latency:
    match scenario.network.latency:
        case "planetlab":
            return PlanetLab(seed)
        case "regions":
            return Regions(seed)
        case "plane":
            return Plane(seed)
    return Constant(int(scenario.network.one_way_ms * 1e6))


def surround(world: World, scenario: Scenario, machines: list[Machine]) -> None:
    """Access links, NATs, gossip and the DHT, before anybody is switched on.

    Raises `ConfigError` for a class of NAT that does not exist.
    """
    net = scenario.network
    if net.pubsub == "gossipsub":
        world.pubsub = Gossipsub(world)
    if net.dht == "kademlia":
        world.dht = Kademlia(world)
    if net.nat:
        nats = Nats(world.loop, world.seed, _nat_shares(net.nat))
        for machine in machines[: scenario.mesh.bootstraps]:
            nats.place(machine, Kind.OPEN)
        world.may_dial = nats.may_dial
    for machine in machines if net.access != "none" else ():
        kinds = _HOMES if net.access == "homes" else (net.access,)
        access.KINDS[stream(world.seed, "access", machine.index).choice(kinds)].attach(machine)


def _nat_shares(told: dict[str, float]) -> dict[Kind, float]:
    known = {kind.value: kind for kind in Kind}
    for name in told:
        if name not in known:
            raise ConfigError(f"network.nat: {name!r} is none of {', '.join(known)}")
    shares = {known[name]: share for name, share in told.items()}
    rest = 1.0 - sum(shares.values())
    if rest < 0.0:
        raise ConfigError("network.nat: the shares are more than the whole")
    shares[Kind.OPEN] = shares.get(Kind.OPEN, 0.0) + rest
    return shares


def let_come_and_go(run: Run, machines: list[Machine]) -> None:
    """Switch machines off and on as the scenario's churn has it, from its start on.

    Raises `ConfigError` for a trace that cannot be read.
    """
    told, world = run.scenario.churn, run.world
    if told.kind == "none":
        return
    bootstraps = machines[: run.scenario.mesh.bootstraps]
    moved = machines[len(bootstraps) :] if told.spare_bootstraps else machines
    horizon_s = run.scenario.scenario.duration_s - told.start_s
    start_ns = int(told.start_s * NS_PER_S)

    def set_power(machine: Machine, is_on: bool) -> None:
        if is_on and machine.stack is None:
            world.switch_on(machine, [other for other in bootstraps if other is not machine])
        elif not is_on and machine.stack is not None:
            world.kill(machine)

    presence = _presence(run, moved, horizon_s)
    for machine in moved:
        is_there = any(begin == 0 for begin, _ in presence[machine.index])
        world.loop.at(start_ns, set_power, machine, is_there)
    for change in churn.changes(presence, horizon_s):
        machine = world.machines[change.machine]
        world.loop.at(start_ns + change.time_ns, set_power, machine, change.is_on)


def _presence(run: Run, machines: list[Machine], horizon_s: float) -> churn.Presence:
    told = run.scenario.churn
    indices = [machine.index for machine in machines]
    if told.kind == "trace":
        try:
            names = {machine.name: machine.index for machine in machines}
            return churn.from_trace(Path(told.trace), names)
        except (OSError, ValueError) as error:
            raise ConfigError(f"churn.trace: {error}") from error
    kind = churn.IPFS if told.kind == "ipfs" else churn.LAB
    if told.kind == "replace":
        stay = churn.Weibull(1.0, 60.0 / max(told.per_min, 1e-9))
        kind = churn.Churn(stay, churn.Weibull(1.0, REPLACED_AWAY_S))
    return churn.churning(run.seed, indices, kind, horizon_s)
