"""A network simulator that runs meshnode's own cores in virtual time.

    from meshnode_simulations import Simulation, plot

    result = Simulation("cold-join", seed=7, changes={"mesh.nodes": 200}).run()
    result.figures["join_p99_s"]
    result.frame("joins")                     # a pyarrow.Table; .to_pandas() if you like
    plot(result, "messages_per_node_s")       # a matplotlib Figure

The parts, from the machine room up:

* `kernel/`        virtual time, a network, machines with real stacks
* `models/`        what surrounds them: latencies, gossip, DHT, NATs, churn, engines, clients
* `faults/`        what goes wrong: schedules, chaos from a seed, adversaries
* `checks/`        what must hold after every event, and what must come true once all is well
* `scenario.py`    one question as a TOML file; `scenarios/` are those that come along
* `surroundings.py` makes the models that a scenario asks for
* `simulation.py`  a scenario and a seed in, a `Result` (`record.py`) out
* `study/`         many runs: sweeps, replays, shrinking; folders, plots, reports
* `tiers/`         the same scenario with the real driver, and with real hosts
* `cli.py`         `meshnode-sim`
"""

from meshnode_simulations.record import Result, Violation
from meshnode_simulations.scenario import Scenario, changed, load, shipped
from meshnode_simulations.simulation import Progress, Simulation
from meshnode_simulations.study.plots import plot

__all__ = [
    "Progress",
    "Result",
    "Scenario",
    "Simulation",
    "Violation",
    "changed",
    "load",
    "plot",
    "shipped",
]
