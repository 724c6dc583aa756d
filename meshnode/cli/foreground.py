"""A node in the foreground of a terminal or a service manager: start, say where it is, stop.

Decides what signals do and what is printed. What a node is, it does not know: it is handed
`run_node`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import click
import trio

from meshnode import __version__
from meshnode.cli.api import ApiError, NodeApi, NoNodeError
from meshnode.cli.output import printable, warn
from meshnode.config import Config, is_loopback, split_host_port
from meshnode.console.snapshot import ModelSnapshot

if TYPE_CHECKING:
    from meshnode.node import NodeInfo

LOADING_POLL_S = 0.5
"""Twice a second looks alive; a status costs the node about a millisecond."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunNode(Protocol):
    """`meshnode.node.run_node`: serves until cancelled."""

    def __call__(
        self, config: Config, *, task_status: trio.TaskStatus[NodeInfo]
    ) -> Awaitable[None]: ...


def run_in_foreground(run_node: RunNode, config: Config, *, as_json: bool) -> None:
    """Run a node until it is told to stop. Errors of the node leave as they are, or grouped."""
    trio.run(partial(_run, run_node, config, as_json=as_json or config.log_format == "json"))


async def _run(run_node: RunNode, config: Config, *, as_json: bool) -> None:
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        async with trio.open_nursery() as watch:
            with trio.CancelScope() as life:
                # Outside of what it cancels, so that a second signal is heard during the stop.
                watch.start_soon(_stop_on_signal, signals, life, as_json)
                async with trio.open_nursery() as nursery:
                    info: NodeInfo = await nursery.start(partial(run_node, config))
                    click.echo(started_line(info) if as_json else banner(info, config))
                    sys.stdout.flush()
                    if config.models and info.api_url and not as_json:
                        nursery.start_soon(_show_loading, NodeApi(info.api_url))
            watch.cancel_scope.cancel()


async def _stop_on_signal(
    signals: AsyncIterator[int], life: trio.CancelScope, as_json: bool
) -> None:
    async for number in signals:
        if life.cancel_called:
            os._exit(128 + number)  # the second one means: now
        if not as_json:
            click.echo("\nstopping (once more to stop at once)", err=True)
        life.cancel()


def started_line(info: NodeInfo) -> str:
    """One line of JSON that says the node is up; its load is told by `/readyz`."""
    return json.dumps(
        {
            "event": "started",
            "version": __version__,
            "peer_id": info.peer_id,
            "mesh": info.mesh,
            "api_url": info.api_url,
            "asks_for_key": info.asks_for_key,
            "addrs": list(info.addrs),
            "models": list(info.models),
        }
    )


def banner(info: NodeInfo, config: Config) -> str:
    """What a person needs first: where it listens, and a line to paste that gets an answer."""
    lines = [f"meshnode {__version__}", f"  mesh   {info.mesh}", f"  peer   {info.peer_id}"]
    lines += [f"  at     {addr}" for addr in info.addrs]
    if info.api_url:
        lines += [f"  API    {info.api_url}/v1", "", "Try it:", f"  {_curl(info)}"]
        if info.asks_for_key:
            lines += ["", f"The API asks for a key; those in {config.key_file} are let in."]
        elif not is_loopback(split_host_port(config.api)[0]):
            lines += ["", "Whoever reaches this API may use it: it asks for no key."]
    if config.role == "node":
        lines += ["", "Bring another machine in:  meshnode invite"]
    lines += ["Stop:  Ctrl-C", ""]
    return printable("\n".join(lines))


def _curl(info: NodeInfo) -> str:
    key = ' -H "authorization: Bearer $MESHNODE_API_KEY"' if info.asks_for_key else ""
    if not info.models:
        return f"curl {info.api_url}/v1/models{key}"
    body = {
        "model": info.models[0],
        "messages": [{"role": "user", "content": "What is a mesh, in one sentence?"}],
        "max_tokens": 100,
    }
    return (
        f"curl {info.api_url}/v1/chat/completions -H 'content-type: application/json'{key} \\\n"
        f"    -d {shlex.quote(json.dumps(body))}"
    )


async def _show_loading(node: NodeApi) -> None:
    """Tell how far the models are until each is ready or has failed."""
    told: dict[str, str] = {}
    while True:
        try:
            status = await trio.to_thread.run_sync(node.status, abandon_on_cancel=True)
        except (NoNodeError, ApiError) as error:
            warn(f"the progress of loading is not known: {error}")
            return
        for model in status.models:
            line = progress_line(model)
            if told.get(model.name) != line:
                told[model.name] = line
                click.echo(line, err=True)
        if status.models and all(model.state != "loading" for model in status.models):
            return
        await trio.sleep(LOADING_POLL_S)


def progress_line(model: ModelSnapshot) -> str:
    """A line per tenth of the load, and one for how it ended."""
    if model.state == "loading":
        return f"loading {model.name}: {int(model.progress * 10) * 10} %"
    if model.error:
        return f"{model.name} cannot be served: {printable(model.error)}"
    if model.state == "standby":
        return f"{model.name} stands by: its file is here, verified"
    return f"{model.name} is {model.state} ({model.context_tokens} tokens of context)"
