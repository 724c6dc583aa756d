"""Signed words and adverts as the planner's terms."""

from __future__ import annotations

import pytest

from meshnode.messages import Advert, Body, Consent, Offer
from meshnode.protocol.facts import problem_of
from meshnode.protocol.placement.cost import whole_us
from meshnode.protocol.words import Word

MODEL = "ab" * 32
GB = 10**9


def consent(state: str, **changes: object) -> Word:
    fields: dict[str, object] = {
        "bytes": 6 * GB, "memory_bytes": 8 * GB, "weight_bytes": 4 * GB, "kv_bytes": GB,
        "layers": 30, "activation_bytes": 2304, "edge_bytes": GB,
    }  # fmt: skip
    return Word(
        Consent("aa" * 16, 1, MODEL, "smol", state, False, **{**fields, **changes}),  # type: ignore[arg-type]
        b"",
    )


def advert(rate: float) -> Advert:
    offer = Offer("smol", MODEL, "ready", 64, 1, 0, 0, 64, 0.0, rate)
    return Advert("aa" * 16, 1, 60, (offer,), (), 8 * GB, 2, "cpu")


@pytest.mark.parametrize("edge_bytes", [0, GB, 3 * GB])
def test_a_peer_that_was_never_measured_is_not_thought_faster_than_one_that_was(
    edge_bytes: int,
) -> None:
    words = {
        ("ann", MODEL): consent("ready", edge_bytes=edge_bytes),
        ("bea", MODEL): consent("file", edge_bytes=edge_bytes),
    }
    problem = problem_of(Body(), words, (), {"ann": advert(10.0)}, lambda model, name: (1, 1))
    ann, bea = (whole_us(problem.models[MODEL], problem.hosts[peer]) for peer in ("ann", "bea"))
    assert bea == pytest.approx(ann, rel=0.01)


def test_the_speed_of_a_pipeline_says_nothing_about_the_one_that_offers_it() -> None:
    words = {("ann", MODEL): consent("file", parts=((15, 30),))}
    problem = problem_of(Body(), words, (), {"ann": advert(10.0)}, lambda model, name: (1, 1))
    assert problem.hosts["ann"].holdings[MODEL].decode_us_per_token == 0
