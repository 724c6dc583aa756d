"""Where log records go and what they look like: stderr, for people or for machines.

Decides format and level, and what libraries may say. As a last guard it hides anything that
looks like an invitation token or an API key; prompts, answers and keys are never given to a logger
at all.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime

import click

from meshnode.config import LogFormat, LogLevel

_QUIET = {
    # py-libp2p logs ordinary events (a peer hung up, a dial failed) as errors; what matters
    # reaches us as exceptions and is logged by us.
    "libp2p": logging.CRITICAL,
    # One line per request or packet at INFO.
    "hypercorn": logging.WARNING,
    "quic": logging.WARNING,  # aioquic's name
    "quart": logging.WARNING,
    "zeroconf": logging.WARNING,
    "asyncio": logging.WARNING,
}
_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red", "DEBUG": "bright_black"}
_SECRET = re.compile(r"(mesh1\.|mesh-sk-)[\w-]+")


def set_up_logging(log_format: LogFormat, log_level: LogLevel) -> None:
    """Send all records to stderr. Call it after libp2p was imported: that sets levels itself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if log_format == "json" else _Pretty())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)


class _Pretty(logging.Formatter):
    """`14:02:11 warning gateway: message`, coloured if someone is looking."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = record.levelname.lower()
        if sys.stderr.isatty():
            level = click.style(level, fg=_COLOURS.get(record.levelname))
        where = record.name.removeprefix("meshnode.")
        return f"{at} {level} {where}: {_message(self, record)}"


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        return json.dumps({**line, "message": _message(self, record)})


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info:
        message = f"{message}\n{formatter.formatException(record.exc_info)}"
    return _SECRET.sub(r"\1[hidden]", message)
