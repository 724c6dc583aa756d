"""A small honest HTTP server that answers like a running node. Not a test itself."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from meshnode.console.requests import OrderGiven
from meshnode.console.snapshot import (
    GroupSnapshot,
    ItemSnapshot,
    MeshModelSnapshot,
    MeshSnapshot,
    ModelSnapshot,
    OfferSnapshot,
    OrderSnapshot,
    PeerSnapshot,
    Snapshot,
    TroubleSnapshot,
    VoterSnapshot,
)

OWN = "12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf"
PEER = "12D3KooWBqBBmSvu8KfwkmDBAqVXLuqVKfubqVmSNGfqiQTruNuB"
GONE = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
DIGEST = "ab" * 32
GROUP = "5f" * 16


def group_of(*items: ItemSnapshot) -> GroupSnapshot:
    """Three voters, of which one is gone."""
    return GroupSnapshot(
        id=GROUP,
        epoch=17,
        faults="crash",
        voters=(VoterSnapshot(OWN, True), VoterSnapshot(PEER, True), VoterSnapshot(GONE, False)),
        quorum=2,
        leader=PEER,
        votes=True,
        abstains=False,
        deciding=False,
        view=1,
        items=items,
        claims=(),
        orders=(),
        lease_s=0.0,
        trouble=(TroubleSnapshot("1 of 3 voters do not answer", "nothing to do"),),
    )


def an_item(owner: str = OWN, state: str = "serving", **changes: Any) -> ItemSnapshot:
    item = ItemSnapshot(DIGEST, "small", 0, "", owner, (PEER,), state, 300 * 1024 * 1024)
    return msgspec.structs.replace(item, **changes)


def snapshot_of(api_url: str) -> Snapshot:
    """A node with one model and one peer; the peer's words try to take over the terminal."""
    return Snapshot(
        peer_id=OWN,
        mesh=MeshSnapshot("home", "0" * 32, "invite"),
        role="node",
        version="0.1.0",
        uptime_s=93784.0,
        api_url=api_url,
        addrs=(f"/ip4/192.0.2.1/udp/9338/quic-v1/p2p/{OWN}",),
        ready=True,
        reason="ready",
        models=(
            ModelSnapshot(
                "small", DIGEST, "ready", 1.0, None, 8, 3, 2, 8192, 412.3, 38.71, 190 * 1024 * 1024
            ),
            ModelSnapshot("big", "", "failed", 0.0, "big.gguf is cut off", 0, 0, 0, 0, 0.0, 0.0, 0),
        ),
        peers=(
            PeerSnapshot(
                PEER,
                ("node",),
                ("/ip4/192.0.2.2/udp/9338/quic-v1",),
                1.234,
                -7.2,
                (OfferSnapshot("small", DIGEST, "loading"),),
                16 * 1024**3,
                8,
                "\x1b[31mred[bold]",
            ),
        ),
        mesh_models=(
            MeshModelSnapshot("big", "cd" * 32, "failed", 0, ()),
            MeshModelSnapshot("small", DIGEST, "ready", 8192, (OWN, PEER)),
        ),
        groups=(group_of(an_item()),),
        refused={"forged": 2},
        dht_peers=5,
        warnings=("this machine's clock is 90 s behind its peers'",),
    )


class FakeNode(ThreadingHTTPServer):
    """Answers /api/ and streamed chats; keeps what it was asked.

    An order is decided in the next status, unless it `decides` nothing.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.snapshot = snapshot_of(self.url)
        self.pieces: tuple[str, ...] = ("Hel", "lo \x1b[2J", "there")
        self.ends_with: tuple[bytes, ...] = (
            b'data: {"choices":[],"usage":{"prompt_tokens":20,"completion_tokens":3,'
            b'"prompt_tokens_details":{"cached_tokens":12}}}',
            b"data: [DONE]",
        )
        self.go_on = threading.Event()
        """Set: an answer ends. Cleared: it hangs after its pieces."""
        self.go_on.set()
        self.asked: list[dict[str, Any]] = []
        self.decides = True
        self.answers: dict[str, tuple[int, object]] = {}
        """What it says to a GET or POST of a path, where a test wants something special."""
        self.key: str | None = None
        """The API key it asks for, if any."""

    def order(self, asked: dict[str, Any]) -> object:
        """Put an order into the register, as a mesh would."""
        (group,) = self.snapshot.groups
        digest = DIGEST if asked.get("model") else ""
        action = asked["action"].removeprefix("un")
        kept = tuple(
            order for order in group.orders
            if (order.action, order.subject, order.peer) != (action, digest, PEER)
        )  # fmt: skip
        is_decided = (kept != group.orders) is (action == asked["action"])
        given = OrderGiven(asked["action"], digest, "small", PEER, GROUP, group.epoch, is_decided)
        if self.decides and not is_decided:
            if action == asked["action"]:
                kept += (OrderSnapshot(action, digest, "small", PEER, OWN),)
            moved = an_item(PEER, "loading", replica=1, standbys=())
            group = msgspec.structs.replace(
                group, epoch=group.epoch + 1, orders=kept, items=(*group.items, moved)
            )
            self.snapshot = msgspec.structs.replace(self.snapshot, groups=(group,))
        return given


class _Handler(BaseHTTPRequestHandler):
    server: FakeNode

    def log_message(self, format: str, *args: object) -> None:
        """Tests read stderr."""

    def do_GET(self) -> None:
        if self.path in self.server.answers:
            status, answer = self.server.answers[self.path]
            self._reply(status, msgspec.json.encode(answer))
        elif self.path == "/api/status":
            self._reply(200, msgspec.json.encode(self.server.snapshot))
        else:
            self._reply(404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        key, shown = self.server.key, self.headers["authorization"]
        if key is not None and self.path.startswith("/v1/") and shown != f"Bearer {key}":
            error = {"message": "This API key is not known here.", "code": "invalid_api_key"}
            self._reply(401, json.dumps({"error": error}).encode())
            return
        self.server.asked.append(body)
        if self.path in self.server.answers:
            status, answer = self.server.answers[self.path]
            self._reply(status, msgspec.json.encode(answer))
        elif self.path == "/api/orders":
            self._reply(200, msgspec.json.encode(self.server.order(body)))
        elif self.path == "/api/invite":
            self._reply(200, b'{"token": "mesh1.abc", "expires_at": 1800000000}')
        elif body["model"] != "small":
            error = {"message": "The model `x` does not exist in this mesh.", "code": "nope"}
            self._reply(404, json.dumps({"error": error}).encode())
        else:
            self._stream()

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-meshnode-served-by", PEER)
        self.send_header("x-meshnode-route", "tunnel")
        self.end_headers()
        for piece in self.server.pieces:
            event = {"choices": [{"index": 0, "delta": {"content": piece}}]}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.server.go_on.wait()
        for line in self.server.ends_with:
            self.wfile.write(line + b"\n\n")

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
