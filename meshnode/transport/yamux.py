"""Yamux over TCP that notices when the peer has fallen silent.

TCP alone waits for minutes, and for ever when nothing is being sent; py-libp2p pings to measure
but never gives up. Decides when a TCP peer is dead, by the same three seconds as QUIC
(`quic/config.py`). Does not know who the peer is or what it sends.
"""

from __future__ import annotations

import logging
import struct
from typing import Any

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_PING, YAMUX_HEADER_FORMAT, Yamux

logger = logging.getLogger(__name__)

STEP_S = 0.5
"""How often we look whether something came, and ask with a ping if not."""
QUIET_STEPS_MAX = 6
"""Then the peer is dead. Steps are counted, not seconds: if it is we who stalled, it is one."""


class WatchedYamux(Yamux):
    """Pings while it is quiet, and hangs up when nothing comes back."""

    def __init__(self, secured_conn: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(secured_conn, *args, **kwargs)
        self._has_heard = False
        read = secured_conn.read

        async def heard(size: int | None = None) -> bytes:
            data: bytes = await read(size)
            self._has_heard = True
            return data

        # Every byte counts as a sign of life, also in the middle of a long frame.
        secured_conn.read = heard

    @property
    def rtt_s(self) -> float | None:
        """Smoothed round-trip time; None before the first answer."""
        return self._rtt or None

    async def _measure_rtt_loop(self) -> None:
        """Runs as long as the connection; the name is py-libp2p's."""
        async with trio.open_nursery() as nursery:
            quiet_steps = 0
            pinging = trio.CapacityLimiter(1)
            while not self.event_shutting_down.is_set():
                # The first ping goes out at once: what is measured decides where requests go.
                if quiet_steps or not self._rtt:
                    nursery.start_soon(self._ping, pinging)
                self._has_heard = False
                await trio.sleep(STEP_S)
                quiet_steps = 0 if self._has_heard else quiet_steps + 1
                if quiet_steps == QUIET_STEPS_MAX:
                    logger.debug("%s has been silent for too long", self.peer_id)
                    # Not `close`: it would wait to say goodbye.
                    await self.secured_conn.close()
                    return

    async def _ping(self, pinging: trio.CapacityLimiter) -> None:
        """One at a time; never cancelled while it is being written, which would cut a frame."""
        try:
            pinging.acquire_nowait()
        except trio.WouldBlock:
            return
        try:
            self._ping_id = (self._ping_id + 1) % 2**32
            self._ping_sent_time = trio.current_time()
            await self._write_frame(
                struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_SYN, 0, self._ping_id)
            )
        except (BaseLibp2pError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("no ping to %s: %s", self.peer_id, error)  # its reader has seen it too
        finally:
            pinging.release()
