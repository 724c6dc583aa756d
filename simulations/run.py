"""A run in motion: what the parts of a simulation share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from meshnode_simulations.kernel.world import World
from meshnode_simulations.record import Recorder
from meshnode_simulations.scenario import Scenario


@dataclass(slots=True)
class Run:
    """See the module. Parts add themselves to the lists, and figures by name."""

    scenario: Scenario
    seed: int
    world: World
    recorder: Recorder
    figures: dict[str, float] = field(default_factory=dict)
    intervals: list[Callable[[float], None]] = field(default_factory=list)
    """Called at the end of each interval with its length in seconds."""
    closers: list[Callable[[], None]] = field(default_factory=list)
    """Called at the end, to work out figures."""

    @property
    def now_s(self) -> float:
        return self.world.loop.now_s

    @property
    def is_warm(self) -> bool:
        """Whether what happens now counts for the figures."""
        return self.now_s >= self.scenario.scenario.warmup_s
