"""What a node costs that has nothing to do."""

from __future__ import annotations

import trio

from meshnode.protocol.stack import SetOffers
from tests.driver.nodes import running

WATCHED_S = 1.0
# Heartbeats, retries and adverts of a lone node are seconds apart; a loop that spins ticks
# thousands of times.
TICKS_MAX = 20


async def test_an_idle_driver_sleeps_until_its_next_deadline() -> None:
    async with running() as node:
        ticks = 0
        tick = node.stack.tick

        def counted(now: float) -> list[object]:
            nonlocal ticks
            ticks += 1
            return tick(now)  # type: ignore[return-value]

        node.stack.tick = counted  # type: ignore[method-assign,assignment]
        # One more event than nothing: what wakes the driver must not keep it awake.
        node.driver.submit(node.peer_id, SetOffers(()))
        with trio.move_on_after(WATCHED_S):
            await trio.sleep_forever()
        assert 1 <= ticks <= TICKS_MAX
