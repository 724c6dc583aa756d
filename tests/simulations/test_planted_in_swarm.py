"""The seed swarm finds bugs that were planted in the cores, and none where there are none.

The short one takes the bugs that a few seeds find; `make soak` counts the seeds for all of them and
prints the table. Seen so far beyond the short one: `persist after send` at seed 5 of `storm` (S10),
`fresh block` at seed 10 (L1).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest

from meshnode_simulations.scenario import Scenario
from tests.simulations.planted import PLANTS, forgers, hunt, liars, storm, usurpers

SHORT: tuple[tuple[str, Callable[[], Scenario], int, str], ...] = (
    ("quorum-1", storm, 1, "S2"),
    ("no persist", storm, 2, "S3"),
    ("votes not restored", storm, 2, "S10"),
    ("nullify lock forgotten", storm, 2, "S10"),
    ("finalize lock forgotten", storm, 2, "S10"),
    ("old voters", storm, 2, "S9"),
    ("head goes back", storm, 2, "S9"),
    ("heads not kept", storm, 2, "S3"),
    ("spin", storm, 2, "spin"),
    ("epoch ignored", storm, 4, "S6"),
    ("stampede", storm, 2, "L3"),
    ("memory is no object", storm, 2, "S8"),
    ("waits for the dead", storm, 2, "L1"),
    ("second vote", liars, 4, "S10"),
    ("unsigned votes", forgers, 4, "S2"),
    ("duplicate ballots", forgers, 4, "S2"),
    ("two voters at once", usurpers, 4, "S9"),
)
"""The bug, where it is looked for, within how many seeds, and which promise breaks."""
NOT_FOUND = {
    "no justification": "a liar leaves it out, but no block that it would be for loses another one",
    "no memory": "the voters that remember are always enough",
    "said once": "connections lose nothing, and what breaks is said anew to whoever connects",
    "drains at once": "nothing here asks that somebody serves at every instant of a drain",
}
"""Not within a dozen seeds; and why, as far as is known. All have their own tests elsewhere."""
SOAK_SEEDS = 40


@pytest.mark.parametrize(("name", "where", "seeds", "promise"), SHORT, ids=lambda each: str(each))
def test_a_few_seeds_find_it(
    name: str, where: Callable[[], Scenario], seeds: int, promise: str
) -> None:
    found = hunt(PLANTS[name], where(), range(1, seeds + 1))
    assert found is not None
    assert found.promise == promise


@pytest.mark.parametrize("where", [storm, liars, forgers])
def test_nothing_is_found_where_nothing_is_wrong(where: Callable[[], Scenario]) -> None:
    assert hunt(nullcontext, where(), range(1, 3)) is None


@pytest.mark.soak
@pytest.mark.parametrize("name", PLANTS)
def test_seeds_needed(name: str) -> None:
    """A row of the table: bug, promise, seed, scenario."""
    rows = []
    for where in (storm, liars, forgers, usurpers):
        found = hunt(PLANTS[name], where(), range(1, SOAK_SEEDS + 1))
        if found is not None:
            rows.append(f"{name} | {found.promise} | {found.seed} | {where.__name__}")
            break
    print(*rows)
    assert rows or name in NOT_FOUND
