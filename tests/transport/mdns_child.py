"""Run inside a network namespace by test_mdns.py: announces, listens, prints what was found."""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from contextlib import AsyncExitStack

import trio
from zeroconf import IPVersion, ServiceInfo, Zeroconf

from meshnode.identity import KeyPair, PeerId
from meshnode.transport import mdns

MESH, OTHER_MESH = "a" * 32, "b" * 32


def key(name: str) -> KeyPair:
    return KeyPair.from_seed(name.encode().ljust(32, b"."))


def announce_a_lie(address: str) -> Zeroconf:
    """Somebody on the LAN who knows our tag and announces what is no peer id."""
    honest = mdns._service_info(mdns._tag(MESH), PeerId("not/a peer id"), (address,))
    properties = {key: value for key, value in honest.properties.items() if value is not None}
    lie = ServiceInfo(
        mdns._SERVICE, f"liar.{mdns._SERVICE}", port=1, properties=properties, server="liar.local."
    )
    zeroconf = Zeroconf(ip_version=IPVersion.V4Only)
    zeroconf.register_service(lie)
    return zeroconf


async def main(wanted: int) -> None:
    """Announce until `wanted` peers were found; with 0, for a second."""
    found: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    async with AsyncExitStack() as stack:
        with trio.move_on_after(20.0 if wanted else 1.0):
            if wanted:
                liar = await trio.to_thread.run_sync(
                    announce_a_lie, "/ip4/10.77.0.1/udp/666/quic-v1"
                )
                stack.callback(liar.close)
            for place, (name, mesh) in enumerate(
                (("ada", MESH), ("bob", MESH), ("eve", OTHER_MESH)), start=1
            ):
                address = f"/ip4/10.77.0.1/udp/{place}/quic-v1"

                def note(peer: PeerId, addrs: tuple[str, ...], name: str = name) -> None:
                    found[name][peer] = addrs

                await stack.enter_async_context(
                    mdns.announced(mesh, key(name).peer_id, (address,), note)
                )
            while sum(map(len, found.values())) < wanted or not wanted:
                await trio.sleep(0.05)
            await trio.sleep(1.0)  # and a moment for what must not come
    print(json.dumps(found))


logging.basicConfig(format="%(levelname)s %(message)s")
trio.run(main, int(sys.argv[1]))
