"""API keys: what one looks like, the file that lists them, and how much each may ask for.

Decides which tokens are keys, what a line of the key file may say, and when a key has had
enough. Pure but for `load()`, which reads the file; time is an argument. Does not know HTTP, nor
when the file changes (`door.py`).

The file is TOML that a person can edit, one line a key:

    alice = "sha256:5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"
    build = { hash = "sha256:…", per-minute = 60, concurrent = 4 }
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshnode.errors import ConfigError, MeshnodeError

__all__ = [
    "CONCURRENT_MAX",
    "PER_MINUTE_MAX",
    "ApiKey",
    "BadKeyError",
    "LimitError",
    "Limiter",
    "find_key",
    "generate_token",
    "hash_token",
    "is_key_name",
    "load",
    "parse",
    "with_key",
    "without_key",
]

TOKEN_PREFIX = "mesh-sk-"
"""Seen in a log or a repository, it says whose secret it is; secret scanners look for such."""
TOKEN_BYTES = 32
"""256 bits from the system's generator: nobody guesses one."""
KEYS_MAX = 1000
"""Comparing a token with all of them takes about 0.2 ms. More people than that have an identity
provider, and a proxy in front that asks it."""
FILE_BYTES_MAX = 256 * 1024
"""A thousand lines of 160 bytes, and as much again for comments."""
PER_MINUTE_MAX = 100_000
CONCURRENT_MAX = 10_000
"""Above these a limit limits nothing."""
RETRY_AFTER_BUSY_S = 1.0
"""When a key's running requests end is not known; an answer takes seconds."""

# Bare keys of TOML: they need no quotes, and no escapes in a log.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOKEN = re.compile(rf"{TOKEN_PREFIX}[A-Za-z0-9_-]{{43}}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")

_HEADER = """\
# Who may use this node's API: NAME = "sha256:…", the hash of a key. The keys themselves are not
# kept. `meshnode key create NAME` adds a line; a running node sees every change of this file.
"""


class BadKeyError(MeshnodeError):
    """A request came without a key, or with one that is not in the file (HTTP 401)."""


class LimitError(MeshnodeError):
    """A key has used up what it may ask for now (HTTP 429 with Retry-After)."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A line of the key file. `digest` is the token's SHA-256; None means no limit."""

    name: str
    digest: bytes
    per_minute: int | None = None
    concurrent: int | None = None


# ---------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------


def generate_token() -> str:
    return TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def hash_token(token: str) -> bytes:
    """What is kept of a token, 32 bytes.

    A plain hash is enough: slow ones (scrypt, Argon2) and salts protect passwords, which people
    choose and an attacker can try. Of 2**256 random tokens none is ever tried twice.
    """
    return hashlib.sha256(token.encode()).digest()


def find_key(keys: Iterable[ApiKey], token: str) -> ApiKey | None:
    """The key that `token` is.

    Only what `generate_token` could have made is looked up: a password whose hash somebody has
    put into the file opens nothing. All keys are compared, each in constant time, so the time
    tells neither whose key was nearly right nor where in the file it stands.
    """
    if not _TOKEN.fullmatch(token):
        return None
    digest = hash_token(token)
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def is_key_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def load(path: Path) -> str | None:
    """The text of the key file, None if there is none. Raises `ConfigError`.

    Hashes are no secret, but the file decides who may enter: one that others than its owner can
    write to is refused.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{path} is not a file: it is read again whenever it changes")
            if mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(
                    f"others can write to {path}, and so let anybody in: chmod 600 {path}"
                )
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ConfigError(f"{path} is too large for a key file (limit {FILE_BYTES_MAX} bytes)")
        return data.decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text: {error}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    """Opening a pipe would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse(text: str, place: object) -> tuple[ApiKey, ...]:
    """The keys of a file's text, in its order. Raises `ConfigError`, which names `place`.

    No error repeats a value: people paste keys where hashes belong.
    """
    try:
        written = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: numbers too long
        raise ConfigError(f"{place} is not valid TOML: {error}") from error
    if len(written) > KEYS_MAX:
        raise ConfigError(f"{place} has more than {KEYS_MAX} keys")
    keys: dict[bytes, ApiKey] = {}
    for name, value in written.items():
        key = _key(name, value, place)
        if (other := keys.get(key.digest)) is not None:
            raise ConfigError(f"{place}: {other.name} and {name} have the same key")
        keys[key.digest] = key
    return tuple(keys.values())


