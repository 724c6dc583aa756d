"""What a mesh has decided, as a file that proves itself; and what to do when nobody can decide."""

from __future__ import annotations

import base64
import binascii
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshnode.cli.api import find_node
from meshnode.cli.edge import EXIT_FAILED, api_option, config_from, data_dir_option, json_option
from meshnode.cli.output import print_facts, print_json, short_peer, size
from meshnode.cli.register import print_items
from meshnode.errors import ConfigError, RemoteProtocolError

if TYPE_CHECKING:
    from meshnode.console.proof import Proven
    from meshnode.console.snapshot import GroupSnapshot
    from meshnode.store import DataDir

ROOT_HEX_CHARS = 64
FILE_BYTES_MAX = 1024 * 1024
"""A proof is one message of at most 256 KiB; base64 makes a third more of it."""

RISK = """\
Recovery goes on WITHOUT the voters that do not answer: the node that made the mesh becomes the one
voter, by the mesh's root key, and names others again as nodes come. Use it only if those voters
are lost for ever. If they are merely cut off, start or reconnect them instead: both sides could
decide until they meet again; then the recovered side wins, and what the others decided meanwhile
is void, exclusive rights included."""


@click.command()
@click.option("--force", is_flag=True, help="Do it.")
@api_option
@data_dir_option
@json_option
def recover(force: bool, api: str | None, data_dir: str | None, as_json: bool) -> None:
    """Go on after a quorum of voters is lost for ever.

    Without --force it only says what it would do, and which voters do not answer. Works on the
    node that made the mesh, because it takes the mesh's root key.

    \b
    Examples:
      meshnode mesh recover
      meshnode mesh recover --force
    """
    node = find_node(api, config_from({"data_dir": data_dir}).data_dir)
    found = node.status()
    if force:
        recovered = node.recover()
        if as_json:
            print_json({"groups": recovered.groups})
        for epoch in () if as_json else recovered.groups.values():
            click.echo(f"Recovered: this node decides alone from epoch {epoch} on.")
            click.echo("Other nodes become voters as they come. See: meshnode status")
        return
    may = found.mesh.root_key_here and not all(map(_has_quorum, found.groups))
    if as_json:
        print_json(
            {"risk": RISK, "would_recover": may, "groups": list(map(_described, found.groups))}
        )
        sys.exit(EXIT_FAILED)
    click.echo(RISK)
    click.echo()
    for group in found.groups:
        print_facts(_standing(group))
    if not found.groups:
        click.echo("This mesh has agreed on nothing yet: there is nothing to recover.")
    elif not found.mesh.root_key_here:
        click.echo("\nNot on this node: the root key is on the node that made the mesh.")
    elif not may:
        click.echo("\nA quorum answers: there is nothing to recover.")
    else:
        click.echo("\nIf that is what you want: meshnode mesh recover --force")
    sys.exit(EXIT_FAILED)


def _has_quorum(group: GroupSnapshot) -> bool:
    return sum(voter.alive for voter in group.voters) >= group.quorum


def _described(group: GroupSnapshot) -> dict[str, object]:
    return {
        "id": group.id,
        "epoch": group.epoch,
        "quorum": group.quorum,
        "answer": [voter.peer_id for voter in group.voters if voter.alive],
        "do_not_answer": [voter.peer_id for voter in group.voters if not voter.alive],
    }


def _standing(group: GroupSnapshot) -> list[tuple[str, str]]:
    facts = [("epoch", str(group.epoch)), ("must answer", f"{group.quorum} voters")]
    facts += [("answers", voter.peer_id) for voter in group.voters if voter.alive]
    return facts + [("does not answer", v.peer_id) for v in group.voters if not v.alive]


@click.command()
@click.argument("file", required=False)
@api_option
@data_dir_option
@json_option
def export(file: str | None, api: str | None, data_dir: str | None, as_json: bool) -> None:
    """Write the proof of the mesh's newest decision to FILE, or in base64 to the terminal.

    Who owns what, who voted for it, and by what right: with the votes' signatures, back to the
    mesh's root key. `meshnode mesh verify` checks it without asking anybody.

    \b
    Examples:
      meshnode mesh export decision.proof
      meshnode mesh export | ssh elsewhere meshnode mesh verify -
    """
    proof = find_node(api, config_from({"data_dir": data_dir}).data_dir).proof()
    data = base64.b64decode(proof.proof)
    if file is not None and file != "-":
        try:
            Path(file).write_bytes(data)
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    told = {"group": proof.group, "epoch": proof.epoch, "bytes": len(data)}
    if as_json:
        where = {"proof": proof.proof} if file in (None, "-") else {"file": file}
        print_json({**told, **where})
    elif file in (None, "-"):
        click.echo(proof.proof)
    else:
        click.echo(f"Epoch {proof.epoch} of group {proof.group}: {size(len(data))} in {file}.")


