"""mDNS between real sockets, in a network namespace of its own: nothing reaches the real LAN."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.identity import KeyPair

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("mdns_child.py")
UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
LAN = """
    ip link set lo up &&
    ip link add lan0 type veth peer name lan1 &&
    ip addr add 10.77.0.1/24 dev lan0 &&
    ip link set lan1 up && ip link set lan0 up multicast on &&
    ip route add 224.0.0.0/4 dev lan0 &&
"""
HANG_S = 60


def in_namespace(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*UNSHARE, "sh", "-c", f'{script} exec "$@"', "sh", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def peer(name: str) -> str:
    return KeyPair.from_seed(name.encode().ljust(32, b".")).peer_id


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    try:
        tried = in_namespace(LAN, "true")
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if tried.returncode != 0:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")


def test_peers_of_one_mesh_find_each_other_and_nobody_else() -> None:
    """With a member of another mesh and somebody who announces nonsense on the same LAN."""
    ran = in_namespace(LAN, sys.executable, str(CHILD), "2")
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert json.loads(ran.stdout) == {
        "ada": {peer("bob"): ["/ip4/10.77.0.1/udp/2/quic-v1"]},
        "bob": {peer("ada"): ["/ip4/10.77.0.1/udp/1/quic-v1"]},
    }


def test_without_a_network_there_is_a_warning_and_no_harm() -> None:
    ran = in_namespace("", sys.executable, str(CHILD), "0")
    assert ran.returncode == 0, ran.stderr
    assert "no LAN discovery" in ran.stderr
    assert json.loads(ran.stdout) == {}
