"""What stages say is compared with what was said before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshnode.engine import Delta, EngineStats, Finish, ModelCard, Request, Usage
from meshnode.errors import EngineError
from meshnode.pipeline.selftest import REMEMBERED_MAX, SelfTests

CARD = ModelCard("m", "ab" * 32, "/m.gguf", 1, "llama", "Q4_0", 1, 64)


class Says:
    """An engine that says these tokens, or none."""

    def __init__(self, *tokens: int, digest: str = CARD.digest) -> None:
        self._tokens = tokens
        self._card = ModelCard("m", digest, "/m.gguf", 1, "llama", "Q4_0", 1, 64)

    def stats(self) -> EngineStats:
        return EngineStats(self._card, "ready", 1.0, None, 64, 1, 0, 0, 64, 0.0, 0.0, 0, ())

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[AsyncIterator[Delta | Finish]]:
        async def parts() -> AsyncIterator[Delta | Finish]:
            for token in self._tokens:
                yield Delta("x", 1, (token,))
            yield Finish("length", Usage(1, 0, len(self._tokens)))

        if not self._tokens:
            raise EngineError("it died")
        yield parts()


@pytest.fixture
def tests(tmp_path: Path) -> SelfTests:
    return SelfTests(tmp_path / "cache" / "self-tests.json")


async def test_a_ring_is_compared_with_the_one_before(tests: SelfTests) -> None:
    assert await tests.run(Says(1, 2), "f16", whole=False) == "first"
    assert await tests.run(Says(1, 2), "f16", whole=False) == "as before"
    assert await tests.run(Says(1, 3), "f16", whole=False) == "differs"
    assert await tests.run(Says(1, 3), "q8_0", whole=False) == "first"
    assert await tests.run(Says(), "f16", whole=False) == "no answer"


async def test_the_whole_model_has_the_last_word(tests: SelfTests) -> None:
    assert await tests.run(Says(1, 3), "f16", whole=False) == "first"
    assert not await tests.knows(CARD.digest, "f16")
    assert await tests.run(Says(1, 2), "f16", whole=True) == "differs"
    assert await tests.knows(CARD.digest, "f16")
    assert await tests.run(Says(1, 2), "f16", whole=False) == "as the whole model"
    assert await tests.run(Says(1, 3), "f16", whole=False) == "differs"


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[]", b'{"a": 1}', b'{"a": "bc"}'])
async def test_a_damaged_file_is_a_new_one(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "self-tests.json"
    path.write_bytes(damage)
    assert await SelfTests(path).run(Says(1), "f16", whole=False) == "first"
    assert await SelfTests(path).run(Says(1), "f16", whole=False) == "as before"


async def test_the_oldest_are_forgotten(tests: SelfTests) -> None:
    for number in range(REMEMBERED_MAX + 1):
        assert await tests.run(Says(1, digest=f"{number:064x}"), "f16", whole=False) == "first"
    assert await tests.run(Says(1, digest=f"{0:064x}"), "f16", whole=False) == "first"
