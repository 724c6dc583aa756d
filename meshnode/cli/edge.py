"""The edge where errors become words and exit codes.

| what happened                             | exit code |
|-------------------------------------------|-----------|
| done                                      | 0         |
| it could not be done (`MeshnodeError`)    | 1         |
| it was asked wrongly (usage, `ConfigError`) | 2       |
| Ctrl-C                                    | 130       |

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from meshnode.cli.output import print_json
from meshnode.config import Config, load
from meshnode.errors import ConfigError, MeshnodeError

F = TypeVar("F", bound=Callable[..., object])

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else."
)
data_dir_option = click.option(
    "--data-dir",
    metavar="DIR",
    help="Where the node keeps its key, meshes and peers. "
    "[env: MESHNODE_DATA_DIR; default: ~/.local/share/meshnode]",
)
api_option = click.option(
    "--api",
    metavar="HOST:PORT",
    help="The API of the running node. [default: found through its data directory]",
)


class EdgeCommand(click.Command):
    """A command that ends like the table above, in text or, with --json, in JSON."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in arguments
        try:
            code = super().main(arguments, prog_name, complete_var, False, **extra)
            sys.stdout.flush()
        except click.UsageError as error:
            if not as_json:
                error.show()
            _end(error, error.format_message(), EXIT_USAGE, as_json, shown=True)
        except MeshnodeError as error:
            _end(error, str(error), _exit_code(error), as_json)
        except (KeyboardInterrupt, click.Abort):
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output has left (`meshnode peers | head`); the interpreter must
            # not try once more to flush when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_FAILED)
        except BaseExceptionGroup as group:
            _end_of_group(group, as_json)
        sys.exit(code if isinstance(code, int) else 0)


class EdgeGroup(EdgeCommand, click.Group):
    """A group of commands that ends likewise."""


def _end_of_group(group: BaseExceptionGroup[BaseException], as_json: bool) -> NoReturn:
    """Nurseries wrap what escapes them. A group of nothing but our errors is its first one."""
    _, others = group.split(KeyboardInterrupt)
    if others is None:
        sys.exit(EXIT_INTERRUPTED)
    ours, bugs = others.split(MeshnodeError)
    if ours is None or bugs is not None:
        raise group
    first: BaseException = ours
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    _end(first, str(first), _exit_code(first), as_json)


def _exit_code(error: BaseException) -> int:
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED


def _end(
    error: BaseException, message: str, code: int, as_json: bool, *, shown: bool = False
) -> NoReturn:
    if as_json:
        kind = type(error).__name__
        print_json({"error": {"type": kind, "message": message, "exit_code": code}})
    elif not shown:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    sys.exit(code)


def config_from(options: Mapping[str, object], role: str = "node") -> Config:
    """The configuration behind a command: its options (None: not given), environment, file."""
    flags = {name.replace("_", "-"): value for name, value in options.items()}
    named = flags.pop("config", None)
    file = Path(str(named)).expanduser() if named is not None else None
    return load({**flags, "role": role}, os.environ, file)
