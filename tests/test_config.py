"""Who wins, what is refused, and that secrets stay secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.config import (
    API_DEFAULT,
    LISTEN_DEFAULT,
    SETTINGS,
    Config,
    is_loopback,
    load,
    size_bytes,
    split_host_port,
)
from meshnode.errors import ConfigError

PEER = "12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# key, as a flag, as MESHNODE_*, as TOML; field and what it becomes for flag, env, file, default
PRECEDENCE = [
    ("api", "h:1", "h:2", '"h:3"', "api", ("h:1", "h:2", "h:3", API_DEFAULT)),
    ("model", ("a",), "b, c", '["d"]', "models", (("a",), ("b", "c"), ("d",), ("default",))),
    ("standby", ("a=x",), "b, c", '["d"]', "standbys", (("a=x",), ("b", "c"), ("d",), ())),
    ("mmproj", ("x=a",), "b, c", '["d"]', "projectors", (("x=a",), ("b", "c"), ("d",), ())),
    (
        "upstream",
        ("http://a:1=x",),
        "http://b, https://c/v1",
        f'["http://[::1]:2=y@{"ab" * 32}"]',
        "upstreams",
        (
            ("http://a:1=x",),
            ("http://b", "https://c/v1"),
            (f"http://[::1]:2=y@{'ab' * 32}",),
            (),
        ),
    ),
    (
        "upstream-key-file",
        "/a",
        "/b",
        '"/c"',
        "upstream_key_file",
        (Path("/a"), Path("/b"), Path("/c"), None),
    ),
    (
        "api-key-file",
        "/a",
        "/b",
        '"/c"',
        "api_key_file",
        (Path("/a"), Path("/b"), Path("/c"), None),
    ),
    ("no-api-key", True, "yes", "true", "ask_for_keys", (False, False, False, True)),
    ("mesh", "a", "b", '"c"', "mesh", ("a", "b", "c", None)),
    ("join", "a", "b", '"c"', "join", ("a", "b", "c", None)),
    ("no-mdns", True, "yes", "true", "mdns", (False, False, False, True)),
    ("no-share-weights", True, "yes", "true", "share_weights", (False, False, False, True)),
    ("context", 1024, "2048", "4096", "context_tokens", (1024, 2048, 4096, None)),
    ("slots", 1, "2", "3", "slots", (1, 2, 3, 8)),
    ("activations", "i8", "f32", '"i8"', "activations", ("i8", "f32", "i8", "f32")),
    ("kv-type", "q8_0", "f16", '"q8_0"', "kv_type", ("q8_0", "f16", "q8_0", "f16")),
    (
        "kv-spill",
        "2GiB",
        "512 mib",
        '"0"',
        "kv_spill_bytes",
        (2 * 2**30, 512 * 2**20, 0, 0),
    ),
    (
        "memory",
        "8GiB",
        "512 mib",
        '"1.5GB"',
        "memory_bytes",
        (8 * 2**30, 512 * 2**20, 1_500_000_000, None),
    ),
    ("speculate", "auto", "lookup", '"auto"', "speculate", ("auto", "lookup", "auto", "off")),
    ("log-format", "json", "json", '"json"', "log_format", ("json", "json", "json", "pretty")),
    (
        "log-level",
        "debug",
        "error",
        '"warning"',
        "log_level",
        ("debug", "error", "warning", "info"),
    ),
    (
        "listen",
        ("/ip4/127.0.0.1/tcp/1",),
        "/ip4/127.0.0.1/tcp/2,/ip6/::1/udp/2/quic-v1",
        '"/ip4/127.0.0.1/tcp/3"',
        "listen",
        (
            ("/ip4/127.0.0.1/tcp/1",),
            ("/ip4/127.0.0.1/tcp/2", "/ip6/::1/udp/2/quic-v1"),
            ("/ip4/127.0.0.1/tcp/3",),
            LISTEN_DEFAULT,
        ),
    ),
    (
        "bootstrap",
        (f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}",),
        f"/dns/example.org/udp/2/quic-v1/p2p/{PEER}",
        f'["/ip4/192.0.2.3/tcp/1/p2p/{PEER}"]',
        "bootstrap",
        (
            (f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}",),
            (f"/dns/example.org/udp/2/quic-v1/p2p/{PEER}",),
            (f"/ip4/192.0.2.3/tcp/1/p2p/{PEER}",),
            (),
        ),
    ),
]


@pytest.mark.parametrize(("key", "flag", "env", "toml", "field", "expected"), PRECEDENCE)
def test_flags_over_environment_over_file_over_default(
    data_dir: Path,
    key: str,
    flag: object,
    env: str,
    toml: str,
    field: str,
    expected: tuple[object, ...],
) -> None:
    flags = {"data-dir": str(data_dir)}
    exported = {"MESHNODE_" + key.upper().replace("-", "_"): env}
    by_default = load(flags, {}, None)
    write(data_dir / "config.toml", f"{key} = {toml}\n")
    by_file = load(flags, {}, None)
    by_env = load(flags, exported, None)
    by_flag = load({**flags, key: flag}, exported, None)
    found = tuple(getattr(config, field) for config in (by_flag, by_env, by_file, by_default))
    assert found == expected


def test_every_setting_is_in_the_precedence_table() -> None:
    assert {row[0] for row in PRECEDENCE} | {"data-dir", "draft"} == set(SETTINGS)


def test_data_dir_comes_from_flag_environment_file_or_xdg(tmp_path: Path) -> None:
    file = write(tmp_path / "node.toml", f'data-dir = "{tmp_path}/from-file"\n')
    env = {"MESHNODE_DATA_DIR": f"{tmp_path}/from-env", "XDG_DATA_HOME": f"{tmp_path}/xdg"}
    xdg = {"XDG_DATA_HOME": f"{tmp_path}/xdg"}
    assert load({"data-dir": f"{tmp_path}/flag"}, env, file).data_dir == tmp_path / "flag"
    assert load({}, env, file).data_dir == tmp_path / "from-env"
    assert load({}, xdg, file).data_dir == tmp_path / "from-file"
    assert load({}, xdg, None).data_dir == tmp_path / "xdg" / "meshnode"
    assert load({}, {}, None).data_dir == Path.home() / ".local/share/meshnode"


def test_an_explicit_file_replaces_the_one_in_the_data_dir(data_dir: Path, tmp_path: Path) -> None:
    write(data_dir / "config.toml", "slots = 3\n")
    named = write(tmp_path / "other.toml", 'mesh = "home"\n')
    for config in (
        load({"data-dir": str(data_dir)}, {}, named),
        load({"data-dir": str(data_dir)}, {"MESHNODE_CONFIG": str(named)}, None),
    ):
        assert (config.mesh, config.slots) == ("home", 8)


@pytest.mark.parametrize(
    ("toml", "complaint"),
    [
        ("slotz = 3", "unknown key 'slotz'. Allowed: model, standby, mmproj, upstream"),
        ("slots = true", "slots must be a number from 1 to 256, not True"),
        ("slots = 0", "slots must be a number"),
        ('context = "4096"', "context must be a number of tokens"),
        ('api = "9337"', "api must be HOST:PORT"),
        ('api = "::1:9337"', "api must be HOST:PORT"),
        ("no-mdns = 1", "no-mdns must be true or false, not 1"),
        ('listen = ["0.0.0.0:9338"]', "listen must be a list, each a multiaddr"),
        ('bootstrap = "/ip4/192.0.2.1/tcp/1"', "bootstrap must be a list, each a multiaddr with"),
        ('mesh = "../../etc"', "mesh must be a mesh name"),
        ('log-format = "xml"', "log-format must be pretty or json, not 'xml'"),
        ("model = [1]", "model must be a list, each PATH_OR_NAME"),
        ('memory = "8"', "memory must be a size from 128MiB, with its unit: 8GiB"),
        ('memory = "1MiB"', "memory must be a size from 128MiB"),
        ("memory = 8", "memory must be a size from 128MiB"),
        ('data-dir = "/elsewhere"', "data-dir cannot be set by a file that is found in"),
        ("slots = ", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_way_out(
    data_dir: Path, toml: str, complaint: str
) -> None:
    file = write(data_dir / "config.toml", toml + "\n")
    with pytest.raises(ConfigError) as refusal:
        load({"data-dir": str(data_dir)}, {}, None)
    assert str(file) in str(refusal.value)
    assert complaint in str(refusal.value)


def test_wrong_flags_and_variables_are_named_as_the_operator_wrote_them() -> None:
    with pytest.raises(ConfigError, match=r"^--slots must be a number"):
        load({"slots": 1000}, {}, None)
    with pytest.raises(ConfigError, match=r"^MESHNODE_NO_MDNS must be true or false, not 'maybe'"):
        load({}, {"MESHNODE_NO_MDNS": "maybe"}, None)
    with pytest.raises(ConfigError, match=r"^cannot read /nonexistent\.toml: No such file"):
        load({}, {}, Path("/nonexistent.toml"))


def test_the_key_file_is_in_the_data_directory_unless_it_is_named(data_dir: Path) -> None:
    flags = {"data-dir": str(data_dir)}
    assert load(flags, {}, None).key_file == data_dir / "api-keys.toml"
    named = load(flags, {"MESHNODE_API_KEY_FILE": "~/keys.toml"}, None)
    assert named.key_file == Path.home() / "keys.toml"


def test_keys_cannot_be_asked_for_and_not(data_dir: Path) -> None:
    flags = {"data-dir": str(data_dir), "api-key-file": "/a"}
    with pytest.raises(ConfigError, match="api-key-file and no-api-key contradict"):
        load(flags, {"MESHNODE_NO_API_KEY": "1"}, None)
    assert load(flags, {"MESHNODE_NO_API_KEY": "0"}, None).ask_for_keys


def test_what_is_loopback() -> None:
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost", "a.localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.0.2.1", "localhost.example.org", "host", ""):
        assert not is_loopback(host)


def test_an_unrelated_variable_with_our_prefix_is_left_alone() -> None:
    assert load({}, {"MESHNODE_SERVICE_HOST": "10.0.0.1"}, None).api == API_DEFAULT


def test_the_token_is_in_no_repr_and_no_error(data_dir: Path) -> None:
    config = load({"join": "mesh1.very-secret"}, {}, None)
    assert config.join == "mesh1.very-secret"
    assert "very-secret" not in repr(config)
    write(data_dir / "config.toml", 'join = ["mesh1.very-secret"]\n')
    with pytest.raises(ConfigError) as refusal:
        load({"data-dir": str(data_dir)}, {}, None)
    assert "very-secret" not in str(refusal.value)


def test_a_role_takes_from_a_shared_file_what_it_can_use(data_dir: Path) -> None:
    write(data_dir / "config.toml", 'model = ["a.gguf"]\n')

    def as_role(role: str) -> Config:
        return load({"data-dir": str(data_dir), "role": role}, {}, None)

    assert as_role("node").models == ("a.gguf",)
    assert (as_role("gateway").models, as_role("gateway").api) == ((), API_DEFAULT)
    assert (as_role("bootstrap").models, as_role("bootstrap").api) == ((), "")


def test_a_standby_takes_the_place_of_the_default_model(data_dir: Path) -> None:
    flags = {"data-dir": str(data_dir), "standby": ("a.gguf",)}
    config = load(flags, {}, None)
    assert (config.models, config.standbys) == ((), ("a.gguf",))
    config = load({**flags, "model": ("b.gguf",)}, {}, None)
    assert (config.models, config.standbys) == (("b.gguf",), ("a.gguf",))
    assert load({**flags, "role": "gateway"}, {}, None).standbys == ()


def test_sizes() -> None:
    assert size_bytes("8GiB") == 8 * 2**30
    assert size_bytes("0.5 tb") == 500 * 10**9
    for wrong in ("8", "GiB", "-1GiB", "8G", "1e3MiB", "8GiBs", ""):
        with pytest.raises(ConfigError, match="for example 8GiB"):
            size_bytes(wrong)


def test_only_an_untouched_listen_is_the_default() -> None:
    assert load({}, {}, None).listen_is_default
    assert not load({"listen": LISTEN_DEFAULT}, {}, None).listen_is_default


def test_host_and_port() -> None:
    assert split_host_port("127.0.0.1:9337") == ("127.0.0.1", 9337)
    assert split_host_port("[::1]:0") == ("::1", 0)
    for wrong in ("9337", ":9337", "localhost", "host:port", "host:70000", "::1:9337"):
        with pytest.raises(ConfigError):
            split_host_port(wrong)


def test_a_draft_model_goes_with_its_speculation(data_dir: Path) -> None:
    def loaded(**flags: object) -> Config:
        return load({"data-dir": str(data_dir), "role": "node", **flags}, {}, None)

    assert loaded(speculate="draft", draft="small").draft == "small"
    assert loaded(speculate="auto", draft="small").draft == "small"
    with pytest.raises(ConfigError, match="needs the small model"):
        loaded(speculate="draft")
    for speculate in (None, "off", "lookup"):
        with pytest.raises(ConfigError, match="nobody would ask it"):
            loaded(speculate=speculate, draft="small")
    with pytest.raises(ConfigError, match="one model"):
        loaded(speculate="auto", draft="small", model=("a", "b"))
