"""The processes that are measured.

    python -m tests.bench.hop.serve node --data-dir DIR --json    a whole node, paced engine added
    python -m tests.bench.hop.serve bare --data-dir DIR --json    the same stream from a bare app

Each prints one line of JSON with its `api_url` and serves until it is ended.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import AsyncIterator

import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve
from quart import request
from quart_trio import QuartTrio

from meshnode.cli.foreground import run_in_foreground
from meshnode.cli.logs import set_up_logging
from meshnode.config import Config, load
from meshnode.engine import Finish
from meshnode.engine.memory import memory_budget_bytes
from meshnode.gateway.door import open_door
from meshnode.gateway.openai import Encoder, decode_chat
from meshnode.hosted import find_models
from meshnode.membership import find_membership
from meshnode.node import Node, NodeInfo
from meshnode.store import DataDir
from tests.bench.hop.engine import MODEL, PacedEngine, PacedModel

NODE_FLAGS = {
    "api": "127.0.0.1:0",
    "listen": ("/ip4/127.0.0.1/udp/0/quic-v1",),
    "no-mdns": True,
    "context": 2048,
    "log-level": "warning",
}
FIELDS = ("model", "messages", "stream", "max_tokens")


async def run_node(
    config: Config, *, task_status: trio.TaskStatus[NodeInfo] = trio.TASK_STATUS_IGNORED
) -> None:
    """`meshnode.node.run_node` with one model more."""
    data = DataDir(config.data_dir)
    with data.locked():
        key = data.key()
        membership = await find_membership(config, data, key)
        models = (PacedModel(), *find_models(config))
        memory_bytes = memory_budget_bytes(config.memory_bytes)
        node = Node(config, data, key, membership, models, memory_bytes, open_door(config))
        await node.run(task_status=task_status)


def bare_app() -> QuartTrio:
    """The least that quart-trio needs to stream the same bytes."""
    app = QuartTrio("bare", static_folder=None)
    engine = PacedEngine()

    @app.post("/v1/chat/completions")
    async def chat() -> tuple[AsyncIterator[bytes], int, dict[str, str]]:
        # Routers add fields of their own.
        asked = json.loads(await request.get_data(as_text=False))
        call = decode_chat(json.dumps({name: asked[name] for name in FIELDS}).encode())
        encoder = Encoder(call, "0" * 24, "", int(time.time()))

        async def body() -> AsyncIterator[bytes]:
            opening = encoder.opening()
            async with engine.generate(call.request("", b"")) as events:
                async for event in events:
                    if isinstance(event, Finish):
                        yield encoder.closing(event)
                    else:
                        yield opening + encoder.delta(event.text)
                        opening = b""

        return body(), 200, {"content-type": "text/event-stream"}

    @app.get("/health")
    @app.get("/v1/models")
    async def alive() -> dict[str, object]:
        """What a router asks before it sends anything."""
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    return app


async def run_bare() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        config = HypercornConfig()
        config.bind = [f"fd://{listening.fileno()}"]
        url = "http://{}:{}".format(*listening.getsockname())
        print(json.dumps({"event": "started", "api_url": url}), flush=True)
        await serve(bare_app(), config, mode="asgi")


def main() -> None:
    kind, _, data_dir, _ = sys.argv[1:]
    if kind == "bare":
        trio.run(run_bare)
        return
    set_up_logging("json", "warning")
    config = load({"data-dir": data_dir, **NODE_FLAGS}, {}, None)
    run_in_foreground(run_node, config, as_json=True)


if __name__ == "__main__":
    main()
