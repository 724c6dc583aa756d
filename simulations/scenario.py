"""A scenario: one question to a simulated mesh, as a small TOML file.

    [scenario]
    title = "..."            question = "..."        hypothesis = "..."
    duration_s = 120.0
    [scenario.expect]        figure = [lowest, highest]   what the hypothesis comes to
    [mesh]      how many nodes, and how they come
    [network]   how far they are from each other, and what is in the way
    [[models]]  what they serve
    [hosts]     what they are made of
    [demand]    what clients ask
    [routing]   who answers
    [churn]     who comes and goes
    [[faults]]  what goes wrong, and when
    [adversaries]  who lies

Every field has a default that changes nothing, so a scenario says what it is about and no more.
Unknown fields, wrong types and values out of bounds are errors that name the field.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from meshnode.errors import ConfigError

Seconds = Annotated[float, Meta(ge=0.0, le=30 * 86400.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]
NodeCount = Annotated[int, Meta(ge=1, le=100_000)]
Text = Annotated[str, Meta(max_length=2000)]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]


class _Table(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table of the file."""


class About(_Table, frozen=True):
    """Why this is run. `expect` maps a figure of the result to its expected bounds."""

    title: Text
    question: Text = ""
    hypothesis: Text = ""
    duration_s: Seconds = 60.0
    warmup_s: Seconds = 0.0
    """Figures leave out what happened before."""
    interval_s: Annotated[float, Meta(gt=0.0, le=3600.0)] = 1.0
    """Series have one value for each."""
    seeds: Annotated[int, Meta(ge=1, le=10_000)] = 10
    """How many seeds, from 1 on, are run when nobody says which."""
    expect: dict[str, tuple[float, float]] = {}
    nodes_from: tuple[int, ...] = ()
    """Sizes that a sweep over the number of nodes takes by default."""


class Mesh(_Table, frozen=True):
    nodes: NodeCount = 20
    bootstraps: Annotated[int, Meta(ge=1, le=64)] = 1
    """The first so many nodes are those that all others are told of."""
    join_over_s: Seconds = 1.0
    """The nodes are switched on evenly over so long."""
    admission: Literal["invite", "open"] = "invite"
    sponsored: NodeCount = 1
    """In an open mesh: the first so many have a certificate of its root, and may vote."""


class Net(_Table, frozen=True):
    latency: Literal["constant", "planetlab", "regions", "plane"] = "constant"
    one_way_ms: Annotated[float, Meta(ge=0.0, le=10_000.0)] = 10.0
    """Of `constant`."""
    jitter: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0
    """Mean of an exponential delay on top, as a share of the latency."""
    loss: Annotated[float, Meta(ge=0.0, le=0.5)] = 0.0
    access: Literal["none", "dsl", "cable", "fibre", "datacentre", "homes"] = "none"
    pubsub: Literal["gossipsub", "flood"] = "gossipsub"
    dht: Literal["none", "kademlia"] = "none"
    nat: dict[str, Share] = {}
    """Class of NAT -> share of the nodes behind one; the rest is open."""


class Model(_Table, frozen=True):
    """A model and where its file is. Speeds are those of a host of speed 1."""

    name: Name
    files: Annotated[int, Meta(ge=0, le=100_000)] = 1
    """So many nodes have the file."""
    wanted: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """So many of them serve it whatever the mesh decides (`--model`); the rest are standbys."""
    fetched: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """So many of `files` stand by without the file and fetch it from the others before they load
    it, over their access links (`models/fetching.py`)."""
    weight_bytes: Annotated[int, Meta(ge=1, le=2**42)] = 2**29
    kv_bytes_per_token: Annotated[int, Meta(ge=1, le=2**30)] = 2**15
    context_tokens: Annotated[int, Meta(ge=16, le=2**24)] = 8192
    layers: Annotated[int, Meta(ge=1, le=1024)] = 30
    activation_bytes: Annotated[int, Meta(ge=0, le=2**30)] = 0
    """What crosses between two layers per token. With it, a model that fits on no host is cut by
    layers and run as a pipeline (`models/pipelines.py`); 0: it cannot be cut."""
    slots: Annotated[int, Meta(ge=1, le=1024)] = 4
    prefill_tokens_per_s: Positive = 400.0
    decode_tokens_per_s: Positive = 40.0
    """Of one answer alone."""
    batch_gain: Annotated[float, Meta(ge=1.0, le=64.0)] = 2.0
    """How many times as fast all slots together decode."""


