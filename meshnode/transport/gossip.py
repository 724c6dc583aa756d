"""Adverts by gossipsub: one topic per mesh, strictly signed, validated before they spread.

py-libp2p's defaults would not work for us (a heartbeat of 120 s, spam guards that mute a lively
mesh), so every setting is explicit. Gossip is for small rare messages: it costs each node
10-27 ms of CPU per message (measured), hence one advert a second and node at most.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from libp2p.abc import IHost
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from meshnode.messages import ADVERT_BYTES_MAX
from meshnode.transport import OnAdvert
from meshnode.transport.libp2p import Libp2pHost
from meshnode.transport.mesh_host import MeshHost

logger = logging.getLogger(__name__)

# Degrees of the gossipsub v1.0 specification's table of parameters.
DEGREE, DEGREE_LOW, DEGREE_HIGH = 6, 4, 12
HEARTBEAT_S = 1


class Gossip:
    """Publish and receive on the mesh's advert topic."""

    def __init__(self, host: Libp2pHost, mesh_id: str, on_advert: OnAdvert) -> None:
        """`on_advert` sees every new message before it spreads, and returns whether it may: it
        is the validator, so what is forged stops at the first honest peer.
        """
        self._topic = f"/meshnode/{mesh_id}/adverts/1"
        self._on_advert = on_advert
        # Made before anyone is connected: Pubsub does not pick up existing connections.
        self._router = GossipSub(
            [PROTOCOL_ID_V12, PROTOCOL_ID_V11],
            degree=DEGREE,
            degree_low=DEGREE_LOW,
            degree_high=DEGREE_HIGH,
            heartbeat_interval=HEARTBEAT_S,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,
            adaptive_gossip_enabled=False,
        )
        self._pubsub = Pubsub(cast(IHost, MeshHost(host)), self._router, strict_signing=True)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with (
            background_trio_service(self._pubsub),
            background_trio_service(cast(Any, self._router)),
        ):
            self._pubsub.set_topic_validator(self._topic, self._validate, False)
            subscription = await self._pubsub.subscribe(self._topic)
            try:
                yield
            finally:
                await subscription.unsubscribe()

    async def publish(self, advert: bytes) -> None:
        await self._pubsub.publish(self._topic, advert)

    def _validate(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        if ID(message.from_id) == self._pubsub.my_id:
            return True
        if len(message.data) > ADVERT_BYTES_MAX:
            return False
        return self._on_advert(message.data)