def with_key(text: str, key: ApiKey, place: object) -> str:
    """`text` with a line more, all that people wrote left as it is. Raises `ConfigError`."""
    before = parse(text, place)
    if any(other.name == key.name for other in before):
        raise ConfigError(
            f"there is a key called {key.name} already: revoke it first "
            f"(`meshnode key revoke {key.name}`), or choose another name"
        )
    if len(before) == KEYS_MAX:
        raise ConfigError(f"{place} has {KEYS_MAX} keys: revoke one first")
    line = _line(key)
    parse(line, place)  # says what is wrong with the key itself
    head = text or _HEADER
    after = f"{head}{'' if head.endswith(chr(10)) else chr(10)}{line}\n"
    if not _parses_to(after, (*before, key), place):
        raise ConfigError(f"{place} ends inside a [table]: put this line above it:\n{line}")
    return after


def without_key(text: str, name: str, place: object) -> str:
    """`text` without the line of `name`. Raises `ConfigError`."""
    before = parse(text, place)
    after = tuple(key for key in before if key.name != name)
    if after == before:
        known = ", ".join(key.name for key in before) or "none"
        raise ConfigError(f"there is no key called {name!r}. Keys in {place}: {known}.")
    line = re.compile(rf"""[ \t]*(['"]?){name}\1[ \t]*=""")
    kept = "".join(part for part in text.splitlines(keepends=True) if not line.match(part))
    if _parses_to(kept, after, place):
        return kept
    raise ConfigError(f"{name} is more than a line in {place}: take it out with an editor")


def _parses_to(text: str, keys: tuple[ApiKey, ...], place: object) -> bool:
    try:
        return parse(text, place) == keys
    except ConfigError:
        return False


def _key(name: str, value: object, place: object) -> ApiKey:
    if not is_key_name(name):
        raise ConfigError(
            f"{place}: {name[:64]!r} cannot be a name: use up to 64 letters, digits, '_' and '-'"
        )
    fields: dict[str, Any] = value if isinstance(value, dict) else {"hash": value}
    if unknown := fields.keys() - {"hash", "per-minute", "concurrent"}:
        raise ConfigError(
            f"{place}: {name} has {min(unknown)[:64]!r}. Allowed: hash, per-minute, concurrent."
        )
    found = _HASH.fullmatch(text) if isinstance(text := fields.get("hash"), str) else None
    if found is None:
        raise ConfigError(
            f'{place}: {name} must be "sha256:" and 64 hexadecimal digits, as '
            f"`meshnode key create {name}` writes it"
        )
    return ApiKey(
        name,
        bytes.fromhex(found[1]),
        _limit(fields, "per-minute", PER_MINUTE_MAX, f"{place}: {name}"),
        _limit(fields, "concurrent", CONCURRENT_MAX, f"{place}: {name}"),
    )


def _limit(fields: dict[str, Any], key: str, limit_max: int, place: str) -> int | None:
    value = fields.get(key)
    # Exact type: bool is an int to isinstance().
    if value is None or (type(value) is int and 1 <= value <= limit_max):
        return value
    raise ConfigError(f"{place}: {key} must be a number from 1 to {limit_max}")


def _line(key: ApiKey) -> str:
    hashed = f'"sha256:{key.digest.hex()}"'
    limits = [
        f"{word} = {value}"
        for word, value in (("per-minute", key.per_minute), ("concurrent", key.concurrent))
        if value is not None
    ]
    if not limits:
        return f"{key.name} = {hashed}"
    return f"{key.name} = {{ {', '.join((f'hash = {hashed}', *limits))} }}"


# ---------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Use:
    """What a key has left: requests it may begin, as of `at`, and how many are running."""

    left: float
    at: float
    running: int = 0


class Limiter:
    """A token bucket and a counter for each key; at most one of each for a key of the file.

    `now` is in seconds on any clock that does not go back.
    """

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}

    def keep_only(self, keys: Iterable[ApiKey]) -> None:
        """Forget the keys that are gone. Their running requests end as they would have."""
        names = {key.name for key in keys}
        self._uses = {name: use for name, use in self._uses.items() if name in names}

    def begin(self, key: ApiKey, now: float) -> Callable[[], None]:
        """Count a request; call what is returned once, when it is over. Raises `LimitError`.

        The bucket holds a minute's requests and fills evenly: a burst may use them at once. A
        refused request is not counted.
        """
        use = self._uses.setdefault(key.name, _Use(float(key.per_minute or 0), now))
        if key.concurrent is not None and use.running >= key.concurrent:
            raise LimitError(
                f"The API key {key.name} has {use.running} requests running and may have "
                f"{key.concurrent}. Wait for one to end.",
                RETRY_AFTER_BUSY_S,
            )
        if key.per_minute is not None:
            filled = use.left + max(0.0, now - use.at) * key.per_minute / 60
            use.left, use.at = min(filled, float(key.per_minute)), now
            if use.left < 1:
                raise LimitError(
                    f"The API key {key.name} may begin {key.per_minute} requests a minute.",
                    (1 - use.left) * 60 / key.per_minute,
                )
            use.left -= 1
        use.running += 1

        def end() -> None:
            use.running -= 1

        return end
