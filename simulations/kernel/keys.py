"""Signatures for thousands of nodes: a keyed hash in the place of Ed25519.

A real signature costs 45 µs to make and 130 µs to check; with one to check in each delivery, that
alone would be nine tenths of a run. Here both cost about 1 µs. They are as good as real ones among
the nodes of a run, which get at signatures through their own `SimulatedKey` only; outside they
prove nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from meshnode.identity import KEY_BYTES, KeyPair, PeerId, Signer, Verify, peer_id_of, verify
from meshnode.messages import SIGNATURE_BYTES


@dataclass(frozen=True, slots=True)
class SimulatedKey:
    """Has the shape of `identity.KeyPair`, as far as a stack looks at one."""

    public: bytes
    peer_id: PeerId

    @classmethod
    def of(cls, name: str) -> SimulatedKey:
        """The key of whoever has this name."""
        public = hashlib.blake2b(name.encode(), digest_size=KEY_BYTES).digest()
        return cls(public, peer_id_of(public))

    def sign(self, data: bytes) -> bytes:
        return _tag(self.public, data)


def genuine(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """The `identity.Verify` of simulated signatures."""
    return signature == _tag(public_key, data)


def _tag(public_key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=SIGNATURE_BYTES, key=public_key).digest()


@dataclass(frozen=True, slots=True)
class Scheme:
    """Where machines get their keys from, by name, and what their signatures are judged by."""

    key_of: Callable[[str], Signer]
    genuine: Verify


@cache
def _real_key(name: str) -> KeyPair:
    return KeyPair.from_seed(hashlib.sha256(name.encode()).digest())


KEYED_HASH = Scheme(SimulatedKey.of, genuine)
ED25519 = Scheme(_real_key, verify)
"""As in production, for small runs."""
