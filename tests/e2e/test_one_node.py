"""One node as its operator and its clients meet it: start, answers, errors, accidents, stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.mesh import (
    HANG_S,
    MODEL_NAME,
    OTHER_NAME,
    QUESTION,
    Mesh,
    NodeProcess,
    chat,
    run_command,
)

STOP_S = 8.0
"""No request is under way, so nothing has to be waited for but the engine's own end."""
LISTEN = ("--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--api", "127.0.0.1:0", "--no-mdns")
MIB = 1024 * 1024

ASK_ASYNC = """
import asyncio, openai, sys

async def main():
    async with openai.AsyncOpenAI(base_url=sys.argv[1], api_key="none") as client:
        ask = dict(model="small", messages=[{"role": "user", "content": sys.argv[2]}],
                   max_tokens=12, temperature=0)
        whole = await client.chat.completions.create(**ask)
        streamed = ""
        async for chunk in await client.chat.completions.create(stream=True, **ask):
            streamed += chunk.choices[0].delta.content or "" if chunk.choices else ""
        assert streamed == whole.choices[0].message.content, (streamed, whole)
        print(streamed)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def node(module_mesh: Mesh) -> NodeProcess:
    return module_mesh.node("alone").wait_started()


@pytest.fixture(scope="module")
def client(node: NodeProcess) -> openai.OpenAI:
    node.wait_ready()
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)


def test_says_where_it_is_before_its_model_is_loaded(node: NodeProcess) -> None:
    assert node.started["event"] == "started"
    assert node.started["models"] == [MODEL_NAME]
    assert all(addr.endswith(f"/p2p/{node.peer_id}") for addr in node.addrs)
    written = json.loads((node.data_dir / "api.json").read_text())
    assert written == {"url": node.url, "pid": node.process.pid}
    assert node.request("GET", "/healthz").body == {"status": "ok"}


def test_readyz_turns_200_when_the_model_is_loaded(node: NodeProcess) -> None:
    early = node.request("GET", "/readyz")
    assert early.status in (200, 503)
    if early.status == 503:
        assert early.error["code"] == "not_ready"
        assert early.headers["retry-after"] == "1"
    node.wait_ready()
    assert node.request("GET", "/readyz").status == 200


def test_lists_its_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]


def test_chats_whole_and_streamed_alike(client: openai.OpenAI) -> None:
    ask = chat(QUESTION)
    whole = client.chat.completions.create(**ask)
    chunks = list(
        client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert text == whole.choices[0].message.content
    assert len([c for c in chunks if c.choices]) > 3, "a stream comes in pieces"
    assert whole.usage is not None
    assert 1 <= whole.usage.completion_tokens <= 12
    last = chunks[-1].usage
    assert last is not None
    assert last.completion_tokens == whole.usage.completion_tokens


def test_completes_text_whole_and_streamed_alike(client: openai.OpenAI) -> None:
    ask = {"model": MODEL_NAME, "prompt": "One, two, three,", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**ask)
    streamed = "".join(c.choices[0].text for c in client.completions.create(**ask, stream=True))
    assert "four" in streamed
    assert streamed == whole.choices[0].text


def test_second_turn_finds_its_cache(node: NodeProcess) -> None:
    node.wait_ready()
    first = node.ask("Name a colour.")
    second = node.ask("Name a colour.", first.text, "Name another one.")
    assert second.cached_tokens > 0
    assert (second.served_by, second.route) == (node.peer_id, "local")


def test_asynchronous_client(node: NodeProcess) -> None:
    node.wait_ready()
    result = subprocess.run(
        [sys.executable, "-c", ASK_ASYNC, f"{node.url}/v1", QUESTION],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", chat("x", model="nobody"), 404, "model_not_found"),
        ("GET", "/v1/models/nobody", None, 404, "model_not_found"),
        ("GET", "/v1/nothing", None, 404, "unknown_url"),
        ("POST", "/v1/chat/completions", b"{not json", 400, None),
        ("POST", "/v1/chat/completions", chat("x", max_tokens=-1), 400, None),
        ("POST", "/v1/chat/completions", {"model": MODEL_NAME}, 400, None),
        ("POST", "/v1/chat/completions", chat("a b " * 4000), 400, "context_length_exceeded"),
        ("POST", "/v1/chat/completions", b"x" * (31 * MIB), 413, "body_too_large"),
        ("GET", "/v1/chat/completions", None, 405, "method_not_allowed"),
    ],
    ids=[
        "unknown-model",
        "unknown-model-page",
        "unknown-path",
        "bad-json",
        "bad-field",
        "missing-field",
        "too-long-for-the-context",
        "too-large",
        "wrong-method",
    ],
)
def test_errors_have_the_openai_shape(
    node: NodeProcess, method: str, path: str, body: object, status: int, code: str | None
) -> None:
    node.wait_ready()
    reply = node.request(method, path, body)
    assert reply.status == status
    assert reply.error["message"]
    assert reply.error["type"]
    assert "param" in reply.error
    if code is not None:
        assert reply.error["code"] == code
    if code == "model_not_found":
        assert MODEL_NAME in reply.error["message"], "it says what there is"


def test_engine_killed_is_started_again(node: NodeProcess) -> None:
    node.wait_ready()
    (engine,) = node.children()
    engine.kill()
    node.wait_until(lambda status: status["models"][0]["state"] != "ready")
    assert node.request("GET", "/healthz").status == 200
    node.wait_ready()
    assert "Paris" in node.ask(QUESTION).text
    assert [child.pid for child in node.children()] != [engine.pid]


def test_port_in_use(mesh: Mesh) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ("--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--no-mdns")
        where = ("--api", f"127.0.0.1:{port}", "--data-dir", str(mesh.folder / "a"))
        code, _, stderr = run_command("serve", *flags, *where)
    assert code == 2, stderr
    assert f"port {port}: the port is in use" in stderr
    assert "Traceback" not in stderr


def test_peer_port_in_use(mesh: Mesh) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        flags = ("--listen", f"/ip4/127.0.0.1/udp/{port}/quic-v1", "--no-mdns")
        where = ("--api", "127.0.0.1:0", "--data-dir", str(mesh.folder / "a"))
        code, _, stderr = run_command("serve", *flags, *where)
    assert code == 2, stderr
    assert f"udp/{port}" in stderr
    assert "Traceback" not in stderr


def test_data_directory_has_one_owner(node: NodeProcess) -> None:
    code, _, stderr = run_command("serve", *LISTEN, "--data-dir", str(node.data_dir))
    assert code == 2
    assert str(node.data_dir) in stderr
    assert "another meshnode" in stderr
    assert "Traceback" not in stderr


def test_damaged_model_beside_a_good_one(mesh: Mesh) -> None:
    damaged = mesh.folder / "damaged.gguf"
    good = mesh.models.small.read_bytes()
    damaged.write_bytes(good[: 2 * MIB])
    node = mesh.node("alone", "--model", str(damaged))
    node.wait_started()
    node.wait_until(lambda status: status["models"][1]["state"] == "failed")
    reported = node.status()["models"][1]
    assert str(damaged) in reported["error"]
    assert reported["name"] == "damaged"
    node.wait_ready()
    assert "Paris" in node.ask(QUESTION).text
    refused = node.request("POST", "/v1/chat/completions", chat("x", model="damaged"))
    assert refused.status in (404, 503)


def test_stops_in_order_and_leaves_nothing_behind(mesh: Mesh) -> None:
    node = mesh.node("alone").wait_ready()
    engines = node.children()
    assert engines
    os.kill(node.process.pid, signal.SIGTERM)
    assert node.process.wait(STOP_S) == 0
    gone, alive = psutil.wait_procs(engines, timeout=1.0)
    assert not alive, gone
    assert not (node.data_dir / "api.json").exists()
    assert "Traceback" not in node.log_tail()


def test_two_models_on_one_node(mesh: Mesh) -> None:
    node = mesh.node("alone", models=(MODEL_NAME, OTHER_NAME)).wait_ready()
    node.wait_until(lambda status: all(m["state"] == "ready" for m in status["models"]))
    digests = {model["digest"] for model in node.status()["models"]}
    assert len(digests) == 2
    for name in (MODEL_NAME, OTHER_NAME):
        reply = node.ask(QUESTION, model=name)
        assert reply.body["model"] == name
        assert "Paris" in reply.text


def test_unknown_model_stops_the_start(tmp_path: Path) -> None:
    code, _, stderr = run_command(
        "serve", *LISTEN, "--data-dir", str(tmp_path), "--model", "nonesuch"
    )
    assert code == 2
    assert "nonesuch" in stderr
