"""What gateways may claim, for how long it counts, and when a replica comes or goes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.messages import MODELS_MAX, Demand
from meshnode.protocol.demand import (
    CROWDED_FOR_S,
    IDLE_FOR_S,
    LOADED_MODELS_MAX,
    LOADS_TTL_S,
    REFUSED_FLOOR_PER_S,
    SIGNER_RATE_MAX_PER_S,
    SIGNERS_MAX,
    DemandBook,
    Load,
)

TTL_S = 150.0
SLOTS = 4
MODELS = tuple(f"model-{index}" for index in range(MODELS_MAX))


def demands(rate_max_per_s: float = 1e9) -> st.SearchStrategy[tuple[Demand, ...]]:
    rate = st.floats(0.0, rate_max_per_s)
    entry = st.builds(Demand, st.sampled_from(MODELS[:5]), rate, rate)
    return st.lists(entry, max_size=5, unique_by=lambda one: one.model).map(tuple)


def total(book: DemandBook, now: float) -> float:
    return math.fsum(book.rate(model, now) for model in MODELS)


def spread(busy: int, replicas: int) -> tuple[Load, ...]:
    """`busy` requests, divided as evenly as they go among replicas of `SLOTS`."""
    return tuple(
        Load(SLOTS, busy // replicas + (index < busy % replicas)) for index in range(replicas)
    )


# --- what is claimed -----------------------------------------------------------------------------


@given(honest=st.lists(demands(1.0), max_size=4), lie=demands())
def test_one_liar_raises_the_sum_by_no_more_than_the_cap(
    honest: list[tuple[Demand, ...]], lie: tuple[Demand, ...]
) -> None:
    book = DemandBook()
    for index, demand in enumerate(honest):
        book.observe(f"gateway {index}", demand, TTL_S, 0.0)
    before = {model: book.rate(model, 0.0) for model in MODELS}
    sum_before = total(book, 0.0)
    for _ in range(3):
        book.observe("liar", lie, TTL_S, 0.0)
    assert total(book, 0.0) <= sum_before + SIGNER_RATE_MAX_PER_S * (1 + 1e-9)
    assert all(book.rate(model, 0.0) >= before[model] for model in MODELS), "nor lowers any"


@given(demands(SIGNER_RATE_MAX_PER_S / 5))
def test_an_honest_gateway_is_counted_in_full(demand: tuple[Demand, ...]) -> None:
    book = DemandBook()
    book.observe("gateway", demand, TTL_S, 0.0)
    for entry in demand:
        assert book.rate(entry.model, 0.0) == entry.requests_per_s


def test_claims_above_the_cap_shrink_alike() -> None:
    book = DemandBook()
    book.observe("liar", (Demand("a", 3e6), Demand("b", 1e6)), TTL_S, 0.0)
    assert book.rate("a", 0.0) == pytest.approx(0.75 * SIGNER_RATE_MAX_PER_S)
    assert book.rate("b", 0.0) == pytest.approx(0.25 * SIGNER_RATE_MAX_PER_S)


@given(st.permutations(range(6)))
def test_the_order_of_arrival_does_not_matter(order: list[int]) -> None:
    rates = [0.1, 0.2, 0.3, 1e-9, 7.0, 3.3]
    book = DemandBook()
    for index in order:
        book.observe(f"gateway {index}", (Demand("m", rates[index]),), TTL_S, 0.0)
    assert book.rate("m", 0.0) == math.fsum(rates)


def test_the_newest_word_replaces_the_former_and_expires_by_our_clock() -> None:
    book = DemandBook()
    book.observe("ada", (Demand("m", 1.0), Demand("n", 1.0)), 10.0, 0.0)
    book.observe("bob", (Demand("m", 2.0),), 100.0, 0.0)
    book.observe("ada", (Demand("m", 0.5),), 10.0, 5.0)
    assert book.rate("m", 5.0) == 2.5
    assert book.rate("n", 5.0) == 0.0
    assert book.deadline() == 15.0
    assert book.rate("m", 15.0) == 2.0, "also without a tick"
    book.tick(15.0)
    assert book.deadline() == 100.0
    book.tick(100.0)
    assert book.deadline() is None
    assert book.rate("m", 100.0) == 0.0


@pytest.mark.parametrize(
    ("rate", "weight"), [(0.0, 1), (1e-4, 1), (0.0014, 1), (0.0016, 2), (0.25, 250), (9.0, 9000)]
)
def test_the_weight_is_requests_per_thousand_seconds(rate: float, weight: int) -> None:
    book = DemandBook()
    book.observe("gateway", (Demand("m", rate),), TTL_S, 0.0)
    assert book.weight("m", 0.0) == weight
    assert book.weight("unheard of", 0.0) == 1


def test_signers_and_models_are_bounded_and_expired_ones_make_room() -> None:
    book = DemandBook()
    for index in range(SIGNERS_MAX + 1):
        book.observe(f"gateway {index}", (Demand("m", 0.001),), 10.0, 0.0)
    assert book.rate("m", 0.0) == pytest.approx(0.001 * SIGNERS_MAX)
    book.observe("gateway 0", (Demand("m", 1.0),), 10.0, 0.0)
    assert book.rate("m", 0.0) == pytest.approx(1.0 + 0.001 * (SIGNERS_MAX - 1))
    book.observe("late", (Demand("m", 2.0),), 10.0, 10.0)
    assert book.rate("m", 10.0) == 2.0

    for index in range(LOADED_MODELS_MAX + 1):
        book.loads(f"m{index}", (Load(1, 1),), 20.0)
    last = LOADED_MODELS_MAX
    assert book.wanted(f"m{last - 1}", 1, 20.0 + CROWDED_FOR_S) == 2
    assert book.wanted(f"m{last}", 1, 20.0 + CROWDED_FOR_S) == 1


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("busy", "replicas", "after_s", "wanted"),
    [
        (4, 1, CROWDED_FOR_S, 2),
        (4, 1, CROWDED_FOR_S - 0.1, 1),
        (40, 1, CROWDED_FOR_S, 2),  # one step, however long the queue
        (7, 2, CROWDED_FOR_S, 3),
        (6, 2, LOADS_TTL_S - 0.1, 2),  # 0.75
        (0, 1, LOADS_TTL_S - 0.1, 1),  # never below one
        (3, 1, LOADS_TTL_S - 0.1, 1),
    ],
)
def test_more_are_wanted_after_a_while_of_high_load(
    busy: int, replicas: int, after_s: float, wanted: int
) -> None:
    book = DemandBook()
    book.loads("m", spread(busy, replicas), 0.0)
    assert book.wanted("m", replicas, 0.0) == replicas
    assert book.wanted("m", replicas, after_s) == wanted
    assert book.wanted("m", replicas, after_s) == wanted, "asking changes nothing"


@pytest.mark.parametrize(("busy", "wanted"), [(0, 2), (3, 2), (4, 3)])
def test_fewer_are_wanted_after_a_long_while_of_low_load(busy: int, wanted: int) -> None:
    book = DemandBook()
    at = 0.0
    while at < IDLE_FOR_S:
        book.loads("m", spread(busy, 3), at)
        assert book.wanted("m", 3, at) == 3
        at += 50.0
    book.loads("m", spread(busy, 3), at)
    assert book.wanted("m", 3, IDLE_FOR_S) == wanted


def test_the_large_one_of_two_is_not_given_up_for_the_small_one() -> None:
    """Whichever goes, the rest must bear the load: here the small one could not."""
    book = DemandBook()
    for at in range(0, 400, 100):
        book.loads("m", (Load(16, 4), Load(1, 1)), float(at))
    assert book.wanted("m", 2, 300.0) == 2


def test_the_opinion_forms_anew_after_a_step_and_waits_for_the_new_replica() -> None:
    book = DemandBook()
    book.loads("m", spread(40, 1), 0.0)
    assert book.wanted("m", 1, CROWDED_FOR_S) == 2
    assert book.wanted("m", 2, CROWDED_FOR_S) == 2
    assert book.wanted("m", 2, 3 * CROWDED_FOR_S) == 2, "the second is still loading"
    book.loads("m", spread(40, 2), 3 * CROWDED_FOR_S)
    assert book.wanted("m", 2, 3 * CROWDED_FOR_S) == 3


def test_without_fresh_loads_nothing_changes() -> None:
    book = DemandBook()
    assert book.wanted("m", 0, 0.0) == 1
    assert book.wanted("m", 5, 0.0) == 5
    book.loads("m", spread(4, 1), 0.0)
    assert book.wanted("m", 1, LOADS_TTL_S) == 1
    book.loads("m", (), 200.0)
    assert book.wanted("m", 2, 300.0) == 2
    book.loads("m", (Load(0, 0),), 300.0)
    assert book.wanted("m", 1, 400.0) == 1


@given(
    period_s=st.floats(1.0, CROWDED_FOR_S - 1.0),
    high=st.integers(0, 60),
    low=st.integers(0, 12),
    replicas=st.integers(1, 5),
)
def test_a_load_that_swings_moves_nothing(
    period_s: float, high: int, low: int, replicas: int
) -> None:
    """Bursts shorter than `CROWDED_FOR_S` between moments of comfortable load."""
    comfortable = 2 * replicas  # a half
    book = DemandBook()
    for turn in range(int(2 * IDLE_FOR_S / period_s)):
        busy = (high, comfortable, min(low, comfortable), comfortable)[turn % 4]
        now = turn * period_s
        book.loads("m", spread(busy, replicas), now)
        assert book.wanted("m", replicas, now) == replicas


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "busy", "replicas", "wanted"),
    [
        (2 * REFUSED_FLOOR_PER_S, 3, 1, 2),
        (2 * REFUSED_FLOOR_PER_S, 5, 2, 3),
        (REFUSED_FLOOR_PER_S / 2, 3, 1, 1),
        (1e9, 2, 1, 1),
        (1e9, 4, 2, 2),
        (1e9, 0, 1, 1),
    ],
)
def test_refusals_count_if_the_load_bears_them_out(
    refused: float, busy: int, replicas: int, wanted: int
) -> None:
    book = DemandBook()
    book.loads("m", spread(busy, replicas), 0.0)
    book.observe("gateway", (Demand("m", refused, refused),), TTL_S, 0.0)
    assert book.wanted("m", replicas, CROWDED_FOR_S - 0.1) == replicas
    assert book.wanted("m", replicas, CROWDED_FOR_S) == wanted


def test_refusals_end_with_who_told_them() -> None:
    book = DemandBook()
    book.loads("m", spread(3, 1), 0.0)
    book.observe("gateway", (Demand("m", 1.0, 1.0),), CROWDED_FOR_S - 1.0, 0.0)
    book.tick(CROWDED_FOR_S - 1.0)
    book.observe("gateway", (Demand("m", 1.0, 1.0),), TTL_S, CROWDED_FOR_S)
    assert book.wanted("m", 1, CROWDED_FOR_S) == 1
    assert book.wanted("m", 1, 2 * CROWDED_FOR_S) == 2


def test_nobody_is_refused_more_often_than_it_asks() -> None:
    book = DemandBook()
    book.loads("m", spread(3, 1), 0.0)
    book.observe("liar", (Demand("m", 0.0, 1e9),), TTL_S, 0.0)
    assert book.wanted("m", 1, CROWDED_FOR_S) == 1


# --- closed loop ---------------------------------------------------------------------------------


@given(
    busy=st.integers(0, 40),
    replicas=st.integers(1, 8),
    refused=st.sampled_from([0.0, 10.0]),
)
def test_under_a_constant_load_the_number_settles_and_never_turns_back(
    busy: int, replicas: int, refused: float
) -> None:
    """Even with a gateway that always complains; each step takes effect at once."""
    book = DemandBook()
    steps: list[int] = []
    step_at = now = 0.0
    while now < step_at + 2 * IDLE_FOR_S:
        book.observe("gateway", (Demand("m", refused, refused),), TTL_S, now)
        book.loads("m", spread(busy, replicas), now)
        wanted = book.wanted("m", replicas, now)
        if wanted != replicas:
            steps.append(wanted - replicas)
            replicas, step_at = wanted, now
        assert len(steps) <= 40 / (0.6 * SLOTS), "does not settle"
        now += 10.0
    assert len(set(steps)) <= 1, "turned back"
    assert all(abs(step) == 1 for step in steps)
    utilisation = busy / (SLOTS * replicas)
    assert utilisation <= 0.8
    assert utilisation >= 0.3 or replicas == 1
