"""Tell the mesh where models should be: `pin`, `unpin`, `drain`.

An order is signed by the node it is given to and decided by the mesh's voters; these commands wait
until that has happened, and say what moves.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from meshnode.cli.api import NodeApi, find_node
from meshnode.cli.edge import api_option, config_from, data_dir_option, json_option
from meshnode.cli.output import print_json, short_peer
from meshnode.cli.register import node_name, print_items
from meshnode.errors import MeshnodeError

if TYPE_CHECKING:
    from meshnode.console.requests import OrderGiven
    from meshnode.console.snapshot import GroupSnapshot, ItemSnapshot, Snapshot

DECIDED_WITHIN_S = 20.0
"""A decision takes well under a second, with a change of leader a few; an order that is not decided
by then lacks a quorum."""
LOOK_S = 0.2
PROGRESS_AFTER_S = 1.0
"""Who waits longer is told for what."""

_WORDS = {
    "pin": "pinned {name} to {node}",
    "unpin": "{name} is no longer pinned to {node}",
    "drain": "drained {node}",
    "undrain": "{node} may own models again",
}


class NotDecidedError(MeshnodeError):
    """The mesh's voters did not decide in time."""


@click.command()
@click.argument("model")
@click.argument("node")
@api_option
@data_dir_option
@json_option
def pin(model: str, node: str, api: str | None, data_dir: str | None, as_json: bool) -> None:
    """Have MODEL served on NODE, whatever the demand.

    MODEL is a name, or the start of a digest where a name means several files. NODE is the
    beginning or end of its peer id, or "self". It must have the file: started with --model or
    --standby. Waits until the mesh has decided it. A pin stays until `meshnode unpin`.

    \b
    Examples:
      meshnode pin qwen3-8b-q4_0 self
      meshnode pin qwen3-8b-q4_0 xLvKXtf
      meshnode placement qwen3-8b-q4_0 --what-if pin=xLvKXtf     # first: what would move?
    """
    _order("pin", node, model, api, data_dir, as_json)


@click.command()
@click.argument("model")
@click.argument("node")
@api_option
@data_dir_option
@json_option
def unpin(model: str, node: str, api: str | None, data_dir: str | None, as_json: bool) -> None:
    """Take back `meshnode pin MODEL NODE`.

    \b
    Example:
      meshnode unpin qwen3-8b-q4_0 self
    """
    _order("unpin", node, model, api, data_dir, as_json)


@click.command()
@click.argument("node")
@click.option("--undo", is_flag=True, help="Let the node own models again.")
@api_option
@data_dir_option
@json_option
def drain(node: str, undo: bool, api: str | None, data_dir: str | None, as_json: bool) -> None:
    """Take all models off NODE: before an upgrade, or for good.

    Others load them first, and NODE goes on until they answer; what it is answering it finishes.
    A model that no other node can take stays. A drain lasts until `--undo`, restarts included.
    NODE is the beginning or end of a peer id, or "self".

    \b
    Examples:
      meshnode drain self
      meshnode drain self --undo
      meshnode placement --what-if drain=self     # first: what would move?
    """
    _order("undrain" if undo else "drain", node, None, api, data_dir, as_json)


def _order(
    action: str,
    node: str,
    model: str | None,
    api: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    from meshnode.console.requests import OrderRequest

    running = find_node(api, config_from({"data_dir": data_dir}).data_dir)
    before = running.status()
    given = running.give(OrderRequest(action, node, model))  # type: ignore[arg-type]
    after = before if given.is_decided else _decided(running, given, as_json)
    group = _group(after, given.group)
    touched = _touched(before, after, given)
    if as_json:
        import msgspec

        print_json(
            {
                **msgspec.to_builtins(given),
                "is_decided": True,
                "was_decided": given.is_decided,
                "epoch": group.epoch,
                "items": msgspec.to_builtins(touched),
            }
        )
        return
    words = _WORDS[action].format(name=given.name, node=node_name(given.peer, after.peer_id))
    when = "it was so already" if given.is_decided else f"decided in epoch {group.epoch}"
    click.echo(f"{words}: {when}")
    if touched:
        click.echo()
        print_items(touched, after.peer_id)
        click.echo("\nWhy each is where it is: meshnode placement. How it goes on: meshnode status")


def _decided(running: NodeApi, given: OrderGiven, as_json: bool) -> Snapshot:
    """The first status with the order in it. Raises `NotDecidedError`."""
    start = time.monotonic()
    has_told = False
    while True:
        found = running.status()
        group = _group(found, given.group)
        if _is_in_force(group, given):
            return found
        waited_s = time.monotonic() - start
        if waited_s > DECIDED_WITHIN_S:
            raise NotDecidedError(_undecided(group, waited_s))
        if waited_s > PROGRESS_AFTER_S and not has_told and not as_json:
            has_told = True
            alive = sum(voter.alive for voter in group.voters)
            click.echo(
                f"waiting for {group.quorum} of {len(group.voters)} voters to agree "
                f"({alive} answer) …",
                err=True,
            )
        time.sleep(LOOK_S)


def _is_in_force(group: GroupSnapshot, given: OrderGiven) -> bool:
    kept = {(order.action, order.subject, order.peer) for order in group.orders}
    if given.action in ("pin", "drain"):
        return (given.action, given.model, given.peer) in kept
    return (given.action.removeprefix("un"), given.model, given.peer) not in kept


def _undecided(group: GroupSnapshot, waited_s: float) -> str:
    silent = [voter.peer_id for voter in group.voters if not voter.alive]
    told = f"the mesh has not decided it in {waited_s:.0f} s"
    if len(group.voters) - len(silent) >= group.quorum:
        return f"{told}, though enough voters answer: look at `meshnode status`, and try again"
    missing = ", ".join(map(short_peer, silent))
    return (
        f"{told}: of its {len(group.voters)} voters {missing} do not answer, and "
        f"{group.quorum} must. Start them, or, if they are lost for ever, run "
        "`meshnode mesh recover` on the node that made the mesh; then order it again"
    )


def _touched(before: Snapshot, after: Snapshot, given: OrderGiven) -> tuple[ItemSnapshot, ...]:
    """Who owns, after the order, the models that it is about."""
    group = _group(after, given.group)
    if given.model:
        return tuple(item for item in group.items if item.model == given.model)
    models = {
        item.model
        for each in (*before.groups, group)
        for item in each.items
        if item.owner == given.peer
    }
    return tuple(item for item in group.items if item.model in models)


def _group(found: Snapshot, name: str) -> GroupSnapshot:
    group = next((group for group in found.groups if group.id == name), None)
    if group is None:
        raise NotDecidedError("the node has lost sight of its mesh's group: look at its log")
    return group
