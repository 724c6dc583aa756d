"""libp2p identity inside TLS: one self-signed certificate per process.

Decides: the certificate we show and which certificates prove a peer id.
Does not know: QUIC, sockets, aioquic, libp2p's Python classes.

The libp2p TLS specification binds an X.509 certificate with a throw-away key to the host
key by an extension that holds (host public key, signature of the certificate key).  meshnode
hosts have Ed25519 keys only, which makes the DER encoding of that extension a constant
layout, so it is compared instead of parsed.
https://github.com/libp2p/specs/blob/master/tls/tls.md
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from meshnode.transport.quic.errors import BadCertificate

EXTENSION_OID = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
SIGNATURE_PREFIX = b"libp2p-tls-handshake:"

# Clocks of volunteers' machines differ; go-libp2p starts its certificates an hour early too.
CLOCK_SKEW = datetime.timedelta(hours=1)
# The host key is what is trusted, so the certificate need not expire (go-libp2p: 100 years).
VALIDITY = datetime.timedelta(days=100 * 365)

# libp2p PublicKey protobuf: field 1 (type) = 1 (Ed25519), field 2 (data) = 32 bytes.
_KEY_PREFIX = bytes.fromhex("08011220")
# Peer id of a short key: multihash "identity", 36 bytes.
_PEER_ID_PREFIX = bytes.fromhex("0024")
# SEQUENCE(104 bytes) { OCTET STRING(36) public key, OCTET STRING(64) signature }
_EXTENSION_HEAD = bytes.fromhex("30680424") + _KEY_PREFIX
_EXTENSION_MIDDLE = bytes.fromhex("0440")
_EXTENSION_BYTES = 106
_KEY_AT = len(_EXTENSION_HEAD)
_SIGNATURE_AT = _EXTENSION_BYTES - 64


@dataclass(frozen=True)
class TlsIdentity:
    """What this host shows in every handshake."""

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey
    peer_id: bytes


def peer_id_of(host_key: Ed25519PublicKey) -> bytes:
    """The 38 bytes of the peer id (multihash of the protobuf public key)."""
    return _PEER_ID_PREFIX + _KEY_PREFIX + host_key.public_bytes_raw()


def tls_identity(host_key: Ed25519PrivateKey, now: datetime.datetime) -> TlsIdentity:
    """A fresh certificate for `host_key`, valid from an hour before `now` (aware, UTC)."""
    certificate_key = ec.generate_private_key(ec.SECP256R1())
    signature = host_key.sign(SIGNATURE_PREFIX + _subject_key_info(certificate_key.public_key()))
    extension = (
        _EXTENSION_HEAD + host_key.public_key().public_bytes_raw() + _EXTENSION_MIDDLE + signature
    )
    name = x509.Name([])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(certificate_key.public_key())
        .serial_number(1 + secrets.randbelow(2**63))
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.UnrecognizedExtension(EXTENSION_OID, extension), critical=False)
        .sign(certificate_key, hashes.SHA256())
    )
    return TlsIdentity(certificate, certificate_key, peer_id_of(host_key.public_key()))


def verified_peer_id(certificate: x509.Certificate, now: datetime.datetime) -> bytes:
    """The peer id a certificate proves.

    The TLS handshake has already shown that the remote holds the certificate's key.

    Args:
        certificate: the only certificate of the remote's chain.
        now: aware UTC time for the validity check.

    Raises:
        BadCertificate: outside its validity, not self-signed, an unknown critical
            extension, or no (or a wrong) libp2p extension.
    """
    try:
        valid_from = certificate.not_valid_before_utc - CLOCK_SKEW
        is_valid_now = valid_from <= now <= certificate.not_valid_after_utc
        certificate.verify_directly_issued_by(certificate)
        extensions = list(certificate.extensions)
        key_info = _subject_key_info(certificate.public_key())
    except (
        InvalidSignature,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        OverflowError,
        ValueError,
        TypeError,
    ) as error:
        raise BadCertificate(f"certificate is not properly self-signed: {error!r}") from error
    if not is_valid_now:
        raise BadCertificate("certificate is expired or not valid yet")
    signed_key: bytes | None = None
    for extension in extensions:
        if extension.oid == EXTENSION_OID:
            assert isinstance(extension.value, x509.UnrecognizedExtension)
            signed_key = extension.value.value
        elif extension.critical and isinstance(extension.value, x509.UnrecognizedExtension):
            raise BadCertificate(f"unknown critical extension {extension.oid.dotted_string}")
    if signed_key is None:
        raise BadCertificate("no libp2p extension")
    if (
        len(signed_key) != _EXTENSION_BYTES
        or not signed_key.startswith(_EXTENSION_HEAD)
        or signed_key[_KEY_AT + 32 : _SIGNATURE_AT] != _EXTENSION_MIDDLE
    ):
        raise BadCertificate("libp2p extension does not hold an Ed25519 key and signature")
    host_key = Ed25519PublicKey.from_public_bytes(signed_key[_KEY_AT : _KEY_AT + 32])
    try:
        host_key.verify(signed_key[_SIGNATURE_AT:], SIGNATURE_PREFIX + key_info)
    except InvalidSignature as error:
        raise BadCertificate("libp2p extension has a wrong signature") from error
    return peer_id_of(host_key)


def _subject_key_info(key: object) -> bytes:
    """DER SubjectPublicKeyInfo, the bytes the host key signs."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined,no-any-return]