class Hosts(_Table, frozen=True):
    memory_gib: Positive = 8.0
    speed: Positive = 1.0
    speed_spread: Annotated[float, Meta(ge=0.0, le=3.0)] = 0.0
    """Sigma of a log-normal factor on each host's speed."""
    disk_mb_per_s: Positive = 500.0
    """How fast a model is loaded."""


class Demand(_Table, frozen=True):
    kind: Literal["none", "poisson", "flash", "chats", "mooncake"] = "none"
    model: str = ""
    """Of which model; empty: of each in turn by `popularity`."""
    popularity: dict[str, Positive] = {}
    per_s: Annotated[float, Meta(ge=0.0, le=1e5)] = 1.0
    """Requests (chats: new chats) per second in the whole mesh."""
    start_s: Seconds = 0.0
    prompt_tokens: Annotated[int, Meta(ge=1, le=2**20)] = 200
    answer_tokens: Annotated[int, Meta(ge=1, le=2**20)] = 100
    flash_at_s: Seconds = 30.0
    flash_for_s: Seconds = 30.0
    flash_times: Positive = 10.0
    turns: Annotated[int, Meta(ge=1, le=1000)] = 5
    think_s: Seconds = 10.0
    """Mean pause of a person between two turns."""
    speedup: Positive = 1.0
    """Of a trace: so many of its seconds pass in one."""


class Routing(_Table, frozen=True):
    policy: Literal["ours", "round-robin", "least-load", "random", "hrw", "bounded-hrw"] = "ours"


class Churn(_Table, frozen=True):
    kind: Literal["none", "ipfs", "lab", "trace", "replace"] = "none"
    start_s: Seconds = 30.0
    trace: str = ""
    """A CSV file of node,up_s,down_s."""
    per_min: Share = 0.0
    """Of `replace`: the share of nodes that is replaced each minute."""
    spare_bootstraps: bool = True


class Fault(_Table, frozen=True):
    """One thing that goes wrong; `faults/schedule.py` says what each kind and target means."""

    at_s: Seconds
    kind: str
    target: str = "random"
    other: str = ""
    for_s: Seconds = 0.0
    """It is put right after so long; 0 for never."""
    value: float = 0.0


class Chaos(_Table, frozen=True):
    """Faults drawn at random from the seed, on top of those that are listed."""

    kinds: tuple[str, ...] = ()
    per_min: Annotated[float, Meta(ge=0.0, le=1000.0)] = 0.0
    start_s: Seconds = 20.0
    heal_at_s: Seconds = 0.0
    """From then on nothing goes wrong any more, and what must come true has to; 0: no end."""
    buggify: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.0
    """For this share of all occasions what is legal but rare happens (`faults/buggify.py`)."""


class Adversaries(_Table, frozen=True):
    """Who lies: `faults/adversaries.py` says how."""

    kind: str = "none"
    target: str = ""
    """Which nodes, as of faults; empty: `count`, or `share` of all, drawn."""
    share: Share = 0.0
    count: Annotated[int, Meta(ge=0, le=100_000)] = 0
    start_s: Seconds = 0.0


class Origin(_Table, frozen=True):
    """Where a scenario is from: the name or file that was loaded, and what was changed since.

    `source` is empty for one that was put together in Python.
    """

    source: str = ""
    changes: dict[str, Any] = {}


