"""meshnode-bootstrap before it runs: which mesh, and the public one's descriptor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.errors import ConfigError
from meshnode.identity import KeyPair
from meshnode.public_mesh import public_mesh, read_descriptor

CHECKOUT = Path(__file__).parents[2]


def meshnode_bootstrap(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bootstrap", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)


def test_help_teaches() -> None:
    result = meshnode_bootstrap("--help")
    assert result.returncode == 0
    assert "  meshnode-bootstrap --mesh home --create" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "which mesh?"),
        (["--create"], "--create needs --mesh NAME"),
        (["--public", "--create"], "cannot be called 'public'"),
        (["--public", "--mesh", "home"], "--public names a mesh already"),
    ],
)
def test_an_unclear_mesh_is_refused(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    result = meshnode_bootstrap(*arguments, "--data-dir", str(tmp_path), "--json")
    assert result.returncode == 2
    assert complaint in json.loads(result.stdout)["error"]["message"]


def test_the_shipped_public_mesh_waits_for_its_operator() -> None:
    with pytest.raises(ConfigError, match="no operator yet"):
        public_mesh()


def test_a_filled_in_descriptor_is_read_and_a_wrong_one_refused() -> None:
    filled = {
        "name": "public",
        "root": KeyPair.generate().public.hex(),
        "admission": "open",
        "bootstrap": ["/dns4/boot1.example.org/udp/9338/quic-v1/p2p/12D3KooWx"],
    }
    assert read_descriptor(json.dumps(filled).encode()).bootstrap == tuple(filled["bootstrap"])
    for change in ({"admission": "invite"}, {"name": "other"}, {"root": "zz"}, {"extra": 1}):
        with pytest.raises(ConfigError, match=r"bootstrap/public\.json"):
            read_descriptor(json.dumps(filled | change).encode())
