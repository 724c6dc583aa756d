"""python -m tests.bench.engine.serve MODEL THREADS --data-dir DIR --json

A whole node as `meshnode serve` runs it, but for its engine's threads, which no flag fixes.
"""

from __future__ import annotations

import sys

import trio

from meshnode.cli.foreground import run_in_foreground
from meshnode.cli.logs import set_up_logging
from meshnode.config import Config, load
from meshnode.engine.process import EngineOptions
from meshnode.gateway.door import open_door
from meshnode.hosted import HostedModel
from meshnode.membership import find_membership
from meshnode.models.catalog import resolve
from meshnode.node import Node, NodeInfo
from meshnode.store import DataDir
from tests.bench.engine.servers import CONTEXT_TOKENS, SLOTS
from tests.e2e.mesh import MODEL_NAME


def main() -> None:
    model, threads, _, data_dir, _ = sys.argv[1:]
    set_up_logging("json", "warning")
    flags = {
        "data-dir": data_dir,
        "api": "127.0.0.1:0",
        "listen": ("/ip4/127.0.0.1/udp/0/quic-v1",),
        "no-mdns": True,
    }
    options = EngineOptions(CONTEXT_TOKENS, SLOTS, threads=int(threads))

    async def run_node(
        config: Config, *, task_status: trio.TaskStatus[NodeInfo] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """`meshnode.node.run_node` with this one model."""
        data = DataDir(config.data_dir)
        with data.locked():
            key = data.key()
            membership = await find_membership(config, data, key)
            source = resolve(f"{model}={MODEL_NAME}", config.data_dir)
            models = (HostedModel(source, config.data_dir, options),)
            node = Node(config, data, key, membership, models, open_door(config))
            await node.run(task_status=task_status)

    run_in_foreground(run_node, load(flags, {}, None), as_json=True)


if __name__ == "__main__":
    main()
