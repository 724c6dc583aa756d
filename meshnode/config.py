"""What the operator decided: flags, environment, file and defaults become one frozen `Config`.

Decides precedence (flags > MESHNODE_* > file > defaults) and refuses what cannot work, saying
where it was written and what is allowed. The environment and files are read in `load()` and
nowhere else. Does not know what a setting does: no networks, models or meshes.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from meshnode.errors import ConfigError

Role = Literal["node", "gateway", "bootstrap"]
KvType = Literal["f16", "q8_0"]
Activations = Literal["f32", "f16", "i8"]
LogFormat = Literal["pretty", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
Ranking = Literal["output-norm", "weight", "probability", "random", "global"]
"""By what the experts of a shard are chosen (`models/ranking.py`); the first is the best."""
Speculate = Literal["off", "lookup", "draft", "auto"]
"""Who guesses the next tokens: nobody, the text itself, a draft model, or one of these two (the
draft model if there is one) for as long as it is measured to pay."""

API_DEFAULT = "127.0.0.1:9337"
"""Loopback: without API keys only this machine may ask, and nothing has to be set up for it."""
P2P_PORT = 9338
"""Beside the API's 9337; unassigned at IANA."""
LISTEN_DEFAULT = (f"/ip4/0.0.0.0/udp/{P2P_PORT}/quic-v1", f"/ip4/0.0.0.0/tcp/{P2P_PORT}")
"""QUIC first; TCP for networks that drop UDP."""
SLOTS_DEFAULT = 8
"""Requests that are answered at once. They share one cache, so 4 or 32 cost the same memory (181
and 187 MB measured), and 8 keep a two-core machine saturated."""
SLOTS_MAX = 256
CONTEXT_TOKENS_MIN = 64
"""Below this not even a system prompt fits."""
CONTEXT_TOKENS_MAX = 2**24
MEMORY_BYTES_MIN = 128 * 2**20
"""Less than an engine takes before it has a model: a unit was mistaken."""
ENV_PREFIX = "MESHNODE_"
FILE_NAME = "config.toml"
KEY_FILE_NAME = "api-keys.toml"
FILE_BYTES_MAX = 1024 * 1024
"""A configuration is a page of text; anything larger is the wrong file."""


@dataclass(frozen=True, slots=True)
class Config:
    """Everything an operator can decide about one node. `repr` hides the invitation token."""

    # Who runs it and where its state lives. XDG base directories, "$XDG_DATA_HOME".
    data_dir: Path
    role: Role = "node"

    # Transport: multiaddrs. `listen_is_default` allows another port if ours is taken.
    listen: tuple[str, ...] = LISTEN_DEFAULT
    listen_is_default: bool = True

    # Membership: how the first peers are found, and by what right. `mesh` None lets the node
    # choose from its data directory; `join` is a bearer credential.
    bootstrap: tuple[str, ...] = ()
    mesh: str | None = None
    join: str | None = field(default=None, repr=False)
    mdns: bool = True  # peers on a LAN should need no set-up at all

    # Engines: each PATH_OR_NAME[=ALIAS]. `models` are served here; `standbys` are kept on disk,
    # verified, and loaded when the mesh asks. `projectors`, each FILE or NAME=FILE, let models see;
    # none is looked for, because a folder may hold another model's. `context_tokens` None: as the
    # model was trained, or what fits in memory. `memory_bytes` is what the mesh may fill with
    # models; None: a share.
    models: tuple[str, ...] = ("default",)
    standbys: tuple[str, ...] = ()
    projectors: tuple[str, ...] = ()
    # Servers of other kinds that this node fronts: URL[=NAME[@DIGEST]] each, and their keys.
    upstreams: tuple[str, ...] = ()
    upstream_key_file: Path | None = None
    context_tokens: int | None = None
    slots: int = SLOTS_DEFAULT
    kv_type: KvType = "f16"  # q8_0 takes half the memory, and twice the CPU at prefill
    activations: Activations = "f32"  # between the owners of a cut model; only f32 loses nothing
    kv_spill_bytes: int = 0  # on disk, for each model; not without being asked for
    memory_bytes: int | None = None
    share_weights: bool = True  # with the members of a mesh by invitation; never in an open one
    # Who guesses tokens ahead; `draft` is a PATH_OR_NAME, like a model.
    speculate: Speculate = "off"
    draft: str | None = None

    # Gateway: HOST:PORT, or "" for none. Who may use it stands in `key_file`.
    api: str = API_DEFAULT
    api_key_file: Path | None = None
    ask_for_keys: bool = True

    # What people see.
    log_format: LogFormat = "pretty"
    log_level: LogLevel = "info"

    @property
    def key_file(self) -> Path:
        """Where API keys are, if there are any: as configured, or in the data directory."""
        return self.api_key_file or self.data_dir / KEY_FILE_NAME


