"""A client's request on its way through the mesh: routed, sent, answered, continued elsewhere.

The gateway is any running node. Under the policy "ours" it asks its own stack, as the real one
does; the other policies choose among the very offers that this stack has heard of, so what they
are compared by is the choice and nothing else:

* `random`, `round-robin`; `least-load`: fewest requests per slot
* `hrw`: the top of the rendezvous hash of the session, whatever its load
* `bounded-hrw`: the first in hash order with at most 1.25 times the mean load
  (Mirrokni, Thorup and Zadimoghaddam 2016)

As in production (`gateway/answer.py`), every request under "ours" carries the decision that its
route follows, and who knows a newer one sends the proof of it instead of working (S6); who has not
accepted after `ACCEPT_TIMEOUT_S` is passed over; when the node that answers is lost, the request
goes on elsewhere with what came so far as part of its prompt, and the client sees a pause, or an
error if nobody can go on in time. A client that nobody answers asks again; one whose gateway is
gone is cut off, and counts as such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshnode.errors import NoReplicaError, UnknownModelError
from meshnode.identity import PeerId
from meshnode.messages import Decided, Offer, decode
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

# As in `meshnode.gateway.answer`, whose constants have the reasons, and which is not imported, as
# Trio would be with it.
ACCEPT_TIMEOUT_S = 10.0
RESUMES_MAX = 2
RESUME_WITHIN_S = 15.0
RESUME_EVERY_S = 0.25

BYTES_PER_TOKEN = 4
"""Of text; what a gateway knows of a prompt is its bytes (`dispatch.BYTES_PER_TOKEN`)."""
RETRY_S = 1.0
"""Nobody can answer now: asked again after this long, as a client's library does."""
GIVE_UP_S = 60.0
"""A client looks this long for somebody who takes its request."""

Broken = Callable[[str, str], None]
"""Told of a broken promise: which, and how."""


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
    resumes: int = 0
    answer_blocks: tuple[int, ...] = ()
    server: Machine | None = None
    """Where it was sent last, until that is over."""
    engine: Engine | None = None
    job: Job | None = None


