"""A mesh across bad networks: 20 ms each way and one packet in a hundred lost."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.conftest import Figure
from tests.e2e.lossy import Place, Switch, TcpProxy, UdpProxy, Weather
from tests.e2e.mesh import (
    OTHER_NAME,
    QUESTION,
    Mesh,
    NodeProcess,
    chat,
    run_command,
    serves,
    wait_all_see,
)

LISTEN = "/ip4/{}/udp/9338/quic-v1"
FIRST_TOKEN_S = 3.0
"""Half of it is the prefill of a busy machine; a lost packet costs a tenth of a second."""
ROUND_TRIP_S = 0.04
LONG = "Tell me a story about a lighthouse keeper."
LONG_TOKENS = 120


def assert_stream_is_whole(gate: NodeProcess, server: NodeProcess, figure: Figure) -> None:
    """What arrives through the tunnel is what the server says without one, token by token."""
    model = server.started["models"][0]
    whole = server.ask(LONG, max_tokens=LONG_TOKENS, model=model)
    assert whole.route == "local"
    direct = server.stream(LONG, max_tokens=LONG_TOKENS, model=model)
    for _ in range(3):
        streamed = gate.stream(LONG, max_tokens=LONG_TOKENS, model=model)
        assert streamed.headers["x-meshnode-route"] == "tunnel"
        assert streamed.events[-1] == "[DONE]"
        assert streamed.text == whole.text == direct.text
        assert ROUND_TRIP_S < streamed.first_token_s < FIRST_TOKEN_S
    figure(f"first token direct, s ({gate.name})", direct.first_token_s)
    figure(f"first token through the tunnel, s ({gate.name})", streamed.first_token_s)


@pytest.mark.parametrize(
    ("listen", "proxy_type", "path"),
    [
        ("/ip4/127.0.0.1/udp/0/quic-v1", UdpProxy, "/ip4/127.0.0.1/udp/{}/quic-v1"),
        ("/ip4/127.0.0.1/tcp/0", TcpProxy, "/ip4/127.0.0.1/tcp/{}"),
    ],
    ids=["quic", "tcp"],
)
def test_through_a_proxy(
    mesh: Mesh,
    figure: Figure,
    listen: str,
    proxy_type: Callable[..., UdpProxy | TcpProxy],
    path: str,
) -> None:
    """Both others know the server by the proxy's address alone."""
    server = mesh.node("server", listen=listen, models=(OTHER_NAME,)).wait_started()
    port = int(server.addrs[0].split("/")[4])
    with proxy_type(("127.0.0.1", port), Weather()) as proxy:
        data = ("--data-dir", str(server.data_dir))
        told = path.format(proxy.port)
        code, token, stderr = run_command("invite", "--uses", "2", "--addr", told, *data)
        assert code == 0, stderr
        other = mesh.node("other", "--join", token.strip(), listen=listen)
        gate = mesh.gateway(f"gate-{proxy_type.__name__}", "--join", token.strip(), listen=listen)
        begun = time.monotonic()
        for node in (other, gate):
            node.wait_started()
        wait_all_see([server, other, gate])
        figure(f"found each other through {proxy_type.__name__}, s", time.monotonic() - begun)
        gate.wait_until(lambda status: serves(status, OTHER_NAME) == {server.peer_id})
        passed = proxy.tally.passed
        assert_stream_is_whole(gate, server, figure)
        assert proxy.tally.passed > passed + LONG_TOKENS
        assert proxy.tally.lost > 0
        assert {peer["rtt_ms"] > 30 for peer in gate.status()["peers"]} == {True, False}

        proxy.weather.silent = True
        took_s = gate.wait_until(lambda status: server.peer_id not in str(status["peers"]), 6.0)
        figure(f"silence noticed through {proxy_type.__name__}, s", took_s)


# --- machines of their own: network namespaces ----------------------------------------------------


@pytest.fixture
def switch() -> Iterator[Switch]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command `ip` (Debian: apt install iproute2)")
    switch = Switch(Weather())
    with switch:
        yield switch


def places(switch: Switch, count: int) -> list[Place]:
    try:
        return [switch.place() for _ in range(count)]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root and /dev/net/tun for network namespaces: {error}")


def test_in_network_namespaces(mesh: Mesh, switch: Switch, figure: Figure) -> None:
    there = places(switch, 3)
    at = [p.reached() | {"listen": LISTEN.format(p.address)} for p in there]
    first = mesh.node("first", **at[0]).wait_started()
    token = first.invite()
    begun = time.monotonic()
    second = mesh.node("second", "--join", token, models=(OTHER_NAME,), **at[1])
    gate = mesh.gateway("gate", "--join", token, **at[2])
    for node in (second, gate):
        node.wait_started()
    everybody = [first, second, gate]
    wait_all_see(everybody)
    figure("found each other in namespaces, s", time.monotonic() - begun)
    for peer in gate.status()["peers"]:
        assert peer["rtt_ms"] >= 1000 * ROUND_TRIP_S
    gate.wait_until(lambda status: serves(status, OTHER_NAME) == {second.peer_id})
    first.wait_until(lambda status: serves(status, OTHER_NAME) == {second.peer_id})
    assert_stream_is_whole(gate, second, figure)
    opening = first.ask(QUESTION, model=OTHER_NAME)
    again = gate.ask(QUESTION, opening.text, "And of Spain?", model=OTHER_NAME)
    assert again.served_by == second.peer_id
    assert again.cached_tokens > 0

    switch.silence(there[1])
    took_s = gate.wait_until(lambda status: not serves(status, OTHER_NAME), 5.0)
    figure("pulled cable noticed, s", took_s)
    asked_at = time.monotonic()
    reply = gate.request("POST", "/v1/chat/completions", chat("x", model=OTHER_NAME))
    assert reply.status in (404, 503)
    assert time.monotonic() - asked_at < 1.0, "what is known to be gone is not waited for"
    switch.silence(there[1], silent=False)
    figure("cable back, s", wait_all_see(everybody))


def test_found_by_mdns(mesh: Mesh, switch: Switch, figure: Figure) -> None:
    """Members that know no address of each other meet on the LAN; a stranger there does not."""
    there = places(switch, 3)
    at = [p.reached() for p in there]
    listens = [LISTEN.format(p.address) for p in there]
    founder = mesh.node("founder", listen=listens[0], **at[0]).wait_started()
    guest = mesh.node("guest", "--join", founder.invite(), listen=listens[1], **at[1])
    guest.wait_started()
    for node in (founder, guest):
        assert node.terminate() == 0
    # What the disk knows of peers goes; the token is spent and names an address nobody has.
    for file in (guest.data_dir / "peers").glob("*"):
        file.unlink()
    membership = next((guest.data_dir / "meshes").glob("*.json"))
    membership.write_text(membership.read_text().replace(there[0].address, "10.99.0.77"))

    moved = LISTEN.format(there[0].address).replace("9338", "9400")
    founder = mesh.node("founder-2", data_dir=founder.data_dir, listen=moved, mdns=True, **at[0])
    guest = mesh.node("guest-2", data_dir=guest.data_dir, listen=listens[1], mdns=True, **at[1])
    stranger = mesh.node("stranger", listen=listens[2], mdns=True, **at[2])
    for node in (founder, guest, stranger):
        node.wait_started()
    figure("found by mDNS, s", wait_all_see([founder, guest]))
    assert stranger.peer_id not in founder.peers() | guest.peers()
    assert not stranger.peers()
