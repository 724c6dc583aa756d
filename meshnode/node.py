"""One node: the nursery that owns all of it, and the order of start and shutdown.

    data directory → identity → membership → host → stack and driver → engines → API

Each part starts when what it stands on is ready and stops in the reverse order. This is the one
module that knows every layer; the layers know only those below them.
"""

from __future__ import annotations

import logging
import math
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import msgspec
import trio

from meshnode import __version__, clock
from meshnode.config import P2P_PORT, Config, split_host_port
from meshnode.console.fetches import Fetches
from meshnode.console.names import find_model
from meshnode.console.operations import Operations
from meshnode.console.requests import InviteOrder, InviteTicket
from meshnode.console.routes import Console, mount
from meshnode.console.snapshot import (
    MeshModelSnapshot,
    MeshSnapshot,
    OfferSnapshot,
    PeerSnapshot,
    Snapshot,
)
from meshnode.credentials import BOOTSTRAP_ADDRS_MAX, create_invite
from meshnode.driver import Driver
from meshnode.engine import Engine
from meshnode.engine.memory import memory_budget_bytes
from meshnode.errors import ConfigError, NoReplicaError, UnknownModelError
from meshnode.fence import Fence, shard_text
from meshnode.gateway import Candidate, Route, ServedModel, Upstream
from meshnode.gateway.app import create_api_app
from meshnode.gateway.door import Door, open_door
from meshnode.gateway.metrics import Metrics
from meshnode.gateway.server import serve_api
from meshnode.gateway.tunnel import TunnelApp
from meshnode.hosted import HostedModel, find_models, run_models
from meshnode.identity import KeyPair, PeerId
from meshnode.joining import JOIN_PROTOCOL, Issuer
from meshnode.links import Links
from meshnode.membership import find_membership
from meshnode.messages import Decided, Offer, Role, decode
from meshnode.pipeline.ring import STAGE_PROTOCOL, Rings, Stage
from meshnode.protocol import DutiesChanged, Event, MemberJoined, MemberLost
from meshnode.protocol.adverts import Node as NodeFacts
from meshnode.protocol.agreement import Assigned, Holding
from meshnode.protocol.dispatch import RETRY_AFTER_LOADING_S, resolve
from meshnode.protocol.stack import (
    CountDemand,
    CountRefused,
    Learn,
    SetAddrs,
    SetHoldings,
    SetLinks,
    SetOffers,
    Stack,
)
from meshnode.store import DataDir, Membership
from meshnode.transport import Stream
from meshnode.transport.addresses import advertised, with_free_ports
from meshnode.transport.dht import Dht
from meshnode.transport.gossip import Gossip
from meshnode.transport.http import serve_asgi
from meshnode.transport.libp2p import HostEvents, Libp2pHost, split_peer
from meshnode.transport.mdns import announced
from meshnode.upstream.fronted import Fronted, find_upstreams
from meshnode.weights import WEIGHTS_PROTOCOL, File, Listing, Peers, Shelf

logger = logging.getLogger(__name__)

HTTP_PROTOCOL = "/http/1.1"
MODELS_LOOK_S = 0.1
"""How often the models are looked at for a change of state: a standby that has loaded is news."""
OFFERS_EVERY_S = 0.5
"""How often their load is looked at; how often it is told is the core's to decide."""
LINKS_EVERY_S = 10.0
PEERS_SAVED_EVERY_S = 5.0
"""Written only when they have changed."""
DRAIN_S = 10.0
"""As long as the API lets its own clients finish."""
DRAIN_LOOK_S = 0.05
DIGEST_CHARS_SHOWN = 12
"""48 bits tell apart whatever models one mesh has under one name."""
CLOCK_WARNING_S = 60.0
"""Nothing fails below ten minutes of skew, but people want to know of one."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a started node tells whoever started it."""

    api_url: str
    peer_id: str
    addrs: tuple[str, ...]
    mesh: str
    models: tuple[str, ...]
    asks_for_key: bool = False


