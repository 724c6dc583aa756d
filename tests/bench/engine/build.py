"""What llama.cpp has for the comparisons, compiled once per version and kept in `.cache/bench`.

Its source is the llama.cpp tree inside the llama-cpp-python source package of the version that is
installed, and it runs on the libraries that are installed: the compiler, the flags and the code
that computes are the same on both sides. See `llama_server/CMakeLists.txt`, and that of any other
project that is to be `compiled`.
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
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from scripts.build_llama_wheel import run_with_progress
from tests.e2e.mesh import ROOT

PACKAGE = "llama-cpp-python"
PROJECT = Path(__file__).parent / "llama_server"
CACHE = ROOT / ".cache" / "bench"
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
    (program,) = compiled(PROJECT, ("llama-server",), "5 to 10 minutes")
    return program


def compiled(project: Path, products: Sequence[str], takes: str) -> tuple[Path, ...]:
    """The `products` of a CMake project, which it puts into `bin`; compiled if one is not there.

    The project is told LLAMA_SOURCE and LLAMA_LIBRARIES; `takes` is how long, on 2 cores.
    """
    installed = version(PACKAGE)
    recipe = "".join(file.read_text() for file in sorted(project.iterdir())) + " ".join(FLAGS)
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    kept = tuple(CACHE / f"{product}-{installed}-{digest[:12]}" for product in products)
    if not all(each.exists() for each in kept):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=CACHE) as scratch:
            source, build = _source(installed, Path(scratch)), Path(scratch) / "build"
            print(f"Compiling {' and '.join(products)}, once: {takes}", file=sys.stderr)
            made = [f"bin/{product}" for product in products]
            _build(project, source, build, made)
            for product, place in zip(made, kept, strict=True):
                (build / product).replace(place)
    return kept


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


def _build(project: Path, source: Path, build: Path, products: Sequence[str]) -> None:
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"compiling parts of llama.cpp needs {' and '.join(missing)} in PATH")
    where = (f"-DLLAMA_SOURCE={source}", f"-DLLAMA_LIBRARIES={libraries()}")
    configure = ["cmake", "-G", "Ninja", "-S", str(project), "-B", str(build), *FLAGS, *where]
    log = CACHE / f"{project.name}-build.log"
    for command in (configure, [*NICE, "ninja", "-C", str(build), *products]):
        if status := run_with_progress(command, dict(os.environ), log):
            raise SystemExit(f"building {project.name} failed (exit {status}); see {log}")
