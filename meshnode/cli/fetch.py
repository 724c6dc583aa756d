"""Bring a model's file from the nodes of the mesh that have it.

The running node does it, which knows whom to ask; this asks it how far it is, puts the file where
it is wanted, and says how to go on.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import click

from meshnode.cli.api import find_node
from meshnode.cli.edge import api_option, config_from, data_dir_option, json_option
from meshnode.cli.output import Bar, print_facts, print_json, size
from meshnode.errors import ConfigError

LOOK_S = 0.25
"""Between two questions; the node gives up after ten seconds without any."""


@click.command()
@click.argument("model")
@click.option(
    "--out",
    metavar="FILE",
    help="Put it there. [default: among the node's models, where its name finds it]",
)
@api_option
@data_dir_option
@json_option
def fetch(
    model: str, out: str | None, api: str | None, data_dir: str | None, as_json: bool
) -> None:
    """Bring MODEL's file from whichever nodes of the mesh have it.

    MODEL is a name as in `meshnode models`, or a digest. Every piece is checked against the digest
    before it is written, so that it does not matter whom it comes from. If it is interrupted, the
    next call goes on where this one stopped.

    \b
    Examples:
      meshnode models fetch qwen3-8b-q4_0
      meshnode models fetch qwen3-8b-q4_0 --out /srv/models/qwen3.gguf
      meshnode serve --standby qwen3-8b-q4_0
    """
    from meshnode.console.requests import FetchRequest

    target = None if out is None else Path(out).expanduser().absolute()
    if target is not None and target.exists():
        raise ConfigError(f"{target} is there already: give another --out")
    running = find_node(api, config_from({"data_dir": data_dir}).data_dir)
    request = FetchRequest(model)
    begun = time.monotonic()
    with Bar(is_shown=not as_json) as bar:
        while (found := running.fetch(request)).state != "done":
            bar.show(found.state, found.done_bytes / max(found.wanted_bytes, 1))
            time.sleep(LOOK_S)
    took_s = time.monotonic() - begun
    path = Path(found.path)
    if target is not None:
        _move(path, target)
        path = target
    named = path if target is not None else found.name
    if as_json:
        print_json({"path": str(path), "model": found.model, "name": found.name})
        return
    size_bytes = path.stat().st_size
    print_facts(
        (
            ("file", str(path)),
            ("digest", found.model),
            ("size", f"{size(size_bytes)} in {took_s:.1f} s"),
            ("keep it ready", f"meshnode serve --standby {named}"),
        )
    )


def _move(path: Path, target: Path) -> None:
    try:
        shutil.move(path, target)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be moved to {target}: {error.strerror}; it is whole where it is"
        ) from error
