"""Streams over real sockets: nothing lost, nothing unbounded, ends told apart."""

from __future__ import annotations

import hashlib
import os
import random
import resource
from dataclasses import replace

import pytest
import trio
import trio.testing
from quic_pair import CONFIG, Relay, pair, read_all, small_windows

from meshnode.transport.quic.errors import (
    ConnectionLost,
    StreamClosed,
    StreamLimitReached,
    StreamReset,
)
from meshnode.transport.quic.session import Stream

HANG_S = 30


async def test_twenty_concurrent_streams_arrive_intact() -> None:
    bodies = [random.Random(seed).randbytes(300_000 + seed) for seed in range(20)]
    async with pair() as ends:

        async def answer_with_hash(stream: Stream) -> None:
            await stream.write(hashlib.sha256(await read_all(stream)).digest())
            stream.finish()

        async def serve() -> None:
            async with trio.open_nursery() as handlers:
                for _ in bodies:
                    handlers.start_soon(answer_with_hash, await ends.accepted.accept_stream())

        async def send(body: bytes) -> None:
            stream = await ends.dialed.open_stream()
            await stream.write(body)
            stream.finish()
            assert await read_all(stream) == hashlib.sha256(body).digest()

        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                for body in bodies:
                    nursery.start_soon(send, body)


