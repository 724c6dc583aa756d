"""The `meshnode-bootstrap` command: a node with the role "bootstrap" in the foreground."""

from __future__ import annotations

import click

from meshnode.cli.edge import EdgeCommand, config_from, data_dir_option, json_option
from meshnode.cli.serve import run
from meshnode.config import LISTEN_DEFAULT, Config


@click.command(cls=EdgeCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--mesh", metavar="NAME", help="The mesh to introduce; this node must be a member.")
@click.option("--create", is_flag=True, help="Make the mesh NAME if it does not exist yet.")
@click.option("--public", is_flag=True, help="Introduce the open mesh of public.json.")
@click.option(
    "--join",
    metavar="TOKEN",
    help="Become a member with a token from `meshnode invite --role bootstrap`; needed once. "
    "MESHNODE_JOIN keeps it out of the process list.",
)
@click.option(
    "--listen",
    multiple=True,
    metavar="MULTIADDR",
    help=f"Where peers reach this node; repeatable. [default: {' and '.join(LISTEN_DEFAULT)}]",
)
@click.option(
    "--bootstrap",
    multiple=True,
    metavar="MULTIADDR",
    help="Another introducer of the same mesh, with its /p2p/ id; repeatable.",
)
@click.option("--api", metavar="HOST:PORT", help="Answer the API too. [default: no API]")
@click.option(
    "--api-key-file",
    metavar="FILE",
    help="Whose keys open the API; `meshnode key create` makes it. [default: DIR/api-keys.toml]",
)
@data_dir_option
@click.option("--config", metavar="FILE", help="A TOML file. [default: DIR/config.toml]")
@click.option(
    "--log-format",
    type=click.Choice(["pretty", "json"]),
    help="For people or for machines; both go to stderr. [default: pretty]",
)
@json_option
def bootstrap(create: bool, public: bool, as_json: bool, **options: object) -> None:
    """Introduce the peers of a mesh to each other.

    A node that knows this one finds all others. It serves no models, and requests do not pass
    through it; a mesh that has met goes on without it. When it has started it prints its
    addresses (with --json or --log-format json, as one line of JSON): they are what the others
    pass as --bootstrap.

    \b
    Examples:
      meshnode-bootstrap --mesh home --create
      meshnode-bootstrap --join mesh1.…
      meshnode-bootstrap --public
    """
    if public and (options["mesh"] or options["join"]):
        raise click.UsageError("--public names a mesh already: leave --mesh and --join away")
    if public:
        options["mesh"] = "public"
    config = config_from({**options, "no_mdns": True}, "bootstrap")
    if create:
        _create(config)
    elif config.mesh is None and config.join is None:
        _require_a_mesh(config)
    run(config, as_json)


def _create(config: Config) -> None:
    from meshnode.membership import create_mesh
    from meshnode.store import DataDir

    if config.mesh is None:
        raise click.UsageError("--create needs --mesh NAME, the name of a mesh of your own")
    data = DataDir(config.data_dir)
    if data.membership(config.mesh) is None:
        create_mesh(config.mesh, data, data.key(), "bootstrap")


def _require_a_mesh(config: Config) -> None:
    """A node makes a mesh of its own when it has none; an introducer of nobody is a mistake."""
    from meshnode.store import DataDir

    if not DataDir(config.data_dir).mesh_names():
        raise click.UsageError(
            "which mesh? --mesh NAME --create makes one, --join TOKEN enters one, --public is "
            "the open one"
        )


def main() -> None:
    """Entry point of the console script; always ends in `SystemExit`."""
    bootstrap(prog_name="meshnode-bootstrap")


if __name__ == "__main__":
    main()
