"""Links are measured between real hosts."""

from __future__ import annotations

import trio

from meshnode.links import LINK_PROTOCOL, PROBE_BYTES, Links
from tests.driver.nodes import running, until


async def test_rtt_and_bandwidth_are_measured() -> None:
    with trio.fail_after(60):
        async with running() as ada, running() as bob:
            ada.meet(bob)
            await until(lambda: bob.peer_id in ada.members() and ada.peer_id in bob.members())
            measuring, _ = Links(ada.host), Links(bob.host)
            await measuring._probe(bob.peer_id)
            await until(lambda: ada.host.rtt_s(bob.peer_id) is not None)
            (link,) = measuring.measured([bob.peer_id])
            assert link.peer == bob.peer_id
            assert 0 < link.rtt_us < 1_000_000
            assert link.bytes_per_s > 100_000


async def test_a_peer_that_asks_again_at_once_gets_nothing() -> None:
    with trio.fail_after(60):
        async with running() as ada, running() as bob:
            ada.meet(bob)
            await until(lambda: bob.peer_id in ada.members() and ada.peer_id in bob.members())
            Links(bob.host)
            received = []
            for _ in range(2):
                stream = await ada.host.open_stream(bob.peer_id, LINK_PROTOCOL)
                count = 0
                await stream.send_eof()
                try:
                    while chunk := await stream.receive_some(64 * 1024):
                        count += len(chunk)
                except trio.BrokenResourceError:
                    pass  # reset: that is what is looked for
                received.append(count)
                await stream.aclose()
            assert received == [PROBE_BYTES, 0]
