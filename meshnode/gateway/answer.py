"""One request, one answer: from a local engine, or through a tunnel from a peer.

Decides when to turn to the next candidate and what a client sees when nobody can go on. Does not
know how candidates were ranked, what a decision says, nor what the bytes of a peer's answer say.

An attempt has three moments: it is *accepted* (the engine has queued it, or the peer sent its
head), its *first bytes* come, and it *ends*. Until the first bytes of a stream, or until the end
of a whole answer, nothing has reached the client, and the next candidate can take over unseen.
After that another replica goes on where the lost one was (`resume.py`): the client sees a pause.
If nobody can, it gets an explicit error event; it never sees a silent cut.

A route follows a decision of the group. A peer that knows a newer one computes nothing and sends
the proof of it instead: the node learns, and the request is routed again, unseen as well.

Everything an attempt holds open (engine context, tunnel stream) hangs on the `AsyncExitStack` of
its request: when the client leaves, it is left at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
import trio

from meshnode.engine import Continuation, Delta, Embedded, Engine, Finish
from meshnode.errors import (
    ApproximateOnlyError,
    EngineBusyError,
    EngineError,
    MeshnodeError,
    NoReplicaError,
    NoVisionError,
    PeerUnreachableError,
    RemoteProtocolError,
    RequestError,
    UnknownModelError,
)
from meshnode.fence import FENCE_HEADER
from meshnode.gateway import (
    APPROXIMATE_HEADER,
    VIA_HEADER,
    Candidate,
    Mesh,
    PassedAnswer,
    Route,
    Upstream,
)
from meshnode.gateway.counting import Count, encode_count
from meshnode.gateway.embeddings import Embed, Rerank
from meshnode.gateway.openai import Call, Encoder, encode_error_event
from meshnode.gateway.passing import Passed
from meshnode.gateway.resume import (
    CONTINUE_HEADER,
    OPENING_NOTE,
    Progress,
    join_continuation,
    note,
)
from meshnode.messages import MESSAGE_BYTES_MAX, Approximate
from meshnode.transport.http import HttpResponse, TunnelPool

__all__ = [
    "CREATED_HEADER",
    "DECIDED_TYPE",
    "DIGEST_HEADER",
    "HOPS_HEADER",
    "REQUEST_ID_BYTES",
    "REQUEST_ID_HEADER",
    "RETRY_HEADER",
    "SERVED_BY_HEADER",
    "SESSION_HEADER",
    "Answer",
    "Ask",
    "Attempt",
    "NobodyAnsweredError",
    "answer",
    "answer_locally",
    "answer_upstream",
]

HOPS_HEADER = "x-meshnode-hops"
SESSION_HEADER = "x-meshnode-session"
DIGEST_HEADER = "x-meshnode-digest"
CREATED_HEADER = "x-meshnode-created"
RETRY_HEADER = "x-meshnode-retry"
REQUEST_ID_HEADER = "x-request-id"
# 96 bits: unique among all requests of all nodes.
REQUEST_ID_BYTES = 12
SERVED_BY_HEADER = "x-meshnode-served-by"
ROUTE_HEADER = "x-meshnode-route"
UPSTREAM_HEADER = "x-meshnode-upstream"
"""`1`: a server of another kind gave this answer; it is passed on as it came."""
DECIDED_TYPE = "application/vnd.meshnode.decided"
"""Of the body of a 409: an encoded `messages.Decided`, newer than the request's fence."""

