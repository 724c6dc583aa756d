"""HTTP in, tokens out.

In data-flow order: `openai.py` (pure: OpenAI JSON to and from `engine.Request`), `keys.py` and
`door.py` (who may ask, and how often), `app.py` (quart-trio routes for clients), `session.py`
(which chat a request belongs to), `answer.py` (one request to one answer: local engine or tunnel,
next candidate on failure), `resume.py` (pure: how far an answer has come), `fields.py` (strict
decoding), `schema.py` (pure: JSON schemas to grammars), `tools.py` (pure: tools in prompts),
`reading.py` with `reasoning.py` and `calls.py` (pure: an answer's text told apart into `said.py`),
`refusal.py` (pure: our errors in OpenAI's shape), `dialects/` (other APIs, translated to and from
OpenAI's chat), `server.py` (hypercorn on Trio), `tunnel.py` (the app for peers). The
gateway is handed a `Mesh`; it never sees a protocol core, a libp2p object or a private key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from meshnode.engine import Engine
from meshnode.fence import Fence
from meshnode.transport import Stream


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that can answer, and why it stands where it stands in the ranking.

    `fence` is the decision that the route to it follows; None if the model is in no group, or
    this node knows no decision of the group yet.
    """

    peer_id: str
    local: bool
    reason: str
    fence: Fence | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """The ranked candidates for one request; never empty.

    `model` is the resolved public name, `digest` the bytes it stands for.
    """

    model: str
    digest: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A row of /v1/models: `served_by` are the peers that can answer for it now."""

    id: str
    digest: str
    created: int
    context_tokens: int
    state: str
    served_by: tuple[str, ...]


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

    async def open_tunnel(self, peer_id: str) -> Stream:
        """A new `/http/1.1` stream to a peer. Raises `PeerUnreachableError`."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether new requests would be answered, and one word why not."""
        ...
