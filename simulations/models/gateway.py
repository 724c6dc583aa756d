"""A client's request on its way through the mesh: routed, sent, answered, continued elsewhere.

The gateway is any running node. Under the policy "ours" it asks its own stack, as the real one
does; the other policies choose among the very offers that this stack has heard of, so what they
are compared by is the choice and nothing else:

* `random`, `round-robin`; `least-load`: fewest requests per slot
* `hrw`: the top of the rendezvous hash of the session, whatever its load
* `bounded-hrw`: the first in hash order with at most 1.25 times the mean load
  (Mirrokni, Thorup and Zadimoghaddam 2016)

When the node that answers is lost, the request goes on elsewhere with what came so far as part of
its prompt; the client sees a pause.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshnode.errors import NoReplicaError, UnknownModelError
from meshnode.identity import PeerId
from meshnode.messages import Offer
from meshnode.protocol import Event, MemberLost
from meshnode.protocol.dispatch import OVERLOAD, Replica, hash_order
from meshnode.protocol.stack import CountDemand, CountRefused
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.kernel.world import Power
from meshnode_simulations.models.engine import Engine, Job
from meshnode_simulations.models.hosting import Hosting, digest_of
from meshnode_simulations.record import quantile
from meshnode_simulations.run import Run

BYTES_PER_TOKEN = 4
"""Of text; what a gateway knows of a prompt is its bytes (`dispatch.BYTES_PER_TOKEN`)."""
RETRY_S = 1.0
"""Nobody can answer now: asked again after this long, as a client's library does."""
GIVE_UP_S = 60.0
"""A client waits this long for a first token, or for the next."""


@dataclass(eq=False, slots=True)
class Ask:
    """One request. `blocks` identify its prompt's prefix, see `engine.Job`."""

    model: str
    session: bytes
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...]
    block_tokens: int
    answered: Callable[[bool], None] = lambda whole: None
    """Called once, when the answer is over; `whole` or given up."""
    gateway: Machine | None = None
    asked_s: float = 0.0
    first_s: float | None = None
    heard_s: float = 0.0
    """When the client last got anything, or asked."""
    longest_s: float = 0.0
    """The longest pause after its first token that came from changing replicas."""
    told_tokens: int = 0
    cached_tokens: int = 0
    tries: int = 0
    server: Machine | None = None
    """Where it was sent last, until that is over."""
    engine: Engine | None = None
    job: Job | None = None