# A peer accepts after tokenising and queueing, not after prefill: ten seconds is an overloaded or
# half-dead peer, and the next one is probably idle.
ACCEPT_TIMEOUT_S = 10.0
# And its images arrive before that: the slowest link on which anybody sends some.
UPLOAD_BYTES_PER_S_MIN = 500_000
# Some servers send no head before all of their answer is computed; the peer in front of one gives
# up on it after ten minutes (upstream/caller.py), and says so. A peer that dies is noticed anyway.
UPSTREAM_ACCEPT_TIMEOUT_S = 630.0
# What a server says that is full, or not up yet: another replica may have room.
_TRY_ELSEWHERE = (429, 503)
_KEPT_HEADERS = ("content-encoding", "retry-after")
# A whole answer of 128 Ki tokens with all of its text escaped stays below this.
WHOLE_ANSWER_BYTES_MAX = 16 * 1024 * 1024
# One event carries the text of a few tokens; a peer that sends more without an end is hostile.
EVENT_BYTES_MAX = 1024 * 1024
# A refusal names its reason in a sentence or two.
REFUSAL_BYTES_MAX = 16 * 1024
# Each time this node has learned a newer decision. Epochs are seconds apart and a request is
# routed in milliseconds: whoever fences a fourth time lies, or decides what we cannot verify.
REROUTES_MAX = 3
# A stream outlives this many replicas. A request that kills a third engine is what kills them.
RESUMES_MAX = 2
# Somebody should be able to go on by then: an engine is restarted within seconds, a standby is
# loaded and serves within five (agreement). A client waits about as long for a first token.
RESUME_WITHIN_S = 15.0
RESUME_EVERY_S = 0.25
# What a client should wait when everybody failed: about the time in which a peer is declared dead.
RETRY_AFTER_FAILURE_S = 5.0


