"""What a plan gives whom, table by table, and what holds of every plan there can be."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.protocol.placement import (
    Holding,
    Host,
    Model,
    Part,
    Plan,
    Problem,
    Replica,
    Want,
    Way,
    plan,
)
from meshnode.protocol.placement.replicas import MOVES_MAX
from meshnode.protocol.placement.several import STAGES_MAX

GB = 10**9
LAN = Way(rtt_us=500, bytes_per_s=100_000_000)


def a_model(digest: str = "m", *, gb: float = 4, layers: int = 32) -> Model:
    return Model(digest, digest, int(gb * GB), layers, 1000, 4096, GB // 10, 8192)


def a_host(
    peer: str,
    *models: str,
    gb: float = 8,
    us: int = 20_000,
    state: Literal["file", "ready", "failed"] = "file",
    wanted: bool = False,
    stages: bool = False,
    draining: bool = False,
    load: int = GB,
) -> Host:
    """A host that holds `models`, all in the same state; `us` is what a gigabyte costs a token."""
    holdings = {model: Holding(state, wanted, 0) for model in models}
    return Host(peer, int(gb * GB), us, load, holdings, stages, draining)


def a_problem(
    models: list[Model],
    hosts: list[Host],
    wants: dict[str, Want] | None = None,
    current: tuple[Replica, ...] = (),
    ways: dict[tuple[str, str], Way] | None = None,
) -> Problem:
    return Problem(
        {model.digest: model for model in models},
        {host.peer: host for host in hosts},
        wants or {},
        ways or {},
        current,
        LAN,
    )


def owners(made: Plan, model: str = "m") -> list[tuple[str, ...]]:
    """Who owns each replica of `model`, in order."""
    return sorted(
        tuple(part.owner for part in one.parts) for one in made.replicas if one.model == model
    )


def reason(made: Plan, peer: str, model: str = "m") -> str:
    (verdict,) = (one for one in made.verdicts if (one.model, one.peer) == (model, peer))
    assert verdict.reason.startswith("in: " if verdict.included else "out: ")
    return verdict.reason


def enacted(made: Plan) -> tuple[Replica, ...]:
    """The replicas of a plan with numbers, as a group would have them."""
    return tuple(replace(one, number=i) for i, one in enumerate(made.replicas))


# --- whole replicas -------------------------------------------------------------------------------


def test_a_model_that_fits_is_whole_on_the_fastest_host() -> None:
    made = plan(
        a_problem(
            [a_model()],
            [
                a_host("slow", "m", us=90_000, stages=True),
                a_host("fast", "m", us=10_000, stages=True),
                a_host("small", "m", gb=2, us=1_000, stages=True),
                a_host("bare"),
                a_host("broken", "m", us=1_000, state="failed"),
            ],
        )
    )
    assert owners(made) == [("fast",)]
    assert made.replicas[0].parts == (Part("fast", 0, 32, 4 * GB + 4_096_000 + GB // 10),)
    assert reason(made, "fast") == "in: holds the file, fastest"
    assert reason(made, "slow") == "out: stands by"
    assert reason(made, "small") == "out: 4.2 GB needed, 2.0 GB free"
    assert reason(made, "bare") == "out: does not have the file"
    assert reason(made, "broken") == "out: could not load it"
    assert made.predictions[0].us_per_token == 40_000
    assert made.predictions[0].note == ""
    assert made.missing == ()


def test_measured_speed_counts_more_than_estimated() -> None:
    slow = a_host("a", "m", us=10_000)
    slow = replace(slow, holdings={"m": replace(slow.holdings["m"], decode_us_per_token=90_000)})
    made = plan(a_problem([a_model()], [slow, a_host("b", "m", us=20_000)]))
    assert owners(made) == [("b",)]


def test_what_a_host_says_a_replica_takes_counts() -> None:
    small = a_host("a", "m", gb=3)
    small = replace(small, holdings={"m": replace(small.holdings["m"], bytes=3 * GB)})
    assert plan(a_problem([a_model()], [small])).replicas[0].parts[0].bytes == 3 * GB


def test_equals_are_decided_by_peer_id() -> None:
    hosts = [a_host(peer, "m") for peer in ("c", "a", "b")]
    made = plan(a_problem([a_model()], hosts))
    assert owners(made) == [("a",)]
    assert made.replicas[0].standbys == (("b",),)


def test_operators_get_what_they_asked_for() -> None:
    hosts = [
        a_host("fast", "m", us=1_000),
        a_host("wanted", "m", us=50_000, wanted=True),
        a_host("pinned", "m", us=90_000),
        a_host("tight", "m", gb=3, wanted=True),
    ]
    made = plan(a_problem([a_model()], hosts, {"m": Want(0, pins=("pinned", "absent"))}))
    assert owners(made) == [("pinned",), ("wanted",)]
    assert reason(made, "pinned") == "in: pinned here"
    assert reason(made, "wanted") == "in: its operator serves it here"
    assert reason(made, "tight") == "out: 4.2 GB needed, 3.0 GB free"
    assert reason(made, "fast") == "out: not needed, replicas: 2, wanted: 0"


def test_a_first_replica_of_one_comes_before_a_second_of_another() -> None:
    hosts = [a_host("x", "m", "n", gb=5), a_host("y", "m", "n", gb=5)]
    models = [a_model("m"), a_model("n")]
    wants = {"m": Want(2, weight=1000), "n": Want(1, weight=1)}
    both = a_problem(models, hosts, wants)
    only_m = replace(both, models={"m": models[0]})
    current = enacted(plan(only_m))
    assert len(current) == 2
    made = plan(replace(both, current=current))
    assert len(owners(made, "m")) == 1
    assert len(owners(made, "n")) == 1


def test_scarce_memory_goes_where_the_demand_is() -> None:
    hosts = [a_host("x", "m", "n", gb=5)]
    models = [a_model("m"), a_model("n")]
    made = plan(a_problem(models, hosts, {"m": Want(1, weight=3), "n": Want(1, weight=5)}))
    assert owners(made, "n") == [("x",)]
    assert made.missing == (("m", "needs 3.3 GB more on one node, or nodes that can run stages"),)
    assert reason(made, "x", "n") == "in: holds the file, fastest"
    assert reason(made, "x", "m") == "out: 4.2 GB needed, 0.8 GB free"


def test_further_replicas_are_shared_out_by_demand() -> None:
    hosts = [a_host(f"h{i}", "m", "n", gb=5, state="ready") for i in range(6)]
    wants = {"m": Want(9, weight=2), "n": Want(9, weight=1)}
    problem = a_problem([a_model("m"), a_model("n")], hosts, wants)
    made = settled(problem)
    assert (len(owners(made, "m")), len(owners(made, "n"))) == (4, 2)


def test_a_replica_makes_room_for_a_model_that_fits_nowhere_else() -> None:
    hosts = [a_host("x", "m", "n", gb=5, us=5_000), a_host("y", "m", gb=5)]
    models = [a_model("m"), a_model("n")]
    current = enacted(plan(a_problem(models[:1], hosts)))
    assert current[0].parts[0].owner == "x"
    made = plan(a_problem(models, hosts, current=current))
    assert owners(made, "m") == [("y",)]
    assert owners(made, "n") == [("x",)]


@pytest.mark.parametrize(
    ("hosts", "remedy"),
    [
        ([], "no node has the file"),
        ([a_host("a")], "no node has the file"),
        ([a_host("a", "m", gb=1)], "needs 3.2 GB more on one node, or nodes that can run stages"),
        (
            [a_host("a", "m", gb=1, stages=True), a_host("b", "m", gb=2, stages=True)],
            "needs 2.2 GB more on one node, or 1.4 GB more on nodes that run stages",
        ),
        (
            [a_host("a", "m", draining=True)],
            "every node that has the file is draining or could not load it",
        ),
    ],
)
def test_what_is_missing_is_said(hosts: list[Host], remedy: str) -> None:
    made = plan(a_problem([a_model()], hosts))
    assert made.replicas == ()
    assert made.missing == (("m", remedy),)


# --- what changes, and what does not --------------------------------------------------------------


def on(peer: str, *, model: str = "m", number: int = 0) -> Replica:
    """A whole replica that is there."""
    return Replica(model, (Part(peer, 0, 32, 4 * GB),), number=number)


@pytest.mark.parametrize(
    ("us", "load", "owner"),
    [
        (18_000, GB, "old"),  # a tenth faster
        (16_000, GB, "new"),
        (16_000, GB // 1000, "old"),  # loads for longer than ten minutes can repay
    ],
)
def test_a_replica_moves_only_for_a_gain_that_pays(us: int, load: int, owner: str) -> None:
    hosts = [a_host("old", "m", us=20_000, state="ready"), a_host("new", "m", us=us, load=load)]
    made = plan(a_problem([a_model()], hosts, current=(on("old", number=7),)))
    why = "serves it already" if owner == "old" else "holds the file, fastest"
    assert owners(made) == [(owner,)]
    assert made.replicas[0].number == (7 if owner == "old" else -1)
    assert reason(made, owner) == f"in: {why}"
    if (us, owner) == (18_000, "old"):
        assert made.predictions[0].note == "slower than new alone: 80 ms a token, not 72"


def test_one_plan_moves_little_and_says_that_more_is_to_come() -> None:
    count = MOVES_MAX + 3
    hosts = [a_host(f"h{i}", "m", us=20_000) for i in range(count + 1)]
    problem = a_problem([a_model()], hosts, {"m": Want(count)}, current=(on("h0"),))
    made = plan(problem)
    assert len(made.replicas) == 1 + MOVES_MAX
    assert made.postponed > 0
    assert "out: waits for other loads to end" in {reason(made, host.peer) for host in hosts}
    assert len(settled(problem).replicas) == count


def test_loss_of_coverage_is_repaired_at_once_however_much_it_moves() -> None:
    models = [a_model(f"m{i}") for i in range(2 * MOVES_MAX)]
    names = [model.digest for model in models]
    made = plan(a_problem(models, [a_host(f"h{i}", *names) for i in range(2 * MOVES_MAX)]))
    assert len(made.replicas) == 2 * MOVES_MAX
    assert made.postponed == 0


def test_the_surplus_that_goes_is_the_slowest_that_nobody_asked_for() -> None:
    hosts = [
        a_host("fast", "m", us=10_000),
        a_host("middle", "m", us=20_000),
        a_host("wanted", "m", us=90_000, wanted=True),
    ]
    current = tuple(on(host.peer, number=i) for i, host in enumerate(hosts))
    made = plan(a_problem([a_model()], hosts, {"m": Want(2)}, current))
    assert owners(made) == [("fast",), ("wanted",)]


def test_the_standby_takes_over_and_keeps_the_number() -> None:
    hosts = [a_host("fast", "m", us=9_000), a_host("standby", "m"), a_host("other", "m")]
    gone = replace(on("gone", number=5), standbys=(("standby",),))
    made = plan(a_problem([a_model()], hosts, current=(gone,)))
    assert owners(made) == [("standby",)]
    assert made.replicas[0].number == 5
    assert made.postponed == 1  # the faster one can have it when it serves again


def test_a_draining_host_gives_up_what_another_can_take() -> None:
    leaving = a_host("leaving", "m", us=1_000, draining=True, wanted=True)
    problem = a_problem([a_model()], [leaving, a_host("other", "m")], current=(on("leaving"),))
    made = plan(problem)
    assert owners(made) == [("other",)]
    assert made.replicas[0].number == -1
    assert made.replicas[0].standbys == ((),)
    assert reason(made, "leaving") == "out: it is draining"

    alone = plan(replace(problem, hosts={"leaving": leaving}))
    assert owners(alone) == [("leaving",)]
    assert reason(alone, "leaving") == "in: it is draining, but no other node can take it"


# --- standbys -------------------------------------------------------------------------------------


def standbys(made: Plan) -> dict[str, tuple[str, ...]]:
    return {one.model: one.standbys[0] for one in made.replicas}


def test_standbys_spread_over_the_spares() -> None:
    hosts = [a_host("a", "m", "n", gb=9, us=1_000)]
    hosts += [a_host(f"spare{i}", "m", "n") for i in range(3)]
    made = plan(a_problem([a_model("m"), a_model("n")], hosts))
    assert standbys(made) == {"m": ("spare0",), "n": ("spare1",)}


def test_standbys_share_a_host_only_if_there_is_no_other() -> None:
    hosts = [a_host("a", "m", "n", gb=9, us=1_000), a_host("spare", "m", "n")]
    made = plan(a_problem([a_model("m"), a_model("n")], hosts))
    assert standbys(made) == {"m": ("spare",), "n": ("spare",)}


def test_who_has_one_possible_standby_gets_it() -> None:
    hosts = [
        a_host("a", "m", "n", gb=9, us=1_000),
        a_host("both", "m", "n", us=5_000),
        a_host("m-only", "m", us=9_000),
    ]
    made = plan(a_problem([a_model("m"), a_model("n")], hosts, {"m": Want(1, weight=9)}))
    assert standbys(made) == {"m": ("m-only",), "n": ("both",)}


def test_a_standby_has_the_file_and_the_memory_and_stays() -> None:
    hosts = [
        a_host("a", "m", us=1_000, state="ready"),
        a_host("leaving", "m", draining=True),
        a_host("tight", "m", gb=3),
        a_host("ready", "m", us=90_000, state="ready"),
        a_host("file", "m", us=5_000),
    ]
    problem = a_problem([a_model()], hosts)
    assert standbys(plan(problem)) == {"m": ("ready",)}

    equals = [hosts[0], a_host("b", "m"), a_host("c", "m")]
    before = replace(on("a"), standbys=(("c",),))
    assert standbys(plan(a_problem([a_model()], equals))) == {"m": ("b",)}
    assert standbys(plan(a_problem([a_model()], equals, current=(before,)))) == {"m": ("c",)}

    two = plan(a_problem([a_model()], hosts[:1] + hosts[-1:], {"m": Want(2)}))
    assert [one.standbys for one in two.replicas] == [((),), ((),)]


# --- pipelines ------------------------------------------------------------------------------------


def staged(peer: str, *, gb: float = 8, us: int = 20_000, **more: bool) -> Host:
    return a_host(peer, "m", gb=gb, us=us, stages=True, **more)  # type: ignore[arg-type]


BIG = a_model(gb=12)


def test_a_model_that_fits_nowhere_is_cut_by_speed() -> None:
    hosts = [staged("slow", us=60_000), staged("fast", us=10_000), a_host("no-stages", "m", us=1)]
    made = plan(a_problem([BIG], hosts))
    (one,) = made.replicas
    assert [part.owner for part in one.parts] == ["fast", "slow"]
    fast, slow = one.parts
    assert (fast.first, fast.end, slow.first, slow.end) == (0, 21, 21, 32)
    assert fast.bytes == -(-(12 * GB + 4_096_000) * 21 // 32) + GB // 10
    assert reason(made, "fast") == "in: layers 0 to 20 of 32"
    assert reason(made, "no-stages") == (
        "out: 12.2 GB needed, 8.0 GB free, and it cannot run stages"
    )
    (predicted,) = made.predictions
    hop_us = 500 + 82  # 8192 bytes at 100 MB/s
    assert predicted.us_per_token == 120_000 * 21 // 32 + 720_000 * 11 // 32 + 2 * hop_us
    assert predicted.millitokens_per_s == 1_000_000_000 // (720_000 * 11 // 32)
    assert predicted.note == "no node can hold all of it"


def test_a_device_that_would_slow_the_pipeline_is_left_out() -> None:
    hosts = [staged("a", us=8_000), staged("b", us=8_000), staged("phone", us=200_000, gb=2)]
    made = plan(a_problem([BIG], hosts))
    assert owners(made) == [("a", "b")]
    spare = reason(plan(a_problem([BIG], [*hosts, staged("spare")])), "phone")
    assert spare.startswith("out: would slow the pipeline from 97 to ")
    assert spare.endswith(" ms a token")


def test_a_far_host_is_left_out_though_it_is_fast() -> None:
    hosts = [staged("a"), staged("b"), staged("far", us=10_000)]
    far = {("a", "far"): Way(400_000), ("far", "b"): Way(400_000)}
    assert owners(plan(a_problem([BIG], hosts, ways=far))) == [("a", "b")]
    assert owners(plan(a_problem([BIG], hosts)))[0] != ("far",)
    assert "far" in owners(plan(a_problem([BIG], hosts)))[0]


def test_stages_are_ordered_by_their_ways() -> None:
    hosts = [staged(peer, gb=4, us=5_000) for peer in "abcd"]
    near = {("a", "c"): LAN, ("c", "b"): LAN, ("b", "d"): LAN, ("d", "a"): LAN}
    far = {("a", "b"): Way(90_000), ("c", "d"): Way(90_000)}
    (ring,) = owners(plan(a_problem([BIG], hosts, ways=near | far)))
    assert ring == ("a", "c", "b", "d")


def test_a_model_is_not_cut_where_it_fits_even_if_that_is_slower() -> None:
    hosts = [staged("big", gb=16, us=50_000), staged("a", us=1_000), staged("b", us=1_000)]
    assert owners(plan(a_problem([BIG], hosts))) == [("big",)]


def test_a_pipeline_slower_than_one_node_says_so() -> None:
    """The big host is full of what its operator serves there, so the model is cut after all."""
    big = staged("big", gb=16, us=10_000)
    big = replace(big, holdings=dict(big.holdings) | {"n": Holding("ready", True, 0)})
    hosts = [big, staged("a"), staged("b")]
    made = plan(a_problem([BIG, a_model("n", gb=15.8)], hosts))
    assert owners(made, "n") == [("big",)]
    assert owners(made, "m") == [("a", "b")]
    (note,) = (one.note for one in made.predictions if one.model == "m")
    assert note.startswith("slower than big alone: ")
    assert note.endswith(" ms a token, not 120")


def test_a_lost_stage_is_taken_over_and_the_others_stay() -> None:
    hosts = [staged(peer) for peer in "abcd"]
    made = plan(a_problem([BIG], hosts))
    (before,) = enacted(made)
    lost, kept = before.parts
    hosts = [host for host in hosts if host.peer != lost.owner]
    (after,) = plan(a_problem([BIG], hosts, current=(before,))).replicas
    assert after.number == before.number
    assert after.parts[1] == kept
    assert (after.parts[0].owner,) == before.standbys[0]
    assert (after.parts[0].first, after.parts[0].end) == (lost.first, lost.end)


def test_several_pipelines_share_no_host() -> None:
    hosts = [staged(f"h{i}", us=10_000 * (1 + i % 3)) for i in range(6)]
    made = settled(a_problem([BIG], hosts, {"m": Want(3)}))
    assert len(made.replicas) == 3
    assert_sound(a_problem([BIG], hosts, {"m": Want(3)}), made)
    # The slowest stage sets the rate, so a fast host would only wait for a slow one.
    assert owners(made) == [("h0", "h3"), ("h1", "h4"), ("h2", "h5")]


def test_one_of_several_pipelines_has_only_so_many_stages() -> None:
    hosts = [staged(f"h{i:02}", gb=4, us=10_000 + i) for i in range(4 * STAGES_MAX)]
    made = settled(a_problem([BIG], hosts, {"m": Want(2)}))
    assert [len(one.parts) for one in made.replicas] == [STAGES_MAX, STAGES_MAX]


@pytest.mark.parametrize("layers", [0, 1])
def test_a_model_that_has_no_layers_to_cut_stays_whole(layers: int) -> None:
    model = a_model(layers=layers)
    assert plan(a_problem([model], [staged("a")])).replicas[0].parts[0].end == 1
    assert plan(a_problem([model], [staged("a", gb=3), staged("b", gb=3)])).replicas == ()


# --- what holds of every plan ---------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small meshes: tight memory, few speeds (so that there are ties), some failures."""
    models = [
        Model(
            f"m{i}",
            f"model {i}",
            draw(st.integers(1, 8)) * GB,
            draw(st.sampled_from([0, 1, 4, 7, 32])),
            1000,
            4096,
            GB // 10,
            8192,
        )
        for i in range(draw(st.integers(1, 3)))
    ]
    hosts = []
    for i in range(draw(st.integers(0, 6))):
        holdings = {
            model.digest: Holding(
                draw(st.sampled_from(["file", "file", "ready", "failed"])),
                draw(st.integers(0, 5)) == 0,
                draw(st.sampled_from([0, 0, 2 * GB])),
            )
            for model in models
            if draw(st.integers(0, 3))
        }
        hosts.append(
            Host(
                f"p{i}",
                draw(st.integers(1, 10)) * GB,
                draw(st.sampled_from([5_000, 10_000, 11_000, 40_000])),
                draw(st.sampled_from([0, GB // 100, GB])),
                holdings,
                stages=draw(st.booleans()),
                draining=draw(st.integers(0, 5)) == 0,
            )
        )
    peers = [host.peer for host in hosts]
    pins = st.lists(st.sampled_from(peers), max_size=1) if peers else st.just([])
    wants = {
        model.digest: Want(
            draw(st.integers(0, 3)), tuple(draw(pins)), draw(st.sampled_from([0, 1, 5]))
        )
        for model in models
        if draw(st.booleans())
    }
    rtts = st.sampled_from([500, 20_000, 80_000])
    ways = {
        (one, other): Way(draw(rtts))
        for one in peers
        for other in peers
        if one < other and draw(st.booleans())
    }
    return a_problem(models, hosts, wants, ways=ways)


def assert_sound(problem: Problem, made: Plan) -> None:
    """S7 and S8, and that only who may own something does."""
    used: Counter[str] = Counter()
    owned: dict[str, list[str]] = defaultdict(list)
    for one in made.replicas:
        layers = max(1, problem.models[one.model].layers)
        edges = [0, *(part.end for part in one.parts)]
        assert [part.first for part in one.parts] == edges[:-1]
        assert edges[-1] == layers
        assert len(one.standbys) == len(one.parts)
        for part, standbys in zip(one.parts, one.standbys, strict=True):
            assert part.first < part.end
            used[part.owner] += part.bytes
            owned[one.model].append(part.owner)
            host = problem.hosts[part.owner]
            assert host.holdings[one.model].state != "failed"
            assert host.stages or len(one.parts) == 1
            assert len(standbys) <= 1
    for peer, size in used.items():
        assert size <= problem.hosts[peer].memory_bytes
    for model, peers in owned.items():
        assert len(set(peers)) == len(peers), f"{model} twice on one host"
    for one in made.replicas:
        for part, standbys in zip(one.parts, one.standbys, strict=True):
            for peer in standbys:
                assert peer not in owned[one.model]
                assert not problem.hosts[peer].draining
                host, model = problem.hosts[peer], problem.models[one.model]
                size = part.bytes
                if len(one.parts) == 1:
                    kv_bytes = model.kv_bytes_per_token * model.context_tokens
                    size = model.weight_bytes + kv_bytes + model.compute_bytes
                    size = host.holdings[one.model].bytes or size
                assert used[peer] + size <= host.memory_bytes
    placed = {one.model for one in made.replicas}
    wanted = {m for m in problem.models if problem.wants.get(m, Want(1)).replicas > 0}
    assert {model for model, _ in made.missing} == wanted - placed
    assert len(made.verdicts) == len(problem.models) * len(problem.hosts)
    assert len(made.predictions) == len(made.replicas)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_every_plan_covers_all_layers_and_fits(problem: Problem) -> None:
    assert_sound(problem, plan(problem))


@settings(max_examples=150, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_facts_does_not_matter(problem: Problem, rng: random.Random) -> None:
    current = list(enacted(plan(problem)))
    rng.shuffle(current)
    problem = replace(problem, current=tuple(current))
    assert plan(mixed(problem, rng)) == plan(problem)


def mixed(problem: Problem, rng: random.Random) -> Problem:
    """The same facts, told in another order."""

    def again(mapping):  # type: ignore[no-untyped-def]
        items = list(mapping.items())
        rng.shuffle(items)
        return dict(items)

    current = list(problem.current)
    rng.shuffle(current)
    hosts = {
        peer: replace(host, holdings=again(host.holdings))
        for peer, host in again(problem.hosts).items()
    }
    return replace(
        problem,
        models=again(problem.models),
        hosts=hosts,
        wants=again(problem.wants),
        ways=again(problem.ways),
        current=tuple(current),
    )


def settled(problem: Problem) -> Plan:
    """Plans made of plans, until nothing is postponed."""
    made = plan(problem)
    for _ in range(12):
        if made.postponed == 0:
            return made
        problem = replace(problem, current=enacted(made))
        made = plan(problem)
    raise AssertionError("every plan puts something off")


@settings(max_examples=300, deadline=None)
@given(problems())
def test_planning_again_changes_nothing(problem: Problem) -> None:
    made = settled(problem)
    again = plan(replace(problem, current=enacted(made)))
    assert again.replicas == enacted(made)


@settings(max_examples=150, deadline=None)
@given(problems(), st.dictionaries(st.sampled_from(["m0", "m1", "m2"]), st.integers(0, 3)))
def test_other_demand_moves_few_replicas_at_once(problem: Problem, more: dict[str, int]) -> None:
    before = settled(problem)
    wants = {
        model: replace(problem.wants.get(model, Want(1)), replicas=count, weight=7 * count)
        for model, count in more.items()
        if model in problem.models
    }
    wants = dict(problem.wants) | wants
    after = plan(replace(problem, wants=wants, current=enacted(before)))
    if {one.model for one in after.replicas} <= {one.model for one in before.replicas}:
        new = [one for one in after.replicas if one.number == -1]
        assert len(new) <= MOVES_MAX


def test_every_process_makes_the_same_plan() -> None:
    """Voters compute plans apart from each other: no order of a set may show in one."""
    source = (
        "from tests.protocol.test_placement import *\n"
        "models = [a_model(f'm{i}', gb=1 + 5 * i) for i in range(4)]\n"
        "names = [model.digest for model in models]\n"
        "hosts = [a_host(f'h{i}', *names[i % 2:], stages=True) for i in range(9)]\n"
        "print(plan(a_problem(models, hosts, {name: Want(2) for name in names})))\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", source],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1
    assert b"Replica(" in said.pop()


@settings(max_examples=200, deadline=None)
@given(problems(), problems())
def test_a_host_more_never_costs_a_model_its_place(problem: Problem, other: Problem) -> None:
    before = plan(problem)
    grown = replace(
        problem,
        hosts=dict(problem.hosts) | {f"q{peer}": host for peer, host in other.hosts.items()},
        current=enacted(before),
    )
    grown = replace(
        grown, hosts={peer: replace(host, peer=peer) for peer, host in grown.hosts.items()}
    )
    after = plan(grown)
    assert_sound(grown, after)
    assert {one.model for one in before.replicas} <= {one.model for one in after.replicas}


@settings(max_examples=200, deadline=None)
@given(problems(), problems())
def test_whatever_was_before_the_plan_is_sound(problem: Problem, other: Problem) -> None:
    """Hosts gone, drained, shrunk, files lost: `current` is of another mesh altogether."""
    problem = replace(problem, current=enacted(plan(other)))
    made = plan(problem)
    assert_sound(problem, made)
    assert_sound(problem, settled(problem))
