"""What a server lists, what the mesh calls it, and the operator's words about servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshnode.config import UpstreamSpec, split_upstream
from meshnode.errors import ConfigError, RemoteProtocolError
from meshnode.messages import MODELS_MAX, is_model_name
from meshnode.upstream.keys import read_keys
from meshnode.upstream.listing import Listed, choose, read_models, read_props

OWN = "12D3KooWown"
URL = "http://127.0.0.1:8000"
DIGEST = "cd" * 32


def chosen(*names: str, wanted: str | None = None, **more):
    listed = tuple(Listed(name, 0) for name in names)
    return choose(listed, wanted, None, **{"own": OWN, "url": URL, **more})


@pytest.mark.parametrize(
    ("row", "context_tokens"),
    [
        ({"id": "m", "max_model_len": 8192}, 8192),  # vLLM, SGLang
        ({"id": "m", "context_length": 131072}, 131072),
        ({"id": "m", "meshnode": {"context_tokens": 2048, "served_by": []}}, 2048),
        ({"id": "m", "object": "model", "meta": {"n_ctx_train": 4096}}, 0),  # llama-server: /props
        ({"id": "m", "max_model_len": True}, 0),
        ({"id": "m", "max_model_len": -1, "context_length": 4096}, 4096),
        ({"id": "m", "max_model_len": 2**60}, 0),
        ({"id": "m", "meshnode": [1]}, 0),
    ],
)
def test_the_context_is_read_where_it_is_told(row: dict, context_tokens: int) -> None:
    (listed,) = read_models(json.dumps({"object": "list", "data": [row]}).encode())
    assert (listed.name, listed.context_tokens) == ("m", context_tokens)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"data":{}}', b'{"data":[{"id":7}]}', b'{"data":[{}]}',
     b'{"data":[{"id":"\xff"}]}', b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_list_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not a list of models"):
        read_models(body)


def test_names_that_could_not_be_asked_for_are_left_out() -> None:
    rows = [{"id": ""}, {"id": "x" * 257}, {"id": "a"}, {"id": "a"}]
    assert [each.name for each in read_models(json.dumps({"data": rows}).encode())] == ["a"]


def test_llama_server_tells_its_context_elsewhere() -> None:
    assert read_props(b'{"default_generation_settings":{"n_ctx":4096},"total_slots":4}') == 4096
    assert read_props(b'{"default_generation_settings":{"n_ctx":"4096"}}') == 0
    assert read_props(b"not json") == 0


@pytest.mark.parametrize(
    ("own_name", "name"),
    [
        ("llama3:8b", "llama3:8b"),
        ("meta-llama/Llama-3.1-8B", "meta-llama-Llama-3.1-8B"),
        ("/models/a b.gguf", "models-a-b.gguf"),
        ("claude@20", "claude-20"),
        ("x\n\x1b[31m", "x-31m"),
        ("a" * 200, "a" * 128),
    ],
)
def test_a_name_becomes_one_that_the_mesh_can_say(own_name: str, name: str) -> None:
    (named,) = chosen(own_name)
    assert named.name == name
    assert is_model_name(named.name)
    assert named.listed.name == own_name


def test_a_listing_is_bounded_and_never_empty() -> None:
    assert len(chosen(*(f"m{n}" for n in range(1000)))) == MODELS_MAX
    for names in ((), ("///", "é")):
        with pytest.raises(RemoteProtocolError, match="lists no model"):
            chosen(*names)


def test_the_operator_picks_one_or_renames_the_only_one() -> None:
    (picked,) = chosen("org/a", "org/b", wanted="org-b")
    assert (picked.name, picked.listed.name) == ("org-b", "org/b")
    (renamed,) = chosen("/models/x.gguf", wanted="qwen3")
    assert (renamed.name, renamed.listed.name) == ("qwen3", "/models/x.gguf")
    with pytest.raises(RemoteProtocolError, match="lists 2 models, and none is c"):
        chosen("a", "b", wanted="c")
    (late,) = chosen(*(f"m{n}" for n in range(1000)), wanted="m999")
    assert late.listed.name == "m999"


def test_a_name_alone_never_stands_for_the_same_bytes() -> None:
    digests = {
        chosen("m")[0].digest,
        chosen("n")[0].digest,
        chosen("m", own="12D3KooWother")[0].digest,
        chosen("m", url="http://127.0.0.1:8001")[0].digest,
    }
    assert len(digests) == 4
    assert chosen("m", wanted="alias")[0].digest == chosen("m")[0].digest
    (declared,) = choose((Listed("m", 0),), "m", DIGEST, own=OWN, url=URL)
    assert declared.digest == DIGEST


def test_what_a_node_lists_because_we_offer_it_is_not_offered_again() -> None:
    rows = [
        {"id": "ours", "meshnode": {"served_by": [OWN]}},
        {"id": "theirs", "meshnode": {"served_by": ["12D3KooWother", 7]}},
    ]
    listed = read_models(json.dumps({"data": rows}).encode())
    assert [each.name for each in choose(listed, None, None, own=OWN, url=URL)] == ["theirs"]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("http://127.0.0.1:8000", (URL, None, None)),
        ("http://127.0.0.1:8000/v1/=m", (URL, "m", None)),
        (f"https://api.example.org/api/v1=a:b@{DIGEST}",
         ("https://api.example.org/api", "a:b", DIGEST)),
        ("http://[::1]:1", ("http://[::1]:1", None, None)),
    ],
)  # fmt: skip
def test_an_upstream_is_an_address_and_perhaps_a_model(text: str, spec: tuple) -> None:
    assert split_upstream(text) == UpstreamSpec(*spec)


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:8000", "ftp://a", "http://", "http://a:70000", "http://user:key@a",
     "http://a?key=1", "http://a#b", "http://a=", "http://a=m@12", f"http://a@{DIGEST}",
     "http://a b", "http://a=m\n", "http://[::1::]:1", "http://a:0"],
)  # fmt: skip
def test_an_address_that_cannot_work_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        split_upstream(text)


def test_a_key_belongs_to_one_server(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the office's\n\nsk-one\n")
    assert read_keys(file, (URL,)) == {URL: "sk-one"}
    with pytest.raises(ConfigError, match="line 3") as refusal:
        read_keys(file, (URL, "http://b"))
    assert "sk-one" not in str(refusal.value)
    file.write_text(f"{URL}/v1 sk-a\nhttp://b  sk-b\n")
    assert read_keys(file, (URL, "http://b")) == {URL: "sk-a", "http://b": "sk-b"}


@pytest.mark.parametrize("text", ["http://c sk-c", "sk one two", "sk-é", "sk-\x01", "x" * 70_000])
def test_a_file_of_keys_that_cannot_work_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        read_keys(file, (URL,))
    assert "sk" not in str(refusal.value).replace(str(file), "")
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(tmp_path / "none", (URL,))


def test_an_approximation_of_another_mesh_is_left_out() -> None:
    """Ours could not say that it is one."""
    rows = [
        {"id": "big~24of32", "meshnode": {"approximate": {"kl": 0.024}}},
        {"id": "big", "meshnode": {"state": "ready"}},
    ]
    assert [each.name for each in read_models(json.dumps({"data": rows}).encode())] == ["big"]
