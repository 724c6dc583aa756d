"""Whoever has no right gets nothing, and whoever has one cannot speak for others."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio

from meshnode.credentials import MeshDescriptor, issue_certificate, parse_invite
from meshnode.driver import CONTROL_PROTOCOL
from meshnode.identity import KeyPair, PeerId, seal
from meshnode.joining import join_mesh
from meshnode.messages import (
    MESSAGE_BYTES_MAX,
    Advert,
    Control,
    GetPeers,
    Hello,
    Message,
    NodeRecord,
    Peers,
    Refused,
    Welcome,
    decode,
    encode,
)
from meshnode.node import HTTP_PROTOCOL
from meshnode.store import DataDir, Membership
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame
from meshnode.transport.libp2p import HostEvents, Libp2pHost, split_peer
from tests.e2e.mesh import MODEL_NAME, QUESTION, Mesh, NodeProcess, chat, run_command

HANG_S = 30.0
CHAT_PATH = "/v1/chat/completions"
LISTEN = "/ip4/127.0.0.1/udp/0/quic-v1"
RECORD = ("meshnode-record", b"/meshnode/node-record/1")
ADVERT = ("meshnode-record", b"/meshnode/advert/1")
FOREIGN = "0" * 32


@pytest.fixture(scope="module")
def node(module_mesh: Mesh) -> NodeProcess:
    return module_mesh.node("victim").wait_ready()


class Impostor:
    """A peer that speaks our protocols and can lie in every field."""

    def __init__(self, key: KeyPair, mesh: MeshDescriptor, chain: tuple[bytes, ...]) -> None:
        events = HostEvents(connected=lambda peer: None, disconnected=lambda peer, reason: None)
        self.key = key
        self.mesh = mesh
        self.chain = chain
        self.host = Libp2pHost(key.seed, (LISTEN,), events)
        self._to_heard, self._heard = trio.open_memory_channel[Message](100)
        self.host.handle(CONTROL_PROTOCOL, self._listen, members_only=False)
        self.victim = PeerId("")

    @asynccontextmanager
    async def connected(self, node: NodeProcess) -> AsyncIterator[Stream]:
        """The control stream towards `node`, before anything was said."""
        self.victim, address = split_peer(node.addrs[0])
        with trio.fail_after(HANG_S):
            async with self.host.running():
                await self.host.dial(self.victim, (address,))
                async with await self.host.open_stream(self.victim, CONTROL_PROTOCOL) as stream:
                    yield stream

    async def heard(self, kind: type[Message]) -> Message:
        """The next message of this kind."""
        async for message in self._heard:
            if isinstance(message, kind):
                return message
        raise AssertionError("unreachable: the channel stays open")

    async def _listen(self, stream: Stream) -> None:
        while (frame := await receive_frame(stream, MESSAGE_BYTES_MAX)) is not None:
            await self._to_heard.send(decode(frame, cast(type[Control], Control)))

    def hello(self) -> bytes:
        return encode(
            Hello(
                version=1,
                mesh=self.mesh.mesh_id,
                chain=self.chain,
                unix_ms=int(time.time() * 1000),
            )
        )

    def welcome(self) -> bytes:
        advert = seal(self.key, *ADVERT, encode(self._advert()))
        return encode(Welcome(self.record(1), advert))

    async def become_member(self, control: Stream) -> None:
        """The honest handshake."""
        await send_frame(control, self.hello())
        await self.heard(Welcome)
        advert = seal(self.key, *ADVERT, encode(self._advert()))
        await send_frame(control, encode(Welcome(self.record(1), advert)))

    def record(self, sequence: int, *, mesh: str = "", age_s: int = 0) -> bytes:
        return seal(
            self.key,
            *RECORD,
            encode(
                NodeRecord(
                    mesh=mesh or self.mesh.mesh_id,
                    sequence=sequence,
                    issued_at=int(time.time()) - age_s,
                    ttl_s=60,
                    addrs=("/ip4/127.0.0.1/udp/9/quic-v1",),
                    roles=("node",),
                    models=(),
                )
            ),
        )

    def _advert(self) -> Advert:
        return Advert(
            mesh=self.mesh.mesh_id,
            sequence=1,
            ttl_s=60,
            offers=(),
            demand=(),
            memory_bytes=1,
            cores=1,
            accelerator="",
        )

    async def ask_through_tunnel(self, method: str, path: str, body: bytes = b"") -> bytes:
        """What comes back for one tunnelled request; nothing if the stream is refused."""
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: meshnode\r\nconnection: close\r\n"
            f"x-meshnode-hops: 1\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        answer = bytearray()
        async with await self.host.open_stream(self.victim, HTTP_PROTOCOL) as stream:
            try:
                await stream.send_all(head.encode() + body)
                while data := await stream.receive_some():
                    answer += data
            except trio.BrokenResourceError:
                pass  # refused; what came before counts
        return bytes(answer)


async def membership_of(node: NodeProcess, key: KeyPair, folder: Path) -> Membership:
    """An honest one, by an invitation."""
    token = await trio.to_thread.run_sync(node.invite)
    return await join_mesh(key, parse_invite(token), DataDir(folder))


def refusals(status: dict[str, object], reason: str) -> int:
    counts = cast(dict[str, int], status["refused"])
    return sum(count for why, count in counts.items() if reason in why)


# --- no certificate, or not a good one --------------------------------------------------------


def test_a_mesh_of_the_same_name_is_another_mesh(module_mesh: Mesh, node: NodeProcess) -> None:
    stranger = module_mesh.gateway("stranger", "--bootstrap", node.addrs[0]).wait_started()
    assert stranger.started["mesh"] == node.started["mesh"] == "home"
    node.wait_until(lambda status: refusals(status, "of another mesh"))
    stranger.wait_until(lambda status: status["refused"])
    assert not node.peers()
    assert not stranger.peers()
    assert stranger.request("GET", "/v1/models").body["data"] == []
    assert stranger.request("POST", CHAT_PATH, chat("Hello")).status == 404
    assert "Paris" in node.ask(QUESTION).text
    stranger.end()


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        ("none", "no membership certificate"),
        ("stolen", "certificate is of another peer"),
        ("home-made", "does not lead to this mesh's root key"),
    ],
)
async def test_without_a_right_nothing_is_served(
    node: NodeProcess, tmp_path: Path, certificate: str, reason: str
) -> None:
    honest, key = KeyPair.from_seed(b"h" * 32), KeyPair.from_seed(certificate.ljust(32).encode())
    member = await membership_of(node, honest, tmp_path)
    chain: tuple[bytes, ...] = ()
    if certificate == "stolen":
        chain = member.chain
    elif certificate == "home-made":
        now = int(time.time())
        chain = (issue_certificate(key, member.mesh, key.peer_id, ("node", "issuer"), now),)
    before = await trio.to_thread.run_sync(node.status)
    impostor = Impostor(key, member.mesh, chain)
    async with impostor.connected(node) as control:
        answers: list[bytes] = []

        async def ask() -> None:
            body = b'{"model":"small","messages":[{"role":"user","content":"Hello"}]}'
            answers.append(await impostor.ask_through_tunnel("POST", CHAT_PATH, body))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await send_frame(control, impostor.hello())
            refused = await impostor.heard(Refused)
        assert isinstance(refused, Refused)
        assert reason in refused.reason
        assert answers == [b""]
    status = await trio.to_thread.run_sync(node.status)
    assert refusals(status, reason) == refusals(before, reason) + 1
    assert key.peer_id not in {peer["peer_id"] for peer in status["peers"]}


async def test_no_word_before_the_handshake(node: NodeProcess, tmp_path: Path) -> None:
    """A stranger that asks for the members instead of greeting is hung up on, with no answer."""
    honest, key = KeyPair.from_seed(b"h" * 32), KeyPair.from_seed(b"r" * 32)
    member = await membership_of(node, honest, tmp_path)
    impostor = Impostor(key, member.mesh, ())
    async with impostor.connected(node) as control:
        await send_frame(control, encode(GetPeers(10)))
        await impostor.heard(Hello)
        while impostor.host.peers():
            await trio.sleep(0.05)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.2):
            await impostor.heard(Peers)


def multistream(line: bytes) -> bytes:
    """A line of multistream-select: its length, and itself."""
    return bytes([len(line) + 1]) + line + b"\n"


@pytest.mark.parametrize("security", [b"/plaintext/2.0.0", b"/secio/1.0.0"])
def test_nobody_is_believed_without_a_proof(mesh: Mesh, security: bytes) -> None:
    """Over TCP a peer could ask for a protocol in which it merely states its identity."""
    node = mesh.gateway("victim", listen="/ip4/127.0.0.1/tcp/0").wait_started()
    _, _, host, _, port, *_ = node.addrs[0].split("/")
    with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
        connection.sendall(multistream(b"/multistream/1.0.0") + multistream(security))
        file = connection.makefile("rb")
        assert file.readline() == multistream(b"/multistream/1.0.0")
        assert file.readline() == multistream(b"na")
        connection.sendall(multistream(b"/noise"))
        assert file.readline() == multistream(b"/noise")


# --- members that lie -----------------------------------------------------------------------------


async def test_forged_records_are_refused_and_counted(
    module_mesh: Mesh, node: NodeProcess, tmp_path: Path
) -> None:
    invited = await trio.to_thread.run_sync(node.invite)
    other = module_mesh.gateway("other", "--join", invited)
    await trio.to_thread.run_sync(other.wait_started)
    sees_other = lambda status: other.peer_id in str(status["peers"])  # noqa: E731
    await trio.to_thread.run_sync(node.wait_until, sees_other)

    key = KeyPair.from_seed(b"m" * 32)
    member = await membership_of(node, key, tmp_path)
    impostor = Impostor(key, member.mesh, member.chain)
    async with impostor.connected(node) as control:
        await send_frame(control, impostor.hello())
        await impostor.heard(Welcome)
        await send_frame(control, impostor.welcome())
        await send_frame(control, encode(GetPeers(10)))
        told = await impostor.heard(Peers)
        assert isinstance(told, Peers)
        # The honest record of `other`, with its port changed: the signature does not fit.
        port = other.addrs[0].split("/")[4].encode()
        honest = next(record for record in told.records if port in record)
        forged = honest.replace(port, b"1" * len(port))
        lies = (
            forged,
            impostor.record(2, mesh=FOREIGN),
            impostor.record(3, age_s=24 * 3600),
            impostor.record(0),
        )
        await send_frame(control, encode(Peers(lies)))
        for reason in ("forged", "foreign mesh", "expired", "rolled back"):
            await trio.to_thread.run_sync(
                node.wait_until,
                lambda status, reason=reason: refusals(status, f"record: {reason}"),
            )
        status = await trio.to_thread.run_sync(node.status)
        rows = {peer["peer_id"]: peer["addrs"] for peer in status["peers"]}
        assert rows[other.peer_id] == [addr.partition("/p2p/")[0] for addr in other.addrs]
        assert key.peer_id in rows, "it is a member; only its lies were refused"
    assert (await trio.to_thread.run_sync(other.ask)).served_by == node.peer_id
    other.end()


async def test_members_reach_no_management_through_the_tunnel(
    node: NodeProcess, tmp_path: Path
) -> None:
    key = KeyPair.from_seed(b"q" * 32)
    member = await membership_of(node, key, tmp_path)
    impostor = Impostor(key, member.mesh, member.chain)
    async with impostor.connected(node) as control:
        await send_frame(control, impostor.hello())
        await impostor.heard(Welcome)
        await send_frame(control, impostor.welcome())
        for method, path in (
            ("GET", "/api/status"),
            ("POST", "/api/invite"),
            ("GET", "/v1/models"),
        ):
            answer = await impostor.ask_through_tunnel(method, path)
            assert answer.startswith(b"HTTP/1.1 404 "), answer


# --- tokens -----------------------------------------------------------------------------------


def join(folder: Path, token: str) -> tuple[int, str]:
    """What a newcomer with this token sees: exit code and standard error."""
    where = ("--listen", LISTEN, "--api", "127.0.0.1:0", "--no-mdns", "--data-dir", str(folder))
    code, _, stderr = run_command("client", *where, env={"MESHNODE_JOIN": token})
    assert "Traceback" not in stderr
    return code, stderr


def test_tokens_that_are_none(node: NodeProcess, tmp_path: Path) -> None:
    token = node.invite()
    middle = len(token) // 2
    altered = token[:middle] + ("A" if token[middle] != "A" else "B") + token[middle + 1 :]
    for wrong, said in (
        ("hello", "not an invitation token"),
        (token[: len(token) // 2], "damaged"),
        (altered, "token"),
    ):
        code, stderr = join(tmp_path, wrong)
        assert code == 2, stderr
        assert said in stderr
        assert token[30:60] not in stderr, "a credential is never shown"


def test_token_is_used_up(module_mesh: Mesh, node: NodeProcess, tmp_path: Path) -> None:
    token = node.invite(uses=1)
    first = module_mesh.gateway("first", "--join", token).wait_started()
    code, stderr = join(tmp_path, token)
    assert code == 2
    assert "used up" in stderr
    # Whoever has joined does not need it any more: the same command works again.
    assert first.terminate() == 0
    again = module_mesh.gateway("again", "--join", token, data_dir=first.data_dir)
    again.wait_started()
    again.wait_until(lambda status: node.peer_id in str(status["peers"]))
    assert again.ask("Hello", model=MODEL_NAME).served_by == node.peer_id
    again.end()


def test_token_of_a_node_that_is_away(node: NodeProcess, tmp_path: Path) -> None:
    away = "/ip4/127.0.0.1/udp/9/quic-v1"
    code, token, stderr = run_command("invite", "--addr", away, "--data-dir", str(node.data_dir))
    assert code == 0, stderr
    code, stderr = join(tmp_path, token.strip())
    assert code == 2
    assert "cannot reach the node" in stderr
    assert away in stderr
