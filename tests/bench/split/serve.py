"""python -m tests.bench.split.serve THREADS ADDRESS serve ...: `meshnode serve`, but that its
engine has so many threads, and that it says it listens at ADDRESS alone, which is a link to it."""

from __future__ import annotations

import sys

from multiaddr import Multiaddr

from meshnode.cli import main
from meshnode.transport.quic.libp2p import QuicListener
from tests.bench.engine.serve import fix_threads

if __name__ == "__main__":
    fix_threads()
    address = Multiaddr(sys.argv.pop(1))
    QuicListener.get_addrs = lambda _listener: (address,)
    main()
