"""The API on a real socket: OpenAI's own client, streaming, disconnects, shutdown, the guard."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import partial

import openai
import pytest
import trio
import trio.testing

from meshnode.errors import ConfigError
from meshnode.gateway import Candidate, server
from meshnode.gateway.app import create_api_app
from meshnode.gateway.server import serve_api
from meshnode.gateway.tunnel import TunnelApp
from meshnode.transport.http import BODY_BYTES_MAX, HttpConnection
from tests.fakes import MODEL, FakeMesh, WordEngine, local_mesh, tunnel_to

HANG_S = 30.0
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "to be or"}]}
JSON = [(b"host", b"localhost"), (b"content-type", b"application/json")]


@asynccontextmanager
async def serving(mesh, host="127.0.0.1"):
    """The API of `mesh` on a free port; yields (port, shutdown event)."""
    shutdown = trio.Event()
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            serve = partial(serve_api, create_api_app(mesh), (host, 0), shutdown=shutdown.wait)
            _, port = await nursery.start(serve)
            yield port, shutdown
            shutdown.set()


@asynccontextmanager
async def connection(port):
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield HttpConnection(stream)


def chat(**fields):
    return json.dumps({**CHAT, **fields}).encode()


def abort(stream):
    """A reset: what a killed client leaves behind."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


def talk(port):
    """What a program using the OpenAI library does. Runs in a thread."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0)
    with client:
        assert [model.id for model in client.models.list()] == [MODEL]
        whole = client.chat.completions.create(**CHAT, max_tokens=3, temperature=0, seed=1)
        assert whole.choices[0].message.content == "to be or "
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.prompt_tokens_details.cached_tokens == 1
        chunks = list(
            client.chat.completions.create(
                **CHAT, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "to be or to be "
        assert chunks[-1].usage.total_tokens == 8
        done = client.completions.create(model=MODEL, prompt="a b", max_tokens=3)
        assert done.choices[0].text == "a b a "
        text = "".join(
            c.choices[0].text
            for c in client.completions.create(model=MODEL, prompt="a", stream=True)
        )
        assert text == "a " * 16
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(**{**CHAT, "model": "gpt-9"})
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**CHAT, store=True)
        assert refused.value.param == "store"


ASYNC_TALK = """
import asyncio, sys
from openai import AsyncOpenAI
async def main():
    async with AsyncOpenAI(base_url=sys.argv[1], api_key="k", max_retries=0) as client:
        async def one():
            stream = await client.chat.completions.create(
                model="words", messages=[{"role": "user", "content": "to be or"}], stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream])
        print(await asyncio.gather(*(one() for _ in range(10))))
