"""What would become of the mesh's models if something were different.

Pure: what-ifs change the facts (`placement.Problem`), the same planner that decides for the mesh
plans from them, and its plan is told with its reasons. Nothing here is ordered or promised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from meshnode.console.requests import (
    NEW_NODE,
    AddNode,
    ChangeReport,
    DrainNode,
    ModelFile,
    ModelReport,
    PartReport,
    PinModel,
    PlacementReport,
    RemoveNode,
    ReplicaReport,
    SetMemory,
    SetReplicas,
    VerdictReport,
    WhatIf,
)
from meshnode.errors import ConfigError
from meshnode.protocol.facts import LOAD_BYTES_PER_S, US_PER_GB_UNMEASURED
from meshnode.protocol.placement import (
    Holding,
    Host,
    Model,
    Plan,
    Prediction,
    Problem,
    Replica,
    Want,
    plan,
)

FILE_DIGEST = "file"
"""Stands for the digest of a file that nobody in the mesh has: it has not been read through."""


@dataclass(frozen=True, slots=True)
class Changed:
    """Facts after the what-ifs, the what-ifs in words, and the model that is asked about."""

    problem: Problem
    assumed: tuple[str, ...]
    model: str | None


def with_idle(problem: Problem, memory_bytes: Mapping[str, int]) -> Problem:
    """`problem` with the nodes that hold no model at all: the mesh does not plan with them, but
    people ask why. `memory_bytes` by peer."""
    idle = {
        peer: _host(peer, offered) for peer, offered in memory_bytes.items()
        if peer not in problem.hosts
    }  # fmt: skip
    return replace(problem, hosts={**problem.hosts, **idle})


def with_file(problem: Problem, file: ModelFile) -> Changed:
    """As if every node had this file."""
    model = Model(
        digest=FILE_DIGEST,
        name=file.name,
        weight_bytes=file.weight_bytes,
        layers=file.layers,
        kv_bytes_per_token=file.kv_bytes_per_token,
        context_tokens=file.context_tokens,
        compute_bytes=file.compute_bytes,
        activation_bytes=file.activation_bytes,
    )
    held = Holding("file", wanted=False, bytes=0, cuts=file.activation_bytes > 0)
    hosts = {peer: _holding(host, {FILE_DIGEST: held}) for peer, host in problem.hosts.items()}
    changed = replace(problem, models={**problem.models, FILE_DIGEST: model}, hosts=hosts)
    return Changed(changed, ("every node had the file",), FILE_DIGEST)


def with_what_ifs(
    changed: Changed, what_ifs: tuple[WhatIf, ...], find: Callable[[str], str]
) -> Changed:
    """In the order in which they were given. `find` knows nodes by a part of their id.

    Raises `ConfigError` for one that cannot be.
    """
    for what_if in what_ifs:
        problem, words = _with(changed, what_if, find)
        changed = Changed(problem, (*changed.assumed, words), changed.model)
    return changed


def _with(changed: Changed, what_if: WhatIf, find: Callable[[str], str]) -> tuple[Problem, str]:
    problem = changed.problem
    match what_if:
        case AddNode(memory_bytes, ms_per_token):
            if ms_per_token is not None and changed.model is None:
                raise ConfigError("ms_per_token is a model's speed on that node: name the model")
            new = f"{NEW_NODE}{1 + sum(peer.startswith(NEW_NODE) for peer in problem.hosts)}"
            host = _host(new, memory_bytes)
            chosen = problem.models if changed.model is None else (changed.model,)
            us = 0 if ms_per_token is None else max(1, round(1000 * ms_per_token))
            cut = {
                digest
                for other in problem.hosts.values()
                for digest, known in other.holdings.items()
                if known.cuts
            }
            held = {digest: Holding("file", False, 0, us, digest in cut) for digest in chosen}
            return _with_host(problem, _holding(host, held)), f"a node {new} had the file"
        case RemoveNode(node):
            peer = _existing(problem, find(node))
            hosts = {other: host for other, host in problem.hosts.items() if other != peer}
            return replace(problem, hosts=hosts), f"…{peer[-8:]} were gone"
        case DrainNode(node):
            peer = _existing(problem, find(node))
            drained = replace(problem.hosts[peer], draining=True)
            return _with_host(problem, drained), f"…{peer[-8:]} were drained"
        case SetMemory(node, memory_bytes):
            peer = _existing(problem, find(node))
            sized = replace(problem.hosts[peer], memory_bytes=memory_bytes)
            return _with_host(
                problem, sized
            ), f"…{peer[-8:]} offered {memory_bytes / 2**30:.1f} GiB"
        case PinModel(node):
            model = _asked(changed, "pin")
            peer = _existing(problem, find(node))
            want = problem.wants.get(model, Want(1))
            pinned = replace(want, pins=tuple(dict.fromkeys((*want.pins, peer))))
            return _wanting(problem, model, pinned), f"it were pinned to …{peer[-8:]}"
        case SetReplicas(count):
            model = _asked(changed, "replicas")
            wanted = replace(problem.wants.get(model, Want(1)), replicas=count)
            return _wanting(problem, model, wanted), f"{count} replicas were wanted"


def _asked(changed: Changed, what_if: str) -> str:
    if changed.model is None:
        raise ConfigError(f"the what-if {what_if} is about one model: name it")
    return changed.model


def _existing(problem: Problem, peer: str) -> str:
    if peer not in problem.hosts:
        raise ConfigError(f"…{peer[-8:]} could own nothing now: it is away, or serves no models")
    return peer


def _host(peer: str, memory_bytes: int) -> Host:
    return Host(peer, memory_bytes, US_PER_GB_UNMEASURED, LOAD_BYTES_PER_S, {}, stages=True)


def _with_host(problem: Problem, host: Host) -> Problem:
    return replace(problem, hosts={**problem.hosts, host.peer: host})


def _holding(host: Host, held: Mapping[str, Holding]) -> Host:
    return replace(host, holdings={**host.holdings, **held})


def _wanting(problem: Problem, model: str, want: Want) -> Problem:
    return replace(problem, wants={**problem.wants, model: want})


# --- the answer ----------------------------------------------------------------------------------


def report(changed: Changed, epoch: int) -> PlacementReport:
    """Plan, and say why. Some milliseconds of work, for large meshes up to a second."""
    problem = changed.problem
    planned = plan(problem)
    chosen = sorted(problem.models) if changed.model is None else [changed.model]
    missing = dict(planned.missing)
    return PlacementReport(
        epoch=epoch,
        models=tuple(
            _model_report(problem, planned, digest, missing.get(digest, "")) for digest in chosen
        ),
        assumed=changed.assumed,
        postponed=planned.postponed,
    )


def _model_report(problem: Problem, planned: Plan, digest: str, missing: str) -> ModelReport:
    model = problem.models[digest]
    shared = model.weight_bytes + model.kv_bytes_per_token * model.context_tokens
    return ModelReport(
        digest=digest,
        name=model.name,
        layers=model.layer(model.layers),
        bytes=shared + model.compute_bytes,
        replicas_wanted=problem.wants.get(digest, Want(1)).replicas,
        replicas=_replica_reports(problem, planned, digest),
        verdicts=tuple(
            VerdictReport(
                verdict.peer,
                verdict.included,
                verdict.reason.partition(": ")[2],
                problem.hosts[verdict.peer].memory_bytes,
            )
            for verdict in planned.verdicts
            if verdict.model == digest
        ),
        changes=_changes(problem, planned, digest),
        missing=missing,
    )


def _replica_reports(problem: Problem, planned: Plan, digest: str) -> tuple[ReplicaReport, ...]:
    return tuple(
        _replica_report(problem, replica, prediction)
        for replica, prediction in zip(planned.replicas, planned.predictions, strict=True)
        if replica.model == digest
    )


def _replica_report(problem: Problem, replica: Replica, prediction: Prediction) -> ReplicaReport:
    model = problem.models[replica.model]
    speeds = [
        problem.hosts[part.owner].holdings[replica.model].decode_us_per_token
        for part in replica.parts
    ]
    best_us = prediction.best_single_us_per_token
    return ReplicaReport(
        parts=tuple(
            PartReport(
                part.owner,
                model.layer(part.first),
                model.layer(part.end),
                part.bytes,
                replica.standbys[place] if place < len(replica.standbys) else (),
            )
            for place, part in enumerate(replica.parts)
        ),
        ms_per_token=prediction.us_per_token / 1000,
        tokens_per_s=prediction.millitokens_per_s / 1000,
        is_measured=all(speeds),
        best_single_ms_per_token=best_us / 1000 if best_us else None,
        note=prediction.note,
    )


def _changes(problem: Problem, planned: Plan, digest: str) -> tuple[ChangeReport, ...]:
    """Who would load, and who let go, against what is decided."""
    before = _owners(problem.current, digest)
    after = _owners(planned.replicas, digest)
    return (
        *(ChangeReport(peer, "load") for peer in after if peer not in before),
        *(ChangeReport(peer, "let go") for peer in before if peer not in after),
    )


def _owners(replicas: tuple[Replica, ...], digest: str) -> dict[str, None]:
    """In order, each once."""
    return dict.fromkeys(
        part.owner for replica in replicas if replica.model == digest for part in replica.parts
    )
