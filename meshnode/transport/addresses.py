"""Multiaddrs between us and the sockets: which port to take, what to tell others, who is meant.

Plain text in, plain text out; only `resolved` asks anybody (the system's name service).
"""

from __future__ import annotations

import ipaddress
import socket

import psutil
import trio

RESOLVED_MAX = 4
"""Addresses tried of one DNS name; a bootstrap peer with more is still reached by these."""


def advertised(bound: tuple[str, ...]) -> tuple[str, ...]:
    """Bound multiaddrs with `0.0.0.0` and `::` replaced by this machine's own addresses.

    Loopback is only told when there is nothing else: elsewhere it means another machine.
    """
    found: list[str] = []
    for address in bound:
        _, family, host, *rest = address.split("/")
        hosts = _own_hosts(family) if ipaddress.ip_address(host).is_unspecified else [host]
        found.extend("/".join(["", family, own, *rest]) for own in hosts)
    return tuple(dict.fromkeys(found))


def _own_hosts(family: str) -> list[str]:
    wanted = socket.AF_INET if family == "ip4" else socket.AF_INET6
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    addresses = [
        ipaddress.ip_address(entry.address.partition("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        if name in up
        for entry in entries
        if entry.family == wanted
    ]
    # A link-local address is of no use without its zone, which a multiaddr does not carry here.
    routable = [str(each) for each in addresses if not each.is_loopback and not each.is_link_local]
    return routable or [str(each) for each in addresses if each.is_loopback]


def with_free_ports(listen: tuple[str, ...]) -> tuple[str, ...]:
    """`listen` with port 0 wherever the port is taken: for defaults, which nobody insists on."""
    return tuple(address if _is_free(address) else _with_port(address, 0) for address in listen)


async def resolved(address: str) -> tuple[str, ...]:
    """A multiaddr with a DNS name as those with its IP addresses; any other as it is.

    A name that does not resolve, or that cannot be one, gives none.
    """
    families = {"dns": 0, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}
    parts = address.split("/")
    if len(parts) < 3 or parts[1] not in families:
        return (address,)
    _, kind, name, *rest = parts
    try:
        found = await trio.socket.getaddrinfo(
            name, None, family=families[kind], type=socket.SOCK_DGRAM
        )
    except (OSError, UnicodeError):  # Unicode: the name has an empty or too long label
        return ()
    hosts = dict.fromkeys((entry[0], str(entry[4][0])) for entry in found)
    return tuple(
        "/".join(["", "ip4" if family == socket.AF_INET else "ip6", host, *rest])
        for family, host in list(hosts)[:RESOLVED_MAX]
    )


def _is_free(address: str) -> bool:
    _, family, host, protocol, port, *_ = address.split("/")
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET if family == "ip4" else socket.AF_INET6, kind) as probe:
        if protocol == "tcp":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True


def _with_port(address: str, port: int) -> str:
    head, family, host, protocol, _, *rest = address.split("/")
    return "/".join([head, family, host, protocol, str(port), *rest])
