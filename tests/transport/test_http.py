"""HTTP/1.1 over streams: framing, reuse, cuts, cancellation, limits, hostile bytes."""

from __future__ import annotations

import socket
import struct

import h11
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from meshnode.errors import EngineError, RemoteProtocolError
from meshnode.transport import http
from meshnode.transport.http import HttpConnection, ServerLimits, TunnelPool, serve_asgi

HOST = [(b"host", b"meshnode")]
HANG_S = 20.0


async def echo_app(scope, receive, send):
    """Answers with the method, the path and the body it was sent."""
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    head = f"{scope['method']} {scope['path']} ".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]})
    await send({"type": "http.response.body", "body": head, "more_body": True})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def connect(nursery):
    """Makes a client connection to an app; near and far streams can be inspected."""

    def connect(app, limits=None):
        near, far = trio.testing.memory_stream_pair()
        nursery.start_soon(serve_asgi, far, app, None, limits)
        return HttpConnection(near)

    return connect


async def test_requests_follow_each_other_on_one_stream(connect):
    connection = connect(echo_app)
    with trio.fail_after(HANG_S):
        for index in range(3):
            async with connection.request(
                "POST", f"/p%20{index}?q", HOST, b"x" * 100_000
            ) as answer:
                assert answer.status == 200
                assert answer.header(b"x-a") == b"b"
                assert await answer.read(200_000) == b"POST /p %d " % index + b"x" * 100_000
                assert answer.complete


async def test_head_and_204_have_no_body(connect):
    async def app(scope, receive, send):
        status = 204 if scope["method"] == "GET" else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"" if status == 204 else b"x"})

    connection = connect(app)
    with trio.fail_after(HANG_S):
        for method in ("HEAD", "GET", "HEAD"):
            async with connection.request(method, "/", HOST) as answer:
                assert await answer.read(10) == b""


async def test_chunks_arrive_one_by_one_and_each_is_one_write():
    near, far = trio.testing.memory_stream_pair()
    writes = []
    original = far.send_all

    async def counting(data):
        writes.append(bytes(data))
        await original(data)

    far.send_all = counting
    step = trio.testing.Sequencer()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with step(0):
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
        async with step(2):
            await send({"type": "http.response.body", "body": b"two", "more_body": True})
        async with step(4):
            await send({"type": "http.response.body", "body": b"three"})

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_asgi, far, app)
            async with HttpConnection(near).request("GET", "/", HOST) as answer:
                chunks = aiter(answer)
                async with step(1):
                    assert await anext(chunks) == b"one"
                async with step(3):
                    assert await anext(chunks) == b"two"
                async with step(5):
                    assert await anext(chunks) == b"three"
                    with pytest.raises(StopAsyncIteration):
                        await anext(chunks)
            await near.aclose()
    assert len(writes) == 3
    assert writes[0].startswith(b"HTTP/1.1 200")
    assert writes[0].endswith(b"3\r\none\r\n")
    assert writes[2] == b"5\r\nthree\r\n0\r\n\r\n"


@pytest.mark.parametrize("sent", [0, 3])
async def test_a_failing_app_gives_500_before_and_a_cut_after_the_first_byte(connect, sent, caplog):
    async def app(scope, receive, send):
        if sent:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * sent, "more_body": True})
        raise ExceptionGroup("as nurseries do", [EngineError("the engine died")])

    async def listen():
        async with connect(app).request("GET", "/", HOST) as answer:
            assert answer.status == (200 if sent else 500)
            await answer.read(100)

    with trio.fail_after(HANG_S):
        if sent:
            with pytest.raises(RemoteProtocolError):
                await listen()
        else:
            await listen()
    assert "answer cut: the engine died" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_client_that_leaves_cancels_the_app_at_once():
    cancelled = trio.Event()
    started = trio.Event()

    async def app(scope, receive, send):
        try:
            started.set()
            await trio.sleep_forever()
        finally:
            cancelled.set()

    # A socket pair: a memory stream's end cannot be told from a half-close.
    near, far = await socket_pair()
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_asgi, far, app)
            nursery.start_soon(_swallow_cut, HttpConnection(near))
            await started.wait()
            reset(near)
            await cancelled.wait()


async def _swallow_cut(connection):
    with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
        await connection.begin("GET", "/", HOST)


