"""Peers that give a model's file, honestly or not, over streams in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from trio.testing import memory_stream_pair

from meshnode.console.names import find_model
from meshnode.errors import PeerUnreachableError
from meshnode.identity import KeyPair, PeerId
from meshnode.messages import WantFiles, WantLeaves, decode, encode
from meshnode.models.digest import LEAF_BYTES, digest_blocking
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame
from meshnode.weights import File, Peers, Shelf
from tests.pipeline.rings import Wire

OWN, ANN, BEA = (KeyPair.from_seed(bytes([seed]) * 32).peer_id for seed in range(1, 4))
SIZE = 10 * LEAF_BYTES + 12_345
"""Eleven leaves: the tree is neither complete nor flat."""

Handler = Callable[[Stream], Awaitable[None]]
Change = Callable[[int, bytes], bytes]
"""Of the frames of an answer, by their number: 0 says what follows, the others are leaves."""


def a_file(path: Path, size_bytes: int = SIZE, salt: int = 0) -> Path:
    """In which no two leaves are alike."""
    leaves = -(-size_bytes // LEAF_BYTES)
    data = b"".join(bytes([salt + n]) * LEAF_BYTES for n in range(1, leaves + 1))
    path.write_bytes(data[:size_bytes])
    return path


class World:
    """Peers by id and what they do with a stream, seen by one that fetches."""

    def __init__(self, nursery: trio.Nursery, folder: Path, source: Path | None = None) -> None:
        self.path = a_file(folder / "source.gguf") if source is None else source
        self.cache = folder / "cache"
        self.model = digest_blocking(self.path, self.cache)
        self.peers: dict[PeerId, Handler] = {}
        self.asked: list[tuple[PeerId, int]] = []
        """Each leaf that somebody was asked for."""
        self.dropped: list[PeerId] = []
        self._nursery = nursery
        self.given = Peers(lambda model: tuple(self.peers), self._open, self._drop)

    def shelf(self, *, is_open: bool = True) -> Shelf:
        async def drop(peer: PeerId) -> None:
            self.dropped.append(peer)

        files = {self.model: File("smol", self.path)}
        return Shelf(lambda: files, self.cache, drop, is_open=is_open)

    async def find(self, text: str) -> tuple[str, str]:
        """What a name, or a digest, means where all of these are."""
        await trio.lowlevel.checkpoint()
        return find_model(text, {self.model: "smol"}), "smol"

    def add(self, peer: PeerId, handler: Handler | None = None) -> None:
        self.peers[peer] = self.shelf().serve if handler is None else handler

    def liar(self, change: Change) -> Handler:
        """What the honest say, changed."""

        async def serve(stream: Stream) -> None:
            while (frame := await receive_frame(stream, 1024)) is not None:
                want = decode(frame, WantLeaves)
                leaf_count = -(-SIZE // LEAF_BYTES)
                if want.first + want.count > leaf_count:  # by its own lie; it must say something
                    want = WantLeaves(want.model, leaf_count - want.count, want.count)
                near, far = memory_stream_pair()
                self._nursery.start_soon(self.shelf().serve, Wire(far, OWN, "weights"))
                await send_frame(near, encode(want))
                await near.send_eof()
                for number in range(1 + want.count):
                    said = await receive_frame(near, 2 * LEAF_BYTES)
                    assert said is not None
                    await send_frame(stream, change(number, said))

        async def quietly(stream: Stream) -> None:
            try:
                await serve(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

        return quietly

    def stream_to(self, peer: PeerId) -> Wire:
        """By hand."""
        near, far = memory_stream_pair()
        self._nursery.start_soon(self.peers[peer], Wire(far, OWN, "weights"))
        return Wire(near, peer, "weights")

    async def _open(self, peer: PeerId, protocol: str) -> Stream:
        await trio.lowlevel.checkpoint()
        if peer not in self.peers:
            raise PeerUnreachableError(f"{peer} does not answer")
        return _Counted(self.stream_to(peer), self.asked)

    async def _drop(self, peer: PeerId) -> None:
        self.dropped.append(peer)


class _Counted(Wire):
    """Notes which leaves it was asked for."""

    def __init__(self, inner: Wire, asked: list[tuple[PeerId, int]]) -> None:
        super().__init__(inner._inner, inner.peer_id, inner.protocol)
        self._asked = asked

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        want = decode(bytes(data[4:]), WantLeaves | WantFiles)  # type: ignore[arg-type]
        if isinstance(want, WantLeaves):
            leaves = range(want.first, want.first + want.count)
            self._asked.extend((PeerId(self.peer_id), leaf) for leaf in leaves)
        await super().send_all(data)
