"""Each planted bug is caught by the check that the table names, which passes without it."""

from __future__ import annotations

import importlib

import pytest

from tests.protocol.consensus.parts import Violation
from tests.protocol.consensus.planted import ELSEWHERE, PLANTED, Planted

CHECKS = tuple({each.caught_by.__name__: each.caught_by for each in PLANTED}.values())


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Planted) -> None:
    with bug.plant(), pytest.raises(Violation):
        bug.caught_by()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_without_a_bug_the_check_passes(check: object) -> None:
    assert callable(check)
    check()


@pytest.mark.parametrize("bug", ELSEWHERE)
def test_a_bug_listed_elsewhere_is_there(bug: str) -> None:
    file, test = ELSEWHERE[bug].split("::")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    assert callable(getattr(module, test))
    assert hasattr(module, bug)
