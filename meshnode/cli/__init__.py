"""The `meshnode` command: what people type, and what they see.

In the order of a first day: `serve.py` (run a node), `mesh.py` (make a mesh, invite), `look.py`
(what is there), `chat.py` (use it), `key.py` (let others use it), `fetch.py` (a model from peers),
`shard.py` (a part of one), `placement.py` and `orders.py` (where models are and should be),
`agreement.py` (proofs, recovery), `health.py` (doctor). They are thin: a running node is asked over
its own HTTP API (`api.py`), a stopped one is its data directory. Nothing here is imported by
anything else, and everything slow is imported inside the command that needs it, so that
`meshnode --help` answers at once.
"""

from __future__ import annotations

import platform

import click

from meshnode import __version__
from meshnode.cli.agreement import export, recover, verify
from meshnode.cli.chat import chat
from meshnode.cli.edge import EdgeGroup, json_option
from meshnode.cli.fetch import fetch
from meshnode.cli.health import doctor
from meshnode.cli.key import key
from meshnode.cli.look import models, peers, status
from meshnode.cli.mesh import invite, mesh
from meshnode.cli.orders import drain, pin, unpin
from meshnode.cli.output import print_json
from meshnode.cli.placement import placement
from meshnode.cli.serve import client, serve
from meshnode.cli.shard import shard


@click.group(
    cls=EdgeGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Pool machines into one OpenAI-compatible API, peer to peer.

    Every machine runs a node. Nodes find each other, tell each other which models they have,
    and any of them answers any request: itself, or through a tunnel to a peer that can.

    \b
    One machine:
      meshnode serve                     # API on http://127.0.0.1:9337/v1
      meshnode chat                      # talk to it
    \b
    A second machine:
      meshnode invite                    # on the first: prints a token
      meshnode serve --join mesh1.…      # on the second
    \b
    Programs on other machines:
      meshnode key create NAME           # prints an API key
      meshnode serve --api 0.0.0.0:9337
    \b
    What is going on:
      meshnode status | peers | models | doctor
    \b
    Where models are, and why:
      meshnode placement                 # and what if a node went, or came?
      meshnode pin MODEL NODE            # or: meshnode drain NODE
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version of meshnode and of the Python it runs on.

    \b
    Example:
      meshnode version --json
    """
    if as_json:
        print_json({"meshnode": __version__, "python": platform.python_version()})
    else:
        click.echo(f"meshnode {__version__} (Python {platform.python_version()})")


for command in (serve, client, mesh, invite, status, peers, models, chat, key, doctor):
    cli.add_command(command)
for command in (placement, pin, unpin, drain):
    cli.add_command(command)
for command in (export, verify, recover):
    mesh.add_command(command)
models.add_command(shard)
models.add_command(fetch)


def main() -> None:
    """Entry point of the console script; always ends in `SystemExit`."""
    cli(prog_name="meshnode")
