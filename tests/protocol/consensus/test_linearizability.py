"""The judge of histories: right about known ones, fast enough for long ones."""

from __future__ import annotations

import random
from dataclasses import replace
from time import process_time

import pytest

from tests.protocol.consensus.linearizability import OVERLAP_MAX, Operation, is_linearizable


def claim(client: str, result: bool | None, *when: float) -> Operation:
    return Operation(client, "claim", "pen", result, *when)


def release(client: str, result: bool | None, *when: float) -> Operation:
    return Operation(client, "release", "pen", result, *when)


def owner(client: str, result: str | None, *when: float) -> Operation:
    return Operation(client, "owner", "pen", result, *when)


GOOD = {
    "nothing": [],
    "nobody holds it": [owner("ada", None, 0, 1)],
    "one after the other": [
        claim("ada", True, 0, 1),
        owner("bob", "ada", 2, 3),
        claim("bob", False, 4, 5),
        release("ada", True, 6, 7),
        claim("bob", True, 8, 9),
    ],
    "claimed again by its holder": [claim("ada", True, 0, 1), claim("ada", True, 2, 3)],
    "both at once, one wins": [claim("ada", True, 0, 5), claim("bob", False, 1, 4)],
    "read before it returned": [claim("ada", True, 0, 9), owner("bob", "ada", 1, 2)],
    "read old and new while it changes": [
        claim("ada", True, 0, 9),
        owner("bob", None, 1, 2),
        owner("bob", "ada", 3, 4),
    ],
    "never answered, and it happened": [claim("ada", None, 0), owner("bob", "ada", 5, 6)],
    "never answered, and it did not": [claim("ada", None, 0), claim("bob", True, 5, 6)],
    "never answered, and it happened late": [
        claim("ada", None, 0),
        owner("bob", None, 5, 6),
        owner("bob", "ada", 7, 8),
    ],
    "two rights": [
        claim("ada", True, 0, 1),
        replace(claim("bob", True, 2, 3), argument="ink"),
        owner("bob", "ada", 4, 5),
    ],
}
BAD = {
    "two holders": [claim("ada", True, 0, 5), claim("bob", True, 1, 4)],
    "a stale read": [claim("ada", True, 0, 1), owner("bob", None, 2, 3)],
    "forgotten": [
        claim("ada", True, 0, 1),
        owner("bob", "ada", 2, 3),
        owner("cyd", None, 4, 5),
    ],
    "back again": [
        claim("ada", True, 0, 9),
        owner("bob", "ada", 1, 2),
        owner("bob", None, 3, 4),
    ],
    "released by another": [claim("ada", True, 0, 1), release("bob", True, 2, 3)],
    "refused though it is free": [claim("ada", False, 0, 1)],
    "out of thin air": [owner("ada", "bob", 0, 1)],
    "never answered, and it came before it was asked": [
        owner("bob", "ada", 0, 1),
        claim("ada", None, 2),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_history_that_has_an_order(name: str) -> None:
    assert is_linearizable(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_a_history_that_has_none(name: str) -> None:
    assert not is_linearizable(BAD[name])


def a_history(seed: int, length: int, clients: int) -> list[Operation]:
    """Operations that each take effect at some instant between their call and return."""
    chance = random.Random(seed)
    free_at = {f"c{number}": chance.random() for number in range(clients)}
    planned = []
    for _ in range(length):
        client = min(free_at, key=lambda each: free_at[each])
        called = free_at[client]
        returned = called + chance.uniform(0.5, 1.5)
        free_at[client] = returned + chance.random() * 0.1
        kind = chance.choice(("claim", "release", "owner"))
        planned.append((chance.uniform(called, returned), client, kind, called, returned))
    holder: str | None = None
    history = []
    for _, client, kind, called, returned in sorted(planned):
        result: bool | str | None
        if kind == "claim":
            result = holder in (None, client)
            holder = client if result else holder
        elif kind == "release":
            result = holder == client
            holder = None if result else holder
        else:
            result = holder
        history.append(Operation(client, kind, "pen", result, called, returned))  # type: ignore[arg-type]
    return history


@pytest.mark.parametrize("seed", range(20))
def test_what_really_happened_one_at_a_time_is_accepted(seed: int) -> None:
    history = a_history(seed, 60, 5)
    random.Random(seed).shuffle(history)
    assert is_linearizable(history)


def test_a_wrong_answer_in_it_is_found() -> None:
    caught = 0
    for seed in range(40):
        history = a_history(seed, 40, 3)
        place = random.Random(seed).randrange(len(history))
        wrong = history[place]
        answer = (not wrong.result) if wrong.kind != "owner" else "nobody known"
        history[place] = replace(wrong, result=answer)
        caught += not is_linearizable(history)
    assert caught > 30, "now and then the other answer would do as well"


def test_two_thousand_operations_of_five_clients_take_a_moment() -> None:
    began = process_time()
    assert is_linearizable(a_history(1, 2000, 5))
    assert process_time() - began < 10.0


def test_too_wide_a_history_is_refused() -> None:
    crowd = [claim(f"c{number}", number == 0, 0, 1) for number in range(OVERLAP_MAX + 1)]
    with pytest.raises(ValueError, match="overlap"):
        is_linearizable(crowd)
