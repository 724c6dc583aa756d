"""By what right: mesh descriptors, membership certificates, invitations.

A mesh is a root public key with a name. Its members hold a certificate that chains to the root;
in an *open* mesh (the public one) every peer certifies itself, and everything else is the same
code. Pure functions of bytes and of the time they are given: no clock, network or file.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from meshnode.errors import ConfigError, NotAuthorizedError, RemoteProtocolError
from meshnode.identity import (
    KeyPair,
    PeerId,
    Signer,
    Verify,
    open_envelope,
    peer_id_of,
    seal,
    verify,
)
from meshnode.messages import (
    CHAIN_MAX,
    Address,
    Certificate,
    Envelope,
    Invitation,
    JoinProof,
    JoinRequest,
    Role,
    decode,
    encode,
)

CERTIFICATE_S = 90 * 24 * 3600
"""A member that was offline for a quarter has to be invited again."""
CLOCK_SKEW_S = 15 * 60
"""Clocks of members may differ by ten minutes without any effect; fifteen leaves a margin."""
TOKEN_PREFIX = "mesh1."
TOKEN_CHARS_MAX = 8192
BOOTSTRAP_ADDRS_MAX = 16

_DOMAIN = "meshnode-credential"
_CERTIFICATE = b"/meshnode/certificate/1"
_INVITATION = b"/meshnode/invitation/1"
_JOIN_PROOF = b"/meshnode/join-proof/1"


class MeshDescriptor(Struct, frozen=True, forbid_unknown_fields=True):
    """What a mesh is; public. Kept as JSON, and carried inside invitation tokens.

    `bootstrap` are multiaddrs with `/p2p/<peer id>`; they may change without changing the mesh.
    """

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[\w.-]+\Z")]
    root: Annotated[str, Meta(min_length=64, max_length=64, pattern=r"^[0-9a-f]{64}\Z")]
    admission: Literal["invite", "open"]
    bootstrap: Annotated[tuple[Address, ...], Meta(max_length=BOOTSTRAP_ADDRS_MAX)] = ()

    @property
    def mesh_id(self) -> str:
        """128 bits in hex; prefixes every DHT key and pubsub topic, so meshes never mix."""
        identity = f"meshnode/mesh/1\0{self.admission}\0{self.name}\0{self.root}"
        return hashlib.sha256(identity.encode()).hexdigest()[:32]

    @property
    def root_peer_id(self) -> PeerId:
        return peer_id_of(bytes.fromhex(self.root))


@dataclass(frozen=True, slots=True)
class Membership:
    """A verified right: this subject, these roles, until then. `sponsored`: by the mesh's root or
    an issuer of its, and not, in an open mesh, by itself alone."""

    subject: PeerId
    roles: tuple[Role, ...]
    not_after: int
    sponsored: bool


def issue_certificate(
    issuer: Signer,
    mesh: MeshDescriptor,
    subject: str,
    roles: tuple[Role, ...],
    unix_s: int,
    lifetime_s: int = CERTIFICATE_S,
) -> bytes:
    """A certificate envelope; it starts `CLOCK_SKEW_S` early so that slow clocks accept it."""
    certificate = Certificate(
        mesh=mesh.mesh_id,
        subject=subject,
        roles=roles,
        not_before=unix_s - CLOCK_SKEW_S,
        not_after=unix_s + lifetime_s,
    )
    return seal(issuer, _DOMAIN, _CERTIFICATE, encode(certificate))


def verify_chain(
    mesh: MeshDescriptor,
    subject: str,
    chain: tuple[bytes, ...],
    unix_s: int,
    genuine: Verify = verify,
) -> Membership:
    """What `chain` (leaf first) proves about `subject`. Raises `NotAuthorizedError`.

    Each link must be signed by the subject of the next, who must be an issuer; the last by the
    root. In an open mesh a single self-signed link is enough, but never for the issuer role.
    """
    if not 1 <= len(chain) <= CHAIN_MAX:
        raise NotAuthorizedError("no membership certificate for this mesh")
    leaf: Certificate | None = None
    expected_subject: str = subject
    signer: str = ""
    for envelope in chain:
        try:
            signed = open_envelope(envelope, _DOMAIN, _CERTIFICATE, genuine)
            certificate = decode(signed.payload, Certificate)
        except RemoteProtocolError as error:
            raise NotAuthorizedError(f"membership certificate is invalid: {error}") from error
        if certificate.mesh != mesh.mesh_id:
            raise NotAuthorizedError("membership certificate is of another mesh")
        if certificate.subject != expected_subject:
            raise NotAuthorizedError("membership certificate is of another peer")
        if not certificate.not_before <= unix_s + CLOCK_SKEW_S:
            raise NotAuthorizedError("membership certificate is not valid yet: check the clocks")
        if not unix_s <= certificate.not_after + CLOCK_SKEW_S:
            raise NotAuthorizedError("membership certificate has expired: ask for a new invitation")
        if leaf is None:
            leaf = certificate
        elif "issuer" not in certificate.roles:
            raise NotAuthorizedError("membership certificate was signed by a peer that may not")
        expected_subject = signer = signed.signer
    assert leaf is not None
    self_certified = mesh.admission == "open" and signer == subject and "issuer" not in leaf.roles
    if signer != mesh.root_peer_id and not (self_certified and len(chain) == 1):
        raise NotAuthorizedError("membership certificate does not lead to this mesh's root key")
    return Membership(PeerId(subject), leaf.roles, leaf.not_after, not self_certified)


class _Token(Struct, frozen=True, forbid_unknown_fields=True):
    mesh: MeshDescriptor
    invitation: Envelope
    secret: Annotated[bytes, Meta(min_length=32, max_length=32)]


@dataclass(frozen=True, slots=True)
class Invite:
    """A parsed token: a bearer credential, so it is never logged and `repr` hides the secret."""

    mesh: MeshDescriptor
    invitation: Invitation
    _envelope: bytes
    _key: KeyPair

    def __repr__(self) -> str:
        return f"Invite({self.mesh.name}, issuer={self.invitation.issuer})"

    def request_for(self, subject: str) -> JoinRequest:
        """The request that makes `subject` (the authenticated peer that sends it) a member."""
        proof = JoinProof(mesh=self.mesh.mesh_id, subject=subject)
        return JoinRequest(
            invitation=self._envelope,
            proof=seal(self._key, _DOMAIN, _JOIN_PROOF, encode(proof)),
        )


def create_invite(
    issuer: KeyPair,
    mesh: MeshDescriptor,
    *,
    honoured_by: str,
    roles: tuple[Role, ...],
    uses_max: int,
    not_after: int,
) -> str:
    """A token to hand to someone. `honoured_by` is the peer id of the node that will admit them,
    and `mesh.bootstrap` must hold an address by which they can reach it or another member.
    """
    key = KeyPair.from_seed(os.urandom(32))
    invitation = Invitation(
        mesh=mesh.mesh_id,
        issuer=honoured_by,
        key=key.public,
        roles=roles,
        uses_max=uses_max,
        not_after=not_after,
    )
    envelope = seal(issuer, _DOMAIN, _INVITATION, encode(invitation))
    packed = msgspec.msgpack.encode(_Token(mesh=mesh, invitation=envelope, secret=key.seed))
    return TOKEN_PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def parse_invite(token: str) -> Invite:
    """Raises `ConfigError`: a token is typed or pasted by a person."""
    token = "".join(token.split())
    hint = "paste the whole line that `meshnode invite` printed"
    if not token.startswith(TOKEN_PREFIX) or len(token) > TOKEN_CHARS_MAX:
        raise ConfigError(f"this is not an invitation token (they start with mesh1.): {hint}")
    body = token[len(TOKEN_PREFIX) :]
    try:
        packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        parsed = msgspec.msgpack.decode(packed, type=_Token)
        key = KeyPair.from_seed(parsed.secret)
        signed = open_envelope(parsed.invitation, _DOMAIN, _INVITATION)
        invitation = decode(signed.payload, Invitation)
    except (ValueError, msgspec.DecodeError, RemoteProtocolError) as error:
        raise ConfigError(f"this invitation token is damaged: {hint}") from error
    if invitation.mesh != parsed.mesh.mesh_id or invitation.key != key.public:
        raise ConfigError(f"this invitation token contradicts itself: {hint}")
    return Invite(parsed.mesh, invitation, parsed.invitation, key)


@dataclass(frozen=True, slots=True)
class Admission:
    """An accepted join request. `use_key` counts uses of the invitation: persist it first."""

    subject: PeerId
    roles: tuple[Role, ...]
    use_key: str
    uses_max: int


def check_join(
    mesh: MeshDescriptor, issuer: str, sender: str, request: JoinRequest, unix_s: int
) -> Admission:
    """Whether `sender` may be certified. Raises `NotAuthorizedError` with what to do.

    Everything but the count of uses, which is state of the issuer.
    """
    try:
        signed = open_envelope(request.invitation, _DOMAIN, _INVITATION)
        invitation = decode(signed.payload, Invitation)
        proof_signed = open_envelope(request.proof, _DOMAIN, _JOIN_PROOF)
        proof = decode(proof_signed.payload, JoinProof)
    except RemoteProtocolError as error:
        raise NotAuthorizedError(f"invitation is invalid: {error}") from error
    if signed.signer not in (issuer, mesh.root_peer_id):
        raise NotAuthorizedError("invitation was not made by this mesh")
    if invitation.mesh != mesh.mesh_id or proof.mesh != mesh.mesh_id:
        raise NotAuthorizedError("invitation is of another mesh")
    if invitation.issuer != issuer:
        raise NotAuthorizedError("invitation is honoured by another node")
    if proof.subject != sender or proof_signed.signer != peer_id_of(invitation.key):
        raise NotAuthorizedError("invitation is not proven to be held by this peer")
    if unix_s > invitation.not_after + CLOCK_SKEW_S:
        raise NotAuthorizedError("invitation has expired: ask for a new one")
    return Admission(PeerId(sender), invitation.roles, invitation.key.hex(), invitation.uses_max)
