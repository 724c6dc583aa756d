"""The API's door: who may come in, by the key file as it is now.

Decides when the file is read again, and what holds while it is missing or damaged. Does not know
what a key looks like (`keys.py`), nor HTTP.

A door without a file is open, which is allowed on loopback only. From the moment there is one,
every request needs a key. What happens to the file later never opens the door:

* changed: in force within a second, so that `meshnode key create` and `revoke` need no restart
* damaged, or writable by others: the keys that were read last stay, if any, and the log says why
* gone: nobody comes in until it is back
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshnode.config import Config, is_loopback, split_host_port
from meshnode.errors import ConfigError
from meshnode.gateway.keys import ApiKey, BadKeyError, Limiter, find_key, load, parse

__all__ = ["Door", "Visitor", "open_door"]

LOOK_EVERY_S = 1.0
"""How long a revoked key may go on working; a look costs some microseconds."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who was let in, by the name of their key; "" where no key is asked for.

    `leave` is called once, when the request is over.
    """

    name: str
    leave: Callable[[], None]


class Door:
    """The door whose keys are in the file at `path`, if there is one.

    Raises `ConfigError` if the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._limiter = Limiter()
        self._looked_at = -math.inf
        # Before reading: a change in between is then seen as one.
        self._version = self._version_now()
        self._keys = self._read()

    @property
    def keys(self) -> tuple[ApiKey, ...] | None:
        """None: there was never a file, and no key is asked for."""
        return self._keys

    def admit(self, token: str | None, now: float) -> Visitor:
        """Let a request in. `now` in seconds, monotonic. Raises `BadKeyError` or `LimitError`."""
        self._look(now)
        if self._keys is None:
            return Visitor("", _nothing)
        if not token:
            raise BadKeyError(
                "This API asks for a key: send it as `Authorization: Bearer mesh-sk-…`. "
                "Whoever runs this node makes one with `meshnode key create NAME`."
            )
        key = find_key(self._keys, token)
        if key is None:
            raise BadKeyError("This API key is not known here; it may have been revoked.")
        return Visitor(key.name, self._limiter.begin(key, now))

    def _look(self, now: float) -> None:
        """Read the file again if it is another one, at most once in `LOOK_EVERY_S`.

        Blocks the loop, for a look at one small local file.
        """
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        version = self._version_now()
        if version == self._version:
            return
        self._version = version
        try:
            keys = self._read()
        except ConfigError as error:
            self._keys = self._keys or ()
            _log.error("%d API keys stay in force: %s", len(self._keys), error)
            return
        if keys is None:
            _log.error("the key file %s is gone: nobody can use the API", self._path)
            keys = ()
        _log.info("API keys in force: %d", len(keys))
        self._keys = keys
        self._limiter.keep_only(keys)

    def _read(self) -> tuple[ApiKey, ...] | None:
        text = load(self._path)
        return None if text is None else parse(text, self._path)

    def _version_now(self) -> tuple[int, ...]:
        """Tells one content of the file from the next; the change time sees a chmod, too."""
        try:
            found = os.stat(self._path)
        except OSError as error:
            return (error.errno or 0,)
        return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def open_door(config: Config) -> Door | None:
    """The door of a node's API; None if it has no API, or asks nobody for a key.

    Raises `ConfigError` if strangers could reach the API and would need no key.
    """
    if not config.api or not config.ask_for_keys:
        return None
    path = config.key_file
    door = Door(path)
    create = "meshnode key create NAME"
    if config.api_key_file is not None:
        create += f" --file {path}"
        if door.keys is None:
            raise ConfigError(f"there is no key file {path}: `{create}` makes it")
    if not door.keys and not is_loopback(split_host_port(config.api)[0]):
        raise ConfigError(
            f"other machines can reach an API on {config.api}, and there is no API key in {path}: "
            f"make one with `{create}`, or keep the API on this machine with --api 127.0.0.1:9337."
            " Behind a proxy that knows who is asking, say --no-api-key."
        )
    return door


def _nothing() -> None:
    """What is to be done for somebody who was not counted."""
