"""Trials that succeed, fail, crash, loop and eat memory; this process sees none of it."""

from __future__ import annotations

import ctypes
import os

import pytest

from meshnode.engine.trial import MEMORY_BYTES_MAX, survives


def crash() -> bool:
    return bool(ctypes.string_at(0))


def loop() -> bool:
    while True:
        pass


def hog() -> bool:
    return bool(bytearray(2 * MEMORY_BYTES_MAX))


def raise_error() -> bool:
    raise ValueError


def test_what_works_survives(capfd: pytest.CaptureFixture[str]) -> None:
    assert survives(lambda: os.write(2, b"a client's words") > 0)
    assert not survives(lambda: False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("attempt", [crash, os.abort, loop, hog, raise_error])
def test_what_does_not_is_gone(attempt) -> None:  # type: ignore[no-untyped-def]
    assert not survives(attempt)
