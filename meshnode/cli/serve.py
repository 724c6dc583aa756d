"""Run a node: `serve` with engines, `client` without."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import click

from meshnode.cli.edge import F, config_from, data_dir_option, json_option
from meshnode.config import (
    API_DEFAULT,
    LISTEN_DEFAULT,
    SLOTS_DEFAULT,
    Activations,
    Config,
    KvType,
    LogLevel,
    Speculate,
)

_NODE_OPTIONS: tuple[Callable[[F], F], ...] = (
    click.option(
        "--api",
        metavar="HOST:PORT",
        help=f"Where the OpenAI API listens. [default: {API_DEFAULT}]",
    ),
    click.option(
        "--api-key-file",
        metavar="FILE",
        help="Whose keys open the API; `meshnode key create` makes it. Needed if other machines "
        "reach the API. [default: DIR/api-keys.toml, if there is one]",
    ),
    click.option(
        "--no-api-key",
        is_flag=True,
        default=None,
        help="Ask nobody for a key, wherever the API listens: for a proxy that does it.",
    ),
    click.option(
        "--listen",
        multiple=True,
        metavar="MULTIADDR",
        help=f"Where peers reach this node; repeatable. [default: {' and '.join(LISTEN_DEFAULT)}]",
    ),
    click.option(
        "--bootstrap",
        multiple=True,
        metavar="MULTIADDR",
        help="A member to start from, with its /p2p/ id; repeatable.",
    ),
    click.option("--mesh", metavar="NAME", help='A mesh this node belongs to, or "public".'),
    click.option(
        "--join",
        metavar="TOKEN",
        help="Become a member with a token from `meshnode invite`; needed once. "
        "MESHNODE_JOIN keeps it out of the process list.",
    ),
    click.option("--no-mdns", is_flag=True, default=None, help="Do not look for peers on the LAN."),
    data_dir_option,
    click.option(
        "--config",
        metavar="FILE",
        help="A TOML file with keys named like these flags. [default: DIR/config.toml]",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["pretty", "json"]),
        help="For people or for machines; both go to stderr. [default: pretty]",
    ),
    click.option("--log-level", type=click.Choice(get_args(LogLevel)), help="[default: info]"),
    json_option,
)


def node_options(command: F) -> F:
    """The options of everything that runs a node."""
    for option in reversed(_NODE_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.option(
    "--model",
    multiple=True,
    metavar="PATH_OR_NAME[=ALIAS]",
    help="Serve this model here: a GGUF file, or the name of a known model; repeatable. "
    "[default: default, unless --standby or --upstream is given]",
)
@click.option(
    "--standby",
    multiple=True,
    metavar="PATH_OR_NAME[=ALIAS]",
    help="Keep this model ready on disk, verified, and load it when the mesh asks: because its "
    "last node died, or has too much to do; repeatable. mesh:NAME is a model whose file others "
    "have: what this node is to load of it comes from them then.",
)
@click.option(
    "--mmproj",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Let the model see images by this projector; with several models, say which; repeatable.",
)
@click.option(
    "--upstream",
    multiple=True,
    metavar="URL[=NAME[@DIGEST]]",
    help="Serve what another OpenAI-compatible server has (vLLM, Ollama, llama-server, ...), or "
    "only its model NAME; repeatable.",
)
@click.option(
    "--upstream-key-file",
    metavar="FILE",
    help="Keys for these servers: lines of URL KEY, or one KEY.",
)
@click.option(
    "--context",
    type=int,
    metavar="TOKENS",
    help="Context to keep per model. [default: as trained, if it fits in memory]",
)
@click.option(
    "--slots",
    type=int,
    metavar="N",
    help=f"Requests answered at once per model. [default: {SLOTS_DEFAULT}]",
)
@click.option(
    "--activations",
    type=click.Choice(get_args(Activations)),
    help="What crosses between the owners of a cut model whose last layers are here: f32 is exact, "
    "f16 half of it, i8 a quarter; both change about one token in thirty. [default: f32]",
)
@click.option(
    "--kv-type",
    type=click.Choice(get_args(KvType)),
    help="How conversations are kept in memory: q8_0 takes half of f16, and reads long prompts "
    "more slowly. [default: f16]",
)
@click.option(
    "--kv-spill",
    metavar="SIZE",
    help="Conversations that memory has no room for go to disk up to this, per model, such as "
    "2GiB. [default: 0, none]",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="How much memory the mesh may fill with models here, such as 8GiB; each of several "
    "nodes on one machine needs its own part. [default: 3/4 of the machine's]",
)
@click.option(
    "--no-share-weights",
    is_flag=True,
    default=None,
    help="Give no model file to other members. They may have them otherwise, because a mesh by "
    "invitation is of people who trust each other, and a model that one copy is left of dies with "
    "its machine; in an open mesh nobody gets any.",
)
@click.option(
    "--speculate",
    type=click.Choice(get_args(Speculate)),
    help="Guess tokens ahead and let the model check several at once: from the text so far, by a "
    "--draft model, or automatically, only while that is measured to be faster. It is not on a "
    "busy CPU. [default: off]",
)
@click.option(
    "--draft",
    metavar="PATH_OR_NAME",
    help="A small model with the vocabulary of the --model, to guess for it.",
)
@node_options
def serve(as_json: bool, **options: object) -> None:
    """Run a node that serves models to this machine and to its mesh.

    The node loads its models, finds the other nodes of its mesh, and answers on an
    OpenAI-compatible API: with its own engine, or through whichever peer has the model and is
    free. A --model is loaded at once. A --standby takes disk and no memory until the mesh gives
    the model to this node, and none again after the mesh has taken it away.

    Every flag can also be given as MESHNODE_FLAG in the environment (lists with commas) or as a
    key in a TOML file; flags win over the environment, the environment over the file.

    \b
    Examples:
      meshnode serve
      meshnode serve --model ~/models/qwen3-8b-q4_0.gguf=qwen3
      meshnode serve --standby qwen3-8b-q4_0 --memory 8GiB
      meshnode serve --standby mesh:llama-70b-q4_0      # a part of it, from who has the file
      meshnode serve --upstream http://127.0.0.1:8000
      meshnode serve --mesh home --api 0.0.0.0:9337     # after: meshnode key create NAME
      meshnode serve --join mesh1.…
    """
    run(config_from(options, "node"), as_json)


@click.command()
@node_options
def client(as_json: bool, **options: object) -> None:
    """Run a gateway without an engine.

    The mesh's API on this machine, computed by others. Takes the flags of `meshnode serve`,
    less those about models.

    \b
    Examples:
      meshnode client --mesh home
      meshnode client --join mesh1.… --api 127.0.0.1:8080
    """
    run(config_from(options, "gateway"), as_json)


def run(config: Config, as_json: bool) -> None:
    """Run the configured node in the foreground until it is told to stop."""
    if not as_json and config.log_format == "pretty":
        click.echo("starting …", err=True)  # importing libp2p takes seconds
    from meshnode.cli.foreground import run_in_foreground
    from meshnode.cli.logs import set_up_logging
    from meshnode.node import run_node

    set_up_logging("json" if as_json else config.log_format, config.log_level)
    run_in_foreground(run_node, config, as_json=as_json)
