"""What this node gives of its model files, to members that ask.

Decides how much at once and to how many. Gives only files that this node has verified, and reads
one leaf at a time, which it checks again: a file that changes under us is not passed on.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import trio

from meshnode.errors import ModelLoadError, RemoteProtocolError
from meshnode.identity import PeerId
from meshnode.messages import (
    MODELS_MAX,
    Files,
    LeavesFollow,
    NoLeaves,
    WantFiles,
    WantLeaves,
    decode,
    encode,
)
from meshnode.models.digest import LEAF_BYTES, HashTree, leaf_hash, tree_of
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame

__all__ = ["IDLE_S", "WEIGHTS_PROTOCOL", "File", "Shelf", "end"]

logger = logging.getLogger(__name__)

WEIGHTS_PROTOCOL = "/meshnode/weights/1"
WANT_BYTES_MAX = 256
"""A `WantLeaves` takes 110."""
STREAMS_PER_PEER_MAX = 2
"""Nobody needs more than one; a second, while we have not noticed the end of the first."""
STREAMS_MAX = 16
"""Each holds a leaf in memory and a share of the line; who is turned away asks another."""
IDLE_S = 20.0
"""For one leaf or request: below 50 kB/s another peer, or a disk in the post, is faster."""
CLOSE_S = 1.0
"""What closing a stream may take if its peer does not answer any more."""


@dataclass(frozen=True, slots=True)
class File:
    """Of a model that was verified here, and what this node calls it."""

    name: str
    path: Path


class Shelf:
    """All files that this node gives; `files` are what there is, by digest."""

    def __init__(
        self,
        files: Callable[[], Mapping[str, File]],
        cache_dir: Path,
        drop: Callable[[PeerId], Awaitable[None]],
        *,
        is_open: bool,
    ) -> None:
        """`drop` ends the connection to a peer that sends what no honest one would. A shelf that
        is not open answers that it is not, so that nobody takes that for a fault."""
        self._files = files
        self._cache_dir = cache_dir
        self._drop = drop
        self._is_open = is_open
        self._trees: dict[str, HashTree] = {}
        self._lock = trio.Lock()
        self._streams: Counter[str] = Counter()

    async def serve(self, stream: Stream) -> None:
        """One stream of requests; a handler for `WEIGHTS_PROTOCOL`."""
        peer = stream.peer_id
        self._streams[peer] += 1
        is_full = self._streams[peer] > STREAMS_PER_PEER_MAX or self._streams.total() > STREAMS_MAX
        try:
            while (want := await _next_request(stream)) is not None:
                if is_full:
                    await _send(stream, encode(NoLeaves("too many ask at once")))
                    break
                if isinstance(want, WantFiles):
                    await _send(stream, encode(self._list()))
                else:
                    await self._give(stream, want)
            await stream.send_eof()
        except RemoteProtocolError as error:
            logger.warning("weights: %s sent what it must not: %s", peer, error)
            await self._drop(PeerId(peer))
        except ModelLoadError as error:
            logger.error("weights: not given to %s: %s", peer, error)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            logger.debug("weights: %s went away", peer)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
            await end(stream)

    def _list(self) -> Files:
        files = self._files() if self._is_open else {}
        listed = islice(sorted(files.items()), MODELS_MAX)
        return Files({model: file.name for model, file in listed})

    async def _give(self, stream: Stream, want: WantLeaves) -> None:
        """Raises `ModelLoadError` if the file is not any more what it was."""
        file = self._files().get(want.model) if self._is_open else None
        if file is None:
            why = "it does not have the file" if self._is_open else "it does not share its models"
            await _send(stream, encode(NoLeaves(why)))
            return
        path = file.path
        tree = await self._tree(want.model, path)
        last = want.first + want.count
        if last > len(tree.leaves):
            await _send(stream, encode(NoLeaves(f"there are {len(tree.leaves)} leaves")))
            return
        size_bytes = (await trio.Path(path).stat()).st_size
        proof = tuple(tree.range_proof(want.first, last))
        await _send(stream, encode(LeavesFollow(size_bytes, proof)))
        for number in range(want.first, last):
            leaf = await trio.to_thread.run_sync(_read_leaf, path, number, tree.leaves[number])
            await _send(stream, leaf)

    async def _tree(self, model: str, path: Path) -> HashTree:
        async with self._lock:  # a file that has to be read again is read once
            if model not in self._trees:
                self._trees[model] = await trio.to_thread.run_sync(
                    tree_of, path, model, self._cache_dir
                )
        return self._trees[model]


async def _next_request(stream: Stream) -> WantLeaves | WantFiles | None:
    with trio.fail_after(IDLE_S):
        frame = await receive_frame(stream, WANT_BYTES_MAX)
    return None if frame is None else decode(frame, WantLeaves | WantFiles)  # type: ignore[arg-type]


async def _send(stream: Stream, frame: bytes) -> None:
    with trio.fail_after(IDLE_S):
        await send_frame(stream, frame)


def _read_leaf(path: Path, number: int, expected: bytes) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            leaf = os.pread(file.fileno(), LEAF_BYTES, number * LEAF_BYTES)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
    if leaf_hash(leaf) != expected:
        raise ModelLoadError(f"{path} has changed since it was verified; start again.")
    return leaf


async def end(stream: Stream) -> None:
    """Close it, within a bound."""
    with trio.move_on_after(CLOSE_S, shield=True):
        await stream.aclose()
