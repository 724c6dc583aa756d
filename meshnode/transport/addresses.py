"""Which addresses to tell others: what we are bound to, made reachable."""

from __future__ import annotations

import ipaddress
import socket

import psutil


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
