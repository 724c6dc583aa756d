"""Node A without an engine, and peers with one each, linked by in-memory streams."""

from __future__ import annotations

import json

import trio

from meshnode.gateway import Candidate
from meshnode.gateway.app import create_api_app
from meshnode.gateway.tunnel import TunnelApp
from tests.fakes import MODEL, FakeMesh, local_mesh, tunnel_to

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "to be or"}]}
HANG_S = 20.0


class Link:
    """Node A without an engine, and peers with one each, reached over in-memory streams."""

    def __init__(self, nursery, **engines):
        self.engines = engines
        self.streams = []
        self.meshes = {}
        candidates = []
        self.mesh = FakeMesh("peer-a")
        for name, engine in engines.items():
            peer_id = f"peer-{name}"
            self.meshes[name] = local_mesh(engine, peer_id)
            app = TunnelApp(self.meshes[name])
            self.mesh.tunnels[peer_id] = tunnel_to(app, nursery, self.streams)
            candidates.append(Candidate(peer_id, False, "ranked"))
        self.mesh.candidates = tuple(candidates)
        self.api = create_api_app(self.mesh).test_client()

    async def ask(self, path="/v1/chat/completions", headers=None, **changes):
        with trio.fail_after(HANG_S):
            response = await self.api.post(path, json={**CHAT, **changes}, headers=headers)
            return response, await response.get_data()


def text_of(body: bytes) -> str:
    """The text of a streamed chat, up to its end or its error."""
    texts = []
    for event in body.decode().split("\n\n"):
        if event.startswith("data: {"):
            chunk = json.loads(event.removeprefix("data: "))
            if "error" not in chunk:
                texts.append(chunk["choices"][0]["delta"].get("content", ""))
    return "".join(texts)
