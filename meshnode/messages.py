"""Every message that crosses the wire, frozen, with its bounds beside each field.

Encoding is msgpack by msgspec: decoding checks types, lengths and ranges and refuses unknown
fields, so a decoded message is legal. Whether it is *true* is not decided here: signatures are
`identity`'s, membership is `credentials`', freshness is the protocol cores'.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from meshnode.errors import LocalProtocolError, RemoteProtocolError

MESSAGE_BYTES_MAX = 256 * 1024
"""The largest control message: a `Peers` reply with `PEERS_MAX` full records."""
ADVERT_BYTES_MAX = 48 * 1024
"""Under the 64 KiB at which py-libp2p's gossip over QUIC collapses (measured)."""
PEERS_MAX = 64
ADDRS_MAX = 16
MODELS_MAX = 32
SESSIONS_MAX = 512
SESSION_HASH_BYTES = 4
"""512 four-byte hashes are 2 KiB an offer; with 512 held sessions a foreign session is taken for
held once in 8 million, and then costs one prefill on a peer that could serve it anyway."""
CHAIN_MAX = 3
VOTERS_MAX = 10
"""Seven in a private mesh, ten in an open one: more make agreement slower, not safer."""
ITEMS_MAX = 128
PARTS_MAX = 4
"""Of one model on one node: one for each of its replicas there, and one that is to follow."""
STAGES_MAX = 48
"""As many as the planner cuts a model into (`placement.pipeline.SEATS_MAX`)."""
STANDBYS_MAX = 2
CLAIMS_MAX = 64
ORDERS_MAX = 64
CONSENTS_MAX = 256
"""With the longest names the fullest block has 42 KiB of items, 102 of consents and 22 of orders;
that and `LINEAGE_MAX` changes of voters are one legal message."""
GROUPS_MAX = 8
LINEAGE_MAX = 48
"""Changes of voters told at once, about 1 KiB each; whoever is further behind asks again."""
JUSTIFICATION_MAX = 64
LINKS_MAX = 64
LEAVES_MAX = 8
"""Of a model's file, asked for at once. Whoever receives them holds as many MiB until they are
proven, and one answer that fails is so much in vain."""
FILE_BYTES_MAX = 2**45
"""32 TiB; proofs grow with the logarithm."""
PROOF_HASHES_MAX = 64
"""A range has at most two subtrees beside it on each level, and this file 25 levels."""
HASH_BYTES = 32
SIGNATURE_BYTES = 64

# Patterns end in \Z: a $ would let a line break through, into logs, headers and terminals.
_MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:~-]*\Z"
_PRINTABLE = r"^[ -~]*\Z"

MeshId = Annotated[str, Meta(min_length=32, max_length=32, pattern=r"^[0-9a-f]{32}\Z")]
PeerIdText = Annotated[str, Meta(min_length=40, max_length=64, pattern=r"^[1-9A-HJ-NP-Za-km-z]+\Z")]
Address = Annotated[str, Meta(max_length=256, pattern=r"^/[!-~]*\Z")]
Digest = Annotated[str, Meta(min_length=64, max_length=64, pattern=r"^[0-9a-f]{64}\Z")]
ModelName = Annotated[str, Meta(min_length=1, max_length=128, pattern=_MODEL_NAME)]
"""Without `@`, which stands between a name and a digest when a client asks. With `~` if, and only
if, the model is an approximation of another."""
APPROXIMATE_MARK = "~"
Reason = Annotated[str, Meta(max_length=256, pattern=_PRINTABLE)]
Sequence = Annotated[int, Meta(ge=0, lt=2**62)]
Count = Annotated[int, Meta(ge=0, lt=2**40)]
UnixSeconds = Annotated[int, Meta(ge=0, lt=2**40)]
Rate = Annotated[float, Meta(ge=0.0, le=1e9)]
Envelope = Annotated[bytes, Meta(max_length=64 * 1024)]
Role = Literal["node", "gateway", "bootstrap", "issuer"]
GroupId = MeshId
"""The hash of a group's genesis, in as many hex digits as a mesh's."""
Epoch = Annotated[int, Meta(ge=0, lt=2**53)]
View = Annotated[int, Meta(ge=0, lt=2**31)]
Hash = Annotated[bytes, Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
RightName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[!-~]+\Z")]
Voters = Annotated[tuple[PeerIdText, ...], Meta(min_length=1, max_length=VOTERS_MAX)]


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag=True, tag_field="t"):
    """Base of all messages; the tag tells them apart inside one stream."""