@click.command()
@click.argument("file")
@click.option(
    "--root",
    metavar="HEX",
    help="The mesh's root key, as `meshnode mesh show` prints it. [default: that of a mesh here]",
)
@data_dir_option
@json_option
def verify(file: str, root: str | None, data_dir: str | None, as_json: bool) -> None:
    """Check FILE, which `meshnode mesh export` wrote, offline.

    Takes nothing but the mesh's root key, which every member has. Ends with 1, and the reason, if
    anything in the file is not proven. "-" reads it from a pipe.

    \b
    Examples:
      meshnode mesh verify decision.proof
      meshnode mesh verify decision.proof --root 3b6a27bc…
    """
    from meshnode.console.proof import mesh_of, verify_proof
    from meshnode.identity import peer_id_of
    from meshnode.messages import Decided, decode
    from meshnode.store import DataDir

    try:
        decided = decode(_read(file), Decided)
        if root is not None:
            key, mesh = _root_key(root), None
        else:
            data = DataDir(config_from({"data_dir": data_dir}).data_dir)
            mesh, key = _mesh_here(data, mesh_of(decided))
        proven = verify_proof(decided, peer_id_of(key))
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{file} is no proof: {error}") from error
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(proven))
        return
    print_facts(_facts(proven, mesh))
    if proven.body.items:
        from meshnode.console.agreed import item_snapshot

        click.echo()
        print_items(map(item_snapshot, proven.body.items), own="")


def _facts(proven: Proven, mesh: str | None) -> list[tuple[str, str]]:
    if proven.is_recovery:
        signed = "the mesh's root, after a lost quorum"
    elif proven.epoch == 0:
        signed = "the mesh's root: the group was founded, nothing is decided yet"
    else:
        signers = ", ".join(map(short_peer, proven.signed_by))
        voters = len(proven.decided_by)
        signed = f"{signers} ({len(proven.signed_by)} of {voters}; {proven.quorum} must)"
    times = "once" if proven.handovers == 1 else f"{proven.handovers} times"
    changes = f"changed {times} since the group was founded, each change proven"
    return [
        ("verified", "yes"),
        ("mesh", f"{mesh} (id {proven.mesh})" if mesh else proven.mesh),
        ("group", proven.group),
        ("epoch", str(proven.epoch)),
        ("signed by", signed),
        ("voters now", ", ".join(map(short_peer, proven.voters))),
        ("before", changes if proven.handovers else "the same since the group was founded"),
        *(
            ("right", f"{claim.right}: {short_peer(claim.holder)} since epoch {claim.since}")
            for claim in proven.body.claims
        ),
    ]


def _read(file: str) -> bytes:
    """A proof's bytes, whether they are binary or base64. Raises `ConfigError`."""
    try:
        if file == "-":
            data = sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
        else:
            with Path(file).open("rb") as opened:
                data = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{file} is far too large to be a proof")
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error:
        return data  # msgpack: its first byte is none of base64's


def _root_key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(text) != ROOT_HEX_CHARS or len(key) * 2 != ROOT_HEX_CHARS:
        raise ConfigError(f"--root is a key of {ROOT_HEX_CHARS} hex digits: see meshnode mesh show")
    return key


def _mesh_here(data: DataDir, mesh_id: str) -> tuple[str, bytes]:
    """The name and root key of the mesh with this id, from this machine's own files."""
    for name in data.mesh_names():
        membership = data.membership(name)
        if membership is not None and membership.mesh.mesh_id == mesh_id:
            return name, bytes.fromhex(membership.mesh.root)
    raise ConfigError(
        f"this machine is in no mesh with the id {mesh_id}: give its root key with --root, from "
        "`meshnode mesh show` on a member"
    )
