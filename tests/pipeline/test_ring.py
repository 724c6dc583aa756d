"""A ring opens, carries steps in order, ends everywhere at once, and opens again."""

from __future__ import annotations

import pytest
import trio
from msgspec.structs import replace

from meshnode.engine.stages.steps import step_bytes_max
from meshnode.messages import MESSAGE_BYTES_MAX, NotOpened, decode, encode
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame
from tests.pipeline.rings import ANN, BEA, CAT, DAN, EVE, HANG_S, WIDTH, Adder, world

THREE = ((ANN, 0, 3), (BEA, 3, 7), (CAT, 7, 9))
TWO = ((ANN, 0, 3), (CAT, 3, 9))


async def test_a_token_goes_through_all_stages_in_order() -> None:
    async with world(*THREE) as (_, head):
        opening = await head.wait_open()
        assert opening.owners == (ANN, BEA, CAT)
        await head.ask(head.step(5, 6))
        await head.ask(head.step(7))  # before the first is back
        assert await head.answer() == [8.0, 9.0]
        assert await head.answer() == [10.0]


async def test_a_dead_stage_ends_the_ring_and_the_next_decision_opens_another() -> None:
    async with world(*THREE) as (mesh, head):
        first = await head.wait_open()
        await mesh.die(BEA)
        assert await head.wait_closed()
        mesh.decide(2, (ANN, 0, 3), (DAN, 3, 7), (CAT, 7, 9))
        mesh.stages[DAN, 3, 7] = Adder(3)
        second = await head.wait_open()
        assert second.pipeline != first.pipeline
        assert (second.epoch, second.owners) == (2, (ANN, DAN, CAT))
        await head.ask(head.step(5))
        assert await head.answer() == [8.0]
        assert not mesh.dropped, "to die is no lie"


async def test_an_engine_that_dies_ends_the_ring_too() -> None:
    async with world(*THREE) as (mesh, head):
        await head.wait_open()
        mesh.stages[BEA, 3, 7].is_dead = True
        await head.ask(head.step(5))
        await head.wait_closed()


async def test_nothing_opens_before_all_parts_are_loaded() -> None:
    async with world(*TWO) as (mesh, head):
        await head.wait_open()
        mesh.decide(2, *TWO, state="loading")
        assert await head.wait_closed() == "the mesh has decided otherwise"
        mesh.decide(3, *TWO)
        await head.wait_open()


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 7},
        {"pipeline": bytes(16)},
        {"number": 5},
        {"tokens": b"\x00" * 400},
        {"tokens": b"\xff\xff\xff\x7f"},
        {"positions": b"\xff\xff\xff\xff"},
        {"slots": b"\xff\xff"},
    ],
)
async def test_a_step_that_must_not_be_costs_its_sender_the_connection(
    change: dict[str, object],
) -> None:
    async with world(*THREE) as (mesh, head):
        await head.wait_open()
        await head.ask(head.step(5, **change))
        await head.wait_closed()
        assert mesh.dropped == [(ANN, CAT)]
        await head.wait_open()  # an honest one may come again
        await head.ask(head.step(5))
        assert await head.answer() == [8.0]


async def test_rows_with_a_wrong_size_are_refused_by_the_next_stage() -> None:
    async with world(*THREE) as (mesh, head):
        await head.wait_open()
        mesh.stages[ANN, 0, 3].spoil = lambda frame: frame[:-3]
        await head.ask(head.step(5))
        await head.wait_closed()
        assert (BEA, ANN) in mesh.dropped


async def test_a_frame_larger_than_any_step_is_not_even_read() -> None:
    async with world(*TWO) as (mesh, head):
        await head.wait_open()
        await head.ask(bytes(step_bytes_max(WIDTH) + 1))
        await head.wait_closed()
        assert mesh.dropped == [(ANN, CAT)]


async def test_who_is_not_the_owner_before_is_refused() -> None:
    async with world(*THREE) as (mesh, head):
        opening = await head.wait_open()
        for sender, place in ((EVE, 0), (ANN, 0), (CAT, 1), (EVE, 2)):
            stream = await mesh.open_as(sender, opening.owners[place])
            await send_frame(stream, encode(replace(opening, place=place)))
            with trio.fail_after(HANG_S):
                frame = await receive_frame(stream, MESSAGE_BYTES_MAX)
            answer = decode(frame or b"", NotOpened)
            assert answer.reason == "not from the owner before it"
        assert head.opening is opening, "the ring goes on"


async def test_nobody_can_close_a_ring_that_the_head_has_not_formed() -> None:
    async with world(*THREE) as (mesh, head):
        opening = await head.wait_open()
        stream = await mesh.open_as(BEA, CAT)
        await send_frame(stream, encode(replace(opening, place=2, pipeline=bytes(16))))
        with trio.fail_after(HANG_S):
            frame = await receive_frame(stream, MESSAGE_BYTES_MAX)
        assert "no ring of this name" in decode(frame or b"", NotOpened).reason


@pytest.mark.parametrize("rubbish", [b"", b"\xc1", b"\x81\xa4type\xa5Hello", bytes(1000)])
async def test_rubbish_instead_of_an_opening_is_dropped(rubbish: bytes) -> None:
    async with world(*TWO) as (mesh, head):
        await head.wait_open()
        stream = await mesh.open_as(EVE, ANN)
        await send_frame(stream, rubbish)
        with trio.fail_after(HANG_S):
            assert await receive_frame(stream, MESSAGE_BYTES_MAX) is None
        assert mesh.dropped == [(ANN, EVE)]


async def test_another_context_is_refused_with_what_to_do() -> None:
    async with world(*TWO) as (mesh, head):
        await head.wait_open()
        mesh.stages[ANN, 0, 3] = Adder(0, context_tokens=32)
        await mesh.die(ANN)
        mesh.gone.clear()
        assert "--context" in await head.wait_closed(2)


async def test_a_later_ring_takes_the_stage_over_from_one_that_hangs() -> None:
    async with world(*TWO) as (mesh, head):
        first = await head.wait_open()
        assert mesh.stages[ANN, 0, 3].opening == first
        stream = await mesh.open_as(CAT, ANN)
        await send_frame(stream, encode(replace(first, pipeline=b"another ring....")))
        await head.wait_closed()
        second = await head.wait_open()
        assert second.pipeline != first.pipeline


async def test_who_answers_a_step_is_hung_up_on_and_not_who_sent_it() -> None:
    async with world(*THREE) as (mesh, head):
        await head.wait_open()
        theirs = next(
            theirs for one, other, _, theirs in mesh.streams if (one, other) == (ANN, BEA)
        )
        await theirs.send_all(b"!")
        await head.wait_closed()
        assert mesh.dropped == [(ANN, BEA)]


async def test_who_gives_no_legal_answer_to_an_opening_is_hung_up_on() -> None:
    async with world(*THREE) as (mesh, head):
        await head.wait_open()

        async def rubbish(stream: Stream) -> None:
            await send_frame(stream, b"\xc1")

        mesh.rings[BEA].serve = rubbish  # type: ignore[method-assign]
        closed = len(head.reasons)
        await mesh.die(BEA)
        mesh.gone.clear()
        await head.wait_closed(closed + 2)
        assert set(mesh.dropped) == {(ANN, BEA)}
