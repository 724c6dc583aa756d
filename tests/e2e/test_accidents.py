"""A wrong clock, a full disk, a second bootstrap: things that happen to machines."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.mesh import QUESTION, Mesh, NodeProcess, run_command, serves, wait_all_see

SKEW_S = 600
LISTEN = ("--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--api", "127.0.0.1:0", "--no-mdns")
DISK_KIB = 256


@pytest.mark.parametrize("skew_s", [SKEW_S, -SKEW_S], ids=["ahead", "behind"])
def test_clock_ten_minutes_off(mesh: Mesh, skew_s: int) -> None:
    """It joins, serves and is served; it is told, and the others are not bothered."""
    right = mesh.node("right").wait_started()
    wrong = mesh.node("wrong", "--join", right.invite(), env=mesh.clock_off(skew_s))
    gate = mesh.gateway("gate", "--join", right.invite())
    for node in (wrong, gate):
        node.wait_started()
    everybody = [right, wrong, gate]
    wait_all_see(everybody)
    for node in everybody:
        node.wait_until(lambda status: len(serves(status, "small")) == 2)
    for row in right.status()["peers"]:
        expected_s = skew_s if row["peer_id"] == wrong.peer_id else 0
        assert row["clock_ahead_s"] == pytest.approx(expected_s, abs=5.0)
    (warning,) = wrong.status()["warnings"]
    assert "clock" in warning
    assert ("ahead of" if skew_s > 0 else "behind") in warning
    assert not gate.status()["warnings"], "one wrong clock among three is not ours"
    served_by = {gate.ask(f"What is {number} times two?").served_by for number in range(12)}
    assert served_by == {right.peer_id, wrong.peer_id}
    refused = {**right.status()["refused"], **wrong.status()["refused"]}
    assert not [why for why in refused if "certificate" in why or "expired" in why]


# --- a full disk ----------------------------------------------------------------------------------


class SmallDisk:
    """A tmpfs that only the process started with `prefix` sees, at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mount = f'mount -t tmpfs -o size={DISK_KIB}k none {path} && exec "$@"'
        self.prefix = ("unshare", "--mount", "sh", "-c", mount, "sh")

    def fill(self, node: NodeProcess) -> Path:
        """Fill it from outside, while `node` runs on it."""
        seen = Path(f"/proc/{node.process.pid}/root{self.path}")
        with pytest.raises(OSError, match="No space left"):
            (seen / "ballast").write_bytes(bytes(1024 * DISK_KIB))
        return seen


@pytest.fixture
def disk(tmp_path: Path) -> SmallDisk:
    disk = SmallDisk(tmp_path / "disk")
    if shutil.which("unshare") is None:
        pytest.skip("needs the command `unshare` (Debian: util-linux)")
    tried = subprocess.run([*disk.prefix, "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"needs root to mount a small disk: {tried.stderr.decode()}")
    return disk


def test_start_on_a_full_disk(disk: SmallDisk) -> None:
    data = disk.path / "data"
    fill = f'mkdir {data}; head -c 1M /dev/zero > {disk.path}/ballast 2>/dev/null; exec "$@"'
    prefix = (*disk.prefix, "sh", "-c", fill, "sh")
    code, _, stderr = run_command("serve", *LISTEN, "--data-dir", str(data), prefix=prefix)
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert str(data) in stderr
    assert "No space left" in stderr


def test_disk_fills_up_under_a_node(mesh: Mesh, disk: SmallDisk) -> None:
    """It goes on serving. What must be durable is refused, and says why."""
    node = mesh.gateway("cramped", data_dir=disk.path / "data", prefix=disk.prefix).wait_started()
    token = node.invite(uses=2)
    server = mesh.node("server", "--join", token).wait_started()
    node.wait_until(lambda status: serves(status, "small"))
    seen = disk.fill(node)

    folder = mesh.folder / "late"
    flags = (*LISTEN, "--join", token, "--data-dir", str(folder))
    code, _, stderr = run_command("client", *flags)
    assert code == 2
    assert "Traceback" not in stderr
    assert "No space left" in stderr or "cannot" in stderr
    assert "Paris" in node.ask(QUESTION).text

    (seen / "ballast").unlink()
    late = mesh.gateway("late", "--join", token).wait_started()
    wait_all_see([node, server, late])
    assert node.terminate() == 0
    assert "Traceback" not in node.log_tail()


# --- two introducers ------------------------------------------------------------------------------


def test_two_bootstraps_introduce_one_mesh(mesh: Mesh) -> None:
    """A node that knows one of them meets a node that knows the other."""
    first = mesh.bootstrap("first", "--mesh", "home", "--create").wait_started()
    second = mesh.bootstrap("second", "--join", first.invite(role="bootstrap"))
    one = mesh.gateway("one", "--join", first.invite())
    second.wait_started()
    one.wait_started()
    assert one.terminate() == 0
    for file in (one.data_dir / "peers").glob("*"):
        file.unlink()
    two = mesh.node("two", "--join", first.invite()).wait_started()
    wait_all_see([first, second, two])
    again = mesh.gateway("one-again", "--bootstrap", second.addrs[0], data_dir=one.data_dir)
    again.wait_started()
    wait_all_see([first, second, two, again])
    again.wait_until(lambda status: serves(status, "small"))
    assert again.ask(QUESTION).served_by == two.peer_id
