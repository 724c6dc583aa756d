"""A replica lost mid-answer: another goes on, and the client sees one answer."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine import Continuation, Delta
from meshnode.errors import RemoteProtocolError, RequestError
from meshnode.gateway import Candidate
from meshnode.gateway import answer as answer_module
from meshnode.gateway.resume import (
    HELD_BYTES_MAX,
    OPENING_NOTE,
    Progress,
    join_continuation,
    note,
    split_continuation,
)
from tests.fakes import DIGEST, MODEL, WordEngine, tunnel_to
from tests.gateway.link import HANG_S, Link, text_of

WORDS = "to be or to be or to be "
USAGE = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8}


def engine(die_after: int | None = None) -> WordEngine:
    return WordEngine(die_after=die_after, tells_ids=True)


def chunks_of(body: bytes) -> list[dict]:
    """All events of a complete answer, which has no notes in it."""
    assert body.endswith(b"data: [DONE]\n\n")
    assert body.count(b"[DONE]") == 1
    events = body.decode().split("\n\n")[:-2]
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def undisturbed(nursery) -> list[dict]:
    _, body = await Link(nursery, z=engine()).ask(**USAGE)
    return [anonymous(chunk) for chunk in chunks_of(body)]


def anonymous(chunk: dict) -> dict:
    return {key: value for key, value in chunk.items() if key not in ("id", "created")}


@pytest.mark.parametrize("die_after", range(1, 8))
async def test_another_replica_goes_on_without_duplicate_or_gap(nursery, die_after):
    link = Link(nursery, b=engine(die_after), c=engine())
    response, body = await link.ask(**USAGE)
    chunks = chunks_of(body)
    assert [anonymous(chunk) for chunk in chunks] == await undisturbed(nursery)
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{response.headers['x-request-id']}"}
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert link.engines["b"].produced + link.engines["c"].produced == 8
    assert link.mesh.calls == [
        ("routed", "peer-b"), ("failed", "peer-b"), ("finished", "peer-b"), ("again", MODEL),
        ("routed", "peer-c"), ("finished", "peer-c"),
    ]  # fmt: skip


async def test_a_plain_completion_goes_on_too(nursery):
    link = Link(nursery, b=engine(3), c=engine())
    with trio.fail_after(20):
        response = await link.api.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": "to be or", "max_tokens": 8, "stream": True},
        )
        chunks = chunks_of(await response.get_data())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == WORDS


async def test_the_stream_of_a_peer_may_be_cut_anywhere(nursery):
    """What the client gets is the same, wherever in an event its first replica is cut."""
    whole = await raw_answer(nursery)
    wanted = await undisturbed(nursery)
    for length in range(1, len(whole), 13):  # prime to what events measure

        async def cut(scope, receive, send, wire=whole[:length]):
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": wire, "more_body": True})

        link = Link(nursery, b=engine(), c=engine())
        link.mesh.tunnels["peer-b"] = tunnel_to(cut, nursery)
        _, body = await link.ask(**USAGE)
        assert [anonymous(chunk) for chunk in chunks_of(body)] == wanted


async def raw_answer(nursery) -> bytes:
    """A streamed answer as it goes from node to node, with its notes."""
    link = Link(nursery, b=engine())
    wire = b""

    class Tap(answer_module.Progress):
        def feed(self, events: bytes) -> bytes:
            nonlocal wire
            wire += events
            return super().feed(events)

    kept, answer_module.Progress = answer_module.Progress, Tap
    try:
        await link.ask(**USAGE)
    finally:
        answer_module.Progress = kept
    assert wire.count(b"\n: ") == 8
    return wire


async def test_our_own_engine_goes_on_where_a_peer_was_lost_and_the_reverse(nursery):
    for here, there in ((engine(), engine(3)), (engine(3), engine())):
        link = Link(nursery, b=there)
        link.mesh.engines[DIGEST] = here
        own = Candidate("peer-a", True, "ranked")
        link.mesh.candidates = (
            (*link.mesh.candidates, own) if there.die_after else (own, *link.mesh.candidates)
        )
        _, body = await link.ask(**USAGE)
        assert text_of(body.replace(b"data: [DONE]\n\n", b"").rpartition(b"data: {")[0]) == WORDS
        assert here.produced + there.produced == 8


async def test_two_losses_are_survived_and_the_third_is_told(nursery):
    link = Link(nursery, b=engine(2), c=engine(4), d=engine())
    _, body = await link.ask(**USAGE)
    assert [anonymous(chunk) for chunk in chunks_of(body)] == await undisturbed(nursery)

    link = Link(nursery, b=engine(2), c=engine(4), d=engine(6), e=engine())
    _, body = await link.ask(**USAGE)
    assert b'"replica_lost"' in body
    assert b"[DONE]" not in body
    assert text_of(body.replace(b'"usage":null', b'"usage":0')) == "to be or to be or "
    assert link.engines["e"].requests == []


async def test_a_standby_that_comes_a_little_later_goes_on(autojump_clock):
    async with trio.open_nursery() as nursery:
        link = Link(nursery, b=engine(3), c=engine())
        late = link.mesh.candidates[1:]
        link.mesh.candidates = link.mesh.candidates[:1]
        fail = link.mesh.failed

        def failed(peer_id):
            fail(peer_id)
            link.mesh.candidates = ()
            nursery.start_soon(come)

        async def come():
            await trio.sleep(5.0)
            link.mesh.candidates = late

        link.mesh.failed = failed
        _, body = await link.ask(**USAGE)
        assert len(chunks_of(body)) == 11
        assert trio.current_time() == pytest.approx(5.0, abs=answer_module.RESUME_EVERY_S)
        nursery.cancel_scope.cancel()


async def test_if_nobody_comes_the_client_is_told_in_time(autojump_clock):
    async with trio.open_nursery() as nursery:
        link = Link(nursery, b=engine(3))
        fail = link.mesh.failed

        def failed(peer_id):
            fail(peer_id)
            link.mesh.candidates = ()

        link.mesh.failed = failed
        _, body = await link.ask(stream=True)
        assert b'"replica_lost"' in body
        assert b"[DONE]" not in body
        assert trio.current_time() <= answer_module.RESUME_WITHIN_S + 1.0
        nursery.cancel_scope.cancel()


async def test_whoever_refuses_to_go_on_ends_the_answer(nursery):
    async def refuses(scope, receive, send):
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    link = Link(nursery, b=engine(3), c=engine())
    link.mesh.tunnels["peer-c"] = tunnel_to(refuses, nursery)
    _, body = await link.ask(stream=True)
    assert b'"replica_lost"' in body


async def test_a_client_that_leaves_while_we_resume_leaves_nothing_behind(nursery):
    never = trio.Event()
    link = Link(nursery, b=engine(3), c=WordEngine(pace=never.wait, tells_ids=True))
    async with trio.open_nursery() as client:
        client.start_soon(lambda: link.ask(**USAGE))
        with trio.fail_after(HANG_S):
            while not link.engines["c"].requests:
                await trio.testing.wait_all_tasks_blocked()
        client.cancel_scope.cancel()
    counted = [said for said, _ in link.mesh.calls]
    assert counted.count("routed") == counted.count("finished") == 2


async def test_a_feature_that_cannot_be_resumed_ends_with_an_error(nursery):
    link = Link(nursery, b=engine(3), c=engine())
    _, body = await link.ask(**USAGE, mirostat=2)
    assert b'"replica_lost"' in body
    assert b"[DONE]" not in body
    assert link.engines["c"].requests == []


# --- notes ---------------------------------------------------------------------------------------


def event(delta: Delta) -> bytes:
    return note([delta]) + b"data: " + delta.text.encode() + b"\n\n"


def test_notes_are_taken_off_and_added_up() -> None:
    progress = Progress()
    opening = OPENING_NOTE + b"data: opening\n\n"
    assert progress.feed(opening) == b"data: opening\n\n"
    assert progress.continuation() == Continuation((), 0)
    assert progress.feed(event(Delta("héé", 2, (7, 8))) + event(Delta("x", 1, (9,)))) == (
        "data: héé\n\ndata: x\n\n".encode()
    )
    assert progress.continuation() == Continuation((7, 8, 9), 4)


def test_the_end_is_held_back_until_it_is_complete() -> None:
    progress = Progress()
    progress.feed(event(Delta("x", 1, (9,))))
    assert progress.feed(b"data: finish\n\n") == b""
    assert progress.continuation() == Continuation((9,), 1)
    assert progress.feed(b"data: finish\n\n") + progress.feed(b"data: [DONE]\n\n") == b""
    assert progress.end() == b"data: finish\n\ndata: [DONE]\n\n"


def test_an_answer_without_notes_passes_and_cannot_be_continued() -> None:
    progress = Progress()
    assert progress.feed(event(Delta("x"))) == b"data: x\n\n"
    assert progress.continuation() is None
    progress.feed(event(Delta("x", 1, (9,))))
    assert progress.continuation() is None


@pytest.mark.parametrize(
    "wire",
    [
        b": hello\n\n",
        b": 1;2,\ndata: x\n\n",
        b": 1;-2\ndata: x\n\n",
        b": 1;2147483648\ndata: x\n\n",
        b": 99999999;1\ndata: x\n\n",
        b": 1;1\ndata: x\n\n" + b"data: y\n\n" * (HELD_BYTES_MAX // 9 + 1),
    ],
    ids=["words", "comma", "negative", "large", "long", "held"],
)
def test_a_note_that_is_none_breaks_the_answer(wire: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Progress().feed(wire)


@given(st.lists(st.integers(0, 2**31 - 1)), st.integers(0, 99_999_999), st.binary())
def test_a_continuation_travels_before_the_body(tokens: list[int], chars: int, body: bytes) -> None:
    continuation = Continuation(tuple(tokens), chars)
    assert split_continuation(*join_continuation(continuation, body)) == (continuation, body)


@pytest.mark.parametrize(
    "value", ["x", "1", "1;", "-1;1", "3;1", "1048577;1", "1;1;", "1;1;1-", "1;1 "]
)
def test_nonsense_to_go_on_from_is_refused(value: str) -> None:
    with pytest.raises(RequestError):
        split_continuation(value, b"\0" * 9)
    with pytest.raises(RequestError):
        split_continuation("1;1", b"\xff" * 9)
