"""API keys: the file, the limits, the door that follows the file, and what clients see of it."""

from __future__ import annotations

import json
import os
import re
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import openai
import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from meshnode.config import load as load_config
from meshnode.errors import ConfigError
from meshnode.gateway import Candidate, keys
from meshnode.gateway.app import create_api_app
from meshnode.gateway.door import LOOK_EVERY_S, Door, open_door
from meshnode.gateway.keys import (
    ApiKey,
    BadKeyError,
    Limiter,
    LimitError,
    find_key,
    generate_token,
    hash_token,
    load,
    parse,
    with_key,
    without_key,
)
from meshnode.gateway.server import serve_api
from meshnode.gateway.tunnel import TunnelApp
from tests.fakes import MODEL, FakeMesh, WordEngine, local_mesh, tunnel_to

HANG_S = 30.0
HASH = "sha256:" + "ab" * 32
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "to be or"}]}


# --- tokens ---------------------------------------------------------------------------------------


def test_a_token_is_found_by_its_hash_and_nothing_else_is():
    tokens = [generate_token() for _ in range(3)]
    known = tuple(ApiKey(f"k{i}", hash_token(token)) for i, token in enumerate(tokens))
    assert [find_key(known, token).name for token in tokens] == ["k0", "k1", "k2"]
    assert len(set(tokens)) == 3
    assert all(len(token) == len("mesh-sk-") + 43 for token in tokens)
    wrong = (generate_token(), tokens[0] + "=", tokens[0][:-1], f" {tokens[0]}", tokens[0].upper())
    for token in (*wrong, "", known[0].digest.hex(), HASH):
        assert find_key(known, token) is None


def test_the_hash_of_a_password_opens_nothing():
    assert find_key((ApiKey("me", hash_token("hunter2")),), "hunter2") is None


# --- the file -------------------------------------------------------------------------------------


def test_a_person_may_write_the_file():
    text = f"""
        # the team
        alice = "{HASH}"
        "b-2" = {{ hash = "sha256:{"cd" * 32}", per-minute = 60 }}

        [ci]
        hash = "sha256:{"ef" * 32}"
        concurrent = 4
        """
    assert parse(text, "keys") == (
        ApiKey("alice", bytes.fromhex("ab" * 32)),
        ApiKey("b-2", bytes.fromhex("cd" * 32), per_minute=60),
        ApiKey("ci", bytes.fromhex("ef" * 32), concurrent=4),
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("alice", "not valid TOML"),
        ("n = 1" + "0" * 5000, "not valid TOML"),
        ("a = " + "[" * 5000, "not valid TOML"),
        (f'"a b" = "{HASH}"', "'a b' cannot be a name"),
        (f'{"x" * 65} = "{HASH}"', "cannot be a name"),
        ('alice = "mesh-sk-oops"', "alice must be"),
        (f'alice = "{HASH.upper()}"', "alice must be"),
        ("alice = 1", "alice must be"),
        ("alice = { per-minute = 1 }", "alice must be"),
        (f'alice = {{ hash = "{HASH}", minute = 1 }}', "alice has 'minute'. Allowed: hash"),
        (f'alice = {{ hash = "{HASH}", per-minute = 0 }}', "per-minute must be a number from 1"),
        (f'alice = {{ hash = "{HASH}", concurrent = true }}', "concurrent must be a number"),
        (f'alice = "{HASH}"\nbob = "{HASH}"', "alice and bob have the same key"),
    ],
)
def test_a_wrong_line_is_refused_with_the_way_out(text, complaint):
    with pytest.raises(ConfigError) as refusal:
        parse(text, "keys.toml")
    assert str(refusal.value).startswith("keys.toml")
    assert complaint in str(refusal.value)
    assert "mesh-sk-" not in str(refusal.value)


