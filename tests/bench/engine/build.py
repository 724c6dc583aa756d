"""llama-server for the comparison, compiled once per version and kept in `.cache/bench`.

Its source is the llama.cpp tree inside the llama-cpp-python source package of the version that is
installed, and it runs on the libraries that are installed: the compiler, the flags and the code
that computes are the same on both sides. See `llama_server/CMakeLists.txt`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from scripts.build_llama_wheel import run_with_progress
from tests.e2e.mesh import ROOT

PACKAGE = "llama-cpp-python"
PROJECT = Path(__file__).parent / "llama_server"
CACHE = ROOT / ".cache" / "bench"
LOG = CACHE / "llama-server-build.log"
# As at the build of the wheel: the default of llama.cpp's own top.
FLAGS = ("-DCMAKE_BUILD_TYPE=Release",)
NICE = ("nice", "-n", "19")


def libraries() -> Path:
    """Where the installed libllama and libggml are."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: make setup")
    return Path(package.origin).parent / "lib"


def llama_server() -> Path:
    """The program; compiled now if it is not there, which takes minutes and says so."""
    installed = version(PACKAGE)
    recipe = (PROJECT / "CMakeLists.txt").read_text() + " ".join(FLAGS)
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    program = CACHE / f"llama-server-{installed}-{digest[:12]}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=CACHE) as scratch:
            _build(_source(installed, Path(scratch)), Path(scratch) / "build", program)
    return program


def _source(installed: str, scratch: Path) -> Path:
    """The llama.cpp tree of this version, downloaded and unpacked."""
    print(f"Fetching the source of {PACKAGE} {installed}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps"]
    command += [f"--no-binary={PACKAGE}", f"--dest={scratch}", f"{PACKAGE}=={installed}"]
    subprocess.run(command, check=True)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    return scratch / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"


def _build(source: Path, build: Path, program: Path) -> None:
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"compiling llama-server needs {' and '.join(missing)} in PATH")
    print("Compiling llama-server, once: 5 to 10 minutes on 2 cores", file=sys.stderr)
    where = (f"-DLLAMA_SOURCE={source}", f"-DLLAMA_LIBRARIES={libraries()}")
    configure = ["cmake", "-G", "Ninja", "-S", str(PROJECT), "-B", str(build), *FLAGS, *where]
    for command in (configure, [*NICE, "ninja", "-C", str(build), "llama-server"]):
        if status := run_with_progress(command, dict(os.environ), LOG):
            raise SystemExit(f"building llama-server failed (exit {status}); see {LOG}")
    (build / "bin" / "llama-server").replace(program)
