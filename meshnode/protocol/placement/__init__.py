"""Who should own what: a pure function from a mesh's facts to its assignment, with reasons.

Deterministic to the last bit: integers only, ties broken by peer id, effort bounded by a count of
iterations and never by time, so that every voter that computes it from the same facts gets the
same plan. It does not know who is proposing, which epoch it is, or what a message looks like.

* `terms.py`     the facts and the plan
* `cost.py`      what a model takes and how long it takes, on one host and between two
* `pipeline.py`  how a model that fits on no host is cut into stages
* `several.py`   how several such pipelines share the hosts
* `ledger.py`    what each host owns and has free while a plan is made
* `replicas.py`  who owns what, and what is worth moving
* `standbys.py`  who would take over
* `explain.py`   reasons, predictions, and what is missing
"""

from __future__ import annotations

from meshnode.protocol.placement.explain import missing, predictions, verdicts
from meshnode.protocol.placement.replicas import assign
from meshnode.protocol.placement.standbys import with_standbys
from meshnode.protocol.placement.terms import (
    PPM,
    Holding,
    Host,
    Model,
    Part,
    Plan,
    Prediction,
    Problem,
    Replica,
    Verdict,
    Want,
    Way,
)

__all__ = [
    "PPM",
    "Holding",
    "Host",
    "Model",
    "Part",
    "Plan",
    "Prediction",
    "Problem",
    "Replica",
    "Verdict",
    "Want",
    "Way",
    "plan",
]


def plan(problem: Problem) -> Plan:
    """The assignment that `problem` asks for. Raises nothing: what cannot be is in `missing`."""
    assigned = assign(problem)
    replicas = with_standbys(problem, assigned.replicas)
    return Plan(
        replicas,
        verdicts(problem, replicas),
        predictions(problem, replicas),
        missing(problem, replicas),
        assigned.postponed,
    )
