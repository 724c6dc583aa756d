"""models fetch: until the node has the file, and where it is then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result
from fake_node import DIGEST, FakeNode

from meshnode.console.requests import FetchReport

Run = Callable[..., Result]


def done(node: FakeNode, folder: Path) -> Path:
    path = folder / "small.gguf"
    path.write_bytes(b"weights")
    node.answers["/api/fetch"] = (200, FetchReport(DIGEST, "small", "done", 7, 7, str(path)))
    return path


def test_it_says_where_the_file_is_and_how_to_use_it(
    meshnode: Run, node: FakeNode, tmp_path: Path
) -> None:
    path = done(node, tmp_path)
    result = meshnode("models", "fetch", "small")
    assert result.exit_code == 0, result.output
    assert node.asked == [{"model": "small"}]
    assert str(path) in result.stdout
    assert DIGEST in result.stdout
    assert "meshnode serve --standby small\n" in result.stdout
    told = json.loads(meshnode("models", "fetch", "small", "--json").stdout)
    assert told == {"path": str(path), "model": DIGEST, "name": "small"}


def test_out_moves_it(meshnode: Run, node: FakeNode, tmp_path: Path) -> None:
    path, out = done(node, tmp_path), tmp_path / "elsewhere.gguf"
    result = meshnode("models", "fetch", "small", "--out", str(out))
    assert f"meshnode serve --standby {out}" in result.stdout
    assert out.read_bytes() == b"weights"
    assert not path.exists()
    refused = meshnode("models", "fetch", "small", "--out", str(out))
    assert refused.exit_code == 2
    assert "is there already" in refused.stderr


def test_a_refusal_is_passed_on(meshnode: Run, node: FakeNode) -> None:
    node.answers["/api/fetch"] = (409, {"error": {"message": "no node has it"}})
    result = meshnode("models", "fetch", "small")
    assert result.exit_code == 1
    assert "no node has it" in result.stderr
