"""Big transfers share links max-min fairly, lose no byte, and end when a hand calculation says."""

from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode_simulations.kernel.loop import NS_PER_S, Loop
from meshnode_simulations.models.transfers import Transfers

MB = 1_000_000


def ends_of(loop: Loop, ends: dict[str, tuple[float, bool]], name: str, is_whole: bool) -> None:
    ends[name] = (loop.now_s, is_whole)


def test_three_flows_by_hand() -> None:
    """0 sends at 10 to 1 and 2; 3 sends at 100 to 2, which takes 12.

    Shares: 0's link grants 5 each; 2 has 7 left for 3. When 0→1 is through (50 MB at 5: 10 s),
    2's link is the tightest and grants 6 each: 0→2 has 10 MB left, 3→2 80. 0→2 ends 10/6 s later;
    3→2 has 70 left and gets all 12: 70/12 s more.
    """
    loop, ends = Loop(), {}
    transfers = Transfers(loop)
    transfers.attach(0, 10 * MB, math.inf)
    transfers.attach(2, math.inf, 12 * MB)
    transfers.attach(3, 100 * MB, math.inf)
    end = partial(ends_of, loop, ends)
    transfers.start(0, 1, 50 * MB, partial(end, "0→1"))
    transfers.start(0, 2, 60 * MB, partial(end, "0→2"))
    transfers.start(3, 2, 150 * MB, partial(end, "3→2"))
    assert [flow.rate_bytes_per_s / MB for flow in transfers.flows()] == pytest.approx([5, 5, 7])
    loop.run(60 * NS_PER_S)
    assert {name: end_s for name, (end_s, _) in ends.items()} == pytest.approx(
        {"0→1": 10.0, "0→2": 10 + 10 / 6, "3→2": 10 + 10 / 6 + 70 / 12}
    )
    assert all(is_whole for _, is_whole in ends.values())


def test_who_is_gone_ends_its_flows_and_frees_the_links_of_others() -> None:
    loop, ends = Loop(), {}
    transfers = Transfers(loop)
    for machine in range(3):
        transfers.attach(machine, 10 * MB, 10 * MB)
    end = partial(ends_of, loop, ends)
    transfers.start(0, 1, 100 * MB, partial(end, "0→1"))
    transfers.start(0, 2, 100 * MB, partial(end, "0→2"))
    loop.at(4 * NS_PER_S, transfers.break_off, 1)
    loop.run(60 * NS_PER_S)
    assert ends == {"0→1": (4.0, False), "0→2": (pytest.approx(4 + 80 / 10), True)}


def test_nothing_holds_up_what_has_no_link() -> None:
    loop, ends = Loop(), {}
    transfers = Transfers(loop)
    transfers.start(0, 1, 100 * MB, partial(ends_of, loop, ends, "0→1"))
    loop.run(NS_PER_S)
    assert ends == {"0→1": (0.0, True)}


RATES = st.integers(1, 1000).map(lambda rate: rate * MB / 10)


@settings(max_examples=60, deadline=None)
@given(
    links=st.lists(st.tuples(RATES, RATES), min_size=2, max_size=5),
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12),
)
def test_rates_are_max_min_fair(
    links: list[tuple[float, float]], pairs: list[tuple[int, int]]
) -> None:
    """No link carries more than it can, and every flow has a full link on which nobody has more
    (Bertsekas and Gallager's condition, which only the max-min fair rates meet)."""
    transfers = Transfers(Loop())
    for machine, (up, down) in enumerate(links):
        transfers.attach(machine, up, down)
    for source, target in pairs:
        transfers.start(source % len(links), target % len(links), 10 * MB, lambda is_whole: None)
    flows = transfers.flows()
    carried: dict[tuple[str, int], list[float]] = {}
    for flow in flows:
        carried.setdefault(("up", flow.source), []).append(flow.rate_bytes_per_s)
        carried.setdefault(("down", flow.target), []).append(flow.rate_bytes_per_s)
    capacities = {("up", m): up for m, (up, _) in enumerate(links)}
    capacities |= {("down", m): down for m, (_, down) in enumerate(links)}
    for link, rates in carried.items():
        assert sum(rates) <= capacities[link] * (1 + 1e-9)
    for flow in flows:
        assert any(
            sum(carried[link]) >= capacities[link] * (1 - 1e-9)
            and flow.rate_bytes_per_s >= max(carried[link]) * (1 - 1e-9)
            for link in (("up", flow.source), ("down", flow.target))
        )


@settings(max_examples=30, deadline=None)
@given(
    flows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 50), st.integers(0, 20)),
        min_size=1,
        max_size=10,
    )
)
def test_no_byte_is_lost_or_made(flows: list[tuple[int, int, int, int]]) -> None:
    """All of 10 MB/s links: a transfer takes at least its size over the rate, everything ends, and
    the busiest link is never faster than its rate."""
    loop, ends = Loop(), {}
    transfers = Transfers(loop)
    for machine in range(4):
        transfers.attach(machine, 10 * MB, 10 * MB)
    sent: dict[int, int] = {}
    for number, (source, target, megabytes, at_s) in enumerate(flows):
        sent[source] = sent.get(source, 0) + megabytes
        end = partial(ends_of, loop, ends, str(number))
        loop.at(at_s * NS_PER_S, transfers.start, source, target, megabytes * MB, end)
    loop.run(1000 * NS_PER_S)
    assert not transfers.flows()
    for number, (_, _, megabytes, at_s) in enumerate(flows):
        assert ends[str(number)][0] - at_s >= megabytes / 10 - 1e-6
    last_s = max(end_s for end_s, _ in ends.values())
    assert last_s <= max(at_s for *_, at_s in flows) + sum(m for _, _, m, _ in flows) / 10 + 1e-6
    first_s = min(at_s for *_, at_s in flows)
    assert last_s - first_s >= max(sent.values()) / 10 - 1e-6 or len(sent) > 1