async def socket_pair():
    """Two connected TCP streams: unlike memory streams they can be reset."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    near = await trio.open_tcp_stream(*listeners[0].socket.getsockname())
    far = await listeners[0].accept()
    await listeners[0].aclose()
    return near, far


def reset(stream):
    """Abort a TCP stream, so that its peer sees a reset and no end."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


async def test_a_half_close_after_the_request_still_gets_the_answer():
    near, far = trio.testing.memory_stream_pair()
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_asgi, far, echo_app)
            await near.send_all(b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n")
            await near.send_eof()
            answer = b"".join([chunk async for chunk in near])
    assert b"GET /x " in answer


async def test_pipelined_requests_are_answered_in_order():
    near, far = trio.testing.memory_stream_pair()
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_asgi, far, echo_app)
            await near.send_all(
                b"".join(b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % i for i in range(3))
            )
            await near.send_eof()
            answer = b"".join([chunk async for chunk in near])
    assert answer.index(b"GET /0") < answer.index(b"GET /1") < answer.index(b"GET /2")


async def test_a_slow_reader_holds_the_app_back():
    near, far = await socket_pair()
    sent = 0

    async def app(scope, receive, send):
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent += 65536

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_asgi, far, app)
            connection = HttpConnection(near)
            answer = await connection.begin("GET", "/", HOST)
            before = -1
            while sent != before:  # until the kernel's buffers are full
                before = sent
                await trio.testing.wait_all_tasks_blocked(0.05)
            assert sent < 16 * 1024 * 1024
            await anext(aiter(answer))
            await near.aclose()


async def test_a_peer_that_takes_nothing_counts_as_gone(autojump_clock):
    near, far = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_asgi, far, echo_app)
        await near.send_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        # never reads: the server gives up by itself
        started = trio.current_time()
    assert trio.current_time() - started == pytest.approx(http.SEND_STALL_S)


async def test_a_silent_stream_is_closed(autojump_clock):
    near, far = trio.testing.memory_stream_pair()
    await serve_asgi(far, echo_app)
    assert trio.current_time() > 0
    assert await near.receive_some() == b""


MALFORMED = [
    (b"\x00\x01\x02\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET x HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 200_000, 431),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", 501),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 200\r\n\r\n" + b"x" * 200, 413),
]


@pytest.mark.parametrize(("wire", "status"), MALFORMED)
async def test_malformed_requests_get_their_status_and_no_second_chance(wire, status):
    near, far = trio.testing.memory_stream_pair()
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_asgi, far, echo_app, None, ServerLimits(body_bytes_max=100))
            await near.send_all(wire + b"GET /second HTTP/1.1\r\nhost: a\r\n\r\n")
            answer = b"".join([chunk async for chunk in near])
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    assert b"second" not in answer


HEAD = b"POST /x HTTP/1.1\r\nhost: a\r\n"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from(
                [
                    HEAD,
                    b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
                    b"content-length: 3\r\n",
                    b"transfer-encoding: chunked\r\n",
                    b"expect: 100-continue\r\n",
                    b"\r\n",
                    b"3\r\nabc\r\n",
                    b"0\r\n\r\n",
                    b"connection: close\r\n",
                ]
            ),
        ),
        max_size=8,
    )
)
@example([HEAD, b"expect: 100-continue\r\ncontent-length: 3\r\n\r\n", b"abc"])
def test_no_bytes_make_the_server_raise_or_hang(pieces):
    async def main():
        near, far = trio.testing.memory_stream_pair()
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_asgi, far, echo_app)
                for piece in pieces:
                    try:
                        await near.send_all(piece)
                    except trio.BrokenResourceError:
                        break
                await near.send_eof()
                answer = b"".join([chunk async for chunk in near])
        assert b"HTTP/1.1 5" not in answer.replace(b"HTTP/1.1 501", b"")

    trio.run(main)


# ---------------------------------------------------------------------------------------------
# The client's pool
# ---------------------------------------------------------------------------------------------


class Opener:
    """Opens memory streams to `app` and remembers them."""

    def __init__(self, nursery, app=echo_app):
        self.nursery = nursery
        self.app = app
        self.near = []
        self.far = []

    async def __call__(self, peer_id):
        near, far = trio.testing.memory_stream_pair()
        self.near.append(near)
        self.far.append(far)
        self.nursery.start_soon(serve_asgi, far, self.app)
        return near


async def ask(pool, peer_id="p", read=True):
    async with pool.request(peer_id, "POST", "/", HOST, b"hello") as answer:
        return await answer.read(100) if read else None