# --- records that travel by themselves, each inside an envelope of its author ---------------------


class Certificate(Message, frozen=True):
    """`subject` is a member of `mesh` with `roles`, says whoever signed the envelope."""

    mesh: MeshId
    subject: PeerIdText
    roles: Annotated[tuple[Role, ...], Meta(min_length=1, max_length=4)]
    not_before: UnixSeconds
    not_after: UnixSeconds


class Invitation(Message, frozen=True):
    """Whoever holds the private half of `key` may become a member, `uses_max` times.

    Only `issuer` honours it, so that uses are counted in one place.
    """

    mesh: MeshId
    issuer: PeerIdText
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    roles: Annotated[tuple[Role, ...], Meta(min_length=1, max_length=4)]
    uses_max: Annotated[int, Meta(ge=1, le=10_000)]
    not_after: UnixSeconds


class NodeRecord(Message, frozen=True):
    """Where a node is and what it is; refreshed well before `ttl_s` runs out."""

    mesh: MeshId
    sequence: Sequence
    issued_at: UnixSeconds
    ttl_s: Annotated[int, Meta(ge=1, le=3600)]
    addrs: Annotated[tuple[Address, ...], Meta(max_length=ADDRS_MAX)]
    roles: Annotated[tuple[Role, ...], Meta(min_length=1, max_length=4)]
    models: Annotated[tuple[Digest, ...], Meta(max_length=MODELS_MAX)]


class Approximate(Struct, frozen=True, forbid_unknown_fields=True):
    """How far a model is from the whole one it was cut from, and who measured and signed that.

    `kl` is the mean Kullback-Leibler divergence in nats, `agreement` how often both find the same
    token likeliest, `perplexity_ratio` the shard's perplexity over the whole model's.
    """

    kl: Annotated[float, Meta(ge=0.0, le=1e3)]
    agreement: Annotated[float, Meta(ge=0.0, le=1.0)]
    perplexity_ratio: Annotated[float, Meta(gt=0.0, le=1e6)]
    kept: Annotated[int, Meta(ge=1, le=4096)]
    of: Annotated[int, Meta(ge=1, le=4096)]
    measured_by: PeerIdText

    def __str__(self) -> str:
        """As the header of an answer says it."""
        return f"kl={self.kl:.3g}; agree={self.agreement:.3g}; experts={self.kept}/{self.of}"


class Offer(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One model on one node, as measured by that node. Rates are tokens per second.

    `upstream`: a server of another kind answers, behind the node; requests go there unread.
    `approximate`: the model is not the one it was cut from, and its name says so: a plain name
    never means an approximation. Both are left out where they say nothing, so that nodes which do
    not know them can read all other offers.
    """

    name: ModelName
    digest: Digest
    state: Literal["loading", "ready", "failed"]
    context_tokens: Count
    slots: Count
    slots_busy: Count
    queue_depth: Count
    kv_tokens_free: Count
    prefill_tokens_per_s: Rate
    decode_tokens_per_s: Rate
    sessions: Annotated[bytes, Meta(max_length=SESSIONS_MAX * SESSION_HASH_BYTES)] = b""
    upstream: bool = False
    approximate: Approximate | None = None

    def __post_init__(self) -> None:
        if (APPROXIMATE_MARK in self.name) is not (self.approximate is not None):
            raise ValueError(f"only an approximation has {APPROXIMATE_MARK} in its name")


class Demand(Struct, frozen=True, forbid_unknown_fields=True):
    """Requests per second for one model name at one gateway (EWMAs): all, and those that found
    every replica full."""

    model: ModelName
    requests_per_s: Rate
    refused_per_s: Rate = 0.0


class Link(Struct, frozen=True, forbid_unknown_fields=True):
    """The way from the advert's author to `peer`, as the author measured it.

    `bytes_per_s` is 0 while it has not been measured.
    """

    peer: PeerIdText
    rtt_us: Count
    bytes_per_s: Count = 0


class Advert(Message, frozen=True):
    """What a node has and wants right now. Its life is counted by the receiver's clock."""

    mesh: MeshId
    sequence: Sequence
    ttl_s: Annotated[int, Meta(ge=1, le=3600)]
    offers: Annotated[tuple[Offer, ...], Meta(max_length=MODELS_MAX)]
    demand: Annotated[tuple[Demand, ...], Meta(max_length=MODELS_MAX)]
    memory_bytes: Count
    cores: Count
    accelerator: Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)]
    links: Annotated[tuple[Link, ...], Meta(max_length=LINKS_MAX)] = ()