class Gateways:
    """All requests of a run.

    Figures, of requests asked after the warm-up: `requests`, `cut_off` (their gateway died or was
    stopped), `answered_share` (whole answers, of those that are over and were not cut off),
    `unanswered` (nothing has come yet at the end), `ttft_p50_s`, `ttft_p95_s`, `ttft_p99_s`,
    `hit_share` (prompt tokens found in a KV cache), `interrupted` and `pause_p99_s` (of answers
    whose replica was lost), `refused` (turned away at least once), `fenced` (routed again because
    somebody knew a newer decision), `utilisation` (mean share of time with an answer under way, of
    all engines).
    """

    def __init__(self, run: Run, hosting: Hosting, broken: Broken | None = None) -> None:
        """`broken` is told of work that was taken under an older decision than its taker knew."""
        self._run = run
        self._broken = broken
        self.mute: dict[int, None] = {}
        """Machines that take requests and never answer: liars."""
        self._world = run.world
        self._hosting = hosting
        self._policy = run.scenario.routing.policy
        self._rng = stream(run.seed, "routing")
        self._turn = 0
        self._digests = {model.name: digest_of(model) for model in run.scenario.models}
        self._under_way: dict[Ask, None] = {}
        self._ttft_s: list[float] = []
        self._pauses_s: list[float] = []
        self._asked = self._whole = self._refused = self._cut_off = self._over = self._fenced = 0
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
        if ask not in self._under_way or ask.server is not None:
            return
        gateway = ask.gateway
        if gateway is None or gateway.stack is None:
            self._cut(ask)
            return
        if gateway.is_asleep:
            gateway.missed.append(lambda: self._try(ask))
            return
        ask.tries += 1
        for server in self._ranked(gateway, ask):
            if server.is_awake and not self._world.network.joins(gateway.index, server.index):
                continue
            engine = self._hosting.engine(server, self._digests[ask.model])
            if server.is_asleep or (engine is not None and not engine.is_full):
                self._send(ask, gateway, server)
                return
        if ask.tries == 1:
            self._refused += self._run.is_warm
            self._world.tell(gateway, CountRefused(ask.model))
        is_resuming = ask.first_s is not None
        patience_s = RESUME_WITHIN_S if is_resuming else GIVE_UP_S
        if self._run.now_s - ask.heard_s > patience_s:
            self._end(ask, whole=False)
        else:
            pause_s = RESUME_EVERY_S if is_resuming else RETRY_S
            self._world.loop.after(int(pause_s * NS_PER_S), self._try, ask)

    def _send(self, ask: Ask, gateway: Machine, server: Machine) -> None:
        ask.server = server
        digest = self._digests[ask.model]
        stood_on = None
        if self._policy == "ours":
            gateway.live.dispatcher.routed(digest, ask.session, server.peer_id)
            assigned = gateway.live.agreement.assigned(digest)
            stood_on = None if assigned is None else (assigned.group, assigned.epoch)
        self._travel(gateway, server, self._arrive, ask, server, server.starts, stood_on)
        timeout_ns = int(ACCEPT_TIMEOUT_S * NS_PER_S)
        self._world.loop.after(timeout_ns, self._on_timeout, ask, server, ask.tries)

    def _travel(
        self, source: Machine, target: Machine, then: Callable[..., None], *rest: object
    ) -> None:
        """Let something happen at `target` once a message from `source` has got there."""
        delay_ns = 0
        if source is not target:
            delay_ns = self._world.network.delay_ns(source.index, target.index) + target.lag_ns
        self._world.loop.after(delay_ns, then, *rest)

    def _arrive(
        self, ask: Ask, server: Machine, run: int, stood_on: tuple[str, int] | None
    ) -> None:
        if ask not in self._under_way or ask.server is not server or server.index in self.mute:
            return
        if server.is_asleep:
            server.missed.append(lambda: self._arrive(ask, server, run, stood_on))
            return
        engine = self._hosting.engine(server, self._digests[ask.model])
        if engine is None or server.starts != run:
            return  # dead: its loss will be noticed
        if self._policy == "ours" and self._fences(ask, server, stood_on):
            return
        job = Job(
            prompt_tokens=ask.prompt_tokens + ask.told_tokens,
            answer_tokens=max(ask.answer_tokens - ask.told_tokens, 1),
            blocks=ask.blocks,
            block_tokens=ask.block_tokens,
            answer_blocks=ask.answer_blocks,
            session=ask.session,
            first=lambda: self._back(ask, server, self._on_first),
            done=lambda: self._back(ask, server, self._on_done),
            stalled=lambda: self._back(ask, server, self._on_stall),
            lost=lambda: self._back(ask, server, self._on_lost),
        )
        ask.engine, ask.job = engine, job
        if not engine.submit(job):
            ask.engine = ask.job = None
            self._back(ask, server, self._on_refusal)

    def _fences(self, ask: Ask, server: Machine, stood_on: tuple[str, int] | None) -> bool:
        """Whether the server knows better than the gateway, and sends the proof instead."""
        agreement = server.live.agreement
        digest = self._digests[ask.model]
        proof = agreement.overtakes(digest, stood_on)
        if proof is not None:
            self._back(ask, server, lambda ask, _: self._on_fenced(ask, server, proof))
            return True
        known = {register.group: register.head.epoch for register in agreement.registers()}
        if stood_on is not None and known.get(stood_on[0], -1) > stood_on[1] and self._broken:
            group, epoch = stood_on
            self._broken("S6", f"{server.name} works under epoch {epoch} and knows {known[group]}")
        return False

    def _on_fenced(self, ask: Ask, server: Machine, proof: bytes) -> None:
        self._fenced += self._run.is_warm
        gateway = ask.gateway
        self._leave(ask)
        if gateway is not None and gateway.is_awake:
            self._world.learn(gateway, server, decode(proof, Decided))
        self._try(ask)

    def _on_timeout(self, ask: Ask, server: Machine, tries: int) -> None:
        """The peer has not accepted the request by now: the next one may."""
        if ask.server is server and ask.tries == tries and ask.job is None:
            self._give_up_on(ask, server)

    def _give_up_on(self, ask: Ask, server: Machine) -> None:
        gateway = ask.gateway
        if gateway is not None and gateway.stack is not None:
            gateway.stack.dispatcher.failed(server.peer_id, self._world.now_of(gateway))
        self._leave(ask)
        self._try(ask)

    def _back(self, ask: Ask, server: Machine, then: Callable[[Ask, Job | None], None]) -> None:
        """Let the gateway hear of it, one way later, if they still hear each other."""
        gateway = ask.gateway
        assert gateway is not None
        job = ask.job

        def arrive() -> None:
            for stalled in (server, gateway):
                if stalled.is_asleep:
                    stalled.missed.append(arrive)
                    return
            linked = server is gateway or server.index in gateway.links
            if ask in self._under_way and ask.server is server and linked and ask.job is job:
                then(ask, job)

        self._travel(server, gateway, arrive)

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

    def _on_stall(self, ask: Ask, job: Job | None) -> None:
        """Its replica is a pipeline that broke: no more comes until the next one stands."""
        ask.heard_s = self._run.now_s

    def _on_lost(self, ask: Ask, job: Job | None) -> None:
        """Its replica has given it back."""
        assert ask.server is not None
        self._stop(ask)
        self._give_up_on(ask, ask.server)

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
                    if ask.first_s is not None:
                        ask.resumes += 1
                    if ask.resumes > RESUMES_MAX:
                        self._leave(ask)
                        self._end(ask, whole=False)
                    else:
                        self._give_up_on(ask, ask.server)

    def _on_power(self, machine: Machine, power: Power) -> None:
        if power == "on":
            return
        for ask in self._of(lambda ask: ask.gateway is machine):
            self._stop(ask)
            self._leave(ask)
            self._cut(ask)
        for ask in self._of(lambda ask: ask.server is machine):
            self._stop(ask)

    def _cut(self, ask: Ask) -> None:
        """The gateway is gone, and with it the connection to its client."""
        if ask.asked_s >= self._run.scenario.scenario.warmup_s:
            self._cut_off += 1
        self._end(ask, whole=False, cut_off=True)

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

    def _end(self, ask: Ask, *, whole: bool, cut_off: bool = False) -> None:
        del self._under_way[ask]
        run = self._run
        run.recorder.count("answered" if whole else "cut_off" if cut_off else "given_up")
        if ask.asked_s >= run.scenario.scenario.warmup_s:
            self._over += not cut_off
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
        self._run.figures.update(
            requests=float(self._asked),
            answered_share=self._whole / max(self._over, 1),
            cut_off=float(self._cut_off),
            fenced=float(self._fenced),
            utilisation=self._hosting.utilisation(),
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
