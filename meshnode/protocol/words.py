"""The signed words that agreement stands on: opened, verified, and each only once.

The same consents and orders stand in block after block, and every voter checks every block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshnode.errors import RemoteProtocolError
from meshnode.identity import Signed
from meshnode.messages import Consent, Genesis, Header, Order, Recovery, decode

__all__ = ["CONSENT_TYPE", "GENESIS_TYPE", "ORDER_TYPE", "RECOVERY_TYPE", "Open", "Word", "Words"]

GENESIS_TYPE = b"/meshnode/genesis/1"
RECOVERY_TYPE = b"/meshnode/recovery/1"
CONSENT_TYPE = b"/meshnode/consent/1"
ORDER_TYPE = b"/meshnode/order/1"
OPENED_MAX = 4096

Open = Callable[[bytes, bytes], Signed]
"""(envelope, payload type) → what was signed, by whom; raises `RemoteProtocolError`."""


@dataclass(frozen=True, slots=True)
class Word:
    """A consent as it was signed."""

    consent: Consent
    envelope: bytes


class Words:
    """Opens envelopes. Everything raises `RemoteProtocolError` for what is forged or malformed."""

    def __init__(self, open_: Open, mesh_id: str, root: str) -> None:
        """`root` is the peer id whose word founds and recovers groups of the mesh."""
        self._open = open_
        self._mesh_id = mesh_id
        self._root = root
        self._opened: dict[tuple[bytes, bytes], Signed] = {}

    def genesis(self, envelope: bytes) -> tuple[bytes, Genesis]:
        """The payload, whose hash is the group's id, and what it says."""
        signed = self._verified(GENESIS_TYPE, envelope)
        genesis = decode(signed.payload, Genesis)
        if signed.signer != self._root or genesis.mesh != self._mesh_id:
            raise RemoteProtocolError("a group that this mesh's root has not founded")
        return signed.payload, genesis

    def recovery(self, envelope: bytes) -> Header:
        signed = self._verified(RECOVERY_TYPE, envelope)
        if signed.signer != self._root:
            raise RemoteProtocolError("a recovery that the mesh's root has not signed")
        return decode(signed.payload, Recovery).header

    def consent(self, envelope: bytes) -> tuple[str, Consent]:
        """Who consents, and to what."""
        signed = self._verified(CONSENT_TYPE, envelope)
        return signed.signer, decode(signed.payload, Consent)

    def order(self, envelope: bytes) -> tuple[str, Order]:
        """Who orders, and what."""
        signed = self._verified(ORDER_TYPE, envelope)
        return signed.signer, decode(signed.payload, Order)

    def _verified(self, kind: bytes, envelope: bytes) -> Signed:
        known = self._opened.get((kind, envelope))
        if known is None:
            known = self._open(envelope, kind)
            if len(self._opened) >= OPENED_MAX:
                del self._opened[next(iter(self._opened))]
            self._opened[kind, envelope] = known
        return known
