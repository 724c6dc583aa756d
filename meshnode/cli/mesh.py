"""Make a mesh, look at those this node belongs to, and invite others.

Works on the data directory; only `invite` prefers to ask a running node, because that node knows
its addresses and honours the invitation.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from meshnode.cli.api import NoNodeError, find_node
from meshnode.cli.edge import api_option, config_from, data_dir_option, json_option
from meshnode.cli.output import duration, print_facts, print_json, print_table
from meshnode.config import Config, is_mesh_name
from meshnode.errors import ConfigError, NotAuthorizedError

if TYPE_CHECKING:
    from meshnode.messages import Role
    from meshnode.store import DataDir, Membership

EXPIRES_S_MIN = 60
EXPIRES_S_MAX = 365 * 86_400
USES_MAX = 10_000
_UNIT_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


@click.group(invoke_without_command=True)
@click.pass_context
def mesh(context: click.Context) -> None:
    """Create a private mesh, and show those this node belongs to.

    A mesh is a name and a root key. Its members hold a certificate that leads to that key;
    everybody else gets a refused connection and nothing more.

    \b
    A private mesh in three lines:
      meshnode mesh create home
      meshnode serve --mesh home
      meshnode invite
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@mesh.command()
@click.argument("name")
@data_dir_option
@json_option
def create(name: str, data_dir: str | None, as_json: bool) -> None:
    """Make a mesh NAME that only the invited can enter, with this node as its first member.

    The mesh's root key is made here and never leaves the data directory. Back it up: without
    it, nobody new can be given the right to invite.

    \b
    Example:
      meshnode mesh create home
    """
    if not is_mesh_name(name):
        raise ConfigError(f"{name!r} cannot be a name: use up to 64 letters, digits, '_', '.', '-'")
    config = config_from({"data_dir": data_dir})
    from meshnode.membership import create_mesh

    data = _open(config)
    membership = create_mesh(name, data, data.key())
    if as_json:
        print_json(_described(data, name))
        return
    click.echo(f"Made the mesh {name} (id {membership.mesh.mesh_id}).")
    click.echo(f"Its root key is in {config.data_dir / 'meshes'}: keep a copy, show it to nobody.")
    click.echo("\nNext:")
    click.echo(f"  meshnode serve --mesh {name}     # on this machine")
    click.echo("  meshnode invite                  # then: a token for another machine")


@mesh.command("list")
@data_dir_option
@json_option
def list_(data_dir: str | None, as_json: bool) -> None:
    """List the meshes this node belongs to.

    \b
    Example:
      meshnode mesh list --json
    """
    data = _open(config_from({"data_dir": data_dir}))
    described = [_described(data, name) for name in data.mesh_names()]
    if as_json:
        print_json(described)
    elif not described:
        click.echo("This node belongs to no mesh yet: meshnode mesh create NAME")
    else:
        columns = ("mesh", "id", "admission", "roles", "root key")
        keys = ("name", "id", "admission", "roles", "root_key")
        print_table(columns, [[_shown(entry[key]) for key in keys] for entry in described])


@mesh.command()
@click.argument("name", required=False)
@data_dir_option
@json_option
def show(name: str | None, data_dir: str | None, as_json: bool) -> None:
    """Show a mesh: its id, root key, bootstrap addresses, and what this node may do in it.

    Without NAME, the only mesh there is.

    \b
    Example:
      meshnode mesh show home
    """
    data = _open(config_from({"data_dir": data_dir, "mesh": name}))
    described = _described(data, name or _only(data.mesh_names()))
    if as_json:
        print_json(described)
    else:
        print_facts((key.replace("_", " "), _shown(value)) for key, value in described.items())


