"""Peers on the same LAN, by multicast DNS (service `_p2p._udp`, as in the libp2p mDNS spec).

Only a hint where to dial: who is a member is decided on the connection. The mesh id is told as a
short hash, so that a listener on the LAN learns that a node is here but not of which mesh.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from meshnode.errors import RemoteProtocolError
from meshnode.identity import PeerId, public_key_of

logger = logging.getLogger(__name__)

_SERVICE = "_p2p._udp.local."
LOOKUP_TIMEOUT_MS = 3000
TXT_BYTES_MAX = 255
"""A TXT string cannot be longer (RFC 1035); an address that is goes untold."""

Found = Callable[[PeerId, tuple[str, ...]], None]


@asynccontextmanager
async def announced(
    mesh_id: str, own: PeerId, addrs: tuple[str, ...], found: Found
) -> AsyncIterator[None]:
    """Announce ourselves and report others of the same mesh, while the block runs.

    `found` is called in the Trio thread. A machine without multicast, or whose name somebody on
    the LAN contests, gets a warning, no error.
    """
    tag = _tag(mesh_id)
    token = trio.lowlevel.current_trio_token()

    def on_change(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            return
        info = zeroconf.get_service_info(service_type, name, timeout=LOOKUP_TIMEOUT_MS)
        if info is None or info.properties.get(b"mesh") != tag.encode():
            return
        peer, told = _read(info)
        if peer is not None and peer != own:
            try:
                token.run_sync_soon(found, peer, told)
            except trio.RunFinishedError:
                logger.debug("found a peer after the end")

    info = _service_info(tag, own, addrs)
    try:
        zeroconf = await trio.to_thread.run_sync(_start, info)
    except (OSError, ZeroconfError) as error:
        logger.warning("no LAN discovery: %s", error)
        yield
        return
    browser = ServiceBrowser(zeroconf, _SERVICE, handlers=[on_change])
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(browser.cancel)
            await trio.to_thread.run_sync(zeroconf.close)


def _tag(mesh_id: str) -> str:
    return hashlib.sha256(f"mdns/{mesh_id}".encode()).hexdigest()[:16]


def _start(info: ServiceInfo) -> Zeroconf:
    try:
        zeroconf = Zeroconf(ip_version=IPVersion.V4Only)
    except RuntimeError as error:  # how zeroconf says that no interface has an IPv4 address
        raise OSError(str(error)) from error
    try:
        zeroconf.register_service(info)
    except ZeroconfError:
        zeroconf.close()
        raise
    return zeroconf


def _service_info(tag: str, own: PeerId, addrs: tuple[str, ...]) -> ServiceInfo:
    told = [f"{address}/p2p/{own}" for address in addrs]
    properties: dict[str, str] = {"mesh": tag}
    for place, address in enumerate(a for a in told if len(a) < TXT_BYTES_MAX - 12):
        properties[f"dnsaddr{place}"] = address
    hosts = [address.split("/")[2] for address in addrs if address.startswith("/ip4/")]
    ports = [int(a.split("/")[4]) for a in addrs if a.startswith("/ip4/")]
    return ServiceInfo(
        _SERVICE,
        f"{own[-32:]}.{_SERVICE}",
        addresses=[socket.inet_aton(host) for host in dict.fromkeys(hosts)],
        port=ports[0] if ports else 0,
        properties=properties,
        server=f"{own[-32:]}.local.",
    )


def _read(info: ServiceInfo) -> tuple[PeerId | None, tuple[str, ...]]:
    addrs: list[str] = []
    peer: PeerId | None = None
    for key, value in info.properties.items():
        if key.startswith(b"dnsaddr") and value:
            head, marker, tail = value.decode("ascii", "replace").rpartition("/p2p/")
            if marker and peer in (None, tail) and _is_peer_id(tail):
                peer = PeerId(tail)
                addrs.append(head)
    return peer, tuple(addrs)


def _is_peer_id(text: str) -> bool:
    """Anybody on the LAN may announce anything."""
    try:
        public_key_of(text)
    except RemoteProtocolError:
        return False
    return True
