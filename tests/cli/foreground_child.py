"""A process with a node in the foreground that takes its time to stop. Not a test itself."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from meshnode.cli.foreground import run_in_foreground
from meshnode.config import load
from meshnode.node import NodeInfo


async def run_node(config: object, *, task_status: trio.TaskStatus[NodeInfo]) -> None:
    """Started at once; its stop lasts until the file named by the first argument is gone."""
    try:
        task_status.started(NodeInfo("", "12D3KooWx", ("/ip4/127.0.0.1/tcp/1",), "home", ()))
        await trio.sleep_forever()
    finally:
        print("stopping in order", flush=True)
        with trio.CancelScope(shield=True):
            while Path(sys.argv[1]).exists():  # noqa: ASYNC240
                await trio.sleep(0.01)
        print("stopped", flush=True)


if __name__ == "__main__":
    flags = {"role": "bootstrap", "data-dir": str(Path(sys.argv[1]).parent)}
    run_in_foreground(run_node, load(flags, {}, None), as_json=True)
