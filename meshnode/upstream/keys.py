"""The keys of the servers behind a node, from one file.

Decides how the file says which key is whose. A key is a secret: no error repeats a line.
"""

from __future__ import annotations

from pathlib import Path

from meshnode.errors import ConfigError

__all__ = ["read_keys"]

FILE_BYTES_MAX = 64 * 1024
"""A few lines; anything larger is the wrong file."""


def read_keys(path: Path, urls: tuple[str, ...]) -> dict[str, str]:
    """The key for each of `urls` that has one. Raises `ConfigError`.

    A line is `URL KEY`, or a bare KEY if there is only one server: with several, none gets a key
    that was meant for another. Empty lines, and those that begin with #, say nothing.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"{path} is too large for a file of keys (limit 64 KiB)")
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path} has something in it that is no key") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) == 1 and len(urls) == 1:
            words = [urls[0], *words]
        url = words[0].rstrip("/").removesuffix("/v1")
        if len(words) != 2 or url not in urls:
            raise ConfigError(
                f"{path}, line {number}: write the URL of an --upstream, a space and its key"
            )
        if not words[1].isprintable():  # in a header it would be an error that repeats it
            raise ConfigError(f"{path}, line {number}: this is no key")
        keys[url] = words[1]
    return keys
