"""Becoming a member: the one conversation that a stranger may have with a node.

The stranger sends the invitation from its token and a proof that it holds the token's key; the
issuer checks both, counts the use durably, and answers with a certificate chain.
"""

from __future__ import annotations

import logging
import time
from typing import cast

import trio

from meshnode.credentials import Invite, MeshDescriptor, check_join, issue_certificate, verify_chain
from meshnode.errors import (
    ConfigError,
    NotAuthorizedError,
    PeerUnreachableError,
    RemoteProtocolError,
)
from meshnode.identity import KeyPair, PeerId
from meshnode.messages import (
    MESSAGE_BYTES_MAX,
    Join,
    JoinDenied,
    JoinGranted,
    JoinRequest,
    decode,
    encode,
    reason_of,
)
from meshnode.store import DataDir, Membership
from meshnode.transport import Stream
from meshnode.transport.frames import receive_frame, send_frame
from meshnode.transport.libp2p import HostEvents, Libp2pHost, split_peer

logger = logging.getLogger(__name__)

JOIN_PROTOCOL = "/meshnode/join/1"
JOIN_TIMEOUT_S = 10.0
RENEW_BEFORE_S = 30 * 24 * 3600
"""A token given to a member whose certificate ends within a month gets it a new one."""


class Issuer:
    """Answers join requests on a node that holds the mesh's root key."""

    def __init__(self, root: KeyPair, own: PeerId, mesh: MeshDescriptor, data: DataDir) -> None:
        self._root = root
        self._own = own
        self._mesh = mesh
        self._data = data

    async def serve(self, stream: Stream) -> None:
        """One conversation; a handler for `JOIN_PROTOCOL`."""
        with trio.move_on_after(JOIN_TIMEOUT_S):
            try:
                frame = await receive_frame(stream, MESSAGE_BYTES_MAX)
                request = decode(frame or b"", JoinRequest)
                reply: JoinGranted | JoinDenied = self._decide(stream.peer_id, request)
            except RemoteProtocolError as error:
                reply = JoinDenied(reason_of(error))
            await send_frame(stream, encode(reply))
            await stream.send_eof()
            await stream.receive_some()

    def _decide(self, peer: str, request: JoinRequest) -> JoinGranted | JoinDenied:
        unix_s = int(time.time())
        try:
            admission = check_join(self._mesh, self._own, peer, request, unix_s)
            if not self._data.count_use(admission.use_key, admission.subject, admission.uses_max):
                raise NotAuthorizedError("invitation has been used up: ask for a new one")
        except NotAuthorizedError as error:
            logger.warning("refused to admit %s: %s", peer, error)
            return JoinDenied(reason_of(error))
        except ConfigError as error:
            logger.error("cannot admit %s: %s", peer, error)
            return JoinDenied("the node that honours this invitation cannot write to its disk")
        logger.info("admitted %s as %s", peer, ", ".join(admission.roles))
        return JoinGranted(
            (issue_certificate(self._root, self._mesh, peer, admission.roles, unix_s),)
        )


async def join_mesh(key: KeyPair, invite: Invite, data: DataDir) -> Membership:
    """Present an invitation to its issuer and keep the certificate.

    Raises `ConfigError` that says whether the token or the network is at fault.
    """
    name = data.name_of(invite.mesh)
    known = None if name is None else data.membership(name)
    if known is not None and _is_good(known.chain, key, invite):
        # A member already: only the newest addresses are worth keeping.
        known = Membership(invite.mesh, known.chain)
        data.save_membership(known)
        return known
    addrs = tuple(
        address
        for peer, address in map(split_peer, invite.mesh.bootstrap)
        if peer == invite.invitation.issuer
    )
    if not addrs:
        raise ConfigError("this invitation names no address of the node that honours it")
    reply = await _ask(key, PeerId(invite.invitation.issuer), addrs, invite)
    if isinstance(reply, JoinDenied):
        raise ConfigError(f"the mesh {invite.mesh.name} refused this invitation: {reply.reason}")
    try:
        verify_chain(invite.mesh, key.peer_id, reply.chain, int(time.time()))
    except NotAuthorizedError as error:
        raise ConfigError(f"the certificate received is of no use: {error}") from error
    membership = Membership(invite.mesh, reply.chain)
    data.save_membership(membership)
    return membership


def _is_good(chain: tuple[bytes, ...], key: KeyPair, invite: Invite) -> bool:
    """Whether a certificate is valid and will be for a while."""
    soon = int(time.time()) + RENEW_BEFORE_S
    try:
        verify_chain(invite.mesh, key.peer_id, chain, soon)
    except NotAuthorizedError:
        return False
    return True


async def _ask(
    key: KeyPair, issuer: PeerId, addrs: tuple[str, ...], invite: Invite
) -> JoinGranted | JoinDenied:
    """Over a host of its own, because the node's host only starts as a member."""
    events = HostEvents(connected=lambda peer: None, disconnected=lambda peer, reason: None)
    host = Libp2pHost(key.seed, (), events)
    try:
        with trio.fail_after(JOIN_TIMEOUT_S):
            async with host.running():
                await host.dial(issuer, addrs)
                async with await host.open_stream(issuer, JOIN_PROTOCOL) as stream:
                    await send_frame(stream, encode(invite.request_for(key.peer_id)))
                    frame = await receive_frame(stream, MESSAGE_BYTES_MAX)
                    await stream.send_eof()
                    reply = decode(frame or b"", cast(type[Join], Join))
    except (PeerUnreachableError, trio.TooSlowError, trio.BrokenResourceError) as error:
        raise ConfigError(
            f"cannot reach the node that honours this invitation ({', '.join(addrs)}): "
            "it has to run while you join, and its address has to be reachable from here"
        ) from error
    except RemoteProtocolError as error:
        raise ConfigError(
            f"the node that honours this invitation answered nonsense: {error}"
        ) from error
    if isinstance(reply, JoinRequest):
        raise ConfigError("the node that honours this invitation spoke nonsense")
    return reply
