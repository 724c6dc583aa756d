"""The rounds, and what is made of them."""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from importlib.metadata import version

from meshnode.protocol.placement import Host, Plan, Problem, Replica, Want, plan
from meshnode.protocol.placement.cost import hop_us, layers_max, units, whole_us
from tests.bench.placement import baselines, exact
from tests.bench.placement.clusters import busy_problem, cut_problem
from tests.bench.placement.exact import Instance

SEED = 20
LATENCY_MESHES, LATENCY_HOSTS, LATENCY_LAYERS = 120, (6, 12), 48
PIPELINE_MESHES, PIPELINE_HOSTS, PIPELINE_LAYERS = 120, (6, 10), 48
COVERAGE_MESHES, COVERAGE_HOSTS, COVERAGE_LAYERS = 40, (8, 8), 24
TIME_HOSTS = (10, 50, 200)
CHURN_HOSTS, CHURN_EVENTS = 20, 100
QUICK = 10
"""A quick run has so many times fewer meshes."""


@dataclass(frozen=True)
class Report:
    """Ratios to the optimum by objective and planner, and the tables that are not ratios."""

    ratios: dict[str, dict[str, list[float]]]
    notes: list[str]
    times: list[tuple[int, float, float]]
    """Hosts, and milliseconds of CPU for a first plan and for the next one."""
    churn: dict[str, list[tuple[int, int, int]]]
    """Kind of event: loads of ours, of planning from nothing, and those nobody could avoid."""


