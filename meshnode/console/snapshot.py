"""The state of a node at one instant, as `meshnode status` and the console show it."""

from __future__ import annotations

from msgspec import Struct


class MeshSnapshot(Struct, frozen=True):
    name: str
    id: str
    admission: str


class ModelSnapshot(Struct, frozen=True):
    """One of our own engines. `progress` is 0..1 while loading; rates are tokens per second."""

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
    """A model of the mesh and who serves it."""

    id: str
    digest: str
    state: str
    context_tokens: int
    served_by: tuple[str, ...]


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
    refused: dict[str, int]
    dht_peers: int
    warnings: tuple[str, ...]
