"""The model of a gateway has production's patience."""

from __future__ import annotations

import pytest

from meshnode.gateway import answer
from meshnode_simulations.models import gateway


@pytest.mark.parametrize(
    "name", ["ACCEPT_TIMEOUT_S", "RESUMES_MAX", "RESUME_WITHIN_S", "RESUME_EVERY_S"]
)
def test_the_constants_are_those_of_production(name: str) -> None:
    assert getattr(gateway, name) == getattr(answer, name)
