"""Files between peers: whole, in ranges, from liars and from those who die in the middle."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from meshnode.errors import FetchError
from meshnode.messages import LeavesFollow, NoLeaves, WantLeaves, decode, encode
from meshnode.models.digest import (
    LEAF_BYTES,
    HashTree,
    corners,
    digest_blocking,
    leaf_hashes,
    verify_range,
)
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame
from meshnode.weights import Fetch, Listing, PartialFile
from meshnode.weights.fetch import PASSES_MAX
from meshnode.weights.shelf import IDLE_S, STREAMS_PER_PEER_MAX
from tests.weights.givers import ANN, BEA, OWN, SIZE, Change, World, a_file

HANG_S = 300.0
"""Some of them by a mock clock, which runs ahead."""
LEAVES = 11
THREADS_S = 0.3
"""A mock clock does not see that a thread is at work."""


@pytest.fixture
async def world(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[World]:
    with trio.fail_after(HANG_S):
        yield World(nursery, tmp_path)


def a_fetch(world: World) -> Fetch:
    return Fetch(world.model, world.cache / "part.gguf", world.given)


def is_there(file: PartialFile, source: Path) -> list[int]:
    """Which leaves are as in the source; all others must be holes."""
    data, wanted = file.path.read_bytes(), source.read_bytes()
    assert len(data) == len(wanted)
    found = []
    for number in range(LEAVES):
        leaf = slice(number * LEAF_BYTES, (number + 1) * LEAF_BYTES)
        if data[leaf] == wanted[leaf]:
            found.append(number)
        else:
            assert not any(data[leaf]), "nothing unproven was ever written"
    return found


# --- from the honest --------------------------------------------------------------------------


async def test_a_whole_file(world: World, tmp_path: Path) -> None:
    world.add(ANN)
    told: list[tuple[int, int]] = []
    fetch = a_fetch(world)
    file = await fetch.bring(progress=lambda done, of: told.append((done, of)))
    assert is_there(file, world.path) == list(range(LEAVES))
    assert sorted(leaf for _, leaf in world.asked) == list(range(LEAVES)), "each once"
    assert told == sorted(told)
    assert told[-1] == (SIZE, SIZE)
    await fetch.bring()
    assert len(world.asked) == LEAVES, "what is there is not asked for again"
    file.move(tmp_path / "there" / "model.gguf")
    assert digest_blocking(tmp_path / "there" / "model.gguf", tmp_path) == world.model
    assert not list(world.cache.glob("part*"))


async def test_ranges_bring_their_leaves_and_the_corners(world: World) -> None:
    world.add(ANN)
    ranges = [(4 * LEAF_BYTES + 5, 6 * LEAF_BYTES), (6 * LEAF_BYTES, 6 * LEAF_BYTES)]
    file = await a_fetch(world).bring(ranges)
    wanted = sorted({4, 5, *corners(LEAVES)})
    assert is_there(file, world.path) == wanted
    assert sorted(leaf for _, leaf in world.asked) == wanted
    assert file.path.stat().st_blocks * 512 < (len(wanted) + 1) * LEAF_BYTES, "the rest are holes"
    assert file.held_bytes == sum(map(file.leaf_bytes, wanted))


@pytest.mark.parametrize("size_bytes", [1, LEAF_BYTES, LEAF_BYTES + 1])
async def test_small_files(world: World, size_bytes: int) -> None:
    a_file(world.path, size_bytes)
    world.model = digest_blocking(world.path, world.cache)
    world.add(ANN)
    file = await a_fetch(world).bring()
    assert file.path.read_bytes() == world.path.read_bytes()


async def test_a_later_run_goes_on_and_mends_what_the_disk_lost(world: World) -> None:
    world.add(ANN)
    file = await a_fetch(world).bring([(0, 6 * LEAF_BYTES)])
    with file.path.open("r+b") as damaged:
        damaged.seek(3 * LEAF_BYTES + 1)
        damaged.write(b"!")
    world.asked.clear()
    file = await a_fetch(world).bring()
    assert is_there(file, world.path) == list(range(LEAVES))
    held = {*range(6), *corners(LEAVES)} - {3}
    assert sorted(leaf for _, leaf in world.asked) == sorted(set(range(LEAVES)) - held)


@pytest.mark.parametrize("damage", [b"", b"x" * 32, bytes(LEAVES * 32)])
async def test_notes_that_are_damaged_are_begun_anew(world: World, damage: bytes) -> None:
    world.add(ANN)
    await a_fetch(world).bring([])
    (world.cache / "part.gguf.leaves").write_bytes(damage)
    file = await a_fetch(world).bring()
    assert is_there(file, world.path) == list(range(LEAVES))


# --- from others ------------------------------------------------------------------------------


def on_leaf(change: Change) -> Change:
    """Only what comes after the first batch: the size has been proven by then, or is being."""
    answers = 0

    def changed(number: int, frame: bytes) -> bytes:
        nonlocal answers
        answers += number == 0
        return change(number, frame) if answers > 1 else frame

    return changed


def header(**fields: object) -> Change:
    def change(number: int, frame: bytes) -> bytes:
        if number:
            return frame
        said = msgspec.structs.replace(decode(frame, LeavesFollow), **fields)
        return encode(said)

    return change


def leaf(change: Change) -> Change:
    return lambda number, frame: change(number, frame) if number else frame


LIES: dict[str, Change] = {
    "other bytes": leaf(lambda _, frame: frame[:-1] + b"!"),
    "a short leaf": leaf(lambda _, frame: frame[:-1]),
    "an empty leaf": leaf(lambda _, frame: b""),
    "a long leaf": leaf(lambda _, frame: frame + b"!"),
    "no proof": header(proof=()),
    "another proof": header(proof=(bytes(32),) * 3),
    "a longer proof": lambda number, frame: (
        frame
        if number
        else encode(LeavesFollow(SIZE, (*decode(frame, LeavesFollow).proof, bytes(32))))
    ),
    "one byte more": header(size_bytes=SIZE + 1),
    "one byte less": header(size_bytes=SIZE - 1),
    "one leaf more": header(size_bytes=SIZE + LEAF_BYTES),
    "far too large": header(size_bytes=2**45),
    "as if it were one leaf": header(size_bytes=LEAF_BYTES, proof=()),
    "no message": lambda number, frame: b"\xff\xff",
    "another message": lambda number, frame: (
        frame if number else encode(WantLeaves("ab" * 32, 0, 1))
    ),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_liar_costs_a_batch_and_its_connection(
    world: World, lie: str, at_once: bool
) -> None:
    world.add(ANN, world.liar(LIES[lie] if at_once else on_leaf(LIES[lie])))
    world.add(BEA)
    file = await a_fetch(world).bring()
    assert is_there(file, world.path) == list(range(LEAVES))
    assert world.dropped == [ANN]


async def test_sizes_that_the_first_leaf_allows_are_not_believed(world: World) -> None:
    """A liar who has the file, and proves the leaves' places in a tree of another size."""
    tree = HashTree(leaf_hashes(world.path))
    for claimed in set(range(9, 17)) - {LEAVES}:
        lie = header(size_bytes=(claimed - 1) * LEAF_BYTES + 12_345)
        first = HashTree(tree.leaves).range_proof(0, 1)
        with world.path.open("rb") as file:
            data = [file.read(LEAF_BYTES)]
        if not verify_range(tree.root, claimed, 0, data, first):
            continue
        world.peers.clear()
        world.add(ANN, world.liar(lie))
        with pytest.raises(FetchError):
            await a_fetch(world).bring([])
        assert world.dropped.pop() == ANN
        assert not (world.cache / "part.gguf").exists()


