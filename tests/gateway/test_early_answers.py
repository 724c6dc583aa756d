"""Answers to requests whose body is not read, or not all of it: the client gets them, and the
connection goes on or is closed; it is never left in between."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing

from meshnode.gateway import server
from meshnode.gateway.app import GatewayLimits, create_api_app
from meshnode.gateway.door import Door
from meshnode.gateway.keys import ApiKey, generate_token, hash_token, with_key
from meshnode.gateway.server import serve_api
from meshnode.gateway.tunnel import TunnelApp
from meshnode.transport.http import serve_asgi
from tests.fakes import WordEngine, local_mesh

HANG_S = 20.0
LIMIT_BYTES = 64 * 1024
SMALL, LARGE = 500, 3_000_000
HOST = b"host: localhost\r\n"
ALIVE = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
TOKEN = generate_token()
KEY = b"x-api-key: " + TOKEN.encode() + b"\r\n"
# What is asked for, and the status that needs no body.
EARLY = {
    405: b"PUT /v1/chat/completions HTTP/1.1\r\n" + HOST + KEY,
    404: b"POST /v1/nothing HTTP/1.1\r\n" + HOST + KEY,
    401: b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST,
    421: b"POST /v1/chat/completions HTTP/1.1\r\nhost: example.org\r\n",
}


@pytest.fixture
async def port(nursery, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "LINGER_S", 0.3)
    file = tmp_path / "api-keys.toml"
    file.write_text(with_key("", ApiKey("alice", hash_token(TOKEN)), file))
    file.chmod(0o600)
    app = create_api_app(
        local_mesh(WordEngine()), GatewayLimits(body_bytes_max=LIMIT_BYTES), door=Door(file)
    )

    async def serve(task_status):
        await serve_api(app, ("127.0.0.1", 0), shutdown=trio.sleep_forever, task_status=task_status)

    return (await nursery.start(serve))[1]


async def read_answer(stream) -> tuple[int, bytes]:
    """The status and the head of one answer, whose body is taken off."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some(65536)
        assert more, data
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    head = head.lower()
    if b"transfer-encoding: chunked" in head:
        while not body.endswith(b"0\r\n\r\n"):
            more = await stream.receive_some(65536)
            assert more
            body += more
    else:
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(body) < length:
            more = await stream.receive_some(65536)
            assert more
            body += more
    return int(head.split()[1]), head


async def goes_on(stream, head: bytes) -> None:
    """The next request is answered, or the client was told that there can be none."""
    if b"connection: close" in head:
        while True:
            try:
                if not await stream.receive_some(65536):
                    return
            except trio.BrokenResourceError:
                return
    with trio.fail_after(HANG_S):
        while True:  # the body may be going out still
            try:
                await stream.send_all(ALIVE)
                break
            except trio.BusyResourceError:
                await trio.sleep(0.001)
    status, _ = await read_answer(stream)
    assert status == 200


@pytest.mark.parametrize("status", EARLY)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("order", ["together", "answer first", "never"])
async def test_an_answer_before_the_body(port, status, size, order):
    request = EARLY[status] + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % size
    with trio.fail_after(HANG_S):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream, trio.open_nursery() as nursery:
            await stream.send_all(request)
            if order == "together":
                nursery.start_soon(send, stream, b"x" * size)
            got, head = await read_answer(stream)
            assert got == status
            if order == "answer first":
                nursery.start_soon(send, stream, b"x" * size)
            if order == "never":
                # Nobody waits for ever for a body that may not come.
                assert b"connection: close" in head
            await goes_on(stream, head)
            nursery.cancel_scope.cancel()


async def send(stream, data):
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(data)


@pytest.mark.parametrize(
    "told", [b"content-length: 3000000\r\n", b"transfer-encoding: chunked\r\n"]
)
async def test_too_large_a_body(port, told):
    request = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + KEY + told + b"\r\n"
    body = b"x" * LARGE if b"length" in told else b"%x\r\n%b\r\n0\r\n\r\n" % (LARGE, b"x" * LARGE)
    with trio.fail_after(HANG_S):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(send, stream, request + body)
            got, head = await read_answer(stream)
            assert got == 413
            await goes_on(stream, head)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_a_tunnel_ends_after_an_early_answer(nursery, size):
    ours, theirs = trio.testing.memory_stream_pair()
    nursery.start_soon(serve_asgi, theirs, TunnelApp(local_mesh(WordEngine())))
    head = b"POST /v1/nothing HTTP/1.1\r\n" + HOST + b"content-length: %d\r\n\r\n" % size
    with trio.fail_after(HANG_S):
        await ours.send_all(head)
        status, _ = await read_answer(ours)
        assert status == 404
        nursery.start_soon(send, ours, b"x" * size)
        assert not await ours.receive_some(1), "nobody waits for another answer"
