"""HTTP to one server of another kind: the tunnel's client, on TCP or TLS instead of QUIC.

Decides how the server is reached, how long its silence is borne, and which headers go there and
come back. Does not know what requests and answers say.

A key goes to its server and nowhere else: it is in no error, log, status or `repr`, and what a
client sent as its own key is not passed on.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from urllib.parse import urlsplit

import trio

from meshnode import __version__
from meshnode.errors import PeerUnreachableError
from meshnode.gateway import VIA_HEADER, PassedAnswer
from meshnode.transport.http import HttpResponse, TunnelPool

__all__ = ["Caller", "SilentError"]

CONNECT_TIMEOUT_S = 5.0
"""TCP and TLS: three lost packets on a slow path; a server that needs longer is not there."""
IDLE_S = 600.0
"""Without a byte: some servers send nothing, not even a head, until a whole answer is computed.
OpenAI's own clients give up after ten minutes, so nobody is waiting any longer."""
KEPT_HEADERS = ("content-type", "content-encoding", "retry-after")
"""What says something about the answer. The rest is about a connection or a server that the client
does not talk to: cookies, for one, would be set for our name."""


class SilentError(PeerUnreachableError):
    """The server is there, as far as one can tell, and says nothing."""


class Caller:
    """One server: a base address, and a key for it."""

    def __init__(self, url: str, key: str | None = None, *, idle_s: float = IDLE_S) -> None:
        """`url` is http:// or https://, without `/v1` at its end (`config.split_upstream`)."""
        parts = urlsplit(url)
        self.url = url
        self._idle_s = idle_s
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        # The system's certificates, or those that SSL_CERT_FILE names.
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path
        self._headers = [
            (b"host", parts.netloc.encode("ascii")),
            (b"user-agent", f"meshnode/{__version__}".encode()),
            (b"accept-encoding", b"identity"),
        ]
        if key is not None:
            self._headers.append((b"authorization", b"Bearer " + key.encode("ascii")))
        self._pool = TunnelPool(self._open)

    @asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        via: tuple[str, ...] = (),
        idle_s: float | None = None,
    ) -> AsyncIterator[PassedAnswer]:
        """One request, from the moment that the head of its answer is here.

        Leaving early closes the connection at once. `idle_s` is how long the head, and then each
        piece of the body, may take; None for as long as any request. Raises
        `PeerUnreachableError`, also from the body, if the server is not there or falls silent,
        `RemoteProtocolError` if it does not speak HTTP/1.1, sends too large a head or ends before
        the end of its answer.
        """
        idle_s = self._idle_s if idle_s is None else idle_s
        headers = list(self._headers)
        if body:
            headers.append((b"content-type", b"application/json"))
        if via:
            headers.append((VIA_HEADER.encode(), ",".join(via).encode()))
        async with AsyncExitStack() as stack:
            try:
                with trio.fail_after(idle_s):
                    response = await stack.enter_async_context(
                        self._pool.request(self.url, method, self._path + path, headers, body)
                    )
            except trio.TooSlowError:
                raise _silent(idle_s) from None
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise PeerUnreachableError("it broke the connection") from error
            chunks = await stack.enter_async_context(aclosing(_chunks(response, idle_s)))
            kept = {
                name: value.decode("latin-1")
                for name in KEPT_HEADERS
                if (value := response.header(name.encode())) is not None
            }
            yield PassedAnswer(response.status, kept, chunks)

    async def aclose(self) -> None:
        """Close the connections that lie idle."""
        await self._pool.aclose()

    async def _open(self, _: str) -> trio.abc.Stream:
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                plain = await trio.open_tcp_stream(self._host, self._port)
                if self._tls is None:
                    return plain
                return await _encrypted(plain, self._tls, self._host)
        except trio.TooSlowError:
            raise SilentError(
                f"it did not take a connection within {CONNECT_TIMEOUT_S:.0f} s"
            ) from None
        except UnicodeError as error:  # what getaddrinfo says of an empty or too long label
            raise PeerUnreachableError("it has no legal host name") from error
        except OSError as error:
            raise PeerUnreachableError(f"it takes no connection: {_why(error)}") from error


async def _encrypted(
    plain: trio.SocketStream, context: ssl.SSLContext, host: str
) -> trio.abc.Stream:
    stream = trio.SSLStream(plain, context, server_hostname=host, https_compatible=True)
    done = False
    try:
        await stream.do_handshake()
        done = True
    except trio.BrokenResourceError as error:
        why = "it does not speak TLS"
        if isinstance(cause := error.__cause__, ssl.SSLCertVerificationError):
            why = cause.verify_message
        raise PeerUnreachableError(f"it takes no connection: {why}") from error
    finally:
        if not done:
            await trio.aclose_forcefully(plain)
    return stream


async def _chunks(response: HttpResponse, idle_s: float) -> AsyncGenerator[bytes, None]:
    while True:
        try:
            with trio.fail_after(idle_s):
                chunk = await anext(response, None)
        except trio.TooSlowError:
            raise _silent(idle_s) from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerUnreachableError("it broke the connection") from error
        if chunk is None:
            return
        yield chunk


def _silent(idle_s: float) -> SilentError:
    return SilentError(f"it said nothing for {idle_s:.0f} s")


def _why(error: OSError) -> str:
    """In the system's words: trio tries every address of a name, and says so at length."""
    first: BaseException = error.__cause__ or error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, socket.gaierror):
        return str(first.strerror)
    return os.strerror(first.errno) if isinstance(first, OSError) and first.errno else "unknown"