asyncio.run(main())
"""


async def test_openais_client_is_content():
    engine = WordEngine()
    async with serving(local_mesh(engine)) as (port, _):
        await trio.to_thread.run_sync(talk, port)
        done = await trio.run_process(
            [sys.executable, "-c", ASYNC_TALK, f"http://127.0.0.1:{port}/v1"],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            env=dict(os.environ),
        )
        assert done.stdout.decode().strip() == str(["to be or to be "] * 10)
    assert engine.running == 0


async def test_openais_client_is_content_through_a_tunnel():
    async with trio.open_nursery() as nursery:
        mesh = FakeMesh("peer-a", candidates=(Candidate("peer-b", False, "ranked"),))
        far = TunnelApp(local_mesh(WordEngine(), "peer-b"))
        mesh.tunnels["peer-b"] = tunnel_to(far, nursery)
        async with serving(mesh) as (port, _):
            await trio.to_thread.run_sync(talk, port)
        nursery.cancel_scope.cancel()


async def test_openais_client_raises_when_a_replica_is_lost():
    def talk_and_lose(port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0)
        texts = []

        def listen():
            for chunk in client.chat.completions.create(**CHAT, stream=True):
                texts.append(chunk.choices[0].delta.content or "")

        with client, pytest.raises(openai.APIError, match="lost in the middle"):
            listen()
        assert "".join(texts) == "to be "

    async with serving(local_mesh(WordEngine(die_after=2))) as (port, _):
        await trio.to_thread.run_sync(talk_and_lose, port)


async def test_each_token_is_flushed_at_once():
    permits = trio.Semaphore(0)
    async with (
        serving(local_mesh(WordEngine(pace=permits.acquire))) as (port, _),
        connection(port) as client,
    ):
        permits.release()
        answer = await client.begin("POST", "/v1/chat/completions", JSON, chat(stream=True))
        chunks = aiter(answer)
        assert b'"to "' in await anext(chunks)
        permits.release()
        assert b'"be "' in await anext(chunks)
        for _ in range(4):
            permits.release()
        rest = b"".join([chunk async for chunk in chunks])
        assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("leave", [abort, lambda stream: stream.socket.close()])
@pytest.mark.parametrize("tokens_before", [0, 2])
async def test_a_client_that_leaves_cancels_the_engine(leave, tokens_before):
    """Even while it waits for its next token, so that not one more is decoded."""
    permits = trio.Semaphore(tokens_before)
    engine = WordEngine(pace=permits.acquire)
    mesh = local_mesh(engine)
    async with serving(mesh) as (port, _):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        body = chat(stream=True)
        await stream.send_all(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        while engine.produced < tokens_before or not engine.running:
            await trio.testing.wait_all_tasks_blocked(0.01)
        leave(stream)
        while engine.running:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert engine.produced == tokens_before
    assert mesh.calls == [("routed", "peer-a"), ("finished", "peer-a")]


@pytest.mark.parametrize("route", ["local", "tunnel"])
async def test_a_slow_reader_holds_the_engine_back(nursery, route):
    engine = WordEngine(tokens_default=100_000)
    mesh = local_mesh(engine)
    if route == "tunnel":
        mesh = FakeMesh("peer-a", candidates=(Candidate("peer-b", False, "ranked"),))
        far = TunnelApp(local_mesh(engine, "peer-b"))
        # Without a buffer of its own: what is held back is held back by the code in between.
        mesh.tunnels["peer-b"] = tunnel_to(far, nursery, pair=trio.testing.lockstep_stream_pair)
    big = {"messages": [{"role": "user", "content": "x" * 4000}]}
    async with serving(mesh) as (port, _), connection(port) as client:
        await client.begin("POST", "/v1/chat/completions", JSON, chat(stream=True, **big))
        before = -1
        while engine.produced != before:
            before = engine.produced
            await trio.testing.wait_all_tasks_blocked(0.1)
        assert 0 < engine.produced * 4000 < 16 * 1024 * 1024  # the kernel's buffers, not ours


async def test_a_too_long_body_is_told_so():
    async with serving(local_mesh(WordEngine())) as (port, _), connection(port) as client:
        body = b"x" * (BODY_BYTES_MAX + 1)
        async with client.request("POST", "/v1/completions", JSON, body) as answer:
            assert answer.status == 413
            assert json.loads(await answer.read(1000))["error"]["code"] == "body_too_large"


async def test_shutdown_lets_an_answer_end():
    permits = trio.Semaphore(1)
    async with (
        serving(local_mesh(WordEngine(pace=permits.acquire))) as (port, shutdown),
        connection(port) as client,
        connection(port) as idle,
    ):
        answer = await client.begin("POST", "/v1/chat/completions", JSON, chat(stream=True))
        await idle.begin("GET", "/healthz", JSON)
        await anext(aiter(answer))
        shutdown.set()
        assert await idle.stream.receive_some() is not None  # the rest of its answer, or the end
        for _ in range(5):
            permits.release()
        assert (await answer.read(10_000)).endswith(b"data: [DONE]\n\n")


async def test_shutdown_and_cancellation_do_not_wait_for_a_stalled_client(monkeypatch):
    monkeypatch.setattr(server, "GRACE_S", 0.2)
    big = {"messages": [{"role": "user", "content": "x" * 4000}]}
    for cancel in (False, True):
        engine = WordEngine(tokens_default=100_000)
        shutdown = trio.Event()
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                app = create_api_app(local_mesh(engine))
                _, port = await nursery.start(
                    partial(serve_api, app, ("127.0.0.1", 0), shutdown=shutdown.wait)
                )
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                client = HttpConnection(stream)
                await client.begin("POST", "/v1/chat/completions", JSON, chat(stream=True, **big))
                before = -1
                while engine.produced != before:
                    before = engine.produced
                    await trio.testing.wait_all_tasks_blocked(0.1)
                assert 0 < engine.produced < 100_000
                if cancel:
                    nursery.cancel_scope.cancel()
                shutdown.set()
        await trio.aclose_forcefully(stream)
        assert engine.running == 0


async def test_a_taken_port_is_a_config_error_that_helps():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*in use.*another port"):
            await serve_api(
                create_api_app(FakeMesh()), ("127.0.0.1", port), shutdown=trio.sleep_forever
            )


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
async def test_a_foreign_address_is_a_config_error(host):
    with pytest.raises(ConfigError, match="API"):
        await serve_api(create_api_app(FakeMesh()), (host, 0), shutdown=trio.sleep_forever)


GUARD = [
    (b"localhost", None, 200),
    (b"localhost:8080", None, 200),
    (b"127.0.0.1:8080", None, 200),
    (b"[::1]:8080", None, 200),
    (b"evil.example", None, 421),
    (b"localhost.evil.example", None, 421),
    (b"127.0.0.1.evil.example:8080", None, 421),
    (b"evil@localhost.example", None, 421),
    (b"[", None, 421),
    (b"localhost", b"http://localhost:3000", 200),
    (b"localhost", b"https://evil.example", 403),
    (b"localhost", b"null", 403),
]


@pytest.mark.parametrize(("host", "origin", "status"), GUARD)
async def test_the_loopback_guard(host, origin, status):
    headers = [(b"host", host)] + ([(b"origin", origin)] if origin else [])
    async with (
        serving(local_mesh(WordEngine())) as (port, _),
        connection(port) as client,
        client.request("GET", "/v1/models", headers) as answer,
    ):
        assert answer.status == status
        assert answer.header(b"access-control-allow-origin") is None
        assert ("error" in json.loads(await answer.read(10_000))) == (status != 200)


async def test_other_addresses_take_any_host():
    async with (
        serving(local_mesh(WordEngine()), host="0.0.0.0") as (port, _),
        connection(port) as client,
        client.request("GET", "/healthz", [(b"host", b"node.example")]) as answer,
    ):
        assert answer.status == 200


async def test_prompts_and_answers_are_never_logged(caplog, capfd):
    caplog.set_level(0)
    secret = {"messages": [{"role": "user", "content": "xyzzy plugh"}]}
    async with serving(local_mesh(WordEngine(die_after=2))) as (port, _):
        for body in (chat(stream=True, **secret), chat(**secret), chat(store=True, **secret)):
            async with (
                connection(port) as client,
                client.request("POST", "/v1/chat/completions", JSON, body) as answer,
            ):
                await answer.read(100_000)
    out, err = capfd.readouterr()
    assert "xyzzy" not in caplog.text + out + err