@dataclass(frozen=True, slots=True)
class Ask:
    """A request on its way: understood, named, and still as it came.

    `created` is the answer's date in Unix seconds, whoever gives it, and `continuation` how far
    it has come. `via` are the nodes that have passed it on to servers behind them. `exact`: an
    approximation may not answer it.
    """

    call: Call | Count | Embed | Rerank | Passed
    id: str
    session: bytes
    target: str
    body: bytes
    created: int = field(default_factory=lambda: int(time.time()))
    continuation: Continuation | None = None
    via: tuple[str, ...] = ()
    exact: bool = False

    @property
    def prompt_bytes(self) -> int:
        """About how much of it is text."""
        images_bytes = self.call.images_bytes if isinstance(self.call, Call | Count) else 0
        return max(0, len(self.body) - images_bytes)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back: `body` yields bytes; b"" means "send the head now".

    `passed`: a server of another kind gave it, and these headers with it. `approximate`: the model
    that gave it is an approximation.
    """

    status: int
    content_type: str
    served_by: str
    route: Literal["local", "tunnel"]
    body: AsyncIterator[bytes]
    passed: Mapping[str, str] | None = None
    approximate: Approximate | None = None

    @property
    def is_stream(self) -> bool:
        """Whether the body is a sequence of events; all of ours are, but for refusals."""
        return self.content_type.startswith("text/event-stream")

    @property
    def headers(self) -> dict[str, str]:
        """What goes before the body, whoever carries it."""
        headers = {
            "content-type": self.content_type,
            SERVED_BY_HEADER: self.served_by,
            ROUTE_HEADER: self.route,
        }
        if self.approximate is not None:
            headers[APPROXIMATE_HEADER] = str(self.approximate)
        if self.passed is not None:
            headers |= {**self.passed, UPSTREAM_HEADER: "1"}
        if self.is_stream:
            headers["cache-control"] = "no-cache"
            headers["x-accel-buffering"] = "no"  # nginx in between would hold the tokens back
        return headers


@dataclass(frozen=True, slots=True)
class Attempt:
    """A candidate that did not answer, and why in one word."""

    peer_id: str
    reason: str


class NobodyAnsweredError(MeshnodeError):
    """Every candidate was tried and none began to answer (HTTP 503 with Retry-After)."""

    def __init__(self, model: str, attempts: list[Attempt], retry_after_s: float) -> None:
        tried = ", ".join(f"{attempt.peer_id}: {attempt.reason}" for attempt in attempts)
        super().__init__(f"Nobody who has the model `{model}` could answer ({tried}). Try again.")
        self.attempts = tuple(attempts)
        self.state = "busy" if all(a.reason == "busy" for a in attempts) else "failed"
        self.retry_after_s = retry_after_s


class _FencedError(MeshnodeError):
    """The candidate knows a newer decision than the one that the route to it follows."""


class _ElsewhereError(EngineError):
    """A server of another kind is full; `said` is how it said so, whole."""

    def __init__(self, said: Answer) -> None:
        super().__init__(f"The server behind {said.served_by} answered with {said.status}.")
        self.said = said


# What another candidate may still cure. A `RequestError` is an `EngineError` that it may not.
_Lost = (PeerUnreachableError, RemoteProtocolError, EngineError, _FencedError)


async def answer(mesh: Mesh, pool: TunnelPool, ask: Ask, stack: AsyncExitStack) -> Answer:
    """Answer a client: candidate after candidate, until one has begun.

    `stack` is closed when the request is over, however it ends.
    Raises `UnknownModelError`, `NoReplicaError`, `RequestError` or `NobodyAnsweredError`.
    """
    held = await stack.enter_async_context(AsyncExitStack())
    begun = await _Search(mesh, pool, ask).begin(held)
    if not begun.is_stream:
        return begun
    if begun.passed is None:
        body = _carried_on(mesh, pool, ask, begun, held)
    else:
        body = _to_its_end(mesh, begun)
    return replace(begun, body=await stack.enter_async_context(aclosing(body)))


async def answer_locally(
    engine: Engine, ask: Ask, digest: str, peer_id: str, stack: AsyncExitStack
) -> Answer:
    """Answer from an engine of this node, from the moment it has accepted.

    A stream has the notes of `resume.py` in it, for a gateway, here or far, to take off.
    The body raises `EngineError` if the engine dies midway. Raises what `Engine.generate` raises.
    """
    if isinstance(ask.call, Passed):
        raise EngineError(f"The model `{ask.call.model}` was loaded here a moment ago.")
    if isinstance(ask.call, Count):
        return await _count_locally(engine, ask, ask.call, peer_id)
    if not isinstance(ask.call, Call):
        return await _read_locally(engine, ask.call, ask.id, peer_id, stack)
    style = engine.stats().style
    request = ask.call.request(ask.id, ask.session, style)
    request = replace(request, continuation=ask.continuation)
    events = await stack.enter_async_context(engine.generate(request))
    come = ask.continuation
    encoder = Encoder(ask.call, ask.id, digest, ask.created, style, come)
    body = await stack.enter_async_context(
        aclosing(
            _streamed(events, encoder, opened=come is not None, noted=ask.call.is_resumable)
            if ask.call.stream
            else _collected(events, encoder, ask.call.n)
        )
    )
    content_type = "text/event-stream" if ask.call.stream else "application/json"
    return Answer(200, content_type, peer_id, "local", body)


async def _read_locally(
    engine: Engine, call: Embed | Rerank, id: str, peer_id: str, stack: AsyncExitStack
) -> Answer:
    """Embeddings from an engine of this node, from the moment it has accepted."""
    embedded = await stack.enter_async_context(engine.embed(call.embed_request(id)))
    body = await stack.enter_async_context(aclosing(_embedded(embedded, call, id)))
    return Answer(200, "application/json", peer_id, "local", body)


async def _count_locally(engine: Engine, ask: Ask, count: Count, peer_id: str) -> Answer:
    request = count.call.request(ask.id, ask.session, engine.stats().style)
    body = encode_count(await engine.count(request))
    return Answer(200, "application/json", peer_id, "local", _once(body))


async def answer_upstream(
    upstream: Upstream,
    path: str,
    body: bytes,
    via: tuple[str, ...],
    peer_id: str,
    stack: AsyncExitStack,
) -> Answer:
    """Answer from a server of another kind, from the moment that its head is here.

    Raises what `Upstream.ask` raises; so does the body.
    """
    said = await stack.enter_async_context(upstream.ask(path, body, via))
    return _passed(said, peer_id, "local")


def _passed(said: PassedAnswer, peer_id: str, route: Literal["local", "tunnel"]) -> Answer:
    headers = dict(said.headers)
    content_type = headers.pop("content-type", "application/json")
    return Answer(said.status, content_type, peer_id, route, said.body, passed=headers)


class _Search:
    """One request's way from candidate to candidate."""

    def __init__(self, mesh: Mesh, pool: TunnelPool, ask: Ask, *, again: bool = False) -> None:
        """`again`: it is not the first search for this request.

        Raises `UnknownModelError`, `NoReplicaError` or `RequestError`.
        """
        self._mesh = mesh
        self._pool = pool
        self._ask = ask
        self._again = again
        self._route = self._find_route(again=again)
        self._candidates = self._able()
        self._attempts: list[Attempt] = []
        self._reroutes_left = REROUTES_MAX
        self._retry_after_s = RETRY_AFTER_FAILURE_S
        self._said: Answer | None = None

    async def begin(self, stack: AsyncExitStack) -> Answer:
        """The first answer to begin; what it holds open is left with `stack`.

        Raises what `answer` raises.
        """
        blind: NoVisionError | None = None
        while self._candidates:
            candidate = self._candidates.popleft()
            try:
                async with AsyncExitStack() as attempt:
                    begun = await _begin(
                        self._mesh, self._pool, self._ask, self._route, candidate, attempt
                    )
                    await stack.enter_async_context(attempt.pop_all())
                    return begun
            except _Lost as error:
                if isinstance(error, EngineError) and not error.retry_elsewhere:
                    raise
                if isinstance(error, _FencedError) and self._reroutes_left:
                    self._reroutes_left -= 1
                    self._route_again()
                elif isinstance(error, NoVisionError):  # it has not failed: others may see
                    blind = error
                else:
                    self._lose(candidate, error)
        if blind is not None and not self._attempts:
            raise blind
        if not self._again and any(attempt.reason == "busy" for attempt in self._attempts):
            self._mesh.refused(self._route)
        if self._said is not None:
            return self._said
        raise NobodyAnsweredError(self._route.model, self._attempts, self._retry_after_s)

    def _route_again(self) -> None:
        """By what the node has learned meanwhile, without those that have failed this request."""
        tried = {attempt.peer_id for attempt in self._attempts}
        self._route = self._find_route(again=True)
        self._candidates = deque(c for c in self._able() if c.peer_id not in tried)

    def _able(self) -> deque[Candidate]:
        """Those of the route that know this kind of request."""
        candidates = deque(self._route.candidates)
        if isinstance(self._ask.call, Count):
            candidates = deque(each for each in candidates if not each.upstream)
        if not candidates:
            raise RequestError(
                "`model`: one of a server behind a node; such are not asked to count tokens.",
                param="model",
                code="unsupported_parameter",
            )
        return candidates

    def _find_route(self, *, again: bool) -> Route:
        ask = self._ask
        route = self._mesh.route(ask.call.model, ask.session, ask.prompt_bytes, again=again)
        if ask.exact and route.approximate is not None:
            raise ApproximateOnlyError(route.model, str(route.approximate))
        return route

    def _lose(self, candidate: Candidate, error: MeshnodeError) -> None:
        self._mesh.failed(candidate.peer_id)
        self._attempts.append(Attempt(candidate.peer_id, _reason(error)))
        if isinstance(error, _ElsewhereError):
            self._said = self._said or error.said
        if isinstance(error, EngineBusyError):
            self._retry_after_s = min(self._retry_after_s, error.retry_after_s)