async def run_node(
    config: Config, *, task_status: trio.TaskStatus[NodeInfo] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run a node until cancelled. Raises `ConfigError` if it cannot start."""
    data = DataDir(config.data_dir)
    with data.locked():
        # First: a node that may not open its API should not have joined a mesh in vain.
        door = open_door(config)
        models = find_models(config)
        memory_bytes = memory_budget_bytes(config.memory_bytes)
        key = data.key()
        upstreams = find_upstreams(config, key.peer_id)
        membership = await find_membership(config, data, key)
        node = Node(config, data, key, membership, models, upstreams, memory_bytes, door)
        await node.run(task_status=task_status)


class Node:
    """Everything one node runs. Implements `gateway.Mesh`."""

    def __init__(
        self,
        config: Config,
        data: DataDir,
        key: KeyPair,
        membership: Membership,
        models: tuple[HostedModel, ...],
        upstreams: tuple[Fronted, ...],
        memory_bytes: int,
        door: Door | None,
    ) -> None:
        """`memory_bytes` is what the mesh may use here for models."""
        self._config = config
        self._data = data
        self._key = key
        self._mesh = membership.mesh
        self._models = models
        self._metrics = Metrics()
        self._upstreams = upstreams
        self._door = door
        self._started_at = time.monotonic()
        self._started_unix = int(time.time())
        self._stopping = trio.Event()
        self._told: tuple[Offer, ...] = ()
        self._held: tuple[Holding, ...] = ()
        self._duties = DutiesChanged((), is_drained=False)
        self._api_url = ""
        self._addrs: tuple[str, ...] = ()
        roles: tuple[Role, ...] = (config.role,)
        name = data.name_of(self._mesh)
        root = None if name is None else data.root_key(name)
        self._issuer = None if root is None else Issuer(root, key.peer_id, self._mesh, data)
        self._root = root
        self._stack = Stack(
            key,
            self._mesh,
            membership.chain,
            roles if root is None else (*roles, "issuer"),
            NodeFacts(memory_bytes, os.cpu_count() or 1, "cpu"),
            unix_of=lambda now: time.time(),
            rng=random.Random(),
            first_sequence=data.first_sequence(int(time.time() * 1000)),
            root=root,
            journals=data.journals(self._mesh.mesh_id),
        )
        listen = with_free_ports(config.listen) if config.listen_is_default else config.listen
        if listen != config.listen:
            logger.warning("port %s is taken; listening on a free one", P2P_PORT)
        self._host = Libp2pHost(
            key.seed, listen, HostEvents(self._on_connected, self._on_disconnected)
        )
        self._links = Links(self._host)
        self._rings = Rings(
            key.peer_id,
            self._host.open_stream,
            self._stack.agreement.assigned,
            self._stage,
            self._host.disconnect,
            config.activations,
        )
        for model in models:
            model.keep_ring = self._rings.keep
        self._driver = Driver(
            self._stack,
            self._host,
            partial(Gossip, self._host, self._mesh.mesh_id),
            partial(Dht, self._host, self._mesh.mesh_id),
            self._on_event,
            partial(data.save_journal, self._mesh.mesh_id),
        )
        self._operations = Operations(
            self._stack, partial(self._driver.submit, self.own), serves=config.role == "node"
        )
        is_open = config.share_weights and self._mesh.admission != "open"
        self._shelf = Shelf(
            self._files, data.path / "cache", self._host.disconnect, is_open=is_open
        )
        self._listing = Listing(self._nearest, self._host.open_stream)
        holders = Peers(self._holders, self._host.open_stream, self._host.disconnect)
        for model in models:
            if model.remote is not None:
                model.remote.peers, model.remote.find = holders, self._find_file
        self._fetches = Fetches(data.path, holders, self._find_file, self._files)

    # --- life -----------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[NodeInfo]) -> None:
        """Run until cancelled, then stop in order: answers in progress get a moment to end."""
        async with trio.open_nursery() as nursery:
            info = await nursery.start(self._run_parts)
            task_status.started(info)
            try:
                await trio.sleep_forever()
            finally:
                self._stopping.set()

    async def _run_parts(self, *, task_status: trio.TaskStatus[NodeInfo]) -> None:
        """Everything, shielded from cancellation: it ends when `_stopping` is set."""
        with trio.CancelScope(shield=True):
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(self._host.running())
                self._addrs = advertised(self._host.addrs())
                self._handle_streams()
                nursery = await stack.enter_async_context(trio.open_nursery())
                await nursery.start(self._drive)
                if self._config.mdns:
                    lan = announced(self._mesh.mesh_id, self.own, self._addrs, self._learn)
                    await stack.enter_async_context(lan)
                nursery.start_soon(run_models, self._models)
                for upstream in self._upstreams:
                    nursery.start_soon(upstream.run)
                nursery.start_soon(self._fetches.run)
                nursery.start_soon(self._keep_telling_models)
                nursery.start_soon(self._keep_telling_links)
                nursery.start_soon(self._links.run, self._peers)
                nursery.start_soon(self._save_peers)
                async with trio.open_nursery() as api:
                    if self._config.api:
                        await api.start(self._serve_clients)
                    task_status.started(self._info())
                    await self._stopping.wait()
                await self._drain()
                await self._driver.say_goodbye()
                nursery.cancel_scope.cancel()

    def _handle_streams(self) -> None:
        tunnel = TunnelApp(self)

        async def serve_tunnel(stream: Stream) -> None:
            await serve_asgi(stream, tunnel, {"client": (stream.peer_id, 0)})

        self._host.handle(HTTP_PROTOCOL, serve_tunnel)
        self._host.handle(STAGE_PROTOCOL, self._rings.serve)
        self._host.handle(WEIGHTS_PROTOCOL, self._shelf.serve)
        if self._issuer is not None:
            self._host.handle(JOIN_PROTOCOL, self._issuer.serve, members_only=False)

    async def _drain(self) -> None:
        """Offer nothing more, and let what peers have asked of our engines come to its end."""
        self._driver.submit(self.own, SetOffers(()))
        self._driver.submit(self.own, SetHoldings(()))
        with trio.move_on_after(DRAIN_S):
            # The engines report their load by themselves, a few times a second.
            while (  # noqa: ASYNC110
                any(model.is_busy() for model in self._models)
                or any(upstream.in_flight for upstream in self._upstreams)
            ):
                await trio.sleep(DRAIN_LOOK_S)

    async def _drive(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._driver.run)
            self._driver.submit(self.own, SetAddrs(self._addrs))
            for peer, addrs in self._data.known_peers(self._mesh.mesh_id).items():
                self._learn(PeerId(peer), addrs)
            for address in (*self._mesh.bootstrap, *self._config.bootstrap):
                peer_id, head = split_peer(address)
                self._driver.submit(peer_id, Learn((head,), permanent=True))
            task_status.started()

    async def _serve_clients(self, *, task_status: trio.TaskStatus[None]) -> None:
        console = Console(self.snapshot, self._invite, self._operations, self._fetches)
        app = create_api_app(self, door=self._door, mount=lambda quart: mount(quart, console))
        bind = split_host_port(self._config.api)
        serve = partial(serve_api, app, bind, shutdown=self._stopping.wait)
        async with trio.open_nursery() as nursery:
            bound_host, bound_port = await nursery.start(serve)
            shown = f"[{bound_host}]" if ":" in bound_host else bound_host
            self._api_url = f"http://{shown}:{bound_port}"
            self._data.publish_api(self._api_url)
            task_status.started()
        self._data.withdraw_api()

    async def _keep_telling_models(self) -> None:
        """Do what the mesh has decided about our models, and let it know what has come of it."""
        states: tuple[str, ...] = ()
        told_at = -math.inf
        while not self._stopping.is_set():
            self._follow_duties()
            found = (
                *(model.state for model in self._models),
                *(upstream.state for upstream in self._upstreams),
            )
            if found != states or trio.current_time() >= told_at + OFFERS_EVERY_S:
                states, told_at = found, trio.current_time()
                self._tell_models()
            await trio.sleep(MODELS_LOOK_S)

    def _follow_duties(self) -> None:
        """What our operator told this node to serve it serves, unless the mesh drains it; the
        rest as the mesh decides."""
        wanted = {duty.model: duty for duty in self._duties.duties}
        for model in self._models:
            holding = model.holding()
            duty = None if holding is None else wanted.get(holding.digest)
            is_wanted = (duty is not None and duty.load) or (
                model.is_whole and holding is not None and self._is_last_replica(holding.digest)
            )
            model.assign(
                is_wanted or (model.pinned and not self._duties.is_drained),
                frozenset() if duty is None else frozenset(duty.parts),
            )

    def _stage(self, digest: str, first: int, end: int) -> Stage | None:
        found = (model.stage(digest, first, end) for model in self._models)
        return next((stage for stage in found if stage is not None), None)

    def _files(self) -> dict[str, File]:
        """What others may have of us, by digest."""
        found = (model.file() for model in self._models)
        return dict(filter(None, found))

    async def _find_file(self, text: str) -> tuple[str, str]:
        """Digest and name of a model of the mesh, of those too that nobody serves yet. Raises
        `ConfigError`."""
        try:
            found = find_model(text, self._model_names())
        except ConfigError:
            await self._listing.look()
            found = find_model(text, self._model_names())
        return found, self._model_names()[found]

    def _model_names(self) -> dict[str, str]:
        return {**self._listing.names(), **self._operations.models()}

    def _holders(self, digest: str) -> list[PeerId]:
        """Peers that have the model's file, as far as we know, the nearest first."""
        told = self._operations.holders(digest) | self._listing.holders(digest)
        return [peer for peer in self._nearest() if peer in told]

    def _nearest(self) -> list[PeerId]:
        """The peers that can be asked now."""
        rtts_s = self._rtts_s()
        return [PeerId(peer) for peer in sorted(rtts_s, key=rtts_s.__getitem__)]

    def _is_last_replica(self, digest: str) -> bool:
        """Whether only we can answer for the model now, and nothing else needs its memory. An
        owner that comes back takes over when it has loaded, not when it is seen; and a voter that
        has just started may decide before it has heard what we have."""
        if any(duty.load and self.engine(duty.model) is None for duty in self._duties.duties):
            return False
        return not self._is_ready_elsewhere(digest)

    def _is_ready_elsewhere(self, digest: str) -> bool:
        return any(
            offer.digest == digest and offer.state == "ready"
            for peer, offers in self._stack.offers().items()
            if peer != self.own
            for offer in offers
        )

    def _tell_models(self) -> None:
        self._tell_offers()
        held: dict[str, Holding] = {}
        for model in self._models:
            holding = model.holding()
            if holding is not None:
                held.setdefault(
                    holding.digest,
                    Holding(
                        model=holding.digest,
                        name=holding.name,
                        state="file" if holding.state == "loading" else holding.state,
                        wanted=holding.wanted,
                        bytes=holding.bytes,
                        weight_bytes=holding.weight_bytes,
                        kv_bytes=holding.kv_bytes_per_token * holding.context_tokens,
                        layers=holding.layers,
                        activation_bytes=holding.activation_bytes,
                        edge_bytes=holding.edge_bytes,
                        cut_every=holding.cut_every,
                        parts=holding.parts,
                    ),
                )
        holdings = tuple(held.values())
        if holdings != self._held and not self._stopping.is_set():
            self._held = holdings
            self._driver.submit(self.own, SetHoldings(holdings))

    async def _keep_telling_links(self) -> None:
        """Let the mesh know how far our peers are."""
        while not self._stopping.is_set():
            self._driver.submit(self.own, SetLinks(self._links.measured(self._peers())))
            await trio.sleep(LINKS_EVERY_S)

    def _tell_offers(self) -> None:
        hosted = tuple(offer for model in self._models if (offer := model.offer()) is not None)
        offers = (*hosted, *self._fronted_offers({offer.digest for offer in hosted}))
        if offers != self._told and not self._stopping.is_set():
            self._told = offers
            self._driver.submit(self.own, SetOffers(offers))

    def _fronted_offers(self, here: set[str]) -> Iterable[Offer]:
        """What servers behind us have, in an order that lasts: of equal bytes one offer, and none
        of what an engine `here` has, nor, on a drained node, of what others can answer for."""
        found: dict[str, Offer] = {}
        for upstream in self._upstreams:
            for offer in upstream.offers():
                if offer.digest not in found or found[offer.digest].state != "ready":
                    found[offer.digest] = offer
        for digest, offer in found.items():
            is_moved = self._duties.is_drained and self._is_ready_elsewhere(digest)
            if digest not in here and not is_moved:
                yield offer

    async def _save_peers(self) -> None:
        """Keep the members' addresses, so that a restart needs no bootstrap peer."""
        saved: dict[PeerId, tuple[str, ...]] = {}
        while True:
            await trio.sleep(PEERS_SAVED_EVERY_S)
            current = self._stack.discovery.addresses()
            if current and current != saved:
                try:
                    kept = {str(peer): addrs for peer, addrs in current.items()}
                    self._data.save_known_peers(self._mesh.mesh_id, kept)
                except ConfigError as error:
                    logger.warning("known peers are not kept: %s", error)
                saved = current

    # --- what happens on the network ------------------------------------------------------------

    def _on_connected(self, peer: PeerId) -> None:
        self._driver.connected(peer)

    def _on_disconnected(self, peer: PeerId, reason: str) -> None:
        self._driver.disconnected(peer, reason)

    def _on_event(self, event: Event) -> None:
        match event:
            case MemberJoined(peer):
                logger.info("member joined: %s", peer)
            case MemberLost(peer, reason):
                logger.info("member lost: %s (%s)", peer, reason)
            case DutiesChanged():
                self._duties = event
                self._follow_duties()

    def _learn(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        self._driver.submit(peer, Learn(addrs))

    def _info(self) -> NodeInfo:
        return NodeInfo(
            self._api_url,
            self.own,
            tuple(f"{address}/p2p/{self.own}" for address in self._addrs),
            self._mesh.name,
            tuple(model.name for model in self._models if model.pinned),
            asks_for_key=self._door is not None and self._door.keys is not None,
        )

    # --- gateway.Mesh ---------------------------------------------------------------------------

    @property
    def own(self) -> PeerId:
        return self._key.peer_id

    @property
    def peer_id(self) -> str:
        return self._key.peer_id

    def models(self) -> tuple[ServedModel, ...]:
        """One row per name and digest; the digest that the bare name means comes without `@`."""
        rows: dict[tuple[str, str], list[tuple[str, Offer]]] = {}
        offered_by = self._stack.offers()
        for peer, offers in sorted(offered_by.items()):
            for offer in offers:
                rows.setdefault((offer.name, offer.digest), []).append((peer, offer))
        reached = {self.own, *self._rtts_s()}
        served: list[ServedModel] = []
        for (name, digest), offered in sorted(rows.items()):
            # Gossip may tell of an offer before its peer is connected and can be asked.
            ready = tuple(p for p, offer in offered if offer.state == "ready" and p in reached)
            states = {offer.state for _, offer in offered}
            is_meant = resolve(name, offered_by).digest == digest
            served.append(
                ServedModel(
                    id=name if is_meant else f"{name}@{digest[:DIGEST_CHARS_SHOWN]}",
                    digest=digest,
                    created=self._started_unix,
                    context_tokens=max(offer.context_tokens for _, offer in offered),
                    state="ready" if ready else ("failed" if states == {"failed"} else "loading"),
                    served_by=ready,
                    approximate=offered[0][1].approximate,
                )
            )
        return tuple(served)

    def route(self, model: str, session: bytes, prompt_bytes: int, *, again: bool = False) -> Route:
        self._tell_offers()  # whoever saw `ready` turn true may ask in the same instant
        if not again:
            self._driver.submit(self.own, CountDemand(model))
        try:
            resolved, ranked = self._stack.route(
                model, session, prompt_bytes, self._rtts_s(), clock.now()
            )
        except UnknownModelError:
            if self._is_decided(model):  # its owner is gone, and its standby not loading yet
                raise NoReplicaError(model, "loading", RETRY_AFTER_LOADING_S) from None
            raise
        assigned = self._stack.agreement.assigned(resolved.digest)
        fronted = {peer for peer, offer in resolved.offers if offer.upstream}
        approximations = (offer.approximate for _, offer in resolved.offers)
        return Route(
            model=resolved.name,
            digest=resolved.digest,
            candidates=tuple(
                Candidate(
                    each.peer,
                    each.local,
                    each.reason,
                    _fence(assigned, each.peer),
                    each.peer in fronted,
                )
                for each in ranked
            ),
            approximate=next((found for found in approximations if found is not None), None),
        )

    def _is_decided(self, model: str) -> bool:
        """Whether the mesh has decided that somebody is to serve the model of this name."""
        name, _, prefix = model.partition("@")
        return any(
            model == item.model or (name == item.name and item.model.startswith(prefix))
            for view in self._stack.agreement.views(clock.now())
            for item in view.items
        )

    def refused(self, route: Route) -> None:
        self._driver.submit(self.own, CountRefused(route.model))

    def check(self, fence: Fence | None, digest: str) -> bytes | None:
        stood_on = None if fence is None else (fence.group, fence.epoch)
        return self._stack.agreement.overtakes(digest, stood_on)

    def learn(self, peer_id: str, decided: bytes) -> None:
        self._driver.learn(PeerId(peer_id), decode(decided, Decided))

    def routed(self, route: Route, peer_id: str, session: bytes) -> None:
        self._stack.dispatcher.routed(route.digest, session, peer_id)

    def finished(self, route: Route, peer_id: str) -> None:
        self._stack.dispatcher.finished(route.digest, peer_id)

    def failed(self, peer_id: str) -> None:
        self._stack.dispatcher.failed(peer_id, clock.now())

    def engine(self, digest: str) -> Engine | None:
        engines = (model.engine_for(digest) for model in self._models)
        found = next((engine for engine in engines if engine is not None), None)
        return None if found is None else self._metrics.metered(found)

    def metrics(self) -> bytes:
        stats = (model.stats() for model in self._models)
        return self._metrics.text(each for each in stats if each is not None)

    def upstream(self, digest: str) -> Upstream | None:
        if self.engine(digest) is not None:
            return None
        # Of several with the same bytes the one with the least to do.
        servers = sorted(self._upstreams, key=lambda upstream: upstream.in_flight)
        models = (upstream.model(digest) for upstream in servers)
        return next((model for model in models if model is not None), None)

    def is_fronted(self, model: str) -> bool:
        self._tell_offers()  # as in `route`, which follows
        try:
            found = resolve(model, self._stack.offers())
        except UnknownModelError:
            return False
        return all(offer.upstream for _, offer in found.offers)

    async def open_tunnel(self, peer_id: str) -> Stream:
        return await self._host.open_stream(PeerId(peer_id), HTTP_PROTOCOL)

    def ready(self) -> tuple[bool, str]:
        """A node is ready when it can answer for every model it was told to run; without any of
        its own, or drained of them, when it or a peer that it knows can answer at all."""
        pinned = [model for model in self._models if model.pinned]
        if not pinned or self._duties.is_drained:
            served = any(model.served_by for model in self.models())
            return (True, "ready") if served else (False, "nobody serves a model yet")
        if not all(model.is_settled for model in pinned):
            return False, "loading"
        can_answer = any(model.state == "ready" for model in pinned)
        return can_answer, "ready" if can_answer else "no model could be loaded"

    def _peers(self) -> tuple[PeerId, ...]:
        return tuple(member.peer for member in self._stack.members())

    def _rtts_s(self) -> dict[str, float]:
        """Round-trip times of the members that can be tunnelled to now."""
        times = {str(m.peer): self._host.rtt_s(m.peer) for m in self._stack.members()}
        return {peer: rtt_s for peer, rtt_s in times.items() if rtt_s is not None}

    # --- console --------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Everything worth showing, at this instant."""
        ready, reason = self.ready()
        refused = Counter(self._stack.refused)
        for source, counts in (("record", self._stack.records), ("advert", self._stack.adverts)):
            for why, count in counts.refused.items():
                refused[f"{source}: {why}"] += count
        return Snapshot(
            peer_id=self.own,
            mesh=MeshSnapshot(
                self._mesh.name,
                self._mesh.mesh_id,
                self._mesh.admission,
                root_key_here=self._root is not None,
            ),
            role=self._config.role,
            version=__version__,
            uptime_s=time.monotonic() - self._started_at,
            api_url=self._api_url,
            addrs=tuple(f"{address}/p2p/{self.own}" for address in self._addrs),
            ready=ready,
            reason=reason,
            models=(
                *(model.snapshot() for model in self._models),
                *(row for upstream in self._upstreams for row in upstream.snapshots()),
            ),
            peers=self._peer_snapshots(),
            mesh_models=tuple(
                MeshModelSnapshot(
                    m.id, m.digest, m.state, m.context_tokens, m.served_by, m.approximate
                )
                for m in self.models()
            ),
            groups=self._operations.groups(),
            refused=dict(refused),
            dht_peers=self._driver.dht_size(),
            warnings=self._warnings(),
        )

    def _peer_snapshots(self) -> tuple[PeerSnapshot, ...]:
        rows: list[PeerSnapshot] = []
        for member in self._stack.members():
            rtt_s = self._host.rtt_s(member.peer)
            advert = member.advert
            rows.append(
                PeerSnapshot(
                    peer_id=member.peer,
                    roles=member.roles,
                    addrs=member.addrs,
                    rtt_ms=None if rtt_s is None else 1000 * rtt_s,
                    clock_ahead_s=member.clock_ahead_s,
                    models=tuple(
                        OfferSnapshot(offer.name, offer.digest, offer.state)
                        for offer in (advert.offers if advert else ())
                    ),
                    memory_bytes=advert.memory_bytes if advert else 0,
                    cores=advert.cores if advert else 0,
                    accelerator=advert.accelerator if advert else "",
                )
            )
        return tuple(rows)

    def _warnings(self) -> tuple[str, ...]:
        ahead_s = [member.clock_ahead_s for member in self._stack.members()]
        # Of an even number the median nearer to us: one wrong clock among two is not ours.
        medians = (statistics.median_low, statistics.median_high)
        behind_s = min((of(ahead_s) for of in medians), key=abs) if ahead_s else 0.0
        if abs(behind_s) > CLOCK_WARNING_S:
            way = "behind" if behind_s > 0 else "ahead of"
            return (
                f"this machine's clock is {abs(behind_s):.0f} s {way} its peers': "
                "set it (timedatectl set-ntp true)",
            )
        return ()

    def _invite(self, order: InviteOrder) -> InviteTicket:
        if self._root is None:
            raise ConfigError(
                f"only the node that made the mesh {self._mesh.name} can invite to it"
            )
        expires_at = int(time.time()) + order.expires_s
        own = tuple(f"{address}/p2p/{self.own}" for address in self._addrs)
        told = dict.fromkeys((*own, *self._mesh.bootstrap))
        mesh = msgspec.structs.replace(self._mesh, bootstrap=tuple(told)[:BOOTSTRAP_ADDRS_MAX])
        token = create_invite(
            self._root,
            mesh,
            honoured_by=self.own,
            roles=(order.role,),
            uses_max=order.uses,
            not_after=expires_at,
        )
        return InviteTicket(token, expires_at)


def _fence(assigned: Assigned | None, peer: str) -> Fence | None:
    """What a request to `peer` stands on: its own item, or the one that it stands in for."""
    if assigned is None:
        return None
    items = assigned.items
    item = next((item for item in items if item.owner == peer), items[0])
    return Fence(assigned.group, assigned.epoch, shard_text(item))
