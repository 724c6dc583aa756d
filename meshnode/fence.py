"""Which decision a request stands on: group, epoch and shard, as every frame of work carries it.

Decides how that is written into a header and read back from a stranger. Does not know which epoch
is the newest: whoever holds the register compares, and refuses what is older (invariant S6).

    x-meshnode-epoch: <group, 32 hex digits>/<epoch>/<replica>.<part>

The part is `whole`, or `layers.0-12.30` or `experts.3-4.8`: from first to end (exclusive) of all.
A value has one spelling, so that equal fences are equal texts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshnode.errors import RemoteProtocolError
from meshnode.messages import Item

__all__ = ["FENCE_CHARS_MAX", "FENCE_HEADER", "Fence", "parse_fence", "shard_text"]

FENCE_HEADER = "x-meshnode-epoch"
FENCE_CHARS_MAX = 96
"""The longest legal one has 32 + 1 + 16 + 1 + 28 characters."""

# The bounds of `messages.Epoch`, `messages.Item.replica` and `messages.Shard`.
_EPOCH_END = 2**53
_REPLICA_END = 65_536
_UNITS_MAX = 4096

_NUMBER = r"(?:0|[1-9][0-9]{0,15})"
_SHARD = rf"(?P<replica>{_NUMBER})\.(?:whole|(?:layers|experts)" \
         rf"\.(?P<first>{_NUMBER})-(?P<end>{_NUMBER})\.(?P<of>{_NUMBER}))"  # fmt: skip
_FENCE = re.compile(rf"(?P<group>[0-9a-f]{{32}})/(?P<epoch>{_NUMBER})/(?P<shard>{_SHARD})")


@dataclass(frozen=True, slots=True)
class Fence:
    """The newest decision its sender knew: `epoch` of `group` gave the receiver `shard`."""

    group: str
    epoch: int
    shard: str

    def __str__(self) -> str:
        """The header's value."""
        return f"{self.group}/{self.epoch}/{self.shard}"


def parse_fence(text: str) -> Fence:
    """A header's value from a peer. Raises `RemoteProtocolError` on anything but a legal one."""
    found = _FENCE.fullmatch(text) if len(text) <= FENCE_CHARS_MAX else None
    if found is None:
        raise RemoteProtocolError(f"`{FENCE_HEADER}` is not <group>/<epoch>/<shard>.")
    epoch = int(found["epoch"])
    if epoch >= _EPOCH_END or int(found["replica"]) >= _REPLICA_END:
        raise RemoteProtocolError(f"`{FENCE_HEADER}` has a number that is out of range.")
    if found["of"] is not None:
        first, end, of = int(found["first"]), int(found["end"]), int(found["of"])
        if not first < end <= of <= _UNITS_MAX:
            raise RemoteProtocolError(f"`{FENCE_HEADER}` names units that cannot be.")
    return Fence(found["group"], epoch, found["shard"])


def shard_text(item: Item) -> str:
    """An item's replica and part, as fences write it: `0.whole`, `2.layers.0-12.30`."""
    shard = item.shard
    if shard.kind == "whole":
        return f"{item.replica}.whole"
    return f"{item.replica}.{shard.kind}.{shard.first}-{shard.end}.{shard.of}"
