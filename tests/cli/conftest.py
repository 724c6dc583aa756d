"""The command line as a test calls it: with a data directory of its own, and a node or none."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_node import FakeNode

from meshnode.cli import cli


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory of every command of the test."""
    path = tmp_path / "data"
    monkeypatch.setenv("MESHNODE_DATA_DIR", str(path))
    return path


@pytest.fixture
def node(data_dir: Path) -> Iterator[FakeNode]:
    """A node that runs with `data_dir`."""
    server = FakeNode()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    data_dir.mkdir()
    (data_dir / "api.json").write_text(json.dumps({"url": server.url, "pid": 4711}))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def meshnode(data_dir: Path) -> Callable[..., Result]:
    """Run a command; its exit code and output."""

    def run(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(cli, list(arguments), input=input)

    return run
