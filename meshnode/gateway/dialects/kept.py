"""Responses that a later request may name: /v1/responses with `store`. No IO; time is an argument.

Decides how long a response is kept, how much memory all of them may take, and who may see one: the
API key that asked for it, nobody else. Does not know what a response looks like.

They are kept in this node's memory only. Another node does not have them, nor this one after a
restart: then the client sends the whole conversation, as without `store`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from meshnode.engine import ChatMessage
from meshnode.errors import MeshnodeError

__all__ = ["Kept", "KeptResponses", "UnknownResponseError"]

KEPT_FOR_S = 3600.0
"""A chat whose next turn takes longer than an hour has lost its KV cache as well."""
BYTES_MAX = 64 * 1024 * 1024
"""Of all responses of a node: tens of thousands of turns, and little beside a model."""
OVERHEAD_BYTES = 1024
"""What a response costs beside its text, so that empty ones are bounded too."""
ID_CHARS_SHOWN = 64
"""Of an unknown id, in an error: ours have 29."""


class UnknownResponseError(MeshnodeError):
    """No response with this id is kept for this API key (HTTP 404); `param` names the field."""

    def __init__(self, id: str, param: str) -> None:
        super().__init__(
            f"There is no response `{id[:ID_CHARS_SHOWN]}` here. Responses are kept in the memory "
            f"of the node that was asked, for {KEPT_FOR_S / 3600:.0f} h at most."
        )
        self.param = param


@dataclass(frozen=True, slots=True)
class Kept:
    """A response: as it was answered (JSON), and the conversation up to it, instructions left out.

    `size` in bytes is what it counts for.
    """

    wire: bytes
    conversation: tuple[ChatMessage, ...]

    @property
    def size(self) -> int:
        # Four bytes hold any character. Turns share their beginnings; counted in full, the bound
        # holds also when only the last of them is left.
        text = sum(4 * _chars(message) for message in self.conversation)
        images = sum(len(image.data) for message in self.conversation for image in message.images)
        return OVERHEAD_BYTES * (1 + len(self.conversation)) + len(self.wire) + text + images


def _chars(message: ChatMessage) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in message.calls)
    return len(message.content) + len(message.reasoning) + calls


@dataclass(slots=True)
class _Shelf:
    """One tenant's responses, oldest first, each with the time until which it is kept."""

    responses: OrderedDict[str, tuple[float, Kept]] = field(default_factory=OrderedDict)
    size: int = 0


class KeptResponses:
    """All of a node's, by tenant (the name of an API key, b"" without). `now` in seconds."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._shelves: dict[bytes, _Shelf] = {}
        self._size = 0

    def keep(self, tenant: bytes, id: str, response: Kept, now: float) -> None:
        """Remember a response; one that is too large by itself is not.

        Whoever takes the most room loses the oldest first: no key can drive out another's.
        """
        self._expire(now)
        size = response.size
        if size > self._bytes_max:
            return
        shelf = self._shelves.setdefault(tenant, _Shelf())
        shelf.responses[id] = (now + KEPT_FOR_S, response)
        shelf.size += size
        self._size += size
        while self._size > self._bytes_max:
            largest = max(self._shelves, key=lambda each: self._shelves[each].size)
            self._drop(largest, next(iter(self._shelves[largest].responses)))

    def find(self, tenant: bytes, id: str, now: float, *, param: str = "response_id") -> Kept:
        """Raises `UnknownResponseError`, which names `param`."""
        self._expire(now)
        shelf = self._shelves.get(tenant)
        if shelf is None or id not in shelf.responses:
            raise UnknownResponseError(id, param)
        return shelf.responses[id][1]

    def forget(self, tenant: bytes, id: str, now: float) -> None:
        """Raises `UnknownResponseError`."""
        self.find(tenant, id, now)
        self._drop(tenant, id)

    def _expire(self, now: float) -> None:
        for tenant, shelf in list(self._shelves.items()):
            while shelf.responses:
                id, (until, _) = next(iter(shelf.responses.items()))
                if until > now:
                    break
                self._drop(tenant, id)

    def _drop(self, tenant: bytes, id: str) -> None:
        shelf = self._shelves[tenant]
        size = shelf.responses.pop(id)[1].size
        shelf.size -= size
        self._size -= size
        if not shelf.responses:
            del self._shelves[tenant]