async def _begin(
    mesh: Mesh,
    pool: TunnelPool,
    ask: Ask,
    route: Route,
    candidate: Candidate,
    stack: AsyncExitStack,
) -> Answer:
    """One candidate's answer, once its first bytes are here. Raises one of `_Lost`."""
    if candidate.upstream and ask.continuation is not None:
        raise EngineError("A server of another kind cannot go on in the middle of an answer.")
    # Counted before it is sent: the next request of a burst must see this one.
    mesh.routed(route, candidate.peer_id, ask.session)
    stack.callback(mesh.finished, route, candidate.peer_id)
    if candidate.local:
        if mesh.check(candidate.fence, route.digest) is not None:
            raise _FencedError("A newer decision was learned a moment ago.")
        accepted = await _answer_here(mesh, ask, route, stack)
    else:
        accepted = await _answer_remotely(mesh, pool, ask, route.digest, candidate, stack)
    if accepted.passed is not None and accepted.status in _TRY_ELSEWHERE:
        raise _ElsewhereError(replace(accepted, body=_once(await _whole(accepted.body))))
    if accepted.is_stream:
        events = accepted.body
        if accepted.passed is not None:
            events = await stack.enter_async_context(aclosing(_whole_events(events)))
        body = _from_first(await _first_bytes(events), events)
    else:
        body = _once(await _whole(accepted.body))
    body = await stack.enter_async_context(aclosing(body))
    return replace(accepted, body=body, approximate=route.approximate)


