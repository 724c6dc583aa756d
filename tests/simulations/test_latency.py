"""Distances have the percentiles that their models claim; who stands where is nobody else's."""

from __future__ import annotations

import pytest

from meshnode_simulations.kernel.network import Latency
from meshnode_simulations.models.latency import (
    NS_PER_MS,
    Plane,
    PlanetLab,
    Regions,
    rtt_percentiles_ms,
)

MACHINES = 400
SEED = 11


@pytest.mark.parametrize(
    ("latency", "expected_ms"),
    [
        (PlanetLab(SEED), (19.3, 135.0, 324.9)),
        (Regions(SEED), (11.0, 124.0, 237.0)),
        (Plane(SEED), (46.0, 126.0, 215.0)),
    ],
    ids=["planetlab", "regions", "plane"],
)
def test_percentiles_are_those_of_the_reference(
    latency: Latency, expected_ms: tuple[float, ...]
) -> None:
    assert rtt_percentiles_ms(latency, MACHINES) == pytest.approx(expected_ms, rel=0.15)


def test_the_matrix_is_the_published_one() -> None:
    """Some figures of the source, which is rounded to 50 µs here."""
    latency = PlanetLab(SEED)
    latency._sites = list(range(PlanetLab.SITES))
    published_ms = {(0, 1): 0.175, (0, 2): 2.553, (0, 3): 121.42, (1, 3): 133.89, (1, 2): 2.571}
    for (a, b), rtt_ms in published_ms.items():
        assert 2 * latency.one_way_ns(a, b) / NS_PER_MS == pytest.approx(rtt_ms, abs=0.0255)
    assert rtt_percentiles_ms(latency, PlanetLab.SITES) == pytest.approx(
        (19.313, 135.01, 324.91), abs=0.05
    )


@pytest.mark.parametrize("model", [PlanetLab, Regions, Plane])
def test_distances_are_symmetric_and_do_not_depend_on_who_asked_first(
    model: type[PlanetLab] | type[Regions] | type[Plane],
) -> None:
    one, other = model(SEED), model(SEED)
    far_first = other.one_way_ns(99, 98)
    for a in range(100):
        for b in range(a):
            assert one.one_way_ns(a, b) == one.one_way_ns(b, a) == other.one_way_ns(a, b) > 0
    assert far_first == one.one_way_ns(98, 99)
    assert one.one_way_ns(5, 5) > 0