# --- what may be written ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Setting:
    """One key, spelled alike as a flag, in a file and (upper case) in the environment.

    `accepts` judges one value that already has the type `kind`; `many` allows a list of them.
    """

    kind: type[str] | type[int] | type[bool]
    allowed: str
    accepts: Callable[[str], bool] = bool
    many: bool = False
    secret: bool = False


_UPSTREAM = re.compile(
    r"(?P<url>https?://(?:[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?(?:/[A-Za-z0-9._~/-]*)?)"
    r"(?:=(?P<name>[A-Za-z0-9][A-Za-z0-9._:-]{0,127})(?:@(?P<digest>[0-9a-f]{64}))?)?"
)
_PEER = r"/p2p/[1-9A-HJ-NP-Za-km-z]+"
_LISTEN = re.compile(r"/(ip4|ip6)/[0-9a-fA-F.:%]+/(udp/\d{1,5}/quic-v1|tcp/\d{1,5})")
_BOOTSTRAP = re.compile(rf"/(ip4|ip6|dns|dns4|dns6)/\S+{_PEER}")
_MESH_NAME = re.compile(r"[\w.-]{1,64}")
_SIZE_UNITS = {"mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(rf"(?P<number>\d{{1,6}}(\.\d{{1,3}})?) ?(?P<unit>{'|'.join(_SIZE_UNITS)})")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def split_host_port(address: str) -> tuple[str, int]:
    """("::1", 9337) of "[::1]:9337". Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ConfigError(f"{address!r} is not HOST:PORT, for example {API_DEFAULT}")
    if ":" in host and not bracketed:
        raise ConfigError(f"{address!r}: write an IPv6 address in brackets, [::1]:9337")
    return (host[1:-1] if bracketed else host), int(port)


@dataclass(frozen=True, slots=True)
class UpstreamSpec:
    """A server to front: all that it has, or the model `name`, whose bytes have `digest`."""

    url: str
    name: str | None
    digest: str | None


def split_upstream(text: str) -> UpstreamSpec:
    """URL[=NAME[@DIGEST]], the URL as OpenAI's clients have it or without `/v1`.

    Raises `ConfigError`. No user, query or fragment: a key would stand in the process list.
    """
    found = _UPSTREAM.fullmatch(text)
    if found is None or not _is_address(found["url"]):
        raise ConfigError(f"{text!r} is not URL[=NAME[@DIGEST]], such as http://127.0.0.1:8000")
    url = found["url"].rstrip("/").removesuffix("/v1")
    return UpstreamSpec(url, found["name"], found["digest"])


def _is_address(url: str) -> bool:
    """Whether the port, and what is in brackets, can be."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine's loopback."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def size_bytes(text: str) -> int:
    """8589934592 of "8GiB". Raises `ConfigError`."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(f"{text!r} is not a size with its unit, for example 8GiB or 512MiB")
    return int(float(match["number"]) * _SIZE_UNITS[match["unit"]])


def is_mesh_name(text: str) -> bool:
    """Names become file names, and parts of addresses that people type."""
    return _MESH_NAME.fullmatch(text) is not None


def _is_api(text: str) -> bool:
    if not text:
        return True  # no API at all
    try:
        split_host_port(text)
    except ConfigError:
        return False
    return True


def _is_size(text: str) -> bool:
    return text == "0" or _is_memory(text)


def _is_upstream(text: str) -> bool:
    try:
        split_upstream(text)
    except ConfigError:
        return False
    return True


def _is_memory(text: str) -> bool:
    try:
        return size_bytes(text) >= MEMORY_BYTES_MIN
    except ConfigError:
        return False


def _within(low: int, high: int) -> Callable[[str], bool]:
    return lambda text: low <= int(text) <= high


SETTINGS: Mapping[str, _Setting] = {
    "model": _Setting(str, "PATH_OR_NAME[=ALIAS]", many=True),
    "standby": _Setting(str, "PATH_OR_NAME[=ALIAS]", many=True),
    "mmproj": _Setting(str, "FILE, or NAME=FILE if there are several models", many=True),
    "upstream": _Setting(
        str, "URL[=NAME[@DIGEST]], such as http://127.0.0.1:8000", _is_upstream, many=True
    ),
    "upstream-key-file": _Setting(str, "a file of lines URL KEY, or of one KEY"),
    "api": _Setting(str, f'HOST:PORT such as "{API_DEFAULT}", or "" for none', _is_api),
    "api-key-file": _Setting(str, "a file of API keys, which `meshnode key create` makes"),
    "no-api-key": _Setting(bool, "true or false", lambda text: True),
    "listen": _Setting(
        str,
        "a multiaddr such as /ip4/0.0.0.0/udp/9338/quic-v1 or /ip4/0.0.0.0/tcp/9338",
        lambda text: _LISTEN.fullmatch(text) is not None,
        many=True,
    ),
    "bootstrap": _Setting(
        str,
        "a multiaddr with a peer id, such as /ip4/192.0.2.7/udp/9338/quic-v1/p2p/12D3KooW…",
        lambda text: _BOOTSTRAP.fullmatch(text) is not None,
        many=True,
    ),
    "mesh": _Setting(
        str,
        "a mesh name: up to 64 letters, digits, '_', '.' or '-'",
        is_mesh_name,
    ),
    "join": _Setting(str, "the token that `meshnode invite` printed", secret=True),
    "data-dir": _Setting(str, "a directory"),
    "no-mdns": _Setting(bool, "true or false", lambda text: True),
    "context": _Setting(
        int,
        f"a number of tokens from {CONTEXT_TOKENS_MIN} to {CONTEXT_TOKENS_MAX}",
        _within(CONTEXT_TOKENS_MIN, CONTEXT_TOKENS_MAX),
    ),
    "slots": _Setting(int, f"a number from 1 to {SLOTS_MAX}", _within(1, SLOTS_MAX)),
    "activations": _Setting(
        str, " or ".join(get_args(Activations)), lambda text: text in get_args(Activations)
    ),
    "kv-type": _Setting(str, " or ".join(get_args(KvType)), lambda text: text in get_args(KvType)),
    "kv-spill": _Setting(str, "0 for none, or a size from 128MiB, with its unit: 2GiB", _is_size),
    "no-share-weights": _Setting(bool, "true or false", lambda text: True),
    "memory": _Setting(str, "a size from 128MiB, with its unit: 8GiB, 512MiB, 16GB", _is_memory),
    "speculate": _Setting(
        str, ", ".join(get_args(Speculate)), lambda text: text in get_args(Speculate)
    ),
    "draft": _Setting(str, "a GGUF file, or the name of a known model"),
    "log-format": _Setting(
        str, " or ".join(get_args(LogFormat)), lambda text: text in get_args(LogFormat)
    ),
    "log-level": _Setting(
        str, ", ".join(get_args(LogLevel)), lambda text: text in get_args(LogLevel)
    ),
}
"""Every key, in the order in which the documentation and errors list them."""


# --- reading ------------------------------------------------------------------------------------


def load(flags: Mapping[str, object], env: Mapping[str, str], file: Path | None) -> Config:
    """One `Config` from flags (keys of `SETTINGS`; None and () mean not given), environment and
    `file`, or else `config.toml` in the data directory.

    `flags` may also hold "role", which neither environment nor file can set: the command does.
    Raises `ConfigError` that names the place, the key and what is allowed.
    """
    role: Role = flags.get("role", "node")  # type: ignore[assignment]
    typed = {
        key: _checked(f"--{key}", key, value)
        for key, value in flags.items()
        if key != "role" and value is not None and value != ()
    }
    exported = _from_env(env)
    if file is None and (named := env.get(f"{ENV_PREFIX}CONFIG")):
        file = Path(named).expanduser()
    if file is not None:
        values = _default_data_dir(env) | _from_file(file) | exported | typed
    else:
        values = _default_data_dir(env) | exported | typed
        found = _path(values["data-dir"]) / FILE_NAME
        if found.exists():
            written = _from_file(found)
            if "data-dir" in written:
                raise ConfigError(
                    f"{found}: data-dir cannot be set by a file that is found in the data "
                    "directory; pass the file with --config"
                )
            values = written | values
    return _config(role, values)


def _config(role: Role, values: Mapping[str, object]) -> Config:
    """Values are checked; each is used only if it was given, so defaults stand in one place."""
    fields: dict[str, object] = {"data_dir": _path(values["data-dir"]), "role": role}
    for key, name in (
        ("listen", "listen"),
        ("bootstrap", "bootstrap"),
        ("mesh", "mesh"),
        ("join", "join"),
        ("context", "context_tokens"),
        ("slots", "slots"),
        ("kv-type", "kv_type"),
        ("activations", "activations"),
        ("speculate", "speculate"),
        ("draft", "draft"),
        ("log-format", "log_format"),
        ("log-level", "log_level"),
    ):
        if key in values:
            fields[name] = values[key]
    fields["listen_is_default"] = "listen" not in values
    fields["share_weights"] = not values.get("no-share-weights", False)
    fields["mdns"] = not values.get("no-mdns", False)
    # One file may serve all three commands: what a role has no use for is left aside.
    if role != "node":
        fields["models"] = ()
    elif {"model", "standby", "upstream"} & values.keys():
        # Whoever names only what to keep ready, or elsewhere, has decided against the default.
        fields["models"] = values.get("model", ())
        fields["standbys"] = values.get("standby", ())
        fields["upstreams"] = values.get("upstream", ())
    if role == "node":
        fields["projectors"] = values.get("mmproj", ())
    if (spill := values.get("kv-spill", "0")) != "0":
        fields["kv_spill_bytes"] = size_bytes(str(spill))
    if "upstream-key-file" in values:
        fields["upstream_key_file"] = _path(values["upstream-key-file"])
    if "memory" in values:
        fields["memory_bytes"] = size_bytes(str(values["memory"]))
    if "api" in values:
        fields["api"] = values["api"]
    elif role == "bootstrap":
        fields["api"] = ""  # an introducer answers no requests unless told to
    fields["ask_for_keys"] = not values.get("no-api-key", False)
    if "api-key-file" in values:
        if not fields["ask_for_keys"]:
            raise ConfigError("api-key-file and no-api-key contradict each other: drop one")
        fields["api_key_file"] = _path(values["api-key-file"])
    config = Config(**fields)  # type: ignore[arg-type]
    if role == "node":
        _check_speculation(config)
    return config


def _check_speculation(config: Config) -> None:
    """Raises `ConfigError` for a draft model that would do nothing, and for one that is missing."""
    if config.speculate == "draft" and config.draft is None:
        raise ConfigError("speculate = draft needs the small model that guesses: --draft FILE")
    if config.draft is None:
        return
    if config.speculate not in ("draft", "auto"):
        raise ConfigError(
            f"draft is given, and speculate is {config.speculate}, so nobody would ask it: add "
            "--speculate draft, or auto"
        )
    if len(config.models) + len(config.standbys) > 1:
        raise ConfigError("draft is for a node with one model, whose vocabulary it shares")


def _default_data_dir(env: Mapping[str, str]) -> dict[str, object]:
    base = env.get("XDG_DATA_HOME", "")
    # "If an implementation encounters a relative path [...] it should ignore it": XDG basedir.
    data_home = Path(base) if base.startswith("/") else Path("~/.local/share")
    return {"data-dir": str(data_home / "meshnode")}


def _path(text: object) -> Path:
    return Path(str(text)).expanduser().absolute()


def _from_env(env: Mapping[str, str]) -> dict[str, object]:
    """Lists are comma-separated. Unknown MESHNODE_* names are not errors: Kubernetes, for one,
    exports such names for every service called meshnode."""
    values: dict[str, object] = {}
    for key, setting in SETTINGS.items():
        name = ENV_PREFIX + key.upper().replace("-", "_")
        text = env.get(name)
        if text is None or (not text and key != "api"):
            continue
        raw: object = text
        if setting.many:
            raw = [part.strip() for part in text.split(",") if part.strip()]
        elif setting.kind is int and text.strip().isdecimal():
            raw = int(text)
        elif setting.kind is bool and text.lower() in _TRUE + _FALSE:
            raw = text.lower() in _TRUE
        values[key] = _checked(name, key, raw)
    return values


def _from_file(file: Path) -> dict[str, object]:
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"{file} is too large for a configuration (limit 1 MiB)")
        written = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    unknown = [key for key in written if key not in SETTINGS]
    if unknown:
        raise ConfigError(f"{file}: unknown key {unknown[0]!r}. Allowed: {', '.join(SETTINGS)}.")
    return {key: _checked(f"{file}: {key}", key, value) for key, value in written.items()}


def _checked(place: str, key: str, value: object) -> object:
    """The value of `key` in its final form, or `ConfigError` naming the place it came from."""
    setting = SETTINGS[key]
    if setting.many:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(_is_legal(setting, item) for item in items):
            return tuple(items)
    elif _is_legal(setting, value):
        return value
    shown = "" if setting.secret else f", not {value!r}"
    each = "a list, each " if setting.many else ""
    raise ConfigError(f"{place} must be {each}{setting.allowed}{shown}")


def _is_legal(setting: _Setting, value: object) -> bool:
    # Exact types: bool is an int to isinstance(), and `slots = true` is a mistake.
    return type(value) is setting.kind and setting.accepts(str(value))
