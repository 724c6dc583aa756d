"""Connections and streams as Trio tasks see them.

Decides: who waits for what, and what a cancelled wait leaves behind.
Does not know: sockets (it calls `flush`, given by the endpoint), aioquic, libp2p.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshnode.transport.quic.connection import Address, ConnectionCore, StreamCore
from meshnode.transport.quic.errors import ConnectionLost, StreamLimitReached


class Connection:
    """One QUIC connection: open and accept streams, wait for its end."""

    def __init__(self, core: ConnectionCore, flush: Callable[[Connection], None]) -> None:
        self.core = core
        self._flush = flush
        self._established = trio.Event()
        self._closed = trio.Event()
        self._streams_waiting = trio.Event()  # replaced by each waiting `accept_stream`
        self._may_open = trio.Event()  # replaced by each waiting `open_stream`
        self._blocked_writers: set[StreamCore] = set()
        self._is_corked = False  # a writer has just sent, and will send once more
        self._is_more_written = False

    @property
    def remote(self) -> Address:
        """The peer's current address; it changes when a NAT rebinds."""
        return self.core.engine.get_peer_address() or self.core.remote

    @property
    def is_closed(self) -> bool:
        return self.core.lost is not None

    async def wait_established(self) -> None:
        """Return once the peer has proved its id.

        Raises:
            ConnectionLost: the handshake failed or timed out.
        """
        await self._established.wait()
        if self.core.lost is not None and not self.core.is_established:
            raise self.core.lost

    async def wait_closed(self) -> ConnectionLost:
        """Return why the connection ended, once it has."""
        await self._closed.wait()
        assert self.core.lost is not None
        return self.core.lost

    async def open_stream(self) -> Stream:
        """A new stream; the peer hears of it with the first bytes written.

        Raises:
            StreamLimitReached: the peer granted none for `open_stream_s_max`.
            ConnectionLost: the connection has ended.
        """
        await trio.lowlevel.checkpoint()
        if not self.core.can_open_stream():
            with trio.move_on_after(self.core.config.open_stream_s_max):
                while not self.core.can_open_stream():
                    if self._may_open.is_set():
                        self._may_open = trio.Event()
                    await self._may_open.wait()
            if not self.core.can_open_stream():
                raise StreamLimitReached("the peer grants no more streams")
        return Stream(self, self.core.open_stream())

    async def accept_stream(self) -> Stream:
        """The next stream the peer has opened.

        Raises:
            ConnectionLost: the connection has ended and no stream is left.
        """
        await trio.lowlevel.checkpoint()
        while not self.core.unaccepted:
            if self.core.lost is not None:
                raise self.core.lost
            if self._streams_waiting.is_set():
                self._streams_waiting = trio.Event()
            await self._streams_waiting.wait()
        return Stream(self, self.core.unaccepted.popleft())

    def close(self, reason: str = "") -> None:
        """Tell the peer and end; unsent stream data is dropped.  Safe to call twice."""
        if self.core.lost is None:
            self.core.close(reason=reason)
            self.flush()

    def flush(self) -> None:
        """Send what is ready, then `wake`."""
        self._flush(self)

    async def send_written(self) -> None:
        """Send what was written, at once if it is alone.

        The first writer of a scheduler pass sends at once.  What others write in the same
        pass, as the streams of a batching engine do, leaves together after it.
        """
        if self._is_corked:
            self._is_more_written = True
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        self.flush()
        self._is_corked = True
        await trio.lowlevel.cancel_shielded_checkpoint()
        self._is_corked = False
        if self._is_more_written:
            self._is_more_written = False
            self.flush()

    def wake(self) -> None:
        """Called by the endpoint after every exchange with the core."""
        core = self.core
        core.forget_finished_streams()
        if core.unaccepted:
            self._streams_waiting.set()
        if self._blocked_writers:
            for stream in list(self._blocked_writers):
                stream.on_progress()
        if not self._may_open.is_set() and core.can_open_stream():
            self._may_open.set()
        if core.is_established:
            self._established.set()
        if core.lost is not None and not self._closed.is_set():
            self._established.set()
            self._may_open.set()
            self._streams_waiting.set()
            self._closed.set()

    async def wait_for_room(self, stream: StreamCore) -> None:
        """Block until `stream` takes bytes (or its `room` raises)."""
        while stream.room() == 0:
            changed = trio.Event()
            stream.wake_writer = changed.set
            self._blocked_writers.add(stream)
            try:
                await changed.wait()
            finally:
                stream.wake_writer = None
                self._blocked_writers.discard(stream)


class Stream:
    """A bidirectional byte stream.  Readers take turns, and so do writers."""

    def __init__(self, connection: Connection, core: StreamCore) -> None:
        self.connection = connection
        self.core = core
        self._reading = trio.Lock()
        self._writing = trio.Lock()

    @property
    def stream_id(self) -> int:
        return self.core.stream_id

    async def read(self, bytes_max: int) -> bytes:
        """1 to `bytes_max` bytes, or b"" at the end of the stream.  Cancelling loses nothing.

        Raises:
            StreamReset: the peer abandoned the stream.
            StreamClosed: this side closed or reset it, perhaps during the wait.
            ConnectionLost: the connection ended before the stream did.
        """
        await _acquire(self._reading)
        try:
            data = self.core.take(bytes_max)
            if data is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
            while data is None:
                changed = trio.Event()
                self.core.wake_reader = changed.set
                try:
                    await changed.wait()
                finally:
                    self.core.wake_reader = None
                data = self.core.take(bytes_max)
            if self.connection.core.engine.has_windows_to_announce:
                self.connection.flush()
            return data
        finally:
            self._reading.release()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue all of `data`, blocking while too much is unacknowledged.

        Cancelled before the first byte was queued, it leaves the stream as it was; later,
        it resets the stream, so that a torn message never looks like a whole one.

        Raises:
            StreamReset: the peer stopped reading.
            StreamClosed: this side has ended its writing.
            ConnectionLost: the connection has ended.
        """
        await _acquire(self._writing)
        rest = memoryview(data)
        try:
            while True:
                room = self.core.room()
                if room == 0 and rest:
                    await self.connection.wait_for_room(self.core)
                    continue
                self.core.put(rest[:room])
                rest = rest[room:]
                await self.connection.send_written()
                if not rest:
                    return
        except trio.Cancelled:
            if len(rest) < len(data):
                self.reset()
            raise
        finally:
            self._writing.release()

    def finish(self) -> None:
        """End the sending side after everything written: the peer reads the end."""
        self.core.finish()
        self.connection.flush()

    def reset(self) -> None:
        """Abandon both sides; the peer's reads and writes fail at once."""
        self.core.reset()
        self.connection.flush()

    def close(self) -> None:
        """Finish sending and read no more."""
        self.core.finish()
        self.core.stop()
        self.connection.flush()


async def _acquire(lock: trio.Lock) -> None:
    """As `lock.acquire`, without a scheduler pass if the lock is free."""
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
