"""The state of a node at one instant, as `meshnode status` and the console show it."""

from __future__ import annotations

from msgspec import Struct

from meshnode.messages import Approximate


class MeshSnapshot(Struct, frozen=True):
    """`root_key_here`: this node made the mesh, founds its group and may recover it."""

    name: str
    id: str
    admission: str
    root_key_here: bool = False


class SpeculationSnapshot(Struct, frozen=True):
    """As `engine.SpeculationStats`."""

    on: bool
    passes: int
    proposed: int
    accepted: int


class ModelSnapshot(Struct, frozen=True):
    """One of our own models, loaded or not. `progress` is 0..1 while loading; rates are tokens per
    second; `speculation` is None where nobody guesses ahead. `parts` are the layers that are here
    of a model that is cut, and `ring` the peers that answer together, if we are their head;
    `self_test` says whether they say what the whole model, or an earlier ring, has said here.
    `approximate` is None for what is no expert shard."""

    name: str
    digest: str
    state: str
    progress: float
    error: str | None
    slots: int
    slots_busy: int
    queue_depth: int
    context_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    memory_bytes: int
    saved_tokens: int = 0
    speculation: SpeculationSnapshot | None = None
    parts: tuple[PartSnapshot, ...] = ()
    ring: tuple[str, ...] = ()
    self_test: str = ""
    approximate: Approximate | None = None


class PartSnapshot(Struct, frozen=True):
    """Layers `first` to `end - 1` of a model, on this node; `steps` it has computed so far."""

    first: int
    end: int
    state: str
    error: str | None
    memory_bytes: int
    steps: int


class OfferSnapshot(Struct, frozen=True):
    """A model of a peer."""

    name: str
    digest: str
    state: str


class PeerSnapshot(Struct, frozen=True):
    """A connected member. `clock_ahead_s` is its wall clock minus ours, at its hello."""

    peer_id: str
    roles: tuple[str, ...]
    addrs: tuple[str, ...]
    rtt_ms: float | None
    clock_ahead_s: float
    models: tuple[OfferSnapshot, ...]
    memory_bytes: int
    cores: int
    accelerator: str


class MeshModelSnapshot(Struct, frozen=True):
    """A model of the mesh and who serves it; `approximate` is None for a whole model."""

    id: str
    digest: str
    state: str
    context_tokens: int
    served_by: tuple[str, ...]
    approximate: Approximate | None = None


class VoterSnapshot(Struct, frozen=True):
    """`alive`, as far as this node can tell."""

    peer_id: str
    alive: bool


class ItemSnapshot(Struct, frozen=True):
    """One row of the register: a part of a replica of a model, and who has it.

    `layers` is empty for a whole replica, else such as "0–11 of 30".
    """

    model: str
    name: str
    replica: int
    layers: str
    owner: str
    standbys: tuple[str, ...]
    state: str
    bytes: int


class ClaimSnapshot(Struct, frozen=True):
    """An exclusive right, and who holds it since which epoch."""

    right: str
    holder: str
    since: int


class OrderSnapshot(Struct, frozen=True):
    """An order in force. `subject` is a model's digest, `name` what people call it."""

    action: str
    subject: str
    name: str
    peer: str
    given_by: str


class TroubleSnapshot(Struct, frozen=True):
    """What is degraded, and what would fix it."""

    what: str
    fix: str


class GroupSnapshot(Struct, frozen=True):
    """Who decides, what is decided, and how well that goes.

    `faults` is "crash" or "byzantine"; `votes`: this node is a voter; `abstains`: and has lost
    what it said as one. `lease_s`: how much longer its own exclusive rights are safe.
    """

    id: str
    epoch: int
    faults: str
    voters: tuple[VoterSnapshot, ...]
    quorum: int
    leader: str
    votes: bool
    abstains: bool
    deciding: bool
    view: int
    items: tuple[ItemSnapshot, ...]
    claims: tuple[ClaimSnapshot, ...]
    orders: tuple[OrderSnapshot, ...]
    lease_s: float
    trouble: tuple[TroubleSnapshot, ...]


class Snapshot(Struct, frozen=True):
    """Everything; `refused` counts what this node turned away, by reason."""

    peer_id: str
    mesh: MeshSnapshot
    role: str
    version: str
    uptime_s: float
    api_url: str
    addrs: tuple[str, ...]
    ready: bool
    reason: str
    models: tuple[ModelSnapshot, ...]
    peers: tuple[PeerSnapshot, ...]
    mesh_models: tuple[MeshModelSnapshot, ...]
    groups: tuple[GroupSnapshot, ...]
    refused: dict[str, int]
    dht_peers: int
    warnings: tuple[str, ...]
