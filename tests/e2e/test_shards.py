"""A shard from the command that makes it to its answers: two owners, and a gateway before them.

The nodes run in this process, their engines in others, so that what the nodes say to each other can
be counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio

from meshnode.config import Config
from meshnode.driver import CONTROL_PROTOCOL
from meshnode.identity import PeerId
from meshnode.node import HTTP_PROTOCOL, NodeInfo, run_node
from meshnode.transport import Stream
from meshnode.transport.libp2p import Libp2pHost
from tests.e2e import agreed
from tests.e2e.mesh import HANG_S, POLL_S, Json, run_command, serves

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "tiny-moe.Q8_0.gguf"
SHARD = "moe~16of32"
LISTEN = ("/ip4/127.0.0.1/udp/0/quic-v1",)
SESSIONS = 12
"""With two owners, all twelve go to the same one once in two thousand meshes; the keys of this test
are new each time."""


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as an operator makes it, of short texts."""
    folder = tmp_path_factory.mktemp("shard")
    for name in ("calibration", "held-out"):
        text = (ROOT / "meshnode" / "models" / "texts" / f"{name}.txt").read_text()
        (folder / f"{name}.txt").write_text(text[:4000])
    place = folder / f"{SHARD}.gguf"
    code, said, why = run_command(
        *("models", "shard", str(MODEL), "--experts", "16", "--out", str(place), "--json"),
        *("--calibration", str(folder / "calibration.txt")),
        *("--held-out", str(folder / "held-out.txt")),
        *("--data-dir", str(folder / "data")),
    )
    assert code == 0, why
    told = json.loads(said)
    assert told["path"] == str(place)
    assert (told["receipt"]["kept"], told["receipt"]["of"]) == (16, 32)
    return place


@dataclass(frozen=True)
class Said:
    status: int
    headers: Mapping[str, str]
    body: Json


class Api:
    """A node's API."""

    def __init__(self, info: NodeInfo) -> None:
        self.peer_id = info.peer_id
        self._url = info.api_url

    async def ask(
        self, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Said:
        return await trio.to_thread.run_sync(partial(self._ask, path, body, headers or {}))

    def _ask(self, path: str, body: object, headers: Mapping[str, str]) -> Said:
        parts = urlsplit(self._url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=HANG_S)
        try:
            data = None if body is None else json.dumps(body).encode()
            sent = {"content-type": "application/json", **headers}
            connection.request("GET" if body is None else "POST", path, data, sent)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Said(response.status, found, json.loads(response.read()))
        finally:
            connection.close()

    async def until(self, path: str, holds: Callable[[Json], Any]) -> None:
        while not holds((await self.ask(path)).body):
            await trio.sleep(POLL_S)


@asynccontextmanager
async def nodes(folder: Path, shard: Path) -> AsyncIterator[tuple[Api, Api, Api]]:
    """Two owners of the shard, and a gateway; everybody knows it all."""

    def config(name: str, **changes: Any) -> Config:
        return Config(
            folder / name, listen=LISTEN, mdns=False, api="127.0.0.1:0", context_tokens=256,
            **{"models": (str(shard),), **changes},
        )  # fmt: skip

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            first = Api(await nursery.start(run_node, config("first")))
            tokens = [
                (await first.ask("/api/invite", {"uses": 1, "role": role})).body["token"]
                for role in ("node", "gateway")
            ]
            second = Api(await nursery.start(run_node, config("second", join=tokens[0])))
            gate = Api(
                await nursery.start(
                    run_node, config("gate", join=tokens[1], models=(), role="gateway")
                )
            )
            owners = {first.peer_id, second.peer_id}
            # Requests prefer owners that the mesh has decided on: so let it have decided.
            for api in (first, second, gate):
                await api.until(
                    "/api/status",
                    lambda said: (
                        serves(said, SHARD) == owners
                        and set(agreed.owners(said, SHARD, "serving")) == owners
                    ),
                )
            yield first, second, gate
            nursery.cancel_scope.cancel()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """By peer and protocol: the streams to it that nodes have opened."""
    counted: Counter[tuple[str, str]] = Counter()
    open_stream = Libp2pHost.open_stream

    async def count(host: Libp2pHost, peer: PeerId, protocol: str) -> Stream:
        counted[peer, protocol] += 1
        return await open_stream(host, peer, protocol)

    monkeypatch.setattr(Libp2pHost, "open_stream", count)
    return counted


async def test_owners_of_a_shard_answer_alone_and_say_what_they_are(
    tmp_path: Path, shard: Path, opened: Counter[tuple[str, str]]
) -> None:
    receipt = json.loads((shard.parent / f"{shard.name}.receipt.json").read_bytes())
    kl = receipt["receipt"]["quality"]["kl"]
    question = {"model": SHARD, "prompt": "And the LORD said", "max_tokens": 8, "temperature": 0}
    async with nodes(tmp_path, shard) as (first, second, gate):
        (row,) = (await gate.ask("/v1/models")).body["data"]
        assert row["id"] == SHARD
        about = row["meshnode"]["approximate"]
        assert (about["kl"], about["kept"], about["of"]) == (kl, 16, 32)
        assert about["measured_by"] == receipt["signer"]
        (listed,) = (await gate.ask("/api/status")).body["mesh_models"]
        assert listed["approximate"] == about

        opened.clear()
        texts, served = set(), {}
        for turn in range(2):
            for session in range(SESSIONS):
                headers = {"x-session-id": f"session {session}"}
                said = await gate.ask("/v1/completions", question, headers)
                assert said.status == 200, said
                assert said.headers["x-meshnode-route"] == "tunnel"
                assert said.headers["x-meshnode-approximate"] == (
                    f"kl={kl:.3g}; agree={about['agreement']:.3g}; experts=16/32"
                )
                texts.add(said.body["choices"][0]["text"])
                by = said.headers["x-meshnode-served-by"]
                assert served.setdefault(session, by) == by, f"turn {turn} went elsewhere"
        # Sessions are spread over the owners and stay; each owner answers by itself.
        assert set(served.values()) == {first.peer_id, second.peer_id}
        assert len(texts) == 1
        from_gate = {(api.peer_id, HTTP_PROTOCOL) for api in (first, second)}
        others = {key for key in opened if key[1] != CONTROL_PROTOCOL}
        assert others == from_gate, "owners opened streams to each other"
        # One for each owner, kept open: all of them are the gateway's.
        assert all(opened[key] == 1 for key in from_gate)

        exact = {"x-meshnode-exact": "required"}
        said = await gate.ask("/v1/completions", question, exact)
        assert (said.status, said.body["error"]["code"]) == (400, "approximate_only")
        # No name of the whole model means the part of it.
        for name in ("moe", "moe~", "tiny-moe.q8_0", "default"):
            said = await gate.ask("/v1/completions", {**question, "model": name})
            assert (said.status, said.body["error"]["code"]) == (404, "model_not_found")
