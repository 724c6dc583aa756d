"""Make, list and revoke the keys of the API.

Works on the key file, line by line, so that what people wrote into it stays; a running node sees
the change within a second.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshnode.cli.edge import F, config_from, data_dir_option, json_option
from meshnode.cli.output import print_json, print_table
from meshnode.errors import ConfigError

if TYPE_CHECKING:
    from meshnode.gateway.keys import ApiKey

_FILE_MODE = 0o600

_FILE_OPTIONS: tuple[Callable[[F], F], ...] = (
    click.option(
        "--file",
        metavar="FILE",
        help="The key file. [env: MESHNODE_API_KEY_FILE; default: DIR/api-keys.toml]",
    ),
    data_dir_option,
    json_option,
)


def _file_options(command: F) -> F:
    for option in reversed(_FILE_OPTIONS):
        command = option(command)
    return command


@click.group(invoke_without_command=True)
@click.pass_context
def key(context: click.Context) -> None:
    """Make, list and revoke the keys of this node's API.

    Without keys, the API answers this machine only. As soon as there is a key file, whoever asks
    it for an answer needs a key, from this machine or another. The file holds a name, a hash and
    limits for each key, and can be edited; the keys themselves are not kept.

    \b
    Let another machine use the API:
      meshnode key create alice
      meshnode serve --api 0.0.0.0:9337
      OPENAI_API_KEY=mesh-sk-…           # there, for any OpenAI client
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@key.command()
@click.argument("name")
@click.option(
    "--per-minute",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests it may begin in a minute, at once or spread. [default: no limit]",
)
@click.option(
    "--concurrent",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests it may have running at once. [default: no limit]",
)
@_file_options
def create(
    name: str,
    per_minute: int | None,
    concurrent: int | None,
    file: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Make a key for NAME and print it, this once.

    Only its hash is kept: a lost key cannot be shown again, but revoked and replaced.

    \b
    Examples:
      meshnode key create alice
      meshnode key create build --per-minute 60 --concurrent 4
      MESHNODE_API_KEY=$(meshnode key create me) meshnode chat
    """
    from meshnode.gateway.keys import (
        ApiKey,
        generate_token,
        hash_token,
        is_key_name,
        with_key,
    )

    if not is_key_name(name):
        raise ConfigError(f"{name!r} cannot be a name: use up to 64 letters, digits, '_' and '-'")
    path = _path(file, data_dir)
    token = generate_token()
    made = ApiKey(name, hash_token(token), per_minute, concurrent)
    with _editing(path) as (text, save):
        save(with_key(text or "", made, path))
    if as_json:
        print_json({**_described(made), "key": token, "file": str(path)})
        return
    # The key alone on stdout, so that it can be piped; the rest is for the eyes.
    if text is None:
        click.echo("From now on this node's API asks everybody for a key.", err=True)
    click.echo(f"The key of {name}, shown only now; its hash is in {path}:\n", err=True)
    click.echo(token)


@key.command("list")
@_file_options
def list_(file: str | None, data_dir: str | None, as_json: bool) -> None:
    """List whose keys open the API, and what each may ask for.

    \b
    Example:
      meshnode key list --json | jq -r .[].name
    """
    from meshnode.gateway.keys import load, parse

    path = _path(file, data_dir)
    text = load(path)
    keys = parse(text or "", path)
    if as_json:
        print_json([_described(key) for key in keys])
    elif keys:
        columns = ("name", ">per minute", ">concurrent")
        print_table(
            columns,
            [(key.name, _shown(key.per_minute), _shown(key.concurrent)) for key in keys],
        )
    elif text is None:
        click.echo("There are no keys, and the API asks for none: meshnode key create NAME")
    else:
        click.echo(_nobody(path))


@key.command()
@click.argument("name")
@_file_options
def revoke(name: str, file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Take the key of NAME back.

    A running node refuses it within a second; answers it has begun come to their end.

    \b
    Example:
      meshnode key revoke alice
    """
    from meshnode.gateway.keys import parse, without_key

    path = _path(file, data_dir)
    with _editing(path) as (text, save):
        rest = without_key(text or "", name, path)
        save(rest)
    left = len(parse(rest, path))
    if as_json:
        print_json({"revoked": name, "left": left, "file": str(path)})
        return
    click.echo(f"Revoked the key of {name}.")
    if not left:
        click.echo(_nobody(path))


def _nobody(path: Path) -> str:
    return (
        "No key is left, so nobody can use the API: meshnode key create NAME. To ask for none "
        f"again, on this machine only, delete {path} and restart the node."
    )


def _path(file: str | None, data_dir: str | None) -> Path:
    config = config_from({"data_dir": data_dir, "api_key_file": file})
    # The file itself, not a link to it: it is replaced.
    return config.key_file.resolve()


def _described(key: ApiKey) -> dict[str, object]:
    return {"name": key.name, "per_minute": key.per_minute, "concurrent": key.concurrent}


def _shown(limit: int | None) -> str:
    return "–" if limit is None else str(limit)


@contextmanager
def _editing(path: Path) -> Iterator[tuple[str | None, Callable[[str], None]]]:
    """The file's text, None if there is no file, and how to replace it, while nobody else does."""
    from meshnode.gateway.keys import load

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The folder is locked, not the file, which is another one after each change.
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot use the folder {path.parent}: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield load(path), lambda text: _replace(path, text, folder)
    finally:
        os.close(folder)


def _replace(path: Path, text: str, folder: int) -> None:
    """Atomic and durable. A file that was there passes on its owner and who may read it."""
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.unlink(missing_ok=True)
        new = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE)
        with open(new, "w", encoding="utf-8") as file:
            if path.exists():
                old = path.stat()
                os.fchmod(new, old.st_mode & 0o777)
                # Root may edit a service's file; the service must be able to read it afterwards.
                os.fchown(new, old.st_uid, old.st_gid)
            file.write(text)
            file.flush()
            os.fsync(new)
        temporary.replace(path)
        os.fsync(folder)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
