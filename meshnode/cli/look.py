"""Look at a running node and, through its eyes, at the mesh: status, peers, models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

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
from meshnode.cli.register import (
    group_facts,
    node_name,
    node_names,
    print_groups,
    warn_of,
    warn_of_no_group,
)

if TYPE_CHECKING:
    from meshnode.console.snapshot import (
        ItemSnapshot,
        ModelSnapshot,
        PeerSnapshot,
        Snapshot,
        SpeculationSnapshot,
    )


@click.command()
@api_option
@data_dir_option
@json_option
def status(api: str | None, data_dir: str | None, as_json: bool) -> None:
    """Show how the node on this machine and its mesh are doing.

    The node: its addresses, its own models with their load, what it refused. The mesh: who votes
    and in which epoch, who owns which model and who stands by, and what is degraded, each with
    what would fix it.

    \b
    Examples:
      meshnode status
      meshnode status --json | jq .ready
      meshnode status --json | jq -r '.groups[].trouble[] | .what + ": " + .fix'
    """
    answer = _node(api, data_dir).status_json()
    if as_json:
        print_json(answer)
        return
    found = read_status(answer)
    for warning in found.warnings:
        warn(warning)
    for group in found.groups:
        for trouble in group.trouble:
            warn_of(trouble.what, trouble.fix)
    if not found.groups:
        warn_of_no_group(found.mesh)
    print_facts(_facts(found))
    if found.models:
        click.echo()
        columns = ("model", "state", ">busy", ">queue", ">context", ">prefill/s", ">decode/s")
        print_table((*columns, ">memory"), map(_model_row, found.models))
    print_groups(found.groups, found.peer_id)


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


@click.group(invoke_without_command=True)
@api_option
@data_dir_option
@json_option
@click.pass_context
def models(context: click.Context, api: str | None, data_dir: str | None, as_json: bool) -> None:
    """List every model of the mesh, who serves it, who owns it and who stands by.

    "served by" is who says that it answers; "owned by" what the mesh has decided. Two files with
    the same name and different content are two models: the digest tells. A model with ~ in its
    name is an approximation; --json says how near it comes, and who measured it.

    \b
    Examples:
      meshnode models
      meshnode models --json | jq -r .models[].id
      meshnode models fetch qwen3-8b-q4_0
      meshnode models shard big.gguf --experts 24
    """
    if context.invoked_subcommand is not None:
        return
    answer = _node(api, data_dir).status_json()
    found = read_status(answer)
    rows = list(_known_models(found))
    if as_json:
        print_json({"models": rows})
    elif not rows:
        click.echo("Nobody serves a model yet: meshnode serve --model FILE.gguf")
    else:
        columns = ("model", "state", ">context", "digest", "served by", "owned by", "stand by")
        print_table(columns, (_known_row(row, found) for row in rows))


def _node(api: str | None, data_dir: str | None) -> NodeApi:
    return find_node(api, config_from({"data_dir": data_dir}).data_dir)


def _facts(found: Snapshot) -> Iterable[tuple[str, str]]:
    yield "node", f"{found.peer_id} ({found.role}, meshnode {found.version})"
    yield "mesh", f"{found.mesh.name} ({found.mesh.admission}, id {found.mesh.id})"
    yield "ready", "yes" if found.ready else f"no: {found.reason}"
    yield "up", duration(found.uptime_s)
    yield "API", f"{found.api_url}/v1" if found.api_url else "none"
    yield from (("at", addr) for addr in found.addrs)
    for model in found.models:
        if model.parts:
            yield "layers", f"{model.name}: {_layers(model, found.peer_id)}"
        if model.speculation is not None:
            yield "guessing", f"{model.name}: {_guesses(model.speculation)}"
        if model.approximate is not None:
            by = node_name(model.approximate.measured_by, found.peer_id)
            yield "approximate", f"{model.name}: {model.approximate}; measured by {by}"
    for group in found.groups:
        yield from group_facts(group, found.peer_id)
    yield "peers", f"{len(found.peers)} connected, {found.dht_peers} in the DHT"
    if found.refused:
        counts = sorted(found.refused.items())
        yield "refused", ", ".join(f"{count} {reason}" for reason, count in counts)


def _layers(model: ModelSnapshot, own: str) -> str:
    parts = ", ".join(
        f"{part.first}–{part.end - 1} ({printable(part.error or part.state)})"
        for part in model.parts
    )
    ring = " → ".join(node_name(peer, own) for peer in model.ring)
    test = f", self-test: {printable(model.self_test)}" if model.self_test else ""
    return f"{parts}{f'; the pipeline is {ring}{test}' if ring else ''}"


def _guesses(speculation: SpeculationSnapshot) -> str:
    state = "on" if speculation.on else "not now"
    if not speculation.proposed:
        return f"{state}; no guesses yet"
    share = speculation.accepted / speculation.proposed
    gain = speculation.accepted / speculation.passes
    return f"{state}; {share:.0%} of the guesses right, {gain:.1f} more tokens per pass"


def _model_row(model: ModelSnapshot) -> tuple[str, ...]:
    state = model.state
    if model.state == "loading":
        state = f"loading {model.progress:.0%}"
    elif model.error:
        state = f"{model.state}: {printable(model.error)}"
    if model.state == "standby":  # nothing is in memory, so there is nothing to count
        return (model.name, state, *("–",) * 6)
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


def _known_models(found: Snapshot) -> Iterator[dict[str, Any]]:
    """What nodes say they serve, beside what the register says; also what only one of them says."""
    import msgspec

    items: dict[str, list[ItemSnapshot]] = {}
    for group in found.groups:
        for item in group.items:
            items.setdefault(item.model, []).append(item)
    for model in found.mesh_models:
        yield msgspec.to_builtins(model) | _owned(items.pop(model.digest, []))
    for digest, rest in items.items():
        unserved = {"id": rest[0].name, "digest": digest, "state": "unserved"}
        yield unserved | {"context_tokens": 0, "served_by": []} | _owned(rest)


def _owned(items: list[ItemSnapshot]) -> dict[str, Any]:
    return {
        "owners": [
            {"peer_id": i.owner, "state": i.state, "replica": i.replica, "layers": i.layers}
            for i in items
        ],
        "standbys": list(dict.fromkeys(peer for item in items for peer in item.standbys)),
    }


def _known_row(row: dict[str, Any], found: Snapshot) -> tuple[str, ...]:
    own = found.peer_id
    owners = (
        node_name(owner["peer_id"], own)
        + (f" [{owner['layers']}]" if owner["layers"] else "")
        + (f" ({owner['state']})" if owner["state"] != "serving" else "")
        for owner in row["owners"]
    )
    return (
        row["id"],
        row["state"],
        str(row["context_tokens"] or "–"),
        row["digest"][:12],
        node_names(row["served_by"], own) or "nobody now",
        ", ".join(owners) or "–",
        node_names(row["standbys"], own) or "–",
    )
