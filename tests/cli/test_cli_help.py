"""The first thing a newcomer sees: it has to be there at once, and to teach."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result

from meshnode import __version__
from meshnode.cli import cli

Run = Callable[..., Result]
SLOW = ("libp2p", "trio", "quart", "hypercorn", "aioquic", "cryptography", "rich", "numpy")


def every_command(
    group: click.Group = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


COMMANDS = dict(every_command())


def test_the_commands_are_all_there() -> None:
    names = {" ".join(path) for path in COMMANDS}
    assert names == {
        *("serve", "client", "mesh", "mesh create", "mesh list", "mesh show", "invite"),
        *("status", "peers", "models", "models shard", "models fetch", "chat", "doctor", "version"),
        *("key", "key create", "key list", "key revoke"),
        *("placement", "pin", "unpin", "drain"),
        *("mesh export", "mesh verify", "mesh recover"),
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_works_and_shows_how_it_is_called(meshnode: Run, path: tuple[str, ...]) -> None:
    result = meshnode(*path, "--help")
    assert result.exit_code == 0, result.output
    assert f"  meshnode {' '.join(path)}" in result.output
    assert "\b" not in result.output


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_that_does_something_speaks_json(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert isinstance(command, click.Group) or "--json" in flags


def test_every_option_says_what_it_is_for() -> None:
    silent = [
        f"{' '.join(path)} {parameter.opts[0]}"
        for path, command in COMMANDS.items()
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert silent == []


@pytest.mark.parametrize("arguments", [(), ("mesh",), ("key",)])
def test_nothing_to_do_prints_help(meshnode: Run, arguments: tuple[str, ...]) -> None:
    result = meshnode(*arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")


def test_help_imports_nothing_slow() -> None:
    probe = (
        "import sys\n"
        "from meshnode.cli import main\n"
        "try:\n main()\n"
        "except SystemExit:\n pass\n"
        f"print([name for name in {SLOW!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: meshnode" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_is_the_packages(meshnode: Run) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert json.loads(meshnode("version", "--json").stdout)["meshnode"] == __version__
    assert project["project"]["version"] == __version__


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meshnode", "version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"meshnode {__version__} (Python 3.")
