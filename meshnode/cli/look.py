"""Look at a running node and, through its eyes, at the mesh: status, peers, models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from meshnode.cli.api import NodeApi, find_node, read_status
from meshnode.cli.edge import api_option, config_from, data_dir_option, json_option
from meshnode.cli.output import (
    duration,
    print_facts,
    print_json,
    print_table,
    printable,
    short_peer,
    size,
    warn,
)

if TYPE_CHECKING:
    from meshnode.console.snapshot import ModelSnapshot, PeerSnapshot, Snapshot


@click.command()
@api_option
@data_dir_option
@json_option
def status(api: str | None, data_dir: str | None, as_json: bool) -> None:
    """Show how the node on this machine is doing.

    Its mesh, its addresses, its own models with their load, and what it refused.

    \b
    Examples:
      meshnode status
      meshnode status --json | jq .ready
    """
    answer = _node(api, data_dir).status_json()
    if as_json:
        print_json(answer)
        return
    found = read_status(answer)
    for warning in found.warnings:
        warn(warning)
    print_facts(_facts(found))
    if found.models:
        click.echo()
        columns = ("model", "state", ">busy", ">queue", ">context", ">prefill/s", ">decode/s")
        print_table((*columns, ">memory"), map(_model_row, found.models))


@click.command()
@api_option
@data_dir_option
@json_option
def peers(api: str | None, data_dir: str | None, as_json: bool) -> None:
    """List the connected members and what each brings.

    \b
    Examples:
      meshnode peers
      meshnode peers --json | jq -r .peers[].peer_id
    """
    answer = _node(api, data_dir).status_json()
    found = read_status(answer)
    if as_json:
        print_json({"peers": answer.get("peers", [])})
    elif not found.peers:
        click.echo("No peers. Bring one in with `meshnode invite`, or name one with --bootstrap.")
    else:
        columns = ("peer", "roles", ">rtt", ">clock", "models", ">memory", ">cores", "address")
        print_table(columns, map(_peer_row, found.peers))


@click.command()
@api_option
@data_dir_option
@json_option
def models(api: str | None, data_dir: str | None, as_json: bool) -> None:
    """List every model of the mesh and who serves it.

    Two files with the same name and different content are two models: the digest tells.

    \b
    Examples:
      meshnode models
      meshnode models --json | jq -r .models[].id
    """
    answer = _node(api, data_dir).status_json()
    found = read_status(answer)
    if as_json:
        print_json({"models": answer.get("mesh_models", [])})
    elif not found.mesh_models:
        click.echo("Nobody serves a model yet: meshnode serve --model FILE.gguf")
    else:
        rows = (
            (
                model.id,
                model.state,
                str(model.context_tokens),
                model.digest[:12],
                _peers(model.served_by, found.peer_id),
            )
            for model in found.mesh_models
        )
        print_table(("model", "state", ">context", "digest", "served by"), rows)


def _node(api: str | None, data_dir: str | None) -> NodeApi:
    return find_node(api, config_from({"data_dir": data_dir}).data_dir)


def _facts(found: Snapshot) -> Iterable[tuple[str, str]]:
    yield "node", f"{found.peer_id} ({found.role}, meshnode {found.version})"
    yield "mesh", f"{found.mesh.name} ({found.mesh.admission}, id {found.mesh.id})"
    yield "ready", "yes" if found.ready else f"no: {found.reason}"
    yield "up", duration(found.uptime_s)
    yield "API", f"{found.api_url}/v1" if found.api_url else "none"
    yield from (("at", addr) for addr in found.addrs)
    yield "peers", f"{len(found.peers)} connected, {found.dht_peers} in the DHT"
    if found.refused:
        counts = sorted(found.refused.items())
        yield "refused", ", ".join(f"{count} {reason}" for reason, count in counts)


def _model_row(model: ModelSnapshot) -> tuple[str, ...]:
    state = model.state
    if model.state == "loading":
        state = f"loading {model.progress:.0%}"
    elif model.error:
        state = f"{model.state}: {printable(model.error)}"
    return (
        model.name,
        state,
        f"{model.slots_busy}/{model.slots}",
        str(model.queue_depth),
        str(model.context_tokens),
        f"{model.prefill_tokens_per_s:.0f}" if model.prefill_tokens_per_s else "–",
        f"{model.decode_tokens_per_s:.1f}" if model.decode_tokens_per_s else "–",
        size(model.memory_bytes),
    )


def _peer_row(peer: PeerSnapshot) -> tuple[str, ...]:
    return (
        short_peer(peer.peer_id),
        ", ".join(peer.roles),
        "–" if peer.rtt_ms is None else f"{peer.rtt_ms:.1f} ms",
        f"{round(peer.clock_ahead_s):+d} s",
        ", ".join(f"{m.name} ({m.state})" if m.state != "ready" else m.name for m in peer.models),
        f"{size(peer.memory_bytes)} {peer.accelerator}".strip(),
        str(peer.cores),
        peer.addrs[0] if peer.addrs else "–",
    )


def _peers(peer_ids: tuple[str, ...], own: str) -> str:
    names = ("this node" if peer_id == own else short_peer(peer_id) for peer_id in peer_ids)
    return ", ".join(names) or "nobody now"
