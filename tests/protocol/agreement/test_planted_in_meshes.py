"""Each bug planted in the wiring is caught by the check that the table names."""

from __future__ import annotations

import pytest

from tests.protocol.agreement.planted import PLANTED
from tests.protocol.consensus.parts import Violation
from tests.protocol.consensus.planted import Planted


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Planted) -> None:
    bug.caught_by()
    with bug.plant(), pytest.raises(Violation):
        bug.caught_by()