# --- what a group decides (protocol/agreement.py) ------------------------------------------------


class Shard(Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """A part of a model: units `first` to `end` (exclusive) of `of`.

    Units are layers; of an expert shard they are the shards themselves.
    """

    kind: Literal["whole", "layers", "experts"]
    first: Annotated[int, Meta(ge=0, lt=4096)]
    end: Annotated[int, Meta(ge=1, le=4096)]
    of: Annotated[int, Meta(ge=1, le=4096)]


Layers = tuple[Annotated[int, Meta(ge=0, lt=4096)], Annotated[int, Meta(ge=1, le=4096)]]
"""First and end."""


class Item(Struct, frozen=True, forbid_unknown_fields=True):
    """One shard of one replica of a model: who has it, who would take over.

    `bytes` is the memory its owner commits to it. `loading`: the owner prepares and others still
    serve; `serving`; `draining`: the owner ends what is in flight and takes nothing new.
    """

    model: Digest
    name: ModelName
    replica: Annotated[int, Meta(ge=0, lt=65536)]
    shard: Shard
    owner: PeerIdText
    standbys: Annotated[tuple[PeerIdText, ...], Meta(max_length=STANDBYS_MAX)]
    state: Literal["loading", "serving", "draining"]
    bytes: Count


class Claim(Struct, frozen=True, forbid_unknown_fields=True):
    """An exclusive right by its name, and who holds it since which epoch."""

    right: RightName
    holder: PeerIdText
    since: Epoch


class Genesis(Message, frozen=True):
    """Where a group begins, signed by its creator. Its hash is the group's id.

    `faults` sets the quorum: a majority against crashes, more than two thirds against liars.
    """

    mesh: MeshId
    faults: Literal["crash", "byzantine"]
    voters: Voters
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]


class Header(Struct, frozen=True, forbid_unknown_fields=True):
    """A block without its body: all that its hash covers. `voters` decide the next epoch, and
    `proposer`, if among them, leads its first view."""

    group: GroupId
    epoch: Epoch
    previous: Hash
    proposer: PeerIdText
    voters: Voters
    body: Hash


class Body(Struct, frozen=True, forbid_unknown_fields=True):
    """Who owns what, and the signed words that entitle it: `orders` in force (`Order`) and the
    `consents` (`Consent`) of all owners and standbys."""

    items: Annotated[tuple[Item, ...], Meta(max_length=ITEMS_MAX)] = ()
    claims: Annotated[tuple[Claim, ...], Meta(max_length=CLAIMS_MAX)] = ()
    orders: Annotated[tuple[Envelope, ...], Meta(max_length=ORDERS_MAX)] = ()
    consents: Annotated[tuple[Envelope, ...], Meta(max_length=CONSENTS_MAX)] = ()