async def test_without_an_honest_peer_nothing_is_kept(world: World) -> None:
    world.add(ANN, world.liar(LIES["other bytes"]))
    with pytest.raises(FetchError, match=rf"…{ANN[-8:]}: leaves that the model's digest does not"):
        await a_fetch(world).bring()
    assert world.dropped == [ANN], "and it is asked no more"
    assert not list(world.cache.glob("part*"))


async def test_nobody_has_it(world: World, autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = THREADS_S
    with pytest.raises(FetchError, match="no node that is here has the file"):
        await a_fetch(world).bring()
    world.add(ANN, world.shelf(is_open=False).serve)
    asks = a_fetch(world)
    with pytest.raises(FetchError, match="it does not share its models"):
        await asks.bring()
    assert len(world.asked) == PASSES_MAX
    assert not world.dropped


@pytest.mark.parametrize("frames", [0, 1, 4])
async def test_who_stalls_is_left(world: World, autojump_clock: MockClock, frames: int) -> None:
    """Before its first word, between two leaves, in the middle of one."""
    autojump_clock.autojump_threshold = THREADS_S
    said = 0

    async def stall(stream: Stream) -> None:
        async def send_some(data: bytes) -> None:
            nonlocal said
            said += 1
            if said > frames:
                await honest(data[: len(data) // 2])
                await trio.sleep_forever()
            await honest(data)

        honest, stream.send_all = stream.send_all, send_some  # type: ignore[method-assign,assignment]
        with trio.move_on_after(10 * IDLE_S):
            await world.shelf().serve(stream)

    world.add(ANN, stall)
    world.add(BEA)
    file = await a_fetch(world).bring()
    assert is_there(file, world.path) == list(range(LEAVES))
    assert not world.dropped, "slow is no lie"


async def test_the_next_goes_on_where_one_has_died(world: World) -> None:
    async def dies(stream: Stream) -> None:
        left = 6

        async def send_some(data: bytes) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise trio.BrokenResourceError
            await honest(data)

        honest, stream.send_all = stream.send_all, send_some  # type: ignore[method-assign,assignment]
        await world.shelf().serve(stream)

    world.add(ANN, dies)
    world.add(BEA)
    file = await a_fetch(world).bring()
    assert is_there(file, world.path) == list(range(LEAVES))
    proven = set(corners(LEAVES))  # of two frames each, so they were the first six
    assert {leaf for peer, leaf in world.asked if peer == BEA} == set(range(LEAVES)) - proven


async def test_whoever_brings_something_is_asked_again(
    world: World, autojump_clock: MockClock
) -> None:
    """A line that breaks after each leaf or two: more often than one tries in vain."""
    autojump_clock.autojump_threshold = THREADS_S
    streams = 0

    async def breaks(stream: Stream) -> None:
        nonlocal streams
        streams += 1
        left = 6 if streams == 1 else 2

        async def send_some(data: bytes) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise trio.BrokenResourceError
            await honest(data)

        honest, stream.send_all = stream.send_all, send_some  # type: ignore[method-assign,assignment]
        await world.shelf().serve(stream)

    world.add(ANN, breaks)
    file = await a_fetch(world).bring(
        [(n * LEAF_BYTES, n * LEAF_BYTES + 1) for n in range(1, LEAVES, 2)]
    )
    assert streams > PASSES_MAX
    assert set(is_there(file, world.path)) == {1, 3, 5, 7, 9, *corners(LEAVES)}


# --- the shelf --------------------------------------------------------------------------------


async def ask(stream: Stream, *want: object) -> LeavesFollow | NoLeaves | None:
    await send_frame(stream, encode(WantLeaves(*want)))  # type: ignore[arg-type]
    frame = await receive_frame(stream, 4096)
    return None if frame is None else decode(frame, LeavesFollow | NoLeaves)  # type: ignore[arg-type]


async def test_what_is_not_there_is_refused_in_words(world: World) -> None:
    world.add(ANN)
    stream = world.stream_to(ANN)
    assert await ask(stream, "ab" * 32, 0, 1) == NoLeaves("it does not have the file")
    assert await ask(stream, world.model, 10, 2) == NoLeaves("there are 11 leaves")
    answer = await ask(stream, world.model, 10, 1)
    assert isinstance(answer, LeavesFollow)
    assert len(await receive_frame(stream, LEAF_BYTES) or b"") == SIZE % LEAF_BYTES
    await stream.send_eof()
    assert await receive_frame(stream, 1) is None
    assert not world.dropped


async def test_a_request_that_no_honest_peer_sends_ends_the_connection(world: World) -> None:
    for bad in (b"", b"\xc1", b"x" * 257, encode(NoLeaves("?"))):
        world.dropped.clear()
        world.add(ANN)
        stream = world.stream_to(ANN)
        await send_frame(stream, bad)
        assert await stream.receive_some() == b""
        assert world.dropped == [OWN]


async def test_a_file_that_changes_is_not_given(world: World) -> None:
    world.add(ANN)
    stream = world.stream_to(ANN)
    with world.path.open("r+b") as file:
        file.write(b"!")
    assert isinstance(await ask(stream, world.model, 0, 1), LeavesFollow)
    assert await stream.receive_some() == b""
    assert not world.dropped, "nobody is to blame but our disk"


async def test_few_streams_at_once(world: World) -> None:
    world.peers[ANN] = world.shelf().serve
    streams = []
    for _ in range(STREAMS_PER_PEER_MAX + 1):
        streams.append(world.stream_to(ANN))
        await trio.testing.wait_all_tasks_blocked()
    answer = await ask(streams[-1], world.model, 0, 1)
    assert answer == NoLeaves("too many ask at once")
    await streams[0].aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert isinstance(await ask(world.stream_to(ANN), world.model, 0, 1), LeavesFollow)


async def test_who_does_not_take_what_it_asked_for_is_let_go(
    world: World, autojump_clock: MockClock
) -> None:
    """And no leaf is read before there is room for it."""
    autojump_clock.autojump_threshold = THREADS_S
    waiting: list[int] = []

    async def full(data: bytes) -> None:
        waiting.append(len(data))
        if len(data) > LEAF_BYTES:
            await trio.sleep_forever()

    async def serve(stream: Stream) -> None:
        stream.send_all = full  # type: ignore[method-assign,assignment]
        await world.shelf().serve(stream)

    world.add(ANN, serve)
    stream = world.stream_to(ANN)
    begun = trio.current_time()
    await send_frame(stream, encode(WantLeaves(world.model, 0, 8)))
    assert await stream.receive_some() == b""
    assert IDLE_S <= trio.current_time() - begun < 2 * IDLE_S
    assert [length for length in waiting if length > LEAF_BYTES] == [LEAF_BYTES + 4]
    assert not world.dropped


async def test_who_asks_nothing_more_is_let_go(world: World, autojump_clock: MockClock) -> None:
    world.add(ANN)
    stream = world.stream_to(ANN)
    begun = trio.current_time()
    assert await stream.receive_some() == b""
    assert trio.current_time() - begun == pytest.approx(IDLE_S)


# --- who has what -----------------------------------------------------------------------------


async def test_members_say_what_they_give(world: World, autojump_clock: MockClock) -> None:
    async def nonsense(stream: Stream) -> None:
        await send_frame(stream, encode(LeavesFollow(1, ())))

    async def silence(stream: Stream) -> None:
        await trio.sleep_forever()

    world.add(ANN)
    listing = Listing(lambda: tuple(world.peers), world.given.open_stream)
    await listing.look()
    assert listing.names() == {world.model: "smol"}
    assert listing.holders(world.model) == {ANN}
    for handler in (world.shelf(is_open=False).serve, nonsense, silence):
        world.add(ANN, handler)
        await listing.look()
        assert not listing.names()
        assert not listing.holders(world.model)