async def test_pool_reuses_a_stream_and_not_across_peers(nursery):
    opener = Opener(nursery)
    pool = TunnelPool(opener)
    with trio.fail_after(HANG_S):
        assert await ask(pool) == b"POST / hello"
        await ask(pool)
        assert len(opener.near) == 1
        await ask(pool, "q")
        assert len(opener.near) == 2
        await pool.aclose()
        assert pool.idle_streams == 0


async def test_pool_resets_a_stream_left_midway(nursery):
    opener = Opener(nursery)
    pool = TunnelPool(opener)
    with trio.fail_after(HANG_S):
        await ask(pool, read=False)
        assert pool.idle_streams == 0
        with pytest.raises(trio.ClosedResourceError):
            await opener.near[0].send_all(b"x")


async def test_pool_keeps_a_stream_whose_answer_was_complete_when_its_task_was_cancelled(nursery):
    opener = Opener(nursery)
    pool = TunnelPool(opener)
    with trio.fail_after(HANG_S):
        with trio.CancelScope() as task:
            async with pool.request("p", "POST", "/", HOST, b"hello") as answer:
                await answer.read(100)
                task.cancel()
                await trio.lowlevel.checkpoint()
        assert pool.idle_streams == 1
        assert await ask(pool) == b"POST / hello"
    assert len(opener.near) == 1


async def test_pool_replaces_a_reused_stream_that_turns_out_dead(nursery):
    opener = Opener(nursery)
    pool = TunnelPool(opener)
    with trio.fail_after(HANG_S):
        await ask(pool)
        await trio.aclose_forcefully(opener.far[0])
        assert await ask(pool) == b"POST / hello"
    assert len(opener.near) == 2


async def test_pool_does_not_repeat_what_failed_on_a_fresh_stream(nursery):
    class DeadOpener(Opener):
        async def __call__(self, peer_id):
            near = await super().__call__(peer_id)
            await trio.aclose_forcefully(self.far[-1])
            return near

    opener = DeadOpener(nursery)
    with trio.fail_after(HANG_S), pytest.raises((trio.BrokenResourceError, RemoteProtocolError)):
        await ask(TunnelPool(opener))
    assert len(opener.near) == 1


async def test_pool_bounds_idle_streams_in_number_and_time(autojump_clock):
    async with trio.open_nursery() as nursery:
        opener = Opener(nursery)
        pool = TunnelPool(opener)
        async with trio.open_nursery() as burst:
            for _ in range(http.IDLE_PER_PEER_MAX + 4):
                burst.start_soon(ask, pool)
        assert len(opener.near) == http.IDLE_PER_PEER_MAX + 4
        assert pool.idle_streams == http.IDLE_PER_PEER_MAX
        for peer in range(http.IDLE_TOTAL_MAX + 2):
            await ask(pool, f"p{peer}")
        assert pool.idle_streams == http.IDLE_TOTAL_MAX
        await trio.sleep(http.CLIENT_IDLE_S)
        await ask(pool, "new")
        assert pool.idle_streams == 1
        nursery.cancel_scope.cancel()


async def test_bytes_after_an_answer_end_the_stream(nursery):
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"
    )

    async def open_stream(peer_id):
        return near

    pool = TunnelPool(open_stream)
    with trio.fail_after(HANG_S):
        async with pool.request("p", "GET", "/", HOST) as answer:
            assert await answer.read(10) == b"ok"
    assert pool.idle_streams == 0


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [
                    b"HTTP/1.1 200 OK\r\n",
                    b"HTTP/1.1 100 Continue\r\n\r\n",
                    b"transfer-encoding: chunked\r\n",
                    b"content-length: 2\r\n",
                    b"\r\n",
                    b"2\r\nok\r\n",
                    b"0\r\n\r\n",
                ]
            ),
        ),
        max_size=8,
    )
)
def test_no_answer_makes_the_client_raise_anything_unnamed(pieces):
    async def main():
        near, far = trio.testing.memory_stream_pair()
        await far.send_all(b"".join(pieces) or b"\r\n")
        await far.send_eof()
        with trio.fail_after(HANG_S):
            try:
                async with HttpConnection(near).request("GET", "/", HOST) as answer:
                    await answer.read(1000)
            except RemoteProtocolError:
                pass

    trio.run(main)


def test_h11_is_recent_enough_to_refuse_smuggled_chunks():
    assert tuple(map(int, h11.__version__.split(".")[:2])) >= (0, 16)
