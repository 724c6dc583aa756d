"""How things look in a terminal. Knows text and tables; decides nothing.

Names, addresses and answers come from peers and models, so whatever is shown passes through
`printable()`: a terminal obeys escape sequences, whoever wrote them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence

import click

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
BAR_STEPS = 1000
PIPE_WIDTH = 240
"""Columns when nobody looks: wide enough that grep and awk find a row on one line."""


def printable(text: str) -> str:
    """`text` without characters that a terminal would act upon, line breaks and tabs excepted."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2 if sys.stdout.isatty() else None))


def short_peer(peer_id: str) -> str:
    """The end of a peer id: all Ed25519 ones start with the same 8 characters."""
    return f"…{printable(peer_id)[-8:]}"


def size(amount_bytes: float) -> str:
    for unit in _UNITS:
        if amount_bytes < 1024 or unit == _UNITS[-1]:
            break
        amount_bytes /= 1024
    return f"{amount_bytes:.0f} {unit}" if unit == "B" else f"{amount_bytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """The two largest parts: "3 d 4 h", "12 min 5 s"."""
    rest = max(0, int(seconds))
    parts = []
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        amount, rest = divmod(rest, length_s)
        if amount:
            parts.append(f"{amount} {unit}")
    return " ".join(parts[:2]) or "0 s"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Left-aligned columns; those named with a leading ">" are numbers and right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left")
    for row in rows:
        # Text, not str: square brackets in a peer's words are not our markup.
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Label and value, one a line."""
    rows = list(facts)
    width = max((len(label) for label, _ in rows), default=0)
    for label, value in rows:
        click.echo(f"{label:<{width}}  {printable(value)}")


def warn(message: str) -> None:
    click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {printable(message)}", err=True)


class Bar:
    """Progress on a terminal's standard error; elsewhere nothing."""

    def __init__(self, *, is_shown: bool) -> None:
        self._bar = click.progressbar(
            length=BAR_STEPS, file=sys.stderr, hidden=not (is_shown and sys.stderr.isatty())
        )

    def __enter__(self) -> Bar:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.render_finish()

    def show(self, doing: str, fraction: float) -> None:
        self._bar.label = f"{doing:<9}"
        self._bar.update(int(BAR_STEPS * fraction) - self._bar.pos)
