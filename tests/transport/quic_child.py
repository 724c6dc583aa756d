"""A peer in a process of its own, so that it can be killed: echoes every stream.

Prints its port and peer id (hex), then serves until it dies.
"""

from __future__ import annotations

import trio
from quic_pair import endpoint

from meshnode.transport.quic.session import Connection, Stream


async def echo(stream: Stream) -> None:
    while piece := await stream.read(65_536):
        await stream.write(piece)
    stream.finish()


async def serve(connection: Connection) -> None:
    async with trio.open_nursery() as nursery:
        while True:
            nursery.start_soon(echo, await connection.accept_stream())


async def main() -> None:
    async with endpoint() as served:
        served.accept_with(serve)
        print(served.address[1], served.peer_id.hex(), flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main)
