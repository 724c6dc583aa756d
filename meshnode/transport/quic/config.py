"""Every number of the QUIC transport, each with its reason.

Decides: limits, waits and sizes.  Does not know: how they are enforced.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class QuicConfig:
    """Limits of one transport; sizes in bytes, waits in seconds."""

    # --- memory -------------------------------------------------------------------------
    # What a peer may send on one stream before our reader has consumed it.  1 MiB carries
    # 10 MB/s at 100 ms, more than one Python core encrypts.
    stream_window_bytes: int = 1 * MIB
    # The same for all streams of a connection together.  Eight stalled streams must not
    # starve the ninth, so it is much larger than the stream window.
    connection_window_bytes: int = 8 * MIB
    # Written but not yet acknowledged bytes a stream buffers before `write` blocks.  No
    # larger than the window: the peer would not take more anyway.
    stream_send_bytes_max: int = 1 * MIB
    # Streams a peer may have open at a time (each costs about 2 KB here).
    streams_max: int = 1024
    # Finished streams the application has not accepted yet, beyond which the peer is
    # taken for hostile and the connection closed.
    streams_unaccepted_max: int = 4096

    # --- time ---------------------------------------------------------------------------
    # Silence after which a ping is sent.
    keepalive_s: float = 0.8
    # Silence after which the peer is dead.  A killed machine shall be noticed within 3 s,
    # while a peer whose event loop stalled for 2 s right after its last ping is kept.
    silence_s_max: float = 2.9
    # After an ICMP "port unreachable" the peer must answer a ping within this wait (or
    # `suspicion_ptos` probe timeouts if longer).  ICMP is not authenticated, so it only
    # shortens the wait; half a second is more than a busy but living process needs.
    suspicion_s: float = 0.5
    suspicion_ptos: int = 4
    # From the first packet to a verified peer; covers 3 lost packets on a 300 ms path.
    handshake_s_max: float = 8.0
    # How long `open_stream` waits for the peer to grant a new stream.
    open_stream_s_max: float = 10.0

    # --- strangers ------------------------------------------------------------------------
    # Handshakes in progress (about 60 KB and 5 ms of CPU each): in all, and per source IP.
    half_open_max: int = 256
    half_open_per_source_max: int = 32
    # Connections in all, and per source IP (a household or campus behind one NAT).
    connections_max: int = 1024
    connections_per_source_max: int = 256

    # --- packets ----------------------------------------------------------------------------
    # Largest UDP payloads to probe for, in order, once the handshake is over.  1452 fits
    # Ethernet with IPv6 and UDP headers (RFC 9000 section 14).
    datagram_bytes: tuple[int, ...] = (1452,)
    # The loopback MTU is 65,536; 16,000 is the most aioquic's 14-bit frame length allows.
    datagram_bytes_loopback: tuple[int, ...] = (16_000, 1452)
    # Kernel buffers asked for; the kernel may grant less (net.core.rmem_max).
    socket_buffer_bytes: int = 4 * MIB
