"""A model that is cut: its ring is as fast as its hosts and ways, and loses no token when it
breaks."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from meshnode.engine import head
from meshnode_simulations.kernel.loop import NS_PER_S, Loop
from meshnode_simulations.models import pipelines
from meshnode_simulations.models.engine import Engine, Job
from meshnode_simulations.models.hosting import Hosting
from meshnode_simulations.scenario import Model
from meshnode_simulations.simulation import Simulation

MODEL = Model(name="cut", layers=4, slots=2, prefill_tokens_per_s=100.0, decode_tokens_per_s=10.0)


def test_the_wait_is_that_of_production() -> None:
    assert pipelines.PIPELINE_WAIT_S == head.PIPELINE_WAIT_S


class _Client:
    def __init__(self, loop: Loop) -> None:
        self.heard: list[tuple[str, float]] = []
        self._loop = loop

    def job(self, prompt_tokens: int, answer_tokens: int) -> Job:
        def note(what: str) -> None:
            self.heard.append((what, self._loop.now_s))

        return Job(
            prompt_tokens,
            answer_tokens,
            blocks=(),
            block_tokens=16,
            session=b"",
            first=lambda: note("first"),
            done=lambda: note("done"),
            stalled=lambda: note("stalled"),
            lost=lambda: note("lost"),
        )


def test_an_answer_goes_on_where_it_was_when_its_pipeline_broke() -> None:
    loop = Loop()
    client, engine = _Client(loop), Engine(loop, MODEL, 1.0, 8192)
    job = client.job(prompt_tokens=100, answer_tokens=41)
    engine.submit(job)
    loop.run(3 * NS_PER_S)  # one second of prompt, two of answer: its first token, and twenty
    told = engine.decoded(job)
    assert told in (20, 21)  # the last falls into this very instant
    engine.halt()
    loop.run(10 * NS_PER_S)
    assert engine.decoded(job) == told
    engine.go_on(replace(MODEL, prefill_tokens_per_s=1000.0))
    loop.run(20 * NS_PER_S)
    assert [what for what, _ in client.heard] == ["first", "stalled", "first", "done"]
    computed_again_s = (100 + told) / 1000.0
    assert client.heard[2][1] == pytest.approx(10.0 + computed_again_s, abs=1e-6)
    # The first of what was left comes with the prompt.
    assert client.heard[3][1] == pytest.approx(
        10.0 + computed_again_s + (41 - told - 1) / 10.0, abs=1e-6
    )


def test_whoever_waits_for_a_pipeline_that_never_comes_is_given_back() -> None:
    loop = Loop()
    client, engine = _Client(loop), Engine(loop, MODEL, 1.0, 8192)
    for _ in range(3):
        engine.submit(client.job(100, 10))
    engine.halt()
    engine.give_back()
    loop.run(60 * NS_PER_S)
    assert [what for what, _ in client.heard] == ["lost"] * 3


def test_a_ring_is_as_fast_as_its_stages_and_ways() -> None:
    run = Simulation(
        "cut-model-owner-death", changes={"network.latency": "constant", "network.one_way_ms": 20.0}
    ).prepare()
    machines = run.world.machines
    rings = pipelines.Pipelines(run, Hosting(run))
    paced = rings.paced(MODEL, ((machines[0], 1), (machines[1], 3)))
    # A tenth of a second for all layers, and there and back.
    assert paced.decode_tokens_per_s == pytest.approx(1.0 / (0.1 + 2 * 0.02))
    assert paced.prefill_tokens_per_s == pytest.approx(100.0)
    # Three of four layers are the slowest stage: 75 ms of 140.
    assert paced.batch_gain == pytest.approx(min(2, 2.0 * 140 / 75))