class Gateways:
    """All requests of a run.

    Figures, of requests asked after the warm-up: `requests`, `answered_share`, `ttft_p50_s`,
    `ttft_p95_s`, `ttft_p99_s`, `hit_share` (prompt tokens found in a KV cache), `interrupted` and
    `pause_p99_s` (of answers whose replica was lost), `refused` (turned away at least once).
    """

    def __init__(self, run: Run, hosting: Hosting) -> None:
        self._run = run
        self._world = run.world
        self._hosting = hosting
        self._policy = run.scenario.routing.policy
        self._rng = stream(run.seed, "routing")
        self._turn = 0
        self._digests = {model.name: digest_of(model) for model in run.scenario.models}
        self._under_way: dict[Ask, None] = {}
        self._ttft_s: list[float] = []
        self._pauses_s: list[float] = []
        self._asked = self._whole = self._refused = 0
        self._prompt_tokens = self._cached_tokens = 0
        run.world.on_event.append(self._on_event)
        run.world.on_power.append(self._on_power)
        run.recorder.gauge("requests_under_way", lambda: len(self._under_way))
        run.closers.append(self._close)

    def ask(self, gateway: Machine, ask: Ask) -> None:
        """A client asks now."""
        ask.gateway = gateway
        ask.asked_s = ask.heard_s = self._run.now_s
        self._under_way[ask] = None
        self._run.recorder.count("requests")
        if self._run.is_warm:
            self._asked += 1
        if gateway.is_awake:
            self._world.tell(gateway, CountDemand(ask.model))
        self._try(ask)

    # --- a request's life -----------------------------------------------------------------------

    def _try(self, ask: Ask) -> None:
        """Send it to the best replica that takes it."""
        if ask not in self._under_way:
            return
        gateway = ask.gateway
        if gateway is None or not gateway.is_awake:
            self._end(ask, whole=False)
            return
        ask.tries += 1
        for server in self._ranked(gateway, ask):
            if server.is_awake and not self._world.network.joins(gateway.index, server.index):
                continue
            engine = self._hosting.engine(server, self._digests[ask.model])
            if engine is not None and not engine.is_full:
                self._send(ask, gateway, server)
                return
        if ask.tries == 1:
            self._refused += self._run.is_warm
            self._world.tell(gateway, CountRefused(ask.model))
        if self._run.now_s - ask.heard_s > GIVE_UP_S:
            self._end(ask, whole=False)
        else:
            self._world.loop.after(int(RETRY_S * NS_PER_S), self._try, ask)

    def _send(self, ask: Ask, gateway: Machine, server: Machine) -> None:
        ask.server = server
        digest = self._digests[ask.model]
        dispatcher = gateway.live.dispatcher
        if self._policy == "ours":
            dispatcher.routed(digest, ask.session, server.peer_id)
        delay_ns = 0
        if server is not gateway:
            delay_ns = self._world.network.delay_ns(gateway.index, server.index)
        self._world.loop.after(delay_ns, self._arrive, ask, server, server.starts)

    def _arrive(self, ask: Ask, server: Machine, run: int) -> None:
        if ask not in self._under_way or ask.server is not server:
            return
        engine = self._hosting.engine(server, self._digests[ask.model])
        if engine is None or server.starts != run:
            return  # dead: its loss will be noticed
        job = Job(
            prompt_tokens=ask.prompt_tokens + ask.told_tokens,
            answer_tokens=max(ask.answer_tokens - ask.told_tokens, 1),
            blocks=ask.blocks,
            block_tokens=ask.block_tokens,
            session=ask.session,
            first=lambda: self._back(ask, server, self._on_first),
            done=lambda: self._back(ask, server, self._on_done),
        )
        ask.engine, ask.job = engine, job
        if not engine.submit(job):
            ask.engine = ask.job = None
            self._back(ask, server, self._on_refusal)

    def _back(self, ask: Ask, server: Machine, then: Callable[[Ask, Job | None], None]) -> None:
        """Let the gateway hear of it, one way later, if they still hear each other."""
        gateway = ask.gateway
        assert gateway is not None
        delay_ns = 0
        if server is not gateway:
            delay_ns = self._world.network.delay_ns(server.index, gateway.index)
        job = ask.job

        def arrive() -> None:
            linked = server is gateway or server.index in gateway.links
            if ask in self._under_way and ask.server is server and linked and ask.job is job:
                then(ask, job)

        self._world.loop.after(delay_ns, arrive)

    def _on_refusal(self, ask: Ask, job: Job | None) -> None:
        """It filled up while the request was on its way."""
        self._leave(ask)
        self._try(ask)

    def _on_first(self, ask: Ask, job: Job | None) -> None:
        assert job is not None
        now_s = self._run.now_s
        if ask.first_s is None:
            ask.first_s = now_s
            ask.cached_tokens = job.cached_tokens
        else:
            ask.longest_s = max(ask.longest_s, now_s - ask.heard_s)
        ask.heard_s = now_s

    def _on_done(self, ask: Ask, job: Job | None) -> None:
        self._leave(ask)
        self._end(ask, whole=True)

    def _leave(self, ask: Ask) -> None:
        """The gateway expects nothing more of the replica that had the request."""
        gateway, server = ask.gateway, ask.server
        stack = None if gateway is None else gateway.stack
        if self._policy == "ours" and server is not None and stack is not None:
            stack.dispatcher.finished(self._digests[ask.model], server.peer_id)
        ask.server = ask.engine = ask.job = None

    def _on_event(self, machine: Machine, event: Event) -> None:
        """A gateway has lost a peer: what that peer was answering goes on elsewhere."""
        if isinstance(event, MemberLost):
            for ask in self._of(lambda ask: ask.gateway is machine):
                if ask.server is not None and ask.server.peer_id == event.peer:
                    self._stop(ask)
                    dispatcher = machine.live.dispatcher
                    dispatcher.failed(event.peer, self._world.now_of(machine))
                    self._leave(ask)
                    self._try(ask)

    def _on_power(self, machine: Machine, power: Power) -> None:
        if power not in ("killed", "stopped"):
            return
        for ask in self._of(lambda ask: ask.gateway is machine):
            self._stop(ask)  # with the gateway its clients are gone too
            self._leave(ask)
            self._end(ask, whole=False)
        for ask in self._of(lambda ask: ask.server is machine):
            self._stop(ask)

    def _of(self, chosen: Callable[[Ask], bool]) -> list[Ask]:
        return [ask for ask in self._under_way if chosen(ask)]

    def _stop(self, ask: Ask) -> None:
        """Its replica computes no more for it. What has been told becomes part of the prompt."""
        if ask.job is None or ask.engine is None:
            return
        if ask.first_s is not None:
            told = ask.told_tokens + ask.engine.decoded(ask.job)
            ask.told_tokens = min(told, ask.answer_tokens - 1)
            ask.heard_s = self._run.now_s
        ask.engine.cancel(ask.job)
        ask.job = ask.engine = None

    def _end(self, ask: Ask, *, whole: bool) -> None:
        del self._under_way[ask]
        run = self._run
        run.recorder.count("answered" if whole else "given_up")
        if ask.asked_s >= run.scenario.scenario.warmup_s:
            self._whole += whole
            if ask.first_s is not None:
                self._ttft_s.append(ask.first_s - ask.asked_s)
                self._prompt_tokens += ask.prompt_tokens
                self._cached_tokens += ask.cached_tokens
            if ask.longest_s:
                self._pauses_s.append(ask.longest_s)
        run.recorder.row(
            "requests",
            asked_s=ask.asked_s,
            model=ask.model,
            ttft_s=None if ask.first_s is None else ask.first_s - ask.asked_s,
            total_s=run.now_s - ask.asked_s,
            pause_s=ask.longest_s,
            prompt_tokens=ask.prompt_tokens,
            cached_tokens=ask.cached_tokens,
            answer_tokens=ask.answer_tokens,
            tries=ask.tries,
            whole=whole,
        )
        ask.answered(whole)

    # --- policies -------------------------------------------------------------------------------

    def _ranked(self, gateway: Machine, ask: Ask) -> list[Machine]:
        """Whom to ask, best first."""
        stack = gateway.live
        now_s = self._world.now_of(gateway)
        network = self._world.network
        if self._policy == "ours":
            rtts_s = {
                str(self._world.machines[index].peer_id): network.rtt_ns(gateway.index, index)
                / NS_PER_S
                for index in gateway.links
            }
            try:
                _, ranked = stack.route(
                    ask.model, ask.session, ask.prompt_tokens * BYTES_PER_TOKEN, rtts_s, now_s
                )
            except (NoReplicaError, UnknownModelError):
                return []
            return [self._world.by_peer[PeerId(entry.peer)] for entry in ranked]
        offers = {
            peer: offer
            for peer, theirs in stack.offers().items()
            for offer in theirs
            if offer.name == ask.model
            and offer.state == "ready"
            and (peer == stack.own or self._world.by_peer[PeerId(peer)].index in gateway.links)
        }
        chosen = self._by_policy(ask, dict(sorted(offers.items())))
        return [self._world.by_peer[PeerId(peer)] for peer in chosen]

    def _by_policy(self, ask: Ask, offers: dict[str, Offer]) -> list[str]:
        peers = list(offers)

        def load(peer: str) -> float:
            offer = offers[peer]
            return (offer.slots_busy + offer.queue_depth) / max(offer.slots, 1)

        match self._policy:
            case "random":
                self._rng.shuffle(peers)
            case "round-robin":
                self._turn += 1
                first = self._turn % max(len(peers), 1)
                peers = peers[first:] + peers[:first]
            case "least-load":
                self._rng.shuffle(peers)  # ties would all go to the same one
                peers.sort(key=load)
            case _:
                replicas = tuple(
                    Replica(peer, offer, local=False, rtt_s=0.0) for peer, offer in offers.items()
                )
                peers = [replica.peer for replica in hash_order(ask.session, replicas)]
                if self._policy == "bounded-hrw":
                    bound = OVERLOAD * sum(map(load, peers)) / max(len(peers), 1)
                    peers.sort(key=lambda peer: load(peer) > bound)
        return peers

    # --- figures --------------------------------------------------------------------------------

    def _close(self) -> None:
        if not self._asked:
            return
        waited = sum(
            ask.asked_s >= self._run.scenario.scenario.warmup_s and ask.first_s is None
            for ask in self._under_way
        )
        decided = max(self._asked - len(self._under_way), 1)
        self._run.figures.update(
            requests=float(self._asked),
            answered_share=min(self._whole / decided, 1.0),
            unanswered=float(waited),
            refused=float(self._refused),
            ttft_p50_s=quantile(self._ttft_s, 0.5),
            ttft_p95_s=quantile(self._ttft_s, 0.95),
            ttft_p99_s=quantile(self._ttft_s, 0.99),
            hit_share=self._cached_tokens / max(self._prompt_tokens, 1),
            interrupted=float(len(self._pauses_s)),
        )
        if self._pauses_s:
            self._run.figures["pause_p50_s"] = quantile(self._pauses_s, 0.5)
            self._run.figures["pause_p99_s"] = quantile(self._pauses_s, 0.99)
