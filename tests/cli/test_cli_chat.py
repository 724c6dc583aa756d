"""Talking through the local gateway: streaming, who served, and ends that are not clean."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable

import msgspec
from click.testing import Result
from fake_node import PEER, FakeNode

Run = Callable[..., Result]


def test_once_prints_the_answer_and_who_gave_it(meshnode: Run, node: FakeNode) -> None:
    result = meshnode("chat", "--once", "Hi")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello \N{REPLACEMENT CHARACTER}[2Jthere\n"
    assert f"[peer …{PEER[-8:]}: 20 tokens in (12 remembered), 3 out]" in result.stderr
    (asked,) = node.asked
    assert (asked["model"], asked["stream"]) == ("small", True)  # the ready one, not "big"
    assert asked["messages"] == [{"role": "user", "content": "Hi"}]


def test_once_as_json_is_one_document(meshnode: Run, node: FakeNode) -> None:
    told = json.loads(meshnode("chat", "--once", "Hi", "--json").stdout)
    assert told["text"] == "Hello \x1b[2Jthere"  # JSON escapes what a terminal would obey
    assert (told["model"], told["served_by"], told["route"]) == ("small", PEER, "tunnel")
    assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 12
    assert meshnode("chat", "--json").exit_code == 2


def test_a_conversation_remembers_its_turns_until_ctrl_d(meshnode: Run, node: FakeNode) -> None:
    result = meshnode("chat", input="first\n\nsecond\n")
    assert result.exit_code == 0, result.output
    assert [message["content"] for message in node.asked[1]["messages"]] == [
        "first",
        "Hello \x1b[2Jthere",
        "second",
    ]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(node: FakeNode) -> None:
    node.pieces, node.ends_with = ("half an answer\n",), (b"data: [DONE]",)
    node.go_on.clear()
    chat = subprocess.Popen(
        [sys.executable, "-m", "meshnode", "chat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run as a shell's background job have inherited that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("first\n")
        chat.stdin.flush()
        assert chat.stdout.readline() == "half an answer\n"
        chat.send_signal(signal.SIGINT)
        # The stop is seen where it is said: only then may the next answer end by itself.
        assert chat.stdout.readline() == "\n"
        node.pieces = ()
        node.go_on.set()
        _, said = chat.communicate("second\n", timeout=60)
    finally:
        chat.kill()
        chat.communicate()
    assert (chat.returncode, "(stopped)" in said, "Traceback" in said) == (0, True, False)
    assert [message["content"] for message in node.asked[1]["messages"]] == [
        "first",
        "half an answer\n",
        "second",
    ]


def test_a_broken_answer_is_an_error_not_an_end(meshnode: Run, node: FakeNode) -> None:
    node.ends_with = (b'data: {"error": {"message": "the serving node is gone"}}',)
    said = meshnode("chat", "--once", "Hi")
    assert said.exit_code == 1
    assert "the serving node is gone" in said.stderr
    node.ends_with = ()
    cut = meshnode("chat", "--once", "Hi")
    assert cut.exit_code == 1
    assert "broke off: the node hung up" in cut.stderr


def test_a_conversation_survives_a_broken_answer(meshnode: Run, node: FakeNode) -> None:
    node.ends_with = ()
    result = meshnode("chat", input="first\nsecond\n")
    assert result.exit_code == 0
    assert [len(asked["messages"]) for asked in node.asked] == [1, 1]


def test_an_unknown_model_is_named_by_the_node(meshnode: Run, node: FakeNode) -> None:
    result = meshnode("chat", "--model", "x", "--once", "Hi")
    assert result.exit_code == 1
    assert "The model `x` does not exist in this mesh." in result.stderr


def test_with_nobody_ready_it_says_so(meshnode: Run, node: FakeNode) -> None:
    models = tuple(
        msgspec.structs.replace(model, state="loading", served_by=())
        for model in node.snapshot.mesh_models
    )
    node.snapshot = msgspec.structs.replace(node.snapshot, mesh_models=models)
    result = meshnode("chat", "--once", "Hi")
    assert result.exit_code == 1
    assert "still loading: big, small" in result.stderr
