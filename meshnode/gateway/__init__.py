"""HTTP in, tokens out.

In data-flow order: `openai.py` (pure: OpenAI JSON to and from `engine.Request`), `embeddings.py`
(pure: the same for vectors and ranks), `counting.py` (pure: and for counts), `keys.py` and
`door.py` (who may ask, and how often), `app.py` (quart-trio routes for clients), `session.py`
(which chat a request belongs to), `answer.py` (one request to one answer: local engine or tunnel,
next candidate on failure), `resume.py` (pure: how far an answer has come), `fields.py` (strict
decoding), `passing.py` (pure: what is read of a request that a server of another kind will judge),
`schema.py` (pure: JSON schemas to grammars), `tools.py` (pure: tools in prompts), `reading.py` with
`reasoning.py` and `calls.py` (pure: an answer's text told apart into `said.py`), `refusal.py`
(pure: our errors in OpenAI's shape), `dialects/` (other APIs, translated to and from OpenAI's
chat), `metrics.py` (what is counted), `server.py` (hypercorn on Trio), `tunnel.py` (the app for
peers). The gateway is handed a `Mesh`; it never sees a protocol core, a libp2p object or a private
key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from meshnode.engine import Engine
from meshnode.fence import Fence
from meshnode.messages import Approximate
from meshnode.transport import Stream


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that can answer, and why it stands where it stands in the ranking.

    `fence` is the decision that the route to it follows; None if the model is in no group, or
    this node knows no decision of the group yet. `upstream`: the peer fronts a server that has
    the model.
    """

    peer_id: str
    local: bool
    reason: str
    fence: Fence | None = None
    upstream: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """The ranked candidates for one request; never empty.

    `model` is the resolved public name, `digest` the bytes it stands for. `approximate`: they are
    not the whole model's.
    """

    model: str
    digest: str
    candidates: tuple[Candidate, ...]
    approximate: Approximate | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A row of /v1/models: `served_by` are the peers that can answer for it now."""

    id: str
    digest: str
    created: int
    context_tokens: int
    state: str
    served_by: tuple[str, ...]
    approximate: Approximate | None = None


VIA_HEADER = "x-meshnode-via"
"""The peer ids of the nodes that have passed a request on to a server behind them, with commas: the
server may be a node, and the last one in a circle must see that it is one."""


APPROXIMATE_HEADER = "x-meshnode-approximate"
"""How far from the whole model the one that answered is; exact answers have none."""
EXACT_HEADER = "x-meshnode-exact"
"""`required`: an approximation may not answer."""


@dataclass(frozen=True, slots=True)
class PassedAnswer:
    """What a server of another kind answered: `headers` are those that go on to the client, by
    lower-case name; `body` yields its bytes as they come."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


class Upstream(Protocol):
    """A model of a server that this node fronts."""

    def ask(
        self, path: str, body: bytes, via: tuple[str, ...]
    ) -> AbstractAsyncContextManager[PassedAnswer]:
        """Pass a request on, and enter with the head of its answer, whatever its status.

        `via` are the nodes that have passed it on so before. Leaving early closes the request at
        once. Raises `EngineError`, on entering and from the body: `EngineBusyError` beyond the
        server's bounds.
        """
        ...


class Mesh(Protocol):
    """What the gateway may ask of the node."""

    @property
    def peer_id(self) -> str: ...

    def models(self) -> tuple[ServedModel, ...]:
        """Every model that the mesh serves or is loading, by id."""
        ...

    def route(self, model: str, session: bytes, prompt_bytes: int, *, again: bool = False) -> Route:
        """Rank who should answer; records the demand.

        `again`: it is still the same request, whose first route was overtaken by a newer decision
        or by a loss; its demand is recorded already.
        Raises `UnknownModelError` or `NoReplicaError`.
        """
        ...

    def refused(self, route: Route) -> None:
        """Record that a request found nobody with room: every replica that answered was full."""
        ...

    def check(self, fence: Fence | None, digest: str) -> bytes | None:
        """Whether a request for these bytes may be served on the decision it names.

        None: go on; if the sender is ahead of us, the node asks for what it does not know yet,
        and a whole answer harms nobody meanwhile. Else an encoded `messages.Decided`: the proof
        of a higher epoch than the sender's; nothing may be computed.
        """
        ...

    def learn(self, peer_id: str, decided: bytes) -> None:
        """Take in, before returning, what a peer sent instead of an answer: hostile bytes, at
        most `messages.MESSAGE_BYTES_MAX`, that claim to be such a proof.

        Raises `RemoteProtocolError` if they are not one, which counts as the peer's failure.
        Proof of what is known already is no error: a concurrent request may have learned it.
        """
        ...

    def routed(self, route: Route, peer_id: str, session: bytes) -> None:
        """Tell the dispatcher whom the request is sent to now (it will hold the session)."""
        ...

    def finished(self, route: Route, peer_id: str) -> None:
        """Tell the dispatcher that a request it counted against a peer is over."""
        ...

    def failed(self, peer_id: str) -> None:
        """Tell the dispatcher that a peer broke a request: avoid it for a few seconds."""
        ...

    def engine(self, digest: str) -> Engine | None:
        """The local engine for these bytes, if it is loaded here."""
        ...

    def upstream(self, digest: str) -> Upstream | None:
        """The model of a server that this node fronts, if that server is well and no engine here
        has the same bytes."""
        ...

    def is_fronted(self, model: str) -> bool:
        """Whether the name means a model that only servers of other kinds answer for, as far as
        is known: what its requests may say is then for them to judge."""
        ...

    async def open_tunnel(self, peer_id: str) -> Stream:
        """A new `/http/1.1` stream to a peer. Raises `PeerUnreachableError`."""
        ...

    def metrics(self) -> bytes:
        """What this node's engines have done, in Prometheus's text format."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether new requests would be answered, and one word why not."""
        ...
