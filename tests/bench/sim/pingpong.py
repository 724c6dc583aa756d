"""Pairs that send a message to and fro, on the bare loop and on SimPy: events per second of CPU."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import simpy

from meshnode_simulations.kernel.loop import NS_PER_S, Loop

LATENCY_NS = 10_000_000


def loop_events_per_s(pairs: int, seconds: int) -> float:
    loop = Loop()

    def receive(here: int, there: int) -> None:
        loop.after(LATENCY_NS + here, receive, there, here)

    for pair in range(pairs):
        receive(2 * pair, 2 * pair + 1)
    began = time.process_time()
    loop.run(seconds * NS_PER_S)
    return loop.events / (time.process_time() - began)


def simpy_events_per_s(pairs: int, seconds: int) -> float:
    """One process for each end, a store as its inbox, a timeout as the way: SimPy's own style.

    Counts messages, as the loop above does, though SimPy takes more than one event for each.
    """
    environment, received = simpy.Environment(), 0

    def end(inbox: simpy.Store, other: simpy.Store, here: int) -> Generator[Any, Any, None]:
        nonlocal received
        while True:
            message = yield inbox.get()
            received += 1
            yield environment.timeout(LATENCY_NS + here)
            other.put(message)

    for pair in range(pairs):
        one, other = simpy.Store(environment), simpy.Store(environment)
        environment.process(end(one, other, 2 * pair))
        environment.process(end(other, one, 2 * pair + 1))
        one.put("ping")
    began = time.process_time()
    environment.run(until=seconds * NS_PER_S)
    return received / (time.process_time() - began)