class Scenario(_Table, frozen=True):
    """See the module. `name` is the file's; it and `origin` are not for the file to say."""

    scenario: About
    mesh: Mesh = Mesh()
    network: Net = Net()
    models: tuple[Model, ...] = ()
    hosts: Hosts = Hosts()
    demand: Demand = Demand()
    routing: Routing = Routing()
    churn: Churn = Churn()
    faults: tuple[Fault, ...] = ()
    chaos: Chaos = Chaos()
    adversaries: Adversaries = Adversaries()
    name: str = ""
    origin: Origin = Origin()


def load(source: str | Path, changes: dict[str, Any] | None = None) -> Scenario:
    """A scenario from a file, or a shipped one by its name, with `changes` such as
    `{"mesh.nodes": 50}`. Raises `ConfigError` with the field that is wrong.
    """
    path = Path(source)
    if path.suffix == ".toml":
        try:
            text = path.read_text()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
    else:
        resource = files("meshnode_simulations") / "scenarios" / f"{source}.toml"
        if not resource.is_file():
            raise ConfigError(
                f"no scenario {str(source)!r}: give a .toml file or one of {', '.join(shipped())}"
            )
        text = resource.read_text()
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: {error}") from error
    for given in ("name", "origin"):
        if given in tables:
            raise ConfigError(f"{source}: unknown field `{given}`")
    changes = changes or {}
    for key, value in changes.items():
        _change(tables, key, value)
    tables["name"] = path.stem
    tables["origin"] = {"source": str(source), "changes": changes}
    return _converted(tables, str(source))


def changed(scenario: Scenario, changes: dict[str, Any]) -> Scenario:
    """The same scenario with other values, by dotted name. Raises `ConfigError`."""
    # By way of JSON, for lists that can be changed in the place of tuples.
    tables = msgspec.json.decode(msgspec.json.encode(scenario))
    for key, value in changes.items():
        _change(tables, key, value)
    tables["origin"]["changes"] = {**scenario.origin.changes, **changes}
    return _converted(tables, scenario.name)


def value_of(text: str) -> Any:
    """A value as TOML reads it, such as `0.01`, `true` or `[1, 2]`; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def as_toml(value: Any) -> str:
    """The inverse of `value_of`: numbers, strings, lists and tables on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return msgspec.json.encode(value).decode()  # TOML's basic strings are JSON's
        case list() | tuple():
            return f"[{', '.join(map(as_toml, value))}]"
        case dict():
            inner = ", ".join(f"{as_toml(key)} = {as_toml(each)}" for key, each in value.items())
            return f"{{{inner}}}"
    return repr(value)


def toml_of(scenario: Scenario) -> str:
    """A file that loads as this scenario: what differs from the defaults."""
    parts = []
    for table in msgspec.structs.fields(scenario):
        value = getattr(scenario, table.name)
        if table.name in ("name", "origin") or value == table.default:
            continue
        for each in value if isinstance(value, tuple) else (value,):
            header = f"[[{table.name}]]" if isinstance(value, tuple) else f"[{table.name}]"
            parts.append("\n".join([header, *_lines(each)]))
    return "\n\n".join(parts) + "\n"


def _lines(table: Struct) -> list[str]:
    told, lines = msgspec.to_builtins(table), []
    for field in msgspec.structs.fields(table):
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if getattr(table, field.name) != default:
            lines.append(f"{field.name} = {as_toml(told[field.name])}")
    return lines


def shipped() -> tuple[str, ...]:
    """The names of the scenarios that come with the package."""
    folder = files("meshnode_simulations") / "scenarios"
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def _change(tables: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    table: Any = tables
    for part in path:
        if isinstance(table, list | tuple):
            table = table[_index(table, part, key)]
        else:
            table = table.setdefault(part, {})
        if not isinstance(table, dict | list):
            raise ConfigError(f"{key}: {part} is no table")
    if isinstance(table, list):
        table[_index(table, last, key)] = value
    else:
        table[last] = value


def _index(table: list[Any] | tuple[Any, ...], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(table):
        raise ConfigError(f"{key}: there are {len(table)}, counted from 0; {part!r} is none")
    return int(part)


def _converted(tables: dict[str, Any], source: str) -> Scenario:
    try:
        return msgspec.convert(tables, Scenario, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from error
