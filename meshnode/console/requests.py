"""What people and programs may ask of a node under `/api/`, and the answers.

Bodies are JSON and checked here: types, ranges, unknown fields. What the names in them mean
(nodes, models) is found out by `operations.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

INVITE_S_MAX = 365 * 24 * 3600
WHAT_IFS_MAX = 32
"""Each is one line that a person typed."""
CLAIM_WAIT_S_DEFAULT = 5.0
"""An epoch takes well under a second; five also see a change of leader through."""
CLAIM_WAIT_S_MAX = 30.0
"""Longer, and a proxy or a client gives up first."""
NEW_NODE = "new-"
"""So begin the names of nodes that are only assumed; no peer id has a hyphen."""
BYTES_MAX = 2**50
LAYERS_MAX = 4096

Name = Annotated[str, Meta(min_length=1, max_length=256)]
"""A peer or a model as people write it."""
Bytes = Annotated[int, Meta(ge=0, le=BYTES_MAX)]


class InviteOrder(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /api/invite`."""

    uses: Annotated[int, Meta(ge=1, le=10_000)] = 1
    expires_s: Annotated[int, Meta(ge=60, le=INVITE_S_MAX)] = 24 * 3600
    role: Literal["node", "gateway", "bootstrap"] = "node"


class InviteTicket(Struct, frozen=True):
    """Its answer: the token is a credential, `expires_at` is in Unix seconds."""

    token: str
    expires_at: int


# --- placement -----------------------------------------------------------------------------------


class AddNode(Struct, frozen=True, forbid_unknown_fields=True, tag_field="what_if", tag="add_node"):
    """A node that is not there, and would hold the file. `ms_per_token`: of the model asked for;
    estimated if not given."""

    memory_bytes: Bytes
    ms_per_token: Annotated[float, Meta(gt=0, le=1e6)] | None = None


class RemoveNode(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="what_if", tag="remove_node"
):
    """A node that is gone."""

    node: Name


class DrainNode(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="what_if", tag="drain_node"
):
    """A node that is to own nothing."""

    node: Name


class PinModel(Struct, frozen=True, forbid_unknown_fields=True, tag_field="what_if", tag="pin"):
    """The model asked for is pinned to a node."""

    node: Name


class SetReplicas(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="what_if", tag="replicas"
):
    """The model asked for is wanted so many times."""

    count: Annotated[int, Meta(ge=0, le=64)]


class SetMemory(Struct, frozen=True, forbid_unknown_fields=True, tag_field="what_if", tag="memory"):
    """A node offers another amount of memory."""

    node: Name
    memory_bytes: Bytes


WhatIf = AddNode | RemoveNode | DrainNode | PinModel | SetReplicas | SetMemory


class ModelFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A model that the mesh does not have, as its file describes it."""

    name: Name
    weight_bytes: Bytes
    layers: Annotated[int, Meta(ge=1, le=LAYERS_MAX)]
    kv_bytes_per_token: Bytes
    context_tokens: Annotated[int, Meta(ge=1, le=2**24)]
    compute_bytes: Bytes
    activation_bytes: Bytes


class PreviewRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /api/placement/preview`. Without `model` and `file`, of all models."""

    model: Name | None = None
    file: ModelFile | None = None
    what_if: Annotated[tuple[WhatIf, ...], Meta(max_length=WHAT_IFS_MAX)] = ()


class PartReport(Struct, frozen=True):
    """Layers `first` to `end` (exclusive) of a replica; all of them if it is whole."""

    owner: str
    first: int
    end: int
    bytes: int
    standbys: tuple[str, ...]


class ReplicaReport(Struct, frozen=True):
    """A replica and what it is predicted to do: `ms_per_token` for one request alone,
    `tokens_per_s` of many at once; from speeds that all its owners have measured, or estimated.
    `best_single_ms_per_token` is the fastest node's that could hold all of it; None if none can.
    """

    parts: tuple[PartReport, ...]
    ms_per_token: float
    tokens_per_s: float
    is_measured: bool
    best_single_ms_per_token: float | None
    note: str

    @property
    def is_cut(self) -> bool:
        return len(self.parts) > 1


class VerdictReport(Struct, frozen=True):
    """Why a node is in or out. `memory_bytes` is all that it offers."""

    node: str
    included: bool
    reason: str
    memory_bytes: int


class ChangeReport(Struct, frozen=True):
    """What a node would do that it does not do by the newest decision."""

    node: str
    action: Literal["load", "let go"]


class ModelReport(Struct, frozen=True):
    """One model's place. `missing` says what would give it a replica, if it gets none."""

    digest: str
    name: str
    layers: int
    bytes: int
    replicas_wanted: int
    replicas: tuple[ReplicaReport, ...]
    verdicts: tuple[VerdictReport, ...]
    changes: tuple[ChangeReport, ...]
    missing: str


class PlacementReport(Struct, frozen=True):
    """Answer of `POST /api/placement/preview`. `assumed` repeats the what-ifs in words;
    `postponed` loads would help but wait for a later plan."""

    epoch: int
    models: tuple[ModelReport, ...]
    assumed: tuple[str, ...]
    postponed: int


# --- orders --------------------------------------------------------------------------------------


class OrderRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /api/orders`. `model` for pins; `node` may be "self" or a part of a peer id."""

    action: Literal["pin", "unpin", "drain", "undrain"]
    node: Name
    model: Name | None = None


class OrderGiven(Struct, frozen=True):
    """Its answer: what the names mean, and what was decided when the order was given.

    `is_decided`: nothing is to be waited for; it was so already.
    """

    action: str
    model: str
    name: str
    peer: str
    group: str
    epoch: int
    is_decided: bool


class FetchRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /api/fetch`: a name, or a digest or its beginning."""

    model: Name


class FetchReport(Struct, frozen=True):
    """Its answer: how far the file is. Only what is "done" is at `path`, whole and checked."""

    model: str
    name: str
    state: Literal["fetching", "checking", "done"]
    done_bytes: int
    wanted_bytes: int
    path: str


class RecoverRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /api/recover`: no choices."""


class Recovered(Struct, frozen=True):
    """Its answer: the epochs from which each group goes on."""

    groups: dict[str, int]


class ClaimRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /api/claims`. `wait_s`: so long a claim or release waits for a decision."""

    action: Literal["claim", "release", "read"]
    right: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[!-~]+\Z")]
    wait_s: Annotated[float, Meta(ge=0.0, le=CLAIM_WAIT_S_MAX)] = CLAIM_WAIT_S_DEFAULT


class ClaimAnswer(Struct, frozen=True):
    """By the newest decision this node knows: the holder ("" for nobody) since which epoch.

    `holds`: this node holds the right at this instant, and a quorum has promised to let it.
    """

    right: str
    holder: str
    since: int
    epoch: int
    holds: bool


class Proof(Struct, frozen=True):
    """Answer of `GET /api/proof`: an encoded `messages.Decided` in base64."""

    group: str
    epoch: int
    proof: str