def measure(*, quick: bool = False) -> Report:
    share = QUICK if quick else 1
    report = Report(defaultdict(lambda: defaultdict(list)), [], [], defaultdict(list))
    _latency(report, LATENCY_MESHES // share)
    _pipelines(report, PIPELINE_MESHES // share)
    _coverage(report, COVERAGE_MESHES // share)
    for count in TIME_HOSTS:
        report.times.append((count, *_plan_ms(count, repeats=1 if quick else 3)))
    _churn(report, CHURN_EVENTS // share)
    return report


def _rng(name: str, i: int) -> random.Random:
    return random.Random(f"{SEED} {name} {i}")


def _instance(problem: Problem) -> Instance:
    """The only model of `problem`, as the exact searches and the baselines see it."""
    (model,) = problem.models.values()
    hosts = [problem.hosts[peer] for peer in sorted(problem.hosts)]
    return Instance(
        units(model),
        tuple(layers_max(model, host.memory_bytes) for host in hosts),
        tuple(whole_us(model, host) for host in hosts),
        tuple(
            tuple(0 if a is b else hop_us(problem, model, a.peer, b.peer) for b in hosts)
            for a in hosts
        ),
    )


# --- against the optimum -------------------------------------------------------------------------


def _latency(report: Report, meshes: int) -> None:
    for i in range(meshes):
        rng = _rng("latency", i)
        problem = cut_problem(rng, rng.randint(*LATENCY_HOSTS), LATENCY_LAYERS, share=0.6)
        case = _instance(problem)
        best = exact.latency_us(case)
        found = {
            "meshnode": plan(problem).predictions[0].us_per_token,
            "fastest first": baselines.cost_us(case, baselines.fastest_first(case)),
            "parallax": baselines.cost_us(case, baselines.largest_first(case)[0]),
            "proportional": baselines.cost_us(case, baselines.proportional(case)),
        }
        for planner, cost in found.items():
            report.ratios["latency (1 is best, more is worse)"][planner].append(cost / best)


def _pipelines(report: Report, meshes: int) -> None:
    judged, fewer, seed = 0, 0, 0
    while judged < meshes:
        rng = _rng("pipelines", seed)
        seed += 1
        problem = cut_problem(rng, rng.randint(*PIPELINE_HOSTS), PIPELINE_LAYERS, share=0.4)
        case = _instance(problem)
        sums = exact.pipelines(case)
        if len(sums) < 2:
            continue  # one pipeline is cut for its latency: judged above
        judged += 1
        made = _settled(replace(problem, wants={"m": Want(len(sums))}))
        fewer += len(made.replicas) < len(sums)
        parallax = sum(baselines.rate(case, one) for one in baselines.largest_first(case))
        ours = _rate(made)
        same = report.ratios["pipelines, as many as can be (1 is best, less is worse)"]
        same["meshnode"].append(ours / sums[-1])
        same["parallax"].append(parallax / sums[-1])
        any_number = report.ratios["pipelines, any number (1 is best, less is worse)"]
        any_number["meshnode"].append(ours / max(sums))
        any_number["parallax"].append(parallax / max(sums))
    report.notes.append(f"pipelines: fewer than there can be in {fewer} of {judged} meshes")


def _coverage(report: Report, meshes: int) -> None:
    unproven = 0
    for i in range(meshes):
        rng = _rng("coverage", i)
        problem = cut_problem(rng, rng.randint(*COVERAGE_HOSTS), COVERAGE_LAYERS, share=0.4)
        case = _instance(problem)
        best, proven = exact.coverage(case)
        unproven += not proven
        petals = baselines.Petals(case, rng)
        found = {"petals, joined": petals.least}
        petals.rebalance()
        found["petals, rebalanced"] = petals.least
        most = len(exact.pipelines(case))
        found["meshnode"] = _rate(_settled(replace(problem, wants={"m": Want(most)})))
        found["parallax"] = sum(baselines.rate(case, one) for one in baselines.largest_first(case))
        for planner, rate in found.items():
            report.ratios["coverage (1 is best with full spans)"][planner].append(rate / best)
    report.notes.append(f"coverage: {unproven} of {meshes} optima not proven in the time")


def _rate(made: Plan) -> float:
    """Tokens a second of all replicas."""
    return sum(one.millitokens_per_s for one in made.predictions) / 1000


# --- time and churn ------------------------------------------------------------------------------


def _enacted(made: Plan) -> tuple[Replica, ...]:
    return tuple(replace(one, number=i) for i, one in enumerate(made.replicas))


def _settled(problem: Problem) -> Plan:
    """The plan after those that it puts something off to."""
    made = plan(problem)
    while made.postponed:
        before = made.replicas
        made = plan(replace(problem, current=_enacted(made)))
        if made.replicas == before:
            break
    return made


def _plan_ms(count: int, repeats: int) -> tuple[float, float]:
    first, again = [], []
    for i in range(repeats):
        problem = busy_problem(_rng(f"time {count}", i), count)
        began = time.process_time()
        made = plan(problem)
        first.append(time.process_time() - began)
        began = time.process_time()
        plan(replace(problem, current=_enacted(made)))
        again.append(time.process_time() - began)
    return statistics.median(first) * 1000, statistics.median(again) * 1000


def _churn(report: Report, events: int) -> None:
    rng = _rng("churn", 0)
    spare = busy_problem(rng, 2 * CHURN_HOSTS)
    peers = sorted(spare.hosts)
    problem = replace(spare, hosts={peer: spare.hosts[peer] for peer in peers[:CHURN_HOSTS]})
    made = _settled(problem)
    kinds = ("leave", "join", "drain", "speed", "demand")
    for i in range(events):
        kind = kinds[i % len(kinds)]
        problem = replace(_after(kind, problem, spare, rng), current=_enacted(made))
        forced = sum(
            part.owner not in problem.hosts or problem.hosts[part.owner].draining
            for one in made.replicas
            for part in one.parts
        )
        after = _settled(problem)
        anew = plan(replace(problem, current=()))
        report.churn[kind].append((_loads(made, after), _loads(made, anew), forced))
        made = after
        gone = {peer for peer, host in problem.hosts.items() if host.draining}
        problem = replace(problem, hosts={p: h for p, h in problem.hosts.items() if p not in gone})


def _after(kind: str, problem: Problem, spare: Problem, rng: random.Random) -> Problem:
    hosts = dict(problem.hosts)
    wants = dict(problem.wants)
    chosen = rng.choice(sorted(hosts))
    if kind == "leave":
        del hosts[chosen]
    elif kind == "drain":
        hosts[chosen] = replace(hosts[chosen], draining=True)
    elif kind == "join":
        for peer in rng.sample(sorted(set(spare.hosts) - set(hosts)), CHURN_HOSTS - len(hosts)):
            hosts[peer] = spare.hosts[peer]
    elif kind == "speed":
        hosts = {peer: _remeasured(host, rng) for peer, host in sorted(hosts.items())}
    else:
        name = rng.choice(sorted(wants))
        more = rng.choice((-1, 1))
        wants[name] = replace(wants[name], replicas=max(1, wants[name].replicas + more))
    return replace(problem, hosts=hosts, wants=wants)


def _remeasured(host: Host, rng: random.Random) -> Host:
    return replace(host, us_per_gb=int(host.us_per_gb * rng.uniform(0.93, 1.07)))


def _loads(before: Plan, after: Plan) -> int:
    """Parts whose owner did not have all of their layers before."""
    had = [(one.model, part) for one in before.replicas for part in one.parts]
    return sum(
        not any(
            model == one.model
            and has.owner == part.owner
            and has.first <= part.first
            and part.end <= has.end
            for model, has in had
        )
        for one in after.replicas
        for part in one.parts
    )


# --- in words ------------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform(terse=True)}, "
        f"Python {sys.version.split()[0]}, scipy {version('scipy')}, numpy {version('numpy')}",
        f"seed {SEED}",
    ]
    for objective, planners in report.ratios.items():
        count = len(next(iter(planners.values())))
        lines += ["", f"{objective}; {count} meshes", _row("", "median", "mean", "best", "worst")]
        upward = objective.startswith("latency")
        for planner, ratios in planners.items():
            best, worst = (min(ratios), max(ratios)) if upward else (max(ratios), min(ratios))
            figures = (statistics.median(ratios), statistics.mean(ratios), best, worst)
            lines.append(_row(planner, *(f"{figure:.3f}" for figure in figures)))
    lines += ["", *report.notes, "", _row("CPU ms of a plan", "first", "next")]
    lines += [_row(f"{n} hosts", f"{a:.0f}", f"{b:.0f}") for n, a, b in report.times]
    lines += ["", _row("loads per event", "meshnode", "anew", "forced")]
    for kind, rows in report.churn.items():
        means = map(statistics.mean, zip(*rows, strict=True))
        lines.append(_row(kind, *(f"{mean:.2f}" for mean in means)))
    return "\n".join(lines)


def _row(name: str, *cells: str) -> str:
    return f"{name:24}" + "".join(f"{cell:>10}" for cell in cells)
