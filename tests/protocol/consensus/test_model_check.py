"""The registers themselves, in every order: what the checker explores, and that it can fail."""

from __future__ import annotations

import pytest

from tests.protocol.consensus.checker import Checker, Model
from tests.protocol.consensus.parts import Violation
from tests.protocol.consensus.planted import AGREES, quorum_minus_one
from tests.protocol.consensus.test_transcripts import transcript


def test_three_voters_two_views_and_a_crash() -> None:
    """All of it: every delivery order, loss and timeout, and one crash of anybody anywhere."""
    explored = Checker(Model()).run()
    print(explored)
    assert explored.is_complete
    assert explored.states > 300_000, "a model that got this small has lost something"


def test_four_voters_and_a_leader_that_lies() -> None:
    """As far as there is time for; `test_four_voters_and_a_liar_thoroughly` goes to the end."""
    explored = Checker(Model("byzantine", 4, crashes=0, liar="ada", states_max=60_000)).run()
    print(explored)
    assert explored.states >= 60_000


def test_a_quorum_that_is_too_small_is_found_and_the_story_told() -> None:
    model = Model("byzantine", 4, crashes=0, liar="ada", check=AGREES)
    with quorum_minus_one(), pytest.raises(Violation) as found:
        Checker(model).run()
    told = f"# The shortest way to two blocks, if two of four were a quorum.\n{found.value}\n"
    assert told == transcript("quorum_too_small", told)


@pytest.mark.soak
@pytest.mark.parametrize("liar", ["ada", "bob", "dan"])
def test_four_voters_and_a_liar_thoroughly(liar: str) -> None:
    explored = Checker(Model("byzantine", 4, crashes=0, liar=liar)).run()
    print(explored)
    assert explored.is_complete


@pytest.mark.soak
def test_three_voters_with_all_that_is_said_and_a_last_view_that_ends() -> None:
    explored = Checker(Model(resends=True, last_view_ends=True, crashes=0)).run()
    print(explored)
    assert explored.is_complete


@pytest.mark.soak
def test_three_voters_and_two_crashes() -> None:
    explored = Checker(Model(crashes=2)).run()
    print(explored)
    assert explored.is_complete