def test_as_many_keys_as_fit_and_no_more():
    lines = [f'k{i} = "sha256:{i:064x}"' for i in range(keys.KEYS_MAX)]
    text = "\n".join(lines)
    assert len(parse(text, "keys")) == keys.KEYS_MAX
    with pytest.raises(ConfigError, match="has 1000 keys: revoke one"):
        with_key(text, ApiKey("more", bytes(31) + b"\xff"), "keys")
    with pytest.raises(ConfigError, match="more than 1000 keys"):
        parse(text + f'\nmore = "{HASH}"', "keys")
    longest = ApiKey("x" * 64, bytes(32), keys.PER_MINUTE_MAX, keys.CONCURRENT_MAX)
    assert len(with_key("#\n", longest, "keys")) * keys.KEYS_MAX < keys.FILE_BYTES_MAX


NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
LIMITS = st.none() | st.integers(1, 1000)
KEYS = st.builds(ApiKey, NAMES, st.binary(min_size=32, max_size=32), LIMITS, LIMITS)


@settings(deadline=None)
@given(st.lists(KEYS, max_size=6, unique_by=(lambda k: k.name, lambda k: k.digest)), st.data())
def test_what_is_added_is_read_and_what_is_taken_out_is_gone(made, data):
    text = "# by hand\n"
    for key in made:
        text = with_key(text, key, "keys")
    assert parse(text, "keys") == tuple(made)
    if made:
        gone = data.draw(st.sampled_from(made))
        text = without_key(text, gone.name, "keys")
        assert parse(text, "keys") == tuple(key for key in made if key != gone)
    assert text.startswith("# by hand\n")


def test_editing_leaves_what_people_wrote_or_says_it_cannot():
    text = f"# mine\n'alice'  =  \"{HASH}\" # since May"
    more = with_key(text, ApiKey("bob", bytes(32)), "keys")
    assert more.startswith(text + "\nbob = ")
    assert without_key(more, "alice", "keys").startswith("# mine\nbob = ")
    for twice in ("alice", "bob"):
        with pytest.raises(ConfigError, match=f"a key called {twice} already"):
            with_key(more, ApiKey(twice, bytes(31) + b"x"), "keys")
    with pytest.raises(ConfigError, match=r"no key called 'carol'. Keys in keys: alice, bob"):
        without_key(more, "carol", "keys")
    table = f'[ci]\nhash = "{HASH}"\n'
    with pytest.raises(ConfigError, match="above it:\nbob = "):
        with_key(table, ApiKey("bob", bytes(32)), "keys")
    with pytest.raises(ConfigError, match="with an editor"):
        without_key(table, "ci", "keys")


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o440, 0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(tmp_path, mode):
    path = write(tmp_path / "keys.toml", "")
    path.chmod(mode)
    if mode & 0o022:
        with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
            load(path)
    else:
        assert load(path) == ""