@click.command()
@click.option("--mesh", "mesh_name", metavar="NAME", help="Which mesh, if there are several.")
@click.option(
    "--uses",
    type=click.IntRange(1, USES_MAX),
    default=1,
    show_default=True,
    help="How many machines may join with it.",
)
@click.option(
    "--expires", metavar="TIME", default="24h", show_default=True, help="Such as 30m, 24h, 7d."
)
@click.option(
    "--role",
    type=click.Choice(["node", "gateway", "bootstrap"]),
    default="node",
    show_default=True,
    help="What the invited may be.",
)
@click.option(
    "--addr",
    "addrs",
    multiple=True,
    metavar="MULTIADDR",
    help="Where this node is reached, if it cannot know; repeatable. Works while it is stopped.",
)
@api_option
@data_dir_option
@json_option
def invite(
    mesh_name: str | None,
    uses: int,
    expires: str,
    role: Role,
    addrs: tuple[str, ...],
    api: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Print a token that lets another machine join.

    The token is a key to this node's mesh: send it as you would send a password. It names this
    node, which has to be running when the other joins. A running node knows its own addresses
    and makes the token; with --addr it is made here, from the mesh's root key.

    \b
    Examples:
      meshnode invite
      meshnode invite --uses 10 --expires 7d --role gateway
      meshnode invite --addr /ip4/203.0.113.5/udp/9338/quic-v1     # behind a router
    """
    config = config_from({"data_dir": data_dir, "mesh": mesh_name})
    expires_s = seconds_of(expires)
    if addrs:
        expires_at = int(time.time()) + expires_s
        token = _invite_from_disk(config, addrs, role, uses, expires_at)
    else:
        try:
            node = find_node(api, config.data_dir)
        except NoNodeError as error:
            raise NoNodeError(
                f"{error}; or say with --addr where this node will be reached"
            ) from error
        if mesh_name is not None and (running := node.status().mesh.name) != mesh_name:
            raise ConfigError(
                f"the running node is in the mesh {running}, not {mesh_name}: "
                "say where the node of that mesh is reached, with --addr"
            )
        ticket = node.invite(uses, expires_s, role)
        token, expires_at = ticket.token, ticket.expires_at
    if as_json:
        print_json({"token": token, "expires_at": expires_at, "uses": uses, "role": role})
        return
    # The token alone on stdout, so that it can be piped; the rest is for the eyes.
    often = "once" if uses == 1 else f"{uses} times"
    click.echo(f"Good {often} within {duration(expires_s)}. On the other machine:\n", err=True)
    click.echo("  meshnode serve --join TOKEN\n", err=True)
    click.echo(token)


def _invite_from_disk(
    config: Config, addrs: tuple[str, ...], role: Role, uses: int, expires_at: int
) -> str:
    import msgspec

    from meshnode.credentials import MeshDescriptor, create_invite

    data = _open(config)
    rooted = tuple(name for name in data.mesh_names() if data.root_key(name) is not None)
    name = config.mesh or _only(rooted)
    membership = _membership(data, name)
    root = data.root_key(name)
    if root is None:
        raise ConfigError(
            f"the root key of {name} is not here: invite on the node that made the mesh"
        )
    peer_id = data.key().peer_id
    reached = tuple(a if "/p2p/" in a else f"{a.rstrip('/')}/p2p/{peer_id}" for a in addrs)
    fields = {**msgspec.structs.asdict(membership.mesh), "bootstrap": reached}
    try:
        described = msgspec.convert(fields, MeshDescriptor)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"--addr must be a multiaddr such as /ip4/203.0.113.5/udp/9338/quic-v1 ({error})"
        ) from error
    return create_invite(
        root,
        described,
        honoured_by=peer_id,
        roles=(role,),
        uses_max=uses,
        not_after=expires_at,
    )


def seconds_of(text: str) -> int:
    """86400 of "24h" or "1d". Raises `ConfigError` outside of what an invitation may last."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text.strip())
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not EXPIRES_S_MIN <= seconds <= EXPIRES_S_MAX:
        raise ConfigError(f"--expires must be a time from 1m to 365d, such as 24h, not {text!r}")
    return seconds


def _open(config: Config) -> DataDir:
    from meshnode.store import DataDir

    return DataDir(config.data_dir)


def _membership(data: DataDir, name: str) -> Membership:
    found = data.membership(name)
    if found is None:
        known = ", ".join(data.mesh_names()) or "none"
        raise ConfigError(
            f"this node does not belong to a mesh {name!r}. Meshes here: {known}. "
            f"Make it with `meshnode mesh create {name}`, or join with a token."
        )
    return found


def _only(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise ConfigError("this node has no mesh to show or share yet: meshnode mesh create NAME")
    raise ConfigError(f"there are several meshes here: name one of {', '.join(names)}")


def _described(data: DataDir, name: str) -> dict[str, object]:
    """A mesh, by its name here, and this node's place in it, for people and as JSON."""
    from meshnode.credentials import verify_chain

    membership = _membership(data, name)
    mesh = membership.mesh
    described: dict[str, object] = {
        "name": name,
        "id": mesh.mesh_id,
        "admission": mesh.admission,
        "root": mesh.root,
        "root_key": data.root_key(name) is not None,
        "bootstrap": list(mesh.bootstrap),
    }
    peer_id = data.key().peer_id
    try:
        right = verify_chain(mesh, peer_id, membership.chain, int(time.time()))
    except NotAuthorizedError as error:
        return described | {"peer_id": peer_id, "roles": [], "not_after": None, "why": str(error)}
    until = datetime.fromtimestamp(right.not_after, UTC).isoformat()
    return described | {"peer_id": peer_id, "roles": list(right.roles), "not_after": until}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "here" if value else "elsewhere"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "–" if value is None else str(value)
