"""What can go wrong on a QUIC connection or stream, named by whose doing it was.

Decides: the exception types of this package.  Does not know: sockets, libp2p, aioquic.
"""

from __future__ import annotations


class QuicError(Exception):
    """Base of every error this package raises on purpose."""


class BadCertificate(QuicError):
    """The remote's TLS certificate does not prove a libp2p identity (remote's fault)."""


class ConnectionLost(QuicError):
    """The connection has ended; nothing more can be opened, read or written on it.

    `reason` says why in words, `by_remote` whether the remote side ended it.
    """

    def __init__(self, reason: str, *, by_remote: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.by_remote = by_remote


class StreamReset(QuicError):
    """The remote abandoned the stream (RESET_STREAM or STOP_SENDING): data may be missing."""

    def __init__(self, error_code: int) -> None:
        super().__init__(f"stream reset by the remote (code {error_code})")
        self.error_code = error_code


class StreamClosed(QuicError):
    """The stream was already finished, closed or reset on this side (caller's fault)."""


class StreamLimitReached(QuicError):
    """The remote granted no new stream within the configured wait."""