class Consent(Message, frozen=True):
    """A node's word on one model: it has the file, verified, and would spend `bytes` of its
    `memory_bytes` on it: weights, KV cache for its context and slots, and compute buffers.
    `ready` says that all of it is loaded and proven; `wanted` that the node's own operator wants it
    served there. Signed by the node; the highest sequence counts.

    A node that can run a part of the model's layers says what crosses between two parts per token
    (`activation_bytes`, 0 if it cannot), what of `weight_bytes` is in no layer and so in one part
    whole (`edge_bytes`: embeddings and head), and which `parts` it has loaded, as (first, end).
    Parts begin at multiples of `cut_every` layers.
    """

    group: GroupId
    sequence: Sequence
    model: Digest
    name: ModelName
    state: Literal["file", "ready", "failed", "gone"]
    wanted: bool
    bytes: Count
    memory_bytes: Count
    weight_bytes: Count
    kv_bytes: Count
    layers: Annotated[int, Meta(ge=0, le=4096)]
    activation_bytes: Annotated[int, Meta(ge=0, lt=2**20)] = 0
    edge_bytes: Count = 0
    cut_every: Annotated[int, Meta(ge=1, le=4096)] = 1
    parts: Annotated[tuple[Layers, ...], Meta(max_length=PARTS_MAX)] = ()

    @property
    def units(self) -> int:
        """In how many the layers can be dealt out; the last of them takes what is left over."""
        return max(self.layers // self.cut_every, 1)

    def is_ready(self, shard: Shard) -> bool:
        """Whether its signer has said that just this is loaded there."""
        if shard.kind == "whole":
            return self.state == "ready"
        return self.state in ("file", "ready") and (shard.first, shard.end) in self.parts


class Order(Message, frozen=True):
    """What an operator or a node asks of a group, signed by the node it was given to.

    `pin`: serve model `subject` on `peer`; `drain`: take everything off `peer`; `unpin` and
    `undrain` take that back. `claim` and `release`: the right `subject`, for the signer itself.
    `epoch` is the newest the signer knew: an order that is much older is void.
    """

    group: GroupId
    sequence: Sequence
    epoch: Epoch
    action: Literal["pin", "unpin", "drain", "undrain", "claim", "release"]
    subject: Annotated[str, Meta(max_length=128, pattern=_PRINTABLE)]
    peer: Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)]


class Recovery(Message, frozen=True):
    """Signed by the mesh's root: `header` stands although no quorum decided it."""

    header: Header


class Vote(Message, frozen=True):
    """One voter's word in one view. `block` is all zeros for `nullify`."""

    group: GroupId
    epoch: Epoch
    view: View
    kind: Literal["notarize", "nullify", "finalize"]
    block: Hash
    voter: PeerIdText
    signature: Signature


class Ballot(Struct, frozen=True, forbid_unknown_fields=True):
    """One vote within a certificate: the voter's place among the epoch's voters."""

    voter: Annotated[int, Meta(ge=0, lt=VOTERS_MAX)]
    signature: Signature


class QuorumCertificate(Message, frozen=True):
    """A quorum's equal votes. Anybody who knows the epoch's voters can verify it."""

    group: GroupId
    epoch: Epoch
    view: View
    kind: Literal["notarize", "nullify", "finalize"]
    block: Hash
    ballots: Annotated[tuple[Ballot, ...], Meta(min_length=1, max_length=VOTERS_MAX)]


class Handover(Struct, frozen=True, forbid_unknown_fields=True):
    """A header that named other voters, and what proves it: a certificate, or the root's word."""

    header: Header
    certificate: QuorumCertificate | None
    recovery: Envelope | None = None


# --- agreement between voters, owners and everybody else -----------------------------------------


class Proposal(Message, frozen=True):
    """The leader's block for a view, with its own vote for it.

    `parent_view` is 0, or the view in which this very block was notarized; `justification` holds
    that notarization and the nullifications of the views between.
    """

    header: Header
    body: Body
    parent_view: View
    justification: Annotated[tuple[QuorumCertificate, ...], Meta(max_length=JUSTIFICATION_MAX)]
    vote: Vote


class Decided(Message, frozen=True):
    """The newest block one knows with its proof: catching up is this one message.

    `lineage` holds the changes of voters since the asker's `anchor`. If those do not fit into one
    message, there is no block, and the asker asks again from the last.
    """

    genesis: Envelope
    lineage: Annotated[tuple[Handover, ...], Meta(max_length=LINEAGE_MAX)]
    newest: Handover | None
    body: Body | None


class GetDecided(Message, frozen=True):
    """Send me what is newer than `epoch`; I know the voters' changes up to `anchor`."""

    group: GroupId
    epoch: Epoch
    anchor: Epoch


