"""Bring a model's file, or ranges of it, from peers that have it.

Decides whom to ask and when to give up. First the size is proven, which a peer only claims, then
leaves come in batches: each is proven before it is written, so that a liar costs one batch, and the
connection to it. Whatever else goes wrong with a peer, the next one goes on where it stopped.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from meshnode.errors import FetchError, PeerUnreachableError, RemoteProtocolError
from meshnode.identity import PeerId
from meshnode.messages import LeavesFollow, NoLeaves, WantLeaves, decode, encode, reason_of
from meshnode.models.digest import HASH_BYTES, LEAF_BYTES, corners, leaf_count, verify_range
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame
from meshnode.weights.partial import PartialFile, Range
from meshnode.weights.shelf import IDLE_S, WEIGHTS_PROTOCOL, end

__all__ = ["Fetch", "Peers", "Progress"]

logger = logging.getLogger(__name__)

ANSWER_BYTES_MAX = 64 * (HASH_BYTES + 2) + 256
"""A `LeavesFollow` with as many hashes as it may have, or a reason why not."""
PASSES_MAX = 3
"""In vain over all peers, one after the other; whoever brings a leaf starts the count anew."""
PAUSE_S = 2.0
"""Before the next pass: a peer that is busy or has just gone may be back."""
SHOWN_MAX = 4
"""Peers whose reasons an error tells."""

Progress = Callable[[int, int], None]
"""Bytes that are there, of those that are wanted."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Whom to ask: `having` a model, the best first, by digest; `drop` ends the connection to a
    peer that sends what no honest one would."""

    having: Callable[[str], Sequence[PeerId]]
    open_stream: Callable[[PeerId, str], Awaitable[Stream]]
    drop: Callable[[PeerId], Awaitable[None]]


class Fetch:
    """The file of one model, at `path`: as much of it as was ever asked for."""

    def __init__(self, model: str, path: Path, peers: Peers) -> None:
        """`model` is a digest. What an earlier run has left at `path` is made use of."""
        self._model = model
        self._path = path
        self._peers = peers
        self._liars: set[str] = set()
        self._lock = trio.Lock()
        self._has_looked = False
        self._file: PartialFile | None = None

    async def bring(
        self, ranges: Sequence[Range] | None = None, progress: Progress = lambda done, of: None
    ) -> PartialFile:
        """Until these bytes, or all, are in the file: its leaves, and those that prove its size.

        Raises `FetchError` if nobody gives them, or the disk does not take them.
        """
        async with self._lock:
            try:
                return await self._bring(ranges, progress)
            except OSError as error:
                raise FetchError(f"{self._path} cannot be written: {error.strerror}") from error

    async def _bring(self, ranges: Sequence[Range] | None, progress: Progress) -> PartialFile:
        if not self._has_looked:
            self._file = await trio.to_thread.run_sync(
                PartialFile.reopen, self._path, trio.from_thread.check_cancelled
            )
            self._has_looked = True
        if self._file is not None and not self._missing(self._file, ranges):
            return self._file
        reasons: dict[str, str] = {}
        in_vain = 0
        while in_vain < PASSES_MAX:
            in_vain += 1
            candidates = [p for p in self._peers.having(self._model) if p not in self._liars]
            if not candidates:
                break
            for peer in candidates:
                before = 0 if self._file is None else self._file.held_bytes
                try:
                    return await self._from(peer, ranges, progress)
                except _NotGivenError as error:
                    reasons[peer] = str(error)
                except (trio.TooSlowError, trio.BrokenResourceError, PeerUnreachableError) as error:
                    reasons[peer] = reason_of(error) or "no answer"
                except RemoteProtocolError as error:
                    reasons[peer] = reason_of(error)
                    logger.warning("weights: %s sent what it must not: %s", peer, error)
                    self._liars.add(peer)
                    await self._peers.drop(peer)
                if self._file is not None and self._file.held_bytes > before:
                    in_vain = 0
            if not self._liars.issuperset(candidates):
                await trio.sleep(PAUSE_S)
        raise FetchError(_nobody(self._model, reasons))

    async def _from(
        self, peer: PeerId, ranges: Sequence[Range] | None, progress: Progress
    ) -> PartialFile:
        """All that is missing, from one peer."""
        with trio.fail_after(IDLE_S):
            stream = await self._peers.open_stream(peer, WEIGHTS_PROTOCOL)
        try:
            if self._file is None:
                self._file = await self._prove_size(stream)
            await self._bring_from(stream, self._file, ranges, progress)
            await stream.send_eof()
            return self._file
        finally:
            await end(stream)

    async def _bring_from(
        self,
        stream: Stream,
        file: PartialFile,
        ranges: Sequence[Range] | None,
        progress: Progress,
    ) -> None:
        missing = self._missing(file, ranges)
        left_bytes = _bytes_of(file, missing)
        free_bytes = shutil.disk_usage(file.path.parent).free
        if left_bytes > free_bytes:
            raise FetchError(
                f"{left_bytes >> 20} MiB are to be written to {file.path.parent}, where "
                f"{free_bytes >> 20} MiB are free"
            )
        wanted_bytes = sum(map(file.leaf_bytes, _wanted(file, ranges)))
        progress(wanted_bytes - left_bytes, wanted_bytes)
        # One request is always under way while the answer to the one before it is read.
        for batch in missing[:1]:
            await self._ask(stream, batch)
        for at, batch in enumerate(missing):
            for following in missing[at + 1 : at + 2]:
                await self._ask(stream, following)
            await self._take(stream, file, batch)
            left_bytes -= _bytes_of(file, [batch])
            progress(wanted_bytes - left_bytes, wanted_bytes)

    async def _prove_size(self, stream: Stream) -> PartialFile:
        """A new file of the size that this peer claims, with the leaves that prove it.

        The first leaf proves it but for a factor of two: so much the claim may take up here.
        """
        await self._ask(stream, (0, 1))
        size_bytes, proof = await _answer(stream)
        leaves = await _leaves(stream, 0, [min(size_bytes, LEAF_BYTES)])
        self._check(leaf_count(size_bytes), 0, leaves, proof)
        file = await trio.to_thread.run_sync(PartialFile, self._path, size_bytes)
        try:
            file.write(0, leaves)
            for batch in file.batches(corners(file.leaf_count)):
                await self._ask(stream, batch)
                await self._take(stream, file, batch)
        except BaseException:
            file.remove()
            raise
        return file

    @staticmethod
    def _missing(file: PartialFile, ranges: Sequence[Range] | None) -> list[tuple[int, int]]:
        return file.batches(_wanted(file, ranges))

    async def _ask(self, stream: Stream, batch: tuple[int, int]) -> None:
        with trio.fail_after(IDLE_S):
            await send_frame(stream, encode(WantLeaves(self._model, *batch)))

    async def _take(self, stream: Stream, file: PartialFile, batch: tuple[int, int]) -> None:
        size_bytes, proof = await _answer(stream)
        if size_bytes != file.size_bytes:
            raise RemoteProtocolError(f"{size_bytes} bytes, where the file has {file.size_bytes}")
        first, count = batch
        lengths = [file.leaf_bytes(number) for number in range(first, first + count)]
        leaves = await _leaves(stream, first, lengths)
        await trio.to_thread.run_sync(self._put, file, first, leaves, proof)

    def _put(self, file: PartialFile, first: int, leaves: list[bytes], proof: list[bytes]) -> None:
        self._check(file.leaf_count, first, leaves, proof)
        file.write(first, leaves)

    def _check(self, count: int, first: int, leaves: list[bytes], proof: list[bytes]) -> None:
        if not verify_range(bytes.fromhex(self._model), count, first, leaves, proof):
            raise RemoteProtocolError("leaves that the model's digest does not prove")


class _NotGivenError(Exception):
    """The peer says that it does not give what was asked for, and why."""


async def _answer(stream: Stream) -> tuple[int, list[bytes]]:
    """Size and proof; the leaves follow."""
    with trio.fail_after(IDLE_S):
        frame = await receive_frame(stream, ANSWER_BYTES_MAX)
    if frame is None:
        raise _NotGivenError("it closed the stream")
    answer: LeavesFollow | NoLeaves = decode(frame, LeavesFollow | NoLeaves)  # type: ignore[arg-type]
    if isinstance(answer, NoLeaves):
        raise _NotGivenError(answer.reason)
    return answer.size_bytes, list(answer.proof)


async def _leaves(stream: Stream, first: int, lengths: list[int]) -> list[bytes]:
    """A batch, which is in memory until it is proven and written."""
    leaves: list[bytes] = []
    for number, expected_bytes in enumerate(lengths, first):
        with trio.fail_after(IDLE_S):
            leaf = await receive_frame(stream, expected_bytes)
        if leaf is None or len(leaf) != expected_bytes:
            raise RemoteProtocolError(f"leaf {number} is not {expected_bytes} bytes long")
        leaves.append(leaf)
    return leaves


def _wanted(file: PartialFile, ranges: Sequence[Range] | None) -> set[int]:
    return file.leaves_of([(0, file.size_bytes)] if ranges is None else ranges)


def _bytes_of(file: PartialFile, batches: Iterable[tuple[int, int]]) -> int:
    return sum(
        file.leaf_bytes(number)
        for first, count in batches
        for number in range(first, first + count)
    )


def _nobody(model: str, reasons: dict[str, str]) -> str:
    if not reasons:
        return f"no node that is here has the file of model {model[:12]}…"
    told = "; ".join(f"…{peer[-8:]}: {why}" for peer, why in list(reasons.items())[:SHOWN_MAX])
    return f"no node gives the file of model {model[:12]}… ({told})"
