"""Will a node run here? Each check looks at one thing and says what to do about it.

Decides ok, warn (slower or riskier than it could be) or fail (will not work). Changes nothing
and takes no port for longer than it takes to see that it is free. It knows no peers, but if a
node runs with the same data directory it may ask it about the clock; that is handed in.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import psutil

from meshnode.config import Config, split_host_port
from meshnode.console.snapshot import Snapshot
from meshnode.errors import ConfigError, MeshnodeError
from meshnode.models.catalog import resolve
from meshnode.models.gguf import read_header

MIB = 1024 * 1024
PYTHON_MIN = (3, 11)
DISK_FREE_MIN_BYTES = 64 * MIB
"""Less, and keys, certificates and the requantised default model (88 MiB) cannot be kept."""
DISK_FREE_GOOD_BYTES = 1024 * MIB
UDP_BUFFER_GOOD_BYTES = 4 * MIB
"""What quic-go recommends rounds up to this; with Debian's 208 KiB a burst from a fast peer
overflows the socket and QUIC takes it for congestion."""
FILES_MIN, FILES_GOOD = 256, 4096
"""A peer or a client is a descriptor each (TCP), an engine about ten, a start about fifty."""
CLOCK_WARN_S, CLOCK_FAIL_S = 60.0, 600.0
"""Members accept fifteen minutes in certificates; past ten there is no margin left."""
IMPORT_TIMEOUT_S = 60.0
"""The first import of a cold engine reads 30 MB of libraries."""
SYSCTL_FIX = (
    f"sysctl -w net.core.rmem_max={UDP_BUFFER_GOOD_BYTES} "
    f"net.core.wmem_max={UDP_BUFFER_GOOD_BYTES}   (to keep it: a file in /etc/sysctl.d)"
)

Outcome = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it is, and what to do if it is not ok."""

    name: str
    outcome: Outcome
    what: str
    fix: str = ""


def examine(config: Config, running: Snapshot | None = None) -> tuple[Check, ...]:
    """All checks, in the order in which one would mend things. `running` is the status of the
    node that runs with this data directory, if one does. Blocks for up to some seconds."""
    checks = [_python(), *_engine(config), _memory(), _data_dir(config), _disk(config)]
    checks += [_model(spec, config.data_dir) for spec in (*config.models, *config.standbys)]
    checks += _ports(config, running)
    checks += [_udp_buffers(Path("/proc/sys/net/core")), _open_files(), _clock(running)]
    return tuple(checks)


# --- what runs ----------------------------------------------------------------------------------


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info < PYTHON_MIN:
        wanted = ".".join(map(str, PYTHON_MIN))
        return Check("python", "fail", found, f"install Python {wanted} or newer")
    return Check("python", "ok", f"{found} on {platform.machine()}")


def _engine(config: Config) -> list[Check]:
    """llama.cpp in a process of its own, as the node runs it: a bad build may kill its process.

    What it takes to build the engine matters only where it is missing.
    """
    if not (config.models or config.standbys):
        return [Check("engine", "ok", "not needed: this node serves no models itself")]
    name = "llama_cpp"
    if importlib.util.find_spec(name) is None:
        return [
            Check(
                "engine",
                "fail",
                "llama-cpp-python is not installed",
                "run `make setup` in a checkout, or: pip install 'meshnode[engine]'",
            ),
            *_build_tools(),
        ]
    probe = f"import {name}; print({name}.__version__)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [Check("engine", "fail", f"no sign of life for {IMPORT_TIMEOUT_S:.0f} s", _REBUILD)]
    if done.returncode == 0:
        return [Check("engine", "ok", f"llama-cpp-python {done.stdout.strip()}")]
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode < 0:
        last = f"it was killed by signal {-done.returncode} (built for another CPU?)"
    return [Check("engine", "fail", f"llama-cpp-python does not load: {last}", _REBUILD)]


_REBUILD = "build it for this machine: `make distclean setup` in a checkout"


def _build_tools() -> list[Check]:
    header = Path(sysconfig.get_path("include"), "Python.h")
    compiler = shutil.which("c++")
    apt = "apt-get install -y build-essential python3-dev"
    return [
        Check("compiler", "ok", compiler) if compiler else Check("compiler", "fail", "no c++", apt),
        Check("headers", "ok", str(header))
        if header.exists()
        else Check("headers", "fail", f"{header} is missing", apt),
    ]


def _memory() -> Check:
    memory = psutil.virtual_memory()
    what = f"{_mib(memory.available)} of {_mib(memory.total)} available"
    return Check("memory", "ok", what)


# --- what is kept -------------------------------------------------------------------------------


def _data_dir(config: Config) -> Check:
    path = config.data_dir
    nearest = _nearest_existing(path)
    if not nearest.is_dir():
        return Check("data dir", "fail", f"{nearest} is not a directory", "choose --data-dir")
    if not os.access(nearest, os.W_OK | os.X_OK):
        fix = f"chown -R {os.getuid()} {nearest}, or choose another --data-dir"
        return Check("data dir", "fail", f"{nearest} is not writable", fix)
    key = path / "node.key"
    if key.exists() and key.stat().st_mode & 0o077:
        return Check("data dir", "fail", f"others can read {key}", f"chmod 600 {key}")
    return Check("data dir", "ok", f"{path}{'' if path.exists() else ' (will be made)'}")