class Standing(Struct, frozen=True, forbid_unknown_fields=True):
    """The newest epoch one knows of a group. `abstains`: named a voter, but its disk has lost
    what it said as one."""

    group: GroupId
    epoch: Epoch
    abstains: bool = False


class Heartbeat(Message, frozen=True):
    """I am alive, and this is how far I am. Voters answer it with `Support`."""

    sequence: Sequence
    standings: Annotated[tuple[Standing, ...], Meta(max_length=GROUPS_MAX)]


class Support(Message, frozen=True):
    """The answer to heartbeat `sequence`: for the lease time, counted from its receipt, this
    voter will not vote to take an exclusive right from the receiver in any of the groups."""

    sequence: Sequence
    standings: Annotated[tuple[Standing, ...], Meta(max_length=GROUPS_MAX)]


class News(Message, frozen=True):
    """The sender knows these epochs; whoever is behind asks for them."""

    standings: Annotated[tuple[Standing, ...], Meta(max_length=GROUPS_MAX)]


class Consents(Message, frozen=True):
    """`Consent`s of the sender, to a voter."""

    consents: Annotated[tuple[Envelope, ...], Meta(max_length=GROUPS_MAX * MODELS_MAX)]


class Orders(Message, frozen=True):
    """`Order`s, to a voter; passed on as they were signed."""

    orders: Annotated[tuple[Envelope, ...], Meta(max_length=ORDERS_MAX)]


class Suspicion(Message, frozen=True):
    """Signed by `by`'s envelope: `suspect` is not answering. Spreads from peer to peer."""

    mesh: MeshId
    suspect: PeerIdText
    incarnation: Sequence


class Alive(Message, frozen=True):
    """Signed by the suspect itself: I am here. A higher incarnation refutes lower suspicions."""

    mesh: MeshId
    incarnation: Sequence


class Rumours(Message, frozen=True):
    """`Suspicion` and `Alive` envelopes, as they were signed."""

    suspicions: Annotated[tuple[Envelope, ...], Meta(max_length=64)]
    refutations: Annotated[tuple[Envelope, ...], Meta(max_length=64)]


# --- the control stream between two connected peers ----------------------------------------------


class Hello(Message, frozen=True):
    """First frame both ways: by what right I am here; all that a stranger gets to read.

    `chain` is leaf certificate first; `unix_ms` shows a wrong clock, nothing is decided by it.
    """

    version: Annotated[int, Meta(ge=1, le=1_000)]
    mesh: MeshId
    chain: Annotated[tuple[Envelope, ...], Meta(max_length=CHAIN_MAX)]
    unix_ms: Annotated[int, Meta(ge=0, lt=2**53)]


class Welcome(Message, frozen=True):
    """Second frame both ways: your Hello was accepted; here is where I am and what I have."""

    record: Envelope
    advert: Envelope


class Refused(Message, frozen=True):
    """Instead of `Welcome`: why not. The stream ends after it."""

    reason: Reason


class GetPeers(Message, frozen=True):
    """Ask for node records of up to `count` other members."""

    count: Annotated[int, Meta(ge=1, le=PEERS_MAX)]


class Peers(Message, frozen=True):
    """Node records as their authors signed them; the sender can omit, not forge."""

    records: Annotated[tuple[Envelope, ...], Meta(max_length=PEERS_MAX)]


class Leaving(Message, frozen=True):
    """The sender is shutting down in good order."""


# --- joining a mesh with an invitation -----------------------------------------------------------


class JoinProof(Message, frozen=True):
    """Signed with the invitation's key: this peer, and no other, is to be admitted."""

    mesh: MeshId
    subject: PeerIdText


class JoinRequest(Message, frozen=True):
    """`invitation` is the issuer-side envelope from the token, `proof` a `JoinProof`'s."""

    invitation: Envelope
    proof: Envelope


class JoinGranted(Message, frozen=True):
    """The new member's certificate chain, leaf first."""

    chain: Annotated[tuple[Envelope, ...], Meta(min_length=1, max_length=CHAIN_MAX)]


class JoinDenied(Message, frozen=True):
    """Why the issuer refused; nothing about the mesh is told beside it."""

    reason: Reason


# --- the stages of a model that is cut by layers ------------------------------------------------


