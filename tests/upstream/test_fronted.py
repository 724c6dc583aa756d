"""A node in front of a server on a real socket: what is offered, what goes on, what comes back."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.config import Config
from meshnode.errors import ConfigError, EngineBusyError, PeerUnreachableError
from meshnode.gateway import Candidate
from meshnode.gateway import answer as answer_module
from meshnode.gateway.tunnel import TunnelApp
from meshnode.transport.http import HEAD_BYTES_MAX
from meshnode.upstream import fronted as fronted_module
from meshnode.upstream.caller import Caller
from meshnode.upstream.fronted import Fronted, find_upstreams
from tests.fakes import DIGEST, MODEL, FakeMesh, WordEngine, tunnel_to
from tests.gateway.link import HANG_S, Link
from tests.upstream.server import (
    EVENTS,
    OWN_NAME,
    STREAM,
    STREAM_HEAD,
    WHOLE,
    WHOLE_BODY,
    Server,
    chunk,
    told,
    until_left,
)

KEY = "sk-a-secret"
CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fronted_module, "BACK_OFF_FIRST_S", 0.01)
    monkeypatch.setattr(fronted_module, "LOOK_EVERY_S", 0.05)


@asynccontextmanager
async def running(*servers: Server, state: str = "ready", slots: int = 4, **caller):
    """A `Fronted` for each server, looked at once."""
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            found = []
            for index, server in enumerate(servers):
                peer = f"peer-{'bcde'[index]}"
                found.append(
                    Fronted(
                        Caller(server.url, **caller), peer, name=MODEL, digest=DIGEST, slots=slots
                    )
                )
                nursery.start_soon(found[-1].run)
            for each in found:
                await until(lambda each=each: each.state == state)
            yield found[0] if len(found) == 1 else found
            nursery.cancel_scope.cancel()


async def until(holds) -> None:
    while not holds():
        await trio.sleep(0.005)


class Front(Link):
    """Node A without an engine; peers b, c, ... in front of servers, then those with `engines`."""

    def __init__(self, nursery, *fronts: Fronted, here: Fronted | None = None, **engines) -> None:
        super().__init__(nursery, **engines)
        of_fronts = []
        for name, front in zip("bcde", fronts, strict=False):
            peer_id = f"peer-{name}"
            model = front.model(DIGEST)
            assert model is not None
            mesh = FakeMesh(peer_id, upstreams={DIGEST: model})
            self.mesh.tunnels[peer_id] = tunnel_to(TunnelApp(mesh), nursery, self.streams)
            of_fronts.append(Candidate(peer_id, False, "ranked", upstream=True))
        if here is not None:
            model = here.model(DIGEST)
            assert model is not None
            self.mesh.upstreams[DIGEST] = model
            of_fronts.append(Candidate("peer-a", True, "only", upstream=True))
        self.mesh.candidates = (*of_fronts, *self.mesh.candidates)

    async def post(self, body: bytes, path: str = CHAT, **headers: str):
        with trio.fail_after(HANG_S):
            response = await self.api.post(
                path, data=body, headers={"content-type": "application/json", **headers}
            )
            return response, await response.get_data()


def body_of(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, "messages": [], **fields}).encode()


# --- what is offered ----------------------------------------------------------------------------


async def test_a_server_is_offered_while_it_is_well():
    server = Server(models={"data": [{"id": OWN_NAME, "max_model_len": 8192}]})
    async with server.running(), running(server) as front:
        (offer,) = front.offers()
        assert (offer.name, offer.digest, offer.state) == (MODEL, DIGEST, "ready")
        assert (offer.context_tokens, offer.slots, offer.upstream) == (8192, 4, True)
        server.stop()
        await until(lambda: front.state == "failed")
        assert [each.state for each in front.offers()] == ["failed"]
        assert front.model(DIGEST) is None
        (row,) = front.snapshots()
        assert row.state == "failed"
        assert row.error == f"{server.url}: it takes no connection: Connection refused"
        again = Server(models=server.models, port=server.port)
        async with again.running():
            await until(lambda: front.state == "ready")
            assert front.model(DIGEST) is not None


async def test_a_server_that_was_never_there_is_shown_by_its_address():
    server = Server()
    async with server.running():
        pass
    async with running(server, state="failed") as front:
        assert front.offers() == ()
        assert front.snapshots()[0].name == MODEL


@pytest.mark.parametrize("host", ["a..b", f"{'x' * 64}.example"])
async def test_a_host_that_cannot_be_is_no_accident(host):
    with trio.fail_after(HANG_S), pytest.raises(PeerUnreachableError):
        async with Caller(f"http://{host}:1").ask("GET", "/v1/models"):
            pass


async def test_a_failure_is_told_in_a_sentence():
    class Garbling(Server):
        async def _reply(self, received, stream):
            await stream.send_all(b"x" * 50_000 + b"\r\n\r\n")

    async with Garbling().running() as server, running(server, state="failed") as front:
        assert len(front.snapshots()[0].error) < 300


def test_servers_and_keys_come_from_the_configuration(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    of_none = Config(tmp_path, upstream_key_file=keys)
    assert find_upstreams(of_none, "peer-b") == ()
    upstreams = ("http://127.0.0.1:1=one", "http://127.0.0.1:1=two")
    both = find_upstreams(Config(tmp_path, upstreams=upstreams, upstream_key_file=keys), "peer-b")
    assert [row.name for front in both for row in front.snapshots()] == ["one", "two"]
    with pytest.raises(ConfigError, match="cannot read"):
        find_upstreams(
            Config(tmp_path, upstreams=upstreams, upstream_key_file=tmp_path / "none"), "peer-b"
        )


async def test_llama_servers_context_is_asked_for():
    props = told(200, b'{"default_generation_settings":{"n_ctx":4096}}')
    async with Server(props=props).running() as server, running(server) as front:
        assert front.offers()[0].context_tokens == 4096


@pytest.mark.parametrize(
    ("models", "error"),
    [
        (b"<html>", "not a list of models"),
        (b" " * (5 * 1024 * 1024), "too long"),
        ({"data": []}, "lists 0 models, and none is words"),
    ],
)
async def test_a_server_that_lists_nonsense_is_down(models, error):
    async with (
        Server(models=models).running() as server,
        running(server, state="failed") as front,
    ):
        assert error in front.snapshots()[0].error


async def test_a_server_that_is_slow_for_once_stays(monkeypatch):
    monkeypatch.setattr(fronted_module, "LOOK_TIMEOUT_S", 0.05)
    asked = 0

    class Slow(Server):
        async def _reply(self, received, stream):
            nonlocal asked
            asked += received.path == "/v1/models"
            if asked == 2:
                await until_left(stream)
            await super()._reply(received, stream)

    async with Slow().running() as server, running(server) as front:
        states = set()
        while asked < 4:
            states.add(front.state)
            await trio.sleep(0.001)
        assert states == {"ready"}


async def test_a_key_goes_to_its_server_and_nowhere_else(caplog, nursery):
    async with Server().running() as server, running(server, key=KEY) as front:
        link = Front(nursery, front)
        await link.post(body_of(), authorization="Bearer the-clients")
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        assert "the-clients" not in str(server.requests)
        server.stop()
        await until(lambda: front.state == "failed")
        seen = f"{front.snapshots()}{front.offers()}{vars(front)}{caplog.text}"
        assert KEY not in seen


# --- what goes on -------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [True, False])
async def test_a_body_goes_on_as_it_came_but_for_its_model(nursery, far):
    async with Server().running() as server, running(server) as front:
        link = Front(nursery, front) if far else Front(nursery, here=front)
        sent = b'{"who knows":{"a" : 1.0e0, "a":2},  "model":"words","top_k":-7.50,"messages":9}'
        response, said = await link.post(sent)
        assert (response.status_code, said) == (200, WHOLE_BODY)
        (received,) = server.requests
        assert received.path == CHAT
        assert received.body == (
            b'{"who knows":{"a" : 1.0e0, "a":2},"model":"org/Words-1B","top_k":-7.50,"messages":9}'
        )
        assert received.headers["content-type"] == "application/json"
        assert received.headers["x-meshnode-via"] == ("peer-b")
        assert response.headers["x-meshnode-served-by"] == ("peer-b" if far else "peer-a")
        assert response.headers["x-meshnode-upstream"] == "1"


@pytest.mark.parametrize(
    ("body", "param"), [(b"[]", None), (b"{", None), (b'{"model":""}', "model")]
)
async def test_a_body_that_names_no_model_is_refused_here(nursery, body, param):
    async with Server().running() as server, running(server) as front:
        response, said = await Front(nursery, front).post(body)
        assert response.status_code == 400
        assert json.loads(said)["error"]["param"] == param or param is None
        assert not server.requests


async def test_turns_of_a_chat_have_one_session(nursery):
    async with Server().running() as server, running(server) as front:
        link = Front(nursery, front)
        parts = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {}}]
        first = [{"role": "user", "content": parts}]
        for messages in (first, [*first, {"role": "assistant", "content": None, "x": 1}]):
            await link.post(body_of(messages=messages))
        other = [{"role": "user", "content": "good-bye"}]
        await link.post(body_of(messages=other))
        one, two, three = link.mesh.sessions
        assert one == two != three


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank"])
async def test_vectors_and_ranks_pass_alike(nursery, path):
    async with Server().running() as server, running(server) as front:
        link = Front(nursery, front)
        response, said = await link.post(b'{"model":"words","input":[[1.5]],"odd":1}', path)
        assert (response.status_code, said) == (200, WHOLE_BODY)
        (received,) = server.requests
        assert received.path == path
        assert received.body == b'{"model":"org/Words-1B","input":[[1.5]],"odd":1}'


async def test_a_circle_of_nodes_is_seen(nursery):
    async with Server().running() as server, running(server) as front:
        link = Front(nursery, front)
        for via in ("peer-b", "peer-x,peer-b", "p,q,r,s"):
            response, said = await link.post(body_of(), **{"x-meshnode-via": via})
            assert response.status_code == 503
            assert json.loads(said)["error"]["code"] == "replicas_failed"
        assert not server.requests
        await link.post(body_of(), **{"x-meshnode-via": "peer-x"})
        assert server.requests[0].headers["x-meshnode-via"] == "peer-x,peer-b"
        response, _ = await link.post(body_of(), **{"x-meshnode-via": "no peer!"})
        assert response.status_code == 400


async def test_where_an_engine_has_the_bytes_too_requests_must_suit_it(nursery):
    async with Server().running() as server, running(server) as front:
        link = Front(nursery, front, c=WordEngine())
        messages = [{"role": "user", "content": "to be or"}]
        response, said = await link.post(body_of(messages=messages, who_knows=1))
        assert response.status_code == 400
        assert json.loads(said)["error"]["param"] == "who_knows"
        response, said = await link.post(body_of(messages=messages))
        assert (response.status_code, said) == (200, WHOLE_BODY)


# --- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize(
    "events", [EVENTS, EVENTS.replace(b"\n", b"\r\n"), EVENTS.removesuffix(b"\n\n"), b"data:x"]
)
async def test_a_stream_comes_back_to_the_byte(nursery, far, events):
    said = STREAM_HEAD + b"".join(chunk(bytes([b])) for b in events) + b"0\r\n\r\n"
    async with Server(says=said).running() as server, running(server) as front:
        link = Front(nursery, front) if far else Front(nursery, here=front)
        response, body = await link.post(body_of(stream=True))
        assert body == events
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("status", [400, 404, 422, 500, 502])
async def test_an_error_of_the_server_passes_with_its_body(nursery, status):
    said = told(status, b'{"detail":"it says so"}', more="retry-after: 7\r\nset-cookie: a=b\r\n")
    async with (
        Server(says=said).running() as server,
        Server().running() as other,
        running(server, other) as fronts,
    ):
        response, body = await Front(nursery, *fronts).post(body_of())
        assert (response.status_code, body) == (status, b'{"detail":"it says so"}')
        assert response.headers["retry-after"] == "7"
        assert "set-cookie" not in response.headers
        assert not other.requests


@pytest.mark.parametrize("status", [429, 503])
async def test_a_full_server_is_told_of_only_if_all_are(nursery, status):
    full = told(status, b'{"detail":"full"}', more="retry-after: 7\r\n")
    async with (
        Server(says=full).running() as server,
        Server().running() as other,
        running(server, other) as fronts,
    ):
        link = Front(nursery, *fronts)
        response, body = await link.post(body_of())
        assert (response.status_code, body) == (200, WHOLE_BODY)
        other.says = told(status, b'{"detail":"full, too"}')
        link.mesh.calls.clear()
        response, body = await link.post(body_of())
        assert (response.status_code, body) == (status, b'{"detail":"full"}')
        assert response.headers["retry-after"] == "7"
        assert ("refused", MODEL) in link.mesh.calls


def huge_head() -> bytes:
    return told(200, b"{}", more=f"x-much: {'x' * 4 * HEAD_BYTES_MAX}\r\n")


BROKEN = {
    "hangs up": b"",
    "not HTTP": b"220 mail.example.org ESMTP\r\n\r\n",
    "a huge head": huge_head(),
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-",
    "half an answer": WHOLE[:-5],
    "half an event": STREAM_HEAD + chunk(b'data: {"cho'),
    "an empty stream": STREAM_HEAD + b"0\r\n\r\n",
    "an endless event": STREAM_HEAD + chunk(b"data: " + b"x" * 1_100_000),
    "a redirect": told(307, b"", more="location: http://192.0.2.1/\r\n"),
    "our key refused": told(401, b'{"error":"bad key sk-a-***"}'),
}


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("how", BROKEN)
async def test_before_the_first_event_another_server_takes_over(nursery, how, far):
    async with (
        Server(says=BROKEN[how]).running() as server,
        Server(says=STREAM).running() as other,
        running(server, other) as (broken, sound),
    ):
        link = Front(nursery, broken, sound) if far else Front(nursery, here=broken)
        response, body = await link.post(body_of(stream=True))
        assert len(server.requests) == 1
        if far:
            assert (response.status_code, body) == (200, EVENTS)
            assert response.headers["x-meshnode-served-by"] == "peer-c"
        else:
            assert response.status_code == 503
            assert json.loads(body)["error"]["code"] == "replicas_failed"
            assert b"sk-a" not in body


@pytest.mark.parametrize("far", [True, False])
async def test_after_the_first_event_a_loss_is_told(nursery, far):
    first, rest = EVENTS[:80], EVENTS[80:120]
    says = STREAM_HEAD + chunk(first) + chunk(rest)
    async with Server(says=says).running() as server, running(server) as front:
        link = Front(nursery, front) if far else Front(nursery, here=front)
        _, body = await link.post(body_of(stream=True))
        *whole, last = body.removesuffix(b"\n\n").split(b"\n\n")
        assert EVENTS.startswith(b"\n\n".join(whole) + b"\n\n")
        assert len(whole) == 2
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["code"] == "replica_lost"


async def test_silence_ends_a_request(nursery):
    async def fall_silent(received, stream):
        await stream.send_all(STREAM_HEAD + chunk(EVENTS))
        await until_left(stream)

    async with (
        Server(answer=fall_silent).running() as server,
        running(server, idle_s=0.1) as front,
    ):
        _, body = await Front(nursery, front).post(body_of(stream=True))
        assert body.startswith(EVENTS)
        assert b"replica_lost" in body
        await until(lambda: server.left == 1)


async def test_no_server_goes_on_with_what_an_engine_began(nursery, monkeypatch):
    monkeypatch.setattr(answer_module, "RESUME_WITHIN_S", 0.5)
    async with Server(says=STREAM).running() as server, running(server) as front:
        link = Front(nursery, front, c=WordEngine(die_after=2, tells_ids=True))
        link.mesh.candidates = link.mesh.candidates[::-1]
        response, body = await link.ask(stream=True)
        assert response.headers["x-meshnode-served-by"] == "peer-c"
        assert b"replica_lost" in body
        assert not server.requests


@pytest.mark.parametrize("events", [EVENTS, EVENTS.replace(b"\n", b"\r\n")])
async def test_other_apis_are_translated(nursery, events):
    says = STREAM_HEAD + chunk(events) + b"0\r\n\r\n"
    async with Server(says=says).running() as server, running(server) as front:
        link = Front(nursery, front)
        asked = {"model": MODEL, "max_tokens": 5, "stream": True,
                 "messages": [{"role": "user", "content": "to be or"}]}  # fmt: skip
        _, body = await link.post(json.dumps(asked).encode(), "/v1/messages")
        texts = [json.loads(line[6:]).get("delta", {}).get("text")
                 for line in body.splitlines() if line.startswith(b"data: ")]  # fmt: skip
        assert "".join(filter(None, texts)) == "to be"
        assert b"message_stop" in body
        server.says = WHOLE
        _, body = await link.post(json.dumps({**asked, "stream": False}).encode(), "/v1/messages")
        assert json.loads(body)["content"][0]["text"] == "to be"


# --- bounds -------------------------------------------------------------------------------------


async def test_a_client_that_leaves_closes_the_request_at_once(nursery):
    async def go_on(received, stream):
        await stream.send_all(STREAM_HEAD + chunk(EVENTS))
        await until_left(stream)

    async with Server(answer=go_on).running() as server, running(server) as front:
        model = front.model(DIGEST)
        async with model.ask(CHAT, body_of(), ()) as answer:
            assert await anext(answer.body) == EVENTS
            assert front.offers()[0].slots_busy == 1
        assert front.in_flight == 0
        await until(lambda: server.left == 1)


async def test_a_slow_client_slows_the_server(nursery):
    sent = 0

    async def flood(received, stream):
        nonlocal sent
        await stream.send_all(STREAM_HEAD)
        while True:
            await stream.send_all(chunk(b"x" * 65_536))
            sent += 65_536

    async with (
        Server(answer=flood).running() as server,
        running(server) as front,
        front.model(DIGEST).ask(CHAT, body_of(), ()) as answer,
    ):
        await anext(answer.body)
        before = -1
        while sent != before:  # until it stands still
            before = sent
            await trio.sleep(0.1)
        assert sent < 32 * 2**20  # two sockets' buffers
        await anext(answer.body)


async def test_requests_beyond_the_bounds_are_refused(nursery, monkeypatch):
    monkeypatch.setattr(fronted_module, "WAITING_MAX", 1)
    go = trio.Event()

    async def wait(received, stream):
        await go.wait()
        await stream.send_all(WHOLE)

    async with Server(answer=wait).running() as server, running(server, slots=2) as front:
        model = front.model(DIGEST)
        done = []

        async def ask():
            async with model.ask(CHAT, body_of(), ()) as answer:
                done.append(b"".join([part async for part in answer.body]))

        async with trio.open_nursery() as asking:
            for _ in range(3):
                asking.start_soon(ask)
            await until(lambda: len(server.requests) == 2)
            (offer,) = front.offers()
            assert (offer.slots, offer.slots_busy, offer.queue_depth) == (2, 2, 1)
            with pytest.raises(EngineBusyError):
                await ask()
            response, said = await Front(nursery, front).post(body_of())
            assert response.status_code == 503
            assert json.loads(said)["error"]["state"] == "busy"
            assert len(server.requests) == 2
            go.set()
        assert done == [WHOLE_BODY] * 3
        assert front.in_flight == 0


async def test_connections_are_kept(nursery):
    async with Server().running() as server, running(server) as front:
        opened = 0
        original = trio.open_tcp_stream

        async def counted(*args, **kwargs):
            nonlocal opened
            opened += 1
            return await original(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trio, "open_tcp_stream", counted)
            for _ in range(3):
                await Front(nursery, front).post(body_of())
        assert len(server.requests) == 3
        assert opened <= 1


# --- TLS ----------------------------------------------------------------------------------------


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that has signed itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(built.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


async def test_certificates_are_checked(tmp_path, monkeypatch):
    cert, key = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)

    class Encrypted(Server):
        url = property(lambda self: f"https://127.0.0.1:{self.port}")

    async with Encrypted().running(context) as server:
        async with running(server, state="failed") as front:
            assert "self-signed certificate" in front.snapshots()[0].error
            assert not server.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        async with (
            running(server) as front,
            front.model(DIGEST).ask(CHAT, body_of(), ()) as answer,
        ):
            assert [part async for part in answer.body] == [WHOLE_BODY]