def _disk(config: Config) -> Check:
    place = _nearest_existing(config.data_dir)
    free_bytes = shutil.disk_usage(place).free
    what = f"{_mib(free_bytes)} free at {place}"
    if free_bytes < DISK_FREE_MIN_BYTES:
        return Check("disk", "fail", what, "make room, or choose another --data-dir")
    if free_bytes < DISK_FREE_GOOD_BYTES:
        return Check("disk", "warn", what, "make room before models are kept here")
    return Check("disk", "ok", what)


def _model(spec: str, data_dir: Path) -> Check:
    """The file is there, its header is sound, and the weights fit in memory."""
    name = f"model {spec}"
    try:
        source = resolve(spec, data_dir)
        header = read_header(source.path)
    except ConfigError as error:
        return Check(name, "fail", str(error), "give the path of a GGUF file")
    except MeshnodeError as error:
        return Check(name, "fail", str(error), "download the file again")
    what = (
        f"{source.name}: {header.architecture}, {header.quantization}, "
        f"{_mib(header.weights_bytes)}, trained for {header.context_tokens} tokens"
    )
    available_bytes = psutil.virtual_memory().available
    if header.weights_bytes > available_bytes:
        fix = "free memory, or choose a smaller model or quantization"
        return Check(name, "fail", f"{what}; only {_mib(available_bytes)} available", fix)
    if not header.has_chat_template:
        fix = "for chats choose an instruction-tuned file"
        return Check(name, "warn", f"{what}; it has no chat template", fix)
    return Check(name, "ok", what)


def _nearest_existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


# --- what is reached ----------------------------------------------------------------------------


def _ports(config: Config, running: Snapshot | None) -> list[Check]:
    """Whether each port can be taken, or is held by our own node."""
    wanted: list[tuple[str, str, str, int]] = []
    if config.api:
        wanted.append(("API port", "tcp", *split_host_port(config.api)))
    for address in config.listen:
        _, _, host, protocol, port, *_ = address.split("/")
        wanted.append((f"peer port {protocol}", protocol, host, int(port)))
    ours = _ports_of(running)
    return [
        Check(name, "ok", f"{host}:{port} is held by the running node")
        if (protocol, port) in ours
        else _port(name, protocol, host, port)
        for name, protocol, host, port in wanted
    ]


def _ports_of(running: Snapshot | None) -> set[tuple[str, int]]:
    """(protocol, port) of every address the running node has."""
    if running is None:
        return set()
    held = {
        (parts[3], int(parts[4])) for addr in running.addrs if len(parts := addr.split("/")) > 4
    }
    if running.api_url:
        held.add(("tcp", int(running.api_url.rpartition(":")[2])))
    return held


def _port(name: str, protocol: str, host: str, port: int) -> Check:
    where = f"{host}:{port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port)[0]
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        with socket.socket(family, kind) as probe:
            if protocol == "tcp":
                # As servers do: a port that was closed a moment ago is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        flag = "--api" if name == "API port" else "--listen"
        fix = f"stop what holds it (`ss -lnp | grep :{port}`), or choose another with {flag}"
        return Check(name, "fail", f"{where}: {error.strerror}", fix)
    return Check(name, "ok", f"{where} is free")


def _udp_buffers(folder: Path) -> Check:
    """Linux's ceilings for what a socket may ask for; `folder` is /proc/sys/net/core."""
    sizes: dict[str, int] = {}
    for name in ("rmem_max", "wmem_max"):
        try:
            sizes[name] = int((folder / name).read_text())
        except OSError:
            continue  # not Linux, or a container that shows none
    if not sizes:
        return Check("UDP buffers", "ok", "this system does not say how large they may be")
    what = ", ".join(f"{name} {_mib(amount)}" for name, amount in sizes.items())
    if min(sizes.values()) < UDP_BUFFER_GOOD_BYTES:
        return Check("UDP buffers", "warn", f"{what}: small for fast links", SYSCTL_FIX)
    return Check("UDP buffers", "ok", what)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = float("inf") if soft == resource.RLIM_INFINITY else soft
    fix = f"ulimit -n {FILES_GOOD}   (for a service: LimitNOFILE={FILES_GOOD})"
    outcome: Outcome = "fail" if limit < FILES_MIN else "warn" if limit < FILES_GOOD else "ok"
    what = f"{limit:.0f} (hard limit {'none' if hard == resource.RLIM_INFINITY else hard})"
    return Check("open files", outcome, what, "" if outcome == "ok" else fix)


def _clock(running: Snapshot | None) -> Check:
    """Against the peers' median: one wrong peer does not make ours wrong."""
    if running is None or not running.peers:
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return Check("clock", "ok", f"{now}; nobody to compare it with (no node with peers runs)")
    ahead_s = median(peer.clock_ahead_s for peer in running.peers)
    what = f"{abs(ahead_s):.0f} s {'behind' if ahead_s > 0 else 'ahead of'} the peers' median"
    if abs(ahead_s) >= CLOCK_WARN_S:
        outcome: Outcome = "fail" if abs(ahead_s) >= CLOCK_FAIL_S else "warn"
        return Check("clock", outcome, what, "timedatectl set-ntp true")
    return Check("clock", "ok", what)


def _mib(amount_bytes: int) -> str:
    return f"{amount_bytes / MIB:,.0f} MiB" if amount_bytes >= MIB else f"{amount_bytes:,} bytes"