def test_what_is_not_a_key_file_is_refused_and_none_is_none(tmp_path):
    assert load(tmp_path / "missing") is None
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, complaint in (
        (tmp_path / "pipe", "is not a file"),  # and does not wait for a writer
        (tmp_path, "cannot read"),
        (write(tmp_path / "big", "#" * (keys.FILE_BYTES_MAX + 1)), "too large"),
        (write(tmp_path / "binary", b"\xff"), "is not text"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            load(path)


# --- limits ---------------------------------------------------------------------------------------

SLOW = ApiKey("slow", bytes(32), per_minute=6)
NARROW = ApiKey("narrow", bytes(32), concurrent=2)


def test_a_bucket_holds_a_minute_and_fills_evenly():
    limiter = Limiter()
    for _ in range(6):
        limiter.begin(SLOW, 100.0)()
    with pytest.raises(LimitError, match="slow may begin 6 requests a minute") as refusal:
        limiter.begin(SLOW, 104.0)
    assert refusal.value.retry_after_s == pytest.approx(6.0)
    limiter.begin(SLOW, 110.0)
    with pytest.raises(LimitError):
        limiter.begin(SLOW, 110.0)
    for _ in range(6):  # no more than a minute's worth, however long it was quiet
        limiter.begin(SLOW, 9999.0)
    with pytest.raises(LimitError):
        limiter.begin(SLOW, 9999.0)


@given(st.integers(1, 50), st.lists(st.floats(0, 20), max_size=200))
def test_in_no_minute_begin_more_than_two_minutes_worth(per_minute, gaps):
    limiter, key, now, begun = Limiter(), ApiKey("k", bytes(32), per_minute), 0.0, []
    for gap in gaps:
        now += gap
        with suppress(LimitError):
            limiter.begin(key, now)
            begun.append(now)
        assert sum(at > now - 60 for at in begun) <= 2 * per_minute


def test_running_requests_are_counted_until_they_end():
    limiter = Limiter()
    ends = [limiter.begin(NARROW, 0.0), limiter.begin(NARROW, 0.0)]
    with pytest.raises(LimitError, match="has 2 requests running and may have 2") as refusal:
        limiter.begin(NARROW, 0.0)
    assert refusal.value.retry_after_s > 0
    limiter.begin(ApiKey("other", bytes(32), concurrent=1), 0.0)
    ends.pop()()
    limiter.begin(NARROW, 0.0)


def test_a_refused_request_costs_nothing():
    limiter, key = Limiter(), ApiKey("k", bytes(32), per_minute=2, concurrent=1)
    end = limiter.begin(key, 0.0)
    for _ in range(5):
        with pytest.raises(LimitError, match="running"):
            limiter.begin(key, 0.0)
    end()
    limiter.begin(key, 0.0)


def test_a_key_that_is_gone_leaves_nothing_behind():
    limiter = Limiter()
    old = limiter.begin(NARROW, 0.0)
    limiter.begin(SLOW, 0.0)
    limiter.keep_only([SLOW])
    assert set(limiter._uses) == {"slow"}
    limiter.begin(NARROW, 0.0)
    old()  # of the first key of this name: does not count for the second
    limiter.begin(NARROW, 0.0)
    with pytest.raises(LimitError):
        limiter.begin(NARROW, 0.0)


# --- the door -------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> Path:
    """A new file each time, as editors and `meshnode key` make it."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content if isinstance(content, bytes) else content.encode())
    new.chmod(0o600)
    return new.replace(path)


@dataclass
class KeyFile:
    """A key file on disk, and the tokens of its keys."""

    path: Path
    tokens: dict[str, str] = field(default_factory=dict)

    def create(self, name: str, **limits: int) -> str:
        token = self.tokens[name] = generate_token()
        key = ApiKey(name, hash_token(token), **limits)
        write(self.path, with_key(load(self.path) or "", key, self.path))
        return token

    def revoke(self, name: str) -> None:
        write(self.path, without_key(load(self.path) or "", name, self.path))


@pytest.fixture
def file(tmp_path):
    return KeyFile(tmp_path / "api-keys.toml")


def test_the_door_follows_the_file(file, caplog):
    caplog.set_level("INFO")
    door = Door(file.path)
    assert (door.keys, door.admit(None, 0.0).name) == (None, "")
    alice = file.create("alice")
    later = LOOK_EVERY_S
    with pytest.raises(BadKeyError, match="asks for a key"):
        door.admit(None, later)
    assert door.admit(alice, later).name == "alice"
    bob = file.create("bob")
    file.revoke("alice")
    assert door.admit(alice, later + 0.9 * LOOK_EVERY_S).name == "alice"  # not looked yet
    later += LOOK_EVERY_S
    with pytest.raises(BadKeyError, match="revoked"):
        door.admit(alice, later)
    assert door.admit(bob, later).name == "bob"
    assert bob not in caplog.text


@pytest.mark.parametrize("damage", ["gone", "torn", "writable", "emptied"])
def test_nothing_that_happens_to_the_file_opens_the_door(file, caplog, damage):
    alice = file.create("alice")
    door = Door(file.path)
    if damage == "gone":
        file.path.unlink()
    elif damage == "writable":
        file.path.chmod(0o666)
    else:
        write(file.path, "alice = " if damage == "torn" else "")
    for now in (LOOK_EVERY_S, 2 * LOOK_EVERY_S, 3 * LOOK_EVERY_S):
        with pytest.raises(BadKeyError):
            door.admit(None, now)
        if damage in ("torn", "writable"):
            assert door.admit(alice, now).name == "alice"
        else:
            with pytest.raises(BadKeyError):
                door.admit(alice, now)
    said = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == (damage != "emptied")  # once, not at every look
    file.path.unlink(missing_ok=True)
    bob = file.create("bob")
    assert door.admit(bob, 4 * LOOK_EVERY_S).name == "bob"
    with pytest.raises(BadKeyError):
        door.admit(alice, 4 * LOOK_EVERY_S)


def test_a_first_file_that_is_damaged_lets_nobody_in(file, caplog):
    door = Door(file.path)
    write(file.path, "alice = ")
    with pytest.raises(BadKeyError):
        door.admit(None, LOOK_EVERY_S)
    assert "0 API keys stay in force" in caplog.text
    with pytest.raises(ConfigError, match="not valid TOML"):
        Door(file.path)


def config(tmp_path, **flags):
    flags = {name.replace("_", "-"): value for name, value in flags.items()}
    return load_config({"data-dir": str(tmp_path), **flags}, {}, None)


def test_other_machines_need_a_key(tmp_path, file):
    for api in ("0.0.0.0:9337", "[::]:9337", "192.0.2.7:9337", "gateway.example:9337"):
        with pytest.raises(ConfigError, match=r"`meshnode key create NAME`.*--no-api-key"):
            open_door(config(tmp_path, api=api))
        assert open_door(config(tmp_path, api=api, no_api_key=True)) is None
    assert open_door(config(tmp_path, api="127.0.0.1:9337")).keys is None
    assert open_door(config(tmp_path, api="")) is None
    file.create("alice")
    assert len(open_door(config(tmp_path, api="0.0.0.0:9337")).keys) == 1
    assert open_door(config(tmp_path, no_api_key=True)) is None
    file.revoke("alice")
    with pytest.raises(ConfigError, match="there is no API key in"):
        open_door(config(tmp_path, api="0.0.0.0:9337"))


def test_a_key_file_that_was_named_has_to_be_there(tmp_path):
    named = tmp_path / "named.toml"
    with pytest.raises(ConfigError, match=f"`meshnode key create NAME --file {named}` makes it"):
        open_door(config(tmp_path, api_key_file=str(named)))
    KeyFile(named).create("alice")
    assert len(open_door(config(tmp_path, api_key_file=str(named))).keys) == 1


# --- what clients see -----------------------------------------------------------------------------


def bearer(token):
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def mesh():
    return local_mesh(WordEngine())


@pytest.fixture
def api(mesh, file):
    file.create("alice")
    return create_api_app(mesh, door=Door(file.path)).test_client()


async def error_of(response):
    return json.loads(await response.get_data())["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic YTpi"},
        {"x-api-key": ""},
        {"x-api-key": "sk-nonsense"},
        bearer("mesh-sk-" + "A" * 43),
        bearer("mesh-sk-" + "A" * 60_000),
        bearer("é"),
    ],
)
async def test_without_a_key_everything_but_health_is_401(api, mesh, headers):
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/rerank"),
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{MODEL}"),
        ("GET", "/v1/nothing"),
        ("GET", "/v1/chat/completions"),
        ("GET", "/"),
    ):
        response = await api.open(path, method=method, headers=headers)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
        error = await error_of(response)
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert set(error) >= {"message", "param"}
    for path in ("/healthz", "/readyz"):
        assert (await api.get(path, headers=headers)).status_code == 200
    assert mesh.sessions == []


async def test_a_key_opens_wherever_it_is_sent(api, file):
    token = file.tokens["alice"]
    for headers in (
        bearer(token),
        {"authorization": f"bearer  {token}"},
        {"x-api-key": token},
        {"authorization": "Basic YTpi", "x-api-key": token},  # a proxy's, and ours
    ):
        response = await api.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.status_code == 200, headers
    assert (await api.get("/v1/nothing", headers=bearer(token))).status_code == 404


async def test_what_is_mounted_guards_itself(mesh, file):
    file.create("alice")

    def mount(app):
        @app.get("/api/status")
        async def status():
            return b"{}"

    api = create_api_app(mesh, door=Door(file.path), mount=mount).test_client()
    assert (await api.get("/api/status")).status_code == 200
    assert (await api.get("/api/other")).status_code == 401


async def test_tenants_are_names_not_secrets(mesh, file, autojump_clock):
    """A new key of the same name goes on with the old one's chats; another name does not."""
    door = Door(file.path)
    api = create_api_app(mesh, door=door).test_client()

    async def ask(token):
        await trio.sleep(LOOK_EVERY_S)
        response = await api.post("/v1/chat/completions", json=CHAT, headers=bearer(token))
        assert response.status_code == 200

    await ask(file.create("alice"))
    await ask(file.create("bob"))
    file.revoke("alice")
    await ask(file.create("alice"))
    alice, bob, again = mesh.sessions
    assert alice == again != bob


async def test_too_many_a_minute_is_429(mesh, file, autojump_clock):
    headers = bearer(file.create("alice", per_minute=2))
    api = create_api_app(mesh, door=Door(file.path)).test_client()
    for _ in range(2):
        assert (await api.get("/v1/models", headers=headers)).status_code == 200
    response = await api.get("/v1/models", headers=headers)
    assert response.status_code == 429
    error = await error_of(response)
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert "alice may begin 2 requests a minute" in error["message"]
    await trio.sleep(int(response.headers["retry-after"]))
    assert (await api.get("/v1/models", headers=headers)).status_code == 200


async def test_a_running_answer_holds_its_place_until_its_end(file, nursery):
    engine = WordEngine()
    go_on = trio.Event()
    engine.pace = go_on.wait
    headers = bearer(file.create("alice", concurrent=1))
    api = create_api_app(local_mesh(engine), door=Door(file.path)).test_client()
    answered = []

    async def ask(**fields):
        response = await api.post("/v1/chat/completions", json={**CHAT, **fields}, headers=headers)
        answered.append((response.status_code, await response.get_data()))

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as asking:
            asking.start_soon(partial(ask, stream=True))
            await trio.testing.wait_all_tasks_blocked()
            await ask()
            assert answered[0][0] == 429
            go_on.set()
        await ask()
        await ask(model="gpt-9")  # an error gives its place back as well
        await ask()
    assert [status for status, _ in answered] == [429, 200, 200, 404, 200]


async def test_a_key_never_reaches_a_peer_or_a_log(file, nursery, caplog, capfd):
    caplog.set_level(0)
    token = file.create("alice")
    seen = []
    engine = WordEngine(die_after=2)
    app = TunnelApp(local_mesh(engine, "peer-b"))

    async def recording(scope, receive, send):
        seen.append(scope["headers"])

        async def receive_seen():
            message = await receive()
            seen.append(message)
            return message

        await app(scope, receive_seen, send)

    mesh = FakeMesh("peer-a", candidates=(Candidate("peer-b", False, "only"),))
    mesh.tunnels["peer-b"] = tunnel_to(recording, nursery)
    api = create_api_app(mesh, door=Door(file.path)).test_client()
    mesh.models = lambda: 1 / 0
    with trio.fail_after(HANG_S):
        for headers in (bearer(token), {"x-api-key": token}):
            for stream in (True, False):
                response = await api.post(
                    "/v1/chat/completions", json={**CHAT, "stream": stream}, headers=headers
                )
                await response.get_data()
            assert (await api.get("/v1/models", headers=headers)).status_code == 500
            assert (await api.get("/v1/models", headers=bearer(token + "x"))).status_code == 401
    assert len(seen) > 4
    out, err = capfd.readouterr()
    assert "ZeroDivisionError" in caplog.text
    for where in (repr(seen), caplog.text, out, err, repr(engine.requests)):
        assert token.removeprefix("mesh-sk-") not in where
        assert hash_token(token).hex() not in where


@asynccontextmanager
async def serving(app):
    shutdown = trio.Event()
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            serve = partial(serve_api, app, ("127.0.0.1", 0), shutdown=shutdown.wait)
            _, port = await nursery.start(serve)
            yield port
            shutdown.set()


# What a header may be called that some code of ours, or of a library below, looks at.
LOOKED_AT = [
    *(b"authorization", b"x-api-key", b"x-session-id", b"x-request-id", b"content-type"),
    *(b"content-length", b"transfer-encoding", b"cookie", b"host", b"origin", b"accept"),
    *(b"expect", b"upgrade", b"connection", b"range", b"date", b"x-forwarded-for"),
]
# What HTTP allows in a value, which reaches our code; and anything, which should not.
LEGAL = st.lists(st.sampled_from([*range(0x21, 0x7F), *range(0x80, 0x100)]), max_size=60).map(bytes)
VALUES = st.sampled_from(
    [b"Bearer", b"bearer \xff", b"Bearer mesh-sk-\xc3\xa9", b"Basic !!", b"-1", b"1e9", b"9" * 5000]
)
HEADERS = st.lists(
    st.tuples(st.sampled_from(LOOKED_AT) | st.binary(max_size=20), LEGAL | VALUES | st.binary()),
    max_size=6,
)


@pytest.mark.parametrize("locked", [True, False])
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(headers=HEADERS, post=st.booleans())
@example(headers=[], post=True)
async def test_no_header_makes_a_5xx(tmp_path, locked, headers, post):
    file = KeyFile(tmp_path / "api-keys.toml")
    if locked and not file.path.exists():
        file.create("alice")
    head = [b"POST /v1/completions HTTP/1.1" if post else b"GET /v1/models HTTP/1.1"]
    head += [name + b": " + value for name, value in [(b"host", b"localhost"), *headers]]
    body = b'{"model": "words", "prompt": "to be"}'
    head += [b"content-length: %d" % len(body), b"", body] if post else [b"", b""]
    head += [b"", b"\0 no request at all", b"", b""]  # so that the server ends the connection
    app = create_api_app(local_mesh(WordEngine()), door=Door(file.path))
    answer = b""
    async with serving(app) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
        with suppress(trio.BrokenResourceError):  # it may hang up on us, which is an answer
            await stream.send_all(b"\r\n".join(head))
            async for chunk in stream:
                answer += chunk
    statuses = [int(code) for code in re.findall(rb"HTTP/1.1 ([0-9]{3})", answer)]
    # 501 is what HTTP asks for when a transfer coding is not known.
    assert statuses, "hung up without a word"
    assert headers or statuses[0] == (401 if locked else 200)
    assert all(status < 500 or status == 501 for status in statuses), answer


def talk(port, token):
    """What a program using the OpenAI library does. Runs in a thread."""
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0
    ) as client:
        with pytest.raises(openai.AuthenticationError) as refusal:
            client.models.list()
        assert refusal.value.code == "invalid_api_key"
        client.api_key = token
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = client.chat.completions.create(**CHAT, max_tokens=2)
        assert answer.choices[0].message.content == "to be "
        with pytest.raises(openai.RateLimitError) as limit:
            client.models.list()
        assert limit.value.code == "rate_limit_exceeded"
        assert limit.value.response.headers["retry-after"] == "30"


async def test_openais_own_client_understands(mesh, file):
    token = file.create("alice", per_minute=2)
    async with serving(create_api_app(mesh, door=Door(file.path))) as port:
        await trio.to_thread.run_sync(talk, port, token)
