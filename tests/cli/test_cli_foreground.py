"""A node in the foreground: what it says when it is up, and what signals do to it."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.cli.foreground import banner, progress_line
from meshnode.cli.logs import set_up_logging
from meshnode.config import load
from meshnode.console.snapshot import ModelSnapshot
from meshnode.node import NodeInfo

CHILD = Path(__file__).with_name("foreground_child.py")
HANG_S = 60
INFO = NodeInfo(
    "http://127.0.0.1:9337", "12D3KooWx", ("/ip4/192.0.2.1/tcp/9338/p2p/12D3KooWx",), "home", ("m",)
)


@contextmanager
def running(block: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, str(CHILD), str(block)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_in_order(tmp_path: Path, number: int) -> None:
    with running(tmp_path / "no-block") as child:
        assert child.stdout is not None
        started = json.loads(child.stdout.readline())
        assert (started["event"], started["mesh"]) == ("started", "home")
        assert started["addrs"] == ["/ip4/127.0.0.1/tcp/1"]
        child.send_signal(number)
        rest, _ = child.communicate(timeout=HANG_S)
        assert rest.splitlines() == ["stopping in order", "stopped"]
        assert child.returncode == 0


def test_the_second_signal_stops_at_once(tmp_path: Path) -> None:
    block = tmp_path / "block"
    block.touch()
    with running(block) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "stopping in order\n"
        child.send_signal(signal.SIGTERM)
        rest, _ = child.communicate(timeout=HANG_S)
        assert (rest, child.returncode) == ("", 128 + signal.SIGTERM)


def test_the_banner_has_a_line_to_paste() -> None:
    shown = banner(INFO, load({}, {}, None))
    assert INFO.addrs[0] in shown
    (start,) = [at for at, line in enumerate(shown.splitlines()) if line.startswith("  curl")]
    command = "\n".join(shown.splitlines()[start : start + 2]).replace("\\\n", " ")
    words = shlex.split(command)
    assert words[1] == "http://127.0.0.1:9337/v1/chat/completions"
    assert json.loads(words[-1])["model"] == "m"
    assert "asks for no key" not in shown
    assert "asks for no key" in banner(INFO, load({"api": "0.0.0.0:9337"}, {}, None))


def test_the_banner_of_a_locked_api_says_where_the_key_goes() -> None:
    shown = banner(replace(INFO, asks_for_key=True), load({"api": "0.0.0.0:9337"}, {}, None))
    assert '-H "authorization: Bearer $MESHNODE_API_KEY"' in shown
    assert "meshnode/api-keys.toml" in shown
    assert "asks for no key" not in shown


def test_loading_is_told_in_tenths_and_how_it_ended() -> None:
    def line(state: str, progress: float, error: str | None = None) -> str:
        return progress_line(
            ModelSnapshot("m", "", state, progress, error, 8, 0, 0, 8192, 0.0, 0.0, 0)
        )

    assert line("loading", 0.49) == "loading m: 40 %"
    assert line("ready", 1.0) == "m is ready (8192 tokens of context)"
    assert line("failed", 0.0, "cut off") == "m cannot be served: cut off"


def test_logs_are_json_lines_without_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        set_up_logging("json", "info")
        logging.getLogger("meshnode.x").info("joining with %s now", "mesh1.se-cret_1")
        logging.getLogger("meshnode.x").info("asked with %s", "mesh-sk-se-cret_2")
        logging.getLogger("meshnode.x").debug("not shown")
        logging.getLogger("libp2p.y").error("an ordinary hang-up")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    line, other = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert json.loads(other)["message"] == "asked with mesh-sk-[hidden]"
    assert (record["level"], record["logger"]) == ("info", "meshnode.x")
    assert record["message"] == "joining with mesh1.[hidden] now"
