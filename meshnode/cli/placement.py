"""Where models are and would be, and why: `placement`, with what-ifs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshnode.cli.api import find_node, read_placement
from meshnode.cli.edge import api_option, config_from, data_dir_option, json_option
from meshnode.cli.output import print_json, print_table, printable, size, warn
from meshnode.cli.register import node_name
from meshnode.config import size_bytes
from meshnode.console.requests import NEW_NODE
from meshnode.errors import ConfigError

if TYPE_CHECKING:
    from meshnode.console.requests import (
        ModelFile,
        ModelReport,
        PlacementReport,
        ReplicaReport,
        WhatIf,
    )

REPLICAS_MAX = 64
ACTIVATION_BYTES_PER_EMBEDDING = 4
"""One float32 of each: what a token's activations are between two layers."""
_FORMS = """one of
  +node:memory=8GiB[,ms_per_token=40]   another node, which has the file
  -NODE              that node is gone
  drain=NODE         that node is drained
  pin=NODE           MODEL is pinned there
  replicas=N         MODEL is wanted so often
  memory:NODE=8GiB   that node offers so much memory"""


@click.command()
@click.argument("model", required=False)
@click.option(
    "--what-if",
    "what_ifs",
    multiple=True,
    metavar="CHANGE",
    help="Plan as if something were different; repeatable. See above.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="With a file: the context to keep. [default: as `meshnode serve` would]",
)
@api_option
@data_dir_option
@json_option
def placement(
    model: str | None,
    what_ifs: tuple[str, ...],
    context: int | None,
    api: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Show where models belong, with predicted speeds, and why each node is in or out.

    It is the plan that the mesh would make now, by the planner that decides. Nothing is changed.
    MODEL is a name or a digest's start; or the path of a GGUF file that no node has yet: would it
    fit? Without MODEL, all models of the mesh.

    \b
    What-ifs:
      +node:memory=8GiB[,ms_per_token=40]   another node, which has the file
      -NODE              that node is gone
      drain=NODE         that node is drained
      pin=NODE           MODEL is pinned there
      replicas=N         MODEL is wanted so often
      memory:NODE=8GiB   that node offers so much memory
    NODE is the beginning or end of a peer id, or "self".

    \b
    Examples:
      meshnode placement
      meshnode placement small --what-if -xLvKXtf
      meshnode placement small --what-if +node:memory=16GiB,ms_per_token=25 --what-if replicas=2
      meshnode placement ~/models/qwen3-32b-q4_0.gguf --json
    """
    from meshnode.console.requests import PreviewRequest

    changes = tuple(map(what_if_of, what_ifs))
    file = None
    if model is not None and Path(model).expanduser().is_file():
        file = file_of(Path(model).expanduser(), context)
    elif context is not None:
        raise ConfigError("--context is for the path of a GGUF file: a model of the mesh has one")
    node = find_node(api, config_from({"data_dir": data_dir}).data_dir)
    named = None if file is not None else model
    answer = node.preview_json(PreviewRequest(named, file, changes))
    if as_json:
        print_json(answer)
    else:
        _show(read_placement(answer), node.status().peer_id)


# --- what people write ---------------------------------------------------------------------------


def what_if_of(text: str) -> WhatIf:
    """A what-if as it is typed. Raises `ConfigError` with the forms there are."""
    from meshnode.console import requests

    word, equals, value = text.partition("=")
    if text.startswith("+"):
        return _new_node(text)
    if text.startswith("-") and len(text) > 1:
        return requests.RemoveNode(text[1:])
    if equals and value:
        if word == "drain":
            return requests.DrainNode(value)
        if word == "pin":
            return requests.PinModel(value)
        if word == "replicas":
            return requests.SetReplicas(_count(text, value))
        if word.startswith("memory:") and word != "memory:":
            return requests.SetMemory(word.removeprefix("memory:"), _size(text, value))
    raise _wrong(text, "is")


def _new_node(text: str) -> WhatIf:
    from meshnode.console.requests import AddNode

    kind, colon, rest = text.partition(":")
    if kind != "+node" or not colon:
        raise _wrong(text, "is")
    given: dict[str, str] = {}
    for part in rest.split(","):
        key, _, value = part.partition("=")
        if key in given:
            raise _wrong(text, f"gives {key} twice; write")
        if key not in ("memory", "ms_per_token") or "=" not in part:
            raise _wrong(text, f"has {part!r}, which is no property of a node; write")
        given[key] = value
    if "memory" not in given:
        raise _wrong(text, "does not say how much memory; write")
    speed = given.get("ms_per_token")
    if speed is not None and not re.fullmatch(r"\d{1,6}(\.\d{1,3})?", speed):
        raise _wrong(text, f"needs a number of milliseconds, not {speed!r}; write")
    if speed is not None and float(speed) == 0:
        raise _wrong(text, "needs more than 0 milliseconds; write")
    return AddNode(
        memory_bytes=_size(text, given["memory"]),
        ms_per_token=None if speed is None else float(speed),
    )


def _count(text: str, value: str) -> int:
    if not re.fullmatch(r"\d{1,3}", value) or int(value) > REPLICAS_MAX:
        raise _wrong(text, f"needs a number from 0 to {REPLICAS_MAX}; write")
    return int(value)


def _size(text: str, value: str) -> int:
    try:
        return size_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"--what-if {text!r}: {error}") from error


def _wrong(text: str, how: str) -> ConfigError:
    told = "is not" if how == "is" else how
    return ConfigError(f"--what-if {text!r} {told} {_FORMS}")


def file_of(path: Path, context: int | None) -> ModelFile:
    """What serving a file takes, by its header. Raises `ModelLoadError` for a damaged one."""
    from meshnode.console.requests import ModelFile
    from meshnode.engine.memory import context_for, memory_need
    from meshnode.models.gguf import read_header
    from meshnode.models.stages import why_not

    header = read_header(path)
    need = memory_need(header, context_for(str(path), header, context))
    return ModelFile(
        name=path.stem.lower(),
        weight_bytes=need.weights_bytes,
        layers=max(header.layers, 1),
        kv_bytes_per_token=need.kv_bytes_per_token,
        context_tokens=need.context_tokens,
        compute_bytes=need.total_bytes - need.weights_bytes - need.kv_bytes,
        activation_bytes=0
        if why_not(path) is not None
        else header.embedding_length * ACTIVATION_BYTES_PER_EMBEDDING,
    )


# --- what they see -------------------------------------------------------------------------------


def _show(report: PlacementReport, own: str) -> None:
    if report.assumed:
        click.echo(f"What if {', and '.join(map(printable, report.assumed))}?\n")
    if not report.models:
        click.echo("Nobody has a model yet: meshnode serve --model FILE.gguf")
    for number, model in enumerate(report.models):
        if number:
            click.echo()
        _show_model(model, own)
    if report.postponed:
        click.echo(f"\n{report.postponed} more loads would help, and wait for these to end.")


def _show_model(model: ModelReport, own: str) -> None:
    name = printable(model.name)
    layers = f"{model.layers} layers, " if model.layers > 1 else ""
    title = click.style(name, bold=True)
    wanted = f"wanted {model.replicas_wanted} times, " if model.replicas_wanted != 1 else ""
    click.echo(f"{title}: {layers}{size(model.bytes)}, {wanted}{len(model.replicas)} placed")
    for replica in model.replicas:
        click.echo(f"  {_replica_line(replica, own)}")
    for change in model.changes:
        deed = "would load it" if change.action == "load" else "would let it go"
        click.echo(f"  → {_name(change.node, own)} {deed}")
    click.echo()
    rows = (
        (
            _name(verdict.node, own),
            "in" if verdict.included else "out",
            size(verdict.memory_bytes),
            _shortened(verdict.reason, own, model),
        )
        for verdict in model.verdicts
    )
    print_table(("node", "", ">offers", "why"), rows)
    if model.missing:
        warn(f"{name} cannot be placed: {model.missing}")
    for note in dict.fromkeys(replica.note for replica in model.replicas if replica.note):
        warn(_shortened(note, own, model))


def _replica_line(replica: ReplicaReport, own: str) -> str:
    speed = "measured" if replica.is_measured else "estimated"
    if any(part.owner.startswith(NEW_NODE) for part in replica.parts):
        speed = "assumed"
    rate = f"{replica.ms_per_token:.1f} ms/token, {replica.tokens_per_s:.1f} tok/s ({speed})"
    if not replica.is_cut:
        (part,) = replica.parts
        standbys = ", ".join(_name(peer, own) for peer in part.standbys)
        return f"{_name(part.owner, own)}: {rate}{f', standby {standbys}' if standbys else ''}"
    parts = " → ".join(
        f"{_name(part.owner, own)} [{part.first}–{part.end - 1}, {size(part.bytes)}]"
        for part in replica.parts
    )
    return f"{parts}: {rate}"


def _name(peer_id: str, own: str) -> str:
    """Nodes that are only assumed have short names already."""
    return peer_id if peer_id.startswith(NEW_NODE) else node_name(peer_id, own)


def _shortened(text: str, own: str, model: ModelReport) -> str:
    """Peer ids in the planner's words as they stand in the table."""
    for verdict in model.verdicts:
        text = text.replace(verdict.node, _name(verdict.node, own))
    return printable(text)