async def _answer_here(mesh: Mesh, ask: Ask, route: Route, stack: AsyncExitStack) -> Answer:
    engine = mesh.engine(route.digest)
    if engine is not None:
        return await answer_locally(engine, ask, route.digest, mesh.peer_id, stack)
    upstream = mesh.upstream(route.digest)
    if upstream is None:
        raise EngineError(f"The model `{route.model}` was unloaded a moment ago.")
    return await answer_upstream(upstream, ask.target, ask.body, ask.via, mesh.peer_id, stack)


# ---------------------------------------------------------------------------------------------
# From a local engine
# ---------------------------------------------------------------------------------------------


async def _streamed(
    events: AsyncIterator[Delta | Finish], encoder: Encoder, *, opened: bool, noted: bool
) -> AsyncGenerator[bytes, None]:
    """`noted`: another engine could go on with this answer, and notes tell it where."""
    yield b""
    # The role goes out with the first text, not before: until then another replica may take over.
    opening = b"" if opened else encoder.opening()
    unnoted: list[Delta] = []
    async for event in events:
        if isinstance(event, Finish):
            yield opening + encoder.closing(event)
            opening = b""
            if encoder.is_complete:
                return
        elif event.text or event.logprobs:
            unnoted.append(event)
            said = encoder.delta(event)
            if said:  # the beginning of a tag, or of a call, is silent
                told = note(unnoted, *encoder.place) if noted else b""
                if opening and told:
                    opening = OPENING_NOTE + opening
                yield opening + told + said
                opening = b""
                unnoted.clear()
    raise EngineError("The engine ended without a finish.")


async def _collected(
    events: AsyncIterator[Delta | Finish], encoder: Encoder, choices: int
) -> AsyncGenerator[bytes, None]:
    yield b""
    come: list[Delta | Finish] = []
    async for event in events:
        come.append(event)
        choices -= isinstance(event, Finish)
        if not choices:
            yield encoder.whole(come)
            return
    raise EngineError("The engine ended without a finish.")


async def _embedded(
    embedded: Embedded, call: Embed | Rerank, id: str
) -> AsyncGenerator[bytes, None]:
    yield b""
    vectors = [vector async for vector in embedded.vectors]
    yield call.encode(id, vectors, embedded.prompt_tokens)


# ---------------------------------------------------------------------------------------------
# From a peer
# ---------------------------------------------------------------------------------------------


