"""Files that somebody asks this node to bring: where they go, and until when it tries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from meshnode.console.fetches import KEPT_S, Fetches
from meshnode.console.requests import FetchReport, FetchRequest
from meshnode.errors import ConfigError, FetchError
from meshnode.transport import Stream
from meshnode.weights import File
from tests.weights.givers import ANN, SIZE, World

HANG_S = 300.0
"""Some of them by a mock clock, which runs ahead."""
THREADS_S = 0.3
"""A mock clock does not see that a thread is at work."""
REQUEST = FetchRequest("smol")


@pytest.fixture
async def world(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[World]:
    with trio.fail_after(HANG_S):
        yield World(nursery, tmp_path)


@pytest.fixture
def fetches(world: World, tmp_path: Path, nursery: trio.Nursery) -> Fetches:
    made = Fetches(tmp_path, world.given, world.find, dict)
    nursery.start_soon(made.run)
    return made


async def bring(fetches: Fetches, request: FetchRequest = REQUEST) -> FetchReport:
    while (report := await fetches.ask(request)).state != "done":
        assert report.path == ""
        await trio.sleep(0.01)
    return report


async def test_a_file_gets_its_place_among_the_models(
    world: World, fetches: Fetches, tmp_path: Path
) -> None:
    world.add(ANN)
    first = await fetches.ask(REQUEST)
    assert (first.state, first.done_bytes) == ("fetching", 0)
    path = tmp_path / "models" / "smol.gguf"
    done = FetchReport(world.model, "smol", "done", SIZE, SIZE, str(path))
    assert await bring(fetches) == done
    assert path.read_bytes() == world.path.read_bytes()
    again = await bring(fetches, FetchRequest(world.model[:8]))
    assert again.path == str(path), "nothing is brought twice"
    assert len(world.asked) == 11


async def test_what_cannot_be_asked_for(world: World, tmp_path: Path) -> None:
    async def find(text: str) -> tuple[str, str]:
        return (await world.find("smol"))[0], text

    files = {world.model: File("smol", world.path)}
    here = Fetches(tmp_path, world.given, world.find, lambda: files)
    with pytest.raises(ConfigError, match="this node has smol already: "):
        await here.ask(REQUEST)
    fetches = Fetches(tmp_path, world.given, find, dict)
    with pytest.raises(ConfigError, match="nothing without its receipt"):
        await fetches.ask(FetchRequest("big~8of32"))


async def test_another_file_of_the_name_stays(
    world: World, fetches: Fetches, tmp_path: Path
) -> None:
    world.add(ANN)
    path = tmp_path / "models" / "smol.gguf"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is there already, and another file"):
        await bring(fetches)
    assert path.read_bytes() == b"mine"


async def test_a_failure_is_told_once_and_can_be_tried_again(
    world: World, fetches: Fetches
) -> None:
    with pytest.raises(FetchError, match="no node that is here"):
        await bring(fetches)
    world.add(ANN)
    assert (await bring(fetches)).state == "done"


async def test_when_nobody_asks_any_more_it_stops_and_goes_on_later(
    world: World, fetches: Fetches, autojump_clock: MockClock
) -> None:
    autojump_clock.autojump_threshold = THREADS_S
    is_cut = True

    async def hangs_in_the_middle(stream: Stream) -> None:
        sent = 0

        async def send_some(data: bytes) -> None:
            nonlocal sent
            sent += 1
            if is_cut and sent > 10:
                await trio.sleep_forever()
            await honest(data)

        honest, stream.send_all = stream.send_all, send_some  # type: ignore[method-assign,assignment]
        await world.shelf().serve(stream)

    world.add(ANN, hangs_in_the_middle)
    await fetches.ask(REQUEST)
    await trio.sleep(KEPT_S + 1)
    first = {leaf for _, leaf in world.asked}
    is_cut = False
    world.asked.clear()
    await bring(fetches)
    second = {leaf for _, leaf in world.asked}
    assert first | second == set(range(11))
    assert 0 not in second, "what was there is there"