async def test_a_thousand_bodies_end_with_their_last_byte() -> None:
    sizes = [random.Random(1).choice((1, 100, 1_500, 5_000)) + n for n in range(1000)]
    async with pair() as ends:

        async def serve() -> None:
            for size in sizes:
                stream = await ends.accepted.accept_stream()
                assert await read_all(stream) == b"?"
                await stream.write(b"x" * size)
                stream.finish()

        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                for size in sizes:
                    stream = await ends.dialed.open_stream()
                    await stream.write(b"?")
                    stream.finish()
                    assert len(await read_all(stream, 1 + size // 2)) == size
            # The last FINs are acknowledged a moment later.
            while ends.dialed.core.streams or ends.accepted.core.streams:
                await trio.sleep(0.001)
            assert not ends.dialed.core.engine._streams


async def test_thousands_of_short_streams_do_not_grow_memory() -> None:
    async with pair(replace(CONFIG, streams_max=16)) as ends:

        async def serve(count: int) -> None:
            for _ in range(count):
                stream = await ends.accepted.accept_stream()
                await stream.read(1)
                stream.close()

        async def churn(count: int) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, count)
                for _ in range(count):
                    stream = await ends.dialed.open_stream()
                    await stream.write(b"x")
                    stream.close()

        with trio.fail_after(HANG_S):
            await churn(300)
            before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            await churn(2000)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 4_000
            assert len(ends.dialed.core.engine._streams) <= 16


async def test_loss_reordering_and_slow_reader_keep_every_byte() -> None:
    body = os.urandom(1_500_000)
    async with pair(via=lambda address: Relay(address, loss=0.03)) as ends:
        near, far = await ends.stream()
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await near.write(body)
                    near.finish()

                nursery.start_soon(send)
                received = bytearray()
                while piece := await far.read(64 * 1024):
                    received += piece
                    await trio.sleep(0.005)
        assert hashlib.sha256(received).digest() == hashlib.sha256(body).digest()


async def test_paused_reader_blocks_the_writer_and_loses_nothing() -> None:
    config = small_windows()
    body = random.Random(2).randbytes(1_000_000)
    async with pair(config) as ends:
        near, far = await ends.stream()
        written = trio.Event()

        async def send() -> None:
            await near.write(body)
            near.finish()
            written.set()

        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while far.core.buffered_bytes < config.stream_window_bytes - 1:
                    await trio.sleep(0.001)
                await trio.testing.wait_all_tasks_blocked(0.02)
                assert not written.is_set()
                assert far.core.buffered_bytes <= config.stream_window_bytes
                assert await read_all(far) == body


async def test_stalled_streams_do_not_starve_others() -> None:
    config = small_windows()
    async with pair(config) as ends:
        stalled = [await ends.stream() for _ in range(6)]
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                for near, _ in stalled:
                    nursery.start_soon(near.write, bytes(1_000_000))
                for _, far in stalled:
                    while far.core.buffered_bytes < config.stream_window_bytes - 1:
                        await trio.sleep(0.001)
                near, far = await ends.stream()

                async def send() -> None:
                    await near.write(bytes(500_000))
                    near.finish()

                nursery.start_soon(send)
                assert len(await read_all(far)) == 500_000
                nursery.cancel_scope.cancel()


async def test_never_reading_peer_bounds_memory_on_both_sides() -> None:
    config = small_windows()
    async with pair(config) as ends:
        near, far = await ends.stream()
        with trio.fail_after(HANG_S):
            with trio.move_on_after(1.0):
                while True:
                    await near.write(bytes(100_000))
            assert far.core.buffered_bytes <= config.stream_window_bytes
            sender = near.core._engine_stream.sender
            assert sender._buffer_stop - sender._buffer_start <= config.stream_send_bytes_max
            # The write was cancelled with part of its data queued: a torn message is reset.
            with pytest.raises(StreamReset):
                await read_all(far)


async def test_many_abandoned_streams_give_their_window_back() -> None:
    """Data nobody read must not use up the connection's window for ever."""
    config = small_windows()
    async with pair(config) as ends:
        with trio.fail_after(HANG_S):
            for _ in range(40):  # 40 x 64 KiB is five connection windows
                near, far = await ends.stream()
                await near.write(bytes(config.stream_window_bytes - 1))
                while far.core.buffered_bytes < config.stream_window_bytes - 1:
                    await trio.sleep(0.001)
                far.reset()
            for _ in range(40):
                near, far = await ends.stream()
                await near.write(bytes(config.stream_window_bytes - 1))
                near.reset()
            near, far = await ends.stream()
            await near.write(b"still open")
            assert await far.read(100) == b"still open"


async def test_half_close_then_answer() -> None:
    async with pair() as ends:
        near, far = await ends.stream()
        near.finish()
        with trio.fail_after(HANG_S):
            assert await far.read(10) == b""
            assert await far.read(10) == b""  # the end stays the end
            await far.write(b"answer")
            far.finish()
            assert await read_all(near) == b"answer"
            with pytest.raises(StreamClosed):
                await near.write(b"more")


async def test_reset_is_not_an_end() -> None:
    async with pair() as ends:
        near, far = await ends.stream()
        await near.write(b"half a mess")
        with trio.fail_after(HANG_S):
            assert await far.read(100) == b"half a mess"
            async with trio.open_nursery() as nursery:

                async def blocked_read() -> None:
                    with pytest.raises(StreamReset):
                        await far.read(100)

                nursery.start_soon(blocked_read)
                await trio.testing.wait_all_tasks_blocked()
                near.reset()
            with pytest.raises(StreamReset):
                await far.write(b"too late")


async def test_stop_sending_fails_a_blocked_writer() -> None:
    async with pair(small_windows()) as ends:
        near, far = await ends.stream()
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:

                async def blocked_write() -> None:
                    with pytest.raises(StreamReset):
                        await near.write(bytes(1_000_000))

                nursery.start_soon(blocked_write)
                while far.core.buffered_bytes == 0:
                    await trio.sleep(0.001)
                far.close()


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_local_close_wakes_a_blocked_read(how: str) -> None:
    async with pair() as ends:
        near, _ = await ends.stream()
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:

                async def blocked_read() -> None:
                    with pytest.raises(StreamClosed):
                        await near.read(1)

                nursery.start_soon(blocked_read)
                await trio.testing.wait_all_tasks_blocked()
                getattr(near, how)()


async def test_cancelled_read_loses_nothing() -> None:
    async with pair() as ends:
        near, far = await ends.stream()
        with trio.fail_after(HANG_S):
            with trio.move_on_after(0.01) as scope:
                await far.read(10)
            assert scope.cancelled_caught
            await near.write(b"after")
            assert await far.read(10) == b"after"


async def test_write_cancelled_before_its_first_byte_changes_nothing() -> None:
    config = small_windows()
    async with pair(config) as ends:
        near, far = await ends.stream()
        with trio.fail_after(HANG_S):
            filled_bytes = config.stream_window_bytes - 1 + config.stream_send_bytes_max
            await near.write(bytes(filled_bytes))
            with trio.move_on_after(0.05) as scope:
                await near.write(b"never queued")
            assert scope.cancelled_caught
            near.finish()
            assert await read_all(far) == bytes(filled_bytes)


async def test_opening_beyond_the_limit_waits_for_a_free_one() -> None:
    async with pair(replace(CONFIG, streams_max=4, open_stream_s_max=5.0)) as ends:
        opened = [await ends.stream() for _ in range(4)]
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                fifth = []

                async def open_fifth() -> None:
                    fifth.append(await ends.dialed.open_stream())

                nursery.start_soon(open_fifth)
                await trio.testing.wait_all_tasks_blocked()
                assert not fifth
                near, far = opened[0]
                near.close()
                far.close()
            assert len(fifth) == 1


async def test_opening_beyond_the_limit_gives_up_in_time() -> None:
    async with pair(replace(CONFIG, streams_max=2, open_stream_s_max=0.05)) as ends:
        kept = [await ends.stream() for _ in range(2)]
        with trio.fail_after(HANG_S), pytest.raises(StreamLimitReached):
            await ends.dialed.open_stream()
        near, far = kept[0]
        await near.write(b"alive")
        assert await far.read(5) == b"alive"


async def test_streams_opened_together_may_write_in_any_order() -> None:
    async with pair() as ends:
        opened = [await ends.dialed.open_stream() for _ in range(200)]
        with trio.fail_after(HANG_S):
            for stream in reversed(opened):
                await stream.write(b"%d" % stream.stream_id)
                stream.finish()
            seen = set()
            for _ in opened:
                accepted = await ends.accepted.accept_stream()
                seen.add(int(await read_all(accepted)))
        assert seen == {stream.stream_id for stream in opened}


async def test_connection_close_delivers_what_was_read_and_fails_the_rest() -> None:
    async with pair() as ends:
        near, far = await ends.stream()
        done_near, done_far = await ends.stream()
        await near.write(b"tail")
        await done_near.write(b"whole")
        done_near.finish()
        with trio.fail_after(HANG_S):
            while done_far.core.buffered_bytes < 5 or not done_far.core._finished:
                await trio.sleep(0.001)
            ends.dialed.close()
            lost = await ends.accepted.wait_closed()
            assert lost.by_remote
            assert await far.read(100) == b"tail"
            with pytest.raises(ConnectionLost):
                await far.read(100)
            assert await read_all(done_far) == b"whole"
            with pytest.raises(ConnectionLost):
                await far.write(b"x")
            with pytest.raises(ConnectionLost):
                await ends.accepted.open_stream()


async def test_what_streams_write_in_one_scheduler_pass_shares_a_datagram() -> None:
    async with pair() as ends:
        with trio.fail_after(HANG_S):
            streams = [await ends.stream() for _ in range(16)]
            go = trio.Event()

            async def write_a_token(stream: Stream) -> None:
                await go.wait()
                await stream.write(b"token")

            async with trio.open_nursery() as nursery:
                for near, _ in streams:
                    nursery.start_soon(write_a_token, near)
                await trio.testing.wait_all_tasks_blocked(0.05)
                sent_before = ends.dialer.statistics().datagrams_sent
                go.set()
            for _, far in streams:
                assert await far.read(100) == b"token"
            # The first leaves at once, the others together; one more may be an acknowledgement.
            assert 2 <= ends.dialer.statistics().datagrams_sent - sent_before <= 3