async def _answer_remotely(
    mesh: Mesh,
    pool: TunnelPool,
    ask: Ask,
    digest: str,
    candidate: Candidate,
    stack: AsyncExitStack,
) -> Answer:
    """A peer's answer, from the moment it has accepted. A 4xx is an answer; a 5xx is a loss."""
    peer_id = candidate.peer_id
    headers = [
        (b"host", b"meshnode"),
        (b"content-type", b"application/json"),
        (HOPS_HEADER.encode(), b"1"),
        (SESSION_HEADER.encode(), ask.session.hex().encode()),
        (DIGEST_HEADER.encode(), digest.encode()),
        (REQUEST_ID_HEADER.encode(), ask.id.encode()),
        (CREATED_HEADER.encode(), b"%d" % ask.created),
    ]
    accept_s = UPSTREAM_ACCEPT_TIMEOUT_S if candidate.upstream else ACCEPT_TIMEOUT_S
    accept_s += len(ask.body) / UPLOAD_BYTES_PER_S_MIN
    body = ask.body
    if ask.continuation is not None:
        come, body = join_continuation(ask.continuation, body)
        headers.append((CONTINUE_HEADER.encode(), come.encode()))
    if ask.via:
        headers.append((VIA_HEADER.encode(), ",".join(ask.via).encode()))
    if candidate.fence is not None:
        headers.append((FENCE_HEADER.encode(), str(candidate.fence).encode()))
    try:
        with trio.fail_after(accept_s):
            response = await stack.enter_async_context(
                pool.request(peer_id, "POST", ask.target, headers, body)
            )
            content_type = (response.header(b"content-type") or b"application/json").decode(
                "latin-1"
            )
            is_passed = response.header(UPSTREAM_HEADER.encode()) is not None
            if not is_passed and response.status == 409 and content_type == DECIDED_TYPE:
                mesh.learn(peer_id, await response.read(MESSAGE_BYTES_MAX))
                raise _FencedError(f"Peer {peer_id} follows a newer decision.")
            elsewhere = response.header(RETRY_HEADER.encode()) == b"elsewhere"
            if elsewhere and response.status in (400, 503):
                refusal = await response.read(REFUSAL_BYTES_MAX)
                raise _refused(response, refusal, peer_id, ask.call.model)
    except trio.TooSlowError:
        raise PeerUnreachableError(
            f"Peer {peer_id} did not accept the request within {accept_s:.0f} s."
        ) from None
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise PeerUnreachableError(f"The tunnel to peer {peer_id} broke.") from error
    if is_passed:
        chunks = await stack.enter_async_context(aclosing(_bytes(response, peer_id)))
        said = PassedAnswer(
            response.status, _kept(response) | {"content-type": content_type}, chunks
        )
        return _passed(said, peer_id, "tunnel")
    if response.status != 200 and not 400 <= response.status < 500:
        raise RemoteProtocolError(f"Peer {peer_id} answered with status {response.status}.")
    passed_on = _events if content_type.startswith("text/event-stream") else _bytes
    answered = await stack.enter_async_context(aclosing(passed_on(response, peer_id)))
    return Answer(response.status, content_type, peer_id, "tunnel", answered)


class _RefusalError(msgspec.Struct):
    code: str | None = None


class _Refusal(msgspec.Struct):
    """What of `openai.encode_error`'s object matters here."""

    error: _RefusalError


