"""Small honest stand-ins for the parts a test does not exercise.

`FakeMesh` implements `gateway.Mesh` with tables; its tunnels are real in-memory streams served by
the real tunnel app. `WordEngine` implements `engine.Engine` with a deterministic answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

import trio
import trio.testing

from meshnode import messages
from meshnode.engine import (
    ChatStyle,
    Delta,
    Embedded,
    EmbedRequest,
    Engine,
    EngineStats,
    Finish,
    ModelCard,
    Request,
    Usage,
)
from meshnode.engine.echo import EchoEngine
from meshnode.errors import (
    EngineBusyError,
    EngineError,
    NoReplicaError,
    PeerUnreachableError,
    RemoteProtocolError,
    RequestError,
    UnknownModelError,
)
from meshnode.fence import Fence
from meshnode.gateway import Candidate, Route, ServedModel, Upstream
from meshnode.gateway.metrics import Metrics
from meshnode.transport.http import AsgiApp, serve_asgi

DIGEST = "ab" * 32
MODEL = "words"


def card(name: str = MODEL, digest: str = DIGEST) -> ModelCard:
    return ModelCard(name, digest, f"/models/{name}.gguf", 1, "llama", "Q4_1", 1, 512)


async def no_pace() -> None:
    await trio.lowlevel.checkpoint()


@dataclass
class WordEngine:
    """Answers with the words of the last message, again and again, one word per token.

    `pace` is awaited before each token. `die_after` tokens it raises `EngineError`.
    Its vectors are an echo's; `die_after` so many it raises as well.
    With `tells_ids` its answers can be continued, also by another one; token n has id 100 + n.
    """

    pace: Callable[[], Awaitable[None]] = no_pace
    tokens_default: int = 5
    die_after: int | None = None
    busy: bool = False
    tells_ids: bool = False
    style: ChatStyle = field(default_factory=ChatStyle)
    running: int = 0
    produced: int = 0
    requests: list[Request | EmbedRequest] = field(default_factory=list)

    def stats(self) -> EngineStats:
        return EngineStats(
            card(), "ready", 1.0, None, 512, 1, self.running, 0, 512, 0.0, 0.0, 1, (),
            style=self.style,
        )  # fmt: skip

    def generate(
        self, request: Request
    ) -> AbstractAsyncContextManager[AsyncGenerator[Delta | Finish, None]]:
        return self._generate(request)

    @asynccontextmanager
    async def _generate(self, request: Request):  # type: ignore[no-untyped-def]
        if self.busy:
            raise EngineBusyError("The queue is full.", 3.0)
        if request.prompt == ():
            raise RequestError("The `prompt` is empty.", param="prompt")
        self.requests.append(request)
        self.running += 1
        try:
            async with aclosing(self._tokens(request)) as tokens:
                yield tokens
        finally:
            self.running -= 1

    def embed(self, request: EmbedRequest) -> AbstractAsyncContextManager[Embedded]:
        if self.busy:
            raise EngineBusyError("The queue is full.", 3.0)
        self.requests.append(request)
        return EchoEngine(break_after_tokens=self.die_after).embed(request)

    async def count(self, request: Request) -> int:
        if self.busy:
            raise EngineBusyError("The queue is full.", 3.0)
        self.requests.append(request)
        return await EchoEngine().count(request)

    async def _tokens(self, request: Request) -> AsyncGenerator[Delta | Finish, None]:
        prompt = request.prompt
        if isinstance(prompt, str):
            text = prompt
        else:
            last = prompt[-1]
            text = str(last) if isinstance(last, int) else last.content
        words = text.split() or [""]
        total = request.max_tokens if request.max_tokens is not None else self.tokens_default
        begin, come = 0, request.continuation
        if come is not None:
            begin = len(come.tokens)
            assert come.tokens == tuple(range(100, 100 + begin))
            assert come.chars == sum(len(words[n % len(words)]) + 1 for n in range(begin))
        for index in range(begin, total):
            await self.pace()
            if index == self.die_after:
                raise EngineError("The engine process died.")
            self.produced += 1
            ids = (100 + index,) if self.tells_ids else ()
            yield Delta(words[index % len(words)] + " ", ids=ids)
        await self.pace()
        yield Finish("length", Usage(len(words), 1, total))


GROUP = "c0" * 16


@dataclass(frozen=True)
class FakeDecision:
    """An epoch and what would prove it, were it signed."""

    epoch: int
    proof: bytes


def a_decision(epoch: int) -> FakeDecision:
    voter = "1" * 46
    header = messages.Header(
        group=GROUP,
        epoch=epoch,
        previous=bytes(32),
        proposer=voter,
        voters=(voter,),
        body=bytes(32),
    )
    newest = messages.Handover(header, certificate=None)
    proof = messages.Decided(b"genesis", (), newest, messages.Body())
    return FakeDecision(epoch, messages.encode(proof))


def newest_header(decided: bytes) -> messages.Header:
    """Raises `RemoteProtocolError` for anything but a decision."""
    newest = messages.decode(decided, messages.Decided).newest
    if newest is None:
        raise RemoteProtocolError("There is no decision in it.")
    return newest.header


@dataclass
class FakeMesh:
    """A mesh of tables. `open_stream` maps peers to ways of reaching them."""

    peer_id: str = "peer-a"
    engines: dict[str, WordEngine] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    tunnels: dict[str, Callable[[], Awaitable[trio.abc.HalfCloseableStream]]] = field(
        default_factory=dict
    )
    state: str = "ready"
    calls: list[tuple[str, str]] = field(default_factory=list)
    sessions: list[bytes] = field(default_factory=list)
    fences: list[Fence | None] = field(default_factory=list)
    decided: FakeDecision | None = None
    upstreams: dict[str, Upstream] = field(default_factory=dict)
    approximate: messages.Approximate | None = None
    counted: Metrics = field(default_factory=Metrics)

    def models(self) -> tuple[ServedModel, ...]:
        served_by = tuple(c.peer_id for c in self.candidates)
        return (
            ServedModel(MODEL, DIGEST, 1700000000, 512, self.state, served_by, self.approximate),
        )

    def route(self, model: str, session: bytes, prompt_bytes: int, *, again: bool = False) -> Route:
        if again:
            self.calls.append(("again", model))
        else:
            self.sessions.append(session)
        if model != MODEL:
            raise UnknownModelError(model, (MODEL,))
        if not self.candidates:
            raise NoReplicaError(model, "loading", 7.2)
        # As the dispatcher does it: who broke a request just now is asked last.
        failed = {peer for said, peer in self.calls if said == "failed"}
        ranked = sorted(self.candidates, key=lambda candidate: candidate.peer_id in failed)
        return Route(MODEL, DIGEST, tuple(ranked), self.approximate)

    def routed(self, route: Route, peer_id: str, session: bytes) -> None:
        self.calls.append(("routed", peer_id))

    def finished(self, route: Route, peer_id: str) -> None:
        self.calls.append(("finished", peer_id))

    def failed(self, peer_id: str) -> None:
        self.calls.append(("failed", peer_id))

    def refused(self, route: Route) -> None:
        self.calls.append(("refused", route.model))

    def check(self, fence: Fence | None, digest: str) -> bytes | None:
        self.fences.append(fence)
        if fence is None or self.decided is None or fence.epoch >= self.decided.epoch:
            return None
        return self.decided.proof

    def learn(self, peer_id: str, decided: bytes) -> None:
        """Believes what decodes: who may prove what is the node's to decide."""
        self.calls.append(("learn", peer_id))
        header = newest_header(decided)
        if self.decided is None or header.epoch > self.decided.epoch:
            self.decided = FakeDecision(header.epoch, decided)
            fence = Fence(header.group, header.epoch, "0.whole")
            self.candidates = tuple(replace(each, fence=fence) for each in self.candidates)

    def engine(self, digest: str) -> Engine | None:
        engine = self.engines.get(digest)
        return None if engine is None else self.counted.metered(engine)

    def upstream(self, digest: str) -> Upstream | None:
        return self.upstreams.get(digest)

    def is_fronted(self, model: str) -> bool:
        fronted = [each.upstream for each in self.candidates]
        return model == MODEL and bool(fronted) and all(fronted)

    async def open_tunnel(self, peer_id: str) -> trio.abc.HalfCloseableStream:
        if peer_id not in self.tunnels:
            raise PeerUnreachableError(f"No address of {peer_id} answered.")
        return await self.tunnels[peer_id]()

    def metrics(self) -> bytes:
        return self.counted.text(engine.stats() for engine in self.engines.values())

    def ready(self) -> tuple[bool, str]:
        return self.state == "ready", self.state


def local_mesh(engine: WordEngine, peer_id: str = "peer-a") -> FakeMesh:
    """A mesh of one node that has the engine."""
    return FakeMesh(peer_id, {DIGEST: engine}, (Candidate(peer_id, True, "only"),))


def tunnel_to(
    app: AsgiApp,
    nursery: trio.Nursery,
    streams: list[trio.abc.HalfCloseableStream] | None = None,
    pair: Callable[[], tuple[trio.StapledStream, trio.StapledStream]] = (
        trio.testing.memory_stream_pair
    ),
) -> Callable[[], Awaitable[trio.abc.HalfCloseableStream]]:
    """A way to reach `app` over fresh in-memory streams; `streams` collects the near ends."""

    async def open_stream() -> trio.abc.HalfCloseableStream:
        near, far = pair()
        if streams is not None:
            streams.append(near)
        nursery.start_soon(serve_asgi, far, app, {"client": ("peer-a", 0)})
        return near

    return open_stream