class WantLeaves(Message, frozen=True):
    """Asks for `count` leaves of the file of `model` (`models/digest.py`), from `first` on."""

    model: Digest
    first: Annotated[int, Meta(ge=0, lt=2**26)]
    count: Annotated[int, Meta(ge=1, le=LEAVES_MAX)]


class LeavesFollow(Message, frozen=True):
    """They come, each as a frame of its own. The file has `size_bytes`; `proof` is what else its
    digest takes."""

    size_bytes: Annotated[int, Meta(ge=1, le=FILE_BYTES_MAX)]
    proof: Annotated[tuple[Hash, ...], Meta(max_length=PROOF_HASHES_MAX)]


class WantFiles(Message, frozen=True):
    """Asks which models' files the receiver gives: what nobody serves yet is in no advert."""


class Files(Message, frozen=True):
    """The digests of these models, and what they are called there."""

    names: Annotated[dict[Digest, ModelName], Meta(max_length=MODELS_MAX)]


class NoLeaves(Message, frozen=True):
    """They do not come from here."""

    reason: Reason


class Opening(Message, frozen=True):
    """First frame of a stage's stream: what the sender takes the receiver for.

    By epoch `epoch` of `group`, `owners` have layers `cuts[i]` to `cuts[i + 1]` of replica
    `replica`, and the receiver is the one at `place`. The last of them, the head, has chosen
    `pipeline`, a name for this run that nobody else can guess. Sequences of up to
    `context_tokens`, whose KV is kept as `kv_type`; activations travel in `codec`.
    """

    group: GroupId
    epoch: Epoch
    model: Digest
    replica: Annotated[int, Meta(ge=0, lt=65536)]
    owners: Annotated[tuple[PeerIdText, ...], Meta(min_length=2, max_length=STAGES_MAX)]
    cuts: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=4096)], ...],
        Meta(min_length=3, max_length=STAGES_MAX + 1),
    ]
    place: Annotated[int, Meta(ge=0, lt=STAGES_MAX)]
    pipeline: Annotated[bytes, Meta(min_length=16, max_length=16)]
    codec: Literal["f32", "f16", "i8"]
    context_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    kv_type: Literal["f16", "q8_0"]


class Opened(Message, frozen=True):
    """The receiver and everybody behind it, up to the head, take steps from now on."""


class NotOpened(Message, frozen=True):
    """Why not; `by` whom, if somebody further on has refused."""

    by: PeerIdText
    reason: Reason


Agreed = (
    Heartbeat | Support | News | Consents | Orders | Proposal | Vote | QuorumCertificate
    | Decided | GetDecided
)  # fmt: skip
Control = Hello | Welcome | Refused | GetPeers | Peers | Leaving | Rumours | Agreed
Join = JoinRequest | JoinGranted | JoinDenied
Record = (
    Certificate | Invitation | NodeRecord | Advert | JoinProof
    | Genesis | Consent | Order | Recovery | Suspicion | Alive
)  # fmt: skip

M = TypeVar("M")


def is_model_name(text: str) -> bool:
    """Whether a message may hold `text` as a model's name; clients may ask for anything."""
    return len(text) <= 128 and re.search(_MODEL_NAME, text) is not None


def reason_of(error: Exception) -> str:
    """The error's text as a `Refused` or `JoinDenied` may hold it."""
    return "".join(char if " " <= char <= "~" else "?" for char in str(error))[:256]


def encode(message: Message) -> bytes:
    """Message to bytes. Raises `LocalProtocolError` if it is larger than peers would accept."""
    data = msgspec.msgpack.encode(message)
    if len(data) > MESSAGE_BYTES_MAX:
        raise LocalProtocolError(f"{type(message).__name__} of {len(data)} bytes is too large")
    return data


def decode(data: bytes, kind: type[M], bytes_max: int = MESSAGE_BYTES_MAX) -> M:
    """Bytes to a legal message of `kind` (a class or a union such as `Control`).

    Raises `RemoteProtocolError`, which quotes the broken field and never the bytes.
    """
    if len(data) > bytes_max:
        raise RemoteProtocolError(f"message of {len(data)} bytes (limit {bytes_max})")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed message: {error}") from error