def _refused(response: HttpResponse, body: bytes, peer_id: str, model: str) -> EngineError:
    """Full, unable or blind: only the first says that the mesh needs more replicas."""
    try:
        refusal = msgspec.json.decode(body, type=_Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return EngineError(f"Peer {peer_id} refused without a reason.")
    if refusal.error.code == "busy":
        return EngineBusyError(f"Peer {peer_id} is busy.", _retry_after_s(response))
    if refusal.error.code == NoVisionError.CODE:
        return NoVisionError(model)
    return EngineError(f"Peer {peer_id} cannot answer for the model now.")


def _retry_after_s(response: HttpResponse) -> float:
    value = response.header(b"retry-after") or b""
    # Two digits: a peer cannot send our clients away for longer than 99 s.
    return float(value) if value.isdigit() and len(value) <= 2 else RETRY_AFTER_FAILURE_S


def _kept(response: HttpResponse) -> dict[str, str]:
    return {
        name: value.decode("latin-1")
        for name in _KEPT_HEADERS
        if (value := response.header(name.encode())) is not None
    }


async def _bytes(response: HttpResponse, peer_id: str) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in response:
            yield chunk
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise PeerUnreachableError(f"The tunnel to peer {peer_id} broke midway.") from error


async def _events(response: HttpResponse, peer_id: str) -> AsyncGenerator[bytes, None]:
    """Only whole events: a cut must not leave half of one before our error event."""
    held = b""
    async with aclosing(_bytes(response, peer_id)) as chunks:
        async for chunk in chunks:
            held += chunk
            end = held.rfind(b"\n\n") + 2
            if end > 1:
                yield held[:end]
                held = held[end:]
            elif len(held) > EVENT_BYTES_MAX:
                raise RemoteProtocolError(f"Peer {peer_id} sent an event without an end.")
    if held:
        raise RemoteProtocolError(f"Peer {peer_id} ended its answer inside an event.")


# ---------------------------------------------------------------------------------------------
# From a server of another kind, behind this node or a peer
# ---------------------------------------------------------------------------------------------

_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


async def _whole_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The very bytes, cut where events end: after a loss ours can follow. A server that forgets
    the last empty line is nobody's loss."""
    held = b""
    async for chunk in chunks:
        held += chunk
        end = max(found + len(mark) if (found := held.rfind(mark)) >= 0 else 0
                  for mark in _EVENT_ENDS)  # fmt: skip
        if end:
            yield held[:end]
            held = held[end:]
        elif len(held) > EVENT_BYTES_MAX:
            raise RemoteProtocolError("The server behind a node sent an event without an end.")
    if held:
        yield held


# ---------------------------------------------------------------------------------------------
# To the client
# ---------------------------------------------------------------------------------------------


async def _first_bytes(body: AsyncIterator[bytes]) -> bytes:
    async for chunk in body:
        if chunk:
            return chunk
    raise RemoteProtocolError("The answer was empty.")


async def _whole(body: AsyncIterator[bytes]) -> bytes:
    whole = bytearray()
    async for chunk in body:
        whole += chunk
        if len(whole) > WHOLE_ANSWER_BYTES_MAX:
            raise RemoteProtocolError(f"The answer is over {WHOLE_ANSWER_BYTES_MAX} bytes.")
    return bytes(whole)


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def _from_first(first: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    yield first
    async for chunk in rest:
        yield chunk


async def _carried_on(
    mesh: Mesh, pool: TunnelPool, ask: Ask, begun: Answer, held: AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    """A stream to its end, whoever decodes it, or to an error event that says why not.

    `held` is what `begun` holds open, and takes what its successors do.
    """
    progress = Progress()
    for resumes_left in range(RESUMES_MAX, -1, -1):
        try:
            async for events in begun.body:
                if shown := progress.feed(events):
                    yield shown
            yield progress.end()
            return
        except _Lost:
            mesh.failed(begun.served_by)
        continuation = progress.continuation()
        if continuation is None or not resumes_left:
            break
        await held.aclose()
        successor = await _resume(mesh, pool, replace(ask, continuation=continuation), held)
        if successor is None:
            break
        begun = successor
    yield _loss_of(begun)


async def _to_its_end(mesh: Mesh, begun: Answer) -> AsyncGenerator[bytes, None]:
    """A stream that nobody could go on with: to its end, or to an error event."""
    try:
        async for events in begun.body:
            yield events
    except _Lost:
        mesh.failed(begun.served_by)
        yield _loss_of(begun)


def _loss_of(begun: Answer) -> bytes:
    return encode_error_event(
        f"The replica {begun.served_by} was lost in the middle of its answer. Ask again.",
        "replica_lost",
    )


async def _resume(mesh: Mesh, pool: TunnelPool, ask: Ask, held: AsyncExitStack) -> Answer | None:
    """Another replica's stream from where `ask.continuation` ends; None if there will be none."""
    with trio.move_on_after(RESUME_WITHIN_S):
        while True:
            try:
                begun = await _Search(mesh, pool, ask, again=True).begin(held)
            except (NoReplicaError, NobodyAnsweredError, UnknownModelError):
                await trio.sleep(RESUME_EVERY_S)  # a standby may be on its way
            except EngineError:
                return None  # the request itself is refused: it cannot go on anywhere
            else:
                return begun if begun.is_stream else None
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, EngineBusyError | _ElsewhereError):
        return "busy"
    if isinstance(error, EngineError):
        return "engine"
    if isinstance(error, _FencedError):
        return "fenced"
    return "unreachable" if isinstance(error, PeerUnreachableError) else "protocol"
